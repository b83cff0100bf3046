"""Tables of which the newest row of a key counts, whatever order their files come in."""

import itertools
import json
import random
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import duckdb
import polars as pl
import pytest
from distributed import Client, LocalCluster
from polars.testing import assert_frame_equal

from etl import lake as lakes
from etl.lake import commit as commits
from etl.lake import snapshot as snapshots
from etl.lake import upsert
from etl.lake.table import BATCH, INT, TEXT, TIME, Column, Table
from etl.questions import engines

START = datetime(2026, 3, 1, tzinfo=UTC)
USER = Table(
    "user",
    {"id": INT, "region": TEXT, "plan": Column(TEXT, nullable=True), "changed": TIME},
    key=("region", "id"),
    mode="upsert",
    order_by="changed",
    on_duplicate="newest",
)
LAST = Table("last", {"id": INT, "value": INT}, key=("id",), mode="upsert", on_duplicate="keep")


class Lake(lakes.Lake):
    tables: ClassVar = {"user": USER, "last": LAST}


ASKED = {"max_files": 99, "max_bytes": 10**8, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": None}
COMPACT = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24, "run_id": "compact"}


def land(lake: Lake, path: str, rows: list[dict]) -> None:
    lake.root.write(f"landing/{path}", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def ingest(lake: Lake, run_id: str = "r") -> list[tuple]:
    return lake.drain(**ASKED, run_id=run_id, now=START + timedelta(days=9)).select("files", "files_refused").rows()


def user(number: int, minute: int, plan: str | None = "free", region: str = "eu") -> dict:
    return {"id": number, "region": region, "plan": plan, "changed": (START + timedelta(minutes=minute)).isoformat()}


def users(lake: Lake) -> list[tuple]:
    return lake.snapshot().frame("user", ["id", "region", "plan"]).collect().sort("id", "region").rows()


def test_the_newest_row_of_a_key_counts(tmp_path):
    lake = Lake(tmp_path)
    land(lake, "user/1.json", [user(1, 5), user(2, 5), user(2, 6, "pro"), user(2, 4, "old"), user(1, 1, region="us")])
    ingest(lake)
    wanted = [(1, "eu", "free"), (1, "us", "free"), (2, "eu", "pro")]
    assert users(lake) == wanted
    land(lake, "user/2.json", [user(2, 5, "late"), user(1, 9, None), user(3, 0)])
    ingest(lake)
    wanted = [(1, "eu", None), (1, "us", "free"), (2, "eu", "pro"), (3, "eu", "free")]
    for _ in range(2):
        assert users(lake) == wanted
        assert lake.snapshot().row_count("user") == 4
        done = lake.compact(**COMPACT)
        assert done["failed"].null_count() == done.height
        assert (done["rows_before"] == done["rows_after"]).all()
    plain = pl.from_arrow(lake.table("user").to_pyarrow_table())  # any other reader, after a compaction
    assert plain.sort("id", "region").select("id", "region", "plan").rows() == wanted
    assert lake.snapshot().overlay("user") is None
    land(lake, "user/3.json", [user(3, -1, "older"), user(2, 6, "as new, and came later")])
    ingest(lake)
    wanted[2] = (2, "eu", "as new, and came later")
    assert users(lake) == wanted
    assert not [finding for finding in lake.examine() if finding.problem]
    assert lake.rebuild()["equal"].all()
    assert users(lake) == wanted


def test_lines_that_do_not_fit_are_set_apart(tmp_path):
    lake = Lake(tmp_path)
    lake.root.write("landing/last/1.json", b'{"id": 1, "value": 1}\n{oops\n{"id": 2}\n')
    lake.root.write("landing/last/2.csv", b"id,value\n1,2\nx,3\n")
    assert ingest(lake) == [(2, 0)]
    assert lake.snapshot().frame("last").collect().rows() == [(1, 2)]
    assert lake.refused_lines().height == 3


def test_without_an_order_what_comes_last_counts(tmp_path):
    lake = Lake(tmp_path)
    for value, compact in ((1, False), (2, True), (3, False), (1, False)):
        land(lake, f"last/{lake.published() is None}-{value}-{compact}.json", [{"id": 7, "value": value}])
        ingest(lake)
        if compact:
            lake.compact(**COMPACT)
        assert lake.snapshot().frame("last").collect().rows() == [(7, value)]
    lake.compact(**COMPACT)
    assert lake.snapshot().frame("last", ["value", BATCH]).collect().rows() == [(1, 4)]


def test_a_file_may_come_again_with_other_content_where_the_newest_counts(tmp_path):
    lake = Lake(tmp_path)
    for minute, plan in enumerate(("a", "b", "c")):
        land(lake, "user/all.json", [user(1, minute, plan)])
        assert ingest(lake) == [(1, 0)]
        assert users(lake) == [(1, "eu", plan)]
    land(lake, "user/all.json", [user(1, 1, "b")])  # as it was once
    assert ingest(lake) == [(0, 0)]
    assert users(lake) == [(1, "eu", "c")]
    (day,) = lake.root.names("archive")
    assert len(lake.root.tree(f"archive/{day}")) == 4
    assert lake.rebuild()["equal"].all()
    land(lake, "last/all.json", [{"id": 1, "value": 1}])
    land(lake, "last/same.json", [{"id": 1, "value": 1}])
    assert ingest(lake) == [(2, 0)]
    land(lake, "last/all.json", [{"id": 1, "value": 2}])
    assert ingest(lake) == [(0, 1)]  # only where it is declared


@pytest.mark.parametrize("step", ["append", "swap_pointer"])
def test_a_batch_that_died_is_ended_once(tmp_path, monkeypatch, step):
    lake = Lake(tmp_path)
    for minute in range(2):
        land(lake, "user/all.json", [user(1, minute, f"p{minute}"), user(2 + minute, 0)])
        land(lake, f"last/{minute}.json", [{"id": 1, "value": minute}])
        if minute:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(commits if step == "append" else snapshots, step, _die)
                ingest(lake)
        ingest(lake)
    assert users(lake) == [(1, "eu", "p1"), (2, "eu", "free"), (3, "eu", "free")]
    assert lake.snapshot().frame("last").collect().rows() == [(1, 1)]
    assert lake.rebuild()["equal"].all()


def _die(*_, **__):
    raise KeyboardInterrupt


def test_any_order_of_arrival_gives_what_another_engine_says(tmp_path):
    """Updates in files, repeated and late ones, compacted now and then."""
    lake, pick = Lake(tmp_path), random.Random(7)
    updates = [
        {
            "id": pick.randrange(60),
            "region": "eu",
            "plan": f"p{n}",
            "changed": (START + timedelta(seconds=n)).isoformat(),
        }
        for n in range(3000)
    ]
    pick.shuffle(updates)
    files = [updates[first : first + 60] for first in range(0, len(updates), 60)]
    everything = tmp_path / "all.json"
    everything.write_text("".join(f"{json.dumps(row)}\n" for row in updates))
    for number, rows in enumerate(files):
        land(lake, f"user/{number}.json", rows)
        if number % 7 == 6:
            ingest(lake)
            assert users(lake) == newest_by_duckdb(tmp_path, updates[: (number + 1) * 60])
        if number % 21 == 20:
            lake.compact(**COMPACT)
    ingest(lake)
    assert users(lake) == newest_by_duckdb(tmp_path, updates)


def newest_by_duckdb(folder, updates: list[dict]) -> list[tuple]:
    (folder / "given.json").write_text("".join(f"{json.dumps(row)}\n" for row in updates))
    return duckdb.sql(
        "select id, region, arg_max(plan, changed::timestamptz) from "
        f"read_json('{folder}/given.json', format='newline_delimited') group by all order by 1, 2"
    ).fetchall()


def test_questions_see_the_newest_rows_on_both_engines(tmp_path):
    lake = Lake(tmp_path)
    for number in range(3):
        land(
            lake, f"user/{number}.json", [user(n, number * 10 + n, f"p{number}") for n in range(number * 3, 9 + number)]
        )
        ingest(lake)
        if number == 1:
            lake.compact(**COMPACT)
    asked = (lambda user: user.select("id", "plan"), lake.snapshot(), {"user": ["id", "plan", "changed"]}, {}, {})
    wanted = pl.DataFrame(users(lake), schema=["id", "region", "plan"], orient="row").drop("region")
    assert_frame_equal(engines.by_polars(*asked).sort("id"), wanted)
    alone = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**alone) as cluster, Client(cluster) as client:
        assert_frame_equal(engines.by_dask(client, *asked).sort("id"), wanted)


