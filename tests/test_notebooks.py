"""In JupyterLab: "Run all" works in each notebook with its defaults, on the scratch root that `make demo` fills."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime

import nbformat
import pytest
from nbclient import NotebookClient
from support import environment, free_port

from etl import params
from etl.serve.services import answers
from etl.storage import PROJECT, Root
from pipeline import source
from pipeline.queries import questions

STAGES = list(params.load(PROJECT).stages)
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A copy of the project whose notebooks were run as in `make lab`, with their defaults, on a small stream."""
    copy = tmp_path_factory.mktemp("lab")
    for name in ("etl", "notebooks", "params", "pipeline"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("orchestrate.py",):
        shutil.copy(PROJECT / name, copy)
    scratch = Root.at(copy / params.load(copy, "dev").environment.root)
    size = {"scale": 0.01, "slices": 40, "history": 2}
    stream, due = source.due_ticks(scratch, **size, max_ticks=8, scheduled_for=datetime.now(UTC).isoformat())
    source.land(scratch, stream, source.make_ticks(stream, due))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(copy).items():
            patch.setenv(name, value)
        patch.setenv("ETL_CHARTS", re.search(r"ETL_CHARTS=(\w+)", (PROJECT / "Makefile").read_text())[1])
        for stage in STAGES:  # a stage reads what the one before it wrote
            run_all(copy, stage)
    return copy


def run_all(copy, stage):
    """Run a notebook and keep what it shows; of its defaults only the size of the stream is changed."""
    path = copy / "notebooks" / f"{stage}.ipynb"
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace("scale: float = 0.1", "scale: float = 0.01")
            cell.source = cell.source.replace("slices: int = 288", "slices: int = 40")
            cell.source = cell.source.replace("min_rows: int = 5000", "min_rows: int = 500")
    NotebookClient(nb, resources={"metadata": {"path": str(path.parent)}}, timeout=120).execute()
    nbformat.write(nb, path)


def outputs(copy, stage):
    """What the cells of a notebook show."""
    nb = nbformat.read(copy / "notebooks" / f"{stage}.ipynb", as_version=4)
    return [output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]


def test_run_all_works_in_each_notebook_with_its_defaults(lab):
    root = lab / "outputs" / "dev"
    assert (root / "lake" / "published.json").exists()
    assert len(list((root / "results").glob("*/current.json"))) == len(questions())
    assert (root / "models" / "current.json").exists()
    assert not (root / "reports" / "query").exists()  # a notebook run by hand leaves no report


def test_what_notebooks_show_needs_no_network(lab):
    """Live charts were drawn by scripts from two places on the internet, and empty without."""
    shown = [output for stage in STAGES for output in outputs(lab, stage)]
    assert sum(PLOTLY in output.get("data", {}) for output in shown) > len(STAGES)
    assert not [output for output in shown if re.search(r"https?://|<script", json.dumps(output))]


def test_jupyterlab_draws_the_charts(lab, browser_window, tmp_path):
    from browser import FIRST_MS, Tab, expect

    port, token = free_port(), secrets.token_hex()
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}", "--no-browser", "--allow-root"]
    homes = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    with (tmp_path / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, f"--notebook-dir={lab / 'notebooks'}", f"--IdentityProvider.token={token}"],
            env=os.environ | homes,
            stdout=log,
            stderr=log,
        )
    try:
        while not answers(f"http://127.0.0.1:{port}/api"):
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            time.sleep(0.2)
        with Tab.opened(browser_window, f"http://127.0.0.1:{port}") as tab:
            tab.tab.goto(f"{tab.url}/doc/tree/train.ipynb?token={token}")
            charts = sum(PLOTLY in output.get("data", {}) for output in outputs(lab, "train"))
            expect(tab.charts()).to_have_count(charts, timeout=FIRST_MS)
            expect(tab.charts().first.locator(".scatterlayer .trace")).not_to_have_count(0)
    finally:
        server.terminate()
        server.wait()
