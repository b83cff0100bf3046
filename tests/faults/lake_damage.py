"""A disk that is full, a write that fails, and bytes that are not what was written."""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from faults.lake_world import NotHeld, World, stage, was_killed

from etl.lake import doctor
from etl.storage import Root
from pipeline import Lake

ERRORS = ["ENOSPC", "EIO"]
CALLS = "write,ftruncate,fsync,fdatasync,rename,link,linkat"


def disk_full(n: int, seed: int) -> str:
    """n runs that meet a disk that is full after a random number of bytes; then it has room again."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, _small_disk(Path(folder, "root")) as disk:
        if not disk:
            return "not provoked: only root may mount a small disk"
        world, met, begun = World(Path(folder), seed), 0, 0
        room = {"preprocess": 60_000, "compact": 60_000}  # bytes; how many a run needs is learnt from those before
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        with world.read_meanwhile():
            while met < n and begun < 5 * n + 10:
                stage = ["preprocess", "preprocess", "compact"][begun % 3]
                begun += 1
                world.land(2)
                _fill(world, pick.uniform(0, room[stage]))
                status = world.run(stage)
                if status not in (0, 1):
                    raise NotHeld(f"on a full disk it ended with {status}: {world.log()}")
                met += status == 1
                room[stage] *= 1.1 if status == 1 else 0.7
                Path(world.root, "filler").unlink()
                world.verify(everything=False)
                world.run_well("preprocess")
                world.verify()
        if met < n:
            raise NotHeld(f"only {met} of {begun} runs met the full disk")
        return (
            f"{met} of {begun} runs met the full disk and said so, {world.next_tick} ticks exact, {world.reads} reads"
        )


def _fill(world: World, room: float) -> None:
    """Leave so many bytes on the world's disk."""
    there = os.statvfs(world.root)
    blocks = max(there.f_bavail - int(room) // there.f_frsize, 0)
    Path(world.root, "filler").write_bytes(b"\0" * blocks * there.f_frsize)


@contextlib.contextmanager
def _small_disk(where: Path):
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", where], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", where], check=True)


class Call(NamedTuple):
    """A system call of a run of preprocess that changes files: the `nth` of its main thread by that name."""

    name: str
    nth: int


def failing_writes(n: int, seed: int) -> str:
    """Every write, truncation, sync, rename and link of preprocess fails, one a run, until n runs have failed by it."""
    if not shutil.which("strace"):
        return "not provoked: strace is not installed"
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world, failed, begun = World(Path(folder), seed, bad=0), 0, 0  # no line is bad: each run makes the same calls
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        try:
            calls = _calls(world)
        except PermissionError as error:
            return f"not provoked: {error}"
        if {call.name for call in calls} < {"write", "fsync", "rename", "link"}:
            raise NotHeld(f"of the calls that change files only these were seen: {calls}")
        ways = [(call, error) for error in ERRORS for call in calls]
        random.Random(seed).shuffle(ways)
        with world.read_meanwhile():
            while failed < n and begun < 2 * n + 10:
                call, error = ways[begun % len(ways)]
                begun += 1
                world.land(1)
                options = ["-e", f"trace={call.name}", "-e", f"inject={call.name}:error={error}:when={call.nth}"]
                status = _traced(world, options)
                failed += status != 0
                try:
                    if status not in (0, 1):
                        raise NotHeld(f"it ended with {status}: {world.log()}")
                    world.verify(everything=False)
                    world.run_well("preprocess")
                    world.verify()
                except NotHeld as wrong:
                    raise NotHeld(f"{error} of {call}: {wrong}") from None
        if failed < n:
            raise NotHeld(f"only {failed} of {begun} runs failed")
        found = f"{failed} of {begun} runs failed by it, of {len(ways)} ways"
        return f"{found}; {world.next_tick} ticks exact, {world.reads} reads"


def _calls(world: World) -> list[Call]:
    """What a plain run of preprocess calls to change files, all of it in its main thread."""
    trace = world.folder / "trace"
    world.land(1)
    if status := _traced(world, ["-e", f"trace={CALLS}"], trace):
        raise NotHeld(f"a plain run of preprocess under strace ended with {status}: {world.log()}")
    seen: Counter[str] = Counter()
    found = []
    for line in trace.read_text().splitlines():
        name = line.partition("(")[0]
        if name in CALLS.split(","):
            seen[name] += 1
            found.append(Call(name, seen[name]))
    return found


