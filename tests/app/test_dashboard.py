"""The dashboard, run as Streamlit runs it, over roots that the pipeline made."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import nbformat
import polars as pl
import pytest
import streamlit as st
from published import QUERY_RUN, add_run
from streamlit.testing.v1 import AppTest

from app.shown import EXPORTS, column
from etl.runs import engine, releases
from etl.runs.record import RunRequest
from etl.storage import PROJECT, Root
from pipeline import Lake, queries

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
WORK = """import pathlib, time
print("half way", flush=True)
while not pathlib.Path({!r}).exists(): time.sleep(0.1)"""


LIVE = [question for question in queries.questions() if question.live]


def page() -> AppTest:
    """The live page, drawn once."""
    return drawn(AppTest.from_function(overview_page, default_timeout=60))


def drawn(shown: AppTest) -> AppTest:
    """Drawn once more; an exception in it fails the test."""
    shown.run()
    assert not shown.exception, shown.exception
    return shown


def overview_page() -> None:
    from app.views import overview

    overview.page()


def questions_page() -> None:
    from app.views import questions

    questions.page()


def runs_page() -> None:
    from app.views import runs

    runs.page()


def texts(elements) -> list[str]:
    return [element.value for element in elements]


def metrics(shown: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in shown.metric}


def test_the_dashboard_opens_with_the_overview_page(empty):
    shown = drawn(AppTest.from_file(PROJECT / "app" / "dashboard.py", default_timeout=60))
    assert texts(shown.title) == ["TPC-H, live"]


def test_before_the_first_run_it_says_what_is_missing(empty):
    shown = page()
    assert "Nothing is published yet" in shown.info[0].value
    assert "python orchestrate.py run all" in shown.info[0].value
    said = " ".join(texts(shown.caption))
    assert f"{len(LIVE)} of {len(LIVE)} live questions have no answer yet" in said
    assert "There is no model yet" in said
    assert "No stage has run yet" in said
    assert not shown.metric and not shown.get("plotly_chart")
    assert not Path(empty).exists()


def whole() -> AppTest:
    """The dashboard as it opens, with what is around its pages."""
    return drawn(AppTest.from_file(PROJECT / "app" / "dashboard.py", default_timeout=60))


def marked_up(shown: AppTest) -> str:
    """The text of the markup on a page, without its tags."""
    parts = (re.sub("<style>.*?</style>", "", element.proto.body, flags=re.S) for element in shown.get("html"))
    return html.unescape(re.sub("<[^>]+>", " ", " ".join(parts)))


def test_the_footer_says_what_is_looked_at_and_which_code_runs(empty):
    said = footer(Root.at(empty).url)
    assert "no `up` was ever at work here" in said and "release" not in said
    told = {"release": "3f2a91c0d4e5", "since": "2026-11-22T12:04:09+00:00", "differs": ["notebooks/query.ipynb"]}
    Root.at(empty).write(releases.TOLD, json.dumps(told).encode())
    expected = "release 3f2a91c0d4e5 of 2026-11-22 12:04 UTC; working tree differs from the release: 1 file"
    assert expected in footer(Root.at(empty).url).replace("\\", "")
    Root.at(empty).write(releases.TOLD, json.dumps({"release": None, "since": None, "differs": []}).encode())
    assert "live: the working tree runs" in footer(Root.at(empty).url).replace("\\", "")


def test_a_first_run_that_failed_is_shown(empty):
    add_run(empty, "generate-20261122T120000-aaaaaa", "failed", "RuntimeError: no disk")
    shown = page()
    assert "Nothing is published yet" in shown.info[0].value
    table = shown.dataframe[0].value
    assert table["State"].tolist() == ["failed"]
    assert table["Why"].tolist() == ["RuntimeError: no disk"]


def test_every_live_question_is_shown_with_its_chart_its_table_and_its_run(root, monkeypatch):
    monkeypatch.setenv("ETL_API_URL", "http://api.example:9/")
    shown = page()
    headings = texts(shown.subheader)
    assert headings == [*(question.title for question in LIVE), "Late deliveries", "Last runs"]
    assert len(shown.get("plotly_chart")) == len(LIVE) + 1
    assert len(shown.dataframe) == len(LIVE) + 2
    linked = [text for text in texts(shown.caption) if f"(http://api.example:9/reports/{QUERY_RUN})" in text]
    assert len(linked) == len(LIVE)


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
    shown = drawn(AppTest.from_function(questions_page, default_timeout=60))
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
    assert "There is no answer yet" in drawn(AppTest.from_function(questions_page)).info[0].value


def test_runs_are_chosen_by_stage_and_state(root):
    shown = drawn(AppTest.from_function(runs_page))
    assert shown.dataframe[0].value["Stage"].tolist() == ["train", "train", "query"]
    shown.button_group[0].select("train")
    assert drawn(shown).dataframe[0].value["State"].tolist() == ["failed", "ok"]
    shown.button_group[1].select("not ok")
    assert drawn(shown).dataframe[0].value["State"].tolist() == ["failed"]
    shown.button_group[1].select("timed_out")
    assert "There is no such run" in drawn(shown).caption[0].value


def test_the_figures_are_the_lakes(root):
    shown, snapshot = metrics(page()), Lake(root).snapshot()
    rows = dict(snapshot.rows().select("table", "rows").iter_rows())
    assert rows["lineitem"] > 5000
    assert shown["Line items"] == f"{rows['lineitem']:,}"
    assert shown["Orders"] == f"{rows['orders']:,}"
    assert shown["Refused rows"] == "0"
    assert shown["Batch"] == "1"
    assert shown["Data up to (UTC)"] == "2026-11-22"  # the time alone while it is of these hours
    loss = json.loads(Path(root, "models/aliases.json").read_text())["champion"]["metrics"]["log_loss"]
    assert shown["Model's log loss"] == f"{loss:.4f}"


def test_the_last_runs_are_listed_with_links_to_their_reports(root):
    shown = page()
    table = shown.dataframe[-1].value
    assert table["Stage"].tolist() == ["train", "train", "query"]
    assert table["State"].tolist() == ["failed", "ok", "ok"]
    assert table["Report"].iloc[2] == f"http://127.0.0.1:8000/reports/{QUERY_RUN}"


def test_one_sentence_at_the_top_says_whether_all_is_well(root):
    shown = page()
    [said] = shown.error  # of a stage only the last run counts
    assert said.value == "Not healthy: train: failed: ValueError: no such column".replace(":", "\\:")
    assert any("run \\-\\-from train\\-20261122T110000\\-ffffff" in text for text in texts(shown.caption))
    add_run(root, "train-20261122T130000-aaaaaa", minute=4)
    st.cache_data.clear()
    again = page()
    assert not again.error and again.success[0].value.startswith("Healthy")


def test_a_new_answer_is_taken_up(root):
    pointer = Path(root, f"results/{LIVE[0].name}/current.json")
    shown = page()
    pointer.write_text(pointer.read_text().replace(QUERY_RUN + '"', 'query-20261122T130000-bbbbbb"'))
    shown.run()
    assert any("query-20261122T130000-bbbbbb" in text for text in texts(shown.caption))


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

    assert sent(page()) < 3_000_000
    shown = AppTest.from_function(questions_page, default_timeout=60)
    shown.query_params["question"] = asked.name
    assert sent(drawn(shown)) < 3_000_000
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
        *(overview_page, of("lake/published.json", b"[]")),
        *(["The published snapshot"], "`orchestrate.py rebuild`", 5, 6),
    ),
    "a table's log": (
        *(overview_page, of("lake/orders/_delta_log/00000000000000000001.json", b"{")),
        *(["Orders"], "`orchestrate.py rebuild`", 5, 6),
    ),
    "the model's pointer": (overview_page, of("models/aliases.json", b"{}"), ["The model"] * 2, "run train", 4, 5),
    "an answer's pointer": (overview_page, of(f"{ANSWER}/current.json", b"[]"), ["The answer"], "run query", 4, 5),
    "an answer": (questions_page, of(f"{ANSWER}/*.parquet", CUT), ["The answer"], "run query", 0, 1),
    "a history": (questions_page, of(f"{ANSWER}/history.json", CUT), ["The history"], "run query", 1, 1),
    "the log of the index of runs": (
        *(overview_page, of("runs/_delta_log/00000000000000000001.json", b"{")),
        *(["The last runs"], "restore it, or remove runs", 5, 5),
    ),
    "the index of runs": (  # Polars panics, with what is no Exception
        *(runs_page, of("runs/*.parquet", CUT)),
        *(["The list of runs"], "restore it, or remove runs", 0, 0),
    ),
    "the records of runs": (runs_page, of("reports/*/*/*/run.json", b"{"), [], "", 0, 1),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_damaged_takes_no_more_down_than_its_own_panel(root, what):
    page, damage, panels, remedy, charts, tables = DAMAGES[what]
    damage(root)
    shown = drawn(AppTest.from_function(page, default_timeout=60))
    assert [warning.value.split("**")[1] for warning in shown.warning] == [
        f"{name} cannot be shown." for name in panels
    ]
    assert all(remedy in warning.value for warning in shown.warning)
    assert (len(shown.get("plotly_chart")), len(shown.dataframe)) == (charts, tables)


def test_answers_without_a_model(root):
    Path(root, "models/aliases.json").unlink()
    shown = page()
    assert metrics(shown)["Model's log loss"] == "–"
    assert any("There is no model yet" in text for text in texts(shown.caption))
    assert len(shown.get("plotly_chart")) == len(LIVE)


def test_a_run_under_way_is_followed(empty, tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Work"), nbformat.v4.new_code_cell(WORK.format(str(tmp_path / "go")))]
    request = RunRequest(
        stage="toy",
        run_id="toy-20260301T120000-abc123",
        root=Root.at(empty).url,
        notebook=nbformat.v4.new_notebook(cells=cells, metadata=KERNEL),
        parameters={},
        origins={},
        scheduled_for="2026-03-01T12:00:00+00:00",
        deadline_s=60,
    )
    run = threading.Thread(target=engine.execute, args=(request,))
    run.start()
    try:
        for _ in range(60):  # the kernel starts, prints, and waits for us
            shown = page()
            if shown.expander and "half way" in shown.code[0].value:
                break
        assert shown.expander[0].label.startswith("**toy** runs: Work, ")
    finally:
        (tmp_path / "go").touch()
        run.join()
    assert not page().expander


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
