"""What is wrong with the data under a root, found by looking at all of it, and what to do about it. Changes nothing."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from etl.lake import compaction, documents, kept, ledger
from etl.lake import snapshot as lake
from etl.lake.documents import Damaged
from etl.storage import Root
from pipeline import model, queries
from pipeline.tables import TABLES

PART = re.compile(r"\d{20}(\.checkpoint\.parquet|\.json)")  # of a table's log
RUN_PREPROCESS = "run preprocess: it puts this right before anything else"
REBUILD = "end `up`, then `orchestrate.py rebuild`"
WAITS = timedelta(minutes=30)  # for a file in landing, with a schedule of a minute


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `problem`: what is wrong with it, and `remedy` what to do; None when nothing is."""

    what: str
    problem: str | None = None
    remedy: str | None = None


def examine(root: str) -> list[Finding]:
    """Everything under `root` that a run relies on, one line each; what is in order too."""
    return [finding for what in _looks() for finding in look(root, what)]


def look(root: str, what: str) -> list[Finding]:
    """One thing under `root`, by its name in a Finding: all that is wrong with it, or that nothing is."""
    problems = []
    try:
        problems.extend(_looks()[what](Root.at(root)))
    except BaseException as error:
        if not may_be_damage(error):
            raise
        problems.append(
            (f"it cannot be looked at: {sentence(error)}", "see what else is wrong, and put that right first")
        )
    return [Finding(what, *problem) for problem in problems] or [Finding(what)]


def may_be_damage(error: BaseException) -> bool:
    """Whether a damaged file may have raised it: any error may, and so may a panic of a library in Rust, which is none.

    What ends a process, or the drawing of a page, may not.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def sentence(error: BaseException) -> str:
    """An error on one line, its type first."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


def _looks() -> dict[str, Callable[[Root], Iterator[tuple[str, str]]]]:
    """What is looked at -> what finds its problems and their remedies."""
    return {
        "the published snapshot": _pointer,
        "the manifests": _manifests,
        **{f"table {name}": partial(_table, table=name) for name in lake.COLUMNS},
        "the index of runs": _index,
        "the model": _model,
        "the answers": _answers,
        "landing": _landing,
    }


def _pointer(place: Root) -> Iterator[tuple[str, str]]:
    yield from _document(place, lake.PUBLISHED)
    try:
        published = lake.read_published(place)
    except Damaged:
        return
    if published is None:
        if place.list("lake/orders/_delta_log"):
            yield "there are tables, and no snapshot names their versions", RUN_PREPROCESS
        return
    if datetime.fromisoformat(published["published_at"]) > datetime.now(UTC) + compaction.SLACK:
        yield (
            f"it is from the future: {published['published_at']}",
            "set this machine's clock; nothing is vacuumed until",
        )


def _document(place: Root, rel: str) -> Iterator[tuple[str, str]]:
    whole = [documents.is_whole(place, name) for name in (rel, documents.copy_of(rel))]
    if whole == [False, False]:
        yield f"{rel} is damaged, and so is its copy", REBUILD
    elif False in whole:
        yield f"{rel if whole[1] else documents.copy_of(rel)} is damaged, its other half is whole", RUN_PREPROCESS


def _manifests(place: Root) -> Iterator[tuple[str, str]]:
    for name in place.list("lake/batches"):
        if name.endswith(".json") and not name.endswith(".copy.json"):
            for problem, _ in _document(place, f"lake/batches/{name}"):
                yield problem, RUN_PREPROCESS if "whole" in problem else REBUILD


def _table(place: Root, table: str) -> Iterator[tuple[str, str]]:
    """Its whole log against what was kept of it, and every file that the snapshot names against the size it had."""
    from deltalake.exceptions import DeltaError

    log = f"lake/{table}/_delta_log"
    if not place.list(log):
        return
    try:
        published = lake.read_published(place)
    except Damaged:
        published = None
    for name in place.list(log):
        match = PART.fullmatch(name)
        what = name.removesuffix(".json").removesuffix(".parquet")
        if match and not kept.has(place, table, what, place.read(f"{log}/{name}")) and kept.sha256s(place, table, what):
            yield f"{log}/{name} is not what was written", RUN_PREPROCESS
    version = published["tables"].get(table) if published else None
    try:
        handle = lake.open_table(place, table, version)
        named = _files(handle)
        columns = lake.columns_of(handle)
    except (DeltaError, OSError, ValueError) as error:
        yield f"it does not open: {str(error).splitlines()[0][:200]}", f"{RUN_PREPROCESS}; if it cannot: {REBUILD}"
        return
    if differs := lake.unlike_declared(table, columns):
        yield f"it is not as it is declared: {differs}", lake.schema_remedy(table, columns)
    there = {entry.name: entry.bytes for entry in place.entries(f"lake/{table}")}
    for path, size in named:
        if there.get(path) != size:
            yield f"lake/{table}/{path} has {there.get(path, 'no')} bytes, not {size}: its rows are lost", REBUILD


def _files(handle) -> list[tuple[str, int]]:
    import pyarrow as pa

    actions = pa.table(handle.get_add_actions(flatten=True))
    return list(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


def _index(place: Root) -> Iterator[tuple[str, str]]:
    from deltalake.exceptions import DeltaError

    if not place.list(f"lake/{compaction.INDEX}/_delta_log"):
        return
    try:
        named = _files(lake.open_table(place, compaction.INDEX))
    except (DeltaError, OSError, ValueError) as error:
        why = f"it does not open: {str(error).splitlines()[0][:200]}"
        yield why, f"remove the newest file of lake/{compaction.INDEX}/_delta_log: the rows of its commit are lost"
        return
    there = {entry.name: entry.bytes for entry in place.entries(f"lake/{compaction.INDEX}")}
    lost = [path for path, size in named if there.get(path) != size]
    if lost:
        yield (
            f"{len(lost)} of its files are gone or cut off: {lost[0]}",
            "restore them, or remove lake/runs: reports stay",
        )


def _model(place: Root) -> Iterator[tuple[str, str]]:
    try:
        model.load_current(place.url)
    except model.NoModel:
        return
    except (model.ModelDamaged, FileNotFoundError) as error:
        yield str(error), "run train: it publishes another"


def _answers(place: Root) -> Iterator[tuple[str, str]]:
    for question in place.list("results"):
        rel = f"results/{question}"
        for what, read in (
            (f"{rel}/current.json or its file", queries.current),
            (f"{rel}/history.json", queries.history),
        ):
            try:
                read(place.url, question)
            except BaseException as error:
                if not may_be_damage(error):
                    raise
                yield f"{what} cannot be read: {sentence(error)}", "run query"


def _landing(place: Root) -> Iterator[tuple[str, str]]:
    try:
        published = lake.read_published(place)
    except Damaged:
        return
    if published and place.exists(ledger.manifest(published["batch"] + 1)):
        yield f"batch {published['batch'] + 1} is not finished", RUN_PREPROCESS
    waiting = sum(len(place.list(f"landing/{table}")) for table in TABLES)
    silent = datetime.now(UTC) - datetime.fromisoformat(published["published_at"]) if published else timedelta(0)
    if waiting and silent > WAITS:
        yield f"{waiting} files wait, and nothing was published for {silent}", "see the last runs of preprocess"
