"""Secrets: read where they are used, and kept out of everything that a run writes.

A secret has a name. Its value is the environment variable of that name, or else the file of that name in the folder
ETL_SECRETS_DIR (as Docker and Kubernetes mount them). YAML, the injected cell and the record hold the name only.

What is replaced is what the user's code said: outputs, errors, metrics, checks, the notebook's text, the values of
parameters. What the runner says itself (ids, paths, states, versions, the keys that all of this stands under) is left
as it is: a secret's value may be a word that occurs there, too.
"""

import base64
import contextlib
import copy
import html
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

SUPPLIED = "supplied"  # the origin of a parameter that the runner gives
# kinds of output: their names are the protocol's, not the user's
MIME = re.compile(
    r"text/(plain|html|markdown|latex|csv)|image/(png|jpeg|gif|webp|svg\+xml)|application/(json|javascript|pdf)"
    r"|application/vnd\.(etl-notebooks\.(record|check)|jupyter\.widget-view)\+json"
    r"|application/vnd\.(plotly|vegalite|(bokehjs|holoviews)_(exec|load))\.v[\d.]+\+json"
)
WIDGET = re.compile(r"IPY_MODEL_[0-9a-f]{32}")  # names a widget in another's state
TRAIT = re.compile(r"_(model|view)_(name|module|module_version)")  # which code shows a widget
NAME = re.compile(r"[A-Z][A-Z0-9_]{0,99}")  # upper case: most values put there by mistake are not
SHORTEST = 4  # characters: a shorter value is found in any text by chance
SHORTEST_CORE = 8  # characters of base64: fewer are found in the pictures of a large report by chance
BASE64_LINE = 76  # characters, as MIME and the command `base64` write it
QUOTES = ("&#x27;", "&#39;", "&apos;", "'")  # an apostrophe where other quotes are escaped
# the value of a variable of such a name is a secret, whether a stage asks for it or not
TELLING = re.compile(r"_(KEY|TOKEN|SECRET|PASSWORD|AUTH_STRING)\Z")
SHORTEST_TELLING = 8


def read(name: str) -> str:
    """The value of the secret `name`. Raises ValueError when that is no name, LookupError when it has none."""
    if not NAME.fullmatch(name):
        raise ValueError("the name of a secret is upper-case letters, digits and _")  # never shown: it may be one
    value = os.environ.get(name, "")
    folder = os.environ.get("ETL_SECRETS_DIR")
    if not value and folder and (Path(folder) / name).is_file():
        value = (Path(folder) / name).read_text().rstrip("\n")
    if not value:
        raise LookupError(f"no secret {name}: set the variable {name}, or put the file {name} into ETL_SECRETS_DIR")
    return value


