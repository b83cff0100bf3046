"""The power goes while the lake is written, the index of runs, or a model: then everything runs again by itself."""

import contextlib
import functools
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from faults import disk, lake_world, toy
from faults.lake_world import AT, MONEY, NotHeld, World, processes

from etl.lake import ingest
from etl.models import registry
from etl.runs import delivery, index, upkeep
from etl.storage import PROJECT, Root
from pipeline import Lake, model

POINTER = "lake/published.json"
AGE = timedelta(hours=30)  # of what compaction removes
DIES_AT = [
    *(f"there, its name not synced: in {folder}" for folder in ("lake/batches", "lake/lineitem/_delta_log", "lake")),
    *("after the commit: orders", "before it is published", "after the archive: orders", "before it is marked done"),
]


def tick(root: str, files: int = 2) -> None:
    """One run of preprocess for one tick: a batch is a tick here, so its number tells which rows must be there."""
    batch = Lake(root).next_batch(max_files=files, scheduled_for=AT)
    ingest.commit(ingest.read(batch), run_id=f"preprocess-{os.getpid()}")


def compact(root: str, now: datetime | None = None) -> None:
    done = Lake(root).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact-1", now=now)
    if failed := done["failed"].drop_nulls().to_list():
        raise NotHeld(f"compact: {failed}")


# --- what is lived through: prepared first, then traced ---


def _prepare_first(world: World) -> None:
    world.land(3, small_tables=True)


def _live_first(folder: Path) -> None:
    """The tables are made, and two batches more."""
    for files in (8, 2, 2):
        tick(f"{folder}/root", files)


def _prepare_ticks(world: World) -> None:
    _grow(world, 17)
    world.land(5)


def _live_ticks(folder: Path) -> None:
    """Among five batches there is one whose version has a checkpoint."""
    for _ in range(4):
        tick(f"{folder}/root")


def _prepare_compact(world: World) -> None:
    """Compacted once, thirty hours ago; the log is as old, and the next version has a checkpoint."""
    _grow(world, 10)
    compact(world.root, datetime.now(UTC) - AGE)
    _grow(world, 7)
    before = time.time() - AGE.total_seconds()
    for path in Path(world.root, "lake").glob("*/_delta_log/*"):
        if path.suffix == ".json":
            path.write_text(re.sub(r'"timestamp": ?\d+', f'"timestamp":{before * 1000:.0f}', path.read_text(), count=1))
        os.utime(path, (before, before))
    world.land(3)


def _live_compact(folder: Path) -> None:
    """A batch with a checkpoint, a compaction that also removes files and old commits, a batch, a compaction."""
    for _ in range(2):
        tick(f"{folder}/root")
        compact(f"{folder}/root")


def _prepare_killed(world: World) -> None:
    _grow(world, 2)
    world.land(len(DIES_AT) + 1)


def _live_killed(folder: Path) -> None:
    """Runs that are killed, each followed by one that ends what it left."""
    for point in DIES_AT:
        child = processes.Process(target=_die, args=(f"{folder}/root", point))
        child.start()
        child.join(60)
        if not lake_world.was_killed(child.exitcode):
            raise NotHeld(f"preprocess did not come to {point!r}: {child.exitcode}")
        tick(f"{folder}/root")


def _die(root: str, point: str) -> None:
    os.environ["ETL_CRASH_AT"] = point
    tick(root)


def _grow(world: World, ticks: int) -> None:
    for _ in range(ticks):
        first = world.next_tick == 0
        world.land(1, small_tables=first)
        tick(world.root, 8 if first else 2)


def _prepare_report(world: World) -> None:
    """An index whose next versions have a checkpoint."""
    for record in _ended()[:17]:
        index.append(Root.at(world.root), record)


@functools.cache
def _ended() -> list:
    """Records of runs that were before."""
    from faults import synthetic

    return synthetic.month(1, days=1)[:18]


CELLS = ("# A run", "print('some text')", "for _ in range(30_000): print('some more text')")


def _live_report(folder: Path) -> None:
    """Runs of a notebook, with a file beside the report, and a compaction of the index; a mark when all of a run is
    where it belongs."""
    os.environ["ETL_SPOOL"] = str(folder / "root" / "spool")
    for number in range(3):
        record = toy.run(folder / "root", *CELLS)
        delivery.settle()
        if number == 1:
            upkeep.tidy(Root.at(folder / "root"))
        Path(folder, "root", "marks", record.run_id).touch()


def _prepare_model(world: World) -> None:
    """Nothing: the first model is published."""


