"""The questions give DuckDB's answers on the same data, to the last digit of money, on Polars and on Dask."""

import json
import os
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from inspect import signature
from pathlib import Path

import dask.config
import narwhals as nw
import polars as pl
import pytest
from distributed import Client
from faults.answers import one_tick
from support import ingest_all
from tpch_sql import QUESTIONS, per_minute, rows_of, tpch, unlike

from etl.questions import engines
from etl.storage import Root
from pipeline import Lake, queries, source
from pipeline.queries import ask, questions
from pipeline.queries._dates import months_later

ORIGIN = datetime(2026, 3, 1, 11, 59, 30, tzinfo=UTC)  # of the orders: the 30 seconds before their tick
AS_OF = ORIGIN + timedelta(hours=20, seconds=25)  # some line items have shipped, and some have not


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """TPC-H at scale 0.01 in a lake, as of a later time, and DuckDB over tpchgen's own files of it."""
    snapshot, connection = one_tick(tmp_path_factory.mktemp("tpch"), 0.01)
    return replace(snapshot, as_of=AS_OF), connection


def named(name):
    return next(question for question in questions() if question.name == name)


def test_questions_are_found_by_their_file_and_describe_themselves():
    names = [question.name for question in questions()]
    assert names == sorted(QUESTIONS)
    assert [name for name in names if name.startswith("q")] == [f"q{n:02}" for n in range(1, 23)]
    for question in questions():
        assert question.title and "?" in question.text and "\n" not in question.title + question.text
        if question.name.startswith("q"):
            assert question.text.endswith(f"(TPC-H Q{int(question.name[1:])})")
    assert named("q05").parameters == {"region_name": "ASIA", "first_day": date(1994, 1, 1)}
    assert named("q05").given == "With region name ASIA; first day 1994-01-01."
    assert named("q22").given == "With codes 13, 31, 23, 29, 30, 18, 17."
    assert named("recommended_suppliers").given == ""
    assert [question.name for question in questions() if question.live] == [
        "late_deliveries",
        "revenue_per_minute",
        "top_customers",
        "unshipped_orders",
    ]


def test_asking_is_lazy_until_the_small_end_on_polars(asked):
    snapshot, _ = asked
    for question in questions():
        frames = {t: nw.from_native(snapshot.frame(t, c).clear()) for t, c in question.tables.items()}
        cents = pl.selectors.decimal().to_physical().cast(pl.Int64)
        frames = {t: nw.from_native(f.to_native().with_columns(cents)) for t, f in frames.items()}
        now = {"as_of": AS_OF} if question.live else {}
        asked_first = question.portion or question.answer
        taken = {table: frame for table, frame in frames.items() if table in signature(asked_first).parameters}
        assert isinstance(asked_first(**taken, **now).to_native(), pl.LazyFrame)


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_the_answers_are_those_of_sql(asked, name):
    snapshot, connection = asked
    rows = 0
    for as_of in (AS_OF, ORIGIN + timedelta(seconds=10)) if named(name).live else (AS_OF,):
        expected = QUESTIONS[name](connection, as_of)
        assert not unlike(ask(named(name), replace(snapshot, as_of=as_of)), expected)
        rows += len(expected)
    assert rows or name == "q18"  # no order is that large at this scale


def test_large_orders_are_found_where_there_are_some(asked):
    snapshot, connection = asked
    expected = tpch(connection, 18, quantity=270)
    assert len(expected) > 5
    assert not unlike(ask(named("q18"), snapshot, quantity=270), expected)


def test_money_and_counts_have_exact_types(asked):
    snapshot, _ = asked
    for question in questions():
        for column, dtype in ask(question, snapshot).schema.items():
            assert (
                dtype.is_decimal()
                or dtype in (pl.String, pl.Date, pl.Int64, pl.Int32, pl.Datetime("us", "UTC"))
                or (dtype == pl.Float64 and ("average" in column or column.endswith(("share", "percent", "per_year"))))
            ), f"{question.name}: {column} is {dtype}"


