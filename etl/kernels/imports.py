"""What notebooks import, found by reading and not by running: what a fork server can have ready for them."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path


def modules_of(project: Path) -> tuple[list[str], list[str]]:
    """(the project's own modules that the notebooks import, the others they and those modules import).

    Imports inside functions count: a run pays for them too. Those under `if TYPE_CHECKING` do not.
    """
    own: dict[str, None] = {}  # in the order in which they are found
    others: dict[str, None] = {}
    todo = [imported for path in sorted(project.glob("notebooks/*.ipynb")) for imported in _imports(path)]
    while todo:
        module, members = todo.pop(0)
        if _path(project, module.split(".")[0]) is None:
            others[module] = None
        for name in (module, *(f"{module}.{member}" for member in members)):
            if name not in own and (path := _path(project, name)):
                own[name] = None
                todo += _imports(path)
    return list(own), list(others)


def code_of(path: Path) -> str:
    """The code in a file; of a notebook that of its cells, without magics. "" of what is none."""
    try:
        text = path.read_text()
        if path.suffix == ".py":
            return text
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""  # the run itself will say so
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, []) of `import module`, (module, [names]) of `from module import names`, modules among them."""
    try:
        todo: list[ast.AST] = [ast.parse(code_of(path))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null byte
        return  # the run itself will say so
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def _path(project: Path, name: str) -> Path | None:
    """The project's file that holds the module, if it is one of the project's."""
    stem = project.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
