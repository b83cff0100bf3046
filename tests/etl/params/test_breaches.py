"""Each convention of a stage, broken once: what `check` says, with file and cell."""

import json

import pytest

from etl import params

PARAMETERS = (
    'root: str = "outputs/dev"  # where\nrun_id: str = "dev"  # who\nscheduled_for: str | None = None  # when\n'
)
IMPORTS = "from etl.notebook import check, record\nfrom pipeline import Lake"
LAST = 'record(rows=1)\ncheck("one", True)'


def cell(source, kind="code", **more):
    tags = ["parameters"] if "run_id:" in source else []
    return {"cell_type": kind, "metadata": {"tags": tags}, "source": source.splitlines(True), **more}


def project_of(folder, *cells, title="# Greet"):
    for name in ("notebooks", "params", "pipeline", "etl", "app"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "notebooks" / "__init__.py").unlink()
    nb = {"cells": [cell(title, "markdown"), *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "notebooks" / "greet.ipynb").write_text(json.dumps(nb))
    (folder / "params" / "greet.yml").write_text("every: 1 minute\ndeadline: 50 seconds\n")
    return folder


def said(folder, *cells, **more):
    return [str(problem) for problem in params.breaches(project_of(folder, *cells, **more))]


def test_a_stage_that_keeps_them_all(tmp_path):
    assert said(tmp_path / "p", cell(IMPORTS), cell(PARAMETERS), cell(LAST)) == []


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("x = 1\nclass A: pass", 2, "has class: what has a branch or a name of its own belongs in a module"),
        ("def f(): pass", 1, "has def: "),
        ("try:\n    x = 1\nexcept* OSError:\n    pass", 1, "has try: "),
        ("while True:\n    break", 1, "has while: "),
        ("import os\nos.environ['A']", 2, "has os.environ: "),
        ("open('x')", 1, "has open(): "),
        ("import datetime\ndatetime.datetime.now()", 2, "has now(): its time is scheduled_for"),
        ("x = 's3://bucket/key'", 1, "has the path 's3://bucket/key': "),
        ("x = '/tmp/x'", 1, "has the path '/tmp/x': "),
        ("x = f'{1}'\ny = 'outputs/dev'", 2, "has the path 'outputs/dev': "),
        (
            "from etl.storage import Root",
            1,
            "imports etl.storage; of the project that is pipeline and etl.notebook alone",
        ),
        ("from etl import storage", 1, "imports etl; "),
        ("import app.api", 1, "imports app.api; "),
        ("import prefect", 1, "imports prefect; "),
        ("\n".join(["x = 1"] * 16), None, "has 16 lines; at most 15"),
        ("%matplotlib inline", 1, "not Python: "),
    ],
)
def test_what_a_cell_may_not_have(tmp_path, source, line, message):
    (told,) = said(tmp_path / "p", cell(IMPORTS), cell(PARAMETERS), cell(source), cell(LAST))
    where = f", line {line}" if line else ""
    assert told.startswith(f"notebooks/greet.ipynb (cell 4{where}): {message}")


def test_what_a_notebook_may_not_be(tmp_path):
    def of(name, *cells, **more):
        return said(tmp_path / name, *cells, **more)

    good = [cell(IMPORTS), cell(PARAMETERS), cell(LAST)]
    assert of("a", *good, *[cell("1")] * 13) == ["notebooks/greet.ipynb: has 17 cells; at most 16"]
    assert of("b", *good, title="Greet") == [
        "notebooks/greet.ipynb (cell 1): is no title: it is Markdown, and begins with `# `"
    ]
    assert of("c", good[1], good[0], good[2]) == [
        "notebooks/greet.ipynb (cell 2): are the parameters: they are cell 3, after title and imports"
    ]
    assert of("d", *good, cell("1", execution_count=3)) == [
        "notebooks/greet.ipynb (cell 5): holds outputs of a run: `make format` strips them"
    ]
    lacks = of("e", *good[:2])
    assert len(lacks) == 2 and "calls record() nowhere" in lacks[0] and "calls check() nowhere" in lacks[1]
    (told,) = of("f", good[0], cell(PARAMETERS.replace("outputs/dev", "outputs")), good[2])
    assert told.startswith("notebooks/greet.ipynb (cell 3, line 1): needs `root: str = 'outputs/dev'`")
    (told,) = of("g", good[0], cell(PARAMETERS.replace("str | None = None", 'str = "now"')), good[2])
    assert "(cell 3, line 3): needs `scheduled_for: str | None = None`" in told


def test_the_readmes_table_of_stages_is_the_stages(tmp_path):
    project = project_of(tmp_path / "p", cell(IMPORTS), cell(PARAMETERS), cell(LAST))

    def of(*rows, ordered=None):
        (project / "README.md").write_text(
            "\n".join(["# P", "", "| stage | cadence |", "|---|---|", *rows, "", "| `other` | x |"])
        )
        return [str(problem) for problem in params.breaches(project, ordered)]

    assert of("| `greet` | every minute |") == []
    assert of() == ["README.md: has no line for the stage 'greet' in its table of stages"]
    assert of("| `greet` | x |", "| `gone` | y |") == ["README.md:6: names a stage 'gone', which is none"]
    (project / "params" / "wave.yml").write_text("every: 1 second\ndeadline: 50 seconds\n")
    (project / "notebooks" / "wave.ipynb").write_bytes((project / "notebooks" / "greet.ipynb").read_bytes())
    assert of("| `greet` | x |", "| `wave` | y |", ordered=["wave", "greet"]) == [
        "README.md: has the stages in another order than wave, greet"
    ]
