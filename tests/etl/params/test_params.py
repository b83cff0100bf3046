import ast
import datetime
import keyword
import math
import subprocess
import sys
from datetime import date

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from params_cases import BAD_VALUES, CELL, GOOD_VALUES, LOCAL, STAGE, notebook

from etl.params import ParamsError, environment, environments, injected_cell_source, load, without_yaml
from etl.params.retention import Rules


@pytest.fixture
def project(tmp_path):
    """Writes files by path (notebooks by the text of their parameters cell), beside one whole stage."""

    def write(files=()):
        first = {
            "notebooks/preprocess.ipynb": CELL,
            "params/preprocess.yml": STAGE + "  max_files: 500\n",
            "params/env/local.yml": LOCAL,
        }
        for path, text in {**first, **dict(files)}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            whole = notebook(text) if path.endswith(".ipynb") and not text.startswith("{") else text
            (tmp_path / path).write_text(whole, encoding="utf-8")
        return tmp_path

    return write


def problems(folder, *args, **kwargs):
    with pytest.raises(ParamsError) as caught:
        load(folder, *args, **kwargs)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("text", "message"), BAD_VALUES.items())
def test_bad_value_is_named_with_file_and_line(project, text, message):
    folder = project({"params/preprocess.yml": f"# why\n{STAGE}  {text}\n"})
    line = 6 if "stream end" in message else 5
    assert problems(folder) == [f"params/preprocess.yml:{line}: {message}"]


def test_the_line_inside_a_long_value(project):
    folder = project(
        {
            "params/preprocess.yml": STAGE
            + "  weights:\n    a: 1\n    b: lots\n  names:\n    - x\n    - 5\n  nested: {a: [1, x]}\n"
        }
    )
    assert problems(folder) == [
        "params/preprocess.yml:6: weights: expected dict[str, float], got str 'lots' in weights['b']",
        "params/preprocess.yml:9: names: expected list[str], got int 5 in names[1]; put text in quotes",
        "params/preprocess.yml:10: nested: expected dict[str, list[int | None]], got str 'x' in nested['a'][1]",
    ]


BAD_FILES = {
    "": ["1: missing 'deadline'", "1: missing 'every' (or 'cron')"],
    "[1]": ["1: expected key: value lines, got list [1]"],
    "deadline: 1 minute\nevery: 1 minute\ncron: 0 * * * *\n": ["3: give every or cron, not both"],
    "deadline: 1 minute\nevry: 1 minute\n": [
        "1: missing 'every' (or 'cron')",
        "2: unknown key 'evry'; did you mean 'every'?",
    ],
    "every: 60\ndeadline: soon\n": [
        '1: every: expected a duration such as "30 seconds", "1 minute" or "6 hours", got int 60',
        "2: deadline: expected a duration such as \"50 seconds\", got str 'soon'",
    ],
    "every: 0 seconds\ndeadline: 3 fortnights\n": [
        '1: every: expected a duration such as "30 seconds", "1 minute" or "6 hours", got str \'0 seconds\'',
        "2: deadline: expected a duration such as \"50 seconds\", got str '3 fortnights'",
    ],
    "deadline: 1 minute\ncron: 0 * * *\n": [
        "2: cron: expected five plain fields such as \"0 * * * *\", got str '0 * * *'"
    ],
    "deadline: 1 minute\ncron: 0 0 30 2 *\n": [
        "2: cron: expected five plain fields such as \"0 * * * *\", got str '0 0 30 2 *'"
    ],
    "deadline: 1 minute\ncron: 61 * * * *\n": [
        "2: cron: expected five plain fields such as \"0 * * * *\", got str '61 * * * *'"
    ],
    "deadline: 1 minute\ncron: 0 0 */2 * 1\n": [
        "2: cron: expected five plain fields such as \"0 * * * *\", got str '0 0 */2 * 1'"
    ],
    "every: 1 day\ndeadline: 1 day\noverlap: both\nretries: -1\n": [
        "3: overlap: expected skip or queue, got str 'both'",
        "4: retries: expected a whole number from 0, got int -1",
    ],
    "every: 1 day\ndeadline: 1 day\nmemory: 4096\n": [
        '3: memory: expected a size such as "500 MB" or "4 GB", got int 4096'
    ],
    "every: 1 day\ndeadline: 1 day\nmemory: 0 GB\n": [
        '3: memory: expected a size such as "500 MB" or "4 GB", got str \'0 GB\''
    ],
    "every: 1 day\ndeadline: 1 day\nparameters: [max_files]\n": [
        "3: parameters: expected name: value lines, got list ['max_files']"
    ],
    "every: 1 day\ndeadline: 1 day\nevery: 2 days\n": ["3: 'every' is set twice, first in line 1"],
    "every: 1 day\n\tdeadline: 1 day\n": [
        "2: not YAML: found character '\\t' that cannot start any token",
    ],
    "every: 1 day\ndeadline: 1 day\n---\nretries: 1\n": ["3: not YAML: but found another document"],
}


