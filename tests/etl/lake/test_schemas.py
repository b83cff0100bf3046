"""Tables that are declared otherwise than they are: nothing is written, readers go on, and both are named."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from deltalake import Field, Schema
from support import AT, ingest_all, orchestrate

from etl.lake import commit, rebuild, schemas
from etl.lake import snapshot as snapshots
from etl.storage import Root
from pipeline import Lake, queries, source
from pipeline.tables import DAY, KEY, TABLES, TEXT


@pytest.fixture
def declare(monkeypatch):
    """Declare a column of orders: as what, or not at all with None."""

    def change(column: str, dtype) -> None:
        kept = {name: dtype for name, dtype in TABLES["orders"].columns.items() if name != column}
        columns = kept if dtype is None else kept | {column: dtype}
        monkeypatch.setattr(Lake, "tables", TABLES | {"orders": replace(TABLES["orders"], columns=columns)})

    return change


def land_orders(root: str, stream) -> None:
    """A tick's orders alone."""
    ticks = source.make_ticks(stream, range(3, 4))
    source.land(Root.at(root), stream, {tick: {"orders": frames["orders"]} for tick, frames in ticks.items()})


def files(root: str) -> dict[str, bytes]:
    """All there is under the root but for the writer's lease."""
    return {
        str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file() and path.suffix != ".lease"
    }


def test_what_is_declared_is_said_as_delta_says_it():
    lake = Lake("anywhere")
    for table, columns in lake.columns.items():
        arrow = pl.DataFrame(schema=columns).to_arrow().schema
        delta = json.loads(Schema.from_arrow(arrow).to_json())["fields"]
        assert [field | {"nullable": True} for field in schemas.declared(lake)[table]] == delta
        needed = {field["name"] for field in schemas.declared(lake)[table] if not field["nullable"]}
        assert needed == {*lake.required[table]}


@pytest.mark.parametrize(
    ("column", "dtype", "words"),
    [
        ("o_channel", TEXT, "orders: o_channel is declared as string and missing in the table"),
        ("o_orderdate", TEXT, "orders: o_orderdate is declared as string and date in the table"),
        ("o_shippriority", pl.Int16, "orders: o_shippriority is declared as short and integer in the table"),
    ],
)
def test_a_table_that_is_declared_otherwise_is_not_written(filled, stream, declare, column, dtype, words):
    land_orders(filled, stream)
    heights = {table: Lake(filled).snapshot().frame(table).collect().height for table in Lake(filled).columns}
    question = next(one for one in queries.questions() if one.name == "q03")
    answer, before = queries.ask(question, Lake(filled).snapshot()), files(filled)
    declare(column, dtype)
    with pytest.raises(schemas.SchemasDiffer) as error:
        Lake(filled).next_batch(max_files=9, scheduled_for=AT)
    assert words in str(error.value)
    assert "take the change of its declaration back" in str(error.value)
    assert {table: Lake(filled).snapshot().frame(table).collect().height for table in Lake(filled).columns} == heights
    assert queries.ask(question, Lake(filled).snapshot()).equals(answer)
    (wrong,) = (one for one in Lake(filled).examine() if one.problem)
    assert words in wrong.problem
    assert "rebuild" not in wrong.remedy
    assert files(filled) == before


def test_columns_in_another_order_are_the_same(filled, stream, declare):
    declare("o_custkey", KEY)
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    rows = Lake(filled).snapshot().rows().filter(table="orders")["rows"][0]
    ingest_all(filled)
    assert Lake(filled).snapshot().rows().filter(table="orders")["rows"][0] > rows
    assert not [one for one in Lake(filled).examine() if one.problem]


def test_no_table_is_opened_to_know_its_columns(filled, stream, monkeypatch):
    """Where the pointer knows them: not of what was compacted since, and nothing where an earlier release wrote it."""
    place, opened = Root.at(filled), []
    real = Lake.table
    assert snapshots.read_pointer(place)["schemas"] == Lake(filled).fingerprints
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(filled)
    Lake(filled).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact-1")
    monkeypatch.setattr(Lake, "table", lambda lake, table, *rest: opened.append(table) or real(lake, table, *rest))
    assert Lake(filled).next_batch(max_files=9, scheduled_for=AT) is None
    assert sorted(opened) == ["files", "lineitem", "orders"]
    opened.clear()
    pointer = snapshots.read_pointer(place)
    place.write(snapshots.POINTER, json.dumps({k: v for k, v in pointer.items() if k != "schemas"}).encode())
    assert Lake(filled).next_batch(max_files=9, scheduled_for=AT) is None
    assert sorted(opened) == sorted(Lake(filled).columns)
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(4, 5)))
    ingest_all(filled)
    assert snapshots.read_pointer(place)["schemas"] == Lake(filled).fingerprints
    opened.clear()
    assert Lake(filled).next_batch(max_files=9, scheduled_for=AT) is None
    assert opened == []


