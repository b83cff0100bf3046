"""A backfill that is killed again and again: in the end each day was done once.

The function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

from faults import toy
from support import environment, write_stage

from etl.runs import index
from etl.storage import Root

KILLS, AT_ONCE = 2, 2
CODE = "import pathlib, time\npathlib.Path(root, f'begun-{run_id}').touch()\ntime.sleep(0.5)"
DECLARED = 'scheduled_for: str = "2026-01-01T00:00:00+00:00"  # its day\n'


def killed(n: int, seed: int) -> str:
    """A backfill of `n` days, two at a time, killed twice in its middle: one ok run of each day, nothing left over."""
    rng, first = random.Random(seed), date(2026, 3, 1)
    days = [f"{first + timedelta(days=day)}T00:00:00.000+00:00" for day in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        project, root, spool = toy.project(Path(folder) / "project"), Root.at(f"{folder}/root"), f"{folder}/spool"
        write_stage(project, "daily", CODE, parameters=DECLARED)
        between = ("--from-time", str(first), "--to-time", str(first + timedelta(days=n)), "--every", "1 day")
        command = [sys.executable, "orchestrate.py", "run", "daily", "--root", root.url, *between]
        options = {"cwd": project, "env": environment(project) | {"ETL_SPOOL": spool}, "text": True}

        def begin() -> subprocess.Popen:
            return subprocess.Popen([*command, f"--parallel={AT_ONCE}"], stdout=subprocess.PIPE, **options)

        def ok() -> int:
            return len(index.newest(root, state="ok", limit=n + 1))

        for turn in range(KILLS):
            with begin() as process:
                middle = max(1, n * (turn + 1) // (KILLS + 2))
                toy.until(lambda m=middle: ok() >= m, 60 + 20 * n, f"turn {turn}: {middle} days")
                time.sleep(rng.uniform(0, 1))
                assert process.poll() is None, f"turn {turn}: it ended before it was killed"
                process.kill()
            toy.until(lambda: not toy.marked(f"ETL_SPOOL={spool}"), 10, f"turn {turn}: every process gone")
        before = ok()
        with begin() as process:
            told = process.stdout.read()
        assert process.wait() == 0, told
        rows = index.newest(root, limit=1000)
        good = Counter(row["scheduled_for"] for row in rows if row["state"] == "ok")
        assert good == Counter(days), f"not each day once: {good}"
        cut = [row["state"] for row in rows if row["state"] != "ok"]
        assert set(cut) <= {"killed"} and len(cut) <= KILLS * AT_ONCE, cut
        begun = sum(name.startswith("begun-") for name in root.names(""))
        assert begun <= n + len(cut), f"{begun} runs began, {len(rows)} are told"
        assert 0 < before < n and f" of {n} are ok already" in told, told
    return f"{n} days, killed {KILLS} times with {len(cut)} under way, resumed: each day once, {len(rows)} runs"
