"""What a notebook costs around its own work: the `papermill` command, Papermill in a warm process, and this runner.

One small notebook (a parameter, three cells, a table) is run by each in turn, round after round; medians and the ratio
to the `papermill` command are printed and written to outputs/benchmarks/notebook_overhead.json.

    python benchmarks/notebook_overhead.py [ROUNDS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
from rich.console import Console
from rich.table import Table

from runner.engine import RunRequest, execute
from storage import PROJECT, Root

CELLS = ["import polars as pl", "frame = pl.DataFrame({'x': range(rows)})", "frame.describe()"]


def main(rounds: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("rows: int = 1  # of the frame", metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, CELLS),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    source, report = folder / "stage.ipynb", folder / "report.ipynb"
    nbformat.write(notebook, source)
    runs: dict[str, Callable[[int], object]] = {
        "papermill command": lambda _: subprocess.run(
            [Path(sys.executable).with_name("papermill"), source, report, "-p", "rows", "1000", "--no-progress-bar"],
            check=True,
            capture_output=True,
        ),
        "pm.execute_notebook, warm process": lambda _: papermill.execute_notebook(
            source, report, {"rows": 1000}, progress_bar=False, log_output=False
        ),
        "this runner, report and index too": lambda i: execute(
            RunRequest(
                stage="bench",
                run_id=f"bench-{i}",
                root=str(folder / "root"),
                notebook=notebook,
                parameters={"rows": 1000},
                origins={},
                scheduled_for="2026-01-01T00:00:00+00:00",
                deadline_s=60,
            )
        ),
        "a plain function with the same body": lambda _: exec("\n".join(["rows = 1000", *CELLS]), {}),
    }
    for name in list(runs)[1:]:  # the command has nothing to warm up
        runs[name](-1)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run(i)
            taken[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    baseline = medians["papermill command"]
    table = Table("what", "median s", "times faster", title=f"Around one small notebook, {rounds} rounds")
    for name, median in medians.items():
        table.add_row(name, f"{median:.3f}", f"{baseline / median:.1f}")
    Console().print(table)
    result = {"rounds": rounds, "seconds": taken, "medians": medians}
    Root.at(PROJECT / "outputs").write("benchmarks/notebook_overhead.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
