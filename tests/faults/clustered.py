"""Batches that Dask's workers read, and files that they compact, while they or their driver are killed."""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import distributed
from faults.lake_world import DASK, NotHeld, World, was_killed


def clustered(n: int, seed: int) -> str:
    """n times a worker or a driver is killed at a seeded time, two drivers to one worker; then every row is there once,
    and the next run finds nothing left to do."""
    pick = random.Random(seed)
    drivers, workers, begun = 0, 0, 0
    how = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, distributed.LocalCluster(**how) as cluster:
        world = World(Path(folder), seed, bad=0.1)
        world.environment[DASK] = cluster.scheduler_address
        world.land(2, small_tables=True)
        began = time.monotonic()
        world.run_well("preprocess")
        longest = 1.2 * (time.monotonic() - began)
        with world.read_meanwhile():
            while drivers + workers < n and begun < 10 * n + 20:
                begun += 1
                world.land(pick.choice([2, 3, 4]))
                stage = pick.choice(["preprocess", "preprocess", "compact"])
                child = world.process(stage)
                time.sleep(pick.uniform(0.2 * longest, longest))
                if 2 * workers > drivers:
                    child.kill()
                    child.join()
                    drivers += was_killed(child.exitcode)
                    longest *= 1.1 if was_killed(child.exitcode) else 0.8
                else:
                    was_at_work = child.is_alive()
                    os.kill(pick.choice([*cluster.workers.values()]).pid, signal.SIGKILL)
                    child.join(120)
                    if child.exitcode:
                        raise NotHeld(f"{stage} ended with {child.exitcode} as it lost a worker: {world.log()}")
                    workers += was_at_work
                    _settled(cluster)
                if begun % 10 == 0:
                    world.run_well("preprocess")
                    world.verify()
            world.run_well("preprocess")
            world.run_well("compact")
        world.verify()
        if drivers + workers < n:
            raise NotHeld(f"only {drivers} drivers and {workers} workers of {begun} were killed at work")
    return f"{drivers} drivers and {workers} workers killed, {world.next_tick} ticks exact, {world.reads} reads"


def _settled(cluster: distributed.LocalCluster) -> None:
    """Both workers are there again."""
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