@pytest.mark.parametrize("compacted", [False, True])
def test_a_column_that_somebody_else_added_is_kept_and_not_shown(filled, stream, compacted):
    """As one that is declared no more."""
    Lake(filled).table("orders").alter.add_columns([Field("o_extra", "string")])
    before = Lake(filled).snapshot().frame("orders").collect()
    if compacted:
        Lake(filled).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact-1")
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(filled)
    after = Lake(filled).snapshot()
    assert after.frame("orders").collect().columns == before.columns
    assert after.frame("orders", ["o_extra"]).collect().null_count().item() == after.row_count("orders") > before.height


def test_tables_that_were_made_and_never_published_are_compared_too(landed, declare):
    commit.create_tables(Lake(landed), "preprocess-1")
    declare("o_orderdate", TEXT)
    assert "o_orderdate is declared as string and date in the table" in Lake(landed).blocked()
    batch = Lake(landed).next_batch(max_files=99, scheduled_for=AT)
    assert {file.table for file in batch.held} == {"orders"} and batch.held[0].table not in {*batch.files}
    declare("o_orderdate", DAY)
    ingest_all(landed)


def test_rebuild_asks_before_rows_would_go(filled, declare):
    kept = {table: Lake(filled).snapshot().frame(table).collect().height for table in Lake(filled).columns}
    before = files(filled)
    declare("o_channel", TEXT)
    with pytest.raises(rebuild.RowsWouldGo) as error:
        Lake(filled).rebuild()
    assert str(error.value) == (
        f"{kept['orders']:,} of {kept['orders']:,} rows of orders would go: 3 files to refused/, as 375 of 375 "
        "lines do not fit: `o_channel` missing 375; line 1: o_channel: missing. Nothing was changed"
    )
    assert files(filled) == before
    compared = Lake(filled).rebuild(accept_quarantine=True)
    assert dict(compared.select("table", "rows").rows()) == kept | {"orders": 0, "files": kept["files"] - 3}
    assert [one["file"] for one in Lake(filled).refused_files()] == [
        f"orders/orders-{tick:08d}.json" for tick in range(3)
    ]
    assert Lake(filled).rebuild().select("rows").equals(compared.select("rows"))  # nothing is in the lake that would go


def test_rebuild_asks_for_single_rows_too(root, stream, made, monkeypatch):
    """Of a lake that an earlier release made, with an order of the year 9998: as of then, until it is made again."""
    far = (
        made[1]["orders"]
        .head(2)
        .with_columns(
            o_order_time=pl.Series(["2026-03-01T12:00:00Z", "9998-01-01T00:00:00Z"]).str.to_datetime(time_unit="us")
        )
    )
    Root.at(root).write("landing/orders/orders-00000001.json", source.to_json_lines(far))
    with monkeypatch.context() as patched:
        far_ahead = replace(TABLES["orders"], slack=timedelta(days=365 * 7980))
        patched.setattr(Lake, "tables", TABLES | {"orders": far_ahead})
        ingest_all(root)
    assert Lake(root).snapshot().as_of.year == 9998
    with pytest.raises(
        rebuild.RowsWouldGo, match="1 of 2 rows of orders would go: 1 lines to quarantine, as o_order_time"
    ):
        Lake(root).rebuild()
    Lake(root).rebuild(accept_quarantine=True)
    assert (Lake(root).snapshot().as_of.year, Lake(root).snapshot().frame("orders").collect().height) == (2026, 1)


def test_on_the_command_line(project, filled, stream):
    """A column more in tables.py: preprocess takes the other tables' files, says the sentence and is not tried again;
    rebuild asks."""
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    tables = project / "pipeline/tables.py"
    tables.write_text(tables.read_text().replace('"o_order_time": TIME,', '"o_order_time": TIME, "o_channel": TEXT,'))
    before = Lake(filled).snapshot()
    done = orchestrate(project, "run", "preprocess", "--root", filled, "--json")
    (record,) = json.loads(done.stdout)
    assert (done.returncode, record["state"], record["attempt"]) == (1, "check_failed", 1)
    assert "o_channel is declared as string and missing in the table" in record["reason"]
    assert record["reason"].endswith("take the change of its declaration back, or give the column another name)")
    after = Lake(filled).snapshot()
    assert (after.versions["orders"], after.batch) == (before.versions["orders"], before.batch + 1)
    assert [path.parent.name for path in Path(filled, "landing").glob("o*/*")] == ["orders"]
    (again,) = json.loads(orchestrate(project, "run", "preprocess", "--root", filled, "--json").stdout)
    assert (again["state"], again["attempt"]) == ("check_failed", 1)
    refused = orchestrate(project, "rebuild", "--root", filled)
    assert refused.returncode == 1
    assert "rows of orders would go" in refused.stderr
    assert "rebuild --accept-quarantine" in refused.stderr
    assert Lake(filled).snapshot() == after
    assert orchestrate(project, "rebuild", "--root", filled, "--accept-quarantine").returncode == 0
    assert Lake(filled).snapshot().rows().filter(table="orders")["rows"][0] == 0
