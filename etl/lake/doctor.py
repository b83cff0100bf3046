"""What is wrong with the lake under a root, found by looking at all of it, and what to do about it. Changes nothing."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from etl import delta
from etl.lake import compaction, ledger, schemas, snapshot
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

COMMIT = re.compile(r"(\d{20})\.json")
CHECKPOINT = re.compile(r"\d{20}\.checkpoint\.parquet")
MANIFEST = re.compile(r"(\d{8})\.json")
HAS = {"CREATE TABLE": "metaData", "WRITE": "add", "OPTIMIZE": "add"}  # operation -> a line that it cannot be without
REBUILD = "end `up`, then `orchestrate.py rebuild`"
WAITS = timedelta(minutes=30)  # for a file in landing, with a schedule of a minute


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `problem`: what is wrong with it, and `remedy` what to do; None when nothing is."""

    what: str
    problem: str | None = None
    remedy: str | None = None


def examine(lake: "Lake") -> list[Finding]:
    """Everything of the lake that a run relies on, one line each; what is in order too."""
    return [finding for what in _looks(lake) for finding in look(lake, what)]


def look(lake: "Lake", what: str) -> list[Finding]:
    """One thing of the lake, by its name in a Finding: all that is wrong with it, or that nothing is."""
    return inspect(what, lambda: _looks(lake)[what](lake))


def inspect(what: str, problems_of: Callable[[], Iterable[tuple[str, str]]]) -> list[Finding]:
    """What `problems_of` says of one thing, a problem and its remedy each: also when it cannot be looked at."""
    problems: list[tuple[str, str]] = []
    try:
        problems.extend(problems_of())
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


def _looks(lake: "Lake") -> dict[str, Callable[["Lake"], Iterator[tuple[str, str]]]]:
    """What is looked at -> what finds its problems and their remedies."""
    return {
        "the published snapshot": _pointer,
        "the manifests": _manifests,
        **{f"table {name}": partial(_table, table=name) for name in lake.columns},
        "the index of runs": _index,
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
    for match in filter(None, map(MANIFEST.fullmatch, lake.root.list("lake/batches"))):
        try:
            ledger.read(lake.root, int(match[1]))
        except Damaged as error:
            yield str(error), REBUILD


def _table(lake: "Lake", table: str) -> Iterator[tuple[str, str]]:
    """All of its log, and every file that the snapshot names."""
    pointer = _published(lake.root)
    version = pointer["tables"].get(table) if pointer else None
    yield from ((problem, REBUILD) for problem in _damages(lake.root, f"lake/{table}", version))
    with contextlib.suppress(Exception):  # then it was named
        columns = delta.columns_of(lake.table(table, version))
        if differs := schemas.difference(lake, table, columns):
            yield f"it is not as it is declared: {differs}", schemas.remedy(lake, table, columns)


def _index(lake: "Lake") -> Iterator[tuple[str, str]]:
    remedy = f"restore it, or remove lake/{compaction.INDEX}: rows are lost, reports stay"
    yield from ((problem, remedy) for problem in _damages(lake.root, f"lake/{compaction.INDEX}", None))


def _damages(root: Root, table: str, version: int | None) -> Iterator[str]:
    """What of a table is not what was written: its log, each file of it; each data file of a version, by its size and
    by reading it."""
    log = delta.log_of(table)
    for name in root.list(log):
        if problem := _reading(lambda name=name: _read_log(root, table, name)):
            yield problem if log in problem else f"{log}/{name} is damaged: {problem}"
    if not root.list(log):
        return
    files: list[tuple[str, int, int]] = []
    if problem := _reading(lambda: files.extend(_files(root.table(table, version)))):
        yield f"it does not open: {problem}"
    sizes = {entry.name: entry.bytes for entry in root.entries(table)}
    for path, size, rows in files:
        rel = f"{table}/{path}"
        if sizes.get(path) != size:
            yield f"{rel} has {sizes.get(path, 'no')} bytes, not {size}: its rows are lost"
        elif problem := _reading(lambda rel=rel, rows=rows: _read_rows(root, rel, rows)):
            yield f"{rel} cannot be read: {problem}: its rows are lost"


def _reading(read: Callable[[], None]) -> str | None:
    """What is said by what cannot be read; None when it can."""
    try:
        read()
    except BaseException as error:
        if not may_be_damage(error):
            raise
        return str(error) if isinstance(error, Damaged) else sentence(error)
    return None


def _read_log(root: Root, table: str, name: str) -> None:
    """Raises Damaged, and whatever a library raises for what is none."""
    rel = f"{delta.log_of(table)}/{name}"
    if match := COMMIT.fullmatch(name):
        lines = delta.actions(root, table, int(match[1]))
        wanted = {HAS.get(line["commitInfo"].get("operation")) for line in lines if "commitInfo" in line} - {None}
        if not lines or not wanted <= {kind for line in lines for kind in line}:
            raise Damaged(f"{rel} is empty or cut off")
    elif CHECKPOINT.fullmatch(name):
        _rows_of(root, rel)
    elif name == delta.LAST:
        root.read_json(rel)


def _read_rows(root: Root, rel: str, rows: int) -> None:
    """Raises Damaged when a data file has not so many rows, and whatever pyarrow raises for what is none."""
    if (present := _rows_of(root, rel)) != rows:
        raise Damaged(f"it has {present} rows, not {rows}")


def _rows_of(root: Root, rel: str) -> int:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(root.read(rel))).num_rows


def _files(handle: "DeltaTable") -> Iterator[tuple[str, int, int]]:
    """path, bytes, rows of each file of a table."""
    import pyarrow as pa

    actions = pa.table(handle.get_add_actions(flatten=True))
    return zip(*(actions[name].to_pylist() for name in ("path", "size_bytes", "num_records")), strict=True)


def _landing(lake: "Lake") -> Iterator[tuple[str, str]]:
    pointer = _published(lake.root)
    if pointer and lake.root.exists(ledger.manifest(pointer["batch"] + 1)):
        yield f"batch {pointer['batch'] + 1} is not finished", _run(lake)
    waiting = sum(len(lake.root.list(f"landing/{table}")) for table in lake.tables)
    silent = datetime.now(UTC) - datetime.fromisoformat(pointer["published_at"]) if pointer else timedelta(0)
    if waiting and silent > WAITS:
        silence = f"{waiting} files wait, and nothing was published for {silent}"
        yield silence, f"see the last runs of {lake.ingested_by}"