@pytest.mark.parametrize(("text", "messages"), BAD_FILES.items())
def test_bad_stage_file(project, text, messages):
    folder = project({"params/preprocess.yml": text})
    assert problems(folder) == [f"params/preprocess.yml:{message}" for message in messages]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"every: \xff\xfe", "invalid start byte"),
        (b"every: \x00", "special characters are not allowed"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (
            b"every: 1 day\ndeadline: 1 day\nparameters: {max_files: " + b"9" * 5000 + b"}",
            "max_files: expected int, got str '999",
        ),
    ],
)
def test_bytes_that_are_no_yaml(project, content, message):
    folder = project()
    (folder / "params/preprocess.yml").write_bytes(content)
    assert message in problems(folder)[0]


@pytest.mark.parametrize(("text", "values"), GOOD_VALUES)
def test_good_value_is_taken(project, text, values):
    stage = load(project({"params/preprocess.yml": f"{STAGE}  {text}\n"})).stages["preprocess"]
    assert {name: stage.values[name] for name in values} == values
    assert all(type(stage.values[name]) is type(value) for name, value in values.items())
    origins = {name: "params/preprocess.yml:4" if name in values else "notebook default" for name in stage.values}
    assert stage.origins == origins


def test_a_whole_stage(project):
    text = "cron: 30 6 * * mon-fri\noverlap: queue\ndeadline: 1.5 hours\nretries: 2\nmemory: 1.5 GB\n"
    folder = project({"params/preprocess.yml": text})
    loaded = load(folder)
    stage = loaded.stages["preprocess"]
    assert (stage.every_s, stage.cron, stage.overlap) == (None, "30 6 * * mon-fri", "queue")
    assert (stage.deadline_s, stage.retries, stage.machine, stage.dask) == (5400, 2, None, None)
    assert (stage.memory_mb, stage.secrets) == (1500, ("API_KEY",))
    assert stage.supplied == {"root", "run_id", "scheduled_for"}
    assert not stage.supplied & stage.values.keys()
    assert list(stage.values)[:3] == ["max_files", "max_bad_share", "dry"]
    assert stage.values["until"] == date(2026, 1, 31)
    assert stage.help["max_files"] == "oldest first"
    assert stage.notebook_path == folder / "notebooks/preprocess.ipynb"
    assert stage.params_path.exists()
    assert (loaded.environment.root, loaded.environment.retention) == ("outputs", Rules())


BAD_CELLS = {
    "x: int = 5": "x: needs a comment behind it that says what it means",
    "x = 5  # c": "x: needs a type",
    "x: int  # c": "x: needs a literal as its default",
    "x: int = 2 * 3  # c": "x: needs a literal as its default",
    "x: str = os.getcwd()  # c": "x: needs a literal as its default",
    "x: datetime.date = datetime.date.today()  # c": "x: needs a literal as its default",
    "x: datetime.date = datetime.date(2026, 2, 30)  # c": "x: needs a literal as its default",
    "x: datetime.date = datetime.date('2026', 2, 3)  # c": "x: needs a literal as its default",
    "x: datetime.date = '2026-01-01'  # c": "x: expected datetime.date, got str '2026-01-01'",
    "x: int = '5'  # c": "x: expected int, got str '5'",
    "x: int = True  # c": "x: expected int, got bool True",
    "x: int = None  # c": "x: expected int, got null",
    "x: list[int] = (1, 2)  # c": "x: expected list[int], got tuple (1, 2)",
    "x: dict[str, int] = {1: 1}  # c": "x: expected dict[str, int], got int 1 in x[1]",
    "x: Literal['a'] = 'b'  # c": "x: expected Literal['a'], got str 'b'",
    "x: Path = 'a'  # c": "x: needs a type",
    "x: list = []  # c": "x: needs a type",
    "x: int | str = 5  # c": "x: needs a type",
    "x: dict[int, int] = {}  # c": "x: needs a type",
    "x: list[Secret] = []  # c": "x: needs a type",
    "x: Secret = 'hunter2'  # c": "x: expected the name of a secret, such as API_KEY; its value belongs in no file",
    "Secret: str = 'A'  # c": "Secret: a parameter cannot have this name",
    "x: Literal[1.5] = 1.5  # c": "x: needs a type",
    "x: Literal[f()] = 1  # c": "x: needs a type",
    "x: 'int' = 5  # c": "x: needs a type",
    "import os  # c": "only lines of `name: type = literal  # meaning` belong in this cell",
    "print(5)  # c": "only lines of `name: type = literal  # meaning` belong in this cell",
    "x.y: int = 5  # c": "only lines of `name: type = literal  # meaning` belong in this cell",
    "for i in []: pass  # c": "only lines of `name: type = literal  # meaning` belong in this cell",
    "x: int = = 5  # c": "not Python: invalid syntax",
    "%matplotlib inline": "not Python: invalid syntax",
    "_x: int = 5  # c": "_x: a parameter cannot have this name",
    "date: date | None = None  # c": "date: a parameter cannot have this name",
    "a: int = 1; b: int = 2  # c": "b: one parameter a line",
    "root: int = 5  # c": "root: is supplied as text, its type is str or str | None",
}


