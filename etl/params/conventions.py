"""What every stage keeps besides its parameters: how its notebook reads, and its line in the README.

As `stages`, nothing here executes a notebook or imports what it imports.
"""

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from etl.params.cell import SUPPLIED, BadNotebook, read_notebook
from etl.params.stages import names
from etl.params.yaml import Problem

MOST_CELLS, MOST_LINES = 16, 15
SCRATCH = "outputs/dev"  # where every notebook's own default points: JupyterLab writes beside no real data
ENGINE = "etl.notebook"  # all that a notebook may import of the engine
NEVER = {"prefect", "papermill", "coiled"}  # a notebook is run by them, and runs without
STATEMENTS: dict[type[ast.AST], str] = {  # that may not be in a cell
    ast.ClassDef: "class",
    ast.FunctionDef: "def",
    ast.AsyncFunctionDef: "async def",
    ast.Try: "try",
    ast.TryStar: "try",
    ast.While: "while",
}
CALLS = {
    r"os\.environ\b.*": "os.environ: what it needs is a parameter or a secret",
    r"open\(.*": "open(): what it reads and writes is under its root",
    r".*\.(now|utcnow|today)\(.*": "now(): its time is scheduled_for",
}
PATH = re.compile(r"(?:/[^/\s]+/|~/|\.{1,2}/|[a-z][a-z0-9]*://|outputs/)\S+")  # /shoes is no path of a machine
TABLE_HEAD = re.compile(r"^\| *stage *\|.*$", re.MULTILINE)
TABLE_ROW = re.compile(r"\| *`(\w+)` *\|")


def breaches(project: Path, ordered: Sequence[str] | None = None, domain: str = "pipeline") -> list[Problem]:
    """Where a project's stages do not keep the conventions, with file and cell; a file that is no notebook is left out.

    `ordered`: the stages from the shortest cadence on, as the README has them; None where nobody could tell. `domain`:
    the one package of the project that notebooks may import.
    """
    project = Path(project)
    notebooks, yaml = names(project)
    own = {path.stem for path in project.glob("*.py")}
    own |= {path.parent.name for path in project.glob("*/__init__.py")}
    problems: list[Problem] = []
    for name in sorted(notebooks & yaml):
        path = f"notebooks/{name}.ipynb"
        try:
            cells = read_notebook(project / path)[1]["cells"]
        except BadNotebook:  # told by `load`
            continue
        problems += [replace(problem, path=path) for problem in of_notebook(cells, own, domain)]
    return problems + of_readme(project, sorted(notebooks & yaml), ordered)


def of_notebook(cells: list[dict[str, Any]], own: Collection[str], domain: str) -> Iterator[Problem]:
    """What one notebook's cells do not keep. `own`: the modules and packages of the project."""
    if len(cells) > MOST_CELLS:
        yield _in(None, None, f"has {len(cells)} cells; at most {MOST_CELLS}")
    first = "".join(cells[0]["source"]) if cells and cells[0]["cell_type"] == "markdown" else ""
    if not first.startswith("# "):
        yield _in(1, None, "is no title: it is Markdown, and begins with `# `")
    tagged = [n for n, cell in enumerate(cells, 1) if "parameters" in (cell["metadata"].get("tags") or [])]
    if len(tagged) == 1 and tagged != [3]:
        yield _in(tagged[0], None, "are the parameters: they are cell 3, after title and imports")
    called: set[str] = set()
    for number, cell in enumerate(cells, 1):
        if cell.get("outputs") or cell.get("execution_count"):
            yield _in(number, None, "holds outputs of a run: `make format` strips them")
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if (lines := len(source.splitlines())) > MOST_LINES:
            yield _in(number, None, f"has {lines} lines; at most {MOST_LINES}: the rest belongs in {domain}/")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            if number not in tagged:  # of those `load` tells it
                yield _in(number, getattr(error, "lineno", None), f"not Python: {getattr(error, 'msg', error)}")
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called |= {func.id for func in calls if isinstance(func, ast.Name)}
        if number in tagged:
            yield from _defaults(number, tree)
        else:
            yield from _literal_paths(number, tree)
        yield from _unwanted(number, tree)
        yield from _imports(number, tree, own, domain)
    for name in ("record", "check"):
        if name not in called:
            yield _in(None, None, f"calls {name}() nowhere: a run says what it did, and whether that is right")


