"""Runs that die, hang or are killed: the state is true, the report says where, and nothing is left.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import json
import random
import signal
import tempfile
import time
from pathlib import Path

from faults import toy

from etl.runs import index
from etl.storage import Root

READY = "import pathlib; pathlib.Path({!r}).touch()"
WAIT = "import time\ntime.sleep(1e9)"
DEATHS = {  # code of the cell; what else the request says; the state
    "SIGKILL of the kernel": ("import os; os.kill(os.getpid(), 9)", {}, "killed"),
    "os._exit": ("import os; os._exit(0)", {}, "killed"),
    "memory limit": ("kept = []\nwhile True: kept.append(b'x' * 10_000_000)", {"memory_mb": 700}, "killed"),
    "deadline": (WAIT, {"deadline_s": 6}, "timed_out"),
    "SIGTERM of the runner": (WAIT, {}, None),  # cancelled or killed, by what the runner makes of it
    "no kernel": ("print()", {"variables": {"PYTHONHOME": "/nowhere"}}, "failed"),
}


def deaths(n: int, seed: int) -> str:
    """The first `n` of six ways to die: never ok, later cells never ran, a card comes first, exit status not 0."""
    rng, states = random.Random(seed), []
    for name, (code, more, expected) in list(DEATHS.items())[:n]:
        with tempfile.TemporaryDirectory() as folder:
            root, ready = Path(folder) / "root", Path(folder) / "ready"
            cells = ("# Die", READY.format(str(ready)), code, "# Later", "print('never')")
            asked = toy.request(root, *cells, rng=rng, **more)
            process = toy.start(asked, Path(folder) / "spool")
            if name == "SIGTERM of the runner":
                toy.until(ready.exists, 60, "a cell under way")
                process.send_signal(signal.SIGTERM)
            status = process.wait(90)
            if name == "SIGTERM of the runner":
                _next_start(Path(folder) / "spool")
            [row] = index.newest(Root.at(str(root)))
            nb, record = toy.report(root, row)
            assert status != 0, f"{name}: exit status 0"
            assert row["state"] == record["state"] == nb.metadata.runner["state"], name
            assert record["state"] == expected or (expected is None and record["state"] in ("cancelled", "killed")), (
                f"{name}: {record['state']}"
            )
            assert "report-card" in nb.cells[0].metadata.get("tags", []), f"{name}: no card"
            assert len(nb.cells[0].source.splitlines()) <= 12, f"{name}: a long card"
            assert toy.cell_states(nb)[-2:] == ["never_ran", "never_ran"], f"{name}: {toy.cell_states(nb)}"
            states.append(f"{name} {record['state']}")
    return f"{len(states)} of {n} never ok: {', '.join(states)}"


HANGS = {  # code of the cell; the line that the report has to show
    "while True": ("n = 0\nwhile True: n = n + 1", "while True: n = n + 1"),
    "sleep": ("import time\ntime.sleep(1e9)", "time.sleep(1e9)"),
    "deadlock": (
        "import threading\nlock = threading.Lock()\ndef work():\n    with lock:\n        lock.acquire()\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()",
        "lock.acquire()",
    ),
    # PyDLL keeps the interpreter's lock, so no Python runs in any thread until the call returns
    "C call": ("import ctypes\nctypes.PyDLL(None).sleep(10**6)", "ctypes.PyDLL(None).sleep(10**6)"),
}


def hangs(n: int, seed: int, deadline_s: float = 6) -> str:
    """The first `n` of four ways to hang: each run ends by its deadline + 10 s and shows the line that was blocked."""
    rng, took = random.Random(seed), []
    for name, (code, line) in list(HANGS.items())[:n]:
        with tempfile.TemporaryDirectory() as folder, toy.spool(folder):
            began = time.monotonic()
            record = toy.run(Path(folder), "# Hang", code, "print('never')", deadline_s=deadline_s, rng=rng)
            seconds = time.monotonic() - began
            nb, _ = toy.report(Path(folder), record)
            assert record.state == "timed_out", f"{name}: {record.state}"
            assert seconds <= deadline_s + 10, f"{name}: {seconds:.1f} s"
            shown = [nb.cells[0].source] + [json.dumps(cell.get("outputs", [])) for cell in nb.cells]
            assert any(line in text for text in shown), f"{name}: {line!r} is nowhere in the report"
            took.append(seconds - deadline_s)
    return f"{len(took)} of {n} ended, at most {max(took):.1f} s after the deadline, each shows its line"


FAMILY = """import os, pathlib, subprocess, sys
subprocess.Popen(["sh", "-c", "trap '' INT TERM; sleep 1000 & wait"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)
"""


def killed(n: int, seed: int, number: int = signal.SIGKILL) -> str:
    """A runner killed `n` times at a random moment: no descendant after 5 s, nothing running after the next start."""
    rng, slowest, found = random.Random(seed), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        root, spool = Path(folder) / "root", Path(folder) / "spool"
        for turn in range(n):
            ready = Path(folder) / f"ready-{turn}"
            cells = ("# Start", FAMILY + READY.format(str(ready)), "# Wait", WAIT, "print('never')")
            asked = toy.request(root, *cells, rng=rng)
            process = toy.start(asked, spool)
            if turn % 4:  # the others are hit while the kernel starts
                toy.until(ready.exists, 60, "a cell under way")
                time.sleep(rng.uniform(0, 0.3))
            else:
                time.sleep(rng.uniform(1.5, 3))
            children = toy.family(process.pid)
            process.send_signal(number)
            began = time.monotonic()
            toy.until(lambda children=children: not toy.alive(children), 5, f"turn {turn}: descendants gone")
            slowest, found = max(slowest, time.monotonic() - began), found + len(children)
            process.wait(30)  # one that ends in order may have begun a process after the signal
            toy.until(lambda: not toy.marked(f"ETL_SPOOL={spool}"), 5, f"turn {turn}: every process gone")
            closed = _next_start(spool)
            row = next(
                (row for row in index.newest(Root.at(str(root)), limit=n) if row["run_id"] == asked.run_id), None
            )
            if row is None:  # killed before the run had begun: then nothing says that it has
                assert asked.run_id not in closed and not (spool / asked.run_id).exists(), f"turn {turn}: no row"
                continue
            assert row["state"] in ("killed", "cancelled"), f"turn {turn}: {row['state']}"
            nb, record = toy.report(root, row)
            assert record["state"] == row["state"] and "report-card" in nb.cells[0].metadata["tags"], f"turn {turn}"
            assert "never_ran" in toy.cell_states(nb), f"turn {turn}: {toy.cell_states(nb)}"
        rows = index.newest(Root.at(str(root)), limit=n + 1)
    return (
        f"{n} x {signal.Signals(number).name}: {found} descendants gone within {slowest:.1f} s, {len(rows)} runs closed"
    )


def _next_start(spool: Path) -> list[str]:
    """What the next process does first; the runs it closed. None may be under way after it."""
    from etl.runs import delivery, journal

    with toy.spool(spool.parent):
        closed = delivery.reconcile()
        assert journal.live() == [], "still running after the next start"
    return closed


def terminated(n: int, seed: int) -> str:
    return killed(n, seed, signal.SIGTERM)
