"""The pages of questions, lake, model and digest, run as Streamlit runs them, over roots that the pipeline made."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import streamlit as st
import uvicorn
from drawing import markup, said
from published import DAY, QUERY_RUN, TRAIN_RUN, add_run
from streamlit.testing.v1 import AppTest
from support import free_port

from app import shown
from app.views import lake as lake_page
from etl.lake import backup, ingest
from etl.models import registry, scores
from etl.storage import PROJECT, Root
from pipeline import Lake, queries

LIVE = [question for question in queries.questions() if question.live]
ANSWER = f"results/{LIVE[0].name}"


def questions() -> None:
    from app.views import questions

    questions.page()


def lake() -> None:
    from app.views import lake

    lake.page()


def model() -> None:
    from app.views import model

    model.page()


def digest() -> None:
    from app.views import digest

    digest.page()


def drawn(page, **parameters: str) -> AppTest:
    """A page at an address, drawn once; an exception in it fails the test."""
    st.cache_data.clear()
    shown = AppTest.from_function(page, default_timeout=60)
    for name, value in parameters.items():
        shown.query_params[name] = value
    shown.run()
    assert not shown.exception, shown.exception
    return shown


def warned(page: AppTest) -> list[str]:
    """The panels that cannot be shown."""
    return [warning.value.split("**")[1].removesuffix(" cannot be shown.") for warning in page.warning]


def tables(page: AppTest) -> list:
    return [table.value for table in page.dataframe]


def test_every_page_says_what_is_missing_before_the_first_run(empty):
    assert "There is no table yet" in drawn(lake).info[0].value
    assert "There is no model yet" in drawn(model).info[0].value
    assert drawn(digest).header[0].value == "No stage ran."
    assert not Path(empty).exists()


def test_the_lake_has_its_tables_what_did_not_fit_and_who_wrote_what(root):
    snapshot = Lake(root).snapshot()
    good = next(Path(root, "archive").glob("*/orders/*")).read_text().splitlines()[:3]
    bad = ['{"o_orderkey": "<script>alert(1)</script>"}', "`no` json #000012"]
    for name, content in (("odd", "\n".join([*good, *bad, *bad[1:]]).encode()), ("broken", b"\x1f\x8b\x00\x01")):
        Root.at(root).write(f"landing/orders/{name}-00000099.json", content)
        os.utime(f"{root}/landing/orders/{name}-00000099.json", (1.7e9, 1.7e9))
    run_id = "preprocess-20261122T130000-bbbbbb"
    ingest.commit(ingest.read(Lake(root).next_batch(max_files=9, scheduled_for=f"{DAY}T13:00:00+00:00")), run_id=run_id)
    add_run(root, "compact-20261122T130000-bbbbbb", minute=5, metrics={"files_before": 412, "files_after": 18})
    page = drawn(lake)
    assert not page.warning
    every, reasons, refused = tables(page)
    rows = dict(zip(every["table"], every["rows"], strict=True))
    assert rows["orders"] == snapshot.row_count("orders") + 3 and rows["quarantine"] == 3
    assert "failed" not in every
    assert dict(zip(reasons["reason"].str.partition(":")[0], reasons["lines"], strict=True))["not JSON"] == 2
    assert [sample for samples in reasons["samples"] for sample in samples].count(bad[1]) == 2
    assert refused["samples"][0] == ["orders/broken-00000099.json"] and "gzip" in refused["why"][0]
    assert [(metric.label, metric.value) for metric in page.metric] == [("Files before", "412"), ("Files after", "18")]
    assert "python orchestrate.py backup" in said(page)
    written = lake_page.written(root, "now", "quarantine")
    assert written.row(0)[0] == Lake(root).snapshot().versions["quarantine"]
    assert written["report"][0].endswith(run_id) and written["stage"][0] == "preprocess"


@pytest.mark.parametrize(("days", "colour"), [(0, "green"), (3, "orange")])
def test_a_backup_older_than_a_day_is_amber_and_says_how_to_make_another(root, days, colour):
    at = (datetime.now(UTC) - timedelta(days=days, minutes=5)).isoformat()
    Root.at(root).write(backup.NOTE, json.dumps({"backups": {"/backups/etl": {"at": at}}}).encode())
    page = drawn(lake)
    [age] = [metric for metric in page.metric if metric.label == "The newest"]
    assert age.value == ("3 days ago" if days else "5 min ago")
    assert age.proto.color == {"green": age.proto.GREEN, "orange": age.proto.ORANGE}[colour]
    assert f'"typed">{"python orchestrate.py backup " if days else ""}/backups/etl</pre>' in markup(page)


def test_the_model_is_shown_beside_the_best_possible_over_time_and_on_what_came_since(root):
    champion = registry.current(Root.at(root))
    older = champion | {"model_id": "train-20261121T120000-aaaaaa-1", "run_id": "train-20261121T120000-aaaaaa"}
    older = older | {"metrics": champion["metrics"] | {"gap": 0.5}, "features": []}
    Root.at(root).write(f"models/{older['model_id']}/metrics.json", json.dumps(older).encode())
    alone = drawn(model)
    gap = f"{champion['metrics']['gap']:.5f}"
    assert f"Log loss above the best possible {gap} " in said(alone)
    newest, before = re.findall("<tr><td>.*?</tr>", markup(alone).partition("Trained")[2])
    assert "<td>champion</td>" in newest and f">{gap}<" in newest
    assert "/reports/train-20261121T120000-aaaaaa" in before and ">0.50000<" in before and "champion" not in before
    assert len(alone.get("plotly_chart")) == 2, "the champion's losses, and those of both"
    hours = [
        dict.fromkeys(scores.DRIFT)
        | {"hour": f"{DAY}T{hour:02}:00:00+00:00", "alias": alias, "predicted": 0.5, "psi": 0.1 * hour}
        for hour in range(3)
        for alias in ("champion", "shadow")
    ]
    Root.at(root).write(scores.TOLD, json.dumps({"drift": hours, "calibration": []}).encode())
    both = drawn(model)
    assert "On what came since" in [heading.value for heading in both.header]
    realized, drift = (json.loads(chart.proto.spec) for chart in both.get("plotly_chart")[2:])
    assert [trace["name"] for trace in drift["data"]] == ["champion", "shadow"]
    assert [trace["name"] for trace in realized["data"]] == ["predicted", "observed"]


def test_a_prediction_is_the_apis_and_so_is_what_is_wrong_with_the_row(root, monkeypatch):
    from app import api

    port = free_port()
    monkeypatch.setenv("ETL_API_URL", f"http://127.0.0.1:{port}")
    api.settings.cache_clear()
    page = drawn(model)
    page.button[0].click().run()
    assert "does not answer" in page.error[0].value and "up" in page.error[0].value
    server = uvicorn.Server(uvicorn.Config(api.app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(200):
            if server.started:
                break
            time.sleep(0.05)
        page.button[0].click().run()
        [metric] = page.metric
        assert metric.label == "Late" and metric.value.endswith("%"), metric
        assert TRAIN_RUN in page.caption[-1].value
        page.text_input[0].set_value("<b>no day</b>")
        page.button[0].click().run()
        assert "l\\_shipdate" in page.error[0].value and not page.metric
    finally:
        server.should_exit = True
        thread.join()
        api.settings.cache_clear()


def test_the_digest_is_of_the_day_in_the_address(root):
    page = drawn(digest, day=DAY)
    assert page.header[0].value == "3 runs of 2 stages, 1 run failed."
    stages, failures = tables(page)
    assert stages["stage"].tolist() == ["query", "train"] and stages["bad"].tolist() == [0, 1]
    assert failures["reason"].tolist() == ["ValueError: no such column"]
    for odd in ("<script>", "2026-99-99"):
        assert drawn(digest, day=odd).header[0].value == "No stage ran."


def test_an_answer_says_of_when_it_is_and_is_amber_when_it_should_have_been_followed(root):
    def badge() -> str:
        return drawn(questions).markdown[0].value

    assert badge() == ":gray-badge[as of 2026\\-11\\-22 11\\:59 UTC]"
    published = Path(root, "lake/published.json")
    published.write_text(json.dumps(json.loads(published.read_text()) | {"batch": 65}))
    from app import poller

    poller._pollers.clear()
    assert badge() == ":orange-badge[as of 2026\\-11\\-22 11\\:59 UTC, 64 batches behind]"


def test_the_group_leaves_the_others_out_and_the_linked_question_in(root):
    page = drawn(questions, question="q01")
    page.button_group[0].select("of the moment").run()
    names = [option.rpartition("·")[2].strip() for option in page.selectbox[0].options]
    assert set(names) == {"q01", *(question.name for question in LIVE)} and page.selectbox[0].value == "q01"


def test_an_answer_of_an_older_release_is_shown_without_a_chart(root):
    pointer = Path(root, ANSWER, "current.json")
    current = json.loads(pointer.read_text())
    assert Path(root, current.pop("chart")).exists()
    pointer.write_text(json.dumps(current))
    page = drawn(questions)
    assert "Its chart comes with the next run of `query`." in [caption.value for caption in page.caption]
    assert not page.warning and len(tables(page)) == 2


DAMAGES = {  # page, pattern of the files that are damaged, panels that cannot be shown, tables that still are
    "a chart": (questions, f"{ANSWER}/*.plotly.json", ["The chart"], 2),
    "an answer": (questions, f"{ANSWER}/*.parquet", ["The answer"], 1),
    "the published snapshot": (lake, "lake/published.json", ["The tables", "Quarantine"], 0),
    "a table's log": (lake, "lake/orders/_delta_log/0*1.json", [], 1),
    "the index of runs": (lake, "runs/_delta_log/*1.json", ["The last compaction"], 1),
    "the model's pointer": (model, "models/aliases.json", ["The model"], 1),
    "the scores": (model, "models/drift.json", ["How it does on what came since"], 1),
    "the runs of a day": (digest, "runs/*.parquet", ["The digest"], 0),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_damaged_takes_no_more_down_than_its_own_panel(root, what):
    page, files, panels, left = DAMAGES[what]
    Root.at(root).write(scores.TOLD, b'{"drift": [], "calibration": []}')
    damaged = list(Path(root).glob(files))
    assert damaged
    for path in damaged:
        path.write_bytes(b"[")
    shown = drawn(page, day=DAY)
    assert warned(shown) == panels
    assert all("What to do" in warning.value for warning in shown.warning)
    assert len(tables(shown)) + ("<th>Trained</th>" in markup(shown)) == left


def test_the_dashboard_draws_stored_charts_without_what_makes_them(filled):
    """Importing HoloViews took the first viewer seconds, and 200 MB."""
    text = f"""
import sys
from streamlit.testing.v1 import AppTest
page = AppTest.from_file({str(PROJECT / "app" / "dashboard.py")!r}, default_timeout=60).run()
shown = AppTest.from_string("from app.views import questions; questions.page()", default_timeout=60).run()
assert not page.exception and not shown.exception, (page.exception, shown.exception)
assert len(shown.get("plotly_chart")) == 1
print([name for name in ("holoviews", "hvplot", "bokeh", "matplotlib") if name in sys.modules])
"""
    asked = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | {"ETL_ROOT": filled},
        check=False,
    )
    assert asked.stdout.strip() == "[]", asked.stdout + asked.stderr


def test_reports_are_linked_where_the_api_is(root, monkeypatch):
    monkeypatch.setenv("ETL_API_URL", "http://api.example:9/")
    assert f"(http://api.example:9/reports/{QUERY_RUN})" in drawn(questions).caption[-1].value
    assert shown.report_url("x") == "http://api.example:9/reports/x"