def test_compaction_keeps_one_row_a_key_in_files_of_the_size_that_was_asked(tmp_path, monkeypatch):
    lake = Lake(tmp_path)
    for number in range(3):
        land(lake, f"last/{number}.json", [{"id": n, "value": n * number} for n in range(number, 2000)])
        ingest(lake)
    monkeypatch.setattr("etl.lake.compaction.ROW_GROUP", 100)
    handle = lake.table("last")
    size = sum(pl.DataFrame(handle.get_add_actions(flatten=True))["size_bytes"])
    from etl.lake import compaction

    groups = compaction._with_later(handle)
    import pyarrow as pa

    made = compaction._newest(lake, "last", groups[0], pa.schema(handle.schema().to_arrow()), target=size // 4)
    assert sum(rewrite.rows for rewrite in made) == 2000 and len(made) > 3
    assert made[0].superseded == 1999 + 1998
    assert [bool(rewrite.removed) for rewrite in made] == [True, *[False] * (len(made) - 1)]


def test_a_table_of_before_becomes_one_of_which_the_newest_counts_and_back(tmp_path):
    class Before(lakes.Lake):
        tables: ClassVar = {"last": Table("last", LAST.columns, LAST.key)}

    old, lake = Before(tmp_path), Lake(tmp_path)
    for number, to in itertools.product(range(2), (old,)):
        land(to, f"last/{number}.json", [{"id": 1, "value": number}, {"id": 2 + number, "value": 0}])
        ingest(to)
    old.compact(**COMPACT)
    assert old.snapshot().frame("last").collect().height == 4
    assert len(lake.snapshot().frame("last").collect()) == 3  # by declaration alone
    land(lake, "last/2.json", [{"id": 1, "value": 2}])
    ingest(lake)
    assert sorted(lake.snapshot().frame("last").collect().rows()) == [(1, 2), (2, 0), (3, 0)]
    lake.compact(**COMPACT)
    assert sorted(lake.snapshot().frame("last").collect().rows()) == [(1, 2), (2, 0), (3, 0)]
    assert sorted(old.snapshot().frame("last").collect().rows()) == [(1, 2), (2, 0), (3, 0)]
    land(old, "last/3.json", [{"id": 1, "value": 3}])
    ingest(old)
    assert sorted(old.snapshot().frame("last").collect().rows()) == [(1, 2), (1, 3), (2, 0), (3, 0)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "merge"},
        {"order_by": "value"},
        {"on_duplicate": "newest"},
        {"mode": "upsert", "order_by": "no"},
        {"columns": {"id": INT, BATCH: INT}},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match=r"mode=|only mode='upsert'|order_by=|is no name for a column"):
        Table(**{"name": "t", "columns": {"id": INT, "value": INT}, "key": ("id",)} | wrong)


def test_a_null_is_the_oldest():
    table = Table("t", {"id": INT, "at": Column(INT, nullable=True)}, ("id",), mode="upsert", order_by="at")
    rows = pl.DataFrame({"id": [1, 1, 2, 2], "at": [5, None, None, None], BATCH: [1, 2, 2, 1]})
    assert upsert.newest(rows, table).sort("id").rows() == [(1, 5, 1), (2, None, 2)]
