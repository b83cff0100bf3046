"""The dashboard, run as Streamlit runs it, over roots that the pipeline made."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from drawing import broken, drawn, opened, said, texts, whole
from published import QUERY_RUN
from streamlit.testing.v1 import AppTest
from streamlit.watcher.polling_path_watcher import PollingPathWatcher

from app import web
from app.shown import EXPORTS, column
from etl.runs import releases
from etl.storage import Root
from pipeline import Lake, queries

LIVE = [question for question in queries.questions() if question.live]


def test_the_dashboard_opens_with_the_overview(empty):
    assert texts(whole().title) == ["TPC-H, live"]


def test_the_footer_says_what_is_looked_at_and_which_code_runs(empty):
    told = said(whole())
    assert Root.at(empty).url in told and "no up was ever at work here" in told and "release" not in told
    code = {"release": "3f2a91c0d4e5", "since": "2026-11-22T12:04:09+00:00", "differs": ["notebooks/query.ipynb"]}
    Root.at(empty).write(releases.TOLD, json.dumps(code).encode())
    told = said(whole())
    assert "release 3f2a91c0d4e5 of 2026-11-22 12:04 UTC; working tree differs from the release: 1 file" in told
    assert "notebooks/query.ipynb" in told
    Root.at(empty).write(releases.TOLD, json.dumps({"release": None, "since": None, "differs": []}).encode())
    assert "live: the working tree runs" in said(whole())
    Root.at(empty).write(releases.TOLD, b"[]")
    assert broken(whole()) == ["The footer"]


def test_each_question_has_its_answer_whole_and_its_figure_over_time(root):
    asked, snapshot = next(q for q in queries.questions() if q.name == "q05"), Lake(root).snapshot()
    queries.save(Root.at(root), queries.ask(asked, snapshot), asked, snapshot, "query-20261122T130000-bbbbbb")
    queries.save(
        Root.at(root),
        queries.ask(asked, snapshot, region_name="EUROPE"),
        asked,
        snapshot,
        "other",
        {"region_name": "EUROPE"},
    )
    queries.save(Root.at(root), queries.ask(asked, snapshot), asked, snapshot, "query-20261122T140000-cccccc")
    shown = opened("questions")
    assert shown.selectbox[0].value == LIVE[0].name
    assert len(shown.selectbox[0].options) == len(queries.questions())
    shown.selectbox[0].select("q05")
    drawn(shown)
    assert "the year that begins on a day" in " ".join(texts(shown.caption))
    answer, past = (table.value for table in shown.dataframe)
    assert len(answer) == queries.ask(asked, snapshot).height
    runs = ["query-20261122T140000-cccccc", "query-20261122T130000-bbbbbb", QUERY_RUN]
    assert [url.rpartition("/")[2] for url in past["report"]] == runs, "the same parameters only, the newest first"
    assert past["figure"].nunique() == 1
    assert "**lineitem**: l_orderkey, l_suppkey" in shown.markdown[-1].value
    assert len(shown.get("plotly_chart")) == 2


def test_a_question_without_an_answer_says_so(empty):
    assert "There is no answer yet" in opened("questions").info[0].value


def test_an_answer_of_any_size_is_drawn_in_part_and_given_whole(root):
    """100,000 rows were drawn on a canvas 3.5 million pixels high, a text of 1 MB blocked the tab."""
    asked, snapshot = next(q for q in queries.questions() if q.name == "top_customers"), Lake(root).snapshot()
    few, rows = queries.current(Root.at(root), asked.name)[1].head(1), 100_000
    many = few.select(pl.all().repeat_by(rows).explode()).with_columns(
        customer=pl.int_range(rows).cast(pl.String).str.zfill(9)
    )
    large = pl.concat([few.with_columns(customer=pl.lit("x" * 1_000_000)), many]).with_columns(
        parts=pl.lit([1, 2]), word=pl.lit("y" * 300).cast(pl.Categorical)
    )
    queries.save(Root.at(root), large, asked, snapshot, "query-20261122T130000-bbbbbb")

    def sent(page: AppTest) -> int:
        assert not page.warning, texts(page.warning)
        assert any(f"The first 1,000 of {rows + 1:,} rows" in text for text in texts(page.caption))
        return sum(table.proto.ByteSize() for table in page.dataframe) + sum(
            len(chart.proto.spec) for chart in page.get("plotly_chart")
        )

    shown = opened("questions", question=asked.name)
    assert sent(shown) < 3_000_000
    table = shown.dataframe[0]
    assert len(table.value) == 1000 and table.value["customer"][0] == "x" * 200 + "…"
    assert (table.value["parts"][0], len(table.value["word"][0])) == ("[1, 2]", 201)
    assert [button.label for button in shown.get("download_button")] == ["CSV", "JSON", "Parquet"]


def test_a_download_is_the_answer_to_the_last_digit():
    exact = pl.DataFrame(
        {"money": ["12345678901234567890.1234"], "name": ["é"], "list": [[1, 2]], "raw": [b"x"]}
    ).with_columns(pl.col("money").cast(pl.Decimal(38, 4)))
    exact.write_parquet(stored := io.BytesIO())
    given = {kind: made(stored.getvalue()) for kind, (_, made) in EXPORTS.items()}
    assert given["Parquet"] == stored.getvalue()
    assert given["CSV"].decode() == """money,name,list,raw\n12345678901234567890.1234,é,"[1, 2]",b'x'\n"""
    assert json.loads(given["JSON"]) == [
        {"money": "12345678901234567890.1234", "name": "é", "list": [1, 2], "raw": "b'x'"}
    ]


def of(files: str, change) -> Callable[[str], None]:
    """A damage: the bytes of the files under a root that the pattern names are changed, or cut in half."""

    def damage(root: str) -> None:
        damaged = list(Path(root).glob(files))
        assert damaged, files
        for path in damaged:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2] if change is CUT else change)

    return damage


CUT = object()
ANSWER = f"results/{LIVE[0].name}"
DAMAGES = {  # page, damage, panels that cannot be shown, what is to be done, charts and tables that still are shown
    "the published snapshot": (
        *("overview", of("lake/published.json", b"[]")),
        *(["The age of the data", "What is counted"], "`python orchestrate.py rebuild`", 0, 0),
    ),
    "a table's log": (
        *("overview", of("lake/orders/_delta_log/00000000000000000001.json", b"{")),
        *(["Orders"], "`python orchestrate.py rebuild`", 0, 0),
    ),
    "a history, of a figure": ("overview", of(f"{ANSWER}/history.json", CUT), [LIVE[0].title], "run query", 0, 0),
    "an answer": ("questions", of(f"{ANSWER}/*.parquet", CUT), ["The answer"], "run query", 0, 1),
    "a history": ("questions", of(f"{ANSWER}/history.json", CUT), ["The history"], "run query", 1, 1),
    "the index of runs": (  # Polars panics, with what is no Exception
        *("runs", of("runs/*.parquet", CUT)),
        *(["The failures", "The list of runs"], "restore it, or remove runs", 0, 0),
    ),
    "the records of runs": ("runs", of("reports/*/*/*/run.json", b"{"), [], "", 0, 0),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_damaged_takes_no_more_down_than_its_own_panel(root, what):
    page, damage, panels, remedy, charts, tables = DAMAGES[what]
    damage(root)
    shown = opened(page)
    assert broken(shown) == panels
    assert all(remedy in warning.value for warning in shown.warning)
    assert (len(shown.get("plotly_chart")), len(shown.dataframe)) == (charts, tables)


@pytest.mark.parametrize(
    "name, dtype, shown_as",
    [
        ("order_date", pl.Date, ("Order date", "date", "YYYY-MM-DD")),  # of 1997-04-09 one saw 04-09 00:00:00 (UTC)
        ("order_time", pl.Datetime("us", "UTC"), ("Order time (UTC)", "datetime", "YYYY-MM-DD HH:mm:ss")),
        ("year", pl.Int64, ("Year", "number", "%d")),  # 1995, not 1,995
        ("order_year", pl.Int64, ("Order year", "number", "%d")),
        ("orders_per_year", pl.Int64, ("Orders per year", "number", "%,d")),
        ("market_share", pl.Float64, ("Market share", "number", "percent")),
        ("written_mb", pl.Float64, ("Written MB", "number", "%,.2f")),
        ("order_key", pl.Int64, ("Order key", "number", "%d")),
        ("orders", pl.Int64, ("Orders", "number", "%,d")),
        ("revenue", pl.Decimal(38, 4), ("Revenue", "number", "%,.2f")),
        ("nation", pl.String, ("Nation", "text", None)),
    ],
)
def test_a_column_is_shown_as_people_write_what_is_in_it(name, dtype, shown_as):
    config = column(name, pl.Series(dtype=dtype).dtype)
    assert (config["label"], config["type_config"]["type"], config["type_config"].get("format")) == shown_as


def test_no_file_of_settings_is_looked_at_again_and_again(monkeypatch, tmp_path):
    """Three of them, five times a second, took most of what an idle dashboard took."""
    asked = []
    monkeypatch.setattr(PollingPathWatcher, "_schedule", PollingPathWatcher._schedule)
    monkeypatch.setattr(PollingPathWatcher._executor, "submit", asked.append)
    for looks in (1, 1):
        PollingPathWatcher(f"{tmp_path}/config.toml", print, allow_nonexistent=True)
        assert len(asked) == looks
        web.look_at_settings_once()
