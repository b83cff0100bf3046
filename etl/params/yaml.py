"""YAML as plain values that know their lines, and what is wrong with it as Problems."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

Keys = tuple[str | int, ...]  # of a value in a file: keys, and numbers in a list


@dataclass(frozen=True)
class Problem:
    """One mistake. `line` counts in the file; for a notebook, in `cell`, counted from 1, or in its parameters cell."""

    path: str
    line: int | None
    message: str
    cell: int | None = None

    def __str__(self) -> str:
        if self.cell is not None:
            line = f", line {self.line}" if self.line else ""
            return f"{self.path} (cell {self.cell}{line}): {self.message}"
        if self.line is None:
            return f"{self.path}: {self.message}"
        if self.path.endswith(".ipynb"):
            return f"{self.path} (parameters cell, line {self.line}): {self.message}"
        return f"{self.path}:{self.line}: {self.message}"


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and words of YAML 1.2's core schema, without anchors, aliases and tags.

    PyYAML follows 1.1, where `no` is False, 012 is 10, 12:30 is 750 and 1e-3 is text. Dates stay text
    until a parameter asks for one.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # its stubs leave it out
        if getattr(event, "anchor", None) or getattr(event, "tag", None):  # an alias has an anchor too
            what = "anchors, aliases and tags are not used here"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in [
    ("null", r"(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"{_pattern}\Z"), _first)


@dataclass
class Doc:
    """Plain values and the line of each of them by its place, such as ("parameters", "markets", 0)."""

    path: str
    value: Any = None
    lines: dict[Keys, int] = field(default_factory=dict)

    def line(self, keys: Keys) -> int | None:
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys)

    def problem(self, keys: Keys, message: str) -> Problem:
        return Problem(self.path, self.line(keys), message)

    def block(self, *keys: str) -> dict[str, Any]:
        """The mapping at `place`, {} when there is none."""
        value = self.value
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}


def parse(text: bytes | str, path: str, problems: list[Problem]) -> Doc | None:
    """None when it is not YAML, which is then among the problems."""
    doc = Doc(path, lines={(): 1})
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        doc.value = node and _plain(loader, node, (), doc, problems)
        return doc
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        problems.append(Problem(path, mark.line + 1 if mark else 1, f"not YAML: {what}"))
    except RecursionError:
        problems.append(Problem(path, 1, "not YAML: nested too deeply"))
    return None


def _plain(loader: _Loader, node: yaml.Node, keys: Keys, doc: Doc, problems: list[Problem]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        doc.lines |= {(*keys, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [_plain(loader, item, (*keys, i), doc, problems) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):  # from an escape; no file can hold it
            problems.append(Problem(doc.path, node.start_mark.line + 1, "half a surrogate pair is no text"))
        try:
            return loader.construct_object(node)
        except ValueError:  # more digits than Python converts
            return node.value
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not key_node.tag.endswith(":str"):
            problems.append(Problem(doc.path, line, "a key here is not text; put it in quotes"))
            continue
        if key in result:
            first = doc.lines[*keys, key]
            problems.append(Problem(doc.path, line, f"{short(key)} is set twice, first in line {first}"))
        doc.lines[*keys, key] = line
        result[key] = _plain(loader, value_node, (*keys, key), doc, problems)
    return result


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def got(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {short(value)}"


def nearest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