@pytest.mark.parametrize(("line", "message"), BAD_CELLS.items())
def test_bad_cell_is_named_with_its_line(project, line, message):
    folder = project(
        {
            "notebooks/preprocess.ipynb": f"good: int = 5  # c\n# a remark\n{line}\n",
            "params/preprocess.yml": STAGE,
        }
    )
    found = problems(folder)
    assert len(found) == 1
    assert found[0].startswith(f"notebooks/preprocess.ipynb (parameters cell, line 3): {message}")


def test_a_default_may_run_over_several_lines(project):
    cell = 'x: dict[str, int] = {\n    "a": 1,\n}  # by table\ny: list[int] = [  # of rows\n    1,\n]\n'
    stage = load(project({"notebooks/preprocess.ipynb": cell, "params/preprocess.yml": STAGE})).stages["preprocess"]
    assert stage.values == {"x": {"a": 1}, "y": [1]}
    assert stage.help == {"x": "by table", "y": "of rows"}


def test_the_cell_is_not_executed(project, tmp_path):
    spy = f"x: int = open({str(tmp_path / 'spy')!r}, 'w').write('')  # c\n"
    assert len(problems(project({"notebooks/preprocess.ipynb": spy, "params/preprocess.yml": STAGE}))) == 1
    assert not (tmp_path / "spy").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not a notebook"),
        ("{}", "not a notebook"),
        ('{"cells": 5}', "not a notebook"),
        (notebook(), "needs one code cell tagged `parameters`, has 0"),
        (notebook(CELL, CELL), "needs one code cell tagged `parameters`, has 2"),
    ],
)
def test_notebook_without_a_readable_cell(project, text, message):
    [found] = problems(project({"notebooks/preprocess.ipynb": text}))
    assert found.startswith(f"notebooks/preprocess.ipynb: {message}")


def test_everything_at_once(project):
    folder = project(
        {
            "notebooks/preprocess.ipynb": CELL + "bad: int = '5'  # c\nimport os\nworse = 5\n",
            "params/preprocess.yml": "every: 1 minute\ndedline: 5 seconds\nparameters:\n  max_flies: 1\n  bad: x\n",
            "params/env/local.yml": "rot: outputs\nstages:\n  preproces: {}\n  preprocess:\n    parameters: {dry: 5}\n",
            "params/qury.yml": STAGE,
            "notebooks/query.ipynb": CELL,
        }
    )
    assert problems(folder, overrides=["max_files=x", "nope=1"]) == [
        "-p max_files: max_files: expected int, got str 'x'",
        "-p nope: unknown parameter 'nope'",
        "notebooks/preprocess.ipynb (parameters cell, line 20): bad: expected int, got str '5'",
        "notebooks/preprocess.ipynb (parameters cell, line 21): only lines of `name: type = literal  # meaning` "
        "belong in this cell",
        "notebooks/preprocess.ipynb (parameters cell, line 22): worse: needs a comment behind it that says what it "
        "means",
        "notebooks/preprocess.ipynb (parameters cell, line 22): worse: needs a type, one of int, float, bool, str, "
        "datetime.date, Secret, list[...], dict[str, ...], Literal[...], each also | None",
        "params/env/local.yml:1: missing 'root'",
        "params/env/local.yml:1: unknown key 'rot'; did you mean 'root'?",
        "params/env/local.yml:3: unknown stage 'preproces'; did you mean 'preprocess'?",
        "params/env/local.yml:5: dry: expected bool, got int 5",
        "params/preprocess.yml:1: missing 'deadline'",
        "params/preprocess.yml:2: unknown key 'dedline'; did you mean 'deadline'?",
        "params/preprocess.yml:4: unknown parameter 'max_flies'; did you mean 'max_files'?",
        "params/preprocess.yml:5: bad: expected int, got str 'x'",
        "params/qury.yml: there is no notebooks/qury.ipynb; did you mean 'query'?",
    ]


# --- environments ---


