"""The schema of a stage: its notebook's cell tagged `parameters`, parsed and never executed.

    max_files: int = 500  # oldest first
    since: datetime.date | None = None  # the first day that counts

Annotated literals, one a line, each with its meaning in a comment behind it.
"""

import ast
import codecs
import datetime
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, StringConstraints, ValidationInfo

from etl.params.yaml import Doc, Problem, short
from etl.secrets import NAME

SUPPLIED = ("root", "run_id", "scheduled_for", "dask")  # by the runner, to every stage that declares them
_TYPES = "int, float, bool, str, datetime.date, Secret, list[...], dict[str, ...], Literal[...], each also | None"
_TYPE_WORDS = {"int", "float", "bool", "str", "list", "dict", "Literal", "date", "datetime", "typing", "Secret"}
DEFAULT = "notebook default"
CELLS = ("code", "markdown", "raw")
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # ValueError: a null byte
PYTHON = ("python", "ipython", "python3")


class BadNotebook(ValueError):
    """A file that is no notebook; the message says in one line why."""


@dataclass
class Declared:
    annotation: ast.expr | None
    help: str
    type: Any = Any

    @property
    def is_secret(self) -> bool:
        """Whether its value is the name of a secret."""
        return self.annotation is not None and "Secret" in ast.unparse(self.annotation).split(" | ")


def secret_names(nb: Any, values: dict[str, Any]) -> list[str]:
    """The secrets any notebook is given: of its parameters annotated Secret those in `values`, else the defaults."""
    names = []
    for cell in nb.cells:
        if cell.cell_type == "code" and "parameters" in (cell.metadata.get("tags") or []):
            for node in _statements(cell.source):
                match node:
                    case ast.AnnAssign(ast.Name(name), annotation, default) if Declared(annotation, "").is_secret:
                        literal = default.value if isinstance(default, ast.Constant) else None
                        names.append(values.get(name, literal))
    return [name for name in names if name is not None]


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # the run itself will say so
        return []


def _iso_date(value: Any, info: ValidationInfo) -> Any:
    in_yaml = info.context != DEFAULT  # the notebook itself would get the text
    if in_yaml and isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return datetime.date.fromisoformat(value)
    return value


def _one_of(choices: list[Any]) -> AfterValidator:
    def check(value: Any) -> Any:  # pydantic's own Literal[1] takes True
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
            return GenericAlias(list, _type_of(item, True))
        case ast.Subscript(ast.Name("dict"), ast.Tuple([ast.Name("str"), item])):
            return GenericAlias(dict, (str, _type_of(item, True)))
        case ast.Subscript(ast.Name("Literal") | ast.Attribute(ast.Name("typing"), "Literal"), chosen):
            nodes = chosen.elts if isinstance(chosen, ast.Tuple) else [chosen]
            choices = [ast.literal_eval(node) for node in nodes]
            if all(type(choice) in (str, int, bool, type(None)) for choice in choices):
                return Annotated[Any, _one_of(choices)]
    raise ValueError("not a type of parameters")


def _default_of(node: ast.expr | None) -> Any:
    """The literal, or the date that datetime.date(Y, M, D) is. ValueError, TypeError: anything else."""
    match node:
        case ast.Call(ast.Name("date") | ast.Attribute(ast.Name("datetime"), "date"), [_, _, _] as args, []):
            return datetime.date(*map(ast.literal_eval, args))
        case None:
            raise ValueError("no default")
    return ast.literal_eval(node)


