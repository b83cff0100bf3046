"""The second memory of every table's log: each published commit is kept under a name that has its sha256.

`lake/kept_log/<table>/<version>-<sha256>.json` is a whole copy of a commit, `<version>.checkpoint-<sha256>` only says
what a checkpoint was. A local disk may lose or change bytes without a word, and delta-rs believes what it finds: an
empty commit is one without rows.
"""

import hashlib

from etl.storage import Root


def place_of(table: str, what: str, data: bytes) -> str:
    """Where `data` is kept. `what`: a version in twenty digits, or that and `.checkpoint`."""
    ending = "" if what.endswith(".checkpoint") else ".json"
    return f"lake/kept_log/{table}/{what}-{hashlib.sha256(data).hexdigest()}{ending}"


def has(place: Root, table: str, what: str, data: bytes) -> bool:
    """Whether these bytes are what was kept."""
    return place.exists(place_of(table, what, data))


def sha256s(place: Root, table: str, what: str) -> list[str]:
    """Of what was kept; more than one when a commit was made again after a power cut."""
    names = (name.removesuffix(".json").partition("-") for name in place.list(f"lake/kept_log/{table}"))
    return [sha256 for kept, _, sha256 in names if kept == what]


def copy_of(place: Root, table: str, what: str) -> bytes | None:
    """The whole copy of a commit; None when there is none, or it is damaged too."""
    for sha256 in sha256s(place, table, what):
        data = place.read(f"lake/kept_log/{table}/{what}-{sha256}.json")
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    return None


def damaged(place: Root, table: str, version: int, every: int) -> str | None:
    """The first part of a table's log that is not what was kept of it; None when all that `version` is read from is.

    That is the newest checkpoint (there is one `every` so many commits) and the commits after it. What is not there at
    all is left to delta-rs, which says so.
    """
    log, start = f"lake/{table}/_delta_log", (version + 1) // every * every
    while start and not place.exists(f"{log}/{start - 1:020d}.checkpoint.parquet"):
        start -= every
    parts = [(f"{start - 1:020d}.checkpoint", "parquet")] if start else []
    parts += [(f"{number:020d}", "json") for number in range(start, version + 1)]
    for what, ending in parts:
        try:
            data = place.read(f"{log}/{what}.{ending}")
        except FileNotFoundError:
            continue
        if not has(place, table, what, data) and sha256s(place, table, what):
            return f"{log}/{what}.{ending}"
    return None
