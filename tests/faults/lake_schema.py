"""Tables whose declaration changes while rows come and readers look: by calls, and under `up` with real kernels.

The function takes how many batches and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import itertools
import json
import random
import signal
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from faults import toy
from test_up import Up, get

from etl.lake import Lake, NothingPublished
from etl.runs import index
from etl.scaffold import projects
from etl.storage import PROJECT, Root

MODULE = """import polars as pl

from etl.lake.table import INT, INT32, TEXT, Column, Table, decimal

_ALL = [
    Table("item", {{{columns}}}, key=("id",)),
    Table("other", {{"id": INT}}, key=("id",)),
]

TABLES = {{table.name: table for table in _ALL}}
"""
COLOUR, NAME = '"colour": Column(TEXT, nullable=True)', '"name": Column(TEXT, nullable=True)'
CHANGES = {  # what happens to the table -> its columns then
    "begins": '"id": INT32, "name": TEXT, "size": pl.Int8',
    "widened": '"id": INT32, "name": TEXT, "size": pl.Int16',
    "added": f'"id": INT32, "name": TEXT, "size": pl.Int16, {COLOUR}',
    "removed": f'"id": INT, "size": pl.Int16, {COLOUR}',
    "default": f'"id": INT, "size": INT32, {COLOUR}, "price": Column(decimal(5, 2), default=1)',
    "again": f'"id": INT, "size": INT, "price": Column(decimal(9, 4), default=1), {NAME}',
    "refused": f'"id": TEXT, "size": INT, "price": Column(decimal(9, 4), default=1), {NAME}',
    "retyped": f'"id": INT, "size": Column(decimal(20, 0), nullable=True), "price": decimal(9, 4), {NAME}',
}
QUESTION = '''"""How many items?"""

import narwhals as nw

TABLES = {"item": ["id"]}


def answer(item):
    return item.select(rows=nw.col("id").count())
'''
FAST = """root: outputs
machine: null
dask: null
stages:
  preprocess:
    every: 5 seconds
    parameters: {max_files: 2}
  compact:
    every: 20 seconds
    parameters: {min_small_files: 4}
  query:
    every: 15 seconds
