"""What the benchmarks share: the systems they measure, what a process costs, a table and a JSON file."""

import contextlib
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console
from rich.table import Table

from etl.kernels import client
from etl.runs.engine import execute
from etl.runs.record import RunRecord, RunRequest
from etl.serve import services
from etl.storage import PROJECT, Root

IMPORTS = "\n".join(
    [  # what the five stages import, at their beginning or on the way
        "from IPython.display import Markdown, display",
        "from pipeline import Lake, charts, model, queries, source",
        "from etl.notebook import check, record, stop",
        "import deltalake, holoviews.plotting.mpl, hvplot.plotting.core, PIL.Image, pyarrow, xgboost",
    ]
)
CELLS = [IMPORTS, "import polars as pl", "pl.DataFrame({'x': range(rows)}).describe()"]


@contextlib.contextmanager
def own_state() -> Iterator[Path]:
    """A folder for everything; spool, fork server and temporary files of this benchmark alone."""
    with tempfile.TemporaryDirectory(prefix="etl-bench-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        os.environ |= {"ETL_SPOOL": f"{folder}/spool", "ETL_KERNELS": f"{folder}/kernels", "TMPDIR": folder}
        yield Path(folder)


def notebook() -> dict:
    """Three cells around nothing, with the imports of all stages."""
    parameters = new_code_cell("rows: int = 1  # of the frame", metadata={"tags": ["parameters"]})
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=[parameters, *map(new_code_cell, CELLS)], metadata={"kernelspec": kernelspec})


def run(folder: Path, i: int, page_later: bool = True) -> RunRecord:
    """One run of it by this runner, which has to be ok."""
    request = RunRequest(
        stage="bench",
        run_id=f"bench-20260101T000000-{i:06x}",
        root=str(folder / "root"),
        notebook=notebook(),
        parameters={"rows": 1000},
        origins={},
        scheduled_for="2026-01-01T00:00:00+00:00",
        deadline_s=120,
    )
    record = execute(request, page_later=page_later)
    assert record.ok, record.reason
    return record


@contextlib.contextmanager
def without_fork_server(folder: Path) -> Iterator[None]:
    """Runs get cold kernels."""
    before, os.environ["ETL_KERNELS"] = os.environ["ETL_KERNELS"], str(folder / "none")
    try:
        yield
    finally:
        os.environ["ETL_KERNELS"] = before


@contextlib.contextmanager
def fork_server(ready: int, folder: Path) -> Iterator[client.Keeper]:
    """A fork server with `ready` kernels that wait."""
    keeper = client.Keeper(ready, folder / "kernels.log")
    keeper.start()
    try:
        wait_until((client.server_folder() / "socket").exists)
        time.sleep(3)  # its first kernels come up
        yield keeper
    finally:
        keeper.signal(15)
        keeper.process.wait()


@contextlib.contextmanager
def prefect_server(folder: Path) -> Iterator[psutil.Process]:
    """A server as `up` has it; this process and those it starts use it."""
    port = free_port()
    home = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": f"http://{services.HOST}:{port}/api"}
    os.environ |= home | {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false", "PREFECT_LOGGING_LEVEL": "WARNING"}
    server = services.prefect_server(port, folder / "prefect", folder)
    server.start()
    try:
        server.wait_ready()
        yield psutil.Process(server.process.pid)
    finally:
        services.stop([server])


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.1)


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(process: psutil.Process) -> float:
    """Its own and that of the children it has waited for."""
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def pss_mb(process: psutil.Process) -> float:
    """Memory, each shared page divided by how many processes share it."""
    return process.memory_full_info().pss / 1e6


def quantile(values: list[float], share: float) -> float:
    """As in numpy with method="higher": one of the values, never a smaller one than asked for."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -int(-share * (len(ordered) - 1) // 1))]


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict:
    """What the figures were measured on, and how busy it was."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def publish(name: str, title: str, columns: list[str], rows: list[list[str]], result: dict, began: dict) -> None:
    """The table on the screen; the result in outputs/benchmarks/<name>.json."""
    load = f"load before {began['load'][0]}, after {os.getloadavg()[0]:.1f}"
    table = Table(title=title, title_justify="left", caption=load)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    found = {"benchmark": name, "machine": began, "load_after": os.getloadavg(), **result}
    Root.at(PROJECT / "outputs").write(f"benchmarks/{name}.json", json.dumps(found, indent=1).encode())
