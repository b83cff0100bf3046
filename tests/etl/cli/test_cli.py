"""The command line: what it prints and how it exits, in a copy of the project."""

import io
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from datetime import UTC, datetime

import polars as pl
import pytest
from deltalake import write_deltalake
from rich.console import Console
from support import AT, copy_project, environment, free_port, ingest_all, orchestrate, s3_variables, write_stage
from typer.testing import CliRunner

from etl.cli import printing, up
from etl.runs import index
from etl.runs.record import RunRecord
from etl.storage import Root
from orchestrate import app as orchestrate_app


def test_check_names_the_stages_in_their_order(project):
    done = orchestrate(project, "check")
    assert (done.returncode, done.stdout.strip()) == (
        0,
        "ok  6 stages: generate, preprocess, compact, query, score, train",
    )


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
    assert not Root.at(root).names("")
    assert took_s < 30  # no kernel, no server; the figure itself is measured, not tested


def test_a_notebook_that_is_none_is_one_line_and_no_traceback(project, root):
    paths = {name: project / f"notebooks/{name}.ipynb" for name in ("generate", "preprocess", "query", "train")}
    text = paths["generate"].read_text()
    paths["generate"].write_text("\ufeff" + text)
    paths["preprocess"].write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    lines = paths["query"].read_text().splitlines()
    paths["query"].write_text(
        "\n".join([*lines[:5], "<<<<<<< HEAD", lines[5], "=======", lines[5], ">>>>>>> main", *lines[6:]])
    )
    paths["train"].write_text(json.dumps(json.loads(text) | {"nbformat": 3}))
    done = orchestrate(project, "check")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "wrong  notebooks/generate.ipynb: begins with a byte order mark; save it as UTF-8 without one",
        "wrong  notebooks/preprocess.ipynb: is a Git LFS pointer; `git lfs pull` fetches the notebook",
        "wrong  notebooks/query.ipynb: line 6 is a marker of git: a merge is to be finished",
        "wrong  notebooks/train.ipynb: not a notebook: its format is 3, not 4; JupyterLab saves it anew",
    ]
    done = orchestrate(project, "run", "generate", "--root", root)
    [row] = index.newest(Root.at(root))
    assert row["state"] == "failed" and "begins with a byte order mark" in row["reason"]
    assert done.returncode == 1 and "byte order mark" in done.stdout and "Traceback" not in done.stdout + done.stderr


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


def test_every_command_has_help():
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
        ("runs", "tail"),
        ("runs", "diff"),
        ("runs", "sweep"),
        ("replay",),
        ("repair",),
        ("release",),
        ("releases", "list"),
        ("releases", "show"),
        ("releases", "diff"),
        ("rollback",),
        ("whence",),
        ("promote",),
        ("doctor",),
        ("rebuild",),
        ("backup",),
        ("restore",),
        ("quarantine",),
        ("new",),
        ("new", "table"),
        ("new", "question"),
        ("new", "stage"),
        ("models",),
        *[("models", name) for name in ("list", "show", "promote", "rollback", "compare")],
    ):
        done = CliRunner().invoke(orchestrate_app, [*command, "--help"])
        assert done.exit_code == 0 and "Usage" in done.stdout, command


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
    write_stage(project, "broken", "raise ZeroDivisionError('[/no markup]')", "print('never')")
    done = orchestrate(project, "run", "broken", "--root", root, "--at", AT)
    assert done.returncode == 1
    assert "failed" in done.stdout and "ZeroDivisionError: [/no markup]" in done.stdout
    place = Root.at(root)
    (run_id,) = place.names("reports/broken/2026-03-01")
    folder = f"reports/broken/2026-03-01/{run_id}"
    assert place.names(folder) == ["report.html", "report.ipynb", "run.json"]
    assert b"ZeroDivisionError" in place.read(f"{folder}/report.html")
    assert json.loads(place.read(f"{folder}/run.json"))["state"] == "failed"
    assert orchestrate(project, "runs", "show", "nothing", "--root", root).returncode == 1