def of_readme(project: Path, stages: Sequence[str], ordered: Sequence[str] | None = None) -> list[Problem]:
    """Where the README's table of stages is not the stages; a project without such a table promises none."""
    readme = project / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    rows = stage_rows(text)
    if rows is None:
        return []
    problems = [
        Problem("README.md", None, f"has no line for the stage {name!r} in its table of stages")
        for name in stages
        if name not in rows
    ]
    problems += [
        Problem("README.md", line, f"names a stage {name!r}, which is none")
        for name, line in rows.items()
        if name not in stages
    ]
    if not problems and ordered is not None and list(rows) != list(ordered):
        problems.append(Problem("README.md", None, f"has the stages in another order than {', '.join(ordered)}"))
    return problems


def stage_rows(readme: str) -> dict[str, int] | None:
    """The stages that a README's table names, each with its line, from 1; None when it has no such table."""
    head = TABLE_HEAD.search(readme)
    if head is None:
        return None
    first, rows = readme.count("\n", 0, head.start()) + 1, {}
    for line, text in enumerate(readme[head.start() :].splitlines(), first):
        if not text.startswith("|"):
            break
        if row := TABLE_ROW.match(text):
            rows[row[1]] = line
    return rows


def _in(cell: int | None, line: int | None, message: str) -> Problem:
    return Problem("", line, message, cell)


def _defaults(number: int, tree: ast.Module) -> Iterator[Problem]:
    """Where what is supplied to a run has another default than JupyterLab needs."""
    declared = {ast.unparse(node.target): node for node in tree.body if isinstance(node, ast.AnnAssign)}
    for name, wanted in (("root", f"root: str = {SCRATCH!r}"), ("run_id", "run_id: str = 'dev'")):
        if name not in declared or ast.unparse(declared[name]) != wanted:
            line = declared[name].lineno if name in declared else None
            yield _in(number, line, f"needs `{wanted}`: Run all in JupyterLab works on the scratch root")
    for name in SUPPLIED[2:]:
        if name in declared and ast.unparse(declared[name]) != f"{name}: str | None = None":
            yield _in(number, declared[name].lineno, f"needs `{name}: str | None = None`, or no {name}")


def _unwanted(number: int, tree: ast.Module) -> Iterator[Problem]:
    """Statements and calls that belong in the domain, or nowhere."""
    told: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        word = STATEMENTS.get(type(node))
        why = f"{word}: what has a branch or a name of its own belongs in a module" if word else None
        if isinstance(node, ast.Attribute | ast.Call):
            text = ast.unparse(node)
            word = STATEMENTS.get(type(node))
        why = f"{word}: what has a branch or a name of its own belongs in a module" if word else None
        if isinstance(node, ast.Attribute | ast.Call):
            text = ast.unparse(node)
            why = next((says for pattern, says in CALLS.items() if re.fullmatch(pattern, text, re.DOTALL)), why)
        line = getattr(node, "lineno", 0)
        if why and (line, why) not in told:
            told.add((line, why))
            yield _in(number, line, f"has {why}")


def _literal_paths(number: int, tree: ast.Module) -> Iterator[Problem]:
    """Paths and URLs that are written down where only a parameter should say them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and PATH.fullmatch(node.value):
            yield _in(number, node.lineno, f"has the path {node.value!r}: where things are is a parameter's to say")


def _imports(number: int, tree: ast.Module, own: Collection[str], domain: str) -> Iterator[Problem]:
    """What it imports of the project but should not."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            is_engine = any(f"{module}.{alias.name}" == ENGINE for alias in node.names)
            modules = [ENGINE if is_engine else module]
        for module in modules:
            package = module.partition(".")[0]
            allowed = package == domain or module == ENGINE
            if package in NEVER or (not allowed and package in {*own, "etl", ""}):
                line = getattr(node, "lineno", None)
                yield _in(number, line, f"imports {module}; of the project that is {domain} and {ENGINE} alone")
