"""A run of a few cells, here or in a process of its own that may be killed, and what it left."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from etl.runs.engine import execute
from etl.runs.record import RunRecord, RunRequest
from etl.storage import PROJECT, Root

AT = "2026-03-01T12:00:10+00:00"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def request(root: Path, *cells: str, deadline_s: float = 120, rng: random.Random | None = None, **more) -> RunRequest:
    """A run of these cells; one that begins with # and a space is a heading."""
    made = [(new_markdown_cell if text.startswith("# ") else new_code_cell)(text) for text in cells]
    defaults = RunRequest(
        stage="toy",
        run_id=f"toy-20260301T120010-{(rng or random).getrandbits(24):06x}",
        root=str(root),
        notebook=new_notebook(cells=made, metadata=KERNEL),
        parameters={},
        origins={},
        scheduled_for=AT,
        deadline_s=deadline_s,
    )
    return replace(defaults, **more)


def run(root: Path, *cells: str, on_cell: Callable | None = None, **more) -> RunRecord:
    return execute(request(root, *cells, **more), on_cell=on_cell)


def start(asked: RunRequest, spool: Path) -> subprocess.Popen:
    """The same in a process of its own, which ends with status 0 only for a run that is ok."""
    code = "import json, sys; from etl.runs.engine import RunRequest, execute\n"
    code += "sys.exit(not execute(RunRequest(**json.load(sys.stdin))).ok)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "ETL_SPOOL": str(spool)},
        text=True,
    )
    process.stdin.write(json.dumps(vars(asked)))
    process.stdin.close()
    return process


def report(root: Path, record: RunRecord | dict) -> tuple[Any, dict]:
    """(the executed notebook, run.json) as they stand in the root."""
    place = record["report"] if isinstance(record, dict) else record.report
    text = Root.at(str(root)).read(f"{place}/report.ipynb").decode()
    return nbformat.reads(text, as_version=4), json.loads(Root.at(str(root)).read(f"{place}/run.json"))


def cell_states(nb: Any) -> list[str]:
    """Of the notebook's own cells, without the card and what the runner adds at the end."""
    cells = [cell for cell in nb.cells if not any(t.startswith("report-") for t in cell.metadata.get("tags", []))]
    return [cell.metadata.get("runner", {}).get("state") for cell in cells]


def project(folder: Path) -> Path:
    """A copy of the project without its stages."""
    for name in ("app", "etl", "notebooks", "params/env", "pipeline"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    for name in ("orchestrate.py",):
        shutil.copy(PROJECT / name, folder)
    (folder / "params/env/local.yml").write_text("root: outputs\n")
    return folder


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def marked(variable: str) -> list[psutil.Process]:
    """All processes that were started with NAME=value in their environment."""
    name, _, value = variable.partition("=")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:
            continue
    return alive(found)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Its first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def spool(folder: Path | str):
    """The spool in `folder`, for runs in this process."""
    before = os.environ.get("ETL_SPOOL")
    os.environ["ETL_SPOOL"] = str(Path(folder) / "spool")
    try:
        yield
    finally:
        os.environ.pop("ETL_SPOOL") if before is None else os.environ.update(ETL_SPOOL=before)
