"""A table's declaration as text, and where it goes in a project's list of tables."""

import ast
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from etl.lake import table as declared
from etl.lake.inference import Inferred, NotInferable, infer
from etl.lake.table import NAME, RESERVED, Column, DataType, Table
from etl.scaffold.files import Refused, read, replace
from etl.storage import Unreadable

WIDTH, INDENT = 120, 4
MODULE = declared.__name__
NAMES: dict[DataType, str] = {
    **{pl.Int64: "INT", pl.Float64: "FLOAT", pl.Boolean: "BOOL", pl.String: "TEXT", pl.Date: "DAY"},
    declared.TIME: "TIME",
}


@dataclass(frozen=True)
class _Call:
    """`opening`, its parts one after the other, `closing`: on one line, or a line each."""

    opening: str
    parts: tuple["str | _Call", ...]
    closing: str
    before: str = ""  # a name and what stands between it and its value

    def flat(self) -> str:
        inner = ", ".join(part if isinstance(part, str) else part.flat() for part in self.parts)
        return f"{self.before}{self.opening}{inner}{self.closing}"

    def lines(self, indent: int, behind: int) -> list[str]:
        """Its lines; `behind`: how many characters follow on its last one."""
        if not self.opening or indent + len(self.flat()) + behind <= WIDTH:
            return [" " * indent + self.flat()]
        lines = [f"{' ' * indent}{self.before}{self.opening}"]
        for part in self.parts:
            inner = part if isinstance(part, _Call) else _Call("", (part,), "")
            *most, last = inner.lines(indent + INDENT, 1)
            lines += [*most, f"{last},"]
        return [*lines, f"{' ' * indent}{self.closing}"]


@dataclass(frozen=True)
class Added:
    """A table that was declared. `guesses`, `notes`: sentences about it."""

    table: Table
    path: str
    text: str
    rows: int | None = None
    fitting: int | None = None
    guesses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def add(
    project: Path,
    name: str,
    *,
    sample: bytes | None = None,
    key: tuple[str, ...] = (),
    time: str | None = None,
    files: str | None = None,
    path: str = "pipeline/tables.py",
) -> Added:
    """Declare the table that a sample file's bytes are rows of, in the project's list of tables; without a sample one
    of its key and time alone. Raises Refused, before anything is written, for what cannot be."""
    source = read(project, path)
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise Refused(f"{path} is not Python: {error}") from None
    if not NAME.fullmatch(name) or name in RESERVED:
        raise Refused(f"{name!r} is no name for a table: letters, digits, _ and -, and not {' or '.join(RESERVED)}")
    if name.lower() in {other.lower() for other in tables_of(source)}:
        raise Refused(f"{path} has a table {name!r} already")
    try:
        inferred = (
            infer(sample, name, key=key, time=time, files=files)
            if sample is not None
            else _bare(name, key, time, files)
        )
    except (Unreadable, NotInferable) as error:
        raise Refused(f"the sample {error}" if isinstance(error, Unreadable) else str(error)) from None
    text = declaration(inferred)
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    if eval(text, {name: getattr(declared, name) for name in used}) != inferred.table:
        raise AssertionError(f"the declaration is not the table: {text}")
    edited = inserted(source, text, used, path)
    if sorted(tables_of(edited)) != sorted([*tables_of(source), name]):  # also when it is not Python any more
        raise AssertionError(f"{path} would not have one table more:\n{edited}")
    replace(project, path, edited)
    guesses = []
    if inferred.key_is_guessed:
        guesses.append(f"the key is {', '.join(inferred.table.key)}")
    if inferred.time_is_guessed:
        guesses.append(f"the time is {inferred.table.time}")
    guesses += [f"{column}: {note.removeprefix('guessed: ')}" for column, note in inferred.notes.items()]
    notes = [f"{left!r} is no column, it is kept in _rescued: it {why}" for left, why in inferred.left_out.items()]
    rows, fitting = (None, None) if sample is None else (inferred.rows, inferred.fitting)
    return Added(inferred.table, path, text, rows, fitting, tuple(guesses), (*notes, *inferred.reasons))


def _bare(name: str, key: tuple[str, ...], time: str | None, files: str | None) -> Inferred:
    columns: dict[str, Column | DataType] = dict.fromkeys(key or ("id",), declared.INT)
    columns |= {time: declared.TIME} if time else {}
    try:
        table = Table(name, columns, key or ("id",), time, files=files)
    except ValueError as error:
        raise NotInferable(str(error)) from None
    notes = dict.fromkeys(table.key, "guessed: no sample")
    return Inferred(table, notes, {}, not key, False, 0, 0)


def tables_of(source: str) -> list[str]:
    """The names of the tables that a module's text declares."""
    names = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and _is_table(call)):
            continue
        keyword = next((word.value for word in call.keywords if word.arg == "name"), None)
        name = call.args[0] if call.args else keyword
        if isinstance(name, ast.Constant):
            names.append(str(name.value))
    return names


