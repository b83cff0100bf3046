"""Tables with files of their own for each value of a column: the same rows for whoever reads them."""

import json
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable, QueryBuilder

from etl import delta
from etl import lake as lakes
from etl.lake import compaction, ingest, promotion
from etl.lake import snapshot as snapshots
from etl.lake.table import BOOL, DAY, FLOAT, INT, INT32, TEXT, TIME, Column, Table
from etl.questions import engines

START = datetime(2026, 11, 1, 22, tzinfo=UTC)
EVENT = Table(
    "event",
    {"id": INT, "country": Column(TEXT, nullable=True), "at": TIME},
    key=("id",),
    time="at",
    partition_by=("country", "at"),
)
USER = Table(
    "user",
    {"id": INT, "region": TEXT, "plan": TEXT, "changed": TIME},
    key=("region", "id"),
    mode="upsert",
    order_by="changed",
    partition_by="region",
)
VALUES = ("DE", "a/b", "50%", "a=b", "x y", "é" * 32, "a%2Fb", "ü:?#&[]{}*\"'\\^|~", "..", "tab\t", "+", "a,b", None)
ASKED = {"max_files": 99, "max_bytes": 10**8, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": None, "run_id": "r"}
COMPACT = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24, "run_id": "compact"}


class Lake(lakes.Lake):
    tables: ClassVar = {"event": EVENT, "user": USER}


def with_table(table: Table) -> type[lakes.Lake]:
    return type("Other", (lakes.Lake,), {"tables": {**Lake.tables, table.name: table}})


def event(number: int, **other: object) -> dict:
    at = START + timedelta(hours=number % 4)
    return {"id": number, "country": VALUES[number % len(VALUES)], "at": at.isoformat()} | other


def land(lake: lakes.Lake, path: str, rows: list[dict]) -> None:
    lake.root.write(f"landing/{path}", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def filled(root: object, batches: int = 2) -> Lake:
    """Batches of 30 events in all partitions, and of users who change their plan."""
    lake = Lake(root)
    for batch in range(batches):
        numbers = range(batch * 30, batch * 30 + 30)
        land(lake, f"event/{batch}.json", [event(number) for number in numbers])
        changes = [(n % 5, ("eu", "us")[n % 2], (START + timedelta(hours=n * 7 % 50)).isoformat()) for n in numbers]
        land(lake, f"user/{batch}.json", [{"id": i, "region": r, "plan": t, "changed": t} for i, r, t in changes])
        lake.drain(**ASKED)
    return lake


def events(lake: lakes.Lake) -> list[tuple]:
    return lake.snapshot().frame("event", ["id", "country", "at_day"]).collect().sort("id").rows()


def users(lake: lakes.Lake) -> list[tuple]:
    return lake.snapshot().frame("user", ["region", "id", "plan"]).collect().sort("region", "id").rows()


def newest_users() -> list[tuple]:
    rows = [(("eu", "us")[n % 2], n % 5, (START + timedelta(hours=n * 7 % 50)).isoformat()) for n in range(60)]
    return duckdb.sql(
        f"select a, b, max(c) from (values {str(rows)[1:-1]}) t(a, b, c) group by all order by 1, 2"
    ).fetchall()


WANTED = [(number, VALUES[number % len(VALUES)], (START + timedelta(hours=number % 4)).date()) for number in range(60)]


def by_deltalake(lake: Lake) -> list[tuple]:
    builder = QueryBuilder().register("t", DeltaTable(f"{lake.root.url}/lake/event"))
    rows = builder.execute("select id, country, at_day from t order by id").read_all()
    return pl.DataFrame(rows).rows()


def by_dask(lake: Lake) -> list[tuple]:
    wanted = [("id", INT, None), ("country", TEXT, None), ("at_day", DAY, None)]
    columns = [name for name, *_ in wanted]
    pieces = engines.pieces(lake.snapshot(), "event")
    frames = [pl.from_pandas(engines._read(*piece, columns=columns, since=None, wanted=wanted)) for piece in pieces]
    return pl.concat(frames).cast({"country": TEXT}).sort("id").rows()


def test_every_reader_sees_the_same_rows_before_and_after_a_compaction(tmp_path):
    lake = filled(tmp_path)
    for files in (2, 1):
        partitions = {(country, day) for _, country, day in WANTED}
        assert len(lake.snapshot().files("event")) <= files * len(partitions)
        assert events(lake) == by_deltalake(lake) == by_dask(lake) == WANTED
        plain = pl.scan_delta(f"{tmp_path}/lake/event").select("id", "country", "at_day").collect().sort("id")
        assert plain.rows() == WANTED
        assert users(lake) == newest_users()
        assert lake.snapshot().row_count("user") == 10
        assert not [finding for finding in lake.examine() if finding.problem]
        done = lake.compact(**COMPACT)
        assert done["failed"].null_count() == done.height
        assert (done["rows_before"] == done["rows_after"]).all()
    for table, count in (("event", len(partitions)), ("user", 2)):
        assert len(lake.snapshot().files(table)) == count  # a file a partition
    assert lake.snapshot().overlay("user") is None
    assert lake.rebuild()["equal"].all()
    assert (events(lake), users(lake)) == (WANTED, newest_users())


def test_files_are_where_delta_has_them_and_lack_what_their_folder_says(tmp_path):
    lake = Lake(tmp_path)
    land(lake, "event/1.json", [event(1), event(12)])
    lake.drain(**ASKED)
    handle = lake.table("event")
    assert handle.metadata().partition_columns == ["country", "at_day"]
    (with_slash, null) = sorted(delta.files(handle), key=lambda file: file.values["country"] is None)
    assert with_slash.rel.startswith("country=a%2Fb/at_day=2026-11-01/batch-")
    assert null.rel.startswith("country=__HIVE_DEFAULT_PARTITION__/at_day=2026-11-01/")
    assert (with_slash.values, null.values["country"]) == ({"country": "a/b", "at_day": date(2026, 11, 1)}, None)
    assert pl.read_parquet_schema(f"{tmp_path}/lake/event/{with_slash.rel}").names() == ["id", "at", "_rescued"]


def test_partitions_and_statistics_prune(tmp_path):
    lake = filled(tmp_path)
    rows = lake.snapshot().frame("event")
    plan = rows.filter(pl.col("country") == "a/b").explain()
    assert "country=a%2Fb" in plan and "country=DE" not in plan
    assert rows.filter(pl.col("id") > 58).explain().count(".parquet") == 1


def test_a_value_that_no_partition_has_is_set_apart(tmp_path):
    lake = Lake(tmp_path)
    land(lake, "event/1.json", [event(0), event(1, country=""), event(2, country="x" * 65)])
    lake.drain(**ASKED)
    assert [id for id, *_ in events(lake)] == [0]
    empty, long = lake.refused_lines().sort("line")["reason"]
    assert "is empty" in empty and "longer than 64 bytes" in long


def test_a_batch_with_very_many_partitions_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "MOST_PARTITIONS", 3)
    lake = Lake(tmp_path)
    land(lake, "event/1.json", [event(number) for number in range(9)])
    with pytest.raises(ingest.TooManyPartitions, match=r"event: this batch has 9 values of country, at_day.*max_files"):
        lake.drain(**ASKED)
    assert not lake.root.names("lake")


