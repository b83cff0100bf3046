"""What notebooks import, found by reading and not by running: what a fork server can have ready for them."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path


def modules_of(project: Path) -> tuple[list[str], list[str]]:
    """(the project's own modules that the notebooks import, the others they and those modules import).

    Imports inside functions count: a run pays for them too. Those under `if TYPE_CHECKING` do not.
    """
    own, others = {}, {}
    todo = [found for path in sorted(project.glob("notebooks/*.ipynb")) for found in _imports(_code(path))]
    while todo:
        module, members = todo.pop(0)
        if _path(project, module.split(".")[0]) is None:
            others[module] = None
        for name in (module, *(f"{module}.{member}" for member in members)):
            if name not in own and (path := _path(project, name)):
                own[name] = None
                todo += _imports(path.read_text())
    return list(own), list(others)


def _code(path: Path) -> str:
    """The code of a notebook without its magics; none of what is no notebook, as one that was just begun."""
    try:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    except (ValueError, LookupError, TypeError):
        return ""
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _imports(code: str) -> Iterator[tuple[str, list[str]]]:
    """(module, []) of `import module`, (module, [names]) of `from module import names`, modules among them."""
    try:
        todo: list[ast.AST] = [ast.parse(code)]
    except SyntaxError:  # the run itself will say so
        return
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
    place = project.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
