"""In JupyterLab: "Run all" works in each notebook with its defaults, on the scratch root that `make demo` fills."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import nbformat
import pytest
from nbclient import NotebookClient
from support import environment, ingest_all, write_stage

from etl import params
from etl.runs import debugging, dispatch, index, releases
from etl.serve.lab import Lab
from etl.storage import PROJECT, Root
from pipeline import Lake, source
from pipeline.queries import questions

STAGES = [name for name in params.load(PROJECT).stages if name != "score"]  # which stops: nothing ships that early
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A copy of the project whose notebooks were run as in `make lab`, with their defaults, on a small stream."""
    copy = tmp_path_factory.mktemp("lab")
    for name in ("etl", "notebooks", "params", "pipeline"):
        shutil.copytree(PROJECT / name, copy / name)
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
        for stage in sorted(
            STAGES, key="score".__eq__
        ):  # a stage reads what the one before it wrote, a score the model
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
    assert (root / "models" / "aliases.json").exists()
    assert not (root / "reports" / "query").exists()  # a notebook run by hand leaves no report


def test_what_notebooks_show_needs_no_network(lab):
    """Live charts were drawn by scripts from two places on the internet, and empty without."""
    shown = [output for stage in STAGES for output in outputs(lab, stage)]
    assert sum(PLOTLY in output.get("data", {}) for output in shown) > len(STAGES)
    assert not [output for output in shown if re.search(r"https?://|<script", json.dumps(output))]


CHARTED = """import polars as pl
from pipeline import Lake, charts
snapshot = Lake(root).snapshot()
record(versions_read=snapshot.versions, batch=snapshot.batch)
orders = snapshot.frame('orders').collect().height
charts.show(lambda frame: charts.plot(frame).line('a', 'b'), pl.DataFrame({'a': [1, 2], 'b': [1, 2]}))"""


def test_a_failed_run_is_debugged_in_jupyterlab(filled, stream, tmp_path, monkeypatch, browser_window):
    """With the release's code, on the data that it read; the chart is drawn without a network."""
    from browser import FIRST_MS, Tab, expect

    project, root = tmp_path / "project", Root.at(filled)
    (project / "params/env").mkdir(parents=True)
    (project / "notebooks").mkdir()
    (project / "params/env/local.yml").write_text("root: outputs\n")
    write_stage(project, "count", CHARTED, "from broken import problem", "print(orders, problem)\n1 / 0")
    (project / "broken.py").write_text("problem = 'as released'\n")
    monkeypatch.setattr("etl.runs.debugging.PROJECT", project)
    monkeypatch.setenv("ETL_CHARTS", "plotly")
    tree = releases.load(root, releases.first(project, root).id, "local")
    with ThreadPoolExecutor(1) as pool:  # Playwright's event loop is in this thread
        stage, environment = tree.project.stages["count"], tree.project.environment
        record = pool.submit(dispatch.run_stage, stage, environment, release=tree.release).result()
    run = index.get(root, record.run_id)
    assert (record.state, record.error["cell"]) == ("failed", 7), record.reason
    read = Lake(filled).snapshot().row_count("orders")
    (project / "broken.py").write_text("problem = 'edited since'\n")
    source.land(root, replace(stream, next_tick=3), source.make_ticks(stream, range(3, 4)))
    ingest_all(filled, run_id="preprocess-later")

    bench = debugging.prepare(root, run, branch=None)
    assert bench.told == [] and bench.notebook.is_relative_to(project / "outputs/debug")
    lab = Lab(bench.notebook, bench.code)
    lab.start()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lab.run_before, bench.failed).result()
        with Tab.opened(browser_window, lab.page(None)) as tab:
            tab.tab.goto(lab.page(bench.failed))
            expect(tab.charts()).to_have_count(1, timeout=FIRST_MS)
            failed = tab.tab.locator(".jp-CodeCell", has_text="1 / 0")
            failed.locator(".cm-content").first.click()
            tab.tab.keyboard.press("Control+Home")
            tab.tab.keyboard.type("print('again');")
            tab.tab.keyboard.press("Control+Enter")
            expect(failed.locator(".jp-OutputArea")).to_contain_text(f"again\n{read} as released", timeout=FIRST_MS)
            expect(failed.locator(".jp-OutputArea")).to_contain_text("ZeroDivisionError")
    finally:
        lab.stop()
    assert Lake(filled).snapshot().row_count("orders") > read
