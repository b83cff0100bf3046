"""What is wrong with the lake under a root, found by looking at all of it, and what to do about it. Changes nothing."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from etl import delta, findings, leases
from etl.findings import Finding, inspect
from etl.lake import backup, landing, ledger, quarantine, retention, schemas, snapshot
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from etl.lake.lake import Lake

REBUILD = "end `up`, then `python orchestrate.py rebuild`"
BACKUP_AGE = timedelta(days=1)
WAITS = timedelta(minutes=30)  # for a file in landing, with a schedule of a minute


def examine(lake: "Lake") -> list[Finding]:
    """Everything of the lake that a run relies on, one line each; what is in order too."""
    return [finding for what, problems in _looks(lake).items() for finding in inspect(what, partial(problems, lake))]


def look(lake: "Lake", what: str) -> list[Finding]:
    """One thing of the lake, by its name in a Finding: all that is wrong with it, or that nothing is."""
    return inspect(what, partial(_looks(lake)[what], lake))


def _looks(lake: "Lake") -> dict[str, Callable[["Lake"], Iterator[tuple[str, str]]]]:
    """What is looked at -> what finds its problems and their remedies."""
    looks: dict[str, Callable[[Lake], Iterator[tuple[str, str]]]] = {
        "the published snapshot": _pointer,
        "the writers": _writers,
        "the manifests": _manifests,
        "the rows": _rows,
        **{f"table {name}": partial(_table, table=name) for name in lake.columns},
        "landing": _landing,
        "the archive": _archive,
    }
    if made := backup.newest(lake.root):
        looks[f"the newest backup, of {made[1]:%Y-%m-%d %H:%M} UTC"] = partial(_backup, made=made)
    return looks


def _pointer(lake: "Lake") -> Iterator[tuple[str, str]]:
    root = lake.root
    try:
        pointer = snapshot.read_pointer(root)
    except Damaged as error:
        yield str(error), REBUILD
        return
    if pointer is None:
        batches = root.names(ledger.BATCHES)
        if any(name.endswith(".done") for name in batches):
            yield f"{snapshot.POINTER} is gone", REBUILD
        elif any(map(ledger.NUMBERED.fullmatch, batches)):
            yield "batch 1 is not finished", _run(lake)
    elif datetime.fromisoformat(pointer["published_at"]) > datetime.now(UTC) + retention.SLACK:
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


def _writers(lake: "Lake") -> Iterator[tuple[str, str]]:
    """Those that are stopped and hold a lease that nobody can take over: that of a root on this machine."""
    for rel in lake.root.files("leases") if lake.root.may_tear else ():
        with contextlib.suppress(Damaged):  # as a loss of power leaves it: nobody holds that
            document = lake.root.read_json(rel) or {}
            if remedy := leases.stopped(document):
                yield f"{rel} is held by {document['holder']}, since {document['since']}", remedy


def _manifests(lake: "Lake") -> Iterator[tuple[str, str]]:
    yield from ((problem, REBUILD) for problem in ledger.damages(lake.root))


def _rows(lake: "Lake") -> Iterator[tuple[str, str]]:
    """The rows that are published, beside those that the ledger says were ingested."""
    pointer = _published(lake.root)
    if not pointer or "files" not in pointer["tables"] or "under" in pointer:
        return
    for table, version in pointer["tables"].items():
        with contextlib.suppress(Exception):  # then it was named with its table
            counts = lake.table("files", pointer["tables"]["files"])
            ingested = schemas.rows_by_ledger(lake, table, counts)
            there = delta.file_stats(lake.table(table, version))[1]
            if there != ingested and any(findings.damages(lake.root, f"lake/{table}", version)):
                continue
            if ingested is not None and there < ingested:
                yield (
                    f"{table} has {there:,} rows, and {ingested:,} were ingested: another writer took some away",
                    REBUILD,
                )
            elif ingested is not None and there > ingested:
                yield (
                    f"{table} has {there:,} rows, and {ingested:,} were ingested: another writer added the others",
                    f"if they should not be there: {REBUILD}, which leaves them out",
                )
        try:
            schemas.look(lake, table, version)
        except schemas.RowsTaken as error:
            yield str(error), "nothing is written to it until then"
        except Exception:  # it is named with its table
            continue


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
    there = [file for file, _ in landing.files(lake)]
    waiting = sum(bool(file.table) for file in there)
    silent = datetime.now(UTC) - datetime.fromisoformat(pointer["published_at"]) if pointer else timedelta(0)
    if waiting and silent > WAITS:
        silence = f"{waiting} files wait, and nothing was published for {silent}"
        yield silence, f"see the last runs of {lake.ingested_by}"
    if unmatched := [file.name for file in there if not file.table]:
        globs = ", ".join(f"{table.glob} ({name})" for name, table in lake.tables.items())
        yield (
            f"{len(unmatched)} files are no table's, landing/{unmatched[0]} among them: they are refused after a day",
            f"put them where a table's are, or declare it: {globs}",
        )


def _backup(_: "Lake", made: tuple[str, datetime]) -> Iterator[tuple[str, str]]:
    """Whether it is older than a day; a root that never had a backup is asked for none."""
    age = datetime.now(UTC) - made[1]
    if age > BACKUP_AGE:
        yield f"it is {age.days} days and {age.seconds // 3600} hours old", f"`python orchestrate.py backup {made[0]}`"


def _archive(lake: "Lake") -> Iterator[tuple[str, str]]:
    """What is in the archive beside what the ledger says of it: files that were written on after they were moved."""
    pointer = _published(lake.root)
    if not pointer or "files" not in pointer["tables"] or not lake.root.may_tear:
        return
    with contextlib.suppress(Exception):  # then it was named with its table
        known: dict[str, set[int]] = {}
        rests: dict[str, int] = {}  # what of a file came later, by what stands for its path
        for path, size in ledger.published(lake, pointer).select("path", "bytes").iter_rows():
            known.setdefault(path, set()).add(size)
            if path.startswith(f"{landing.RETRIED}/") and not quarantine.is_retried(path):
                rests[path.rpartition("/")[2].partition("-")[0]] = size
        for date in lake.root.names("archive"):
            for path, entry in lake.root.tree(f"archive/{date}"):
                sizes = known.get(ledger.shown(path), {entry.bytes})
                more = entry.bytes - max(sizes) - rests.get(ledger.of_path(path), 0)
                if more > 0 and not entry.problem:
                    yield (
                        f"archive/{date}/{ledger.shown(path)} has {more:,} bytes more than were ingested",
                        "whoever writes it has to put it into landing whole; what a run found of it is in refused/: "
                        "`quarantine list`, then `quarantine retry`",
                    )
