"""In JupyterLab: "Run all" works in each notebook with its defaults, on the scratch root that `make demo` fills."""

import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from support import SMALL, environment, orchestrate

from etl import params
from etl.storage import PROJECT
from pipeline.queries import questions

STAGES = list(params.load(PROJECT).stages)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A copy of the project in which the stages' defaults make a small stream, its scratch root empty."""
    copy = tmp_path_factory.mktemp("lab")
    for name in ("etl", "notebooks", "params", "pipeline"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("orchestrate.py",):
        shutil.copy(PROJECT / name, copy)
    return copy


def test_run_all_works_in_each_notebook_with_its_defaults(lab, monkeypatch):
    """One test: a stage reads what the one before it wrote, as in the lab."""
    done = orchestrate(lab, "run", "generate", "--env", "dev", *SMALL[:6])
    assert done.returncode == 0, done.stderr
    for name, value in environment(lab).items():
        monkeypatch.setenv(name, value)
    for stage in STAGES:
        nb = nbformat.read(lab / "notebooks" / f"{stage}.ipynb", as_version=4)
        for cell in nb.cells:  # the defaults, but for the size of the stream that is there already
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace("scale: float = 0.1", "scale: float = 0.01")
                cell.source = cell.source.replace("slices: int = 288", "slices: int = 40")
                cell.source = cell.source.replace("min_rows: int = 5000", "min_rows: int = 500")
        NotebookClient(nb, resources={"metadata": {"path": str(lab / "notebooks")}}, timeout=120).execute()
    root = lab / "outputs" / "dev"
    assert (root / "lake" / "published.json").exists()
    assert len(list((root / "results").glob("*/current.json"))) == len(questions())
    assert (root / "models" / "current.json").exists()
    assert not (root / "reports" / "query").exists()  # a notebook run by hand leaves no report
