"""What is wrong with the lake under a root, found by looking at all of it, and what to do about it. Changes nothing."""

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

from etl import findings
from etl.findings import Finding, inspect
from etl.lake import compaction, ledger
from etl.lake import snapshot as lake
from etl.storage import Damaged, Root
from pipeline.tables import TABLES

MANIFEST = re.compile(r"(\d{8})\.json")
RUN_PREPROCESS = "run preprocess: it ends what was begun before anything else"
REBUILD = "end `up`, then `orchestrate.py rebuild`"
WAITS = timedelta(minutes=30)  # for a file in landing, with a schedule of a minute


def examine(root: str) -> list[Finding]:
    """Everything of the lake under `root` that a run relies on, one line each; what is in order too."""
    return [finding for what in _looks() for finding in look(root, what)]


def look(root: str, what: str) -> list[Finding]:
    """One thing under `root`, by its name in a Finding: all that is wrong with it, or that nothing is."""
    return inspect(what, lambda: _looks()[what](Root.at(root)))


def _looks() -> dict[str, Callable[[Root], Iterator[tuple[str, str]]]]:
    """What is looked at -> what finds its problems and their remedies."""
    return {
        "the published snapshot": _pointer,
        "the manifests": _manifests,
        **{f"table {name}": partial(_table, table=name) for name in lake.COLUMNS},
        "landing": _landing,
    }


def _pointer(place: Root) -> Iterator[tuple[str, str]]:
    try:
        published = lake.read_published(place)
    except Damaged as error:
        yield str(error), REBUILD
        return
    if published is None:
        if place.exists(ledger.done(1)):
            yield f"{lake.PUBLISHED} is gone", REBUILD
        elif place.exists(ledger.manifest(1)):
            yield "batch 1 is not finished", RUN_PREPROCESS
    elif datetime.fromisoformat(published["published_at"]) > datetime.now(UTC) + compaction.SLACK:
        yield (
            f"it is from the future: {published['published_at']}",
            "set this machine's clock; nothing is vacuumed until",
        )


def _published(place: Root) -> dict | None:
    """The pointer, None also where it is damaged, which `_pointer` says."""
    with contextlib.suppress(Damaged):
        return lake.read_published(place)


def _manifests(place: Root) -> Iterator[tuple[str, str]]:
    for match in filter(None, map(MANIFEST.fullmatch, place.list("lake/batches"))):
        try:
            ledger.read(place, int(match[1]))
        except Damaged as error:
            yield str(error), REBUILD


def _table(place: Root, table: str) -> Iterator[tuple[str, str]]:
    """All of its log, and every file that the snapshot names."""
    published = _published(place)
    version = published["tables"].get(table) if published else None
    yield from ((problem, REBUILD) for problem in findings.damages(place, f"lake/{table}", version))
    with contextlib.suppress(Exception):  # then it was named
        columns = lake.columns_of(lake.open_table(place, table, version))
        if differs := lake.unlike_declared(table, columns):
            yield f"it is not as it is declared: {differs}", lake.schema_remedy(table, columns)


def _landing(place: Root) -> Iterator[tuple[str, str]]:
    published = _published(place)
    if published and place.exists(ledger.manifest(published["batch"] + 1)):
        yield f"batch {published['batch'] + 1} is not finished", RUN_PREPROCESS
    waiting = sum(len(place.list(f"landing/{table}")) for table in TABLES)
    silent = datetime.now(UTC) - datetime.fromisoformat(published["published_at"]) if published else timedelta(0)
    if waiting and silent > WAITS:
        yield f"{waiting} files wait, and nothing was published for {silent}", "see the last runs of preprocess"