def test_what_went_wrong_is_on_the_terminal_and_not_how_many_rows_there_were(project, root):
    write_stage(project, "broken", "record(rows=7)", f"{'x' * 30!r}\nraise ValueError('{'too many words ' * 9}')")
    code = "import orchestrate, sys; from etl.cli import common; common.out.width = 80; sys.exit(orchestrate.app())"
    command = [sys.executable, "-c", code, "run", "broken", "--root", root, "--at", AT]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    new, *told, report = done.stdout.splitlines()
    assert new == f"new root {root}"  # whole, to be copied
    shown = " ".join(done.stdout.split())
    assert "broken failed" in shown and "rows" not in shown and max(map(len, told)) <= 80, done.stdout
    assert "ValueError: too many words too many words" in shown
    assert "in 'broken', cell 6, line 2 raise ValueError(" in shown
    assert Root.at(project).exists(report.strip()) or Root.at("/").exists(report.strip()), report


def test_retries_repeat_what_may_pass_and_not_a_failed_check(project, root):
    write_stage(project, "flaky", "1 / 0", yml="retries: 1\n")
    write_stage(project, "strict", 'check("never", False)', yml="retries: 1\n")
    assert orchestrate(project, "run", "flaky", "--root", root, "--at", AT).returncode == 1
    assert orchestrate(project, "run", "strict", "--root", root, "--at", AT).returncode == 1
    assert len(Root.at(root).names("reports/flaky/2026-03-01")) == 2
    assert len(Root.at(root).names("reports/strict/2026-03-01")) == 1


@pytest.fixture(scope="module")
def greeted(tmp_path_factory):
    """A root, and the record of a run with loud=2 at AT of the stage that `greeting` has. Only to copy."""
    project, root = (tmp_path_factory.mktemp("greeted") / name for name in ("project", "root"))
    copy_project(project)
    write_greet(project)
    done = orchestrate(project, "run", "greet", "--root", str(root), "--at", AT, "-p", "loud=2", "--json")
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)[0]


def write_greet(project):
    write_stage(
        project,
        "greet",
        "print('hello')\nrecord(rows=len(name) * loud)",
        parameters='name: str = "nobody"  # whom\nloud: int = 1  # times\n',
        yml="parameters:\n  name: Ada\n",
    )


@pytest.fixture
def greeting(project, greeted, root):
    """A copy of the project with a stage `greet`, a root, and the record of a run of it with loud=2 at AT."""
    write_greet(project)
    shutil.copytree(greeted[0], root)
    return project, root, greeted[1]


def test_a_run_again_takes_what_was_recorded_and_then_what_is_given(greeting):
    project, root, first = greeting
    (project / "params" / "greet.yml").write_text("every: 5 seconds\ndeadline: 1 minute\nparameters:\n  name: Grace\n")
    again = ("run", "--root", root, "--from", first["run_id"], "-p", "loud=5")
    (second,) = json.loads(orchestrate(project, *again, "--json").stdout)
    assert (second["parent"], second["scheduled_for"], second["metrics"]["rows"]) == (first["run_id"], AT, 15)
    assert second["origins"]["name"] == f"run {first['run_id']}" and second["origins"]["loud"] == "command line"
    third = orchestrate(project, *again, "--at", "2026-03-02T00:00:00+00:00")
    assert third.returncode == 0 and "greet-20260302T000000" in third.stdout
    page = Root.at(root).read(f"{second['report']}/report.html").decode()  # made while the command came to its end
    assert all(text in page for text in ("← previous", "last ok", "usually", "was 6, +150.0 %")), page
    shown = {tuple(re.findall(r"[\w\"]+", line)) for line in third.stdout.splitlines()}
    assert {("parent", "loud", "2", "5"), ("today", "loud", "1", "5"), ("today", "name", "Grace", "Ada")} <= shown

    differences = json.loads(
        orchestrate(project, "runs", "diff", first["run_id"], second["run_id"], "--root", root, "--json").stdout
    )
    found = {(one["part"], one["name"]): (one["before"], one["after"]) for one in differences}
    assert found["parameters", "loud"] == (2, 5) and found["metrics", "rows"] == (6, 15)
    assert not {part for part, _ in found} - {"parameters", "metrics", "seconds"}
    told = orchestrate(project, "runs", "diff", first["run_id"], second["run_id"], "--root", root).stdout
    cause = told.partition(".")[0]  # comes first
    assert cause == f"{first['run_id']} ok, {second['run_id']} ok" and "What differs before: loud 2 → 5." in told
    assert "parameters" in told