def test_unshipped_orders_knows_part_shipped_ones_and_waits_for_those_to_come(asked):
    snapshot, connection = asked
    before = replace(snapshot, as_of=ORIGIN + timedelta(seconds=2))
    result = ask(named("unshipped_orders"), before, top=3)
    assert result["order_time"].max() <= before.as_of
    (largest,) = rows_of(
        connection,
        """SELECT sum(l_extendedprice * (1 - l_discount)) FROM orders JOIN lineitem ON l_orderkey = o_orderkey
        WHERE o_order_time <= ? GROUP BY o_orderkey ORDER BY 1 DESC LIMIT 1""",
        before.as_of,
    )
    assert result["revenue"].max() == largest[0]


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
                "s_acctbal": [-500, 700, 700, 699],
            }
        ),
        "part": pl.LazyFrame({"p_partkey": [10, 11], "p_type": ["TIN", "TIN"]}),
        "partsupp": pl.LazyFrame(
            {"ps_partkey": [11, 10, 10, 11, 10], "ps_suppkey": [3, 3, 1, 2, 4], "ps_supplycost": [100] * 5}
        ),
    }
    answer = named("recommended_suppliers").answer(**{t: nw.from_native(f) for t, f in frames.items()})
    result = answer.to_native().collect()
    assert result.select("supplier", "part_key").rows() == [("b", 10)]
    assert result["supply_cost"].to_list() == [Decimal("1.00")]


@pytest.mark.parametrize("in_stock, promoters", [(5, []), (6, [("a", "here")])])
def test_more_than_half_of_what_was_sold_has_to_be_in_stock(in_stock, promoters):
    """TPC-H's stocks are hundreds of times what a year sells, so here they are not."""
    frames = {
        "nation": {"n_nationkey": [1], "n_name": ["CANADA"]},
        "supplier": {"s_suppkey": [7], "s_name": ["a"], "s_address": ["here"], "s_nationkey": [1]},
        "part": {"p_partkey": [3], "p_name": ["forest green"]},
        "partsupp": {"ps_partkey": [3], "ps_suppkey": [7], "ps_availqty": [in_stock]},
        "lineitem": {
            "l_partkey": [3, 3, 3],
            "l_suppkey": [7, 7, 7],
            "l_quantity": [400, 600, 5000],  # hundredths
            "l_shipdate": [date(1994, 1, 1), date(1994, 12, 31), date(1995, 1, 1)],
        },
    }
    answer = named("q20").answer(**{table: nw.from_native(pl.LazyFrame(rows)) for table, rows in frames.items()})
    assert answer.to_native().collect().rows() == promoters


def test_revenue_per_minute_equals_sql_with_empty_minutes_as_zero(asked):
    snapshot, connection = asked
    as_of = ORIGIN + timedelta(minutes=3, seconds=20)
    expected = per_minute(connection, as_of, 5)
    result = ask(named("revenue_per_minute"), replace(snapshot, as_of=as_of), minutes=5)
    assert result.rows() == expected
    assert [row[1] for row in expected] == [0, 0, 15000]  # none before the first order


def test_revenue_per_minute_before_a_minute_is_whole_is_one_row_of_nothing(asked):
    snapshot, connection = asked
    as_of = ORIGIN + timedelta(seconds=29, milliseconds=-1)
    result = ask(named("revenue_per_minute"), replace(snapshot, as_of=as_of), minutes=5)
    assert result.rows() == per_minute(connection, as_of, 5) == [(datetime(2026, 3, 1, 11, 58, tzinfo=UTC), 0, 0)]


def test_nothing_sold_is_zero_or_null_never_not_a_number(asked):
    snapshot, _ = asked
    nothing = date(1980, 1, 1)
    assert ask(named("q06"), snapshot, first_day=nothing).rows() == [(0,)]
    assert ask(named("q14"), snapshot, first_day=nothing).rows() == [(None,)]
    assert ask(named("q17"), snapshot, brand="none").rows() == [(None,)]
    assert ask(named("q15"), snapshot, first_day=nothing).height == 0


def test_an_unknown_parameter_is_refused(asked):
    with pytest.raises(TypeError, match="q01 has no parameter day; it has .*days"):
        ask(named("q01"), asked[0], day=90)