def missing(request: Any) -> list[str]:
    """What is wrong with the secrets a RunRequest names, one sentence each; [] when it can run."""
    problems = []
    for name in request.secrets:
        try:
            if len(read(name)) < SHORTEST:
                problems.append(
                    f"secret {name} has fewer than {SHORTEST} characters, too few to be kept out of a report"
                )
        except (LookupError, ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def for_request(request: Any) -> "Redactor":
    """Of the secrets a RunRequest names and of all variables whose names tell."""
    variables = os.environ | request.variables
    values = {
        name: value for name, value in variables.items() if TELLING.search(name) and len(value) >= SHORTEST_TELLING
    }
    for name in request.secrets:
        try:
            values[name] = read(name)
        except (LookupError, ValueError, OSError):
            continue  # `missing` says so
    supplied = {name for name, origin in request.origins.items() if origin == SUPPLIED}
    return Redactor(values, supplied, lambda path: _is_under(request.root, path))


def _is_under(root: str, path: str) -> bool:
    from etl.storage import Root

    try:
        return ".." not in path.split("/") and (Root.at(root).exists(path) or bool(Root.at(root).names(path)))
    except Exception:  # the root is down: nobody knows
        return False


class Redactor:
    """Replaces the values of secrets (name -> value) by "‹secret NAME›".

    Found as they are, and as base64, percent-encoding, hexadecimal, and in the escapes of JSON, Python and HTML.
    Each long line of a value of several lines is a secret, too. False when there is nothing to replace.

    `supplied` are the parameters that are the runner's own; `is_there` says whether the root has a file.
    """

    def __init__(
        self,
        values: Mapping[str, str],
        supplied: Iterable[str] = (),
        is_there: Callable[[str], bool] = lambda path: False,
    ):
        self._supplied, self._is_there = frozenset(supplied), is_there
        self._values = {f"‹secret {name}›": value for name, value in values.items()}
        forms: dict[str, str] = {}
        for name, value in values.items():
            if len(value) < SHORTEST:
                continue
            lines = [line for line in value.splitlines() if len(line) >= 16 and not line.startswith("-----")]
            for form in itertools.chain.from_iterable(map(_forms, {value, *lines})):
                if len(form) >= SHORTEST:
                    forms.setdefault(form, f"‹secret {name}›")
        self._forms = dict(sorted(forms.items(), key=lambda item: -len(item[0])))  # the longest counts
        self._replaced = [re.escape(word) for word in dict.fromkeys(forms.values())]

    def __bool__(self) -> bool:
        return bool(self._forms)

    def text(self, text: str) -> str:
        pattern = self._pattern(text)
        return pattern.sub(lambda match: self._forms.get(match[0], match[0]), text) if pattern else text

    def restored(self, text: str) -> str:
        """`text` as it was before `text()`, as far as that can be told: to look for a file, not to be written."""
        for told, value in self._values.items():
            text = text.replace(told, value)
        return text

    def _pattern(self, text: str) -> re.Pattern[str] | None:
        """Of the forms that are in `text`: to look for each first is far quicker than a pattern of them all."""
        present = [form for form in self._forms if form in text]
        # what is replaced already comes first, and stays
        return re.compile("|".join([*self._replaced, *map(re.escape, present)])) if present else None

    def tree(self, value: Any) -> Any:
        """`value` with every text in it, keys too, redacted: dicts, lists and tuples of any depth, bytes."""
        if not self._forms:
            return value
        if isinstance(value, str):
            return value if WIDGET.fullmatch(value) else self.text(value)
        if isinstance(value, Mapping):
            return _like(value, {self.tree(key): self.tree(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return type(value)([self.tree(item) for item in value])
        if isinstance(value, bytes):  # surrogates carry what is not UTF-8
            return self.text(value.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        if isinstance(value, int | float) and str(value) in self._forms:
            return self._forms[str(value)]
        return value

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A run's parameters: the values but those that the runner supplied."""
        return {name: value if name in self._supplied else self.tree(value) for name, value in values.items()}

    def request(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a RunRequest."""
        return {**asked, "parameters": self.parameters(asked["parameters"]), "refused": self.text(asked["refused"])}

    def message(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a message of the kernel: what it shows, not the protocol's own words."""
        if not self._forms or kind in ("status", "clear_output"):
            return content
        if kind in ("display_data", "execute_result", "update_display_data"):
            return content | {name: self._bundle(content[name]) for name in ("data", "metadata") if name in content}
        if kind.startswith("comm") and isinstance(content.get("data"), Mapping):
            data = {
                name: self._traits(value) if name == "state" else value if name == "method" else self.tree(value)
                for name, value in content["data"].items()
            }
            return content | {"data": data, "target_name": self.tree(content.get("target_name"))}
        return {name: value if name == "execution_count" else self.tree(value) for name, value in content.items()}

    def _traits(self, state: Any) -> Any:
        """The state of a widget: the values of its traits. Their names, and what model and view it has, are code's."""
        if not isinstance(state, Mapping):
            return self.tree(state)
        return {
            name if name.isidentifier() else self.text(name): value if TRAIT.fullmatch(name) else self.tree(value)
            for name, value in state.items()
        }

    def notebook(self, nb: Any) -> Any:
        """A copy of a notebook: its texts, and what they showed. Its structure, tags and states are the runner's."""
        if not self._forms:
            return nb
        copied = copy.copy(nb)
        copied.cells = [self._cell(cell) for cell in nb.cells]
        return copied

    def _cell(self, cell: Any) -> Any:
        cell = copy.copy(cell)
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines(keepends=True)  # one parameter each
            own = tuple(f"{name} = " for name in self._supplied)
            cell.source = "".join(line if own and line.startswith(own) else self.text(line) for line in lines)
        else:
            cell.source = self.text(cell.source)
        if "attachments" in cell:
            cell.attachments = self.tree(cell.attachments)
        if "outputs" in cell:
            cell.outputs = [self._output(out) for out in cell.outputs]
        return cell

    def _output(self, out: Any) -> Any:
        out = copy.copy(out)
        for name in ("data", "metadata"):
            if name in out:
                out[name] = self._bundle(out[name])
        for name in ("text", "ename", "evalue", "traceback"):
            if name in out:
                out[name] = self.tree(out[name])
        return out

    def _bundle(self, data: Any) -> Any:
        """What is shown, by its kind."""
        if not isinstance(data, Mapping):
            return self.tree(data)
        told = {}
        for mime, value in data.items():
            if MIME.fullmatch(mime):
                told[mime] = self._recorded(value)
            else:
                told[self.text(mime)] = self.tree(value)
        return _like(data, told)

    def _recorded(self, value: Any) -> Any:
        """As `tree`, where a notebook may have recorded or checked something (etl.notebook)."""
        if not isinstance(value, Mapping):
            return self.tree(value)
        told = {}
        for name, part in value.items():
            if name in ("versions_read", "versions_written"):
                told[name] = self._named(part, "lake/{}/_delta_log")
            elif name == "metrics" and isinstance(part, Mapping):
                given = {"given": self._named(part["given"], "{}")} if "given" in part else {}
                told[name] = self.tree({key: part[key] for key in part if key != "given"}) | given
            elif name == "checks" and isinstance(part, list):
                told[name] = [self._checked(check) for check in part]
            else:
                told[self.text(name)] = self.tree(part)
        return _like(value, told)

    def _checked(self, check: Any) -> Any:
        if not isinstance(check, Mapping):
            return self.tree(check)
        names = ("name", "ok", "detail")
        return {
            name if name in names else self.text(name): value if isinstance(value, bool) else self.tree(value)
            for name, value in check.items()
        }

    def _named(self, values: Any, template: str) -> Any:
        """Values by the names of tables or files. What is under the root goes by its name; a version is a number."""
        if not isinstance(values, Mapping):
            return self.tree(values)
        told = {}
        for name, value in values.items():
            hidden = self.text(name)
            own = hidden == name or self._is_there(template.format(name))
            told[name if own else hidden] = value if isinstance(value, int) else self.tree(value)
        return told

    def split(self, text: str) -> tuple[str, str]:
        """(the text that can be written, redacted; its end that may be the beginning of a secret)"""
        cut = len(text)
        for form in self._forms:
            at = max(0, len(text) - len(form) + 1)
            while (at := text.find(form[0], at, cut)) >= 0:
                if form.startswith(text[at:]):
                    cut = at
                at += 1
        if cut < len(text) and (pattern := self._pattern(text)):
            cut = next((m.start() for m in pattern.finditer(text) if m.start() < cut < m.end()), cut)
        return self.text(text[:cut]), text[cut:]


def _forms(value: str) -> Iterator[str]:
    """Every way in which `value` may be written."""
    raw = value.encode(errors="surrogatepass")
    escaped = [value, *_escapes(value)]
    yield from itertools.chain(escaped, *map(_escapes, escaped))  # JSON in JSON, a repr in HTML
    yield from (repr(raw)[2:-1], raw.hex(), raw.hex().upper())
    for percent in (quote(raw), quote(raw, safe=""), quote_plus(raw), quote_plus(raw, safe="/")):
        yield from (percent, re.sub("%..", lambda match: match[0].lower(), percent))
    encoded = {raw, json.dumps(value)[1:-1].encode()}
    with contextlib.suppress(UnicodeEncodeError):
        encoded.add(value.encode("latin-1"))  # as in a picture's title
    yield from itertools.chain.from_iterable(map(_base64, encoded))


def _base64(raw: bytes) -> Iterator[str]:
    """`raw` alone, in lines, and inside of more."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        whole = encode(raw).decode()
        yield from (whole, whole.rstrip("="))
        lines = [whole[at : at + BASE64_LINE] for at in range(0, len(whole), BASE64_LINE)]
        for before in range(3):  # inside longer base64 it begins at one of three places
            lines.append(encode(b"\0" * before + raw).decode()[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6])
        yield from (line for line in lines if len(line) >= SHORTEST_CORE)


def _escapes(text: str) -> list[str]:
    """In JSON, in Python's repr of a text without and with both kinds of quotes, in HTML and XML."""
    dumped = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    marked = [html.escape(text, quote=False), *(html.escape(text).replace("&#x27;", quote) for quote in QUOTES)]
    return [*dumped, repr(text)[1:-1], repr(text + "'\"")[1:-4], *marked]


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """`items` in what `mapping` is: a dict, a notebook's node."""
    kind: Any = type(mapping)
    return kind(items)