def test_a_run_again_that_cannot_be_is_refused(greeting):
    project, root, first = greeting
    again = ("run", "--root", root, "--from")
    assert orchestrate(project, *again, "greet-none").returncode == 1
    assert orchestrate(project, "run", "query", *again[1:], first["run_id"]).returncode == 2
    assert orchestrate(project, "run").returncode == 2
    assert orchestrate(project, *again, first["run_id"], "-p", "loud=much").returncode == 2
    path = project / "notebooks" / "greet.ipynb"
    path.write_text(path.read_text().replace("loud", "volume"))
    done = orchestrate(project, *again, first["run_id"])
    assert done.returncode == 2 and "loud" in done.stderr and "no longer declares" in done.stderr
    assert len(Root.at(root).names("reports/greet/2026-03-01")) == 1


def test_what_is_ok_is_not_run_again_and_what_failed_is(greeting):
    project, root, first = greeting
    between = ("--from-time", AT, "--to-time", "2026-03-02T00:00:00", "--every", "1 day", "--each", "loud=2,3,2")
    done = orchestrate(project, "run", "greet", "--root", root, *between, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert (record["scheduled_for"], record["parameters"]["loud"], record["metrics"]["rows"]) == (AT, 3, 9)

    failed = {"run_id": "greet-20260301T120010-abcdef", "state": "failed", "started_at": datetime.now(UTC).isoformat()}
    index.append(Root.at(root), RunRecord(**first | failed))
    done = orchestrate(project, "repair", "--since", first["started_at"], "--root", root)
    assert done.returncode == 0, done.stderr
    line, end = done.stdout.splitlines()
    assert line.split()[:4] == ["1/1", "greet", "2026-03-01", "12:00:10"] and end == "1 ok"
    assert index.newest(Root.at(root), limit=1)[0]["state"] == "ok"
    done = orchestrate(project, "repair", failed["run_id"], "--root", root)
    assert (done.returncode, done.stdout) == (0, "nothing is left to repair\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("run", "query", "--to-time", "2026-03-01"), "go with --from-time"),
        (("run", "query", "--from-time", "2026-03-01", "--at", "2026-03-01"), "--at is one time"),
        (("run", "query", "--from-time", "2026-03-02", "--to-time", "2026-03-02"), "nothing is due"),
        (("run", "query", "--from-time", "2026-03-02", "--every", "1 dy"), "no duration"),
        (("run", "query", "--each", "rows_shown"), "name=value,value"),
        (("run", "query", "--each", "rows_shwon=1"), "did you mean 'rows_shown'"),
        (("run", "qeury", "--and-after"), "did you mean 'query'"),
        (("run", "--and-after", "--from", "x"), "stage that is named"),
        (("repair",), "name a run, or a time"),
    ],
)
def test_many_runs_that_are_asked_for_wrongly_are_refused(arguments, why, root):
    done = CliRunner().invoke(orchestrate_app, [*arguments, "--root", root])
    assert done.exit_code == 2 and why in " ".join(done.stderr.replace("│", " ").split()), done.output
    assert not Root.at(root).is_there()


