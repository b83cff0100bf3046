"""Who may import whom inside the engine; imports inside functions count, those for types alone do not."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from etl.storage import PROJECT

LAYERS = (  # each may import those before it, and of its own layer only itself
    ("storage", "leases", "secrets", "figures", "notebook", "charts", "maps", "delta", "findings", "interpreter"),
    ("params", "kernels", "lake"),
    ("questions", "models", "reports", "scaffold"),
    ("runs",),
    ("serve",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((PROJECT / "etl").rglob("*.py"))
}


def imported(node: ast.AST) -> Iterator[str]:
    """The engine's modules that the code below `node` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in FILES)
    elif isinstance(node, ast.ImportFrom) and node.module in FILES:
        members = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (member if member in FILES else node.module for member in members)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from imported(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


GRAPH = {name: set(imported(ast.parse(path.read_text()))) - {name} for name, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_layer():
    assert {room(module) for module in FILES} - {""} <= LEVEL.keys()


def test_no_module_imports_upwards_or_beside_it():
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) != room(other)
        and room(module)
        and room(other)
        and (LEVEL[room(other)] > LEVEL[room(module)] or LEVEL[room(other)] == LEVEL[room(module)] > 0)
    ]
    assert wrong == []


def test_lake_and_runs_do_not_know_each_other():
    pairs = {(room(module), room(other)) for module, others in GRAPH.items() for other in others}
    assert not pairs & {("runs", "lake"), ("lake", "runs")}


def test_no_module_imports_itself_through_others():
    # a package's own __init__ gathers what its modules define
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
