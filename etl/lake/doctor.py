"""What is wrong with the lake under a root, found by looking at all of it, and what to do about it. Changes nothing."""

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from etl import findings
from etl.findings import Finding, inspect
from etl.lake import compaction, landing, ledger, schemas, snapshot
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from etl.lake.lake import Lake

MANIFEST = re.compile(r"(\d{8})\.json")
REBUILD = "end `up`, then `orchestrate.py rebuild`"
WAITS = timedelta(minutes=30)  # for a file in landing, with a schedule of a minute


def examine(lake: "Lake") -> list[Finding]:
    """Everything of the lake that a run relies on, one line each; what is in order too."""
    return [finding for what in _looks(lake) for finding in look(lake, what)]


def look(lake: "Lake", what: str) -> list[Finding]:
    """One thing of the lake, by its name in a Finding: all that is wrong with it, or that nothing is."""
    return inspect(what, lambda: _looks(lake)[what](lake))


def _looks(lake: "Lake") -> dict[str, Callable[["Lake"], Iterator[tuple[str, str]]]]:
    """What is looked at -> what finds its problems and their remedies."""
    return {
        "the published snapshot": _pointer,
        "the manifests": _manifests,
        **{f"table {name}": partial(_table, table=name) for name in lake.columns},
        "landing": _landing,
    }


def _pointer(lake: "Lake") -> Iterator[tuple[str, str]]:
    root = lake.root
    try:
        pointer = snapshot.read_pointer(root)
    except Damaged as error:
        yield str(error), REBUILD
        return
    if pointer is None:
        if root.exists(ledger.done(1)):
            yield f"{snapshot.POINTER} is gone", REBUILD
        elif root.exists(ledger.manifest(1)):
            yield "batch 1 is not finished", _run(lake)
    elif datetime.fromisoformat(pointer["published_at"]) > datetime.now(UTC) + compaction.SLACK:
        yield (
            f"it is from the future: {pointer['published_at']}",
            "set this machine's clock; nothing is vacuumed until",
        )


def _run(lake: "Lake") -> str:
    return f"run {lake.ingested_by}: it ends what was begun before anything else"


def _published(root: Root) -> dict[str, Any] | None:
    """The pointer, None also where it is damaged, which `_pointer` says."""
    with contextlib.suppress(Damaged):
        return snapshot.read_pointer(root)
    return None


def _manifests(lake: "Lake") -> Iterator[tuple[str, str]]:
    for match in filter(None, map(MANIFEST.fullmatch, lake.root.names("lake/batches"))):
        try:
            ledger.read(lake.root, int(match[1]))
        except Damaged as error:
            yield str(error), REBUILD


def _table(lake: "Lake", table: str) -> Iterator[tuple[str, str]]:
    """All of its log, and every file that the snapshot names."""
    pointer = _published(lake.root)
    version = pointer["tables"].get(table) if pointer else None
    yield from ((problem, REBUILD) for problem in findings.damages(lake.root, f"lake/{table}", version))
    with contextlib.suppress(Exception):  # then it was named
        yield from _undeclared(lake, table)


def _undeclared(lake: "Lake", table: str) -> Iterator[tuple[str, str]]:
    """Where it cannot become what it is declared to be. What the next batch changes by itself is no problem."""
    try:
        _, why = schemas.plan(lake, table, lake.table(table))
    except schemas.SchemasDiffer as error:
        yield str(error), "undo it: nothing is written until then"
        return
    if why:
        yield f"it is not as it is declared: {why}", schemas.REMEDY


def _landing(lake: "Lake") -> Iterator[tuple[str, str]]:
    pointer = _published(lake.root)
    if pointer and lake.root.exists(ledger.manifest(pointer["batch"] + 1)):
        yield f"batch {pointer['batch'] + 1} is not finished", _run(lake)
    waiting = sum(len(lake.root.names(f"landing/{table}")) for table in lake.tables)
    silent = datetime.now(UTC) - datetime.fromisoformat(pointer["published_at"]) if pointer else timedelta(0)
    if waiting and silent > WAITS:
        silence = f"{waiting} files wait, and nothing was published for {silent}"
        yield silence, f"see the last runs of {lake.ingested_by}"
    if unnamed := landing.unnamed(lake):
        named = "<table>-<8 digits>.json, .csv or .parquet in the folder of its table, also with .gz or .zst"
        yield f"{len(unnamed)} files are no table's and left alone, {unnamed[0]} among them", f"name each {named}"
