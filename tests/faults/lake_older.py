"""Lakes that earlier versions of this project wrote, each with its own code: they open, go on and compact.

The code comes from the project's own history. Of a copy without it nothing can be tried, and the scenario says so.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from faults.lake_world import NotHeld, World, was_killed

from etl.storage import PROJECT, Root
from pipeline import Lake, queries

VERSIONS = {
    "1a5ce4c": "files known by numbers, a copy of each document",
    "207c328": "the log's commits twice",
    "86f2126": "one of each again",
    "d7cbc20": "a ledger, no fence",
}
# what a run of preprocess or compact was, by whatever names the code of then has it
STAGE = """
import importlib, sys

def module(name):
    for package in ("pipeline", "etl.lake"):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError:
            continue

stage, lake = sys.argv[1:]
try:
    from pipeline import Lake as made
    lake = made(lake)
except ImportError:
    pass
if stage == "preprocess":
    ingest = module("ingest")
    while batch := ingest.next_batch(lake, max_files=500, scheduled_for="2026-03-01T12:00:10+00:00"):
        ingest.commit(ingest.read(batch), run_id="older")
else:
    module("compaction").compact(lake, target_mb=64, min_small_files=2, vacuum_hours=24, run_id="older")
"""


def older(n: int, seed: int) -> str:
    """Lakes of n versions, each also with a batch that was half in when the newer code came."""
    told = []
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        for version, what in [*VERSIONS.items()][:n]:
            code = Path(folder, version)
            if not _checked_out(version, code):
                return f"not provoked: this copy of the project has no version {version} in its history"
            try:
                told.append(f"{version} ({what}): {_continued(World(Path(folder, f'of-{version}'), seed), code)}")
            except NotHeld as error:
                raise NotHeld(f"a lake of {version}, {what}: {error}") from None
    return "; ".join(told)


def _checked_out(version: str, folder: Path) -> bool:
    done = subprocess.run(["git", "archive", version], cwd=PROJECT, capture_output=True)
    if done.returncode:
        return False
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")
    return True


def _continued(world: World, code: Path) -> str:
    """What is there after the present code went on with a lake of another's."""
    world.bad = 0  # which lines are rows, and which go to quarantine, was another question then
    for ticks in (1, 2, 1):
        world.land(ticks, small_tables=True)
        _then(world, code, "preprocess")
    _then(world, code, "compact")
    world.land(1)
    halved = was_killed(_then(world, code, "preprocess", crash_at="after the commit: orders"))
    before = Lake(world.root).snapshot()
    rows = {table: before.row_count(table) for table in ("orders", "lineitem", "part")}
    world.run_well("preprocess")
    world.verify()
    world.bad = 0.1
    again = Root.at(world.root)
    again.write("landing/orders/orders-00000000.json", again.read(_archived(again, "orders-00000000.json")))
    world.land(2)
    world.run_well("preprocess")
    world.run_well("compact")
    world.verify()
    world.land(1)
    world.run_well("preprocess")
    world.verify()
    lake = Lake(world.root)
    if wrong := [finding for finding in lake.examine() if finding.problem]:
        raise NotHeld(f"doctor finds {wrong[0]}")
    if wrong := [a.problem for a in queries.ask_all(queries.questions(), lake.snapshot()) if a.problem]:
        raise NotHeld(f"a question has no answer: {wrong[0]}")
    world.run_well("rebuild")
    world.verify()
    told = f"{rows['orders']} orders{', a batch half in' * halved}"
    return f"{told}, {Lake(world.root).snapshot().row_count('orders')} at the end"


def _archived(root: Root, name: str) -> str:
    return next(rel for rel in root.files("archive") if rel.endswith(name))


def _then(world: World, code: Path, stage: str, crash_at: str = "") -> int:
    """A stage by the code of then; its exit status."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
    variables |= {"PYTHONPATH": str(code), "ETL_PROJECT": str(code)} | ({"ETL_CRASH_AT": crash_at} if crash_at else {})
    command = [sys.executable, "-c", STAGE, stage, world.root]
    done = subprocess.run(command, cwd=code, env=variables, capture_output=True, text=True, timeout=300)
    if done.returncode and not crash_at:
        raise NotHeld(f"its own {stage} ended with {done.returncode}: {done.stderr[-400:]}")
    return done.returncode
