"""Writers that are stopped and go on when others have written, rebuilds that die, others who write into our tables."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from deltalake import DeltaTable
from faults.lake_crashes import _to_compact, _to_preprocess
from faults.lake_s3 import bucket
from faults.lake_world import NotHeld, World, points, was_killed
from support import s3_variables

from etl.storage import Root
from pipeline import Lake

SWITCH = {
    *("made again, not switched", "switched", "what was before is beside", "some of it is there"),
    *("what was before is gone", "switched and moved"),
}
CLOCKS = ("quick leases, clock ahead", "quick leases, clock behind")


def stopped(n: int, seed: int) -> str:
    """n holders in an object store, stopped at a named point of their run, taken over by machines whose clocks are ten
    minutes off, and continued; every line is there exactly once."""
    pick, lost = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, bucket() as (proxy, url):
        chosen: list[tuple[str, str]] = []
        for stage, prepare in (("preprocess", _to_preprocess), ("compact", _to_compact)):
            world = _on_s3(Path(folder, stage), seed, proxy, f"{url}/{stage}")
            prepare(world)
            chosen += [(stage, point) for point in dict.fromkeys(p.rpartition("@")[0] for p in points(world, stage))]
        pick.shuffle(chosen)
        for number, (stage, point) in enumerate(itertools.islice(itertools.cycle(chosen), n)):
            world = _on_s3(Path(folder, str(number)), seed + number, proxy, f"{url}/{number}")
            (_to_preprocess if stage == "preprocess" else _to_compact)(world)
            clocks = pick.sample(CLOCKS, 2)
            holder = world.process(stage, crash_at=f"={point}@1", mutant=clocks[0])
            try:
                if not _is_stopped(holder):
                    raise NotHeld(f"{stage} did not stop at {point!r}")
                world.land(1)
                first = ["preprocess"] if stage == "preprocess" else []  # before it nothing may be there to rebuild
                takers = [["preprocess"], ["preprocess", "compact"], [*first, "rebuild", "preprocess"]]
                for other in pick.choice(takers):
                    world.run_well(other, mutant=clocks[1])
                world.verify(everything=False)
                os.kill(holder.pid, signal.SIGCONT)
                holder.join(120)
                lost += holder.exitcode == 3
                if holder.exitcode not in (0, 1, 3):
                    raise NotHeld(f"it ended with {holder.exitcode}")
                world.run_well("preprocess", mutant=clocks[1])
                world.verify()
            except NotHeld as error:
                raise NotHeld(f"{stage}, stopped at {point!r}: {error}: {world.log()}") from None
            finally:
                holder.kill()
            world.remove()
        at = f"at {min(n, len(chosen))} of {len(chosen)} points"
        return f"{n} stopped and continued, {at}; {lost} said that they were taken over"


def _on_s3(folder: Path, seed: int, proxy, root: str) -> World:
    world = World(folder, seed, bad=0.1)
    world.root, world.environment = root, s3_variables(proxy.url)
    return world


def _is_stopped(process) -> bool:
    for _ in range(1200):
        if process.exitcode is not None:
            return False
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return True
        time.sleep(0.05)
    return False


def rebuilds_killed(n: int, seed: int) -> str:
    """n rebuilds killed, at each named point and at random times; the next run goes on, and every line is there."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        prepared = World(Path(folder, "prepared"), seed, bad=0.1)
        _to_compact(prepared)
        began = time.monotonic()
        found = points(prepared.copied(Path(folder, "points")), "rebuild")
        took = time.monotonic() - began
        last = [*{point.rpartition("@")[0]: point for point in found}.values()]
        pick.shuffle(last)
        late = [point for point in found if point.rpartition("@")[0] in SWITCH]
        ways = [*late, *last] if n > len(late) else pick.sample(late, n)
        ways += [None] * (n - len(ways)) if n > len(ways) else []  # at a random time
        for number, point in enumerate(ways[:n]):
            world = prepared.copied(Path(folder, str(number)))
            world.land(1)
            try:
                child = world.process("rebuild", crash_at=point)
                child.join(120 if point else pick.uniform(0, 1.2 * took))
                child.kill()
                child.join()
                if point and not was_killed(child.exitcode):
                    raise NotHeld(f"it ended with {child.exitcode}")
                world.verify(everything=False)
                for stage in pick.choice([["preprocess"], ["compact", "preprocess"], ["rebuild", "preprocess"]]):
                    world.run_well(stage)
                world.verify()
            except NotHeld as error:
                raise NotHeld(f"rebuild, killed at {point or 'a random time'}: {error}: {world.log()}") from None
            world.remove()
        return f"{n} rebuilds killed, at {len(late)} points once the lake was made; each time all lines were there"