@pytest.mark.parametrize(
    "day, months, later",
    [(date(1993, 12, 1), 1, date(1994, 1, 1)), (date(1993, 1, 31), 12, date(1994, 1, 31))],
)
def test_months_later(day, months, later):
    assert months_later(day, months) == later
    with pytest.raises(ValueError):
        months_later(date(1993, 1, 31), 1)


def test_dask_gives_the_same_answers(asked, cluster):
    snapshot, _ = asked
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        for question in questions():
            before = len(cluster.scheduler.computations)
            by_dask = ask(question, snapshot, dask=client)
            assert len(cluster.scheduler.computations) > before, question.name
            by_polars = ask(question, snapshot)
            assert by_dask.schema == by_polars.schema, question.name
            assert by_dask.equals(by_polars), question.name


@pytest.mark.parametrize(
    "name, rows, parameters",
    [
        ("q05", 3500, {}),
        ("unshipped_orders", 3500, {}),
        ("q17", 1900, {"brand": "Brand#53", "container": "JUMBO PKG"}),  # parts are in two pieces, too
    ],
)
def test_many_pieces_are_joined_grouped_and_renamed_on_dask(asked, cluster, monkeypatch, name, rows, parameters):
    """Dask's optimizer takes frames for partitioned that are not, with errors or with wrong answers."""
    monkeypatch.setattr(engines, "PIECE_ROWS", rows)
    assert len(engines.pieces(asked[0], "lineitem")) > 17
    answer = ask(named(name), asked[0], dask=cluster.scheduler_address, **parameters)
    assert answer.equals(ask(named(name), asked[0], **parameters))
    assert answer.height and answer.row(0) != (None,)


def test_workers_need_the_packages_and_not_the_project(asked, bare_cluster, monkeypatch):
    monkeypatch.setattr(engines, "PIECE_ROWS", 20_000)
    for name in ("q05", "top_customers"):
        assert ask(named(name), asked[0], dask=bare_cluster).equals(ask(named(name), asked[0])), name


@pytest.fixture
def two_days(root) -> str:
    """A lake of two batches: a tick, and another two days later."""
    stream = source.Stream(0.01, 40, "2026-03-01T12:00:00+00:00")
    for tick in (0, 2 * 24 * 120):
        source.land(Root.at(root), stream, source.make_ticks(stream, range(tick, tick + 1)))
        ingest_all(root)
    return root


def test_files_older_than_a_questions_window_are_not_read(two_days, cluster):
    """They are gone, and only those who ask for longer miss them."""
    snapshot, hour = Lake(two_days).snapshot(), timedelta(hours=1)
    assert len(engines.pieces(snapshot, "orders")) == 2
    (recent,) = engines.pieces(snapshot, "orders", ("o_order_time", snapshot.as_of - hour))
    assert engines.pieces(snapshot, "orders", ("o_order_time", snapshot.as_of + hour)) == []
    whole = {engine: ask(named("top_customers"), snapshot, dask=engine) for engine in (None, cluster.scheduler_address)}
    for url in snapshot.files("orders"):
        if url != recent.url:
            Path(url).unlink()
    for engine, answer in whole.items():
        assert ask(named("top_customers"), snapshot, dask=engine).equals(answer)
        with pytest.raises((OSError, pl.exceptions.PolarsError)):
            ask(named("top_customers"), snapshot, dask=engine, hours=100)
    nobody = replace(snapshot, as_of=snapshot.as_of + 3 * hour)
    assert ask(named("top_customers"), nobody, dask=cluster.scheduler_address).height == 0


