"""Tables whose declaration changes: they are given the new columns, or nothing is written and words say why."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from polars.testing import assert_frame_equal

from etl import delta, storage
from etl.lake import Lake, commit, compaction, evolution, ingest, landing, schemas, snapshot
from etl.lake.table import DAY, INT, INT32, TEXT, TIME, Column, Table, decimal
from etl.leases import LeaseLost
from etl.questions import engines
from etl.runs import provenance

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEGUN = {"id": INT32, "name": TEXT}


def lake_of(root: Any, other: dict[str, Any] | None = None, **columns: Any) -> Lake:
    """A lake with the table `item` of these columns, and the table `other`, which never changes unless it is said."""
    declared = {"item": Table("item", columns, ("id",)), "other": Table("other", other or {"id": INT}, ("id",))}
    return type("Shop", (Lake,), {"tables": declared})(root)


def land(lake: Lake, number: int, *rows: dict[str, Any], table: str = "item") -> None:
    data = "".join(f"{json.dumps(row)}\n" for row in rows)
    lake.root.write(f"landing/{table}/{table}-{number:08d}.json", data.encode())


def ingested(lake: Lake, run_id: str = "run") -> dict[str, int]:
    batch = lake.next_batch(max_files=99, scheduled_for=None, now=NOW)
    assert batch is not None
    return lake.commit(lake.read(batch), run_id=run_id)


def rows_of(lake: Lake, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return lake.snapshot().frame("item", columns).collect().sort("id").to_dicts()


def files(lake: Lake) -> dict[str, bytes]:
    """All there is under the root but for leases."""
    paths = (path for path in Path(lake.root.url).rglob("*") if path.is_file() and path.suffix != ".lease")
    return {str(path): path.read_bytes() for path in paths}


def data_files(lake: Lake) -> set[str]:
    return set(lake.snapshot().files("item"))


def read_by_others(lake: Lake) -> None:
    """What other readers of Delta see is what is published: delta-rs by itself, Polars, DuckDB where it can."""
    newest = lake.snapshot()
    wanted = newest.frame("item", [*newest.stored("item")]).collect().sort("id")
    path, version = f"{lake.root.url}/lake/item", newest.versions["item"]
    handle = DeltaTable(path, version=version)
    by_polars = pl.scan_delta(path, version=version).select(wanted.columns).collect().sort("id")
    assert_frame_equal(by_polars, wanted)
    by_delta_rs = pl.DataFrame(pa.table(QueryBuilder().register("t", handle).execute("select * from t").read_all()))
    assert_frame_equal(by_delta_rs.select(wanted.columns).sort("id"), wanted)
    try:
        duckdb.sql("LOAD delta")
    except duckdb.Error:
        return
    by_duckdb = duckdb.sql(f"select * from delta_scan('{path}')").pl()
    assert by_duckdb.select(wanted.columns).sort("id").to_dicts() == wanted.to_dicts()


@pytest.fixture
def begun(root) -> Lake:
    """Two batches of two rows each, a file each, and a row in the other table."""
    lake = lake_of(root, **BEGUN)
    for number in range(2):
        land(lake, number, *({"id": 2 * number + n, "name": f"n{2 * number + n}"} for n in range(2)))
        land(lake, number, {"id": number}, table="other")
        ingested(lake, f"begun-{number}")
    return lake


def test_a_new_column_is_null_in_the_rows_of_before(begun):
    before, had = begun.snapshot(), data_files(begun)
    lake = lake_of(begun.root, **BEGUN, colour=Column(TEXT, nullable=True))
    assert rows_of(lake)[0] == {"id": 0, "name": "n0", "colour": None}  # before anything is written
    assert rows_of(lake, ["colour"] * 1 + ["id"])[3] == {"colour": None, "id": 3}
    assert lake.snapshot().frame("item", ["colour"]).collect().schema == {"colour": pl.String}
    assert lake.snapshot().frame("item", ["colour"]).collect().height == 4
    land(lake, 2, {"id": 4, "name": "n4", "colour": "red"}, {"id": 5, "name": "n5"})
    written = ingested(lake)
    assert [row["colour"] for row in rows_of(lake)] == [None] * 4 + ["red", None]
    assert had < data_files(lake)  # none was written again
    assert written == lake.snapshot().versions
    read_by_others(lake)
    pinned = snapshot.of_pointer(lake, {**snapshot.read_pointer(lake.root), "tables": before.versions})
    assert pinned.frame("item").collect().sort("id").to_dicts() == [
        {"id": n, "name": f"n{n}", "colour": None} for n in range(4)
    ]
    assert before.frame("item").collect().height == 4
    assert rows_of(begun) == [{"id": n, "name": f"n{n}"} for n in range(6)]  # an older process
    assert provenance.whence(lake.root, "item", 3)["run_id"] == "run"
    assert DeltaTable(f"{lake.root.url}/lake/item").metadata().id == before.table("item").metadata().id


def test_once_it_is_moved_no_table_is_opened(begun, monkeypatch):
    lake = lake_of(begun.root, **BEGUN, colour=Column(TEXT, nullable=True))
    land(lake, 2, {"id": 4, "name": "n4"})
    ingested(lake)
    monkeypatch.setattr(Lake, "table", lambda *_: pytest.fail("was opened"))
    land(lake, 3, {"id": 5, "name": "n5"})
    assert ingested(lake)["item"] == 5


def test_a_new_column_with_a_default_has_it_in_the_rows_of_before(begun):
    had = data_files(begun)
    lake = lake_of(begun.root, **BEGUN, price=Column(decimal(9, 2), default=Decimal("1.50")))
    assert [row["price"] for row in rows_of(lake)] == [Decimal("1.50")] * 4
    land(lake, 2, {"id": 4, "name": "n4", "price": 2}, {"id": 5, "name": "n5"})
    ingested(lake)
    assert [row["price"] for row in rows_of(lake)] == [Decimal(p) for p in ("1.5", "1.5", "1.5", "1.5", "2", "1.5")]
    assert not had & data_files(lake)
    assert not schemas.stored(lake.table("item"))["price"]["nullable"]
    assert lake.snapshot().row_count("item") == 6
    read_by_others(lake)


def test_a_new_column_that_rows_need_is_refused_and_taken_where_there_are_none(begun):
    lake = lake_of(begun.root, {"id": INT, "size": INT}, **BEGUN, colour=TEXT)
    land(lake, 2, {"id": 4, "name": "n4", "colour": "red"})
    before = files(lake)
    with pytest.raises(schemas.SchemasDiffer) as error:
        ingested(lake)
    assert str(error.value) == (
        "the lake's tables are not as they are declared: item: colour is declared as string and missing in the table: "
        "its 4 rows there need it to be nullable or to have a default. other: size is declared as long and missing in "
        "the table: its 2 rows there need it to be nullable or to have a default. Nothing was written to them, "
        "their files wait; what to do: take the change of its declaration back, or give the column another name"
    )
    assert files(lake) == before
    empty = lake_of(begun.root.url + "-empty", **BEGUN)
    commit.create_tables(empty, "run")
    lake = lake_of(empty.root, **BEGUN, colour=TEXT)
    land(lake, 1, {"id": 4, "name": "n4", "colour": "red"})
    ingested(lake)
    assert rows_of(lake) == [{"id": 4, "name": "n4", "colour": "red"}]


def test_a_column_that_is_declared_no_more_is_kept(begun):
    lake = lake_of(begun.root, id=INT32)
    assert rows_of(lake) == [{"id": n} for n in range(4)]
    land(lake, 2, {"id": 4, "name": "kept as unknown"})
    ingested(lake)
    assert rows_of(lake) == [{"id": n} for n in range(5)]
    assert [row["name"] for row in rows_of(lake, ["id", "name"])] == ["n0", "n1", "n2", "n3", None]
    assert schemas.stored(lake.table("item"))["name"]["nullable"]
    read_by_others(lake)
    land(begun, 3, {"id": 5, "name": "n5"})
    with pytest.raises(schemas.SchemasDiffer, match="item: name is declared as never null and null in 1 rows of the"):
        ingested(begun)
    again = lake_of(begun.root, id=INT32, name=Column(TEXT, nullable=True))
    ingested(again)
    assert [row["name"] for row in rows_of(again)] == ["n0", "n1", "n2", "n3", None, "n5"]


STRUCT = pl.Struct({"a": INT})
GROWN = pl.Struct({"a": INT, "b": pl.List(TEXT)})


@pytest.mark.parametrize(
    ("dtype", "wider", "value"),
    [
        (pl.Int8, pl.Int16, -128),
        (pl.Int8, pl.Int64, 127),
        (pl.Int16, INT32, 2**15 - 1),
        (INT32, INT, -(2**31)),
        (pl.Float32, pl.Float64, 0.1),
        (pl.Int8, decimal(3, 0), -128),
        (pl.Int16, decimal(7, 2), 2**15 - 1),
        (INT32, decimal(12, 2), 2**31 - 1),
        (INT, decimal(38, 19), 2**63 - 1),
        (decimal(4, 2), decimal(5, 2), Decimal("99.99")),
        (decimal(4, 2), decimal(10, 8), Decimal("99.99")),
        (STRUCT, GROWN, {"a": 1}),
        (pl.List(STRUCT), pl.List(GROWN), [{"a": 1}, None]),
    ],
)
def test_a_column_is_widened(root, dtype, wider, value):
    lake = lake_of(root, id=INT, it=Column(dtype, nullable=True))
    wide = lake_of(root, id=INT, it=Column(wider, nullable=True))
    told = float(value) if isinstance(value, Decimal) else value
    land(lake, 0, {"id": 0, "it": told}, {"id": 1}, {"id": 2, "extra": 1})
    ingested(lake)
    before = lake.snapshot()
    seen = wide.snapshot().frame("item").collect().sort("id")
    assert seen.schema["it"] == wider
    land(wide, 1, {"id": 3, "it": told})
    ingested(wide)
    after = wide.snapshot().frame("item").collect().sort("id")
    assert after.schema == seen.schema
    assert after.head(3).equals(seen)
    had = before.frame("item").sort("id").select(pl.col("it").cast(wider)).collect()
    assert after["it"].to_list()[0] == had["it"].to_list()[0]
    assert after["it"].null_count() == 2
    assert wide.snapshot().frame("item", ["_rescued"]).collect().drop_nulls().height == 1
    assert before.frame("item").collect().schema["it"] == dtype
    read_by_others(wide)
    land(lake, 2, {"id": 4, "it": told})
    with pytest.raises(schemas.SchemasDiffer, match="it is declared as .* in the table"):
        ingested(lake)  # a process with the older declaration


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (INT, INT32),
        (INT, TEXT),
        (TEXT, INT),
        (DAY, TIME),
        (INT, pl.Float64),
        (INT, decimal(18, 0)),
        (decimal(9, 2), decimal(9, 4)),
        (decimal(9, 2), decimal(9, 1)),
        (decimal(9, 2), pl.Float64),
        (pl.Float64, pl.Float32),
        (GROWN, STRUCT),
        (STRUCT, pl.Struct({"a": INT32, "b": TEXT})),
        (pl.List(INT32), pl.List(INT)),
        (STRUCT, pl.List(STRUCT)),
    ],
)
def test_any_other_type_is_refused(root, dtype, other):
    lake = lake_of(root, id=INT, it=Column(dtype, nullable=True))
    land(lake, 0, {"id": 0})
    ingested(lake)
    changed = lake_of(root, id=INT, it=Column(other, nullable=True), new=Column(INT, nullable=True))
    land(changed, 1, {"id": 1})
    before = files(lake)
    with pytest.raises(schemas.SchemasDiffer) as error:
        ingested(changed)
    had, wanted = (delta.name_of(delta.type_of(t)) for t in (dtype, other))
    assert f"item: it is declared as {wanted} and {had} in the table" in str(error.value)
    assert files(lake) == before
    assert changed.snapshot().frame("item").collect().columns == ["id", "it", "new"]
    (finding,) = [finding for finding in changed.examine() if finding.problem]
    assert finding.what == "table item" and "it is declared as" in finding.problem
    ingested(lake)


@pytest.mark.parametrize("how", ["declared", "by another writer", "a manifest"])
def test_a_table_that_cannot_become_what_is_declared_stops_no_other(begun, how):
    """Its files wait, whatever comes; when it can again they are ingested, each once."""
    lake = lake_of(begun.root, **(BEGUN if how == "by another writer" else {"id": TEXT, "name": TEXT}))
    if how == "by another writer":
        foreign(begun, FOREIGN[0][0])
    for number in (2, 3):
        land(lake, number, {"id": number + 2, "name": "x"})
        land(lake, number, {"id": number}, table="other")
    if how == "a manifest":  # one without files of the table
        held = [lake.root.read(f"landing/item/item-{number:08d}.json") for number in (2, 3)]
        for number in (2, 3):
            lake.root.remove(f"landing/item/item-{number:08d}.json")
        with pytest.MonkeyPatch.context() as patched, pytest.raises(Died):
            patched.setattr(ingest, "crash_point", lambda name: _die(name, "written down"))
            ingested(begun)
        for number, data in zip((2, 3), held, strict=True):
            lake.root.write(f"landing/item/item-{number:08d}.json", data)
    else:
        batch = lake.next_batch(max_files=99, scheduled_for=None)
        assert [file.table for file in batch.files] == ["other"] * 2
        assert "2 wait for their tables' declarations: item/item-00000002.json, item/" in str(batch)
    before = lake.snapshot()
    ended = {"for_s": 9, "scheduled_for": None, "run_id": "drain"}
    done = lake.drain(max_files=99, max_bytes=10**6, max_bad_share=0, **ended)
    assert done.select("batch", "files", "rows").rows() == [(3, 2, 2)]
    assert lake.snapshot().versions["item"] == before.versions["item"] and lake.snapshot().row_count("other") == 4
    assert "item" in lake.blocked() and "their files wait" in lake.blocked()
    for _ in range(2):  # it is not forgotten
        with pytest.raises(schemas.SchemasDiffer, match="item"):
            lake.next_batch(max_files=99, scheduled_for=None)
    land(lake, 4, {"id": 9}, table="other")
    assert ingested(lake)["item"] == before.versions["item"]
    if how == "by another writer":
        assert [file.table for file, _ in landing.files(lake)] == ["item"] * 2
        return
    assert ingested(begun)["item"] > before.versions["item"]
    assert begun.blocked() == "" and [row["id"] for row in rows_of(begun)] == list(range(6))
    assert begun.rebuild()["equal"].all()


@pytest.mark.parametrize(("point", "goes_on"), [("after the commit: item", False), ("published", True)])
def test_a_batch_that_was_begun_before_its_table_was_blocked(begun, point, goes_on):
    """What is published is archived; what is not waits until the table can be written to again."""
    land(begun, 2, {"id": 4, "name": "n4"})
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Died):
        patched.setattr(ingest, "crash_point", lambda name: _die(name, point))
        ingested(begun)
    lake = lake_of(begun.root, id=TEXT, name=TEXT)
    land(lake, 3, {"id": 5}, table="other")
    if goes_on:
        ingested(lake)
        assert ingested(lake)["other"] and lake.snapshot().row_count("other") == 3
    else:
        with pytest.raises(schemas.SchemasDiffer, match="item: id is declared as string and integer in the table"):
            ingested(lake)
        assert ingested(begun)["item"] and ingested(begun)["other"]
    assert [row["id"] for row in rows_of(begun)] == list(range(5))


def test_a_name_that_differs_by_capital_letters_is_refused(begun):
    lake = lake_of(begun.root, id=INT32, Name=Column(TEXT, nullable=True))
    land(lake, 2, {"id": 4})
    with pytest.raises(schemas.SchemasDiffer, match="Name is declared and name in the table"):
        ingested(lake)


def test_a_column_may_be_null_from_now_on_and_never_again(begun):
    lake, had = lake_of(begun.root, id=INT32, name=Column(TEXT, nullable=True)), data_files(begun)
    land(lake, 2, {"id": 4})
    ingested(lake)
    assert had < data_files(lake) and rows_of(lake)[4] == {"id": 4, "name": None}
    assert schemas.stored(lake.table("item"))["name"]["nullable"]
    read_by_others(lake)
    land(begun, 3, {"id": 5, "name": "n5"})
    with pytest.raises(schemas.SchemasDiffer, match="name is declared as never null and null in 1 rows of the table"):
        ingested(begun)
    other = lake_of(
        begun.root, {"id": INT, "x": Column(INT, nullable=True)}, id=INT32, name=Column(TEXT, nullable=True)
    )
    ingested(other)
    assert not [finding for finding in other.examine() if finding.problem]


def test_a_column_without_nulls_is_made_one_that_has_none(root):
    lake = lake_of(root, id=INT, it=Column(pl.List(INT), nullable=True), name=Column(TEXT, nullable=True))
    land(lake, 0, {"id": 0, "it": [1], "name": "a"})
    ingested(lake)
    strict = lake_of(root, id=INT, it=pl.List(INT), name=TEXT)
    land(strict, 1, {"id": 1, "it": [], "name": "b"}, {"id": 2, "it": [1]})
    ingested(strict)
    assert [field["nullable"] for field in schemas.stored(strict.table("item")).values()] == [False] * 3 + [True]
    assert rows_of(strict) == [{"id": 0, "it": [1], "name": "a"}, {"id": 1, "it": [], "name": "b"}]
    assert strict.refused_lines()["reason"].to_list() == ["name: missing"]
    read_by_others(strict)


FOREIGN = [
    ({"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"],
                   "writerFeatures": ["deletionVectors"]}}, "with deletionVectors"),
    ({"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, "protocol 2 to read and 5 to write"),
    ({"protocol": {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["rowTracking"]}}, "rowTracking"),
]  # fmt: skip


def foreign(lake: Lake, line: dict[str, Any]) -> None:
    version = lake.table("item").version() + 1
    assert delta.commit(lake.root, "lake/item", version, [delta.commit_info("SET TBLPROPERTIES", {}), line])


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize(("line", "words"), FOREIGN)
def test_what_another_writer_enabled_is_refused_before_anything_is_written(begun, line, words, when):
    for table in ("item", "other")[: 1 if when == "before" else 2]:
        land(begun, 2, {"id": 4, "name": "n4"}, table=table)
    if when == "before":
        foreign(begun, line)
        before = files(begun)
        with pytest.raises(schemas.SchemasDiffer, match=words):
            ingested(begun)
    else:
        parsed = begun.read(begun.next_batch(max_files=9, scheduled_for=None, now=NOW))
        foreign(begun, line)
        before = files(begun)
        with pytest.raises(schemas.SchemasDiffer, match=words):
            begun.commit(parsed, run_id="run")
    left = {path for path in files(begun).keys() ^ before.keys() if "/batches/" not in path}
    assert not left and begun.snapshot().batch == 2
    assert "another writer gave the table" in next(f.problem for f in begun.examine() if f.what == "table item")
    done = begun.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact")
    failed = dict(done.select("table", "failed").rows())
    assert "SchemasDiffer" in failed["item"] and failed["other"] is None
    assert rows_of(begun) == [{"id": n, "name": f"n{n}"} for n in range(4)]


@pytest.mark.parametrize(
    ("properties", "fields", "words"),
    [
        ({"delta.columnMapping.mode": "name"}, {}, "delta.columnMapping.mode = name"),
        ({"delta.appendOnly": "true"}, {}, "delta.appendOnly = true"),
        ({}, {"delta.invariants": '{"expression":{"expression":"id > 3"}}'}, "an invariant of id"),
    ],
)
def test_what_another_writer_asks_of_writers_is_refused(begun, properties, fields, words):
    handle = begun.table("item")
    columns = [*schemas.stored(handle).values()]
    columns[0] |= {"metadata": fields}
    foreign(begun, delta.meta_data("item", columns, delta.PROPERTIES | properties, str(handle.metadata().id)))
    land(begun, 2, {"id": 4, "name": "n4"})
    with pytest.raises(schemas.SchemasDiffer, match=words):
        ingested(begun)


class Died(BaseException):
    """A process that ended here."""


def dying_at(monkeypatch, number: int) -> list[str]:
    """Have the process end at the number-th point from now; the points that it came to."""
    reached: list[str] = []
    guard = threading.Lock()

    def come(name: str) -> None:
        with guard:
            reached.append(name)
            if len(reached) == number:
                raise Died(name)

    for module in (commit, compaction, delta, evolution, ingest, landing, snapshot, storage):
        if hasattr(module, "crash_point"):
            monkeypatch.setattr(module, "crash_point", come)
    return reached


def moved(root: Any) -> Lake:
    """As `begun`, with each kind of change in one table and a widened column in the other."""
    columns = {"id": INT, "colour": Column(TEXT, nullable=True), "price": Column(decimal(9, 2), default=1)}
    return lake_of(root, {"id": decimal(20, 0)}, **columns)


def test_a_run_that_dies_while_tables_are_moved_is_ended_by_the_next(begun, tmp_path):
    names = set()
    for number in count(1):
        lake = moved(tmp_path / str(number))
        subprocess.run(["cp", "-r", begun.root.url, lake.root.url], check=True)
        land(lake, 2, {"id": 4, "colour": "red", "price": 2})
        land(lake, 2, {"id": 2}, table="other")
        with pytest.MonkeyPatch.context() as patched:
            reached = dying_at(patched, number)
            try:
                ingested(lake)
                break
            except Died as point:
                names.add(str(point))
        assert [row["id"] for row in rows_of(lake)][:4] == [0, 1, 2, 3]  # a reader in between
        if lake.next_batch(max_files=9, scheduled_for=None, now=NOW):
            ingested(lake)
        assert rows_of(lake) == [
            *({"id": n, "colour": None, "price": Decimal(1)} for n in range(4)),
            {"id": 4, "colour": "red", "price": Decimal(2)},
        ], reached
        assert lake.snapshot().row_count("item") == 5 and lake.snapshot().row_count("other") == 3
        assert lake.snapshot().frame("other").collect().sort("id")["id"].to_list() == [0, 1, 2]
        changes = [lines for _, lines in delta.since(lake.root, "lake/item", -1) if any("metaData" in x for x in lines)]
        assert len(changes) == 2  # made, and moved once
        assert not [finding for finding in lake.examine() if finding.problem]
    wanted = {
        f"{what}: {table}"
        for what in ("written again, not committed", "before its columns are changed", "its columns are changed")
        for table in ("item", "other")
    }
    assert wanted <= names


@pytest.mark.parametrize(
    "point",
    ["written again, not committed: item@2", "before its columns are changed: item", "its columns are changed: item"],
)
def test_a_run_that_is_killed_while_tables_are_moved_is_ended_by_the_next(begun, point):
    lake = moved(begun.root)
    land(lake, 2, {"id": 4, "colour": "red", "price": 2})
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_evolution import ingested, moved\ningested(moved({lake.root.url!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ETL_CRASH_AT": point}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert rows_of(begun)[0] == {"id": 0, "name": "n0"}
    ingested(lake)
    assert [(row["id"], row["colour"]) for row in rows_of(lake)] == [*((n, None) for n in range(4)), (4, "red")]
    assert lake.snapshot().row_count("item") == 5
    read_by_others(lake)


@pytest.mark.parametrize("fits", [True, False])
def test_a_batch_that_was_begun_by_another_declaration(begun, fits):
    """Ended where as many rows fit; else nothing is written, for a line could be in no table or in two."""
    land(begun, 2, {"id": 4, "name": "n4", "size": 3})
    land(begun, 2, {"id": 2}, {"id": "no"}, table="other")
    with pytest.MonkeyPatch.context() as patched:
        points = dying_at(patched, 10**6)
        patched.setattr(ingest, "crash_point", lambda name: _die(name, "after the commit: item"))
        with pytest.raises(Died):
            ingested(begun)
    assert points
    columns: dict[str, Any] = BEGUN | {"size": Column(INT, nullable=True, range=None if fits else (10, None))}
    lake = lake_of(begun.root, **columns)
    if fits:
        ingested(lake)
        assert rows_of(lake)[4] == {"id": 4, "name": "n4", "size": None}
        assert rows_of(lake, ["id", "_rescued"])[4]["_rescued"] == '{"size": 3}'
    else:
        with pytest.raises(schemas.SchemasDiffer, match="item has 1 rows of it already, and now 0 would fit"):
            ingested(lake)
        ingested(begun)
        assert lake.snapshot().row_count("item") == 5
    assert lake.snapshot().row_count("other") == 3 and lake.refused_lines().height == 1


def _die(name: str, wanted: str) -> None:
    if name == wanted:
        raise Died(name)


@pytest.mark.parametrize("point", ["written, not swapped: item", "rewritten: item", "swapped: item"])
def test_a_table_is_moved_while_it_is_compacted(begun, monkeypatch, point):
    lake = moved(begun.root)
    land(lake, 2, {"id": 4, "colour": "red", "price": 2})

    def meanwhile(name: str) -> None:
        if name == point and lake.root.names("landing/item"):
            ingested(lake)

    monkeypatch.setattr(compaction, "crash_point", meanwhile)
    done = begun.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact")
    assert done["failed"].null_count() == done.height
    assert ("left to another" in done.filter(table="item")["note"][0]) == (point != "swapped: item")
    assert [(row["id"], row["colour"]) for row in rows_of(lake)] == [*((n, None) for n in range(4)), (4, "red")]
    lake.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact")
    assert [(row["id"], row["colour"]) for row in rows_of(lake)] == [*((n, None) for n in range(4)), (4, "red")]
    assert lake.snapshot().row_count("item") == 5 and len(data_files(lake)) == 1
    read_by_others(lake)


def test_the_pointer_is_not_moved_back_where_a_lease_ended_meanwhile(begun, monkeypatch):
    """As in an object store, when a writer is stopped for longer than its lease lasts."""
    lake = moved(begun.root)
    land(lake, 2, {"id": 4, "colour": "red", "price": 2})
    newer = {**snapshot.read_pointer(lake.root), "published_at": "2026-03-01T12:00:00+00:00", "run_id": "another"}

    def meanwhile(name: str) -> None:
        if name == "before its columns are changed: item":
            lake.root.write(snapshot.POINTER, json.dumps(newer).encode())

    monkeypatch.setattr(evolution, "crash_point", meanwhile)
    with pytest.raises(LeaseLost, match="another run published meanwhile"):
        ingested(lake)
    assert snapshot.read_pointer(lake.root) == newer
    ingested(lake)
    assert [row["id"] for row in rows_of(lake)] == [0, 1, 2, 3, 4]


def test_rows_that_others_append_while_files_are_written_again_are_in(begun, monkeypatch):
    """The commit is the version after the one that was read; then it is tried again, and files are used again."""
    from deltalake import write_deltalake

    lake, written = lake_of(begun.root, id=INT, name=TEXT), []
    land(lake, 2, {"id": 4, "name": "n4"})

    def meanwhile(name: str) -> None:
        if name == "before its columns are changed: item" and len(written) < 4:
            rows = pa.table({"id": pa.array([9], pa.int32()), "name": ["other"], "_rescued": pa.nulls(1, pa.string())})
            write_deltalake(f"{lake.root.url}/lake/item", rows, mode="append")
        if name == "written again, not committed: item":
            written.append(name)

    monkeypatch.setattr(evolution, "crash_point", meanwhile)
    ingested(lake)
    assert [row["id"] for row in rows_of(lake)] == [0, 1, 2, 3, 4, 9, 9]
    assert len(written) == 4  # two files of before, and one of each try
    read_by_others(lake)


def test_it_is_made_again_and_compacted_as_it_is_declared_by_now(begun):
    lake = moved(begun.root)
    land(lake, 2, {"id": 4, "colour": "red", "price": 2, "name": "n4"})
    ingested(lake)
    before = rows_of(lake)
    compared = lake.rebuild()
    assert dict(compared.select("table", "rows").rows()) == {"item": 5, "other": 2, "quarantine": 0, "files": 5}
    assert rows_of(lake) == before
    assert [json.loads(row["_rescued"]) for row in rows_of(lake, ["id", "_rescued"])] == [
        {"name": f"n{n}"} for n in range(5)
    ]  # where the column is not there any more
    land(lake, 3, {"id": 5})
    ingested(lake)
    assert len(rows_of(lake)) == 6


def test_dask_reads_files_of_before_a_column_was_added(begun):
    lake = lake_of(begun.root, **BEGUN, colour=Column(TEXT, nullable=True), size=Column(INT, default=7))
    old = lake.snapshot()
    wanted = [("id", INT32, None), ("colour", pl.String, None), ("size", pl.Int64, 7)]
    for piece in engines.pieces(old, "item", ("at", NOW)):
        frame = engines._read(*piece, wanted=wanted, columns=["id", "colour", "size"], since=None)
        assert frame["colour"].isna().all() and set(frame["size"]) == {7} and len(frame) == 2


CHANGES: list[dict[str, Any]] = [
    {"id": INT32, "name": TEXT, "size": pl.Int8},
    {"id": INT32, "name": TEXT, "size": pl.Int16},
    {"id": INT32, "name": TEXT, "size": pl.Int16, "colour": Column(TEXT, nullable=True)},
    {"id": INT, "size": pl.Int16, "colour": Column(TEXT, nullable=True)},
    {"id": INT, "size": INT32, "colour": Column(TEXT, nullable=True), "price": Column(decimal(5, 2), default=1)},
    {"id": INT, "size": INT, "price": Column(decimal(9, 4), default=1), "name": Column(TEXT, nullable=True)},
    {"id": INT, "size": Column(decimal(20, 0), nullable=True), "price": decimal(9, 4)},
]


def test_readers_never_fail_while_columns_come_go_and_are_widened(root):
    """30 batches, a change of the declaration every four of them, refused ones and compactions between; readers of the
    oldest and of the newest declaration."""
    lakes = [lake_of(root, **columns) for columns in CHANGES]
    pick, stop, wrong, reads = random.Random(1), threading.Event(), [], []

    def read(lake: Lake) -> None:
        height = 0
        while not stop.is_set():
            try:
                published = lake.snapshot()
                frame = published.frame("item").collect()
                ids = frame["id"].to_list()
                assert sorted(ids) == list(range(published.batch * 3)), "rows are missing, or there twice"
                assert len(ids) >= height and set(frame.columns) >= {"id", "size"}
                height = len(ids)
                reads.append(height)
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=read, args=(lake,)) for lake in (lakes[0], lakes[-1])]
    for batch in range(30):
        lake = lakes[min(batch // 4, len(lakes) - 1)]
        rows = [{"id": 3 * batch + n, "name": f"n{n}", "size": n, "price": n} for n in range(3)]
        land(lake, batch, *rows)
        if batch % 5 == 4:
            with pytest.raises(schemas.SchemasDiffer):
                ingested(lake_of(root, id=TEXT))
        ingested(lake, f"run-{batch}")
        if batch == 0:
            for thread in threads:
                thread.start()
        if pick.random() < 0.2:
            lake.compact(target_mb=64, min_small_files=3, vacuum_hours=24, run_id="compact")
    deadline = time.monotonic() + 60
    while reads.count(90) < 2 and not wrong and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and reads.count(90) >= 2
    lake = lakes[-1]
    frame = lake.snapshot().frame("item", ["id", "size", "price", "name", "colour"]).collect().sort("id")
    assert frame["id"].to_list() == list(range(90))
    assert [int(size) for size in frame["size"]] == [0, 1, 2] * 30
    assert frame["price"][:48].to_list() == [Decimal(1)] * 48
    assert frame["price"][48:].to_list() == [Decimal(n) for n in (0, 1, 2)] * 14
    named = [0 <= batch < 12 or 20 <= batch < 24 for batch in range(30) for _ in range(3)]
    assert [name is not None for name in frame["name"]] == named
    read_by_others(lake)
    assert not [finding for finding in lake.examine() if finding.problem]
