"""Every way a run can end, on real kernels: the state is what happened, and nothing is left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from support import busy_s

from etl.runs import index
from etl.runs.engine import execute
from etl.runs.record import RunRequest
from etl.storage import PROJECT, Root

RUN_ID = "toy-20261103T100000-%06x"


def notebook(*cells: str) -> dict:
    """A notebook of code cells; one that begins with # and a space is a heading, `rows: ` the parameters."""
    made = []
    for text in cells:
        if text.startswith("# "):
            made.append(new_markdown_cell(text))
        else:
            tags = ["parameters"] if text.startswith("rows: ") else []
            made.append(new_code_cell(text, metadata={"tags": tags}))
    return new_notebook(cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def run(root, *cells, number=0, deadline_s=60, parameters=None, memory_mb=None, variables=None, **options):
    request = RunRequest(
        stage="toy",
        run_id=RUN_ID % number,
        root=str(root),
        notebook=notebook(*cells),
        parameters={"rows": 3} if parameters is None else parameters,
        origins={"rows": "params/toy.yml:4"},
        scheduled_for="2026-11-03T10:00:00+00:00",
        deadline_s=deadline_s,
        memory_mb=memory_mb,
        variables=variables or {},
    )
    return execute(request, **options)


def saved(record):
    """The executed notebook and run.json, as they stand in the root."""
    root = Root.at(record.root)
    text = root.read(f"{record.report}/report.ipynb").decode()
    return nbformat.reads(text, as_version=4), json.loads(root.read(f"{record.report}/run.json"))


def as_run(nb):
    """The notebook's own cells, without what the report adds."""
    return [cell for cell in nb.cells if "report" not in cell.metadata.runner]


def cell_states(nb):
    return [cell.metadata.runner["state"] for cell in as_run(nb)]


def test_a_run_that_ends_well_leaves_report_record_and_row(tmp_path):
    seen = []
    record = run(
        tmp_path,
        "# Count rows",
        "rows: int = 1  # how many",
        "from etl.notebook import check, record\nimport os",
        "# Check",
        "check('some rows', rows > 2, f'{rows} > 2')",
        "record(rows_written=rows, versions_written={'orders': 7}, versions_read={'nation': 0})",
        "record(cwd=os.getcwd())",
        on_cell=lambda *progress: seen.append(progress),
    )
    nb, run_json = saved(record)
    assert (record.state, record.reason, record.error, record.ok) == ("ok", "", None, True)
    assert run_json["metrics"] == {"rows_written": 3, "cwd": str(PROJECT / "notebooks")}
    assert run_json["checks"] == [{"name": "some rows", "ok": True, "detail": "3 > 2"}]
    assert (run_json["versions_written"], run_json["versions_read"]) == ({"orders": 7}, {"nation": 0})
    assert run_json["parameters"] == {"rows": 3} and run_json["origins"] == {"rows": "params/toy.yml:4"}
    assert set(cell_states(nb)) == {"ok"}
    assert nb.cells[2].metadata.tags == ["injected-parameters"] and nb.cells[2].source == "rows = 3\n"
    assert {cell.metadata.papermill["status"] for cell in as_run(nb)} == {"completed"}
    assert seen[0] == (0, 6, "Count rows") and seen[3] == (3, 6, "Check") and seen[-1][:2] == (6, 6)
    assert record.report == f"reports/toy/2026-11-03/{record.run_id}"
    assert Root.at(tmp_path).names(record.report) == ["report.html", "report.ipynb", "run.json"]
    [row] = index.newest(Root.at(tmp_path))
    assert (row["run_id"], row["state"], row["seconds"]) == (record.run_id, "ok", record.seconds)


ENDS = {  # the cell it ends in, the run's state, part of the reason, the cell's state
    "stop": ("from etl.notebook import stop\nstop('no new files')", "noop", "no new files", "ok"),
    "check": (
        "from etl.notebook import check\ncheck('few', rows < 3, '3 rows')\ncheck('some', True)",
        *("check_failed", "1 check failed: few (3 rows)", "failed"),
    ),
    "raise": ("1 / 0", "failed", "ZeroDivisionError: division by zero", "failed"),
    "namesake": ("class Stop(Exception): ...\nraise Stop('not ours')", "failed", "Stop: not ours", "failed"),
    "syntax": ("rows = )", "failed", "SyntaxError", "failed"),
    "sys.exit": ("import sys; sys.exit(0)", "failed", "SystemExit: 0", "failed"),
    "exit": ("exit()", "failed", "called exit()", "failed"),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", "killed", "killed by SIGKILL in 'Write'", "killed"),
    "os._exit": ("import os; os._exit(0)", "killed", "exited with status 0 in 'Write'", "killed"),
}


@pytest.mark.parametrize("ending", ENDS)
def test_a_run_that_ends_early_says_how_and_later_cells_never_ran(tmp_path, ending):
    code, state, reason, cell_state = ENDS[ending]
    record = run(tmp_path, "# Title", "rows: int = 1", "# Write", code, "# Later", "print('never')")
    nb, run_json = saved(record)
    assert record.state == run_json["state"] == nb.metadata.runner["state"] == state
    assert reason in record.reason
    assert cell_states(nb) == ["ok", "ok", "ok", "ok", cell_state, "never_ran", "never_ran"]
    assert as_run(nb)[-1].metadata.papermill["status"] == "pending" and as_run(nb)[-1].outputs == []
    assert record.ok == (state == "noop") == ("report-card" not in nb.cells[0].metadata.get("tags", []))
    if not record.ok:
        assert "Write" in nb.cells[0].source and reason in nb.cells[0].source
        assert len(nb.cells[0].source.splitlines()) <= 12
        assert nb.cells[run_json["error"]["cell"]].source == code
        assert run_json["error"]["heading"] == "Write"
    assert [row["state"] for row in index.newest(Root.at(tmp_path))] == [state]


STUCK = {  # the code, and the line that the report shows
    "loop": ("while True: pass", "while True"),
    "sleep": ("import time\ntime.sleep(1e9)", "time.sleep(1e9)"),
    # deaf to SIGINT and SIGTERM, as a blocked C call is; SIGKILL remains
    "deaf": ("import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])\ntime.sleep(1e9)", None),
    # the cell ends by itself when interrupted, but not where it should
    "swallow": ("import time\ntry:\n    time.sleep(1e9)\nexcept KeyboardInterrupt:\n    pass", None),
}


@pytest.mark.parametrize("stuck", STUCK)
def test_a_stuck_cell_ends_at_the_deadline_and_shows_where_it_was(tmp_path, stuck):
    code, line = STUCK[stuck]
    deadline_s = busy_s(2.5)
    record = run(tmp_path, "# Wait", "rows: int = 1", code, "print('never')", deadline_s=deadline_s)
    nb, run_json = saved(record)
    assert (record.state, record.reason) == ("timed_out", f"deadline of {deadline_s:g} s passed in 'Wait'")
    assert cell_states(nb) == ["ok", "ok", "ok", "timed_out", "never_ran"]
    assert deadline_s <= record.seconds < 3 * deadline_s
    if line:
        assert line in run_json["error"]["traceback_tail"]


def test_a_deadline_passes_while_the_kernel_starts(tmp_path):
    record = run(tmp_path, "rows: int = 1", deadline_s=0.01)
    assert (record.state, record.reason) == (
        "timed_out",
        "deadline of 0.01 s passed while the kernel started",
    )
    assert set(cell_states(saved(record)[0])) == {"never_ran"}


def test_a_run_can_be_cancelled_from_another_thread(tmp_path):
    cancel = threading.Event()

    def when_the_last_cell_starts(done, total, heading):
        if done == total - 1:
            cancel.set()

    record = run(
        *(tmp_path, "# Work", "rows: int = 1", "import time\ntime.sleep(1e9)"),
        cancel=cancel,
        on_cell=when_the_last_cell_starts,
    )
    assert (record.state, record.reason) == ("cancelled", "cancelled in 'Work'")
    assert cell_states(saved(record)[0])[-1] == "killed"


def test_ctrl_c_ends_a_run_as_cancelled(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}, {str(Path(__file__).parent)!r}]
from test_engine import run
tell = lambda done, total, heading: print(done, flush=True)
print(run({str(tmp_path)!r}, "rows: int = 1", "import time; time.sleep(1e9)", on_cell=tell).state)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0)
    with process:
        while process.stdout.readline() != "2\n":  # the last cell begins
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "cancelled\n"