def test_a_replay_exits_with_0_only_when_the_same_comes_out(greeting):
    project, root, first = greeting
    same = orchestrate(project, "replay", first["run_id"], "--root", root)
    assert same.returncode == 0 and "equal: " in same.stdout and "code unchanged" in same.stdout, same.stderr
    assert Root.at(project / "outputs/replay").names("") == [first["run_id"]]
    path = project / "notebooks" / "greet.ipynb"
    path.write_text(path.read_text().replace("len(name)", "1 + len(name)"))
    other = orchestrate(project, "replay", first["run_id"], "--root", root, "--json")
    found = json.loads(other.stdout)
    assert other.returncode == 1 and not found["equal"]
    assert found["differences"] == [{"part": "metrics", "name": "rows", "before": 6, "after": 7}]
    assert [one["name"] for one in found["changed"]] == ["notebook_sha256"]
    assert found["record"]["parent"] == first["run_id"]
    assert orchestrate(project, "replay", "greet-none", "--root", root).returncode == 1


def test_whence_names_the_run_and_its_report(greeting):
    project, root, first = greeting
    done = orchestrate(project, "whence", "runs@0", "--root", root, "--json")
    found = json.loads(done.stdout)
    assert (found["run_id"], found["state"], found["stage"]) == (first["run_id"], "ok", "greet")
    assert found["report"] == f"{root}/{first['report']}/report.html"
    assert first["run_id"] in orchestrate(project, "whence", "runs", "--root", root).stdout
    assert orchestrate(project, "whence", "runs@x", "--root", root).returncode == 2
    done = orchestrate(project, "whence", "runs@7", "--root", root)
    assert done.returncode == 1 and "no version 7 of runs" in done.stderr

    write_deltalake(f"{root}/lake/orders", pl.DataFrame({"k": [1]}))
    assert "orders@0  WRITE" in (text := orchestrate(project, "whence", "orders", "--root", root).stdout)
    assert "by no run" in text


def test_tail_prints_what_the_run_printed_and_exits_as_it_did(greeting):
    project, root, first = greeting
    done = orchestrate(project, "runs", "tail", first["run_id"], "--root", root)
    assert done.returncode == 0 and "hello" in done.stdout and "ok" in done.stdout, done.stderr
    write_stage(project, "broken", "print('before')\n1 / 0")
    (record,) = json.loads(orchestrate(project, "run", "broken", "--root", root, "--json").stdout)
    done = orchestrate(project, "runs", "tail", record["run_id"], "--root", root)
    assert done.returncode == 1 and "before" in done.stdout and "ZeroDivisionError: division" in done.stdout
    assert orchestrate(project, "runs", "tail", "greet-none", "--root", root).returncode == 1


