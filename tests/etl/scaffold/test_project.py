"""`new project`: a folder of one's own on the engine, from nothing to rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment
from typer.testing import CliRunner

from etl.scaffold import projects
from etl.scaffold.files import Refused
from etl.storage import PROJECT, Root
from orchestrate import app as orchestrate_app


def etl(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The console script, in a project that this one does not know of."""
    variables = {name: value for name, value in environment(folder).items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "etl", *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_new_project_takes_rows_once_it_has_a_table(tmp_path):
    folder, sample = tmp_path / 'a "shop"', tmp_path / "sample.csv"
    made = CliRunner().invoke(orchestrate_app, ["new", "project", str(folder), "--json"])
    assert made.exit_code == 0 and json.loads(made.stdout)["project"] == str(folder)
    assert {*json.loads(made.stdout)["paths"]} == {
        os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file()
    }
    sample.write_text("id;price;at\n1;2.50;2026-03-01T12:00:00Z\n2;3.00;2026-03-01T12:01:00Z\n")
    etl(folder, "new", "table", "sales", "--from", str(sample))
    etl(folder, "new", "question", "sales_by_hour", "--table", "sales")
    checked = json.loads(etl(folder, "check", "--json").stdout)
    assert checked == {"ok": True, "stages": ["preprocess", "compact", "query"], "problems": [], "notes": []}
    Root.at(folder / "outputs").write("landing/sales/1.csv", sample.read_bytes())
    (record,) = json.loads(etl(folder, "run", "preprocess", "--json").stdout)
    assert (record["state"], record["metrics"]["rows"]) == ("ok", 2)
    code = "from app import api, shown; from app.views import overview; print(api.queries.questions()[0].name)"
    python = f"import sys; sys.path += ['.', {str(PROJECT)!r}]; {code}"
    asked = subprocess.run([sys.executable, "-c", python], cwd=folder, capture_output=True, text=True)
    assert asked.stdout == "sales_by_hour\n", asked.stderr


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "x").write_text("here")
    for folder in (tmp_path, tmp_path / "x"):
        with pytest.raises(Refused, match="is there already, and not empty"):
            projects.add(PROJECT, folder)
    with pytest.raises(Refused, match="has no notebooks/preprocess.ipynb"):
        projects.add(tmp_path, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["x"]
