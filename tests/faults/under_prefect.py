"""`up` with Prefect's server, for as long as it takes.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import contextlib
import json
import random
import re
import shutil
import signal
import tempfile
import time
import urllib.error
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import psutil
from faults import toy
from faults.endings import FAMILY, WAIT
from support import write_stage
from test_up import Up, get

from etl.runs import index
from etl.storage import PROJECT, Root


def cancelled(n: int, seed: int) -> str:
    """A run cancelled `n` times by Prefect's API: Cancelled there and in the index, no process of it after 5 s."""
    rng, slowest = random.Random(seed), 0.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        project = toy.project(Path(folder) / "project")
        marks = Path(folder) / "marks"
        marks.mkdir()
        code = f"{FAMILY}pathlib.Path({str(marks)!r}, f'{{run_id}} {{os.getpid()}}').touch()"
        write_stage(project, "waits", code, WAIT, yml="")
        up = Up(project, root)
        try:
            seen: set[str] = set()
            for turn in range(n):

                def under_way():
                    # one that ended before Prefect heard of it is nothing to cancel
                    new = {path.name for path in marks.iterdir() if psutil.pid_exists(int(path.name.split()[1]))} - seen
                    return new and up.flow_runs("waits", state_type="RUNNING") and new.pop()

                mark = toy.until(lambda f=under_way: _quietly(f), 240, f"turn {turn}: a run under way")
                seen.add(mark)
                run_id, kernel = mark.split()
                box = psutil.Process(int(kernel)).parent()
                [flow_run] = up.flow_runs("waits", state_type="RUNNING")
                time.sleep(rng.uniform(0, 0.5))
                kernels = [box, *toy.family(box.pid)]
                assert len(kernels) > 2, f"turn {turn}: {kernels}"
                url = f"http://127.0.0.1:{up.prefect}/api/flow_runs/{flow_run['id']}"
                try:
                    get(f"{url}/set_state", {"state": {"type": "CANCELLING"}})
                except urllib.error.HTTPError as error:
                    raise AssertionError(error.read()) from None
                asked = time.monotonic()
                toy.until(lambda kernels=kernels: not toy.alive(kernels), 5, f"turn {turn}: its processes gone")
                slowest = max(slowest, time.monotonic() - asked)

                def ended(url=url):
                    return json.loads(get(url))["state_type"] not in ("RUNNING", "CANCELLING")

                toy.until(lambda f=ended: _quietly(f), 20, f"turn {turn}: an end in Prefect")
                assert json.loads(get(url))["state_type"] == "CANCELLED", f"turn {turn}"
                toy.until(lambda run_id=run_id: _state(root, run_id), 20, f"turn {turn}: a row")
                assert _state(root, run_id) == "cancelled", f"turn {turn}: {_state(root, run_id)}"
            up.end(signal.SIGINT)
        except BaseException:
            print(up.log.read_text()[-3000:])
            raise
        finally:
            up.process.kill()
            up.process.wait()
    return f"{n} of {n} Cancelled in Prefect and in the index, every process of the run gone within {slowest:.1f} s"


def _quietly(condition):
    """None while the server does not answer."""
    try:
        return condition()
    except OSError:
        return None


def _state(root: Path, run_id: str) -> str | None:
    return next((row["state"] for row in index.newest(Root.at(str(root))) if row["run_id"] == run_id), None)


def whence_after_up(n: int, seed: int) -> str:
    """`n` minutes of `up` with the project's own stages; then `whence` for every version of every table."""
    from faults.replay_scenarios import check_whence

    with tempfile.TemporaryDirectory() as folder:
        root, project = Path(folder) / "root", toy.project(Path(folder) / "project")
        for part in ("notebooks", "params"):
            shutil.copytree(PROJECT / part, project / part, dirs_exist_ok=True)
        up = Up(project, root)
        try:
            toy.until(lambda: b"stages are on" in up.log.read_bytes(), 300, "the schedules")
            end = time.monotonic() + 60 * n
            while time.monotonic() < end:
                assert up.process.poll() is None, up.log.read_text()[-3000:]
                time.sleep(1)
            up.end(signal.SIGINT)
        finally:
            up.process.kill()
            up.process.wait()
        return f"{n} minutes of up: {check_whence(str(root))}"


def interrupted(n: int, seed: int) -> str:
    """`n` times a process of `up`, itself among them, is stopped or killed, or Prefect's database damaged; then every
    time that was due has a run or a record that says why not, once."""
    rng, what = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        root, project = Path(folder) / "root", toy.project(Path(folder) / "project")
        write_stage(project, "quick", 'check("true", True)', yml="missed: all\noverlap: queue\n")
        up = Up(project, root, "--live")
        try:
            toy.until(lambda: _times(root)[0], 300, "a run")
            for _ in range(n):
                assert up.process.poll() is None, up.log.read_text()[-3000:]
                children = psutil.Process(up.process.pid).children()
                victim = rng.choice([psutil.Process(up.process.pid), *children])
                kind = rng.choice(["stopped", "killed", "damaged"])
                if kind == "damaged":
                    path = root / "services/prefect/prefect.db"
                    toy.until(path.exists, 120, "a database in the place of the last damaged one")
                    path.write_bytes(rng.randbytes(path.stat().st_size))
                elif kind == "killed" and victim.pid != up.process.pid:
                    victim.kill()
                else:
                    kind = "stopped"
                    victim.suspend()
                    time.sleep(rng.uniform(20, 150))
                    with contextlib.suppress(psutil.NoSuchProcess):  # what hangs is ended, and started again
                        victim.resume()
                what.append(kind)
                time.sleep(rng.uniform(5, 40))
            before = max(_times(root)[0])
            toy.until(lambda: max(_times(root)[0]) > before, 120, "a run at last")
            up.end(signal.SIGINT)
            ran, left = _times(root)
        finally:
            up.process.kill()
            up.process.wait()
    first, last = min(ran), max(ran)
    due = {first + timedelta(seconds=5 * number) for number in range(int((last - first).total_seconds() // 5) + 1)}
    said = {first + timedelta(seconds=5 * number) for first, count in left for number in range(count)}
    twice = sorted(time for time, count in Counter([*ran, *said]).items() if count > 1)
    assert not twice, f"{', '.join(what)}: from {first} to {last} twice: {twice[:9]}"
    missing = sorted(due - set(ran) - said)
    assert not missing, f"{', '.join(what)}: {len(missing)} of {len(due)} have neither a run nor a word: {missing[:9]}"
    return f"{', '.join(what)}: {len(due)} times due, {len(ran)} runs, {len(said & due)} said not to run"


def _times(root: Path) -> tuple[list[datetime], list[tuple[datetime, int]]]:
    """The scheduled times at which a run began, and (first, how many) of those that are said not to."""
    ran, left = [], []
    for row in index.newest(Root.at(str(root)), stage="quick", limit=10_000):
        told = re.match(r"(?:the run|(\d+) runs) of (\S+ \S+)", row["reason"] or "")
        if row["state"] == "cancelled" and told:
            left.append((datetime.fromisoformat(f"{told[2]}+00:00"), int(told[1] or 1)))
        elif (time_ := datetime.fromisoformat(str(row["scheduled_for"]))).second % 5 == 0:
            ran.append(time_)  # the first one was at no scheduled time
    return ran, left