DECLARED = {
    "no column": ({"partition_by": "land"}, "land is no column"),
    "a float": ({"partition_by": "share"}, "share is a Float64"),
    "no names": ({"partition_by": [1]}, "it is a column's name"),
    "twice": ({"partition_by": ("id", "id")}, "a column twice"),
    "a day that is there": ({"partition_by": "at"}, "would be at_day, which is a column"),
    "too long": ({"partition_by": "é" * 11}, "too long for the names of its folders"),
    "not in the key": ({"partition_by": "flag", "mode": "upsert"}, "flag has to be in the key"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_is_no_partition_is_refused_where_it_is_declared(case):
    columns = {"id": INT, "share": FLOAT, "at": TIME, "at_day": DAY, "flag": BOOL, "é" * 11: TEXT}
    with pytest.raises(ValueError, match=DECLARED[case][1]):
        Table("t", columns, key=("id",), **DECLARED[case][0])


def test_other_partitions_are_refused_before_a_row_is_written_and_made_by_a_rebuild(tmp_path):
    filled(tmp_path)
    for partition_by in ((), "country", "at"):
        table = Table("event", EVENT.columns, key=("id",), time="at", partition_by=partition_by)
        other = with_table(table)(tmp_path)
        land(other, "event/more.json", [event(60)])
        before = snapshots.read_pointer(other.root)
        assert other.drain(**ASKED).height == 0
        assert re.search(r"event is declared to be partitioned by .*rebuild", other.blocked())
        line = other.compact(**COMPACT).filter(table="event").to_dicts()[0]
        assert "SchemasDiffer" in line["failed"]
        assert snapshots.read_pointer(other.root)["tables"]["event"] == before["tables"]["event"]
    assert other.rebuild().filter(table="event")["rows"].to_list() == [60]
    assert other.table("event").metadata().partition_columns == ["at_day"]
    other.drain(**ASKED)
    assert events(other) == [*WANTED, (60, VALUES[60 % len(VALUES)], START.date())]


def test_columns_change_beside_partitions(tmp_path):
    """A new column with a default and a wider partition column: every file is written again, where it is."""
    columns = {"id": INT32, "store": INT32, "n": INT}
    narrow = Table("sale", columns, key=("id",), partition_by="store")
    lake = with_table(narrow)(tmp_path)
    land(lake, "sale/1.json", [{"id": n, "store": n % 3, "n": n} for n in range(6)])
    lake.drain(**ASKED)
    wide = Table(
        "sale",
        columns | {"id": INT, "store": INT, "kind": Column(TEXT, default="till")},
        key=("id",),
        partition_by="store",
    )
    lake = with_table(wide)(tmp_path)
    land(lake, "sale/2.json", [{"id": 2**40, "store": 2**40, "n": 1, "kind": "web"}])
    lake.drain(**ASKED)
    wanted = [*((n, n % 3, n, "till") for n in range(6)), (2**40, 2**40, 1, "web")]
    assert lake.snapshot().frame("sale").collect().sort("id").rows() == wanted
    folders = {file.rel.split("/")[0] for file in delta.files(lake.table("sale"))}
    assert folders == {f"store={store}" for store in (0, 1, 2, 2**40)}
    with pytest.raises(ValueError, match=r"sale\.store partitions the table"):
        promotion.promote(lake, "sale", "store", "r")


def test_what_nothing_needs_goes_from_partitions_too(tmp_path):
    lake, began = filled(tmp_path), datetime.now(UTC)
    lake.compact(**COMPACT)
    needed = {file.rel for file in delta.files(lake.table("event"))}
    for hours in range(0, 49, 6):
        lake.compact(**COMPACT, now=began + timedelta(hours=hours))
    left = {
        str(path.relative_to(f"{tmp_path}/lake/event")) for path in Path(tmp_path, "lake/event").rglob("*=*/*.parquet")
    }
    assert left == needed
    assert events(lake) == WANTED


@pytest.mark.parametrize("again", [False, True], ids=["the next run", "the next batch, then the next run"])
def test_a_compaction_that_is_killed_loses_no_more_than_a_group(tmp_path, monkeypatch, again):
    lake = filled(tmp_path)
    files, partitions = len(lake.snapshot().files("event")), len({row[1:] for row in WANTED})

    def die_in_the_third(*args: object) -> None:
        replaced.append(args)
        if len(replaced) == 3:
            raise KeyboardInterrupt
        real(*args)

    real, replaced = compaction._replace, list[object]()
    asked = COMPACT | {"target_mb": 0.0005}  # each partition's files are about as much
    monkeypatch.setattr(compaction, "_worth_it", lambda *args: _pairs(args[1]))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compaction, "_replace", die_in_the_third)
        lake.compact(**asked)
    assert len(delta.files(lake.table("event"))) == files - 2  # two groups are done
    assert (events(lake), len(lake.snapshot().files("event"))) == (WANTED, files)  # readers see what they saw
    if again:
        land(lake, "event/more.json", [event(60)])
        lake.drain(**ASKED)
    done = lake.compact(**asked)
    assert done["failed"].null_count() == done.height
    (line,) = done.filter(table="event").to_dicts()
    assert (line["files_before"], line["files_after"]) == (files - 2 + again, partitions)
    assert len(lake.snapshot().files("event")) == partitions
    assert events(lake)[:60] == WANTED


def _pairs(handle: DeltaTable) -> list[list[delta.File]]:
    groups = compaction._by_partition(delta.files(handle))
    return [group for group in groups if len(group) > 1]


def test_rows_of_files_as_the_log_adds_them(tmp_path):
    columns = {"id": INT, "store": INT32, "day": DAY, "open": BOOL, "name": Column(TEXT, nullable=True)}
    table = Table("sale", columns, key=("id",), partition_by=("store", "day", "open", "name"))
    lake = with_table(table)(tmp_path)
    rows = [
        {"id": n, "store": n - 1, "day": "2026-11-26", "open": n > 1, "name": [None, "a b"][n % 2]} for n in range(4)
    ]
    land(lake, "sale/1.json", rows)
    lake.drain(**ASKED)
    files = delta.added(lake.root, "lake/sale", after=0, until=1)
    some = lake.snapshot().frame_of("sale", files).select(lake.snapshot().frame("sale").collect_schema().names())
    assert some.collect().sort("id").rows() == lake.snapshot().frame("sale").collect().sort("id").rows()
    assert some.collect().height == 4
