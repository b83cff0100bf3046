"""How many notebook runs a minute, 8 at a time: the `papermill` command, this runner cold and with forked kernels.

python benchmarks/throughput.py [ROUNDS] [RUNS OF EACH]
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import nbformat

from etl.runs import delivery

AT_ONCE = 8
READY = 2


def main(rounds: int, count: int) -> None:
    began = measure.machine()
    with measure.own_state() as folder, measure.fork_server(READY, folder):
        source = folder / "stage.ipynb"
        nbformat.write(measure.notebook(), source)
        papermill = [str(Path(sys.executable).with_name("papermill")), str(source)]

        def command(i: int) -> None:
            subprocess.run([*papermill, f"{folder}/{i}.ipynb", "--no-progress-bar"], check=True, capture_output=True)

        def ours(i: int) -> None:
            measure.run(folder, i)

        systems: dict[str, tuple[Callable[[int], None], Callable]] = {
            "papermill command": (command, contextlib.nullcontext),
            "this runner, cold kernels": (ours, lambda: measure.without_fork_server(folder)),
            "this runner, forked kernels": (ours, contextlib.nullcontext),
        }
        a_minute: dict[str, list[float]] = {name: [] for name in systems}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for i in range(rounds):
                for k, (name, (one, how)) in enumerate(systems.items()):
                    with how():
                        at, first = time.perf_counter(), (i * len(systems) + k) * count
                        list(pool.map(one, range(first, first + count)))
                        delivery.settle()  # rows and pages are part of it
                        a_minute[name].append(60 * count / (time.perf_counter() - at))
    medians = {name: measure.median(values) for name, values in a_minute.items()}
    rows = [[name, str(rounds), f"{m:.0f}", f"{m / medians['papermill command']:.1f}"] for name, m in medians.items()]
    title = f"Runs a minute, {AT_ONCE} at a time, {count} of each a round"
    result = {"at_once": AT_ONCE, "ready_kernels": READY, "runs_a_minute": a_minute, "medians": medians}
    measure.publish("throughput", title, ["what", "rounds", "runs a minute", "times"], rows, result, began)


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(5, 24)[len(given) :])
