"""What a notebook costs around its own work: the `papermill` command, Papermill in a warm process, and this runner.

One small notebook that imports what the five stages import is run by each in turn, round after round. Of this runner,
the time until the executed notebook and the record are saved, and CPU seconds of the whole run: the kernel's start in
the background, the row and the page included.

    python benchmarks/notebook_overhead.py [ROUNDS] [MORE WARM RUNS]
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import nbformat
import papermill

from runner import journal
from runner.engine import RunRecord, RunRequest, execute

CELLS = [measure.IMPORTS, "import polars as pl", "pl.DataFrame({'x': range(rows)}).describe()"]
PAUSE_S = 2  # for the next kernel to come up, as between two runs of a schedule


def main(rounds: int, more: int) -> None:
    began = measure.machine()
    with measure.own_state() as folder:
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        parameters = nbformat.v4.new_code_cell("rows: int = 1  # of the frame", metadata={"tags": ["parameters"]})
        cells = [parameters, *map(nbformat.v4.new_code_cell, CELLS)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
        source, report = folder / "stage.ipynb", folder / "report.ipynb"
        nbformat.write(notebook, source)
        command = [
            Path(sys.executable).with_name("papermill"),
            source,
            report,
            "-p",
            "rows",
            "1000",
            "--no-progress-bar",
        ]

        def ours(i: int) -> RunRecord:
            request = RunRequest(
                stage="bench",
                run_id=f"bench-20260101T000000-{i:06x}",
                root=str(folder / "root"),
                notebook=notebook,
                parameters={"rows": 1000},
                origins={},
                scheduled_for="2026-01-01T00:00:00+00:00",
                deadline_s=60,
            )
            record = execute(request, page_later=True)
            assert record.ok, record.reason
            return record

        def cold(i: int) -> RunRecord:
            place, os.environ["ETL_KERNELS"] = os.environ["ETL_KERNELS"], str(folder / "none")
            try:
                return ours(i + 1_000_000)
            finally:
                os.environ["ETL_KERNELS"] = place

        runs: dict[str, Callable[[int], object]] = {
            "papermill command": lambda _: subprocess.run(command, check=True, capture_output=True),
            "pm.execute_notebook, warm process": lambda _: papermill.execute_notebook(
                source, report, {"rows": 1000}, progress_bar=False, log_output=False
            ),
            "this runner, cold kernel": cold,
            "this runner, ready kernel": ours,
            "a plain function with the same body": lambda _: exec("\n".join(["rows = 1000", *CELLS]), {}),
        }
        with measure.fork_server(1, folder):
            for name in list(runs)[1:]:  # the command has nothing to warm up
                runs[name](500_000)
            journal.settle()
            time.sleep(PAUSE_S)
            taken: dict[str, list[float]] = {name: [] for name in runs}
            cpu: list[float] = []
            for i in range(rounds + more):
                for name, run in runs.items():
                    if i >= rounds and name != "this runner, ready kernel":
                        continue
                    before, at = _cpu_s(), time.perf_counter()
                    got = run(i)
                    taken[name].append(time.perf_counter() - at)
                    journal.settle()
                    if name == "this runner, ready kernel":
                        cpu.append(_cpu_s() - before + got.receipt["cpu_s"])
                    time.sleep(PAUSE_S if isinstance(got, RunRecord) else 0)
    medians = {name: measure.median(seconds) for name, seconds in taken.items()}
    warm = taken["this runner, ready kernel"]
    p95 = measure.quantile(warm, 0.95)
    baseline = medians["papermill command"]
    rows = [
        [
            name,
            str(len(taken[name])),
            f"{median:.3f}",
            f"{measure.quantile(taken[name], 0.95):.3f}",
            f"{baseline / median:.1f}",
        ]
        for name, median in medians.items()
    ]
    rows.append(
        [
            "CPU seconds of a run with a ready kernel, all in all",
            str(len(cpu)),
            f"{measure.median(cpu):.2f}",
            f"{measure.quantile(cpu, 0.95):.2f}",
            "",
        ]
    )
    title = f"Around one small notebook, {rounds} rounds; seconds from request to saved report"
    result = {"rounds": rounds, "seconds": taken, "cpu_s": cpu, "medians": medians, "p95_ready": p95}
    measure.publish("notebook_overhead", title, ["what", "runs", "median", "p95", "times faster"], rows, result, began)


def _cpu_s() -> float:
    """Of this process; a forked kernel is none of its children, and tells its own in the receipt."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(5, 40)[len(given) :])
