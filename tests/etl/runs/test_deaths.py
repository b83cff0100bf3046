"""What the report of a bad run says: the card, the line it was stuck at, the last minute, the receipt."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from support import busy_s
from test_engine import RUN_ID, alive, as_run, cell_states, run, saved

from etl.kernels import watcher
from etl.reports import cards
from etl.runs import delivery, index, journal
from etl.runs.endings import for_memory, one_line
from etl.runs.record import RunRecord
from etl.secrets import Redactor
from etl.storage import PROJECT, Root

STUCK = {  # the code, and the blocked lines; the other ways to hang are in test_faults
    "thread": (
        "import threading\nlock = threading.Lock()\nlock.acquire()\ndef wait():\n    with lock: pass\n"
        "thread = threading.Thread(target=wait)\nthread.start()\nthread.join()",
        ["with lock: pass", "thread.join()"],
    ),
    "C call that goes on after a signal": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nmutex = (ctypes.c_char * 64)()\n"
        "libc.pthread_mutex_lock(mutex)\nlibc.pthread_mutex_lock(mutex)  # again",
        ["libc.pthread_mutex_lock(mutex)  # again"],
    ),
    "project": ("from etl import storage\nstorage.time.sleep(1e9)", ["storage.time.sleep(1e9)"]),
}


@pytest.mark.parametrize("name", STUCK)
def test_the_stack_of_every_thread_is_in_the_report(tmp_path, name):
    code, lines = STUCK[name]
    record = run(tmp_path, "# Wait", "rows: int = 1", code, deadline_s=busy_s(3))
    nb, run_json = saved(record)
    [shown] = [out.data["text/plain"] for out in as_run(nb)[-1].outputs if "data" in out]
    assert shown.startswith(cards.STACKS) and all(line in shown for line in lines)
    assert "ipykernel" not in shown and "zmq" not in shown
    assert run_json["error"]["frame"]["code"] == lines[-1] and lines[-1] in nb.cells[0].source


def test_a_crash_says_where(tmp_path):
    record = run(tmp_path, "# Crash", "rows: int = 1", "import ctypes\nctypes.string_at(0)", "print('never')")
    nb, run_json = saved(record)
    assert (record.state, record.reason) == ("killed", "the kernel was killed by SIGSEGV in 'Crash'")
    assert run_json["error"]["frame"] == {"where": "cell 4, line 2", "code": "ctypes.string_at(0)"}
    assert "ctypes.string_at(0)" in nb.cells[0].source and cell_states(nb)[-2:] == ["killed", "never_ran"]


def test_memory_above_the_limit_is_death_and_the_last_minute_shows_it(tmp_path):
    grow = "import time\nkept = []\nfor _ in range(60):\n    kept.append(bytearray(b'x' * 10**7))\n    time.sleep(0.1)"
    record = run(tmp_path, "# Grow", "rows: int = 1", grow, "print('never')", memory_mb=300)
    nb, run_json = saved(record)
    assert record.state == "killed" and ", and may take 300" in record.reason
    table, receipt = nb.cells[-2].source, nb.cells[-1].source
    assert "#### Its last minute" in table and table.splitlines()[-1].endswith("| 4 |") and "of 300 MB" in table
    assert 300 < run_json["receipt"]["peak_memory_mb"] < 450 and "MB at most" in receipt


def test_what_a_run_still_held_after_it_was_ended_is_not_its_memory_at_the_end(tmp_path):
    """A cell that frees its memory when it is interrupted, and takes its time."""
    hold = (
        "import time\ndef hold():\n    kept = bytearray(b'x' * 500_000_000)\n    try:\n        time.sleep(100)\n"
        "    finally:\n        del kept\n        time.sleep(1.9)\nhold()"
    )
    record = run(tmp_path, "# Hold", "rows: int = 1", hold, deadline_s=busy_s(6))
    nb, _ = saved(record)
    last = nb.cells[-2].source
    assert record.state == "timed_out" and int(re.search(r"\| 0 s \| ([\d,]+) MB", last)[1].replace(",", "")) > 500
    assert "Memory at the end: 0.1 of" not in last


def test_a_process_that_has_ended_has_no_memory_to_tell_of():
    with subprocess.Popen(["sleep", "1000"]) as process:
        assert not watcher.is_ending(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still there
        assert watcher.is_ending(process.pid)
    assert watcher.is_ending(process.pid)


def test_what_is_said_of_a_sigkill_out_of_nowhere():
    sample = {"event": "sample", "rss_mb": 7700, "limit_mb": 8000}
    end = {"event": "kernel_end", "status": -9, "cause": "", "oom_kills": 0}
    assert for_memory([sample, end], None) == ": memory ran out, 7.7 of 8.0 GB at the time"
    assert for_memory([sample | {"rss_mb": 500}, end], None) == ""
    assert for_memory([sample | {"rss_mb": 500}, end | {"oom_kills": 1}], None).endswith("0.5 of 8.0 GB at the time")
    assert for_memory([sample, end | {"status": -11}], None) == ""
    assert for_memory([], None) == ""


def test_the_card_names_the_users_own_frame_and_what_is_new_since_it_went_well(tmp_path):
    cells = ("# Read", "rows: int = 1", "from etl import storage\nif rows > 3: storage.Root.at(folder).read('none')")
    parameters = {"rows": 3, "folder": str(tmp_path)}
    ok = run(tmp_path, *cells, parameters=parameters)
    bad = run(tmp_path, *cells, parameters=parameters | {"rows": 5}, number=1)
    nb, run_json = saved(bad)
    source = nb.cells[0].source
    assert source.startswith("#### toy: failed, in **Read**, [cell 4](#cell-4)\n") and len(source.splitlines()) <= 12
    assert "FileNotFoundError" in source and "`rows` 3 → 5." in source
    assert f"[{ok.run_id}](../../2026-11-03/{ok.run_id}/report.html)" in source
    frame = run_json["error"]["frame"]
    called = {"where": "cell 4, line 2", "code": cells[2].splitlines()[1]}  # of an injected cell more
    assert frame == called  # and not the line of the engine that it calls
    page = (tmp_path / bad.report / "report.html").read_text()
    assert f'href="../../2026-11-03/{ok.run_id}/report.html"' in page


def test_a_first_line_that_announces_the_next_has_it():
    assert one_line("no such column:\n    l_shipdate\nmore", "KeyError") == "KeyError: no such column: l_shipdate"
    assert one_line("two lines\nof text", "E") == "E: two lines" and one_line("alone:", "E") == "E: alone:"
    assert one_line("", "E") == "E"


def test_a_card_is_never_longer_than_12_lines():
    said = ("toy", "toy-1", "/r", "2026-11-03T10:00:00+00:00", 1, {"a": "```\n" * 50, "b": 2}, {}, "reports/x", "here")
    record = RunRecord(*said, started_at="2026-11-03T10:00:00+00:00")
    record.state, record.reason = "killed", "one\ntwo\n```\n" * 9
    record.error = {"heading": "H", "cell": 3, "frame": {"where": "x.py:1", "code": "y"}, "traceback_tail": "z\n" * 30}
    last = {"run_id": "toy-0", "report": "reports/toy/2026-11-03/toy-0", "parameters": {"a": "x" * 999, "c": 1}}
    assert len(cards.card(record, last).source.splitlines()) <= 12


def test_the_users_own_frame_is_known_where_a_secret_is_a_folder_of_its_path(tmp_path):
    project = tmp_path / "postgres"
    project.mkdir()
    (project / "work.py").write_text("def call():\n    raise ValueError\n")
    redactor = Redactor({"POSTGRES_PASSWORD": "postgres"})
    shown = redactor.text(f"File {project}/work.py:2, in call()\n")
    frame = {"where": "work.py:2", "code": "raise ValueError"}
    assert str(project) not in shown and cards.own_frame(shown, [], project, redactor.restored) == frame


def test_frames_of_libraries_are_not_the_users_own():
    cell = new_code_cell("import x\nx.f()", execution_count=3)
    traceback = (
        "Cell In[3], line 2\n----> 2 x.f()\n\nFile ~/.venv/lib/python3.11/site-packages/x.py:7, in f()\n----> 7 boom"
    )
    assert cards.own_frame(traceback, [cell]) == {"where": "cell 1, line 2", "code": "x.f()"}


def test_the_receipt_counts_children_too(tmp_path):
    burn = "import subprocess, sys\nfrom etl.notebook import record\n"
    child = "for i in range(10**7): pass\nopen('/dev/null', 'w').write('x' * 10**7)\n"
    child += "import time; print(time.process_time())"
    burn += f"used = subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout\n"
    burn += "record(rows=1000, childs_cpu_s=float(used))"
    record = run(tmp_path, "rows: int = 1", burn)
    nb, run_json = saved(record)
    receipt = run_json["receipt"]
    assert set(receipt) == {"wall_s", "cpu_s", "peak_memory_mb", "bytes_read", "bytes_written", "rows_per_s"}
    assert receipt["wall_s"] == record.seconds and receipt["bytes_written"] > 10**7
    assert receipt["cpu_s"] > record.metrics["childs_cpu_s"] > 0
    assert receipt["rows_per_s"] == pytest.approx(1000 / record.seconds, rel=0.01)
    assert run_json["cells"][1] == {"heading": "the first cell", "state": "ok", "seconds": record.cells[1]["seconds"]}
    assert nb.cells[-1].metadata.tags == ["report-receipt"]
    nbformat.validate(nb)


FAMILY = """
import json, os, subprocess, sys, time
code = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(600)"
deaf = [sys.executable, "-c", code]
pids = [subprocess.Popen(deaf).pid, subprocess.Popen(deaf, start_new_session=True).pid]
to_parent, from_child = os.pipe()[::-1]
if os.fork() == 0:
    os.setsid()
    if daemon := os.fork():
        os.write(to_parent, b"%d" % daemon)
        os._exit(0)
    os.execv(deaf[0], deaf)
