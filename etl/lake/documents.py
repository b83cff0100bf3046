"""Small JSON documents that must not be lost, nor believed when damaged: each twice, and each with its own sha256."""

import hashlib
import json

from etl.storage import Root, crash_point


class Damaged(ValueError):
    """Something in the lake is not what was written, and cannot be put right from what is there."""


def copy_of(rel: str) -> str:
    return rel.removesuffix(".json") + ".copy.json"


def keep(place: Root, rel: str, document: dict) -> None:
    """Write a document: its copy, then itself; a crash between the two leaves the old one, which is whole."""
    data = _sealed(document)
    place.write(copy_of(rel), data)
    crash_point(f"only the copy: {rel}")
    place.write(rel, data)


def create(place: Root, rel: str, document: dict) -> bool:
    """Write a document unless there is one already; of two racing writers one gets True."""
    data = _sealed(document)
    if not place.create(rel, data):
        return False
    crash_point(f"no copy yet: {rel}")
    place.write(copy_of(rel), data)
    return True


def read(place: Root, rel: str) -> dict | None:
    """A document, from its copy when it is damaged itself; None when there is neither. Raises Damaged."""
    damaged = False
    for name in (rel, copy_of(rel)):
        if (data := _data(place, name)) is not None:
            if (document := _opened(data)) is not None:
                return document
            damaged = True
    if not damaged:
        return None
    raise Damaged(f"{rel} is damaged, and so is its copy: `orchestrate.py rebuild` makes the lake again")


def heal(place: Root, rel: str) -> bool:
    """Put a damaged or missing half right from the other; whether anything was wrong. Raises Damaged."""
    document = read(place, rel)
    if document is None:
        return False
    # read() has looked: a whole document wins over its copy
    wrong = [name for name in (copy_of(rel), rel) if _opened(_data(place, name) or b"") != document]
    for name in wrong:
        place.write(name, _sealed(document))
    return bool(wrong)


def is_whole(place: Root, rel: str) -> bool | None:
    """Whether one half of a document is what was written; None when it is not there."""
    data = _data(place, rel)
    return None if data is None else _opened(data) is not None


def _data(place: Root, rel: str) -> bytes | None:
    try:
        return place.read(rel)
    except FileNotFoundError:
        return None


def _sealed(document: dict) -> bytes:
    return json.dumps({"sha256": _sha256(document)} | document, indent=1).encode()


def _opened(data: bytes) -> dict | None:
    """What was sealed, without its sha256; None when it is not what was written."""
    try:
        document = json.loads(data)
        sha256 = document.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return document if sha256 == _sha256(document) else None


def _sha256(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
