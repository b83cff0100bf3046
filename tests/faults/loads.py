"""Runs with much to say, and many runs at once.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import json
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from faults import toy

from etl.runs import index
from etl.storage import Root

MB = 1_000_000
# noise compresses to nothing less, and no cap on long text applies to pictures of this size
PICTURES = """import base64, os, random
from IPython.display import Image, display
for i in range({count}):
    display(Image(data=b"\\x89PNG\\r\\n\\x1a\\n" + random.Random(i).randbytes(40_000), format="png"))
print("cell", {cell})"""


def polled(n: int, seed: int, megabytes: float = 10) -> str:
    """A reader polls all files of a run of `n` cells: none is ever invalid; and how many bytes were written."""
    rng, reads, bad = random.Random(seed), 0, []
    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder, toy.spool(folder):
        root = Path(folder) / "root"
        count = max(1, round(megabytes * MB / n / 53_400))  # of base64 for one picture
        asked = toy.request(root, *(PICTURES.format(count=count, cell=i) for i in range(n)), rng=rng, deadline_s=600)

        def poll():
            nonlocal reads
            while not done.is_set():
                # rglob raises when a folder vanishes under it
                files = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
                for path in [path for path in files if path.suffix == ".ipynb" or path.name == "run.json"]:
                    try:
                        json.loads(path.read_bytes())
                        reads += 1
                    except FileNotFoundError:
                        continue
                    except ValueError as error:
                        bad.append(f"{path.name}: {error}")

        thread = threading.Thread(target=poll)
        before = _written()
        thread.start()
        try:
            record = toy.execute(asked)
        finally:
            done.set()
            thread.join()
        written = _written() - before
        assert record.state == "ok", record.reason
        sizes = {path.name: path.stat().st_size for path in (root / record.report).iterdir()}
    final = sum(sizes.values())
    assert not bad, bad[:3]
    assert sizes["report.ipynb"] >= 0.8 * megabytes * MB, sizes
    assert written <= 2.2 * final, f"{written / MB:.1f} MB written for {final / MB:.1f} MB"
    return f"{n} cells, {final / MB:.1f} MB of report: {reads} reads, none invalid; {written / final:.2f} x written"


def _written() -> int:
    """Bytes this process has written to files and pipes; what goes through sockets does not count."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def tailed(n: int, seed: int) -> str:
    """`n` lines printed over time: each is seen by who follows the run within 2 s."""
    from etl.runs import delivery, journal

    lags = []
    code = (
        f"import time\nfor i in range({n}):\n    print(f'at {{time.time():.3f}} end', flush=True)\n    time.sleep(0.4)"
    )
    with tempfile.TemporaryDirectory() as folder, toy.spool(folder), ThreadPoolExecutor(1) as pool:
        asked = toy.request(Path(folder) / "root", code, rng=random.Random(seed))
        running = pool.submit(toy.execute, asked)
        toy.until(lambda: asked.run_id in json.dumps(journal.live(), default=str), 60, "the run under way")
        for event in delivery.follow(asked.run_id, Root.at(asked.root)):
            for part in json.dumps(event, default=str).split("at ")[1:]:
                moment = part.split(" end")[0]
                if moment.replace(".", "").isdigit():
                    lags.append(time.time() - float(moment))
        assert running.result().state == "ok", running.result().reason
    assert len(lags) == n, f"{len(lags)} of {n} lines"
    assert max(lags) <= 2, f"{max(lags):.1f} s"
    return f"{n} of {n} lines seen, the slowest {max(lags):.2f} s after its print"


def printed(n: int, seed: int) -> str:
    """A cell prints `n` MB: report under 1 MB, all of the text kept, the runner under 200 MB of memory of its own.

    How much is mapped of the packages' files besides is the system's choice: 50 MB more just after they were installed.
    """
    lines = n * MB // 100
    code = f"for i in range({lines}):\n    print(f'{{i:09d}}', 'x' * 89)"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        asked = toy.request(root, "# Print", code, rng=random.Random(seed), deadline_s=900)
        began = time.monotonic()
        process = toy.start(asked, Path(folder) / "spool")
        peak = 0
        while process.poll() is None:
            try:
                fields = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, int(fields.split("RssAnon:")[1].split()[0]) * 1024)
            except (OSError, IndexError):
                pass
            time.sleep(0.02)
        seconds = time.monotonic() - began
        assert process.returncode == 0, f"exit status {process.returncode}"
        [row] = index.newest(Root.at(str(root)))
        files = {path.name: path for path in (root / row["report"]).iterdir()}
        for name in ("report.ipynb", "report.html", "run.json"):
            assert files[name].stat().st_size < MB, f"{name}: {files[name].stat().st_size / MB:.1f} MB"
        [whole] = [path for name, path in files.items() if name.endswith(".txt")]
        with whole.open() as text:
            numbers = sum(int(line[:9]) == i and len(line) == 100 for i, line in enumerate(text))
        assert numbers == lines and whole.stat().st_size == lines * 100, f"{numbers} of {lines} lines kept"
    assert 0 < peak < 200 * MB, f"runner {peak / MB:.0f} MB"
    return f"{n} MB in {seconds:.0f} s: all {lines:,} lines kept, runner at most {peak / MB:.0f} MB"


def at_once(n: int, seed: int, width: int = 8) -> str:
    """`n` runs, eight at a time: as many reports and rows, and no process of them ever listens on a TCP port."""
    rng, done, ports, looks = random.Random(seed), threading.Event(), set(), 0
    with tempfile.TemporaryDirectory() as folder, toy.spool(folder):
        root = Path(folder) / "root"
        asked = [toy.request(root, f"print({i})", rng=rng) for i in range(n)]

        def watch():
            nonlocal looks
            while not done.wait(0.1):
                looks += 1
                for process in psutil.Process().children(recursive=True):
                    if process.pid in before:  # servers of other tests
                        continue
                    try:
                        ports.update(
                            (c.laddr, process.pid) for c in process.net_connections("tcp") if c.status == "LISTEN"
                        )
                    except psutil.Error:
                        continue

        before = {process.pid for process in psutil.Process().children(recursive=True)}
        thread = threading.Thread(target=watch)
        thread.start()
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(width) as pool:
                records = list(pool.map(toy.execute, asked))
        finally:
            done.set()
            thread.join()
        seconds = time.monotonic() - began
        bad = [f"{record.run_id}: {record.state} {record.reason}" for record in records if record.state != "ok"]
        assert not bad, bad[:5]
        for i, record in enumerate(records):
            nb, _ = toy.report(root, record)
            assert f"{i}\n" in json.dumps(nb.cells).encode().decode("unicode_escape"), f"run {i}"
        rows = {row["run_id"] for row in index.newest(Root.at(str(root)), limit=n + 1)}
        assert rows == {one.run_id for one in asked}, f"{len(rows)} rows"
    assert not ports, f"listening: {sorted(ports)[:3]}"
    return f"{n} of {n} reports and rows, {width} at a time, {seconds / n:.2f} s a run; no TCP port in {looks} looks"
