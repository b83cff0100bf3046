"""What a notebook costs around its own work: the `papermill` command, Papermill in a warm process, and this runner.

One small notebook that imports what the five stages import is run by each in turn, round after round. Of this runner,
the time until the executed notebook and the record are saved, and CPU seconds of the whole run: the kernel's start in
the background, the row and the page included.

    python benchmarks/notebook_overhead.py [ROUNDS] [MORE RUNS WITH A READY KERNEL]
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import nbformat
import papermill

from etl.runs import delivery
from etl.runs.record import RunRecord

PAUSE_S = 2  # for the next kernel to come up, as between two runs of a schedule
READY = "this runner, ready kernel"


def main(rounds: int, more: int) -> None:
    began = measure.machine()
    with measure.own_state() as folder:
        source, report = folder / "stage.ipynb", folder / "report.ipynb"
        nbformat.write(measure.notebook(), source)
        command = [str(Path(sys.executable).with_name("papermill")), str(source), str(report)]
        command += ["-p", "rows", "1000", "--no-progress-bar"]

        def cold(i: int) -> RunRecord:
            with measure.without_fork_server(folder):
                return measure.run(folder, i + 1_000_000)

        runs: dict[str, Callable[[int], object]] = {
            "papermill command": lambda _: subprocess.run(command, check=True, capture_output=True),
            "pm.execute_notebook, warm process": lambda _: papermill.execute_notebook(
                source, report, {"rows": 1000}, progress_bar=False, log_output=False
            ),
            "this runner, cold kernel": cold,
            READY: lambda i: measure.run(folder, i),
            "a plain function with the same body": lambda _: exec("\n".join(["rows = 1000", *measure.CELLS]), {}),
        }
        with measure.fork_server(1, folder):
            for name in list(runs)[1:]:  # the command has nothing to warm up
                runs[name](500_000)
            delivery.settle()
            time.sleep(PAUSE_S)
            taken: dict[str, list[float]] = {name: [] for name in runs}
            cpu: list[float] = []
            for i in range(rounds + more):
                for name in runs if i < rounds else [READY]:
                    before, at = _cpu_s(), time.perf_counter()
                    got = runs[name](i)
                    taken[name].append(time.perf_counter() - at)
                    delivery.settle()
                    if name == READY:
                        cpu.append(_cpu_s() - before + got.receipt["cpu_s"])
                    time.sleep(PAUSE_S)
    medians = {name: measure.median(seconds) for name, seconds in taken.items()}
    baseline = medians["papermill command"]
    rows = [_row(name, seconds, f"{baseline / medians[name]:.1f}") for name, seconds in taken.items()]
    rows.append(_row("CPU seconds of a run with a ready kernel, all in all", cpu, ""))
    title = f"Around one small notebook, {rounds} rounds; seconds from request to saved report"
    result = {"rounds": rounds, "seconds": taken, "cpu_s": cpu, "medians": medians}
    result |= {"p95_ready_s": measure.quantile(taken[READY], 0.95), "times_faster": baseline / medians[READY]}
    measure.publish("notebook_overhead", title, ["what", "runs", "median", "p95", "times faster"], rows, result, began)


def _row(name: str, values: list[float], faster: str) -> list[str]:
    return [name, str(len(values)), f"{measure.median(values):.3f}", f"{measure.quantile(values, 0.95):.3f}", faster]


def _cpu_s() -> float:
    """Of this process; a forked kernel is none of its children, and tells its own in the receipt."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(5, 40)[len(given) :])
