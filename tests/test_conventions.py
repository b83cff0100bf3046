"""What DESIGN and README promise about the tree, checked by machine."""

import ast
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

from etl import params
from etl.storage import PROJECT

EXAMPLES = sorted(path.parent for path in PROJECT.glob("examples/*/orchestrate.py"))
NOTEBOOKS = sorted(path for project in (PROJECT, *EXAMPLES) for path in project.glob("notebooks/*.ipynb"))
PACKAGES = {"app", "etl", "orchestrate", "pipeline"}
MAY_IMPORT = {  # of the project's own modules
    "pipeline": {"pipeline", "etl.charts", "etl.findings", "etl.lake", "etl.models", "etl.questions", "etl.storage"},
    "etl": {"etl"},
    "app": {
        "app",
        "pipeline",
        "etl.runs.journal",
        "etl.reports.page",
        "etl.runs.index",
        "etl.runs.record",
        "etl.lake",
        "etl.models",
        "etl.questions",
        "etl.charts",
        "etl.findings",
        "etl.storage",
    },  # reading only
    "notebooks": {"pipeline", "etl.notebook"},
    "examples": {"pipeline", "etl.charts", "etl.cli", "etl.lake", "etl.models", "etl.questions"},
}
NEVER = {
    "pipeline": {"prefect", "papermill", "coiled", "streamlit", "fastapi"},
    "etl": {"streamlit", "fastapi"},
    "app": {"prefect", "papermill", "coiled"},
    "notebooks": {"prefect", "papermill", "coiled"},
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
    if part == "notebooks":
        return [(path.name, ast.parse("\n".join(code_of(path)))) for path in NOTEBOOKS]
    return [(str(p.relative_to(PROJECT)), ast.parse(p.read_text())) for p in sorted((PROJECT / part).rglob("*.py"))]


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def code_of(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_who_may_import_whom(part):
    for name, tree in sources(part):
        own = {module for module in imports(tree) if module.split(".")[0] in PACKAGES}
        allowed = MAY_IMPORT[part]
        bad = {m for m in own if not any(m == a or m.startswith(f"{a}.") or a.startswith(f"{m}.") for a in allowed)}
        assert not bad, f"{name} imports {bad}"
        assert not {module.split(".")[0] for module in imports(tree)} & NEVER[part], name


OF_A_DOMAIN = re.compile("tpc-?h|line.?item|orders|l_ship|l_tax|o_order|tick|clicks|sessions|purchase", re.IGNORECASE)
NO_TABLES = re.compile(  # Matplotlib's words, and HTTP's
    r"\bticker\b|\btick_params\b|\b[gs]et_xtick\w*|\bmaxticks\b"
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
            assert name == "etl/runs/dispatch.py"
            top = imports(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], []))
            assert "coiled" not in top
        if "prefect" in {module.split(".")[0] for module in imports(tree)}:
            assert name in ("etl/serve/prefect_server.py", "etl/serve/flows.py", "etl/serve/worker.py")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reads_top_to_bottom(path):
    cells, code = cells_of(path), code_of(path)
    assert len(cells) <= 16
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [2], "title, imports, parameters"
    assert all(len(cell.splitlines()) <= 15 for cell in code)
    for cell in cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
    for node in ast.walk(ast.parse("\n".join(code))):
        assert not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Try, ast.While)), ast.unparse(node)
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
        assert not re.match(r"(os\.environ|open\(|.*\.now\()", text), text
    assert {"record", "check"} <= set(re.findall(r"\b(record|check)\(", "\n".join(code)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stage_takes_what_is_supplied_and_defaults_to_the_scratch_root(path):
    (cell,) = [c for c in cells_of(path) if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(cell["source"])
    assert 'root: str = "outputs/dev"' in source
    assert re.search(r'^run_id: str = "dev"', source, re.M)
    when = re.search(r"^scheduled_for.*", source, re.M)  # declared where something depends on it
    assert when is None or when[0].startswith("scheduled_for: str | None = None")


@pytest.mark.parametrize("project", [PROJECT, *EXAMPLES], ids=lambda path: path.name)
def test_every_environment_is_sound(project):
    assert params.environments(project)
    for name in params.environments(project):
        params.load(project, name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_takes_little_python(example):
    assert sum(len(path.read_text().splitlines()) for path in example.rglob("*.py")) <= 150


def test_the_stages_of_the_readme_are_the_stages():
    rows = re.findall(r"^\| `(\w+)` \|", (PROJECT / "README.md").read_text(), re.M)
    assert rows == list(params.load(PROJECT).stages)


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
