"""`try`: what it says beside production's last run, and that nothing of production moves."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import write_stage
from typer.testing import CliRunner

from etl.runs import delivery, index, retention, tries
from etl.storage import Root
from orchestrate import app

ANSWER = """import json
import polars as pl
from etl.storage import Root
file = f"results/q/{run_id}.parquet"
Root.at(root).write(file, b"")
pl.DataFrame({"a": [1, 2], "b": [5, factor]}).write_parquet(Root.at(root).url_of(file))
Root.at(root).write("results/q/current.json", json.dumps({"file": file}).encode())
record(rows=factor, took_s=1.0, batch=1)"""


@pytest.fixture
def called(tmp_path, monkeypatch, filled):
    """Calls the command line of a project with one stage, on a root with a lake."""
    project = tmp_path / "project"
    (project / "params/env").mkdir(parents=True)
    (project / "notebooks").mkdir()
    (project / "params/env/local.yml").write_text("root: outputs\n")
    for module in ("common", "running"):
        monkeypatch.setattr(f"etl.cli.{module}.PROJECT", project)
    monkeypatch.setattr("etl.cli.many.prefect_answers", lambda root: False)
    write_stage(project, "ask", ANSWER, parameters="factor: int = 1  # of all\n")

    def call(*command: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, [*command, "--root", filled])
        assert done.exit_code == status, done.output
        return done.stdout

    call.project, call.root = project, filled
    return call


def production(root: str) -> dict[str, str]:
    """All that is there, but for what was tried."""
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(root).parts[0] != "tries"
    }


def test_a_try_tells_what_differs_and_moves_nothing(called):
    refused = CliRunner().invoke(app, ["try", "ask", "--root", str(called.project / "nowhere")])
    assert refused.exit_code == 1 and "it is not there" in refused.output
    called("run", "ask")
    delivery.settle()
    before = production(called.root)
    same = json.loads(called("try", "ask", "--json"))
    assert same["tables"] == [] and [one["differences"] for one in same["runs"]] == [[]]
    assert same["runs"][0]["compared"]["results"] == 1

    text = " ".join(called("try", "ask", "-p", "factor=2").replace("│", " ").split())
    assert "parameters factor 1 2" in text and "metrics rows 1 2" in text
    assert ": b in 1 of 2 rows, first in row 1 1 2" in text
    assert "no table has other rows than are published" in text
    assert production(called.root) == before
    root = Root.at(called.root)
    [first, second] = root.names("tries")
    assert first == same["id"] and len(index.newest(Root.at(root.url_of(f"tries/{second}")))) == 1

    now = datetime.now(UTC)
    assert tries.sweep(root, now=now + tries.KEPT / 2) == 0
    root.write("tries/mine/a", b"")  # whatever else is there
    tries_of = [name for name in root.names("tries") if name != "mine"]
    assert tries.sweep(root, now=now + 2 * tries.KEPT) == len(tries_of) and root.names("tries") == ["mine"]
    assert production(called.root) == before


def test_a_failed_try_says_so(called):
    write_stage(called.project, "ask", "raise ValueError('half edited')")
    text = called("try", "ask", status=1)
    assert "half edited" in text and "nothing to compare with: no run of it was ok yet" in text


def test_a_sweep_of_reports_removes_what_was_tried(root):
    place = Root.at(root)
    place.write("tries/ask-20200101T000000-abcdef/a", b"")
    retention.sweep(place)
    assert place.names("tries") == []
