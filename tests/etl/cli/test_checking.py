"""`check` on the domain's own code: what cannot be used is said with file and line."""

import importlib
import itertools

import pytest
from params_cases import CELL, LOCAL, STAGE, notebook

from etl import params
from etl.cli import checking
from etl.cli.common import Timetable

LAKE = """
from etl import lake
from {name}.tables import TABLES


class Lake(lake.Lake):
    tables = TABLES
"""
TABLES = """
from etl.lake.table import INT, TEXT, TIME, Column, Table

TABLES = {{
    "events": Table("events", {{"id": INT, "note": TEXT}}, key=("{key}",)),
}}
"""
DECLARED = TABLES.format(key="id")
NUMBERS = itertools.count()
QUERIES = """
from etl.questions import discover


def questions():
    return discover(__name__)
"""
ASKED = '"""Notes?"""\nTABLES = {{"{table}": ["{column}"]}}\n\n\ndef answer({table}):\n    return {table}\n'


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """What `check` says of a domain with these files, each time a package of another name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checking, "PROJECT", tmp_path)

    def of(tables: str = DECLARED, **more: str) -> list[str]:
        name = f"domain_{next(NUMBERS)}"
        files = {"__init__": LAKE.format(name=name), "tables": tables, "queries/__init__": QUERIES}
        files |= {path.replace("__", "/", 1) if path[0] != "_" else path: text for path, text in more.items()}
        for path, text in files.items():
            file = tmp_path / name / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()
        found = checking._of_domain(Timetable(f"{name}:Lake", f"{name}.model"))
        return [str(problem).replace(name, "NAME") for problem in found]

    return of


def test_a_domain_that_can_be_used_has_no_problem(problems):
    assert problems(queries__notes=ASKED.format(table="events", column="note")) == []


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (TABLES.format(key="idd"), "NAME/tables.py:5: cannot be imported: ValueError: events.idd is in the key"),
        (DECLARED + "TABLES[", "NAME/tables.py:7: cannot be imported: '[' was never closed"),
        (TABLES.replace("TEXT}}", "TXT}}").format(key="id"), "NAME/tables.py:5: cannot be imported: NameError: name"),
        ("import sys\nsys.exit(3)\n", "NAME/tables.py:2: cannot be imported: SystemExit: 3"),
        ("import no_such_module\n", "NAME/tables.py:1: cannot be imported: ModuleNotFoundError: No module named 'no_"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_meant_is_told_with_file_and_line(problems, tables, said):
    (problem,) = problems(tables)
    assert problem.startswith(said)


def test_questions_and_model_are_looked_at_too(problems):
    assert problems(
        queries__a=ASKED.format(table="events", column="colour"),
        queries__b=ASKED.format(table="visits", column="id"),
        model="from etl.lake.table import INT\n\nMORE = INT + 1\n",
    ) == [
        "NAME/queries/a.py: reads events.colour, which is not declared",
        "NAME/queries/b.py: reads the table visits, which is not declared",
        "NAME/model.py:3: cannot be imported: TypeError: unsupported operand type(s) for +: 'DataTypeClass' and 'int'",
    ]
    (problem,) = problems(queries__a="TABLES = {\n")
    assert problem == "NAME/queries/a.py:1: cannot be imported: '{' was never closed"


def test_what_a_run_here_would_lack_is_told_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "PROJECT", tmp_path)
    monkeypatch.delenv("API_KEY", raising=False)
    for path, text in {
        "notebooks/load.ipynb": notebook(CELL),
        "params/load.yml": STAGE + "  max_files: 1\n",
        "params/env/local.yml": LOCAL,
        "params/env/away.yml": LOCAL.replace("machine: null", "machine: {n_workers: 1}"),
        "params/env/home.yml": LOCAL + "deploy: {vm_typ: t3.medium}\n",
        "notebooks/more.ipynb": notebook(CELL),
        "params/more.yml": STAGE + "  max_files: 1\n",
        "params/env/shh.yml": LOCAL.replace("machine: null", "machine: {shh: host, project: /x}"),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    lacking = "%s: no secret API_KEY: set the variable API_KEY, or put the file API_KEY into ETL_SECRETS_DIR"
    assert checking._notes("", ()) == [lacking % "load", lacking % "more"] and checking._notes("away", ()) == []
    away = params.load(tmp_path, "away")
    assert list(map(str, checking._of_machines(away, "/outputs"))) == [
        "params/env/away.yml: the root /outputs is on this machine, and load, more on another; use an s3:// root"
    ]
    assert not list(checking._of_machines(away, "s3://bucket/etl"))
    assert list(map(str, checking._of_machines(params.load(tmp_path, "shh"), "/outputs"))) == [
        "params/env/shh.yml: load, more: machine: unknown key 'shh'; did you mean 'ssh'?"
    ]
    assert not list(checking._of_machines(params.load(tmp_path), "/outputs"))
    assert list(map(str, checking._of_home(params.load(tmp_path, "home")))) == [
        "params/env/home.yml: deploy: unknown key 'vm_typ'; did you mean 'vm_type'?"
    ]
    assert not list(checking._of_home(params.load(tmp_path)))
