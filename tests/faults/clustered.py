"""Batches that Dask's workers read, and files that they compact, while they or their driver are killed amid that."""

import contextlib
import functools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import psutil
from faults.lake_world import DASK, KEYS, NotHeld, World, points, was_killed

from pipeline.tables import TABLES

STAGES = ("preprocess", "preprocess", "compact")
WAYS = ("a worker at a point", "a driver at a point", "a driver while a worker is at a point")
OTHERS = {*TABLES, "quarantine"} - {*KEYS}  # tables that not each batch has rows of


class Cluster:
    """Two workers that can be told where to die, or to stop."""

    def __init__(self, cluster: distributed.LocalCluster, client: distributed.Client):
        self.cluster, self.client = cluster, client

    def pids(self) -> set[int]:
        return {nanny.pid for nanny in self.cluster.workers.values()}

    def tell(self, point: str | None) -> None:
        """What ETL_CRASH_AT is for the workers; those that are stopped go on."""
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(self._tell, point)
            while not told.done():
                self.go_on()
                time.sleep(0.02)
            told.result()
        self.go_on()

    def _tell(self, point: str | None) -> None:
        until = time.monotonic() + 300
        while True:
            try:
                self.client.run(_tell, point)
                return
            except OSError:  # one of them has died just now
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def go_on(self) -> None:
        for pid in self.stopped():
            os.kill(pid, signal.SIGCONT)

    def stopped(self) -> list[int]:
        found = []
        for pid in self.pids():
            with contextlib.suppress(psutil.NoSuchProcess, TypeError):
                found += [pid] * (psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        return found

    def settle(self, gone: set[int]) -> None:
        """Both are there again, and of those who died none is taken for alive."""
        until = time.monotonic() + 300
        while len(self.client.scheduler_info()["workers"]) < 2 or self.pids() & gone or None in self.pids():
            if time.monotonic() > until:
                raise NotHeld("a worker that was killed does not come again")
            time.sleep(0.05)
        self.client.wait_for_workers(2, timeout=300)


def clustered(n: int, seed: int) -> str:
    """n times a worker or a driver is killed at a seeded point of its code; after each the next run leaves every row
    there once, every broken line in quarantine and every file in the archive, as they came."""
    pick, killed, named, begun = random.Random(seed), Counter[str](), set[str](), 0
    how = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, _opened(how) as cluster:
        world = World(Path(folder), seed, bad=0.1)
        world.environment[DASK] = cluster.cluster.scheduler_address
        world.land(2, small_tables=True)
        world.run_well("preprocess")
        points_of = functools.cache(lambda stage, way: POINTS[way](world, stage, cluster))
        with world.read_meanwhile():
            while killed.total() < n and begun < 2 * n + 2:
                begun += 1
                stage, way = pick.choice(STAGES), WAYS[(begun + seed) % len(WAYS)]
                point = pick.choice(points_of(stage, way))
                _prepare(world, stage, pick.choice([2, 3, 4]))
                try:
                    if KILL[way](world, stage, point, cluster):
                        killed[way] += 1
                        named.add(f"{stage}: {point}")
                    if way != WAYS[0]:
                        world.run_well(stage)
                    if stage == "compact":
                        world.run_well("preprocess")
                    world.verify()
                    world.require_archived()
                except NotHeld as error:
                    raise NotHeld(f"{begun}: {stage}, {way} {point!r}: {error}") from None
        if killed.total() < n:
            raise NotHeld(f"only {killed} of {begun}: the others ended before their point")
    told = ", ".join(f"{count} times {way}" for way, count in killed.items())
    told += f", at {len(named)} points, of {begun} runs"
    return f"killed {told}; {world.next_tick} ticks exact after each, {world.reads} reads"


@contextlib.contextmanager
def _opened(how: dict) -> Iterator[Cluster]:
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield Cluster(cluster, client)


def _tell(point: str | None) -> None:
    """On a worker."""
    from etl import storage

    storage._reached.clear()
    os.environ.pop("ETL_CRASH_AT", None)
    if point is not None:
        os.environ["ETL_CRASH_AT"] = point


def _prepare(world: World, stage: str, ticks: int = 2) -> None:
    """Something to do for a stage."""
    world.land(ticks)
    if stage == "compact":
        world.run_well("preprocess")
        world.land(ticks)


def _of_driver(world: World, stage: str, cluster: Cluster) -> list[str]:
    """The points that a run of a stage comes to in its own process, and each will."""
    _prepare(world, stage)
    return _sure(points(world, stage))


def _of_workers(world: World, stage: str, cluster: Cluster) -> list[str]:
    """Those that workers come to."""
    _prepare(world, stage)
    names = world.folder / "points of workers"
    names.write_text("")
    cluster.tell(f"+{names}")
    world.run_well(stage)
    cluster.tell(None)
    return _sure(names.read_text().splitlines())


def _sure(found: list[str]) -> list[str]:
    """Of points those of every run."""
    names = dict.fromkeys(point.rpartition("@")[0] for point in found)
    return [name for name in names if name.rpartition(": ")[2].rpartition("/")[2] not in OTHERS]


def _kill_worker(world: World, stage: str, point: str, cluster: Cluster) -> bool:
    """Both workers die there, if both come to it; the run ends well for all that."""
    before = cluster.pids()
    cluster.tell(point)
    status = world.run(stage)
    cluster.tell(None)
    gone = {pid for pid in before if not _is_alive(pid)}
    cluster.settle(gone)
    if status:
        raise NotHeld(f"the run ended with {status} as it lost {len(gone)} workers: {world.log()}")
    return bool(gone)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _kill_driver(world: World, stage: str, point: str, cluster: Cluster) -> bool:
    status = world.run(stage, crash_at=point)
    if status and not was_killed(status):
        raise NotHeld(f"the driver ended with {status}: {world.log()}")
    return was_killed(status)


def _kill_driver_amid(world: World, stage: str, point: str, cluster: Cluster) -> bool:
    """The worker goes on with what nobody asks for any more."""
    cluster.tell(f"={point}")
    child, until = world.process(stage), time.monotonic() + 120
    while not cluster.stopped() and child.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    was_at_work = bool(cluster.stopped()) and child.is_alive()
    child.kill()
    child.join()
    cluster.tell(None)
    return was_at_work and was_killed(child.exitcode)


KILL = dict(zip(WAYS, (_kill_worker, _kill_driver, _kill_driver_amid), strict=True))
POINTS = dict(zip(WAYS, (_of_workers, _of_driver, _of_workers), strict=True))