def _is_table(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Table"


def declaration(inferred: Inferred) -> str:
    """The text of `Table(...)`, in the form that ruff gives it, with what was guessed in comments."""
    table, lines = inferred.table, ["Table(", f"    {_quoted(inferred.table.name)},", "    {"]
    for column, said in table.columns.items():
        entry = _entry(column, said)
        note = inferred.notes.get(column, "")
        written = entry.lines(2 * INDENT, 1)
        if note and len(written) == 1 and len(written[0]) + len(note) + 5 <= WIDTH:
            lines.append(f"{written[0]},  # {note}")
            continue
        lines += [f"        # {_cut(f'{column}: {note}')}"] * bool(note)
        lines += [*written[:-1], f"{written[-1]},"]
    for name, why in inferred.left_out.items():
        lines.append(f"        # {_cut(f'no column, kept in _rescued: {name} {why}')}")
    lines.append("    },")
    key = ", ".join(map(_quoted, table.key)) + "," * (len(table.key) == 1)
    lines.append(f"    key=({key}),{'  # guessed' * inferred.key_is_guessed}")
    if table.time:
        lines.append(f"    time={_quoted(table.time)},{'  # guessed' * inferred.time_is_guessed}")
    if table.files:
        lines.append(f"    files={_quoted(table.files)},")
    return "\n".join([*lines, ")"])


def _cut(text: str) -> str:
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def _entry(name: str, said: Column | DataType) -> _Call:
    before = f"{_quoted(name)}: "
    if not isinstance(said, Column):
        return _typed(said, before)
    more: list[str] = ["nullable=True"] * said.nullable
    more += [f"path={_quoted(said.path)}"] if said.path else []
    return _Call("Column(", (_typed(said.type), *more), ")", before)


def _typed(dtype: Any, before: str = "") -> _Call:
    """What a declaration calls a type."""
    if isinstance(dtype, pl.Decimal):
        return _Call("decimal(", (str(dtype.precision), str(dtype.scale)), ")", before)
    if isinstance(dtype, pl.List):
        return _Call("list_of(", (_typed(dtype.inner),), ")", before)
    if isinstance(dtype, pl.Struct):
        fields = tuple(_typed(inner.dtype, f"{_quoted(inner.name)}: ") for inner in dtype.fields)
        return _Call("struct(", (_Call("{", fields, "}"),), ")", before)
    return _Call("", (NAMES[dtype],), "", before)


def _quoted(text: str) -> str:
    quote = "'" if '"' in text and "'" not in text else '"'
    plain = text.replace("\\", "\\\\").replace(quote, f"\\{quote}")
    return quote + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain) + quote


def inserted(source: str, text: str, used: Collection[str], path: str) -> str:
    """A module's text with one more element in its list of tables, and with the names that it uses imported.

    Raises Refused where there is no such list, or more than one.
    """
    node = _list_of_tables(ast.parse(source), path)
    lines = re.split(r"(?<=\n)", source)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    end = starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 1) - 1  # of the bracket
    indent = " " * INDENT
    element = "".join(f"{indent}{line}\n" for line in f"{text},".split("\n"))
    before = data[:end].decode()
    own_line = before.rpartition("\n")[2]
    if own_line.strip():  # the bracket is not on a line of its own
        first = starts[node.lineno - 1] + node.col_offset + 1
        parts = [ast.get_source_segment(source, part) or "" for part in node.elts]
        before = data[:first].decode() + "\n" + "".join(f"{indent}{part},\n" for part in parts)
    elif node.elts:
        last = node.elts[-1]
        stop = starts[(last.end_lineno or 1) - 1] + (last.end_col_offset or 0)
        behind = re.sub(r"#.*", "", data[stop:end].decode())
        if "," not in behind:
            before = data[:stop].decode() + "," + data[stop:end].decode()
    edited = before + element + data[end:].decode()
    return _importing(edited, used)


def _list_of_tables(tree: ast.Module, path: str) -> ast.List:
    lists = [
        node
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value
        for node in ast.walk(statement.value)
        if isinstance(node, ast.List)
    ]
    full = [node for node in lists if node.elts and all(map(_is_table, node.elts))]
    candidates = full or [node for node in lists if not node.elts]
    if len(candidates) != 1:
        what = "no list" if not candidates else f"{len(candidates)} lists"
        raise Refused(f"{path} has {what} of Table(...): one list at its top is what a table is added to")
    return candidates[0]


def _importing(source: str, used: Collection[str]) -> str:
    """The text with what it uses of the declarations' module imported."""
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == MODULE]
    known = {alias.asname or alias.name for node in imports for alias in node.names}
    missing = {name for name in used if name not in known}
    if not missing:
        return source
    lines = re.split(r"(?<=\n)", source)
    if imports:
        node = imports[0]
        aliases = [f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names]
        first, last = node.lineno - 1, node.end_lineno or node.lineno
    else:
        others = [other for other in tree.body if isinstance(other, ast.Import | ast.ImportFrom)]
        docstring = tree.body[:1] if ast.get_docstring(tree, clean=False) is not None else []
        aliases, first = [], max([other.end_lineno or 0 for other in [*docstring, *others]], default=0)
        last = first
    names = sorted({*aliases, *missing}, key=_import_order)
    statement = _Call(f"from {MODULE} import ", tuple(names), "")
    text = f"{statement.flat()}\n"
    if len(text) > WIDTH + 1:
        text = "\n".join(_Call("(", tuple(names), ")", f"from {MODULE} import ").lines(0, WIDTH)) + "\n"
    if not imports:
        text = f"\n{text}"
    return "".join([*lines[:first], text, *lines[last:]])


def _import_order(name: str) -> tuple[int, str]:
    """As ruff sorts them: constants, classes, the rest."""
    word = name.split(" ")[0]
    return (0 if word.isupper() and len(word) > 1 else 1 if word[:1].isupper() else 2), word


def summary(added: Added) -> Mapping[str, list[str]]:
    """What there is to say of it: heading -> lines."""
    said = {f"{added.path} declares {added.table.name}": added.text.split("\n")}
    if added.rows is not None:
        said[f"{added.fitting:,} of the sample's {added.rows:,} lines fit"] = []
    if added.guesses:
        said["guessed"] = list(added.guesses)
    if added.notes:
        said["to know"] = list(added.notes)
    return said
