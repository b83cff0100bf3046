"""Secrets: read where they are used, and kept out of everything that a run writes.

A secret has a name. Its value is the environment variable of that name, or else the file of that name in the folder
ETL_SECRETS_DIR (as Docker and Kubernetes mount them). YAML, the injected cell and the record hold the name only.
"""

import base64
import contextlib
import html
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

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
    found = []
    for name in request.secrets:
        try:
            if len(read(name)) < SHORTEST:
                found.append(f"secret {name} has fewer than {SHORTEST} characters, too few to be kept out of a report")
        except (LookupError, ValueError, OSError) as error:
            found.append(str(error))
    return found


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
    return Redactor(values)


class Redactor:
    """Replaces the values of secrets (name -> value) by "‹secret NAME›".

    Found as they are, and as base64, percent-encoding, hexadecimal, and in the escapes of JSON, Python and HTML.
    Each long line of a value of several lines is a secret, too. False when there is nothing to replace.
    """

    def __init__(self, values: Mapping[str, str]):
        forms = {}
        for name, value in values.items():
            if len(value) < SHORTEST:
                continue
            lines = [line for line in value.splitlines() if len(line) >= 16 and not line.startswith("-----")]
            for form in itertools.chain.from_iterable(map(_forms, {value, *lines})):
                if len(form) >= SHORTEST:
                    forms.setdefault(form, f"‹secret {name}›")
        self._forms = dict(sorted(forms.items(), key=lambda item: -len(item[0])))  # the longest counts

    def __bool__(self) -> bool:
        return bool(self._forms)

    def text(self, text: str) -> str:
        found = self._pattern(text)
        return found.sub(lambda match: self._forms[match[0]], text) if found else text

    def _pattern(self, text: str) -> re.Pattern | None:
        """Of the forms that are in `text`: to look for each first is far quicker than a pattern of them all."""
        present = [form for form in self._forms if form in text]
        return re.compile("|".join(map(re.escape, present))) if present else None

    def tree(self, value: Any) -> Any:
        """`value` with every text in it, keys too, redacted: dicts, lists and tuples of any depth, bytes."""
        if not self._forms:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return type(value)({self.tree(key): self.tree(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return type(value)([self.tree(item) for item in value])
        if isinstance(value, bytes):  # surrogates carry what is not UTF-8
            return self.text(value.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        if isinstance(value, int | float) and str(value) in self._forms:
            return self._forms[str(value)]
        return value

    def split(self, text: str) -> tuple[str, str]:
        """(the text that can be written, redacted; its end that may be the beginning of a secret)"""
        cut = len(text)
        for form in self._forms:
            at = max(0, len(text) - len(form) + 1)
            while (at := text.find(form[0], at, cut)) >= 0:
                if form.startswith(text[at:]):
                    cut = at
                at += 1
        if cut < len(text) and (found := self._pattern(text)):
            cut = next((m.start() for m in found.finditer(text) if m.start() < cut < m.end()), cut)
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