def test_a_question_that_fails_keeps_no_other_from_its_answer(asked, caplog):
    def answer(region):
        raise RuntimeError("no such luck")

    def chart(result):
        raise ValueError("not to be drawn")

    broken = replace(named("q05"), name="broken", tables={"region": ["r_name"]}, answer=answer)
    plain = replace(named("q04"), name="plain", chart=chart)
    asked_for = [broken, plain, named("q01"), named("q02")]
    failed, undrawn, found, chartless = queries.ask_all(asked_for, asked[0], draw=lambda chart, frame: chart(frame))
    assert (failed.frame, failed.picture, failed.problem) == (None, None, "RuntimeError: no such luck")
    assert (undrawn.frame.height, undrawn.picture) == (5, None)
    assert undrawn.problem == "the chart: ValueError: not to be drawn"
    assert (found.frame.height, found.problem, found.picture is not None) == (4, "", True)
    assert (chartless.frame is not None, chartless.problem, chartless.picture) == (True, "", None)
    assert "no such luck" in caplog.text and "not to be drawn" in caplog.text
    assert queries.overview([failed, undrawn, found]).select("question", "rows", "problem").rows() == [
        ("broken", None, "RuntimeError: no such luck"),
        ("plain", 5, "the chart: ValueError: not to be drawn"),
        ("q01", 4, ""),
    ]


def test_no_cluster_at_the_address_is_an_error_at_once_and_not_one_for_each_question(asked):
    with dask.config.set({"distributed.comm.timeouts.connect": "300ms"}), pytest.raises(OSError, match="127.0.0.1:1"):
        queries.ask_all([named("q01"), named("q04")], asked[0], dask="tcp://127.0.0.1:1")


def test_a_saved_answer_is_current_and_says_where_it_came_from(asked, root, tmp_path):
    snapshot, question = asked[0], named("q05")
    with pytest.raises(FileNotFoundError):
        queries.current(Root.at(root), "q05")
    assert queries.history(Root.at(root), "q05").rows() == []
    first = ask(question, snapshot)
    queries.save(Root.at(root), first, question, snapshot, "query-1")
    result = ask(question, snapshot, region_name="EUROPE")
    queries.save(Root.at(root), result, question, snapshot, "query-2", {"region_name": "EUROPE"})

    pointer, frame = queries.current(Root.at(root), "q05")
    assert frame.equals(result)
    assert frame.schema["revenue"].scale == 4
    assert pointer == {
        "question": "q05",
        "title": "Local supplier volume",
        "file": "results/q05/query-2.parquet",
        "rows": 5,
        "batch": 1,
        "as_of": AS_OF.isoformat(),
        "run_id": "query-2",
        "parameters": {"region_name": "EUROPE", "first_day": "1994-01-01"},
        "chart": "results/q05/query-2.plotly.json",
    }
    metadata = pl.read_parquet_metadata(tmp_path / "root/results/q05/query-1.parquet")
    assert metadata["run_id"] == "query-1"
    assert json.loads(metadata["parameters"]) == {"region_name": "ASIA", "first_day": "1994-01-01"}
    assert (metadata["batch"], metadata["as_of"]) == ("1", AS_OF.isoformat())
    history = queries.history(Root.at(root), "q05")
    assert history.select("as_of", "batch", "run_id", "rows").rows() == [
        (AS_OF, 1, "query-1", 5),
        (AS_OF, 1, "query-2", 5),
    ]
    assert history["figure"].to_list() == [float(first["revenue"].sum()), float(result["revenue"].sum())]


def test_only_the_newest_answers_are_kept(asked, root, tmp_path):
    """By when they were saved: a run's name has the time that it was asked for, which may be any."""
    snapshot, question, folder = asked[0], named("q04"), tmp_path / "root/results/q04"
    answer = ask(question, snapshot)
    for run_id in ("query-1999", "query-2100", "query-3", "query-4"):
        queries.save(Root.at(root), answer, question, snapshot, run_id, keep=2)
        if run_id == "query-2100":
            (folder / "query-0.parquet").touch()  # of a run that was killed before it listed it
            os.utime(folder / "query-0.parquet", (0, 0))
            (folder / "query-2.parquet").touch()  # of one that is about to
        if run_id == "query-3":
            assert {path.name for path in folder.glob("*.parquet")} == {f"query-{n}.parquet" for n in (2, 2100, 3)}
    files = sorted(path.name for path in folder.iterdir())
    kept = [f"query-{n}.{kind}" for n in (3, 4) for kind in ("parquet", "plotly.json")]
    assert files == ["current.json", "history.json", "query-2.parquet", *kept]
    assert queries.history(Root.at(root), "q04")["run_id"].to_list() == ["query-3", "query-4"]
    queries.save(Root.at(root), answer, question, snapshot, "query-4", keep=2)  # a run by hand, again under its name
    assert queries.history(Root.at(root), "q04")["run_id"].to_list() == ["query-3", "query-4"]