def _traced(world: World, options: list[str], trace: Path = Path("/dev/null")) -> int:
    """A run of preprocess under strace; its exit status. Raises PermissionError where no process may be traced."""
    go = world.folder / "go"
    child = world.process("preprocess", wait_for=str(go))
    command = ["strace", "-qq", "-o", trace, "-p", str(child.pid), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _until_traced(child.pid)
        go.touch()
        child.join(60)
        if child.exitcode is None:
            raise NotHeld(f"it hangs under {options}")
        return child.exitcode
    finally:
        child.kill()
        tracer.wait(10)
        go.unlink(missing_ok=True)


def _until_traced(pid: int) -> None:
    for _ in range(200):
        if "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.02)
    raise PermissionError("strace may not attach to a process here")


def damaged_bytes(n: int, seed: int) -> str:
    """n times commit, checkpoint, manifest, pointer or data file zeroed, torn, overwritten or gone: doctor names it and
    what to do, and rebuild brings every row back, batch done or not."""
    pick = random.Random(seed)
    ways = itertools.product(
        ["zeroed", "torn", "overwritten", "gone"], ["commit", "checkpoint", "manifest", "pointer", "data"]
    )
    ways = [way for way in ways if way not in NOT_SEEN]
    pick.shuffle(ways)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        lived = _lived(Path(folder, "lived"), seed)
        worlds = [lived, _stopped(lived, Path(folder, "stopped"), "after the commit: orders")]
        for how, what in itertools.islice(itertools.cycle(ways), n):
            world = pick.choice(worlds).copied(Path(folder, "now"))
            _damage_once(world, what, how, pick)
            world.remove()
        return f"{n} damages of {len(ways)} kinds: each named with its remedy, and rebuilt with every row"


NOT_SEEN = [("gone", "manifest"), ("gone", "checkpoint")]  # nothing needs them: files and commits say the same


def _lived(folder: Path, seed: int) -> World:
    """A lake with a checkpoint and some commits after it."""
    world = World(folder, seed, bad=0.05)
    for ticks in range(22):
        world.land(1, small_tables=ticks == 0)
        stage("preprocess", world.root)
    return world


def _stopped(lived: World, folder: Path, stop: str) -> World:
    """As `lived`, with a batch that was killed at that point."""
    world = lived.copied(folder)
    world.land(1)
    if not was_killed(world.run("preprocess", crash_at=stop)):
        raise NotHeld(f"preprocess did not come to {stop!r}")
    return world


def _damage_once(world: World, what: str, how: str, pick: random.Random) -> None:
    """Raises NotHeld when doctor does not name the file, or rows are lost."""
    root = Root.at(world.root)
    rel = _victim(root, what, pick)
    path = Path(world.root, rel)
    before = path.read_bytes()
    at = pick.randrange(len(before) - 2)  # the last may be white space
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "zeroed": pick.choice([b"", b"\0" * len(before)]),
                "torn": before[:at],
                "overwritten": before[:at] + b"\xff" * len(before[at:]),
            }[how]
        )
    try:
        named = [
            finding for finding in Lake(world.root).examine() if finding.problem and finding.remedy == doctor.REBUILD
        ]
        if not any(rel.rpartition("/")[2] in finding.problem or how == "gone" for finding in named):
            raise NotHeld(f"doctor does not name it: {named}")
        Lake(world.root).rebuild()
        world.run_well("preprocess")
        world.verify()
    except Exception as error:
        raise NotHeld(f"{rel} {how} at {at} of {len(before)}: {type(error).__name__}: {error}") from error


def _victim(root: Root, what: str, pick: random.Random) -> str:
    table = f"lake/{pick.choice(['orders', 'lineitem'])}"
    names = root.names(f"{table}/_delta_log")
    commits = [name for name in names if name.endswith(".json")]
    checkpoints = [name for name in names if name.endswith(".checkpoint.parquet")]
    since = [name for name in commits if checkpoints[-1][:20] < name[:20] < commits[-1][:20]]
    manifests = [name for name in root.names("lake/batches") if name.endswith(".json")]
    return {
        "commit": f"{table}/_delta_log/{pick.choice(since)}",
        "checkpoint": f"{table}/_delta_log/{pick.choice([checkpoints[-1], '_last_checkpoint'])}",
        "manifest": f"lake/batches/{pick.choice(manifests[-2:])}",
        "pointer": "lake/published.json",
        "data": f"{table}/{pick.choice([name for name in root.names(table) if name.endswith('.parquet')][:-1])}",
    }[what]
