"""The overview and the pages of runs, over roots that the pipeline made."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import incidents
import nbformat
import pytest
from drawing import broken, markup, opened, said, texts
from published import QUERY_RUN, TRAIN_RUN, add_run

from app import stages
from etl.runs import engine, failures
from etl.runs.record import RunRequest
from etl.storage import Root
from pipeline import Lake, queries

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
WORK = """import pathlib, time
print("half way", flush=True)
while not pathlib.Path({!r}).exists(): time.sleep(0.1)"""
FAILED_RUN = "train-20261122T110000-ffffff"


def test_before_the_first_run_it_says_what_is_missing(empty):
    shown = opened("overview")
    assert "Nothing is published yet" in shown.info[0].value
    assert "python orchestrate.py run all" in shown.info[0].value
    told = said(shown)
    assert "Healthy: no up was ever at work here, so nothing runs on a schedule" in told
    assert "no run yet" in told and "never ok yet" in told
    assert "no model yet: it takes enough line items" in told
    assert not Path(empty).exists()


def test_a_first_run_that_failed_is_an_incident(empty):
    add_run(empty, "generate-20261122T120000-aaaaaa", "failed", "RuntimeError: no <disk>")
    shown = opened("overview")
    assert "Not healthy: generate: failed: RuntimeError: no <disk>" in said(shown)
    assert "no &lt;disk&gt;" in markup(shown), "what a run says is no markup"
    assert "orchestrate.py run --from generate-20261122T120000-aaaaaa runs it again" in said(shown)


def test_it_says_how_old_the_data_is_at_each_step_and_the_figures_of_the_lake(root):
    incidents.healthy(root)
    told, snapshot = said(opened("overview")), Lake(root).snapshot()
    rows = dict(snapshot.rows().select("table", "rows").iter_rows())
    assert rows["lineitem"] > 5000
    assert f"Line items {rows['lineitem']:,} +{rows['lineitem']:,} in the last batch that has any" in told
    assert f"Orders {rows['orders']:,}" in told and "Refused rows 0" in told
    days = (datetime.now(UTC) - snapshot.as_of).days
    assert f"Born old {days} days" in told and "should be at most 3 min" in told
    assert [told.index(step) for step in ("Born", "Landed", "Ingested", "Published", "Answered")] == sorted(
        told.index(step) for step in ("Born", "Landed", "Ingested", "Published", "Answered")
    )
    loss = json.loads(Path(root, "models/aliases.json").read_text())["champion"]["metrics"]["log_loss"]
    assert f"Late deliveries {loss:.4f}" in told
    live = next(q for q in queries.questions() if q.live and q.figure)
    assert f"{live.title} " in told and "the first answer" in told


def test_each_stage_has_its_runs_in_pipeline_order_and_the_next_ones_are_told(root):
    incidents.healthy(root)
    shown = opened("overview")
    told = said(shown)
    assert "Healthy: nothing failed last, and nothing is late" in told
    names = [told.index(f" {stage} ok ok ") for stage in incidents.STAGES]
    assert names == sorted(names)
    assert "took 2.0 s, usually 2.0 s" in told
    assert f'href="run?id={QUERY_RUN}"' in markup(shown) and f'href="run?id={TRAIN_RUN}"' in markup(shown)
    assert told.count("due") == 5
    assert "The last that went wrong: train failed at 2026-11-22 12:03 UTC, ValueError: no such column" in told


def test_a_run_that_did_not_begin_is_not_how_its_stage_is():
    ok, skipped = {"state": "ok", "seconds": 2.0}, {"state": "cancelled", "seconds": 0.0}
    assert stages.Line("query", [ok, skipped], [], None, None).last == ok
    assert stages.Line("query", [skipped], [], None, None).state == "cancelled"
    assert stages.Line("query", [ok, {"state": "failed", "seconds": 0.0}], [], None, None).state == "failed"
    assert stages.Line("query", [ok], [{"run_id": "x"}], None, None).state == "running"
    assert stages.Line("query", [], [], None, None).state == "no run yet"


def test_what_a_run_did_not_come_to_is_no_line_each(root):
    add_run(root, "train-20261122T140000-dddddd", minute=5, metrics={"gap": 0.1, "rows": 4})
    add_run(root, "train-20261122T150000-eeeeee", "failed", "ValueError: no such column", minute=6)
    told = said(opened("run", id="train-20261122T150000-eeeeee"))
    assert "state ok failed" in told and "and 2 more that it did not come to: checks, figures, cells" in told
    assert "metrics: gap" not in told
    add_run(root, "train-20261122T160000-ffffff", minute=7, metrics={"rows": 4, "given": {"models/a.json": {"k": "v"}}})
    told = said(opened("run", id="train-20261122T160000-ffffff"))
    assert "metrics: gap 0.1 none" in told and "metrics: given none models/a.json" in told


def test_runs_are_found_by_stage_state_day_and_text_and_the_address_says_so(root):
    def ids(**address: str) -> list[str]:
        return [
            part.partition('"')[0]
            for part in markup(opened("runs", **address)).split("The newest")[1].split("?id=")[1:]
        ]

    assert ids() == [FAILED_RUN, TRAIN_RUN, QUERY_RUN]
    assert ids(stage="train") == [FAILED_RUN, TRAIN_RUN]
    assert ids(stage="train", state="not ok") == [FAILED_RUN]
    assert ids(text="NO SUCH") == [FAILED_RUN] and ids(text=QUERY_RUN[-6:]) == [QUERY_RUN]
    assert ids(day="2026-11-22", stage="query") == [QUERY_RUN]
    assert "There is no such run" in said(opened("runs", day="2026-11-23"))
    assert "There is no such run" in said(opened("runs", state="timed out"))
    add_run(root, "train-20261122T140000-eeeeee", "failed", "ValueError: no such column", minute=5)
    assert "2nd time, first at 2026-11-22 12:03 UTC" in said(opened("runs", stage="train"))


def test_a_run_has_a_page(root):
    shown = opened("run", id=FAILED_RUN)
    assert texts(shown.title) == ["train: failed"]
    told = said(shown)
    assert "ValueError: no such column" in told and "due 2026-11-22 12:00 UTC" in told
    assert "scheduled for" not in told.partition("Parameters")[0]  # which differs always
    assert f"What differs from the last that was ok {TRAIN_RUN}" in told
    typed = [code.value for code in shown.code]
    assert typed[0] == f"python orchestrate.py run --from {FAILED_RUN} --root {root}"
    assert [line.split()[2] for line in typed] == ["run", "replay", "debug"]
    assert "no such run under this root" in opened("run", id="query-20261122T120000-000000").info[0].value


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
            shown = opened("run", id=request.run_id) if "toy" in said(opened("overview")) else None
            if shown and shown.code and "half way" in shown.code[0].value:
                break
        assert texts(shown.title) == ["toy: running"]
        assert "toy running never ok yet" in said(opened("overview"))
        assert "now in “Work”" in said(opened("runs"))
    finally:
        (tmp_path / "go").touch()
        run.join()
    assert texts(opened("run", id=request.run_id).title) == ["toy: ok"]
    assert "Work" in said(opened("run", id=request.run_id)).partition("Cells Cell When Seconds")[2]


def of_run(reason: str, at: int, state: str = "failed") -> dict:
    return {"run_id": f"r{at}", "stage": "s", "state": state, "reason": reason, "started_at": at}


def test_failures_are_one_kind_when_they_differ_in_numbers_and_ids_alone():
    runs = [
        *(of_run("file 12 of 40 at 0x7f3a", 1), of_run("file 13 of 41 at 0x7f3b", 2), of_run("fine", 3, "ok")),
        *(of_run("file 13 of 41 at 0x7f3b", 4, "killed"), of_run("train-20261122T110000-ffffff is gone", 5)),
        of_run("train-20261122T110500-0fffff is gone", 6),
    ]
    groups = failures.groups(runs)
    assert [(g.state, g.count, g.first_at, g.last_at, g.run_id) for g in groups] == [
        ("failed", 2, 5, 6, "r6"),
        ("killed", 1, 4, 4, "r4"),
        ("failed", 2, 1, 2, "r2"),
    ]
    assert [failures.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112, 1001)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th", "1,001st")
    ]


@pytest.mark.parametrize("address", ["javascript:alert(1)", "//evil.example", 'https://x" onclick="y'])
def test_only_what_is_an_address_becomes_a_link(address):
    from app import markup

    made = markup.link(address, "<b>")
    assert "&lt;b&gt;" in made and made.count('"') in (0, 4)
    assert ("<a " in made) == address.startswith("https://")


def test_what_is_damaged_is_an_incident_and_the_rest_stays(root):
    incidents.healthy(root)
    incidents.damaged_table(root, "orders")
    Path(root, "models/aliases.json").write_text("{}")
    shown = opened("overview")
    assert "Not healthy: table orders: lake/orders/" in said(shown)
    assert broken(shown) == ["The model"] and "run train" in shown.warning[0].value
    assert "Line items" in said(shown) and "What happens next" in said(shown)
