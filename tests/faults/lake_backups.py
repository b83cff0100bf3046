"""Copies of a lake that are made while batches and compactions go on: by `backup`, and file by file in an order."""

import random
import shutil
import tempfile
import time
from pathlib import Path

from faults.lake_world import NotHeld, World, stage, was_killed

from etl.lake import backup
from etl.storage import Root
from pipeline import Lake

AFRESH = 20  # copies until a lake is begun anew


def backups(n: int, seed: int) -> str:
    """n copies of a root in which preprocess and compact run: each is continued, and has every row once.

    Every third is files copied in the order that docs/operations.md names; one in four of the others is killed first.
    """
    pick, killed, restored, rows = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        for number in range(n):
            if number % AFRESH == 0:
                world = World(Path(folder) / f"{number} é", seed + number)
                world.land(2, small_tables=True)
                stage("preprocess", world.root)
            world.land(pick.choice([1, 2, 3]))
            writers = [world.process(name) for name in ("preprocess", "compact")]
            if number % 3 == 2:
                time.sleep(pick.uniform(0, 0.3))
                copy = Path(f"{world.root}-copied")
                shutil.rmtree(copy, ignore_errors=True)
                copy_in_order(Path(world.root), copy)
            else:
                copying = world.process("backup")
                if number % 4 == 1:
                    time.sleep(pick.uniform(0.1, 0.6))
                    copying.kill()
                copying.join(120)
                killed += was_killed(copying.exitcode)
                if was_killed(copying.exitcode):
                    world.run_well("backup")
                elif copying.exitcode:
                    raise NotHeld(f"a backup ended with {copying.exitcode}: {world.log()}")
            for writer in writers:
                writer.join(120)
                if writer.exitcode not in (0, 3):
                    raise NotHeld(f"beside a backup a writer ended with {writer.exitcode}: {world.log()}")
            stage("preprocess", world.root)
            rows += _continued(world, number, copied=number % 3 == 2)
            restored += 1
        return f"{restored} continued with every row once, {rows} rows in all; {killed} backups killed before"


def _continued(world: World, number: int, copied: bool) -> int:
    """Restore the newest copy, give it what came since, and let it go on; how many rows it has."""
    again = world.copied(Path(f"{world.folder}-again"))
    shutil.rmtree(again.root)
    if copied:
        shutil.copytree(f"{world.root}-copied", again.root)
    else:
        target = Root.at(f"{world.root}-backup")
        point, _ = Lake(again.root).restore(target)
        if point != backup.points(target)[-1]:
            raise NotHeld(f"copy {number}: {point} was restored")
        batch = Lake(again.root).snapshot().batch
        if batch != point.batch:
            raise NotHeld(f"copy {number}: batch {batch} is published, not {point.batch}")
    root = Root.at(world.root)
    for path, _ in root.tree("archive"):  # what is known is told from what is new
        below = path.partition("/")[2]
        if not below.startswith(".") and not Root.at(again.root).exists(f"landing/{below}"):
            Root.at(again.root).write(f"landing/{below}", root.read(f"archive/{path}"))
    stage("preprocess", again.root)
    stage("compact", again.root)
    if wrong := [finding for finding in Lake(again.root).examine() if finding.problem]:
        raise NotHeld(f"copy {number}: {wrong[0]}")
    again.verify()
    snapshot = Lake(again.root).snapshot()
    rows = sum(snapshot.row_count(table) for table in snapshot.versions)
    again.remove()
    return rows


def copy_in_order(source: Path, target: Path) -> None:
    """What `cp` has to do of a root in use: each step copies what the one before it names."""
    tables = [log.parent.name for log in source.glob("lake/*/_delta_log")]
    _copy(source, target, [source / "lake/published.json"])
    for table in tables:
        _copy(source, target, sorted(source.glob(f"lake/{table}/_delta_log/*")))
    for table in tables:
        _copy(source, target, sorted(source.glob(f"lake/{table}/*.parquet")))
    _copy(source, target, sorted(source.glob("lake/batches/*")))
    _copy(source, target, sorted(source.glob("lake/known/*")))
    for folder in ("landing", "archive"):
        _copy(source, target, sorted(path for path in source.glob(f"{folder}/**/*") if path.is_file()))


def _copy(source: Path, target: Path, paths: list[Path]) -> None:
    for path in paths:
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(path, to)
        except FileNotFoundError:
            continue  # moved on meanwhile