def test_env_overrides(project):
    env = """\
root: s3://bucket/prefix
machine: {vm_type: t3.medium}
dask: {n_workers: 2}
retention: {days: 7}
stages:
  preprocess:
    cron: "*/5 * * * *"
    deadline: 5 seconds
    memory: 500 MB
    machine: null
    parameters:
      max_files: 7
  query:
    dask: {address: "tcp://127.0.0.1:8786"}
"""
    folder = project(
        {
            "params/env/fast.yml": env,
            "notebooks/query.ipynb": CELL,
            "params/query.yml": STAGE,
            "params/preprocess.yml": STAGE + "  max_files: 5\n  dry: true\n",
        }
    )
    loaded = load(folder, "fast", overrides=["dry=false"])
    preprocess, query = loaded.stages["preprocess"], loaded.stages["query"]
    assert (loaded.environment.name, loaded.environment.root) == ("fast", "s3://bucket/prefix")
    assert (preprocess.every_s, preprocess.cron, preprocess.deadline_s) == (None, "*/5 * * * *", 5)
    assert (query.every_s, query.cron, query.deadline_s) == (60, None, 50)
    assert (preprocess.memory_mb, query.memory_mb, loaded.environment.retention) == (500, None, Rules(days=7))
    assert (preprocess.machine, query.machine) == (None, {"vm_type": "t3.medium"})
    assert (preprocess.dask, query.dask) == ({"n_workers": 2}, {"address": "tcp://127.0.0.1:8786"})
    assert (preprocess.values["max_files"], query.values["max_files"]) == (7, 500)
    assert preprocess.origins["max_files"] == "params/env/fast.yml:12"
    assert (preprocess.values["dry"], preprocess.origins["dry"]) == (False, "command line")
    assert load(folder).stages["preprocess"].values["max_files"] == 5
    assert environments(folder) == ["fast", "local"]


DASK = "2: dask: expected null, {n_workers: 1 or more}, {address: tcp://host:port} or {coiled: {...}}"
BAD_ENVS = {
    "root: ''": "1: root: expected a folder or a URL, got str ''",
    "root: ~": "1: root: expected a folder or a URL, got null",
    "root: $HOME/lake": "1: root: '$HOME/lake': variables such as $HOME are not filled in: write the folder itself, "
    "or ~",
    "root: s3:/bucket": "1: root: 's3:/bucket': a URL begins with s3://",
    "root: 5": "1: root: expected a folder or a URL, got int 5",
    "root: o\nmachine: big": "2: machine: expected null or key: value lines, got str 'big'",
    "root: o\ndask: 2": f"{DASK}, got int 2",
    "root: o\ndask: {address: nonsense}": f"{DASK}, got dict {{'address': 'nonsense'}}",
    "root: o\ndask: {address: 'http://host:8787'}": f"{DASK}, got dict {{'address': 'http://host:8787'}}",
    "root: o\ndask: {n_workers: 0}": f"{DASK}, got dict {{'n_workers': 0}}",
    "root: o\ndask: {n_workers: true}": f"{DASK}, got dict {{'n_workers': True}}",
    "root: o\ndask: {n_workers: 1, address: x}": f"{DASK}, got dict {{'n_workers': 1, 'address': 'x'}}",
    "root: o\nstages: [preprocess]": "2: stages: expected a stage's name and, under it, what to override, got list "
    "['preprocess']",
    "root: o\nstages:\n  preprocess: 5": "3: stages: expected a stage's name and, under it, what to override, got int "
    "5",
    "root: o\nstages:\n  preprocess:\n    deadlin: 5": "4: unknown key 'deadlin'; did you mean 'deadline'?",
    "root: o\nstages:\n  preprocess:\n    retries: 5": "4: unknown key 'retries'",
    "root: o\nstages:\n  preprocess:\n    every: 1 day\n    cron: 0 * * * *": "5: give every or cron, not both",
    "root: o\nstages:\n  preprocess:\n    every: 5": '4: every: expected a duration such as "30 seconds", "1 minute" '
    'or "6 hours", got int 5',
    "root: o\nstages:\n  preprocess:\n    parameters: {root: x}": "4: root is supplied by the runner; it comes from "
    "the env file or --root",
    "root: o\nretention:\n  days: long": "3: retention: expected numbers from 0 for all_hours, hourly_days, page_days "
    "and days, true or false for daily and slowest, got str 'long'",
    "root: o\nretention: forever": "2: retention: expected numbers from 0 for all_hours, hourly_days, page_days and "
    "days, true or false for daily and slowest, got str 'forever'",
    "root: o\nretention: {day: 7}": "2: unknown key 'day'; did you mean 'days'?",
    "root: o\nbase: local": "2: unknown key 'base'",
    "root: o\nmachine: {{ here }}": "2: a key here is not text; put it in quotes",
}


