"""The dashboard, run as Streamlit runs it, over roots that the pipeline made."""

import json
import shutil
import threading
from pathlib import Path

import nbformat
import pytest
from published import DAY, QUERY_RUN, add_run
from streamlit.testing.v1 import AppTest

from pipeline import lake, queries
from runner import engine
from runner.engine import RunRequest
from storage import PROJECT, Root

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
WORK = """import pathlib, time
print("half way", flush=True)
while not pathlib.Path({!r}).exists(): time.sleep(0.1)"""


def page() -> AppTest:
    """The page, drawn once; an exception in it fails the test."""
    shown = AppTest.from_file(PROJECT / "app" / "dashboard.py", default_timeout=60).run()
    assert not shown.exception, shown.exception
    return shown


def texts(elements) -> list[str]:
    return [element.value for element in elements]


def metrics(shown: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in shown.metric}


def test_before_the_first_run_it_says_what_is_missing(empty):
    shown = page()
    assert "Nothing is published yet" in shown.info[0].value
    assert "python orchestrate.py run all" in shown.info[0].value
    said = " ".join(texts(shown.caption))
    assert "5 of 5 questions have no answer yet" in said
    assert "There is no model yet" in said
    assert "No stage has run yet" in said
    assert not shown.metric and not shown.get("plotly_chart")
    assert not Path(empty).exists()


def test_a_first_run_that_failed_is_shown(empty):
    add_run(empty, "generate-20261122T120000-aaaaaa", "failed", "RuntimeError: no disk")
    shown = page()
    assert "Nothing is published yet" in shown.info[0].value
    table = shown.dataframe[0].value
    assert table["State"].tolist() == ["failed"]
    assert table["Why"].tolist() == ["RuntimeError: no disk"]


def test_every_question_is_shown_with_its_chart_its_table_and_its_run(root, monkeypatch):
    monkeypatch.setenv("ETL_API_URL", "http://api.example:9/")
    shown = page()
    headings = texts(shown.subheader)
    for question in queries.questions():
        assert question.title in headings
    assert headings[-2:] == ["Late deliveries", "Last runs"]
    assert len(shown.get("plotly_chart")) == len(queries.questions()) + 1
    assert len(shown.dataframe) == len(queries.questions()) + 2
    linked = [text for text in texts(shown.caption) if f"(http://api.example:9/reports/{QUERY_RUN})" in text]
    assert len(linked) == len(queries.questions())


def test_the_figures_are_the_lakes(root):
    shown, snapshot = metrics(page()), lake.snapshot(root)
    rows = dict(snapshot.rows().select("table", "rows").iter_rows())
    assert rows["lineitem"] > 5000
    assert shown["Line items"] == f"{rows['lineitem']:,}"
    assert shown["Orders"] == f"{rows['orders']:,}"
    assert shown["Refused rows"] == "0"
    assert shown["Batch"] == "1"
    assert shown["Data up to (UTC)"] == f"{snapshot.as_of:%H:%M:%S}"
    loss = json.loads(Path(root, "models/current.json").read_text())["metrics"]["log_loss"]
    assert shown["Model's log loss"] == f"{loss:.4f}"


def test_the_last_runs_are_listed_with_links_to_their_reports(root):
    shown = page()
    table = shown.dataframe[-1].value
    assert table["Stage"].tolist() == ["train", "train", "query"]
    assert table["State"].tolist() == ["failed", "ok", "ok"]
    assert table["Report"].iloc[2] == f"http://127.0.0.1:8000/reports/{QUERY_RUN}"
    badges = [text for text in texts(shown.markdown) if "-badge[" in text]
    assert ["red" in badge for badge in badges] == [False, True]  # of a stage only the last run counts
    assert "train: failed" in badges[1]


def test_a_run_whose_report_was_swept_has_no_link(root):
    shutil.rmtree(Path(root, f"reports/query/{DAY}/{QUERY_RUN}"))
    assert page().dataframe[-1].value["Report"].notna().tolist() == [True, True, False]


def test_a_new_answer_is_taken_up(root):
    pointer = Path(root, "results/q05/current.json")
    shown = page()
    pointer.write_text(pointer.read_text().replace(QUERY_RUN + '"', 'query-20261122T130000-bbbbbb"'))
    shown.run()
    assert any("query-20261122T130000-bbbbbb" in text for text in texts(shown.caption))


@pytest.mark.parametrize("damage", ["results/q05/current.json", f"results/q05/{QUERY_RUN}.parquet"])
def test_a_damaged_answer_leaves_the_others_alone(root, damage):
    Path(root, damage).write_bytes(b"{")
    shown = page()
    assert [warning.value.split(":")[0] for warning in shown.warning] == ["The answer cannot be read"]
    assert len(shown.get("plotly_chart")) == len(queries.questions())


def test_answers_without_a_model(root):
    Path(root, "models/current.json").unlink()
    shown = page()
    assert metrics(shown)["Model's log loss"] == "–"
    assert any("There is no model yet" in text for text in texts(shown.caption))
    assert len(shown.get("plotly_chart")) == len(queries.questions())


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
