"""The schema of a stage: its notebook's cell tagged `parameters`, parsed and never executed.

    max_files: int = 500  # oldest first
    since: datetime.date | None = None  # the first day that counts

Annotated literals, one a line, each with its meaning in a comment behind it.
"""

import ast
import datetime
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, StringConstraints, ValidationInfo

from etl.params.yaml import Doc, Problem
from etl.secrets import NAME

SUPPLIED = ("root", "run_id", "scheduled_for", "dask")  # by the runner, to every stage that declares them
_TYPES = "int, float, bool, str, datetime.date, Secret, list[...], dict[str, ...], Literal[...], each also | None"
_TYPE_WORDS = {"int", "float", "bool", "str", "list", "dict", "Literal", "date", "datetime", "typing", "Secret"}
DEFAULT = "notebook default"


@dataclass
class Declared:
    annotation: ast.expr | None
    help: str
    type: Any = Any

    @property
    def is_secret(self) -> bool:
        """Whether its value is the name of a secret."""
        return self.annotation is not None and "Secret" in ast.unparse(self.annotation).split(" | ")


def _iso_date(value: Any, info: ValidationInfo) -> Any:
    in_yaml = info.context != DEFAULT  # the notebook itself would get the text
    if in_yaml and isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return datetime.date.fromisoformat(value)
    return value


def _one_of(choices: list):
    def check(value):  # pydantic's own Literal[1] takes True
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError("none of the choices")
        return value

    return AfterValidator(check)


def _type_of(annotation: ast.expr | None, inside: bool = False) -> Any:
    """What pydantic checks for an annotation, or for one `inside` a list or dict. ValueError: not for a parameter."""
    match annotation:
        case ast.Name("int" | "float" | "bool" | "str" as name):
            return {"int": int, "float": float, "bool": bool, "str": str}[name]
        case ast.Name("date") | ast.Attribute(ast.Name("datetime"), "date"):
            return Annotated[datetime.date, BeforeValidator(_iso_date)]
        case ast.Name("Secret") if not inside:
            return Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]
        case ast.BinOp(some, ast.BitOr(), ast.Constant(None)):
            return _type_of(some, inside) | None
        case ast.Subscript(ast.Name("list"), item):
            return list[_type_of(item, True)]
        case ast.Subscript(ast.Name("dict"), ast.Tuple([ast.Name("str"), item])):
            return dict[str, _type_of(item, True)]
        case ast.Subscript(ast.Name("Literal") | ast.Attribute(ast.Name("typing"), "Literal"), chosen):
            nodes = chosen.elts if isinstance(chosen, ast.Tuple) else [chosen]
            choices = [ast.literal_eval(node) for node in nodes]
            if all(type(choice) in (str, int, bool, type(None)) for choice in choices):
                return Annotated[Any, _one_of(choices)]
    raise ValueError("not a type of parameters")


def _default_of(node: ast.expr) -> Any:
    """The literal, or the date that datetime.date(Y, M, D) is. ValueError, TypeError: anything else."""
    match node:
        case ast.Call(ast.Name("date") | ast.Attribute(ast.Name("datetime"), "date"), [_, _, _] as args, []):
            return datetime.date(*map(ast.literal_eval, args))
    return ast.literal_eval(node)


def read_cell(project: Path, path: str, problems: list) -> tuple[dict[str, Declared] | None, Doc]:
    """(what the notebook declares by name, or None when that cannot be read; the defaults)"""
    doc = Doc(path, {})
    try:
        cells = json.loads((project / path).read_bytes())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
        sources = ["".join(cell["source"]) for cell in tagged]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problems.append(Problem(path, None, f"not a notebook: {error!r}"))
        return None, doc
    if len(sources) != 1:
        problems.append(Problem(path, None, f"needs one code cell tagged `parameters`, has {len(sources)}"))
        return None, doc
    try:
        body = ast.parse(sources[0]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: a null byte
        line = getattr(error, "lineno", None)
        problems.append(Problem(path, line, f"not Python: {getattr(error, 'msg', error)}"))
        return None, doc
    tokens = tokenize.generate_tokens(io.StringIO(sources[0], newline=None).readline)
    comments = {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}
    declared = {}
    for node in body:
        comment = comments.get(node.end_lineno) or comments.get(node.lineno, "")
        wrong = _declare(node, comment, declared, doc)
        problems += [Problem(path, node.lineno, message) for message in wrong]
    return declared, doc


def _declare(node: ast.stmt, comment: str, declared: dict[str, Declared], doc: Doc) -> Iterator[str]:
    """Add what one statement declares to `declared` and its default to `doc`; yield what is wrong with it."""
    match node:
        case ast.AnnAssign(ast.Name(name), annotation, value):
            new = Declared(annotation, comment)
        case ast.Assign([ast.Name(name)], value):
            new = Declared(None, comment)
        case _:
            yield "only lines of `name: type = literal  # meaning` belong in this cell"
            return
    if name in declared:
        yield f"{name} is declared twice"
    if name.startswith("_") or name in _TYPE_WORDS:
        yield f"{name}: a parameter cannot have this name"
    if node.col_offset:
        yield f"{name}: one parameter a line"
    if not comment:
        yield f"{name}: needs a comment behind it that says what it means"
    try:
        new.type = _type_of(new.annotation)
    except (ValueError, TypeError):
        yield f"{name}: needs a type, one of {_TYPES}"
    else:
        if name in SUPPLIED and name != "dask" and new.type not in (str, str | None):
            yield f"{name}: is supplied as text, its type is str or str | None"
    declared[name], doc.lines[name,] = new, node.lineno
    try:
        doc.value[name] = _default_of(value)
    except (ValueError, TypeError, RecursionError):
        yield f"{name}: needs a literal as its default"