@pytest.mark.parametrize(("text", "message"), BAD_ENVS.items())
def test_bad_env_file(project, text, message):
    assert problems(project({"params/env/local.yml": text + "\n"})) == [f"params/env/local.yml:{message}"]


def test_unknown_env(project):
    assert problems(project(), "locl") == ["params/env/locl.yml: no such environment; did you mean 'local'?"]
    assert problems(project(), "../preprocess") == ["params/env/../preprocess.yml: no such environment"]


# --- the command line ---


@pytest.fixture
def two_stages(project):
    return project(
        {
            "notebooks/query.ipynb": 'limit: int = 5  # rows\nname: str = ""  # of it\n',
            "params/query.yml": "every: 1 hour\ndeadline: 1 minute\n",
        }
    )


def test_override_goes_to_every_stage_that_declares_it(two_stages):
    stages = load(two_stages, overrides=["limit=9", "max_files=3", "query.name=a"]).stages
    assert (stages["query"].values["limit"], stages["preprocess"].values["limit"]) == (9, 9)
    assert stages["preprocess"].values["max_files"] == 3
    assert stages["query"].origins == {"limit": "command line", "name": "command line"}


def test_override_of_one_stage_and_the_last_one_wins(two_stages):
    stages = load(two_stages, overrides=["limit=9", "query.limit=10", "query.limit=11"]).stages
    assert (stages["query"].values["limit"], stages["preprocess"].values["limit"]) == (11, 9)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("market=a=b", "market", "a=b"),
        ("market='5'", "market", "5"),
        ("market=$(reboot)", "market", "$(reboot)"),
        ("day=2026-01-05", "day", date(2026, 1, 5)),
        ("day=null", "day", None),
        ("names=[a, b]", "names", ["a", "b"]),
        ("weights={a: 2}", "weights", {"a": 2.0}),
        ("preprocess.dry=true", "dry", True),
    ],
)
def test_override_values_are_yaml(project, override, name, value):
    assert load(project(), overrides=[override]).stages["preprocess"].values[name] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_flies=3", "-p max_flies: unknown parameter 'max_flies'; did you mean 'max_files'?"),
        ("max_files=x", "-p max_files: max_files: expected int, got str 'x'"),
        ("max_files=", "-p max_files: max_files: expected int, got null"),
        ("max_files", "-p max_files: expected name=value or stage.name=value"),
        ("=5", "-p : expected name=value or stage.name=value"),
        ("qury.limit=5", "-p qury.limit: unknown stage 'qury'; did you mean 'query'?"),
        ("query.max_files=5", "-p query.max_files: unknown parameter 'max_files'"),
        ("query.limi=5", "-p query.limi: unknown parameter 'limi'; did you mean 'limit'?"),
        ("root=/tmp", "-p root: root is supplied by the runner; it comes from the env file or --root"),
        ("limit=[5", "-p limit: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("limit=!!int 5", "-p limit: not YAML: anchors, aliases and tags are not used here"),
        ("market=\udcff", "-p market: not YAML: special characters are not allowed"),
    ],
)
def test_bad_override(two_stages, override, message):
    assert problems(two_stages, overrides=[override]) == [message]


def test_one_stage_is_not_stopped_by_another(two_stages, project):
    project({"params/preprocess.yml": "every: never\n", "notebooks/Untitled.ipynb": "{}"})
    assert list(load(two_stages, stage="query").stages) == ["query"]
    assert len(problems(two_stages)) == 2
    assert problems(two_stages, stage="qery") == ["command line: unknown stage 'qery'; did you mean 'query'?"]
    assert problems(two_stages, stage="Untitled") == ["notebooks/Untitled.ipynb: there is no params/Untitled.yml"]


def test_a_notebook_without_its_yaml_is_no_stage_and_stops_none(two_stages, project):
    names = ("Untitled", "Untitled1", "_scratch", ".hidden", "draft", "query-Copy1")
    project({f"notebooks/{name}.ipynb": "{no JSON" for name in names})
    assert list(load(two_stages).stages) == ["preprocess", "query"]
    assert [str(problem) for problem in without_yaml(two_stages)] == [
        "notebooks/draft.ipynb: there is no params/draft.yml",
        "notebooks/query-Copy1.ipynb: there is no params/query-Copy1.yml",
    ]
    assert problems(two_stages, stage="draft") == ["notebooks/draft.ipynb: there is no params/draft.yml"]


def test_an_environment_is_read_without_any_stage(two_stages, project):
    env = "root: somewhere\nstages:\n  gone:\n    deadline: 1 minute\n"
    project({"notebooks/query.ipynb": "{no JSON", "params/query.yml": "every: never\n", "params/env/local.yml": env})
    assert environment(two_stages).root == "somewhere"
    with pytest.raises(ParamsError, match="no such environment; did you mean 'local'"):
        environment(two_stages, "locl")


