"""What DESIGN and README promise about the tree, checked by machine."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
import yaml

from etl import params
from etl.storage import PROJECT

EXAMPLES = sorted(path.parent for path in PROJECT.glob("examples/*/orchestrate.py"))
PACKAGES = {"app", "etl", "orchestrate", "pipeline"}
MAY_IMPORT = {  # of the project's own modules
    "pipeline": {
        "pipeline",
        "etl.charts",
        "etl.findings",
        "etl.lake",
        "etl.maps",
        "etl.models",
        "etl.questions",
        "etl.storage",
    },
    "etl": {"etl"},
    "app": {
        "app",
        "pipeline",
        "etl.runs.delivery",
        "etl.runs.digest",
        "etl.runs.failures",
        "etl.runs.journal",
        "etl.runs.provenance",
        "etl.runs.replay",
        "etl.reports.page",
        "etl.reports.pdf",
        "etl.runs.index",
        "etl.runs.record",
        "etl.runs.releases",
        "etl.serve.health",
        "etl.lake",
        "etl.models",
        "etl.questions",
        "etl.charts",
        "etl.figures",
        "etl.findings",
        "etl.storage",
    },  # reading only
    "examples": {"pipeline", "etl.charts", "etl.cli", "etl.lake", "etl.models", "etl.questions"},
}
NEVER = {
    "pipeline": {"prefect", "papermill", "coiled", "streamlit", "fastapi"},
    "etl": {"streamlit", "fastapi"},
    "app": {"prefect", "papermill", "coiled"},
    "examples": {"prefect", "papermill", "coiled", "streamlit", "fastapi"},
}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(part: str) -> list[tuple[str, ast.AST]]:
    return [(str(p.relative_to(PROJECT)), ast.parse(p.read_text())) for p in sorted((PROJECT / part).rglob("*.py"))]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_who_may_import_whom(part):
    for name, tree in sources(part):
        own = {module for module in imports(tree) if module.split(".")[0] in PACKAGES}
        allowed = MAY_IMPORT[part]
        bad = {m for m in own if not any(m == a or m.startswith(f"{a}.") or a.startswith(f"{m}.") for a in allowed)}
        assert not bad, f"{name} imports {bad}"
        assert not {module.split(".")[0] for module in imports(tree)} & NEVER[part], name


OF_A_DOMAIN = re.compile("tpc-?h|line.?item|orders|l_ship|l_tax|o_order|tick|clicks|sessions|purchase", re.IGNORECASE)
NO_TABLES = re.compile(  # the words of Matplotlib, Plotly and Bokeh, and Jupyter's
    r"\bticker\b|\btick_params\b|\b[gs]et_xtick\w*|\bmaxticks\b|\b[xy]tick\b|\bm(aj|in)or_tick_\w+|"
    r"\b\w+TickFormatter\b|/api/sessions\b"
)


@pytest.mark.parametrize("part", ["etl", "app"])
def test_engine_and_readers_know_no_table(part):
    for path in sorted((PROJECT / part).rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not OF_A_DOMAIN.search(NO_TABLES.sub("", line)), f"{path}:{number}: {line}"


def test_to_import_the_domain_starts_no_threads_of_polars():
    """Kernels are forked from a process that has imported it, and one whose threads held locks then hangs."""
    code = (
        "import os, polars\n"
        "import pipeline.model, pipeline.queries, pipeline.source\n"
        "print([open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert not [name for name in ast.literal_eval(done.stdout) if name.startswith(("polars-0", "tokio"))], done.stdout


def test_orchestrate_is_the_timetable():
    text = (PROJECT / "orchestrate.py").read_text()
    assert len(text.splitlines()) < 150
    assert {m.split(".")[0] for m in imports(ast.parse(text))} & PACKAGES == {"etl"}


def test_the_command_line_starts_without_what_a_single_command_needs():
    code = "import sys, orchestrate; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert not {"pipeline", "polars", "prefect", "papermill", "deltalake", "etl.runs.engine"} & set(loaded.split())


def test_coiled_and_prefect_are_imported_only_where_they_are_used():
    for name, tree in sources("etl"):
        if "coiled" in {module.split(".")[0] for module in imports(tree)}:
            assert name in ("etl/runs/dispatch.py", "etl/runs/machines.py", "etl/serve/deployed.py")
            top = imports(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], []))
            assert "coiled" not in top
        if "prefect" in {module.split(".")[0] for module in imports(tree)}:
            assert name.removeprefix("etl/serve/") in ("prefect_server.py", "flows.py", "scheduled.py", "worker.py")


@pytest.mark.parametrize("project", [PROJECT, *EXAMPLES], ids=lambda path: path.name)
def test_every_stage_keeps_what_check_looks_at(project):
    stages = params.load(project).stages
    assert params.breaches(project, list(stages)) == []
    assert len(list((project / "notebooks").glob("*.ipynb"))) == len(stages)


@pytest.mark.parametrize("project", [PROJECT, *EXAMPLES], ids=lambda path: path.name)
def test_every_environment_is_sound(project):
    assert params.environments(project)
    for name in params.environments(project):
        params.load(project, name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_takes_little_python(example):
    assert sum(len(path.read_text().splitlines()) for path in example.rglob("*.py")) <= 150


def test_the_lock_names_no_index_and_pins_what_is_declared():
    lock = (PROJECT / "requirements.lock").read_text()
    assert not re.search(r"https?://|--index|--find-links|--extra-index", lock)
    pinned = {re.sub(r"\[.*", "", name) for name in re.findall(r"^([a-z0-9._-]+(?:\[.*\])?)==", lock, re.M)}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.match(r"[a-zA-Z0-9._-]+", line)[0].lower() for line in wanted} <= pinned
    assert lock.count("--hash=sha256:") > len(pinned)


def test_the_conda_environment_is_the_same_lock():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.lock"]}
    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert environment["dependencies"][0].startswith(f"python{wanted}")


def test_every_make_target_is_in_the_readme_or_in_help():
    targets = re.findall(r"^(\w+):.*?## ", (PROJECT / "Makefile").read_text(), re.M)
    assert {"help", "setup", "up", "demo", "test", "lint", "lab", "bench", "clean"} <= set(targets)


@pytest.mark.parametrize("path", [".ci/run", ".pre-commit-config.yaml", ".github/workflows/test.yml"])
def test_what_is_run_for_every_change_are_targets_of_make(path):
    called = set(re.findall(r"\bmake (\w+)$", (PROJECT / path).read_text(), re.M))
    assert "lint" in called
    assert called <= set(re.findall(r"^(\w+):.*?## ", (PROJECT / "Makefile").read_text(), re.M))


def test_no_line_of_code_is_left_unfinished():
    for path in [
        *PROJECT.glob("*.py"),
        *(p for part in ("app", "etl", "examples", "pipeline") for p in (PROJECT / part).rglob("*.py")),
    ]:
        with tokenize.open(path) as file:
            comments = [t.string for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]
        assert not [c for c in comments if re.search(r"TO[D]O|FIX[M]E|X{3}", c)], path
