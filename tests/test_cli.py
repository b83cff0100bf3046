"""The command line: what it prints and how it exits, in a copy of the project."""

import json
import re
import subprocess
import sys
import time

import pytest
from support import AT, orchestrate, write_stage

from storage import Root


def test_check_names_the_stages_in_their_order(project):
    done = orchestrate(project, "check")
    assert (done.returncode, done.stdout.strip()) == (0, "ok  5 stages: generate, preprocess, compact, query, train")


def test_wrong_yaml_is_refused_before_anything_starts(project, root):
    path = project / "params" / "preprocess.yml"
    path.write_text(path.read_text().replace("max_files: 500 ", "max_flies: 500 ").replace("0.01 ", "lots "))
    lines = path.read_text().splitlines()
    misspelt = next(i for i, line in enumerate(lines, 1) if "max_flies" in line)
    began = time.monotonic()
    done = orchestrate(project, "run", "preprocess", "--root", root)
    took_s = time.monotonic() - began
    assert done.returncode == 2
    assert f"params/preprocess.yml:{misspelt}: " in done.stderr and "max_files" in done.stderr
    assert f"params/preprocess.yml:{misspelt + 1}: " in done.stderr and "float" in done.stderr
    assert not Root.at(root).list("")
    assert took_s < 30  # no kernel, no server; the figure itself is measured, not tested


def test_an_unknown_stage_and_a_wrong_value_exit_with_2(project):
    assert orchestrate(project, "run", "preproces").returncode == 2
    done = orchestrate(project, "run", "preprocess", "-p", "max_files=many")
    assert done.returncode == 2 and "max_files" in done.stderr


def test_plan_says_where_each_value_comes_from(project):
    planned = json.loads(orchestrate(project, "plan", "--env", "fast", "-p", "max_files=7", "--json").stdout)
    by_name = {stage["stage"]: stage for stage in planned}
    assert by_name["generate"]["origins"]["scale"].startswith("params/env/fast.yml:")
    assert by_name["preprocess"]["parameters"]["max_files"] == 7
    assert by_name["preprocess"]["origins"]["max_files"] == "command line"
    assert by_name["query"]["origins"]["rows_shown"] == "notebook default"
    text = orchestrate(project, "plan").stdout
    assert "every 30 s" in text and "params/generate.yml:" in text


def test_every_command_has_help(project):
    for command in (
        (),
        ("up",),
        ("run",),
        ("check",),
        ("plan",),
        ("runs",),
        ("runs", "list"),
        ("runs", "show"),
        ("runs", "open"),
    ):
        done = orchestrate(project, *command, "--help")
        assert done.returncode == 0 and "Usage" in done.stdout


def test_a_new_stage_is_one_notebook_and_one_yaml(project, root):
    write_stage(
        project,
        "greet",
        'check("there is a name", bool(name), name)\nrecord(rows=len(name))',
        parameters='name: str = "nobody"  # whom\n',
        yml="parameters:\n  name: Ada\n",
    )
    assert "greet" in orchestrate(project, "check").stdout
    done = orchestrate(project, "run", "greet", "--root", root, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert (record["state"], record["metrics"]["rows"], record["parameters"]["name"]) == ("ok", 3, "Ada")
    assert record["origins"]["name"] == "params/greet.yml:4"
    listed = json.loads(orchestrate(project, "runs", "list", "--root", root, "--json").stdout)
    assert [row["run_id"] for row in listed] == [record["run_id"]]
    shown = json.loads(orchestrate(project, "runs", "show", record["run_id"], "--root", root, "--json").stdout)
    assert shown["state"] == "ok"


def test_a_notebook_that_raises_fails_and_says_why(project, root):
    write_stage(project, "broken", "1 / 0", "print('never')")
    done = orchestrate(project, "run", "broken", "--root", root, "--at", AT)
    assert done.returncode == 1
    assert "failed" in done.stdout and "ZeroDivisionError" in done.stdout
    place = Root.at(root)
    (run_id,) = place.list("reports/broken/2026-03-01")
    folder = f"reports/broken/2026-03-01/{run_id}"
    assert place.list(folder) == ["report.html", "report.ipynb", "run.json"]
    assert b"ZeroDivisionError" in place.read(f"{folder}/report.html")
    assert json.loads(place.read(f"{folder}/run.json"))["state"] == "failed"
    assert orchestrate(project, "runs", "show", "nothing", "--root", root).returncode == 1


def test_retries_repeat_what_may_pass_and_not_a_failed_check(project, root):
    write_stage(project, "flaky", "1 / 0", yml="retries: 1\n")
    write_stage(project, "strict", 'check("never", False)', yml="retries: 1\n")
    assert orchestrate(project, "run", "flaky", "--root", root, "--at", AT).returncode == 1
    assert orchestrate(project, "run", "strict", "--root", root, "--at", AT).returncode == 1
    assert len(Root.at(root).list("reports/flaky/2026-03-01")) == 2
    assert len(Root.at(root).list("reports/strict/2026-03-01")) == 1


def test_quick_commands_import_nothing_heavy(project):
    code = "import sys; import orchestrate; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"'(\w+)'", done.stdout))
    assert not loaded & {
        "prefect",
        "papermill",
        "nbconvert",
        "nbformat",
        "polars",
        "pandas",
        "deltalake",
        "dask",
        "coiled",
    }


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01"])
def test_a_time_that_is_none_is_refused(project, when):
    assert orchestrate(project, "run", "query", "--at", when).returncode == 2