# --- discovery and order ---


def test_stages_go_from_the_shortest_cadence_to_the_longest(project):
    cadences = {
        "generate": "every: 30 seconds",
        "preprocess": "every: 1 minute",
        "quarter": 'cron: "*/15 * * * *"',
        "compact": "every: 30 minutes",
        "query": "every: 1 hour",
        "report": 'cron: "0 * * * *"',  # as often as query: by name
        "train": "every: 6 hours",
        "nightly": 'cron: "0 3 * * *"',
        "weekly": 'cron: "0 3 * * sun"',
        "leap": 'cron: "0 0 29 2 *"',
    }
    files = {"params/env/fast.yml": LOCAL + "stages:\n  train:\n    every: 1 second\n"}
    for name, cadence in cadences.items():
        files |= {f"params/{name}.yml": f"{cadence}\ndeadline: 1 minute\n", f"notebooks/{name}.ipynb": CELL}
    folder = project(files)
    assert list(load(folder).stages) == list(cadences)
    assert list(load(folder, "fast").stages) == list(cadences)


def test_no_stage_and_odd_names(project, tmp_path):
    (tmp_path / "empty/params/env").mkdir(parents=True)
    (tmp_path / "empty/params/env/local.yml").write_text(LOCAL)
    assert problems(tmp_path / "empty") == ["notebooks: there is no stage here"]
    for name in ("all", "My stage", "a.b"):
        folder = project({f"notebooks/{name}.ipynb": CELL, f"params/{name}.yml": STAGE})
        assert f"params/{name}.yml: a stage's name is lower-case letters" in "\n".join(problems(folder))


def test_hidden_files_are_no_stages(project):
    folder = project({"notebooks/.~preprocess.ipynb": "{}"})
    (folder / "params/.#preprocess.yml").symlink_to("nowhere")
    assert list(load(folder).stages) == ["preprocess"]


def utc(*args):
    return datetime.datetime(*args, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("cadence", "after", "expected"),
    [
        ("every: 30 seconds", utc(2026, 1, 1, 12, 0, 1), utc(2026, 1, 1, 12, 0, 30)),
        ("every: 30 seconds", utc(2026, 1, 1, 12, 0, 30), utc(2026, 1, 1, 12, 1)),
        ("every: 6 hours", utc(2026, 1, 1, 23, 59), utc(2026, 1, 2)),
        ("every: 0.1 seconds", utc(2026, 1, 1, 0, 0, 0, 50000), utc(2026, 1, 1, 0, 0, 0, 100000)),
        ("cron: 0 * * * *", utc(2026, 1, 1, 12), utc(2026, 1, 1, 13)),
        ("cron: 30 6 * * mon-fri", utc(2026, 1, 2, 7), utc(2026, 1, 5, 6, 30)),
    ],
)
def test_next_run(project, cadence, after, expected):
    stage = load(project({"params/preprocess.yml": f"{cadence}\ndeadline: 1 minute\n"})).stages["preprocess"]
    assert stage.next_run(after) == expected
    there = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    assert stage.next_run(after.astimezone(there)) == expected
    assert stage.next_run(after).tzinfo is datetime.UTC
    with pytest.raises(ValueError, match="time zone"):
        stage.next_run(after.replace(tzinfo=None))


NIGHTS = {  # cron in Europe/Berlin: scheduled times in UTC, by hand; clocks go 02:00 -> 03:00 and 03:00 -> 02:00
    ("30 2 * * *", 3): ["29 01:00", "30 00:30"],  # 02:30 is not: at the end of what is left out
    ("30 2 * * *", 10): ["25 00:30", "26 01:30"],  # 02:30 comes twice: the first
    ("0 2-4 * * *", 3): ["29 01:00", "29 02:00", "30 00:00"],  # 02:00 and 03:00 are the same moment
    ("0 2-4 * * *", 10): ["25 00:00", "25 02:00", "25 03:00", "26 01:00"],
    ("30 * * * *", 3): ["29 00:30", "29 01:30", "29 02:30"],
    ("30 * * * *", 10): ["25 00:30", "25 01:30", "25 02:30"],
    ("*/20 2 * * *", 3): ["30 00:00", "30 00:20"],
    ("*/20 2 * * *", 10): ["25 00:00", "25 00:20", "25 00:40", "25 01:00", "25 01:20", "25 01:40", "26 01:00"],
}