def _live_model(folder: Path) -> None:
    rows = lake_world.real()[0]["lineitem"]
    for trees in (2, 3):
        training, validation, held_out = model.parted([rows], rows.height)
        booster = model.train(training, validation, max_trees=trees)
        model.publish(Root.at(f"{folder}/root"), booster, {"trees": trees}, held_out, f"train-{trees}")


# --- what must hold then ---


class Life(NamedTuple):
    prepare: Callable[[World], None]
    live: Callable[[Path], None]
    check: Callable[["Cut"], None]


@dataclass
class Cut:
    """A root as a cut left it. `given`: what was landed in its time, as from `_given`."""

    root: str
    world: World
    given: dict[str, dict[int, tuple]]
    history: disk.History
    at: int
    pick: random.Random
    young: bool  # no version of the log is older than a day

    def versions_of(self, path: str) -> tuple[int, list[bytes]]:
        """What a file held from the beginning of the history to the cut; how many of it the disk was told to keep."""
        named = [(change, data) for change, data in self.history.named.get(path, []) if change.at <= self.at]
        synced = [i for i, (change, _) in enumerate(named, 1) if change.synced_by and change.synced_by <= self.at]
        before = self.history.base.get(path)
        return max(synced, default=0), [*([before] if before else [b""]), *(data for _, data in named)]


def _lake_holds(cut: Cut) -> None:
    """Readers see whole batches; then preprocess and compact bring every row once, and doctor finds nothing."""
    synced, pointers = cut.versions_of(POINTER)
    pointer = Path(cut.root, POINTER).read_bytes() if Path(cut.root, POINTER).exists() else b""
    if pointer not in pointers[synced:]:
        raise NotHeld(f"the pointer is {pointer!r}, not one of the last {len(pointers) - synced} that were written")
    earlier = pointers[: pointers.index(pointer) + 1] if cut.young else []  # readers may still be on them
    for published in map(json.loads, {pointer, cut.pick.choice(earlier or [pointer])} - {b""}):
        for table in MONEY:
            _assert_whole(cut, table, published["tables"][table], [published["batch"]])
    if pointer:  # who opens the newest version sees one batch more at most
        batch = json.loads(pointer)["batch"]
        for table in MONEY:
            _assert_whole(cut, table, None, [batch, batch + 1])
    now = cut.world
    lake_world.stage("preprocess", cut.root)
    _verified(now, cut.root)
    if cut.pick.random() < 0.3:
        compact(cut.root)
        _verified(now, cut.root)
    given = {path.name for path in Path(now.folder, "given").iterdir()}
    if lost := given - {path.name for path in Path(cut.root, "archive").rglob("*.json")}:
        raise NotHeld(f"{len(lost)} files are not in the archive: {min(lost)}")
    if cut.pick.random() < 0.2 and (wrong := [finding for finding in Lake(cut.root).examine() if finding.problem]):
        raise NotHeld(f"doctor finds {wrong[:2]}")


def _verified(world: World, root: str) -> None:
    world.root, before = root, world.root
    try:
        world.verify()
    finally:
        world.root = before


def _given(world: World) -> dict[str, dict[int, tuple]]:
    """table -> tick -> rows and sum of an amount, from the files that were landed."""
    files = "read_json('{}/given/{}-*.json', format='newline_delimited')"
    return {table: _by_tick(table, files.format(world.folder, table)) for table in MONEY}


def _by_tick(table: str, rows: str) -> dict[int, tuple]:
    key = "o_orderkey" if table == "orders" else "l_orderkey"
    ask = f"select {key} // 1000, count(*), sum({MONEY[table][0]}::decimal(15,2)) from {rows} group by 1"
    return {int(number): (count, total) for number, count, total in lake_world.db().sql(ask).fetchall()}


def _assert_whole(cut: Cut, table: str, version: int | None, batches: Iterable[int]) -> None:
    """A version of a table has the rows of that many batches, read by another engine. The newest when it is None."""
    found = _by_tick(table, f"read_parquet({Lake(Root.at(cut.root)).table(table, version).file_uris()})")
    if found not in [{t: rows for t, rows in cut.given[table].items() if t < batch} for batch in batches]:
        raise NotHeld(f"{table}@{version} has the ticks {sorted(found)}, not those of batches 1 to {batches}")


def _index_holds(cut: Cut) -> None:
    """The index opens, with one row of every run that was through; its report is whole; the next run has its row."""
    root = Root.at(cut.root)
    with _spool(cut.root):
        delivery.reconcile()
        delivery.deliver(root)
    if waiting := [path.parent.name for path in Path(cut.root, "spool").glob("*/journal.jsonl")]:
        raise NotHeld(f"not delivered: {waiting}")
    _assert_index(cut, root)
    index.append(root, _ended()[17])
    upkeep.tidy(root)
    _assert_index(cut, root)
    if not index.indexed(root, _ended()[17].run_id):
        raise NotHeld("the next run has no row")