def read_notebook(path: Path) -> tuple[str, dict[str, Any]]:
    """A notebook's text and JSON, as far as it is looked at before a run. Raises BadNotebook."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadNotebook(f"cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadNotebook("begins with a byte order mark; save it as UTF-8 without one")
    if data.startswith(b"version https://git-lfs"):
        raise BadNotebook("is a Git LFS pointer; `git lfs pull` fetches the notebook")
    if marker := re.search(rb"^(<{7}|={7}|>{7})( |\r?$)", data, re.M):  # in JSON no line begins like that
        line = data.count(b"\n", 0, marker.start()) + 1
        raise BadNotebook(f"line {line} is a marker of git: a merge is to be finished")
    try:
        text = data.decode()
        nb = json.loads(text)
    except UnicodeDecodeError:
        raise BadNotebook("not a notebook: it is not UTF-8") from None
    except json.JSONDecodeError as error:
        why = f"line {error.lineno} is not JSON: {error.msg}" if text.strip() else "it is empty"
        raise BadNotebook(f"not a notebook: {why}") from None
    except RecursionError:
        raise BadNotebook("not a notebook: it is nested too deeply") from None
    if problem := _no_notebook(nb):
        raise BadNotebook(f"not a notebook: {problem}")
    return text, nb


def _no_notebook(nb: Any) -> str:
    """Why this JSON is no notebook that can be run; "" when it is one."""
    if not isinstance(nb, dict) or not {"cells", "worksheets"} & nb.keys():
        return "it has no cells"
    if nb.get("nbformat") != 4:
        return f"its format is {short(nb.get('nbformat'))}, not 4; JupyterLab saves it anew"
    if not isinstance(nb.get("cells"), list):
        return "it has no cells"
    if not isinstance(nb.get("metadata"), dict):
        return "it has no metadata"
    if language := _other_language(nb["metadata"]):
        return f"it is in {language}, and a stage runs on Python"
    for number, cell in enumerate(nb["cells"], 1):
        fits = isinstance(cell, dict) and isinstance(cell.get("metadata"), dict)
        source = cell.get("source") if fits else None
        lines = source if isinstance(source, list) else [source]
        if not fits or cell.get("cell_type") not in CELLS or not all(isinstance(line, str) for line in lines):
            return f"cell {number} is none"
    return ""


def _other_language(metadata: dict[str, Any]) -> str:
    """The language of the notebook's kernel, "" when it is Python or not said; the kernel's name counts for nothing."""
    said = ((metadata.get("kernelspec"), "language"), (metadata.get("language_info"), "name"))
    languages = [block[key] for block, key in said if isinstance(block, dict) and block.get(key)]
    return next((short(language) for language in languages if str(language).lower() not in PYTHON), "")


def read_cell(project: Path, path: str, problems: list[Problem]) -> tuple[dict[str, Declared] | None, Doc]:
    """(what the notebook declares by name, or None when that is not Python; the defaults). Raises BadNotebook."""
    doc = Doc(path, {})
    nb = read_notebook(project / path)[1]
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in code if "parameters" in (cell["metadata"].get("tags") or [])]
    if len(sources) != 1:
        problems.append(Problem(path, None, f"needs one code cell tagged `parameters`, has {len(sources)}"))
        return None, doc
    try:
        body, comments = _parsed(sources[0])
    except UNREADABLE as error:
        line = getattr(error, "lineno", None)
        problems.append(Problem(path, line, f"not Python: {getattr(error, 'msg', error)}"))
        return None, doc
    declared: dict[str, Declared] = {}
    for node in body:
        wrong = _declare(node, _comment(node, comments), declared, doc)
        problems += [Problem(path, node.lineno, message) for message in wrong]
    return declared, doc


def declared_in(source: str) -> dict[str, Declared]:
    """What a parameters cell declares, by name; nothing when it is not Python."""
    declared: dict[str, Declared] = {}
    try:
        body, comments = _parsed(source)
    except UNREADABLE:
        return {}
    for node in body:
        for _ in _declare(node, _comment(node, comments), declared, Doc("", {})):
            pass  # what is wrong with it was said before it ran
    return declared


def _parsed(source: str) -> tuple[list[ast.stmt], dict[int, str]]:
    """A cell's statements, and its comments by line. Raises UNREADABLE."""
    body = ast.parse(source).body
    tokens = tokenize.generate_tokens(io.StringIO(source, newline=None).readline)
    return body, {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _comment(node: ast.stmt, comments: dict[int, str]) -> str:
    return comments.get(node.end_lineno or node.lineno) or comments.get(node.lineno, "")


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
