"""A question with a portion reads what is new, and answers as if it had read everything."""

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from support import ingest_all
from tpch_sql import connect, tpch, unlike

from etl.questions import portions
from etl.storage import Root
from pipeline import Lake, source
from pipeline.queries import ask, questions

STREAM = source.Stream(0.01, 6, "2026-03-01T11:00:00+00:00")
GROWING = [question for question in questions() if question.portion]
Q01, Q14 = (next(question for question in GROWING if question.name == name) for name in ("q01", "q14"))
COMPACT = {"target_mb": 128, "min_small_files": 2, "vacuum_hours": 24, "run_id": "compact"}


def came(root, *ticks):
    """These ticks are in the lake; its snapshot."""
    for tick in ticks:
        source.land(Root.at(root), STREAM, source.make_ticks(STREAM, range(tick, tick + 1)))
        ingest_all(root)
    return Lake(root).snapshot()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A root that was asked everything after three of six ticks."""
    root = tmp_path_factory.mktemp("half")
    snapshot = came(str(root), 0, 1, 2, 3)
    for question in GROWING:
        ask(question, snapshot, portions_in=snapshot.root)
    return root


@pytest.fixture
def lake(half, tmp_path):
    return Lake(shutil.copytree(half, tmp_path / "root"))


def files(lake):
    return {Path(url) for url in lake.snapshot().files("lineitem")}


def kept(lake, question):
    return portions.kept(lake.root, question, {})


def test_the_questions_that_have_one_are_these():
    assert [question.name for question in GROWING] == ["q01", "q06", "q14", "q15", "q19"]
    assert {question.grows for question in GROWING} == {"lineitem"}


def test_what_was_read_before_is_not_read_again(lake):
    """It is gone, and only who asks without what was kept misses it."""
    before, expected = files(lake), {}
    snapshot = came(lake.root.url, 4)
    for question in GROWING:
        expected[question.name] = ask(question, snapshot)
    for path in before:
        path.rename(path.with_suffix(".gone"))
    for question in GROWING:
        assert ask(question, lake.snapshot(), portions_in=lake.root).equals(expected[question.name])
        assert kept(lake, question).versions["lineitem"] == snapshot.versions["lineitem"]
        with pytest.raises((OSError, pl.exceptions.PolarsError)):
            ask(question, lake.snapshot())


def test_all_batches_come_to_the_answers_of_sql(lake, tmp_path):
    for tick in (4, 5):
        came(lake.root.url, tick)
        if tick == 5:
            lake.compact(**COMPACT)
        snapshot = lake.snapshot()
        for question in GROWING:
            ask(question, snapshot, portions_in=lake.root)
    snapshot = came(lake.root.url, 6)
    for table in lake.tables:
        snapshot.frame(table).sink_parquet(tmp_path / f"{table}.parquet")
    with connect(tmp_path) as connection:
        for question in GROWING:
            found = ask(question, snapshot, portions_in=lake.root)
            assert not unlike(found, tpch(connection, int(question.name[1:])))
            assert found.equals(ask(question, snapshot))


def test_what_was_compacted_since_is_read_as_it_came(lake):
    came(lake.root.url, 4)
    lake.compact(**COMPACT)
    compacted = [path for path in files(lake) if path.name.startswith("compacted-")]
    expected = ask(Q01, lake.snapshot())
    for path in compacted:
        path.rename(path.with_suffix(".gone"))
    assert ask(Q01, lake.snapshot(), portions_in=lake.root).equals(expected)


def test_everything_is_read_where_what_is_new_cannot_be_told(lake, caplog):
    first = files(lake)
    snapshot = came(lake.root.url, 4)
    new, expected = files(lake) - first, ask(Q01, snapshot)
    lake.compact(**COMPACT)
    for path in new:  # as after a day
        path.unlink()
    assert ask(Q01, lake.snapshot(), portions_in=lake.root).equals(expected)
    assert "q01 is made of all rows again" in caplog.text
    commit = Path(lake.root.url, f"lake/lineitem/_delta_log/{kept(lake, Q14).versions['lineitem'] + 1:020d}.json")
    commit.rename(commit.with_suffix(".gone"))  # the log was cleaned up
    before = kept(lake, Q14)
    assert portions.news(lake.snapshot(), Q14, before) is None


@pytest.mark.parametrize("table", ["part", "lineitem"])
def test_rows_that_were_taken_away_are_not_in_it(lake, table):
    lake.table(table).delete("p_partkey % 2 = 0" if table == "part" else "l_orderkey % 2 = 0")
    snapshot = lake.snapshot()
    snapshot = replace(snapshot, versions=snapshot.versions | {table: lake.table(table).version()})
    assert portions.news(snapshot, Q14, kept(lake, Q14)) is None
    assert ask(Q14, snapshot, portions_in=lake.root).equals(ask(Q14, snapshot))
    assert kept(lake, Q14).versions[table] == lake.table(table).version()


def test_it_is_of_its_parameters_and_its_code(lake, monkeypatch):
    snapshot = lake.snapshot()
    other = ask(Q14, snapshot, portions_in=lake.root, first_day=date(1994, 2, 1))
    assert other.equals(ask(Q14, snapshot, first_day=date(1994, 2, 1)))
    assert kept(lake, Q14) is None
    assert kept(lake, Q01) is not None
    monkeypatch.setattr(portions, "_code", lambda package: b"changed")
    assert kept(lake, Q01) is None


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"{}"])
def test_what_is_damaged_is_made_again(lake, damage):
    lake.root.write(portions.path_of("q01"), damage)
    assert ask(Q01, lake.snapshot(), portions_in=lake.root).equals(ask(Q01, lake.snapshot()))
    assert kept(lake, Q01).counted == lake.snapshot().row_count("lineitem")


def test_portions_of_different_rows_merge():
    question = replace(Q01, merges={"n": "sum", "low": "min", "high": "max"})
    frames = [pl.DataFrame({"key": ["a", "b"], "n": [1, 2], "low": [3, 4], "high": [5, 6]}) for _ in range(2)]
    frames[1] = frames[1].with_columns(low=pl.lit(1), high=pl.lit(9))
    merged = portions.merged(question, frames).sort("key")
    assert merged.rows() == [("a", 2, 1, 9), ("b", 4, 1, 9)]
    assert json.loads(merged.drop("key").sum().write_json()) == [{"n": 6, "low": 2, "high": 18}]