def _assert_index(cut: Cut, root: Root) -> None:
    rows = index.newest(root, limit=1000)
    ids = [row["run_id"] for row in rows]
    if len(ids) != len(set(ids)):
        raise NotHeld(f"runs twice in the index: {sorted(ids)}")
    marked = [
        c.what.removeprefix("new marks/")
        for c in cut.history.changes
        if c.what.startswith("new marks/") and c.at <= cut.at
    ]
    if missing := {*marked, *(record.run_id for record in _ended()[:17])} - set(ids):
        raise NotHeld(f"not in the index: {missing}")
    for run_id in marked:
        nb, record = toy.report(Path(cut.root), index.get(root, run_id))
        if record["state"] != "ok" or len(nb.cells) < len(CELLS):
            raise NotHeld(f"the report of {run_id} is not what was written")


@contextlib.contextmanager
def _spool(root: str):
    before, os.environ["ETL_SPOOL"] = os.environ.get("ETL_SPOOL"), f"{root}/spool"
    try:
        yield
    finally:
        os.environ.pop("ETL_SPOOL") if before is None else os.environ.update(ETL_SPOOL=before)


def _model_holds(cut: Cut) -> None:
    """The current model loads, and is not older than what was published; the next one is published."""
    synced, pointers = cut.versions_of(registry.ALIASES)
    ids = [json.loads(data)["champion"]["model_id"] if data else None for data in pointers]
    try:
        found = model.load_current(Root.at(cut.root)).model_id
    except model.NoModel:
        found = None
    if found not in ids[synced:]:
        raise NotHeld(f"the model is {found}, not of {ids[synced:]}")


LIVES = {
    "first": Life(_prepare_first, _live_first, _lake_holds),
    "ticks": Life(_prepare_ticks, _live_ticks, _lake_holds),
    "compact": Life(_prepare_compact, _live_compact, _lake_holds),
    "killed": Life(_prepare_killed, _live_killed, _lake_holds),
    "report": Life(_prepare_report, _live_report, _index_holds),
    "model": Life(_prepare_model, _live_model, _model_holds),
}


def power_cuts(n: int, seed: int, mutant: str | None = None, only: tuple[str, ...] = tuple(LIVES)) -> str:
    """The power cut n times, in turn while tables are made, batches come, compaction works, runs are killed, reports
    are delivered, models are published."""
    pick = random.Random(seed)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="power-", dir=memory) as folder:
        try:
            lived = _lived(Path(folder), seed, only, mutant)
        except PermissionError as error:
            return f"not provoked: {error}"
        began = time.monotonic()
        for life in itertools.islice(itertools.cycle(only), n):
            world, given, history = lived[life]
            at, what, tree = history.cut(pick)
            disk.lay_out(tree, Path(folder, "now"))
            cut = Cut(f"{folder}/now", world, given, history, at, pick, young=life != "compact")
            try:
                LIVES[life].check(cut)
            except Exception as error:
                raise NotHeld(f"{life}: {type(error).__name__}: {error}; {what}"[:3000]) from error
        changes = sum(len(history.changes) for *_, history in lived.values())
        return f"{n} cuts, {n / (time.monotonic() - began):.1f} a second, in {changes} changes of {', '.join(only)}"


def of(life: str) -> Callable[..., str]:
    """The cuts of one life."""
    return lambda n, seed, mutant=None: power_cuts(n, seed, mutant, (life,))


def _lived(folder: Path, seed: int, only: tuple[str, ...], mutant: str | None) -> dict:
    """By life: its world, what was landed in it, its history."""
    bases, worlds = {}, {}
    for life in only:
        worlds[life] = world = World(folder / life, seed)
        Path(world.root, "marks").mkdir(parents=True)
        LIVES[life].prepare(world)
        bases[life] = disk.read_tree(Path(world.root))
    code = f"from faults import power_cuts\npower_cuts.live({str(folder)!r}, {only!r}, {mutant!r})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)])}
    disk.record([sys.executable, "-c", f"if __name__ == '__main__':\n exec({code!r})"], folder / "trace", env)
    calls = list(disk.calls_of(folder / "trace"))
    return {
        life: (world, _given(world) if world.next_tick else {}, disk.History.of(calls, Path(world.root), bases[life]))
        for life, world in worlds.items()
    }


def live(folder: str, only: tuple[str, ...], mutant: str | None) -> None:
    """What is traced, in a process of its own."""
    if mutant:
        from faults import lake_mutants

        lake_mutants.APPLY[mutant]()
    for life in only:
        LIVES[life].live(Path(folder, life))
