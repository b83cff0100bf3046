"""`release`, `releases` and `rollback`: what they say, what they refuse, and with which exit status."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import incidents
import polars as pl
import pytest
from support import write_stage
from typer.testing import CliRunner

from etl.kernels import sources
from etl.runs import index, releases
from etl.storage import PROJECT, Root
from orchestrate import app
from pipeline import Lake


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Calls the command line of a project with two stages; the project's folder is its `project`."""
    project = tmp_path / "project"
    (project / "params/env").mkdir(parents=True)
    (project / "notebooks").mkdir()
    (project / "params/env/local.yml").write_text("root: outputs\n")
    monkeypatch.setattr(sources, "_path_of", lambda *_: None)  # without the engine's files
    for module in ("checking", "common", "releases"):
        monkeypatch.setattr(f"etl.cli.{module}.PROJECT", project)
    write_stage(project, "greet", "record(rows=loud)\ncheck('loud', loud > 0)", parameters="loud: int = 1  # times\n")
    write_stage(project, "other", "record(rows=1)\ncheck('true', True)")

    def call(*command: str, status: int = 0, as_json: bool = False):
        done = CliRunner().invoke(app, [*command, "--root", str(tmp_path / "root"), *["--json"] * as_json])
        assert done.exit_code == status, done.output
        return json.loads(done.stdout) if as_json else " ".join(done.output.split())

    call.project = project
    return call


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_what_differs_is_refused_until_it_is_accepted_by_name(told, tmp_path):
    place = Root.at(tmp_path / "root")
    first = told("release", "-m", "the first", as_json=True)
    assert first["released"] and {stage["stage"] for stage in first["stages"]} == {"greet", "other"}
    assert "nothing to do" in told("release")

    edit(told.project / "notebooks/greet.ipynb", "loud: int = 1", "loud: int = 2")
    refused = told("release", status=1)
    assert "parameters loud 1 2" in refused.replace("│", "").replace("  ", " ")
    assert "not released, as greet would differ: mend it, or accept it with --accept greet" in refused
    assert releases.current(place) == first["release"]
    assert [release.id for release in releases.newest(place)] == [first["release"]], "what is refused is not kept"
    assert "there is no stage nobody" in told("release", "--accept", "nobody", status=2)
    accepted = told("release", "--accept", "greet", as_json=True)
    assert accepted["changes"] == ["notebooks/greet.ipynb"]
    assert [stage["stage"] for stage in accepted["stages"]] == ["greet"], "of the other nothing has changed"

    assert [row["current"] for row in told("releases", "list", as_json=True)] == [True, False]
    assert "the first" in told("releases", "list")
    shown = told("releases", "show", first["release"][:6], as_json=True)
    assert shown["message"] == "the first" and [move["how"] for move in shown["moves"]] == ["release"]
    text = told("releases", "diff", first["release"], accepted["release"])
    assert "-loud: int = 1 # times +loud: int = 2 # times" in text
    assert told("releases", "diff") == "nothing differs"
    assert "there is no release ffff" in told("releases", "show", "ffff", status=1)

    assert f"`up` runs {first['release']}" in told("rollback")
    assert releases.current(place) == first["release"] and "loud: int = 2" in told("releases", "diff")
    assert "there is none before" in told("rollback", status=1)


def test_what_check_refuses_is_not_released(told, tmp_path):
    assert "nothing is released under" in told("rollback", status=1)
    edit(told.project / "params/greet.yml", "deadline", "deadlime")
    assert "unknown key 'deadlime'" in told("release", status=2)
    assert not (tmp_path / "root").exists()


def test_a_stage_that_went_has_to_be_accepted_too_and_packages_are_named(told):
    lock = told.project / "requirements.lock"
    lock.write_text("narwhals==2.1.0 \\\n    --hash=sha256:0a\nprefect[aws]==3.8.8 ; sys_platform == 'linux' \\\n")
    told("release", as_json=True)
    edit(lock, "2.1.0", "2.2.0")
    lock.write_text(lock.read_text() + "tomli==2.0\n")
    moved = told("release", "--runs", "0", as_json=True)
    named = [(package["name"], package["before"], package["after"]) for package in moved["packages"]]
    assert moved["released"] and named == [("narwhals", "2.1.0", "2.2.0"), ("tomli", None, "2.0")]
    for path in ("notebooks/other.ipynb", "params/other.yml"):
        (told.project / path).unlink()
    assert "--accept other" in told("release", status=1)
    assert told("release", "--accept", "other", as_json=True)["released"]


INGESTS = """from pipeline import Lake
lake = Lake(root)
parsed = lake.read(lake.next_batch(max_files=500, scheduled_for=scheduled_for))
record(versions_written=lake.commit(parsed, run_id=run_id))"""


def test_a_stage_that_writes_tables_runs_by_both_releases_and_rows_are_compared(told, filled, tmp_path, monkeypatch):
    """On the files of its last batch, in roots of their own; the root itself has what it had."""
    monkeypatch.setenv("ETL_KERNELS", str(tmp_path / "none"))
    project, root = told.project, Root.at(filled)
    shutil.copytree(PROJECT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_path_of", lambda of, name: of / name if name == "pipeline" else None)
    declared = "scheduled_for: str | None = None  # when\n"
    write_stage(project, "preprocess", INGESTS, "record(rows=parsed.rows)\ncheck('true', True)", parameters=declared)
    edit(project / "params/preprocess.yml", "1 minute", "1 hour")
    told("release", "--runs", "0")
    published, now = Lake(filled).snapshot(), datetime.now(UTC)
    about = {"metrics": {"batch": published.batch}, "versions_written": {"orders": published.versions["orders"]}}
    index.append(root, incidents.record(filled, "preprocess-20260301T120000-000001", now, 1.0, state="ok", **about))
    edit(project / "pipeline/tables.py", '("F", "O", "P")', '("F", "O")')
    refused = told("release", status=1)
    assert "both releases ran on 12 files of batch 1, and are compared" in refused
    assert "preprocess 1 difference" in refused and "--accept preprocess" in refused
    orders = published.frame("orders").filter(pl.col("o_orderstatus") == "P").collect()
    rows = f"rows orders {published.row_count('orders'):,} rows {published.row_count('orders') - orders.height:,}: "
    assert f"{rows}0 added, {orders.height} removed, 0 changed" in " ".join(refused.replace("│", " ").split())
    assert Lake(filled).snapshot().versions == published.versions and len(root.names("tries")) == 2