def test_tail_follows_a_run_while_it_runs(project, root):
    write_stage(
        project,
        "patient",
        "import pathlib, time\nprint('first')\nwhile not pathlib.Path(root, 'go').exists(): time.sleep(0.05)",
        "print('second')",
    )
    options = {"cwd": project, "env": environment(project), "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "orchestrate.py"]
    with subprocess.Popen([*command, "run", "patient", "--root", root], **options) as running:
        spool = Root.at(project / "outputs" / "spool")
        while not (begun := spool.names("")) and running.poll() is None:
            time.sleep(0.05)
        assert running.stdout.readline() == f"new root {root}\n" and running.stdout.readline() == f"{begun[0]}\n"
        with subprocess.Popen([*command, "runs", "tail", "--root", root], **options) as tail:
            shown = iter(tail.stdout.readline, "")
            assert next(shown) == f"{begun[0]}\n" and "first\n" in shown
            (row,) = json.loads(orchestrate(project, "runs", "list", "--root", root, "--json").stdout)
            assert (row["run_id"], row["state"]) == (begun[0], "running")
            assert "running" in orchestrate(project, "runs", "show", begun[0], "--root", root).stdout
            Root.at(root).write("go", b"")
            assert "second\n" in shown
            assert tail.wait() == 0
        assert running.wait() == 0


def test_runs_are_listed_between_two_times(greeting):
    project, root, first = greeting
    began = first["started_at"]
    for bounds, expected in (
        (("--since", began), 1),
        (("--until", began), 0),
        (("--since", "2100-01-01"), 0),
        (("--since", "2026-01-01", "--until", "2100-01-01"), 1),
    ):
        done = orchestrate(project, "runs", "list", "--root", root, "--json", *bounds)
        assert len(json.loads(done.stdout)) == expected, bounds


def test_runs_can_be_read_on_a_narrow_terminal(greeting):
    """An id is there to be copied; a report that was swept is not opened; nothing is said by an empty table."""
    project, root, first = greeting
    narrow = {"COLUMNS": "60"}
    code = "import orchestrate, sys; from etl.cli import common; common.out.width = 60; sys.exit(orchestrate.app())"

    def narrowly(*arguments):
        options = {"cwd": project, "env": environment(project) | narrow, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "-c", code, *arguments, "--root", root], **options)

    words = " ".join(f"word-{n}" for n in range(150))
    long = {
        "run_id": "long-20260301T000000-abcdef",
        "stage": "long",
        "state": "failed",
        "reason": words,
        "report": "reports/long",
    }
    index.append(Root.at(root), RunRecord(**first | long))
    listed = narrowly("runs", "list").stdout
    assert re.search(rf"^greet +ok +[\d.]+ \w+ +[\d.]+ s  {first['run_id']}$", listed, re.M), listed
    assert re.search(r"^long +failed .*\n +word-0", listed, re.M)
    assert first["run_id"] in listed
    assert re.search(r"word-\d+…", listed) and "word-20" not in listed
    assert "word-149" in narrowly("runs", "show", "long").stdout
    shown = narrowly("runs", "show", first["run_id"]).stdout
    assert re.search(r"^parameters +root", shown, re.M) and re.search(r"^ +name  Ada", shown, re.M), shown
    assert narrowly("runs", "list", "--state", "cancelled").stdout == f"no such runs under {root}\n"
    assert narrowly("runs", "list", "--state", "canceled").returncode == 2
    Root.at(root).remove_tree(first["report"])
    done = narrowly("runs", "open", first["run_id"])
    assert done.returncode == 1 and "was swept" in done.stderr.replace("\n", " ")


