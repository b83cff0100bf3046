"""A day of runs on a page: percentiles, failures that are alike, runs that took far longer, and none of another day."""

import json
from datetime import UTC, date, datetime, timedelta

import incidents
import numpy as np
import pytest
from typer.testing import CliRunner

import orchestrate
from etl.runs import digest, index
from etl.runs.record import RunRecord
from etl.storage import Root

DAY = date(2026, 11, 3)
OK_S = [2.0, 2.2, 2.4, 2.6, 9.0]
HOSTILE = "ValueError: <script>alert(1)</script> & `x` #000012 of 17"


def record(
    url: str, stage: str, at: datetime, seconds: float, state: str = "ok", reason: str = "", **more
) -> RunRecord:
    run_id = f"{stage}-{at:%Y%m%dT%H%M%S}-aaaaaa"
    return incidents.record(url, run_id, at, seconds, state=state, reason=reason, **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Root:
    root = Root.at(str(tmp_path_factory.mktemp("digest")))
    noon = datetime(2026, 11, 3, 12, tzinfo=UTC)
    runs = [
        record(root.url, "toy", noon + timedelta(minutes=at), seconds, metrics={"rows": 100}, receipt={"cpu_s": 1.5})
        for at, seconds in enumerate(OK_S)
    ]
    runs += [
        record(root.url, "toy", noon + timedelta(hours=1), 1, "failed", HOSTILE),
        record(root.url, "toy", noon + timedelta(hours=2), 1, "failed", HOSTILE.replace("17", "18")),
        record(root.url, "toy", noon + timedelta(hours=3), 1, "cancelled", "by hand"),
        record(root.url, "other", noon.replace(hour=0), 3, "noop", "nothing new", receipt={"cost_usd": 0.25}),
        record(root.url, "toy", noon.replace(hour=0) - timedelta(seconds=1), 99),
        record(root.url, "toy", noon.replace(hour=0) + timedelta(days=1), 99),
    ]
    for run in runs:
        index.append(root, run)
    root.write("reports/README", b"")  # commands refuse a root where no stage has run
    return root


def test_a_day_has_its_own_runs_by_stage_with_their_percentiles(root):
    told = digest.of_day(root, DAY)
    other, toy = told.stages
    assert (other.stage, other.runs, other.bad, other.p50_s, other.rows, other.cost_usd) == (
        "other",
        1,
        0,
        None,
        None,
        0.25,
    )
    assert (toy.stage, toy.runs, toy.bad, toy.cancelled, toy.rows, toy.cpu_s) == ("toy", 8, 2, 1, 500, 7.5)
    assert (toy.p50_s, toy.p99_s) == pytest.approx(tuple(np.percentile(OK_S, [50, 99])))
    assert toy.cost_usd is None
    drawn = {at: round(seconds, 2) for at, seconds in enumerate(toy.spark_s) if seconds is not None}
    assert drawn == {24: 3.64, 26: 1, 28: 1, 30: 1}, "half hours: the mean of its runs"
    assert told.sentence == "9 runs of 2 stages, 2 runs failed; 1 run took far longer than usual."
    assert digest.of_day(root, DAY + timedelta(days=9)).sentence == "No stage ran."


def test_failures_that_differ_in_numbers_are_one_and_what_took_far_longer_is_named(root):
    told = digest.of_day(root, DAY)
    [failure] = told.failures
    assert (failure.count, failure.stage, failure.reason) == (2, "toy", HOSTILE.replace("17", "18"))
    assert (failure.first_at.hour, failure.last_at.hour, failure.run_id) == (13, 14, "toy-20261103T140000-aaaaaa")
    [outlier] = told.outliers
    assert (outlier.run_id, outlier.seconds, outlier.usual_s) == ("toy-20261103T120400-aaaaaa", 9.0, 2.4)


def test_as_html_it_needs_nothing_else_and_whatever_a_run_said_is_text(root):
    page = digest.as_html(digest.of_day(root, DAY), "Runs of <root>", lambda run_id: f"http://api/reports/{run_id}")
    assert "<script" not in page and "<style" not in page and "<root>" not in page and "src=" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; `x` #000012 of 18" in page
    assert '<a href="http://api/reports/toy-20261103T120400-aaaaaa"' in page
    assert page.count("<table style=") == 3 and "0.25" in page
    assert digest.spark([None, 0, 5, 10]) == "·▁▅█" and digest.spark([]) == ""
    assert "<table" not in digest.as_html(digest.of_day(root, date(2020, 1, 1)), "Runs")


def test_the_command_prints_the_day_and_writes_the_page(root, tmp_path):
    def run(*arguments: str):
        return CliRunner().invoke(orchestrate.app, ["digest", "--root", root.url, *arguments])

    asked = run("--day", "2026-11-03", "--html", str(tmp_path / "day.html"))
    assert asked.exit_code == 0, asked.output
    assert "3 November 2026 (UTC): 9 runs of 2 stages, 2 runs failed" in asked.stdout
    assert "toy 2 times, last at 14:00: ValueError: <script>" in asked.stdout
    assert "3 November 2026" in (tmp_path / "day.html").read_text("utf-8")
    said = json.loads(run("--day", "2026-11-03", "--json").stdout)
    assert said["failures"][0]["count"] == 2 and len(said["stages"]) == 2
    assert run("--day", "2026-13-03").exit_code == 2
    assert CliRunner().invoke(orchestrate.app, ["digest", "--root", str(tmp_path / "none")]).exit_code == 1
