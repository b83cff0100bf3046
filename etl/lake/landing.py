"""What waits in `landing/`, and where it goes: `archive/` once it is in the lake, `refused/` when it never will be.

A refused file is moved, not read again, and stands beside a small JSON file that says why. Nothing is deleted.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from etl.lake import ledger
from etl.storage import Root, Unreadable, crash_point
from pipeline.tables import TABLES

NAME = re.compile(r"(?P<table>[a-z]+)-(?P<tick>\d{8})\.json")
WHY = ".why.json"


@dataclass(frozen=True)
class File:
    """One file of JSON lines. `name`: <table>-<tick>.json. `mark`: as in etl.storage.Entry, when it was listed."""

    name: str
    table: str
    tick: int
    bytes: int = 0
    mark: str = ""
    why: str | None = None  # it is refused

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


@dataclass(frozen=True)
class Waiting:
    """What is in landing. `files`: oldest tick first. `repeated`: ingested before, the same bytes."""

    files: tuple[File, ...]
    repeated: tuple[File, ...]
    refused: tuple[File, ...]


def look(place: Root, newest: int, ingested: dict, max_bytes: int) -> Waiting:
    """Sort out the files that are named as a table's are; others are left alone. Opens only what comes a second time.

    `newest`: the number of the last batch. `ingested`: table -> ranges of ticks that are in the lake.
    """
    files, repeated, refused = [], [], []
    for table in TABLES:
        for entry in place.entries(f"landing/{table}"):
            match = NAME.fullmatch(entry.name)
            if not match or match["table"] != table:
                continue
            file = File(entry.name, table, int(match["tick"]), entry.bytes, entry.mark)
            if entry.problem:
                refused.append(file.refused(entry.problem))
            elif file.bytes > max_bytes:
                refused.append(file.refused(f"has {file.bytes:,} bytes: more than the {max_bytes:,} of a batch"))
            elif not ledger.contains(ingested.get(table, []), file.tick):
                files.append(file)
            elif why := _unlike_before(place, file, newest, max_bytes):
                refused.append(file.refused(why))
            else:
                repeated.append(file)
    files.sort(key=lambda file: (file.tick, list(TABLES).index(file.table)))
    return Waiting(tuple(files), tuple(repeated), tuple(refused))


def _unlike_before(place: Root, file: File, newest: int, max_bytes: int) -> str | None:
    """Why a file whose name was ingested before is not the same file; None when it is."""
    try:
        sha256 = hashlib.sha256(place.read_at_most(file.landing, max_bytes)).hexdigest()
    except Unreadable as error:
        return str(error)
    number, before = ledger.sha256_of(place, newest, file.name)
    return None if sha256 == before else f"was ingested in batch {number} with other content"


def cut(files: tuple[File, ...], max_files: int, max_bytes: int) -> tuple[File, ...]:
    """The first of `files` that make one batch; a tick's files stay together where a batch can hold them."""
    taken, size = 0, 0
    while taken < len(files) and taken < max_files and (size := size + files[taken].bytes) <= max_bytes:
        taken += 1
    whole = taken
    while 0 < whole < len(files) and files[whole - 1].tick == files[whole].tick:
        whole -= 1
    return files[: whole or taken]


def archive(place: Root, files: Iterable[tuple[File, str]], date: str, run_id: str) -> list[File]:
    """Move ingested files (and their sha256) to the archive of that day. Returns those that changed meanwhile: refused.

    May be called again after a crash.
    """
    changed, folders = [], set()
    for file, sha256 in files:
        crash_point(f"before the archive: {file.table}")
        there = place.entry(file.landing)
        if there and there.mark != file.mark and not _is(place, file, sha256):
            changed.append(file.refused("changed while it was ingested: the lake has what it was before"))
        else:
            folders.add(f"archive/{date}/{file.table}")
            if there:  # when it is not there it was moved before, by a run that may have died before it was synced
                place.move(file.landing, file.archived(date))
        crash_point(f"after the archive: {file.table}")
    place.sync(filter(place.exists, sorted(folders)))
    refuse(place, changed, date, run_id)
    return changed


def _is(place: Root, file: File, sha256: str) -> bool:
    try:
        return hashlib.sha256(place.read_at_most(file.landing, 1 << 40)).hexdigest() == sha256
    except Unreadable:
        return False


def set_aside(place: Root, repeated: Iterable[File], date: str) -> None:
    """Move files that were ingested before to the archive, beside the first ones."""
    for file in repeated:
        place.move(file.landing, f"archive/{date}/repeated/{file._apart}")


def refuse(place: Root, files: Iterable[File], date: str, run_id: str) -> None:
    """Move files to `refused/<date>/<table>/`, each beside a file that says why."""
    for file in files:
        there = place.entry(file.landing)
        file = replace(file, mark=there.mark if there else file.mark)
        target = f"refused/{date}/{file.table}/{file._apart}"
        why = {"table": file.table, "file": file.name, "why": file.why, "bytes": file.bytes, "run_id": run_id}
        place.write(target + WHY, json.dumps(why, indent=1).encode())
        crash_point("a refused file is not moved yet")
        if there:
            place.move(file.landing, target)