def test_a_sweep_says_what_it_did(greeting):
    project, root, first = greeting
    done = orchestrate(project, "runs", "sweep", "--root", root, "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert Root.at(root).exists(f"{first['report']}/report.ipynb"), "the only run, so the slowest"


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


def test_a_notebook_that_is_no_stage_disturbs_no_command_that_does_not_run_it(greeting):
    project, root, first = greeting
    for name in ("Untitled", "_scratch", "draft"):
        (project / "notebooks" / f"{name}.ipynb").write_text("no JSON")
    assert orchestrate(project, "plan").returncode == 0
    (project / "params" / "query.yml").write_text("every: never\n")  # these only read the root
    (project / "params/env/local.yml").write_text(f"root: {root}\nmachine: null\ndask: null\n")
    for command in (("runs", "list"), ("runs", "show", first["run_id"]), ("quarantine", "list"), ("runs", "sweep")):
        done = orchestrate(project, *command)
        assert (done.returncode, done.stderr) == (0, ""), (command, done.stderr)
    done = orchestrate(project, "run", "greet", "--root", root)
    assert done.returncode == 0, done.stderr
    done = orchestrate(project, "run", "draft", "--root", root)
    assert done.returncode == 2 and "notebooks/draft.ipynb: there is no params/draft.yml" in done.stderr
    done = orchestrate(project, "check")
    assert done.returncode == 2 and "draft.ipynb: there is no params/draft.yml" in done.stderr
    assert "Untitled" not in done.stderr and "_scratch" not in done.stderr


def test_a_root_that_is_not_there_is_said_to_be_not_there(project, tmp_path):
    """And nothing makes it; `run` says that it is new."""
    for command in (
        ("runs", "list"),
        ("runs", "list", "--json"),
        ("runs", "show", "x"),
        ("runs", "diff", "x", "y"),
        ("runs", "sweep"),
        ("runs", "open", "x"),
        ("quarantine", "list"),
        ("quarantine", "retry", "x"),
        ("whence", "orders"),
        ("promote", "orders", "o_channel"),
        ("replay", "x"),
        ("run", "--from", "x"),
        ("rebuild",),
        ("backup", "x"),
    ):
        done = CliRunner().invoke(orchestrate_app, [*command, "--root", f"{tmp_path}/mistyped"])
        assert (done.exit_code, done.stdout) == (1, ""), command
        assert f"root {tmp_path}/mistyped: it is not there" in done.stderr.replace("\n", ""), (command, done.stderr)
    done = CliRunner().invoke(orchestrate_app, ["quarantine", "list", "--root", str(tmp_path)])
    assert done.exit_code == 1 and "no stage has run there yet" in done.stderr
    for folder, problem in (("mistyped", "it is not there"), ("", "no stage has run there yet")):
        done = CliRunner().invoke(orchestrate_app, ["doctor", "--root", f"{tmp_path}/{folder}", "--json"])
        (wrong,) = [one for one in json.loads(done.stdout)["findings"] if one["what"].startswith("root ")]
        assert done.exit_code == 1 and wrong["problem"] == problem and "run all" in wrong["remedy"]
    assert not (tmp_path / "mistyped").exists()

    write_stage(project, "greet", "print('hello')")
    done = orchestrate(project, "run", "greet", "--root", f"{tmp_path}/new [a]")
    assert done.stdout.startswith(f"new root {tmp_path}/new [a]\n")
    done = orchestrate(project, "run", "greet", "--root", f"{tmp_path}/newer", "--json")
    (record,) = json.loads(done.stdout)
    assert done.stderr == f"new root {tmp_path}/newer\n{record['run_id']}\n" and record["state"] == "ok"
    assert "new root" not in orchestrate(project, "run", "greet", "--root", f"{tmp_path}/newer").stdout


def test_a_root_in_a_store_that_cannot_be_asked_is_a_sentence(project, s3_server):
    write_stage(project, "greet", "print('hello')")
    with_store = s3_variables(s3_server)
    stranger = with_store | {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    unknown, mistyped = (
        "s3://mistyped/etl cannot be reached: Unable to locate credentials\n",
        "there is no such bucket\n",
    )
    for command in (["run", "greet"], ["run", "all"], ["up"]):
        done = orchestrate(project, *command, "--root", "s3://mistyped/etl", env=with_store)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(mistyped), (command, done.stderr)
    for command in (["run", "greet"], ["runs", "list"], ["status"], ["doctor"], ["digest"], ["up"]):
        done = orchestrate(project, *command, "--root", "s3://mistyped/etl", env=stranger)
        assert done.returncode == (1 if command == ["up"] else 2) and done.stdout == "", (command, done.stderr)
        assert done.stderr.removeprefix("`up` cannot begin: ") == unknown, (command, done.stderr)


def test_where_there_are_no_runs_the_roots_that_have_some_are_named(project):
    """As after `make demo`, which fills another root than the one that `runs list` reads."""
    write_stage(project, "greet", "print('hello')")
    orchestrate(project, "run", "greet", "--env", "dev")
    done = orchestrate(project, "runs", "list")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"no runs under {project}/outputs",
        f"{project}/outputs/dev has runs: python orchestrate.py runs list --env dev",
    ]
    done = orchestrate(project, "runs", "tail")
    assert done.returncode == 1 and f"{project}/outputs/dev has runs" in done.stderr
    done = orchestrate(project, "runs", "list", "--root", "output")
    assert (
        done.returncode == 1 and f"root {project}/output: it is not there" in done.stderr and "--env dev" in done.stderr
    )
    assert "greet-" in orchestrate(project, "runs", "list", "--env", "dev").stdout


def test_the_command_line_finds_the_projects_own_python(project, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    command = [str(tmp_path / "bare/bin/python"), "orchestrate.py", "runs", "list", "--root", "nowhere at all"]

    def barely():
        return subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)

    done = barely()
    assert done.returncode == 2 and "has no package" in done.stderr and "`make setup`" in done.stderr
    (project / ".venv").symlink_to(tmp_path / "bare")  # set up by half
    assert barely().returncode == 2
    (project / ".venv").unlink()
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project / ".venv/bin/python").chmod(0o755)
    done = barely()
    assert done.returncode == 1 and f"root {project}/nowhere at all: it is not there" in done.stderr, done.stderr


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01"])
def test_a_time_that_is_none_is_refused(project, when):
    assert orchestrate(project, "run", "query", "--at", when).returncode == 2


