"""The index and the reports of a month, swept, and swept by a process that is killed.

The function takes how many days and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import killed_sweep, synthetic

from etl.runs import index, retention
from etl.storage import PROJECT, Root

MB = 1_000_000


def swept(n: int, seed: int) -> str:
    """`n` days of runs: lists under 0.5 s, a sweep under 10 s, 200 MB of reports; killed twenty times in a month."""
    rng, records, kills = random.Random(seed), synthetic.month(seed, days=n), max(2, 20 * n // 30)
    with tempfile.TemporaryDirectory() as folder:
        root, templates = Root.at(f"{folder}/root"), Path(folder) / "templates"
        synthetic.write_index(root, records)
        made = [record for record in records if record.state != "noop"]
        synthetic.write_reports(root, made, templates)
        slowest = max(
            _seconds(lambda asked=asked: index.newest(root, **asked))
            for asked in ({}, {"stage": "query"}, {"state": "failed"}, {"since": synthetic.END}, {"limit": 200})
        )
        assert slowest < 0.5, f"a list took {slowest:.2f} s"
        os.sync()  # a month's reports are long on the disk
        took = _seconds(lambda: _sweep(root))
        assert took < 10, f"a sweep took {took:.1f} s"
        there = _reports(root)
        bad = {record.report for record in records if not record.ok}
        assert bad <= there, f"{len(bad - there)} reports of bad runs are gone"
        size = sum(path.stat().st_size for report in there for path in Path(root.url, report).iterdir())
        assert size <= 200 * MB, f"{size / MB:.0f} MB"
        synthetic.write_reports(root, [record for record in made if record.report not in there], templates)
        share = (len(made) - len(there)) // (kills + 1)  # so that the last one has something to remove, too
        for _ in range(kills):
            _sweep_and_kill(root, rng.choice(("os.remove", "os.rmdir")), rng.randrange(1, share))
            listed = index.newest(root, limit=1000)
            assert all(row["kept"] == (row["report"] in _reports_of(root, row)) for row in listed)
            assert bad <= (still := _reports(root)) and there <= still, "a sweep that was killed removed too much"
        _sweep(root)
        assert _reports(root) == there == _folders(root), "index and disk disagree"
    return (
        f"{len(records):,} runs: list {slowest:.2f} s, sweep {took:.1f} s, {len(there):,} reports, {size / MB:.0f} MB, "
        f"all {len(bad):,} bad ones kept; {kills} of {kills} sweeps killed, nothing disagrees"
    )


def _sweep(root: Root) -> None:
    """All that there is to remove; a sweep removes a day's worth."""
    while retention.sweep(root, now=synthetic.END)["later"]:
        pass


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _sweep_and_kill(root: Root, event: str, number: int) -> None:
    command = [sys.executable, killed_sweep.__file__, root.url, synthetic.END.isoformat(), event, str(number)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}).returncode
    assert ended == -signal.SIGKILL, f"a sweep ended with {ended} before its {event} number {number}"


def _folders(root: Root) -> set[str]:
    return {str(path.relative_to(root.url)) for path in Path(root.url).glob("reports/*/*/*")}


def _reports(root: Root) -> set[str]:
    """A folder without its record is none."""
    return {report for report in _folders(root) if Path(root.url, report, "run.json").exists()}


def _reports_of(root: Root, row: dict) -> set[str]:
    return {row["report"]} if Path(root.url, row["report"], "run.json").exists() else set()
