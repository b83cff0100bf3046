"""Processes that die while they change the lake: at every named point, at random, and two at a time."""

import random
import tempfile
import time
from pathlib import Path

from faults.lake_world import NotHeld, World, points, was_killed


def _to_preprocess(world: World) -> None:
    world.land(3, small_tables=True)


def _to_compact(world: World) -> None:
    for ticks in (1, 2, 1):
        world.land(ticks, small_tables=True)
        world.run_well("preprocess")


def at_every_point(n: int, seed: int, mutant: str | None = None) -> str:
    """Killed at a named point, read, run again: the first time a point is come to and the last, in n equal worlds."""
    return _at_points("preprocess", _to_preprocess, n, seed, mutant)


def at_commits(n: int, seed: int, mutant: str | None = None) -> str:
    """As `at_every_point`, only around the commits to the tables."""
    return _at_points("preprocess", _to_preprocess, n, seed, mutant, only=" the commit")


def at_every_point_of_compact(n: int, seed: int, mutant: str | None = None) -> str:
    return _at_points("compact", _to_compact, n, seed, mutant)


def _at_points(stage: str, prepare, n: int, seed: int, mutant: str | None, only: str = "") -> str:
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        prepared = World(Path(folder) / "prepared", seed, bad=0.2)
        prepare(prepared)
        found = [point for point in points(prepared.copied(Path(folder) / "points"), stage) if only in point]
        by_name: dict[str, list[str]] = {}
        for point in found:
            by_name.setdefault(point.rpartition("@")[0], []).append(point)
        wanted = sorted({every[i] for every in by_name.values() for i in (0, -1)}, key=found.index)
        pick = random.Random(seed)
        chosen = wanted[:n] if n >= len(wanted) else pick.sample(wanted, n)
        chosen += pick.choices(found, k=n - len(chosen))
        killed = 0
        for i, point in enumerate(chosen):
            world = prepared.copied(Path(folder) / str(i))
            try:
                with world.read_meanwhile():
                    killed += was_killed(world.run(stage, crash_at=point, mutant=mutant))
                    world.verify(everything=False)
                    world.run_well(stage, mutant=mutant)
                    world.run_well("preprocess", mutant=mutant)
                world.verify()
            except NotHeld as error:
                raise NotHeld(f"after a crash at {point!r}: {error}") from None
            world.remove()
        if killed < len(chosen):
            raise NotHeld(f"only {killed} of {len(chosen)} were killed")
    return f"{killed} killed, at {len({point.rpartition('@')[0] for point in chosen})} of {len(by_name)} named points"


def at_random(n: int, seed: int, mutant: str | None = None) -> str:
    """n runs of preprocess killed after a random time, while files keep coming and a reader reads."""
    return _at_random("preprocess", n, seed, mutant)


def at_random_compact(n: int, seed: int, mutant: str | None = None) -> str:
    return _at_random("compact", n, seed, mutant)


def _at_random(stage: str, n: int, seed: int, mutant: str | None) -> str:
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        world.land(2, small_tables=True)
        began = time.monotonic()
        world.run_well("preprocess", mutant)
        longest, killed, begun = 1.2 * (time.monotonic() - began), 0, 0
        with world.read_meanwhile():
            while killed < n and begun < 10 * n + 20:
                begun += 1
                world.land(pick.choice([1, 1, 2]))
                if stage == "compact":
                    world.run_well("preprocess", mutant)
                child = world.process(stage, mutant=mutant)
                time.sleep(pick.uniform(0, longest))
                child.kill()
                child.join()
                in_time = was_killed(child.exitcode)
                killed += in_time
                longest *= 1.1 if in_time else 0.7  # how long a run takes changes with the machine's load
                if begun % 25 == 0:
                    world.run_well("preprocess", mutant)
                    world.verify()
            world.run_well(stage, mutant)
            world.run_well("preprocess", mutant)
        world.verify()
        if killed < n:
            raise NotHeld(f"only {killed} of {begun} were killed before their end")
        return f"{killed} of {begun} killed before their end, {world.next_tick} ticks exact, {world.reads} reads"


def overlapping(n: int, seed: int, mutant: str | None = None) -> str:
    """n times two of preprocess and two of compact at once."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        world.land(2, small_tables=True)
        world.run_well("preprocess", mutant)
        gave_way = 0
        with world.read_meanwhile():
            for _ in range(n):
                world.land(pick.choice([1, 2]))
                both = [world.process(stage, mutant=mutant) for stage in ("preprocess", "compact") * 2]
                for child in both:
                    child.join(120)
                statuses = [child.exitcode for child in both]
                if set(statuses) - {0, 3}:
                    raise NotHeld(f"of four at once one ended with {statuses}: {world.log()}")
                gave_way += statuses.count(3)
                world.run_well("preprocess", mutant)
                world.verify()
        return f"{n} times two of each at once: {world.next_tick} ticks exact, {gave_way} gave way, {world.reads} reads"