def storms(n: int, seed: int) -> str:
    """n times rebuild, preprocess and compact at once."""
    pick, gave_way = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        for _ in range(n):
            world.land(pick.choice([1, 2]))
            children = {stage: world.process(stage) for stage in ("rebuild", "preprocess", "compact")}
            for stage, child in children.items():
                child.join(180)
                # a compaction may find that the files it reads have gone beside with the lake of before
                if child.exitcode not in ((0, 1, 3) if stage == "compact" else (0, 3)):
                    raise NotHeld(f"of three at once {stage} ended with {child.exitcode}: {world.log()}")
                gave_way += child.exitcode == 3
            world.run_well("preprocess")
            world.verify()
            for name in Root.at(world.root).names(""):
                if name.startswith("lake-before-"):
                    Root.at(world.root).remove_tree(name)
        return f"{n} times three at once: {world.next_tick} ticks exact, {gave_way} gave way"


def foreign(n: int, seed: int) -> str:
    """n times others append, optimize, vacuum, restore, clean the log, while we pause or a batch is half in."""
    pick, missed = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        for number in range(n):
            world.land(1)
            if pick.random() < 0.3:
                world.run("preprocess", crash_at=pick.choice(["after the commit: orders", "before it is published"]))
            else:
                world.run_well("preprocess")
                world.land(1)
            what, table = list(THEIRS)[number % len(THEIRS)], pick.choice(["orders", "lineitem"])
            path = f"{world.root}/lake/{table}"
            before = DeltaTable(path).version()
            THEIRS[what](path)
            if "took rows of ours away" in Lake(world.root).blocked():
                missed += 1
                if pick.random() < 0.5:
                    DeltaTable(path).restore(before)
                else:
                    world.run_well("rebuild")
            world.run_well(pick.choice(["preprocess", "compact"]))
            world.run_well("preprocess")
            world.verify()
        return f"{n} times, {missed} times rows were taken, and missed; {world.next_tick} ticks exact"


def _optimized(path: str) -> None:
    DeltaTable(path).optimize.compact()


def _vacuumed(path: str) -> None:
    _optimized(path)
    DeltaTable(path).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)


def _restored(path: str) -> None:
    handle = DeltaTable(path)
    first = min(int(file.stem) for file in Path(path, "_delta_log").glob("*.json"))
    handle.restore(max(first, handle.version() - 2))


def _cleaned(path: str) -> None:
    _optimized(path)
    DeltaTable(path).create_checkpoint()
    for file in Path(path, "_delta_log").glob("*.json"):
        if int(file.stem) < DeltaTable(path).version():
            file.unlink()


def _added_and_taken(path: str) -> None:
    """Rows of theirs, which they take away again."""
    import pyarrow as pa
    from deltalake import write_deltalake

    handle, version = DeltaTable(path), DeltaTable(path).version()
    schema = pa.schema(handle.schema().to_arrow())
    write_deltalake(handle, schema.empty_table(), mode="append")
    DeltaTable(path).restore(version)


THEIRS = {
    "optimize": _optimized,
    "vacuum": _vacuumed,
    "restore": _restored,
    "clean": _cleaned,
    "append": _added_and_taken,
}


def pointers(n: int, seed: int) -> str:
    """n pointers that are one to five batches older than the tables."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        pointer = Path(world.root, "lake/published.json")
        for number in range(n):
            shutil.copy(pointer, Path(folder, "copy.json"))
            for _ in range(number % 5 + 1):
                world.land(1)
                world.run_well("preprocess")
                if pick.random() < 0.4:
                    world.run_well("compact")
            if pick.random() < 0.3:
                world.land(1)
                world.run("preprocess", crash_at="after the commit: orders")
            shutil.move(Path(folder, "copy.json"), pointer)
            world.land(1)
            world.run_well("preprocess")
            world.verify()
        return f"{n} pointers copied back, {world.next_tick} ticks exact"


def pairs(n: int, seed: int) -> str:
    """n pairs of a named point of preprocess and one of compact: killed at the one, then at the other."""
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        prepared = World(Path(folder, "prepared"), seed, bad=0.1)
        _to_compact(prepared)
        prepared.land(1)
        both = []
        for stage in ("preprocess", "compact"):
            found = points(prepared.copied(Path(folder, stage)), stage)
            both.append([*dict.fromkeys(point.rpartition("@")[0] for point in found)])
        every = [*itertools.product(*both)]
        random.Random(seed).shuffle(every)
        for first, second in every[:n]:
            world = prepared.copied(Path(folder, "now"))
            try:
                world.run("preprocess", crash_at=first)
                world.run("compact", crash_at=second)
                world.run_well("preprocess")
                world.run_well("compact")
                world.verify()
            except NotHeld as error:
                raise NotHeld(f"after {first!r}, then {second!r}: {error}") from None
            world.remove()
        return f"{min(n, len(every))} of {len(every)} pairs: each time all lines were there"
