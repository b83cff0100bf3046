"""The questions give DuckDB's answers on the same Parquet files, to the last digit of money, on Polars and on Dask."""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import narwhals as nw
import polars as pl
import pytest
from tpch_sql import Q01, Q05, RECOMMENDED_SUPPLIERS, UNSHIPPED_ORDERS, connect, per_minute, rows_of

from pipeline import queries
from pipeline.queries import ask, questions

ORIGIN = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
AS_OF = ORIGIN + timedelta(hours=40, seconds=25)


@dataclass(frozen=True)
class Files:
    """A snapshot over plain Parquet files: what `ask` needs of one."""

    folder: Path
    as_of: datetime = AS_OF
    batch: int = 7
    run_id: str = "preprocess-1"

    def frame(self, table, columns=None):
        return pl.scan_parquet(self.folder / f"{table}.parquet").select(columns or pl.all())

    def files(self, table):
        return [str(self.folder / f"{table}.parquet")]


@pytest.fixture(scope="module")
def tpch(tmp_path_factory):
    """tpchgen's own files at scale 0.01, its `string_view` columns included, with the two event times."""
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    subprocess.run([generator, "parquet", "--scale-factor=0.01", f"--output-dir={folder}"], check=True)
    connection = connect(folder, placed=ORIGIN)
    for table in ("orders", "lineitem"):
        connection.execute(f"COPY {table} TO '{folder}/{table}.parquet'")
    return Files(folder), connection


def answers():
    return {question.name: question for question in questions()}


def test_questions_are_found_by_their_file_and_describe_themselves():
    names = [question.name for question in questions()]
    assert names == ["q01", "q05", "recommended_suppliers", "revenue_per_minute", "unshipped_orders"]
    for question in questions():
        assert question.title and question.text.rstrip(")").endswith(("?", ".", "Q1", "Q5"))
        assert "\n" not in question.title + question.text
    assert answers()["q05"].parameters == {"region_name": "ASIA", "first_day": date(1994, 1, 1)}


def test_asking_is_lazy_until_the_small_end_on_polars(tpch):
    snapshot, _ = tpch
    for question in questions():
        frames = {t: nw.from_native(snapshot.frame(t, c).clear()) for t, c in question.tables.items()}
        now = {"as_of": AS_OF} if question.live else {}
        assert isinstance(question.answer(**frames, **now).to_native(), pl.LazyFrame)


def assert_q01(result, expected):
    assert len(result) == len(expected) == 4
    for row, wanted in zip(result.rows(), expected, strict=True):
        assert row[:6] == wanted[:6]
        assert row[6:9] == pytest.approx(wanted[6:9], rel=1e-12)
        assert row[9] == wanted[9]


@pytest.mark.parametrize("days", [90, 61, 120])
def test_q01_equals_sql(tpch, days):
    snapshot, connection = tpch
    result = ask(answers()["q01"], snapshot, days=days)
    assert_q01(result, rows_of(connection, Q01, days))
    assert isinstance(result["charge"][0], Decimal)


def test_default_parameters_give_tpc_hs_own_queries(tpch):
    snapshot, connection = tpch
    assert_q01(ask(answers()["q01"], snapshot), rows_of(connection, "PRAGMA tpch(1)"))
    assert ask(answers()["q05"], snapshot).rows() == rows_of(connection, "PRAGMA tpch(5)")


@pytest.mark.parametrize(
    "region, first_day",
    [
        ("AFRICA", date(1993, 1, 1)),
        ("EUROPE", date(1994, 6, 2)),  # has orders on its first day and a year later
    ],
)
def test_q05_equals_sql(tpch, region, first_day):
    snapshot, connection = tpch
    expected = rows_of(connection, Q05, region, first_day, first_day.replace(year=first_day.year + 1))
    result = ask(answers()["q05"], snapshot, region_name=region, first_day=first_day)
    assert result.rows() == expected
    assert expected


def test_unshipped_orders_equal_sql(tpch):
    snapshot, connection = tpch
    expected = rows_of(connection, UNSHIPPED_ORDERS, AS_OF)
    result = ask(answers()["unshipped_orders"], snapshot)
    assert result.rows() == expected
    assert result.group_by("segment").len()["len"].to_list() == [50] * 5


def test_unshipped_orders_knows_part_shipped_ones_and_waits_for_those_to_come(tpch):
    snapshot, connection = tpch
    before = Files(snapshot.folder, as_of=ORIGIN + timedelta(seconds=2))
    result = ask(answers()["unshipped_orders"], before, top=3)
    assert result["order_time"].max() <= before.as_of
    (largest,) = rows_of(
        connection,
        """SELECT sum(l_extendedprice * (1 - l_discount)) FROM orders JOIN lineitem ON l_orderkey = o_orderkey
        WHERE o_order_time <= ? GROUP BY o_orderkey ORDER BY 1 DESC LIMIT 1""",
        before.as_of,
    )
    assert result["revenue"].max() == largest[0]


