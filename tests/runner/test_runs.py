"""The index of runs: rows are never lost, whoever appends at the same time, and a run is found again."""

import multiprocessing
from dataclasses import replace

import pytest
from deltalake import DeltaTable
from nbformat.v4 import new_notebook

from runner import report, runs
from runner.engine import RunRecord
from storage import Root

FIRST = RunRecord(
    stage="toy",
    run_id="toy-20261103T100000-aaaaaa",
    root="/outputs",
    scheduled_for="2026-11-03T10:00:00Z",
    attempt=1,
    parameters={"rows": 3},
    origins={"rows": "params/toy.yml:4"},
    report="reports/toy/2026-11-03/toy-20261103T100000-aaaaaa",
    host="here",
    started_at="2026-11-03T10:00:01.500+00:00",
    ended_at="2026-11-03T10:00:03.500+00:00",
    seconds=2.0,
    metrics={"rows_written": 3},
    checks=[{"name": "some", "ok": True, "detail": ""}],
    versions_written={"orders": 7},
)


def later(number, **changes):
    run_id = f"toy-20261103T10{number:02d}00-{number:06x}"
    times = dict.fromkeys(runs.TIME_COLUMNS, f"2026-11-03T10:{number:02d}:01+00:00")
    return replace(FIRST, run_id=run_id, report=f"reports/toy/2026-11-03/{run_id}", **times, **changes)


def append_many(url, numbers, together):
    together.wait(timeout=60)
    for number in numbers:
        runs.append(Root.at(url), later(number))


def test_two_processes_may_make_the_table_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    workers = [spawn.Process(target=append_many, args=(str(tmp_path), range(k, 12, 2), together)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row["run_id"] for row in runs.list(Root.at(tmp_path))) == [later(n).run_id for n in range(12)]


def test_a_row_carries_its_run_in_the_commit_too(tmp_path):
    root = Root.at(tmp_path)
    runs.append(root, FIRST)
    runs.append(root, later(1))
    table = DeltaTable(root.url_of(runs.TABLE))
    assert table.metadata().configuration == runs.PROPERTIES
    assert [(c["run_id"], c["stage"]) for c in table.history()] == [
        (later(1).run_id, "toy"),
        (FIRST.run_id, "toy"),
    ]


def test_list_gives_the_last_runs_newest_first(tmp_path):
    root = Root.at(tmp_path)
    assert runs.list(root) == []
    runs.append(root, replace(later(3), stage="other"))
    for number, state in enumerate(("ok", "failed", "ok")):
        runs.append(root, later(number, state=state, reason="" if state == "ok" else "ValueError: no"))
    assert [row["run_id"] for row in runs.list(root)] == [later(n).run_id for n in (3, 2, 1, 0)]
    assert [row["run_id"] for row in runs.list(root, limit=2)] == [later(3).run_id, later(2).run_id]
    assert [row["run_id"] for row in runs.list(root, stage="toy", state="ok")] == [
        later(2).run_id,
        later(0).run_id,
    ]
    [failed] = runs.list(root, state="failed")
    assert failed["reason"] == "ValueError: no" and failed["seconds"] == 2.0 and failed["attempt"] == 1
    assert failed["started_at"] == "2026-11-03T10:01:01.000+00:00"


def test_get_finds_a_run_by_the_beginning_of_its_id(tmp_path):
    root = Root.at(tmp_path)
    for unknown in (FIRST.run_id, "toy", "../../etc/passwd", ""):
        with pytest.raises(KeyError):
            runs.get(root, unknown)
    runs.append(root, FIRST)
    runs.append(root, later(7))
    # without its report the row answers
    row = runs.get(root, FIRST.run_id)
    assert row["parameters"] == {"rows": 3} and row["versions_written"] == {"orders": 7} and row["error"] is None
    assert row["started_at"] == FIRST.started_at
    report.write(root, FIRST, new_notebook())
    assert runs.get(root, FIRST.run_id)["root"] == "/outputs"  # only run.json has it
    assert runs.get(root, "toy-20261103T1000")["root"] == "/outputs"
    with pytest.raises(KeyError, match="2 runs begin with 'toy-'"):
        runs.get(root, "toy-")