def test_doctor_names_a_damaged_model_a_wrong_package_and_a_taken_port(project, filled):
    Root.at(filled).write("models/current.json", b"{}")
    (project / "pyproject.toml").write_text(
        '[project]\ndependencies = ["polars==0.1", "no-such-thing-at-all", "typer"]\n'
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = [f"--{name}-port={free_port()}" for name in ("prefect", "dashboard")]
        done = orchestrate(project, "doctor", "--root", filled, f"--api-port={port}", *free, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    wrong = {one["what"]: one["problem"] for one in found["findings"] if one["problem"]}
    assert set(wrong) == {"the model", "polars==0.1", "no-such-thing-at-all", f"port {port}"}
    assert "the answers" in {finding["what"] for finding in found["findings"]}
    assert "is installed" in wrong["polars==0.1"]
    assert all(one["remedy"] for one in found["findings"] if one["problem"])


def test_what_was_refused_is_listed_shown_and_tried_again_and_the_lake_rebuilt(filled):
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(orchestrate_app, [*arguments, "--root", filled])
        return done.exit_code, done.stdout

    Root.at(filled).write("landing/orders/orders-00000009.json", b"\x1f\x8b")
    ingest_all(filled)
    (listed,) = json.loads(run("quarantine", "list", "--json")[1])
    assert (listed["file"], listed["lines"]) == ("orders/orders-00000009.json", None)
    assert "is damaged gzip" in run("quarantine", "show", listed["file"])[1]
    assert "landing/orders/orders-00000009.json" in run("quarantine", "retry", listed["file"])[1]
    assert run("quarantine", "retry", "orders-1.json")[0] == 1
    again = json.loads(run("rebuild", "--json")[1])
    assert all(row["equal"] for row in again) and sum(row["rows"] for row in again) > 10_000


def test_a_root_is_copied_and_restored(filled, tmp_path):
    def run(*arguments: str, root: str = filled) -> tuple[int, str, str]:
        done = CliRunner().invoke(orchestrate_app, [*arguments, "--root", root])
        return done.exit_code, done.stdout, done.stderr

    target, other = str(tmp_path / "a copy"), str(tmp_path / "other")
    made = json.loads(run("backup", target, "--json")[1])
    assert made["written"] == made["files"] and made["tables"]["lake/orders"]["rows"] > 1000
    status, said, _ = run("backup", target, "--verify")
    assert status == 0 and "batch 1, " in said and "files were written" in said
    assert [point["batch"] for point in json.loads(run("restore", target, "--list", "--json")[1])] == [1, 1]
    assert made["point"] in run("restore", target, "--list")[1]
    status, said, _ = run("restore", target, root=other)
    assert status == 0 and said.startswith(f"{other} is as it was at ") and not Root.at(other).names("restoring")
    assert run("quarantine", "list", root=other)[0] == 0
    status, _, why = run("restore", target, root=other)
    assert status == 1 and "has lake already: nothing was changed. `restore --force` moves it aside" in why
    moved = json.loads(run("restore", target, "--force", "--json", root=other)[1])["moved"]
    assert [name.partition("-before-")[0] for name in moved] == ["lake"]
    for arguments, expected, word in (
        (("restore", target, "--as-of", "2000-01-01"), 1, "there is no backup"),
        (("restore", target, "--as-of", "yesterday"), 2, "is not a time"),
        (("restore", str(tmp_path / "nothing")), 1, "there is no backup"),
        (("backup", f"{other}/inside"), 1, "would be lost with it"),
        (("backup", "nowhere://x"), 2, "there is no store"),
    ):
        status, _, why = run(*arguments, root=other)
        assert status == expected and word in " ".join(why.split()), (arguments, status, why)


def test_refused_lines_are_written_as_they_came(filled):
    lines = [b"{\xff\xfe", b"{\\xff", b"x" * 5000]
    Root.at(filled).write("landing/orders/orders-00000009.json", b"\n".join(lines))
    good = Root.at(filled).files("archive")
    first = next(Root.at(filled).read(path) for path in good if "orders-00000001" in path).splitlines()[0]
    changed = re.sub(rb'"o_orderkey": ?\d+', b'"o_orderkey":999999999', first)
    Root.at(filled).write("landing/orders/orders-00000009.json", b"\n".join([changed, *lines]))
    ingest_all(filled)
    done = CliRunner().invoke(
        orchestrate_app, ["quarantine", "show", "--raw", "orders-00000009.json", "--root", filled]
    )
    assert done.stdout_bytes == b"".join(line + b"\n" for line in lines[:2])
    assert done.exit_code == 1 and "1 of its lines are not kept as they came" in done.stderr


def test_up_says_a_line_a_minute_and_what_went_wrong_at_once(monkeypatch, capsys):
    def ended(stage, state="ok", reason="", rows=None):
        about = {"run_id": f"{stage}-1", "root": "/r", "scheduled_for": AT, "attempt": 1, "parameters": {}}
        about |= {"origins": {}, "report": "reports/x", "host": "here", "started_at": AT, "metrics": {"rows": rows}}
        return RunRecord(stage=stage, state=state, reason=reason, **about)

    monkeypatch.setattr(printing.out, "width", 80)
    monkeypatch.setattr(printing.out, "_file", io.StringIO())
    minutes = printing.Minutes(lambda run_id: f"http://here/reports/{run_id}")
    for record in (ended("generate", rows=1500), ended("generate", rows=500), ended("preprocess", "noop", "no files")):
        minutes(record)
    assert printing.out.file.getvalue() == ""
    minutes(ended("query", "failed", "ValueError: no such column"))
    at_once = printing.out.file.getvalue()
    assert "ValueError: no such column" in at_once and "http://here/reports/query-1" in at_once
    minutes.tell()
    line = " ".join(printing.out.file.getvalue().removeprefix(at_once).split())
    assert line[9:] == "generate 2 ok, 2,000 rows · preprocess noop · query failed"
    minutes.tell()  # a minute without any says nothing
    assert " ".join(printing.out.file.getvalue().removeprefix(at_once).split()) == line


def test_what_up_warns_of_is_one_line_and_its_log_has_the_traceback(tmp_path, monkeypatch):
    root, told = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr("etl.cli.up.err", Console(file=told, width=200))
    up._log_to_terminal()
    up._log_to_file(tmp_path / "up.log")
    try:
        raise ConnectionError("nobody\nlistens")
    except ConnectionError:
        for name in ("etl.serve", "deltalake", "websockets.client", "prefect.events"):
            logging.getLogger(name).error("it failed", exc_info=True)
    root.handlers[1].close()
    shown = [line.split(maxsplit=1)[-1].strip() for line in told.getvalue().splitlines()]
    assert [line.removeprefix("ERROR").strip() for line in shown] == [
        "etl.serve: it failed: ConnectionError: nobody",
        "deltalake: it failed: ConnectionError: nobody",
    ]
    assert (tmp_path / "up.log").read_text().count("Traceback") == 4