def test_recommended_suppliers_equal_sql(tpch):
    snapshot, connection = tpch
    expected = rows_of(connection, RECOMMENDED_SUPPLIERS)
    result = ask(answers()["recommended_suppliers"], snapshot)
    assert result.rows() == expected
    assert len(expected) == 5 * 150


def test_recommended_suppliers_break_ties_by_balance_then_name():
    """Random costs hardly ever tie, so here all do."""
    frames = {
        "region": pl.LazyFrame({"r_regionkey": [0], "r_name": ["ASIA"]}),
        "nation": pl.LazyFrame({"n_nationkey": [0], "n_name": ["CHINA"], "n_regionkey": [0]}),
        "supplier": pl.LazyFrame(
            {
                "s_suppkey": [1, 2, 3, 4],
                "s_name": ["d", "c", "b", "a"],
                "s_nationkey": [0] * 4,
                "s_acctbal": [Decimal("-5.00"), Decimal("7.00"), Decimal("7.00"), Decimal("6.99")],
            },
            schema_overrides={"s_acctbal": pl.Decimal(15, 2)},
        ),
        "part": pl.LazyFrame({"p_partkey": [10, 11], "p_type": ["TIN", "TIN"]}),
        "partsupp": pl.LazyFrame(
            {
                "ps_partkey": [11, 10, 10, 11, 10],
                "ps_suppkey": [3, 3, 1, 2, 4],
                "ps_supplycost": [Decimal("1.00")] * 5,
            },
            schema_overrides={"ps_supplycost": pl.Decimal(15, 2)},
        ),
    }
    answer = answers()["recommended_suppliers"].answer(**{t: nw.from_native(f) for t, f in frames.items()})
    result = answer.to_native().collect()
    assert result.select("supplier", "part_key").rows() == [("b", 10)]
    assert result["supply_cost"].to_list() == [Decimal("1.00")]


def test_revenue_per_minute_equals_sql_with_empty_minutes_as_zero(tpch):
    snapshot, connection = tpch
    as_of = ORIGIN + timedelta(minutes=3, seconds=20)
    minutes = 5
    expected = per_minute(connection, as_of, minutes)
    result = ask(answers()["revenue_per_minute"], Files(snapshot.folder, as_of=as_of), minutes=minutes)
    assert result.rows() == expected
    assert [row[1] for row in expected] == [0, 0, 15000]  # none before the first order


def test_revenue_per_minute_before_a_minute_is_whole_is_one_row_of_nothing(tpch):
    snapshot, connection = tpch
    as_of = ORIGIN + timedelta(seconds=29, milliseconds=999)
    result = ask(answers()["revenue_per_minute"], Files(snapshot.folder, as_of=as_of), minutes=5)
    assert result.rows() == per_minute(connection, as_of, 5) == [(ORIGIN - timedelta(minutes=1), 0, 0)]


def test_an_unknown_parameter_is_refused(tpch):
    snapshot, _ = tpch
    with pytest.raises(TypeError, match="q01 has no parameter day; it has .*days"):
        ask(answers()["q01"], snapshot, day=90)


def test_dask_gives_the_same_answers(tpch):
    import distributed

    snapshot, _ = tpch
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        for question in questions():
            before = len(cluster.scheduler.computations)
            by_dask = ask(question, snapshot, dask=cluster.scheduler_address)
            assert len(cluster.scheduler.computations) > before, question.name
            by_polars = ask(question, snapshot)
            assert by_dask.schema == by_polars.schema, question.name
            assert by_dask.equals(by_polars), question.name


def test_a_saved_answer_is_current_and_says_where_it_came_from(tpch, tmp_path):
    snapshot, _ = tpch
    question = answers()["q05"]
    root = str(tmp_path / "root")
    with pytest.raises(FileNotFoundError):
        queries.current(root, "q05")
    queries.save(root, ask(question, snapshot), question, snapshot, "query-1")
    result = ask(question, snapshot, region_name="EUROPE")
    queries.save(root, result, question, snapshot, "query-2", {"region_name": "EUROPE"})

    pointer, frame = queries.current(root, "q05")
    assert frame.equals(result)
    assert frame.schema["revenue"].scale == 4
    assert pointer == {
        "question": "q05",
        "title": "Local supplier volume",
        "file": "results/q05/query-2.parquet",
        "rows": 5,
        "batch": 7,
        "as_of": AS_OF.isoformat(),
        "run_id": "query-2",
        "parameters": {"region_name": "EUROPE", "first_day": "1994-01-01"},
    }
    files = sorted(path.name for path in (tmp_path / "root/results/q05").iterdir())
    assert files == ["current.json", "query-1.parquet", "query-2.parquet"]
    metadata = pl.read_parquet_metadata(tmp_path / "root/results/q05/query-1.parquet")
    assert metadata["run_id"] == "query-1"
    assert json.loads(metadata["parameters"]) == {"region_name": "ASIA", "first_day": "1994-01-01"}
    assert (metadata["batch"], metadata["as_of"]) == ("7", AS_OF.isoformat())
