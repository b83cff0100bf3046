"""Many runs in a row, then a fork server that is killed again and again under load: what is left, what it grows.

python benchmarks/endurance.py [RUNS] [KILLS]
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import psutil

from etl.kernels import client
from etl.runs import delivery

LOOKS = 25  # at the memory
AT_ONCE = 3


def main(runs: int, kills: int) -> None:
    began = measure.machine()
    with measure.own_state() as folder, measure.fork_server(1, folder) as keeper:
        server, me = psutil.Process(keeper.process.pid), psutil.Process()
        seen = []
        for i in range(runs):
            measure.run(folder, i)
            if (i + 1) % max(1, runs // LOOKS) == 0:
                delivery.settle()
                seen.append((i + 1, server.memory_info().rss / 1e6, me.memory_info().rss / 1e6))
        later = seen[len(seen) // 2 :]  # caches and the allocator's arenas have filled by then
        slopes = [100 * _slope([(row[0], row[column]) for row in later]) for column in (1, 2)]
        zombies = [p.pid for p in psutil.process_iter(["status"]) if p.info["status"] == psutil.STATUS_ZOMBIE]
        zombies = [pid for pid in zombies if psutil.Process(pid).ppid() in (server.pid, me.pid)]
        measure.wait_until(lambda: len(_kernel_folders(folder)) <= keeper.ready, 20)
        failed = _killed(folder, keeper, kills)
        keeper.process.kill()
        measure.wait_until(lambda: not _kernel_folders(folder), 20)
        left = _kernel_folders(folder)
    rows = [
        ["memory of the fork server, MB per 100 runs", f"{slopes[0]:+.2f}"],
        ["memory of the worker's process, MB per 100 runs", f"{slopes[1]:+.2f}"],
        ["zombies", str(len(zombies))],
        ["folders and sockets left", str(len(left))],
        [f"runs that failed while the fork server was killed {kills} times", str(failed)],
    ]
    result = {"runs": runs, "kills": kills, "memory_mb": seen, "slopes_mb": slopes, "zombies": zombies, "left": left}
    title = f"{runs} runs in a row"
    measure.publish("endurance", title, ["what", "found"], rows, result | {"failed": failed}, began)


def _killed(folder: Path, keeper: client.Keeper, kills: int) -> int:
    """How many runs failed, with `AT_ONCE` runs under way all the time."""
    over = threading.Event()

    def work(worker: int) -> int:
        failed, i = 0, 0
        while not over.is_set():
            i += 1
            try:
                measure.run(folder, 1_000_000 * (worker + 1) + i)
            except AssertionError:
                failed += 1
        return failed

    with ThreadPoolExecutor(AT_ONCE) as pool:
        working = [pool.submit(work, worker) for worker in range(AT_ONCE)]
        for _ in range(kills):
            measure.wait_until((client.server_folder() / "socket").exists)
            time.sleep(1 + os.urandom(1)[0] / 256)
            keeper.process.kill()
            keeper.process.wait()
            (client.server_folder() / "socket").unlink(missing_ok=True)
            keeper.start()
        over.set()
        return sum(each.result() for each in working)


def _kernel_folders(folder: Path) -> list[str]:
    return [str(path) for path in folder.glob("kernel-*")]


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(500, 20)[len(given) :])