def test_a_kernel_that_cannot_start_is_a_failed_run_with_a_reason(tmp_path):
    record = run(tmp_path, "rows: int = 1", variables={"PYTHONHOME": "/nowhere"})
    assert record.state == "failed"
    assert record.reason.startswith("the kernel did not start: RuntimeError: Kernel died")
    assert "No module named 'encodings'" in record.error["traceback_tail"]
    assert set(cell_states(saved(record)[0])) == {"never_ran"}


def test_nothing_is_left_of_a_kernel(tmp_path_factory, monkeypatch):
    """No process of its group, no socket, no connection file."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    record = run(
        tmp_path_factory.mktemp("root"),
        "rows: int = 1",
        "import subprocess, psutil, ipykernel\nfrom etl.notebook import record",
        "child = subprocess.Popen(['sh', '-c', 'trap \"\" INT TERM; while :; do sleep 1; done'])",
        "record(pids=[psutil.Process().pid, child.pid], **ipykernel.get_connection_info(unpack=True))",
    )
    assert (record.state, record.metrics["transport"]) == ("ok", "ipc")
    assert record.metrics["ip"].startswith(str(folder))
    assert list(folder.iterdir()) == []
    assert not [pid for pid in record.metrics["pids"] if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_exit_handlers_of_the_notebook_run(tmp_path):
    mark = tmp_path / "closed"
    run(
        tmp_path,
        "rows: int = 1",
        f"import atexit, pathlib\natexit.register(pathlib.Path({str(mark)!r}).touch)",
    )
    assert mark.exists()


def test_four_runs_at_once_in_threads_do_not_mix(tmp_path):
    before = os.getcwd()

    def one(number):
        cells = ("rows: int = 1", "from etl.notebook import record\nrecord(got=rows)")
        return run(tmp_path, *cells, number=number, parameters={"rows": number})

    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(one, range(4)))
    assert [(r.state, r.metrics) for r in records] == [("ok", {"got": n}) for n in range(4)]
    assert {row["run_id"] for row in index.newest(Root.at(tmp_path))} == {RUN_ID % n for n in range(4)}
    assert os.getcwd() == before


def test_a_run_is_what_it_was_when_its_report_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        record = run(tmp_path / "file" / "below", "rows: int = 1")
    assert record.state == "ok"
    assert f"the report of run {record.run_id} could not be written" in caplog.text


SHOWN = {  # IPython calls each of these cells a success
    "in %run": "import pathlib\npathlib.Path('{folder}/script.py').write_text('1 / 0')\n%run {folder}/script.py",
    "by hand": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    get_ipython().showtraceback()",
    "in a callback": "get_ipython().events.register('post_run_cell', lambda result: 1 / 0)",
}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_cell_that_shows_an_error_has_failed(tmp_path, shown):
    record = run(tmp_path, "# Work", "rows: int = 1", SHOWN[shown].format(folder=tmp_path), "print('never')")
    nb, run_json = saved(record)
    assert (record.state, record.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert cell_states(nb)[-2:] == ["failed", "never_ran"]
    assert "ZeroDivisionError" in nb.cells[0].source and run_json["error"]["ename"] == "ZeroDivisionError"


def test_a_cell_tagged_to_raise_may_and_what_others_than_record_show_is_not_recorded(tmp_path):
    request = RunRequest(
        **{"stage": "toy", "run_id": RUN_ID % 1, "root": str(tmp_path), "parameters": {}, "origins": {}},
        notebook=notebook(
            "1 / 0",
            "from etl.notebook import CHECK_MIME, RECORD_MIME, record\n"
            "from IPython.display import display\n"
            "display({RECORD_MIME: 'text', CHECK_MIME: [1]}, raw=True)\n"
            "display({RECORD_MIME: {'metrics': 5}, CHECK_MIME: {'checks': [{'name': 1}]}}, raw=True)\n"
            "record(rows=1)",
        ),
        scheduled_for="2026-11-03T10:00:00+00:00",
        deadline_s=60,
    )
    request.notebook["cells"][0]["metadata"]["tags"] = ["raises-exception"]
    record = execute(request)
    assert (record.state, record.metrics, record.checks) == ("ok", {"rows": 1}, [])
    assert set(cell_states(saved(record)[0])) == {"ok"}