@pytest.mark.parametrize(("cron", "month"), NIGHTS)
def test_cron_in_a_time_zone_on_the_nights_when_clocks_change(project, cron, month):
    yml = f'cron: "{cron}"\ntimezone: Europe/Berlin\ndeadline: 1 minute\n'
    stage = load(project({"params/preprocess.yml": yml})).stages["preprocess"]
    day = {3: 29, 10: 25}[month]
    expected = [
        datetime.datetime.strptime(f"2026 {month} {text}", "%Y %m %d %H:%M").replace(tzinfo=datetime.UTC)
        for text in NIGHTS[cron, month]
    ]
    begin, end = utc(2026, month, day, 0, 0, 0) - datetime.timedelta(seconds=1), expected[-1]
    assert stage.due(begin, end, 100) == expected and stage.due(begin, end, 2) == expected[-2:]
    step = datetime.timedelta(minutes=7)
    for number in range((end - begin) // step):  # from wherever it is asked, also in an hour that comes twice
        moment = begin + number * step
        assert stage.next_run(moment) == next(time for time in expected if time > moment), moment
        assert stage.due(begin, moment, 100) == [time for time in expected if time <= moment], moment


def test_a_schedule_that_is_off_or_over_has_no_next_run(project):
    for yml, until in (
        ("every: 1 hour\nuntil: 2026-03-29", utc(2026, 3, 29, 23)),
        ("cron: 0 * * * *\ntimezone: Europe/Berlin\nuntil: 2026-03-29", utc(2026, 3, 29, 21)),
        ("cron: 0 * * * *\ntimezone: Europe/Berlin\nuntil: 2026-03-29 18:30", utc(2026, 3, 29, 16)),
        ("every: 1 hour\nuntil: 2026-03-29T18:00+02:00", utc(2026, 3, 29, 16)),
    ):
        path = project({"params/preprocess.yml": f"{yml}\ndeadline: 1 minute\n"})
        stage, hour = load(path).stages["preprocess"], datetime.timedelta(hours=1)
        assert stage.next_run(until - hour) == until and stage.next_run(until) is None
        assert stage.due(until - 2 * hour, until + 99 * hour, 9) == [until - hour, until]
    path = project({"params/preprocess.yml": STAGE, "params/env/off.yml": LOCAL})
    (path / "params/env/off.yml").write_text(LOCAL + "stages:\n  preprocess:\n    enabled: false\n    missed: all\n")
    stage = load(path, "off").stages["preprocess"]
    assert stage.next_run(until) is None and stage.due(until - hour, until, 9) == [] and stage.missed == "all"
    assert stage.when.endswith("(not enabled)") and load(path).stages["preprocess"].missed == "once"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("timezone: Berlin", "timezone: expected a time zone such as \"Europe/Berlin\", got str 'Berlin'"),
        ("timezone: ../UTC", "timezone: expected a time zone"),
        ("timezone: Europe", "timezone: expected a time zone"),
        ("missed: twice", "missed: expected skip, once or all, got str 'twice'"),
        ("enabled: no", "enabled: expected true or false, got str 'no'"),
        ("until: tomorrow", "until: expected a day such as"),
        ("timezone: Europe/Berlin", "timezone goes with cron; every counts in UTC"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_line(project, line, expected):
    path = project({"params/preprocess.yml": f"every: 1 hour\ndeadline: 1 minute\n{line}\n"})
    assert f"params/preprocess.yml:3: {expected}" in "\n".join(problems(path))
    env = f"{LOCAL}stages:\n  preprocess:\n    {line}\n"
    path = project({"params/preprocess.yml": "every: 1 hour\ndeadline: 1 minute\n", "params/env/local.yml": env})
    assert f": {expected}" in "\n".join(text for text in problems(path) if text.startswith("params/env/local.yml:"))


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ("machine: null\nmachine_above: {rows: 5}\n", 3),
        ("machine: null\nstages:\n  preprocess: {machine_above: {rows: 5}}\n", 4),
        ("machine: {cpu: 2}\nstages:\n  preprocess: {machine: null, machine_above: {rows: 5}}\n", 4),
        ("machine: {cpu: 2}\nmachine_above: {rows: 5}\nstages:\n  preprocess: {machine_above: {rows: 7}}\n", None),
        ("machine_above: {rows: 5}\nstages:\n  preprocess: {machine: {cpu: 2}}\n", None),
    ],
)
def test_a_condition_for_a_machine_that_nobody_asks_for_is_refused(project, env, line):
    path = project({"params/preprocess.yml": STAGE, "params/env/local.yml": f"root: outputs\n{env}"})
    if line is None:
        assert load(path).stages["preprocess"].machine_above_rows in (5, 7)
    else:
        wanted = f"params/env/local.yml:{line}: machine_above goes with machine, and there is none"
        assert problems(path) == [wanted]


