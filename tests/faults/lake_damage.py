"""A disk that is full, a write that fails, and bytes that are not what was written."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from faults.lake_world import NotHeld, World, stage, was_killed

from storage import Root

FAILURES = ["write:error=ENOSPC", "write:error=EIO", "fsync:error=EIO", "rename:error=EIO", "linkat,link:error=ENOSPC"]

DEADLINE_S = 6  # of a run, as the schedule's: a hang ends there


def disk_full(n: int, seed: int) -> str:
    """n times a disk that is full after a random number of bytes, then has room again."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, _small_disk(Path(folder, "root")) as disk:
        if not disk:
            return "not provoked: only root may mount a small disk"
        world, failed = World(Path(folder), seed), 0
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        with world.read_meanwhile():
            for i in range(n):
                world.land(2)
                filler = Path(world.root, "filler")
                there = os.statvfs(world.root)
                room = pick.randrange(0, 120_000) // there.f_frsize
                filler.write_bytes(b"\0" * (there.f_bavail - room) * there.f_frsize)
                status = world.run(["preprocess", "preprocess", "compact"][i % 3])
                if status not in (0, 1):
                    raise NotHeld(f"on a full disk it ended with {status}: {world.log()}")
                failed += status == 1
                filler.unlink()
                world.verify(everything=False)
                world.run_well("preprocess")
                world.verify()
        return f"{failed} of {n} runs met the full disk and said so, {world.next_tick} ticks exact, {world.reads} reads"


@contextlib.contextmanager
def _small_disk(where: Path):
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", where], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", where], check=True)


def failing_writes(n: int, seed: int) -> str:
    """The k-th write, sync, rename or link of preprocess fails, for k = 1 to n."""
    if not shutil.which("strace"):
        return "not provoked: strace is not installed"
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world, failed, ended = World(Path(folder), seed), 0, 0
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        with world.read_meanwhile():
            for k in range(1, n + 1):
                world.land(1)
                go = world.folder / "go"
                child = world.process("preprocess", wait_for=str(go))
                inject = FAILURES[k % len(FAILURES)]
                tracer = subprocess.Popen(
                    ["strace", "-qq", "-f", "-o", "/dev/null", "-p", str(child.pid)]
                    + ["-e", f"trace={inject.partition(':')[0]}", "-e", f"inject={inject}:when={(k - 1) // 2 + 1}"],
                    stderr=subprocess.DEVNULL,
                )
                _until_traced(child.pid)
                go.touch()
                child.join(DEADLINE_S)
                if child.exitcode is None:  # a thread of the library's was not woken: that is a write too
                    child.kill()
                    child.join()
                    ended += 1
                status = child.exitcode
                tracer.wait(10)
                go.unlink()
                failed += status != 0
                try:
                    world.verify(everything=False)
                    world.run_well("preprocess")
                    world.verify()
                except NotHeld as error:
                    raise NotHeld(f"{inject}, the {k}-th, run ended with {status}: {error}") from None
        found = f"{failed} of {n} runs failed by it, {ended} of them ended by a deadline"
        return f"{found}; {world.next_tick} ticks exact, {world.reads} reads"


def _until_traced(pid: int) -> None:
    for _ in range(200):
        if "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.02)
    raise RuntimeError("strace did not attach: ptrace is not allowed here")


UNFINISHED = ["sealed: lineitem", "after the commit: orders", "published"]


def damaged_bytes(n: int, seed: int) -> str:
    """Zeroed, torn and flipped bytes in commit, checkpoint, manifest and pointer, n times each, batch done or not."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        worlds = [lived := _lived(Path(folder, "lived"), seed)]
        worlds += [_stopped(lived, Path(folder, str(i)), stop) for i, stop in enumerate(UNFINISHED)]
        repaired = refused = 0
        for what in ("commit", "checkpoint", "manifest", "pointer"):
            for how in ("zeroed", "torn", "flipped"):
                for _ in range(n):
                    told = _one_damage(worlds[pick.randrange(len(worlds))], Path(folder, "now"), what, how, pick)
                    repaired, refused = repaired + told, refused + (not told)
        return f"{12 * n} damages: {repaired} repaired, {refused} refused with a message and nothing lost"


def _lived(folder: Path, seed: int) -> World:
    """A lake with a checkpoint and some commits after it."""
    world = World(folder, seed, bad=0.05)
    for ticks in range(22):
        world.land(1, small_tables=ticks == 0)
        stage("preprocess", world.root)
    return world


def _copied(world: World, folder: Path) -> World:
    shutil.copytree(world.folder, folder)
    copy = World(folder, world.next_tick)
    copy.quarantined, copy.next_tick = set(world.quarantined), world.next_tick
    return copy


def _stopped(lived: World, folder: Path, stop: str) -> World:
    """As `lived`, with a batch that was killed at that point."""
    world = _copied(lived, folder)
    world.land(1)
    if not was_killed(world.run("preprocess", crash_at=stop)):
        raise NotHeld(f"preprocess did not come to {stop!r}")
    return world


def _one_damage(base: World, folder: Path, what: str, how: str, pick: random.Random) -> bool:
    """Damage one file of a copy, run preprocess: True when it was repaired. Raises NotHeld when rows are lost."""
    world = _copied(base, folder)
    rel = _victim(Root.at(world.root), what, pick)
    path = Path(world.root, rel)
    before = path.read_bytes()
    at = pick.randrange(len(before))
    after = {
        "zeroed": pick.choice([b"", b"\0" * len(before)]),
        "torn": before[:at],
        "flipped": before[:at] + bytes([before[at] ^ 1 << pick.randrange(8)]) + before[at + 1 :],
    }[how]
    path.write_bytes(after)
    try:
        if status := world.run("preprocess"):
            if "Damaged" not in world.log():
                raise NotHeld(f"it ended with {status}, not with a message: {world.log()}")
            path.write_bytes(before)
            world.run_well("preprocess")
        world.verify()
    except Exception as error:
        raise NotHeld(f"{rel} {how} at {at} of {len(before)}: {type(error).__name__}: {error}") from None
    world.remove()
    return status == 0


def _victim(place: Root, what: str, pick: random.Random) -> str:
    log = f"lake/{pick.choice(['orders', 'lineitem'])}/_delta_log"
    names = place.list(log)
    commits = [name for name in names if name.endswith(".json")]
    checkpoints = [name for name in names if name.endswith(".checkpoint.parquet")]
    since = [name for name in commits if name[:20] > checkpoints[-1][:20]]
    manifests = [name for name in place.list("lake/batches") if name.endswith(".json") and "copy" not in name]
    return {
        "commit": f"{log}/{pick.choice([since[-1], pick.choice(since)])}",
        "checkpoint": f"{log}/{pick.choice([checkpoints[-1], '_last_checkpoint'])}",
        "manifest": f"lake/batches/{pick.choice(manifests[-2:])}",
        "pointer": "lake/published.json",
    }[what]
