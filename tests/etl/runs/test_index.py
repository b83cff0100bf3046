"""The index of runs: rows are never lost, whoever appends at the same time, and a run is found again."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from deltalake import DeltaTable, write_deltalake
from faults import synthetic
from nbformat.v4 import new_notebook

from etl.findings import Finding
from etl.reports import page
from etl.runs import index
from etl.runs.record import RunRecord
from etl.storage import LocalRoot, Root

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
    parent="toy-20261103T090000-aaaaaa",
    provenance={"git_commit": "0ab1fca"},
    cells=[{"heading": "Read", "state": "ok", "seconds": 0.5}],
    receipt={"wall_s": 2.0, "cpu_s": 1.5},
)


def later(number, **changes):
    run_id = f"toy-20261103T10{number:02d}00-{number:06x}"
    times = dict.fromkeys(index.TIME_COLUMNS, f"2026-11-03T10:{number:02d}:01+00:00")
    return replace(FIRST, run_id=run_id, report=f"reports/toy/2026-11-03/{run_id}", **times, **changes)


def append_many(url, numbers, together):
    together.wait(timeout=60)
    for number in numbers:
        index.append(Root.at(url), later(number))


def test_two_processes_may_make_the_table_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    workers = [spawn.Process(target=append_many, args=(str(tmp_path), range(k, 12, 2), together)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row["run_id"] for row in index.newest(Root.at(tmp_path))) == [later(n).run_id for n in range(12)]


def test_a_row_carries_its_run_in_the_commit_too(tmp_path):
    root = Root.at(tmp_path)
    index.append(root, FIRST)
    index.append(root, later(1))
    table = DeltaTable(root.url_of(index.TABLE))
    assert table.metadata().configuration == index.PROPERTIES
    assert [(c["operation"], c["run_id"], c["stage"]) for c in table.history()] == [
        ("WRITE", later(1).run_id, "toy"),
        ("WRITE", FIRST.run_id, "toy"),
        ("CREATE TABLE", FIRST.run_id, "toy"),
    ]


def test_list_gives_the_last_runs_newest_first(tmp_path):
    root = Root.at(tmp_path)
    assert index.newest(root) == []
    index.append(root, replace(later(3), stage="other"))
    for number, state in enumerate(("ok", "failed", "ok")):
        index.append(root, later(number, state=state, reason="" if state == "ok" else "ValueError: no"))
    assert [row["run_id"] for row in index.newest(root)] == [later(n).run_id for n in (3, 2, 1, 0)]
    assert [row["run_id"] for row in index.newest(root, limit=2)] == [later(3).run_id, later(2).run_id]
    assert [row["run_id"] for row in index.newest(root, stage="toy", state="ok")] == [
        later(2).run_id,
        later(0).run_id,
    ]
    [failed] = index.newest(root, state="failed")
    assert failed["reason"] == "ValueError: no" and failed["seconds"] == 2.0 and failed["attempt"] == 1
    assert failed["started_at"] == "2026-11-03T10:01:01.000+00:00"


def test_get_finds_a_run_by_the_beginning_of_its_id(tmp_path):
    root = Root.at(tmp_path)
    for unknown in (FIRST.run_id, "toy", "../../etc/passwd", ""):
        with pytest.raises(KeyError):
            index.get(root, unknown)
    index.append(root, FIRST)
    index.append(root, later(7))
    # without its report the row answers
    row = index.get(root, FIRST.run_id)
    assert {name: row[name] for name in ("parent", "provenance", "cells", "receipt")} == {
        name: getattr(FIRST, name) for name in ("parent", "provenance", "cells", "receipt")
    }
    assert row["parameters"] == {"rows": 3} and row["versions_written"] == {"orders": 7} and row["error"] is None
    assert row["started_at"] == FIRST.started_at
    page.write(root, FIRST, new_notebook())
    assert index.get(root, FIRST.run_id)["root"] == "/outputs"  # only run.json has it
    assert index.get(root, "toy-20261103T1000")["root"] == "/outputs"
    root.write(f"{FIRST.report}/run.json", b'{"run_id": ')  # damaged: the row answers again
    assert index.get(root, FIRST.run_id) == row == index.get(root, "toy-20261103T1000")
    with pytest.raises(KeyError, match="2 runs begin with 'toy-'"):
        index.get(root, "toy-")
    with pytest.raises(KeyError, match="2 runs"):
        index.get(root, "")


def test_a_list_between_two_times(tmp_path):
    root = Root.at(tmp_path)
    for number in range(4):
        index.append(root, later(number))
    found = index.newest(root, since="2026-11-03T10:01:01Z", until=datetime(2026, 11, 3, 10, 3, 1, tzinfo=UTC))
    assert [row["run_id"] for row in found] == [later(2).run_id, later(1).run_id]
    # a time without a zone is UTC
    assert (
        index.newest(root, until="2026-11-03T10:00:02") == index.newest(root, until="2026-11-03T12:00:02+02:00") != []
    )
    assert index.newest(root, since="2026-11-03T10:03:02") == []


def test_a_row_knows_whether_its_report_is_there(tmp_path):
    root = Root.at(tmp_path)
    index.append(root, FIRST)
    assert [row["kept"] for row in index.newest(root)] == [index.get(root, FIRST.run_id)["kept"]] == [False]
    root.write(f"{FIRST.report}/report.ipynb", b"half of it")
    assert not index.newest(root)[0]["kept"]
    page.write(root, FIRST, new_notebook())
    assert [row["kept"] for row in index.newest(root)] == [index.get(root, FIRST.run_id)["kept"]] == [True]


def test_the_last_run_that_was_ok(tmp_path):
    root = Root.at(tmp_path)
    assert index.find_last(root, "toy") is None and not index.indexed(root, FIRST.run_id)
    for number, state in enumerate(("ok", "failed", "ok", "failed")):
        index.append(root, later(number, state=state))
    index.append(root, replace(later(9), stage="other"))
    found = index.find_last(root, "toy")
    assert (found["run_id"], found["parameters"], found["kept"]) == (later(2).run_id, {"rows": 3}, False)
    assert index.find_last(root, "toy", before=later(2).started_at)["run_id"] == later(0).run_id
    assert index.find_last(root, "toy", before=later(0).started_at) is None
    assert index.indexed(root, later(9).run_id) and not index.indexed(root, "toy")


def test_a_table_of_an_older_release_gains_the_newer_columns(tmp_path):
    root = Root.at(tmp_path)
    newer = ["parent", "provenance", "cells", "receipt"]
    write_deltalake(root.url_of(index.TABLE), index.frame([later(1)]).drop(newer))
    assert index.newest(root)[0]["run_id"] == later(1).run_id and index.get(root, "toy")["metrics"] == {
        "rows_written": 3
    }
    index.append(root, FIRST)
    assert index.get(root, FIRST.run_id)["cells"] == FIRST.cells
    assert index.get(root, later(1).run_id)["cells"] is None and len(index.newest(root)) == 2


def test_old_commits_do_not_pile_up(tmp_path):
    """Opening the table, and so every list and append, takes longer with each commit that is kept."""
    root = Root.at(tmp_path)
    log = tmp_path / index.TABLE / "_delta_log"
    for number in range(25):
        index.append(root, later(number))
    three_hours_ago = time.time() - 3 * 3600
    for file in log.iterdir():
        os.utime(file, (three_hours_ago, three_hours_ago))
    for number in range(25, 45):
        index.append(root, later(number))
    assert len(list(log.glob("*.json"))) < 30 and len(index.newest(root)) == 45


def test_a_compacted_index_answers_as_before(tmp_path):
    root, records = Root.at(tmp_path), synthetic.month(1, days=1)
    synthetic.write_index(root, records, recent=5)
    newest = sorted(records, key=lambda record: (record.started_at, record.run_id), reverse=True)
    for asked in ({}, {"stage": "query"}, {"state": "failed", "stage": "generate"}, {"limit": 200}):
        limit = asked.pop("limit", 50)
        expected = [r.run_id for r in newest if asked.items() <= vars(r).items()][:limit]
        assert [row["run_id"] for row in index.newest(root, **asked, limit=limit)] == expected


def as_an_older_release_left_it(root, numbers):
    for number in numbers:
        index.append(root, later(number))
    root.move_tree(index.TABLE, index.OLDER)
    index._moved.clear()


def append_and_move_slowly(url, numbers, together):
    move_tree = LocalRoot.move_tree

    def slowly(*asked, **named):
        time.sleep(1)  # the other process comes to the same point
        move_tree(*asked, **named)

    LocalRoot.move_tree = slowly
    append_many(url, numbers, together)


def test_the_index_of_an_older_release_is_found_and_moved_once(tmp_path):
    root = Root.at(tmp_path)
    as_an_older_release_left_it(root, range(25))  # with a checkpoint
    assert index.is_there(root) and index.examine(root) == [Finding("the index of runs")]
    assert root.names(index.OLDER) and not root.names(index.TABLE), "whoever only looks moves nothing"
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    asked = [(root.url, range(25 + k, 37, 2), together) for k in range(2)]
    workers = [spawn.Process(target=append_and_move_slowly, args=args) for args in asked]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert {row["run_id"] for row in index.newest(root)} == {later(n).run_id for n in range(37)}
    assert not tmp_path.joinpath(index.OLDER).exists() and index.examine(root) == [Finding("the index of runs")]


def may_not_write(*_, **__):
    raise PermissionError("this root may only be read")


def test_whoever_reads_first_moves_it_or_reads_it_where_it_is(tmp_path, monkeypatch):
    root = Root.at(tmp_path)
    as_an_older_release_left_it(root, range(2))
    with monkeypatch.context() as patched:
        patched.setattr(type(root), "lease", may_not_write)
        assert len(index.newest(root)) == 2 and root.names(index.OLDER)
    assert len(index.newest(root)) == 2 and not root.names(index.OLDER)


def test_rows_that_an_older_release_went_on_to_write_are_named(tmp_path):
    root = Root.at(tmp_path)
    as_an_older_release_left_it(root, range(1))
    shutil.copytree(tmp_path / index.OLDER, tmp_path / "copy")
    index.append(root, later(1))
    (tmp_path / "copy").rename(tmp_path / index.OLDER)
    index._moved.clear()
    assert len(index.newest(root)) == 2 and root.names(index.OLDER), "it is not taken for the index"
    [finding] = index.examine(root)
    assert "lake/runs is there as well" in finding.problem and "older release" in finding.remedy


def killed_moving(url, point):
    os.environ["ETL_CRASH_AT"] = point
    index.move_from_lake(Root.at(url))


@pytest.mark.parametrize("point", ["copied, but for the last: runs", "copied, not removed: lake/runs"])
def test_a_move_in_an_object_store_that_is_killed_is_ended_by_the_next(s3_root, point):
    root = Root.at(s3_root)
    as_an_older_release_left_it(root, range(22))
    process = multiprocessing.get_context("spawn").Process(target=killed_moving, args=(s3_root, point))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert root.names(index.OLDER) and root.names(index.TABLE)
    expire(root, "services/index.lease")
    index.append(root, later(22))
    assert {row["run_id"] for row in index.newest(root)} == {later(n).run_id for n in range(23)}
    assert root.files(index.OLDER) == [] and index.examine(root) == [Finding("the index of runs")]


def expire(root, lease):
    """As if nobody had renewed the lease of a killed process for long."""
    root.write(lease, json.dumps(root.read_json(lease) | {"holder": None}).encode())
