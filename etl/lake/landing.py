"""What waits in `landing/`, and where it goes: `archive/` once it is in the lake, `refused/` when it never will be.

A refused file is moved, not read again, and stands beside a small JSON file that says why. Nothing is deleted.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from etl.lake import ledger
from etl.storage import Root, Unreadable, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

# what is in a file is told by its content; the ending is for people
NAME = re.compile(
    r"(?P<table>\w+)-(?P<sequence>\d{8})\.(json|jsonl|ndjson|csv|parquet)(\.gz|\.zst)?", re.ASCII | re.IGNORECASE
)
WHY = ".why.json"


@dataclass(frozen=True)
class File:
    """One file. `name`: as `NAME`. `mark`: as in storage.Entry, when it was listed."""

    name: str
    table: str
    bytes: int = 0
    mark: str = ""
    why: str | None = None  # it is refused

    @property
    def sequence(self) -> int:
        """The number in its name, by which the files of a stream follow each other."""
        return sequence_of(self.name)

    @property
    def landing(self) -> str:
        return f"landing/{self.table}/{self.name}"

    def archived(self, date: str) -> str:
        return f"archive/{date}/{self.table}/{self.name}"

    def refused(self, why: str) -> "File":
        return replace(self, why=why)

    @property
    def _apart(self) -> str:
        """A name that no other content under the same name has had."""
        return f"{self.name}~{hashlib.sha256(self.mark.encode()).hexdigest()[:8]}"


def name_of(table: str, sequence: int) -> str:
    """The name of a table's file."""
    return f"{table}-{sequence:08d}.json"


def table_of(name: str) -> str | None:
    """The table that a file's name says; None when it is not named as one is."""
    match = NAME.fullmatch(name)
    return match["table"] if match else None


def sequence_of(name: str) -> int:
    """The number in the name of a table's file."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name} is not named as a table's file is")
    return int(match["sequence"])


@dataclass(frozen=True)
class Waiting:
    """What is in landing. `files`: the lowest sequence first. `repeated`: ingested before, the same bytes."""

    files: tuple[File, ...]
    repeated: tuple[File, ...]
    refused: tuple[File, ...]


def look(lake: "Lake", newest: int, ingested: ledger.Ingested, max_bytes: int) -> Waiting:
    """Sort out the files that are named as a table's are; others are left alone. Opens only what comes a second time.

    `newest`: the number of the last batch. `ingested`: what is in the lake.
    """
    files: list[File] = []
    repeated: list[File] = []
    refused: list[File] = []
    for table in lake.tables:
        for entry in lake.root.entries(f"landing/{table}"):
            if table_of(entry.name) != table:
                continue
            file = File(entry.name, table, entry.bytes, entry.mark)
            if entry.problem:
                refused.append(file.refused(entry.problem))
            elif file.bytes > max_bytes:
                refused.append(file.refused(f"has {file.bytes:,} bytes: more than the {max_bytes:,} of a batch"))
            elif not ledger.contains(ingested.get(table, []), file.sequence):
                files.append(file)
            elif why := _unlike_before(lake.root, file, newest, max_bytes):
                refused.append(file.refused(why))
            else:
                repeated.append(file)
    order = list(lake.tables)
    files.sort(key=lambda file: (file.sequence, order.index(file.table)))
    return Waiting(tuple(files), tuple(repeated), tuple(refused))


def _unlike_before(root: Root, file: File, newest: int, max_bytes: int) -> str | None:
    """Why a file whose name was ingested before is not the same file; None when it is."""
    try:
        sha256 = hashlib.sha256(root.read_at_most(file.landing, max_bytes)).hexdigest()
    except Unreadable as error:
        return str(error)
    number, before = ledger.sha256_of(root, newest, file.name)
    if number is None:
        return f"number {file.sequence} of {file.table} was ingested before, under another name"
    return None if sha256 == before else f"was ingested in batch {number} with other content"


def unnamed(lake: "Lake") -> list[str]:
    """The paths of the files that are no table's: they are left alone."""
    inputs = [f"landing/{table}/{name}" for table in lake.tables for name in lake.root.names(f"landing/{table}")]
    taken = {path for path in inputs if table_of(path.rpartition("/")[2]) == path.split("/")[1]}
    beside = {f"landing/{name}" for name in lake.beside}
    return [path for path in lake.root.files("landing") if path not in taken | beside]


def cut(files: tuple[File, ...], max_files: int, max_bytes: int) -> tuple[File, ...]:
    """The first of `files` that make one batch; those of one sequence stay together where a batch can hold them."""
    taken, size = 0, 0
    while taken < len(files) and taken < max_files and (size := size + files[taken].bytes) <= max_bytes:
        taken += 1
    whole = taken
    while 0 < whole < len(files) and files[whole - 1].sequence == files[whole].sequence:
        whole -= 1
    return files[: whole or taken]


def archive(root: Root, files: Iterable[tuple[File, str]], date: str, run_id: str) -> list[File]:
    """Move ingested files (and their sha256) to the archive of that day. Returns those that changed meanwhile: refused.

    May be called again after a crash.
    """
    changed, folders = [], set()
    for file, sha256 in files:
        crash_point(f"before the archive: {file.table}")
        entry = root.entry(file.landing)
        if entry and entry.mark != file.mark and not _is(root, file, sha256):
            changed.append(file.refused("changed while it was ingested: the lake has what it was before"))
        else:
            folders.add(f"archive/{date}/{file.table}")
            if entry:  # when it is not there it was moved before, by a run that may have died before it was synced
                root.move(file.landing, file.archived(date))
        crash_point(f"after the archive: {file.table}")
    root.sync(filter(root.exists, sorted(folders)))
    refuse(root, changed, date, run_id)
    return changed


def _is(root: Root, file: File, sha256: str) -> bool:
    try:
        return hashlib.sha256(root.read_at_most(file.landing, 1 << 40)).hexdigest() == sha256
    except Unreadable:
        return False


def set_aside(root: Root, repeated: Iterable[File], date: str) -> None:
    """Move files that were ingested before to the archive, beside the first ones."""
    for file in repeated:
        root.move(file.landing, f"archive/{date}/repeated/{file._apart}")


def refuse(root: Root, files: Iterable[File], date: str, run_id: str) -> None:
    """Move files to `refused/<date>/<table>/`, each beside a file that says why."""
    for file in files:
        entry = root.entry(file.landing)
        file = replace(file, mark=entry.mark if entry else file.mark)
        target = f"refused/{date}/{file.table}/{file._apart}"
        why = {"table": file.table, "file": file.name, "why": file.why, "bytes": file.bytes, "run_id": run_id}
        root.write(target + WHY, json.dumps(why, indent=1).encode())
        crash_point("a refused file is not moved yet")
        if entry:
            root.move(file.landing, target)