pids.append(int(os.read(from_child, 20)))
with open(PIDS, "w") as file:
    json.dump([os.getpid(), *pids], file)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_runner_that_is_killed(tmp_path, spool, number):
    """Not a child, not one in a session of its own, not a daemon that has lost its parent, and no kernel's folder."""
    pids, temporary = tmp_path / "pids", Path(tempfile.mkdtemp())  # short: sockets are in it
    cells = ["# Title", "rows: int = 1", "# Work", f"PIDS = {str(pids)!r}\n{FAMILY}", "print('never')"]
    folders = [str(PROJECT / folder) for folder in (".", "tests", "tests/etl/runs")]
    code = f"import sys\nsys.path[:0] = {folders!r}\n"
    code += f"from test_engine import run\nrun({str(tmp_path)!r}, *{cells!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(temporary)}) as process:
        while not (pids.exists() and pids.read_text().endswith("]")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == -number
    family, until = json.loads(pids.read_text()), time.monotonic() + 5
    assert len(family) == 4
    while [pid for pid in family if alive(pid)] or [*temporary.glob("kernel-*")]:
        assert time.monotonic() < until
        time.sleep(0.05)
    shutil.rmtree(temporary)
    assert delivery.reconcile() == ([RUN_ID % 0] if number == signal.SIGKILL else [])
    [row] = index.newest(Root.at(tmp_path))
    nb = nbformat.reads(Root.at(tmp_path).read(f"{row['report']}/report.ipynb").decode(), as_version=4)
    who = {signal.SIGTERM: "the runner got SIGTERM", signal.SIGKILL: "the runner was killed"}
    assert (row["state"], row["reason"]) == ("killed", f"{who[number]} in 'Work'")
    assert cell_states(nb)[-2:] == ["killed", "never_ran"] and nb.cells[0].metadata.tags == ["report-card"]
    assert list(spool.iterdir()) == [] and journal.live() == []