def test_loading_needs_no_heavy_import(project):
    code = "import sys; from etl import params; params.load(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, project()], capture_output=True, text=True, check=True)
    heavy = {"papermill", "nbformat", "prefect", "jupyter_client", "IPython", "coiled", "dask", "polars", "pandas"}
    assert "etl.params" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# --- the injected cell ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,9}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name) and name != "float"  # read_cell refuses a parameter of that name
)
BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
DATE_CODE = ast.dump(ast.parse('__import__("datetime").date.fromisoformat("X")', mode="eval").body)


def assert_only_literals(node):
    """Constants, lists, dicts, minus signs, float("nan"), float("inf") and dates: nothing else."""
    if isinstance(node, ast.List):
        [assert_only_literals(item) for item in node.elts]
    elif isinstance(node, ast.Dict):
        assert all(type(key) is ast.Constant and type(key.value) is str for key in node.keys)
        [assert_only_literals(item) for item in node.values]
    elif isinstance(node, ast.UnaryOp):
        assert isinstance(node.op, ast.USub)
        assert type(node.operand) is ast.Constant
    elif isinstance(node, ast.Call) and ast.unparse(node.func) != "float":
        date.fromisoformat(node.args[0].value)
        node.args[0].value = "X"
        assert ast.dump(node) == DATE_CODE
    elif isinstance(node, ast.Call):
        assert ast.unparse(node) in ("float('nan')", "float('inf')", "float('-inf')")
    else:
        assert type(node) is ast.Constant


def same(a, b):
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b and repr(a) == repr(b)  # repr: 0.0 and -0.0


@BUSY_MACHINE
@given(st.dictionaries(NAMES, JSON | st.dates() | st.lists(st.dates(), max_size=2), max_size=5))
def test_injected_cell_gives_the_values_back_and_holds_nothing_else(values):
    source = injected_cell_source(values, values.keys())
    assert source.replace("\n", "").isprintable()
    body = ast.parse(source).body
    assert len(body) == len(values) == source.count("\n")
    for node, name in zip(body, values, strict=True):
        assert type(node) is ast.Assign
        assert [ast.unparse(target) for target in node.targets] == [name]
        assert_only_literals(node.value)
    room = {}
    exec(source, room)
    assert all(same(values[name], room[name]) for name in values)


@BUSY_MACHINE
@given(st.recursive(st.integers() | st.text() | st.booleans() | st.none(), st.lists, max_leaves=10))
def test_injected_value_is_a_literal(value):
    [node] = ast.parse(injected_cell_source({"x": value}, {"x"})).body
    assert ast.literal_eval(node.value) == value


@pytest.mark.parametrize(
    "name", ["undeclared", "x = 1; y", "x\nimport os", "os.environ", "x[0]", "", "class", "__builtins__", "None", "ｘ"]
)
def test_hostile_names_are_refused(name):
    declared = {"x"} if name in ("undeclared", "ｘ") else {"x", name}
    with pytest.raises(ValueError, match="not a declared parameter"):
        injected_cell_source({name: 1}, declared)


class Loud(str):
    def __repr__(self):
        return "__import__('os').abort()"


@pytest.mark.parametrize(
    "value",
    [
        Loud("x"),
        {Loud("x"): 1},
        {1: 1},
        [b"x"],
        (1,),
        {1},
        1j,
        datetime.datetime(2026, 1, 1),
        type("Whole", (int,), {})(1),
        object(),
        print,
    ],
)
def test_values_that_are_not_json_are_refused(value):
    with pytest.raises(TypeError):
        injected_cell_source({"x": value}, {"x"})


def test_loaded_values_can_be_injected(project):
    stage = load(project(), overrides=["day=2026-01-05"]).stages["preprocess"]
    room = {}
    exec(injected_cell_source(stage.values, stage.values), room)
    assert {name: room[name] for name in stage.values} == stage.values


def test_values_by_name_stay_what_they_are(project):
    folder = project()
    looks_like = ["1e3", "012", "null", "true", "a: b", "2026-01-01"]
    loaded = load(folder, values={"names": looks_like, "max_files": 7}, values_from="run x", overrides=["max_files=8"])
    stage = loaded.stages["preprocess"]
    assert stage.values["names"] == looks_like and stage.values["max_files"] == 8
    assert (stage.origins["names"], stage.origins["max_files"]) == ("run x", "command line")
    assert load(folder, values={"day": "2026-01-02"}).stages["preprocess"].values["day"] == date(2026, 1, 2)
    assert problems(folder, values={"max_files": "7", "max_flies": 7, "root": "/"}, values_from="Prefect") == [
        "Prefect, preprocess.max_files: max_files: expected int, got str '7'",
        "Prefect, preprocess.max_flies: unknown parameter 'max_flies'; did you mean 'max_files'?",
        "Prefect, preprocess.root: root is supplied by the runner; it comes from the env file or --root",
    ]