"""
ROWS = 3  # of a batch in each table
CALLED = 50  # batches: fewer are ingested by calls, more by `up`


def under_way(n: int, seed: int) -> str:
    """`n` batches, eight declarations, one of them refused; readers of the oldest and the newest one, and the API."""
    with tempfile.TemporaryDirectory() as folder:
        root = Root.at(f"{folder}/root")
        readers = Readers([lambda kind=kind: _read(lake_of(root, kind)) for kind in ("begins", "retyped")])
        try:
            told = (_by_calls if n < CALLED else _by_up)(
                root, Path(folder) / "project", n, random.Random(seed), readers
            )
        finally:
            readers.end()
        _verify(lake_of(root, "retyped"), n)
    return f"{n} batches, {len(CHANGES)} declarations: every row there, {readers.reads:,} reads without an error{told}"


def lake_of(root: Root, kind: str) -> Lake:
    scope: dict = {}
    exec(MODULE.format(columns=CHANGES[kind]), scope)
    return type("Changing", (Lake,), {"tables": scope["TABLES"]})(root)


class Readers:
    """Threads that read until the end; each call of a reader says how many rows it saw, which are never fewer."""

    def __init__(self, readers: list[Callable[[], int]]):
        self.reads, self.wrong, self._stop = 0, [], threading.Event()
        self._threads: list[threading.Thread] = []
        for reader in readers:
            self.add(reader)

    def add(self, reader: Callable[[], int]) -> None:
        self._threads.append(threading.Thread(target=self._go_on, args=(reader,), daemon=True))
        self._threads[-1].start()

    def _go_on(self, reader: Callable[[], int]) -> None:
        seen = 0
        while not self._stop.is_set():
            try:
                rows = reader()
                assert rows >= seen, f"{rows} rows, and {seen} before"
                seen, self.reads = rows, self.reads + 1
            except Exception as error:
                self.wrong.append(error)
                return
            self._stop.wait(0.05)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not self.wrong, f"a reader failed: {self.wrong[0]!r}"


def _read(lake: Lake) -> int:
    """The rows of what is published: the first of all, each once, in both tables."""
    try:
        snapshot = lake.snapshot()
    except NothingPublished:
        return 0
    rows = 0
    for table in ("item", "other"):
        ids = sorted(snapshot.frame(table, ["id"]).collect()["id"].cast(int))
        assert ids == list(range(len(ids))), f"rows of {table} are missing, or there twice"
        rows += len(ids)
    snapshot.frame("item").collect()
    return rows


def _land(root: Root, batch: int) -> None:
    ids = range(ROWS * batch, ROWS * (batch + 1))
    rows = [{"id": n, "name": f"n{n}", "size": n % ROWS, "price": n % ROWS, "colour": "red"} for n in ids]
    for table, made in (("item", rows), ("other", [{"id": n} for n in ids])):
        data = "".join(json.dumps(row) + "\n" for row in made)
        root.write(f"landing/{table}/{batch:06d}.json", data.encode())


def _phases(n: int) -> list[tuple[str, range]]:
    """Each declaration with its batches."""
    bounds = [n * step // len(CHANGES) for step in range(len(CHANGES) + 1)]
    return [(kind, range(first, last)) for kind, (first, last) in zip(CHANGES, itertools.pairwise(bounds), strict=True)]


def _by_calls(root: Root, _: Path, n: int, rng: random.Random, readers: Readers) -> str:
    for kind, batches in _phases(n):
        lake = lake_of(root, kind)
        for batch in batches:
            _land(root, batch)
            ask = {"max_files": 2, "max_bytes": 10**6, "max_bad_share": 0.0, "for_s": 60, "scheduled_for": None}
            lake.drain(**ask, run_id=f"r{batch}")
            assert bool(lake.blocked()) == (kind == "refused")
            if kind != "refused" and rng.random() < 0.2:
                lake.compact(target_mb=64, min_small_files=3, vacuum_hours=24, run_id="c")
    return ""


def _by_up(root: Root, project: Path, n: int, rng: random.Random, readers: Readers) -> str:
    projects.add(PROJECT, project)
    (project / "pipeline/queries/items.py").write_text(QUESTION)
    (project / "params/env/fast.yml").write_text(FAST)
    (project / "params/env/local.yml").write_text(FAST)
    _declare(project, "begins")
    up = Up(project, Path(root.url), "--live")  # a declaration is followed from the next run on
    try:
        toy.until(lambda: b"stages are on" in up.log.read_bytes(), 300, "the schedules")
        _land(root, 0)
        toy.until(lambda: _read(lake_of(root, "begins")) == 2 * ROWS, 120, "a batch")
        readers.add(lambda: _asked(up.api))
        for kind, batches in _phases(n):
            _declare(project, kind)
            for batch in batches[kind == "begins" :]:
                _land(root, batch)
                time.sleep(rng.uniform(0.2, 0.6))
            goal = 2 * ROWS * batches.stop if kind != "refused" else ROWS * (batches.start + batches.stop)
            toy.until(
                lambda goal=goal: readers.wrong or _read(lake_of(root, "begins")) >= goal, 240, f"{kind}: {goal} rows"
            )
            assert not readers.wrong, readers.wrong
        readers.end()  # before the API goes
        up.end(signal.SIGINT)
    except BaseException:
        print(up.log.read_text()[-3000:])
        raise
    finally:
        up.process.kill()
        up.process.wait()
    runs = index.newest(root, limit=1000)
    states = Counter((run["stage"], run["state"]) for run in runs)
    wrong = [run["reason"] for run in runs if run["state"] in ("failed", "killed")]
    assert not wrong, wrong[:3]
    assert states["preprocess", "check_failed"] and not any(run["attempt"] > 1 for run in runs), states
    return "; " + ", ".join(f"{stage} {state} {count}" for (stage, state), count in sorted(states.items()))


def _declare(project: Path, kind: str) -> None:
    """In one step, as an editor saves a file."""
    text = MODULE.format(columns=CHANGES[kind])
    Root.at(project).write("pipeline/tables.py", text.encode())


def _asked(port: int) -> int:
    """What the API says is published, and of how many rows it has the answer; 0 before there is one."""
    assert json.loads(get(f"http://127.0.0.1:{port}/ready"))["ready"]
    try:
        return json.loads(get(f"http://127.0.0.1:{port}/results/items"))["rows"][0]["rows"]
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return 0


def _verify(lake: Lake, n: int) -> None:
    """All rows, with the values that they came with or that they were given."""
    assert _read(lake) == 2 * ROWS * n
    frame = lake.snapshot().frame("item", ["id", "size", "price", "name", "colour"]).collect().sort("id")
    assert [int(size) for size in frame["size"]] == [number % ROWS for number in range(ROWS * n)]
    of = dict(_phases(n))
    known = [
        ROWS * batch + row for kind in ("default", "again", "retyped") for batch in of[kind] for row in range(ROWS)
    ]
    assert [int(price) for price in frame["price"][known]] == [number % ROWS for number in known]
    before = ROWS * of["removed"].start
    assert [int(price) for price in frame["price"][:before]] == [1] * before
    assert frame["name"][:before].to_list() == [f"n{number}" for number in range(before)]
    assert not [finding for finding in lake.examine() if finding.problem]