def test_an_answer_that_another_run_saves_meanwhile_stays_in_the_history(asked, root):
    snapshot, question = asked[0], named("q04")
    answer = ask(question, snapshot)
    queries.changes(Root.at(root), question, answer)  # what is saved after it is added to what was there then
    history = Path(root, "results/q04/history.json")
    history.parent.mkdir(parents=True, exist_ok=True)
    line = {"as_of": AS_OF.isoformat(), "batch": 1, "run_id": "query-1", "rows": 5, "figure": 5.0, "parameters": "{}"}
    history.write_text(json.dumps([line]))
    queries.save(Root.at(root), answer, question, snapshot, "query-2")
    assert queries.history(Root.at(root), "q04")["run_id"].to_list() == ["query-1", "query-2"]


@pytest.mark.parametrize("damaged", ["current.json", "query-2.parquet", "history.json"])
@pytest.mark.parametrize("change", [lambda data: data[: len(data) // 2], lambda data: b"[{}]", lambda data: b"{}"])
def test_a_damaged_answer_gives_way_to_the_next(asked, root, tmp_path, damaged, change):
    """The run of query failed on it, for ever, and no question after it had an answer."""
    snapshot, question, folder = asked[0], named("q04"), tmp_path / "root/results/q04"
    answer = ask(question, snapshot)
    for run_id in ("query-1", "query-2"):
        queries.save(Root.at(root), answer, question, snapshot, run_id)
    before = queries.history(Root.at(root), "q04")
    (folder / damaged).write_bytes(change((folder / damaged).read_bytes()))
    assert ("cannot be read" in queries.changes(Root.at(root), question, answer)) == damaged.endswith(".parquet")
    queries.save(Root.at(root), answer, question, snapshot, "query-3")
    assert queries.current(Root.at(root), "q04")[1].equals(answer)
    assert queries.history(Root.at(root), "q04").head(2).equals(before)


def test_what_changed_is_a_sentence_in_numbers(asked, root):
    snapshot, question = asked[0], named("q05")
    before = pl.DataFrame({"nation": ["CHINA", "INDIA", "JAPAN"], "revenue": [Decimal("10.0000")] * 3})
    assert queries.changes(Root.at(root), question, before) == "This is the first answer."
    queries.save(Root.at(root), before, question, snapshot, "query-1")
    since = "batch 1, up to 2026-03-02 07:59:55 UTC"
    assert queries.changes(Root.at(root), question, before) == f"The same as for {since}."
    after = pl.DataFrame(
        {"nation": ["INDIA", "JAPAN", "KENYA"], "revenue": [Decimal("10.0000"), *[Decimal("20.0000")] * 2]}
    )
    assert queries.changes(Root.at(root), question, after) == (
        f"Since {since}: revenue 30 → 50 (+66.7%); of 3 rows 1 new, 1 changed, 1 gone."
    )
    assert (
        queries.changes(Root.at(root), question, after.drop("revenue")) == f"The answer to {since} had other columns."
    )
    assert queries.changes(Root.at(root), question, before.clear()).endswith("(-100.0%); of 0 rows 3 gone.")


@pytest.mark.parametrize(
    "name, expected",
    [("late_deliveries", "mean"), ("q20", "rows"), ("q01", "sum")],
)
def test_a_figure_is_a_sum_the_mean_of_a_share_or_the_rows(asked, name, expected):
    question = named(name)
    answer = ask(question, asked[0])
    values = {
        "mean": lambda: answer["late_share"].mean(),
        "rows": lambda: answer.height,
        "sum": lambda: float(answer["charge"].sum()),
    }
    assert queries.figure(question, answer) == pytest.approx(values[expected](), rel=1e-12)
    for other in questions():
        if other.figure:
            assert other.figure in ask(other, asked[0]).columns
