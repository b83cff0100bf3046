"""What waits in `landing/`, and where it goes: `archive/` once it is in the lake, `refused/` when it never will be.

A file is a table's by its path (`Table.files`). One that is still being written is left alone, and one that is no
table's goes to `refused/` after a day. A refused file is moved, not read again, and stands beside a small JSON file
that says why. Nothing is deleted.
"""

import hashlib
import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from etl.lake import ledger
from etl.storage import Entry, Root, Unreadable, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

WHY = ".why.json"
RETRIED = ".retried"  # below landing/: a folder a table, of the lines that are tried again
REPEATED = ".repeated"  # below a day of the archive
AGAIN = ".again"  # the same, with a folder each: other content under a path that is there already
SHOWN = 10  # names of files
NAME_BYTES = 200  # of a name that others are made of: none has more than 255
PATIENCE = timedelta(days=1)  # with a file that is no table's, and with one that was written by a clock ahead of ours


@dataclass(frozen=True)
class File:
    """One file. `path`: below landing/. `table`: empty when it is no table's. `mark`: as in storage.Entry, when it was
    listed. `sequence`: as in `Lake.sequence`."""

    path: str
    table: str
    bytes: int = 0
    mark: str = ""
    sequence: int | None = None
    modified: datetime | None = None
    why: str | None = None  # it is refused
    again: bool = False  # other content was ingested under this path

    @property
    def name(self) -> str:
        """Its path as text, as tables and people have it."""
        return ledger.shown(self.path)

    @property
    def landing(self) -> str:
        return f"landing/{self.path}"

    def archived(self, date: str) -> str:
        return f"archive/{date}/{self.path}"

    def refused(self, why: str) -> "File":
        return replace(self, why=why)

    @property
    def apart(self) -> str:
        """A path that no other content under the same path has had, without a dot at the beginning of its name."""
        folder, name = posixpath.split(self.path)
        readable = name.encode(errors="surrogateescape")[:NAME_BYTES].decode(errors="ignore").lstrip(".")
        return posixpath.join(folder, f"{readable}~{hashlib.sha256(self.mark.encode()).hexdigest()[:8]}")


@dataclass(frozen=True)
class Waiting:
    """What is in landing. `files`: in the order in which they are taken. `repeated`: ingested before, the same bytes.
    `growing`: still being written. `unmatched`: no table's."""

    files: tuple[File, ...]
    repeated: tuple[File, ...]
    refused: tuple[File, ...]
    growing: tuple[File, ...]
    unmatched: tuple[File, ...]


def files(lake: "Lake") -> Iterator[tuple[File, Entry]]:
    """All that is in landing, but what the project keeps there for itself, and what is there, each."""
    for path, entry in lake.root.tree("landing"):
        if path not in lake.beside:
            yield of(lake, path, entry.bytes, entry), entry


def unmatched(lake: "Lake") -> list[str]:
    """What is in landing and no table's: the paths below it."""
    return [file.name for file, _ in files(lake) if not file.table]


def idle(lake: "Lake") -> str:
    """Why there is nothing to ingest, for people."""
    there = [file for file, _ in files(lake)]
    waiting, strays = ([file.name for file in there if bool(file.table) is tables] for tables in (True, False))
    growing = said(len(waiting), waiting, "is still being written", "are still being written")
    others = said(len(strays), strays, "is no table's", "are no table's")
    return "; ".join(filter(None, ("no new files in landing", growing, others)))


def said(count: int, names: Iterable[str], one: str, many: str) -> str:
    """How many files, what of them, and some of their names; empty for none."""
    shown = sorted(names)[:SHOWN]
    more = f" and {count - len(shown):,} others" if count > len(shown) else ""
    return f"{count:,} {one if count == 1 else many}: {', '.join(shown)}{more}" if count else ""


def of(lake: "Lake", path: str, size: int, entry: Entry | None = None) -> File:
    """The file at a path below landing/."""
    mark, modified = (entry.mark, entry.modified) if entry else ("", None)
    return File(path, table_of(lake, path) or "", size, mark, lake.sequence_of(path), modified)


def table_of(lake: "Lake", path: str) -> str | None:
    """The table whose file a path below landing/ is; None for none's, and for several's."""
    tables = tables_of(lake, path)
    return tables[0] if len(tables) == 1 else None


def tables_of(lake: "Lake", path: str) -> list[str]:
    """The tables whose globs take a path below landing/."""
    if path.startswith(f"{RETRIED}/"):
        table = path.split("/")[1]
        return [table] if table in lake.tables else []
    return [name for name, table in lake.tables.items() if table.takes(path)]


def look(
    lake: "Lake", known: ledger.Known, pointer: dict[str, Any] | None, *, max_bytes: int, quiet_s: float, now: datetime
) -> Waiting:
    """Sort out what is in landing. Opens only what comes a second time. `known`: what is in the lake by `pointer`."""
    waiting: list[File] = []
    refused: list[File] = []
    growing: list[File] = []
    unmatched: list[File] = []
    for file, entry in files(lake):
        if len(tables := tables_of(lake, file.path)) > 1:
            refused.append(file.refused(f"is taken by the globs of {' and '.join(tables)}: make one of them narrower"))
        elif not file.table:
            if entry.modified and now - entry.modified > PATIENCE:
                refused.append(file.refused(f"is no table's: {_globs(lake)}"))
            else:
                unmatched.append(file)
        elif entry.problem:
            refused.append(file.refused(entry.problem))
        elif _grows(entry, quiet_s, now):
            growing.append(file)
        elif file.bytes > max_bytes:
            refused.append(file.refused(f"has {file.bytes:,} bytes: more than the {max_bytes:,} of a batch"))
        else:
            waiting.append(file)
    repeated: list[File] = []
    for file, why in _met_before(lake, known, pointer, waiting, max_bytes):
        waiting.remove(file)
        if why and lake.tables[file.table].on_duplicate == "newest":
            waiting.append(replace(file, again=True))
        elif why:
            refused.append(file.refused(why))
        else:
            repeated.append(file)
    date = f"{now:%Y-%m-%d}"  # what is there by now could not be taken away from landing
    refused = [file for file in refused if not lake.root.exists(_refused(file, date))]
    repeated = [file for file in repeated if not lake.root.exists(_repeated(file, date))]
    return Waiting(*map(tuple, (_ordered(lake, waiting), repeated, refused, growing, unmatched)))


def _ordered(lake: "Lake", waiting: list[File]) -> list[File]:
    """By their numbers, those without one last; then the oldest first, then as their tables are declared."""
    tables, never = list(lake.tables), datetime.max.replace(tzinfo=UTC)

    def place_in_line(file: File) -> tuple[bool, int, datetime, int, str]:
        when = never if file.sequence is not None else file.modified or never
        return file.sequence is None, file.sequence or 0, when, tables.index(file.table), file.path

    return sorted(waiting, key=place_in_line)


def _grows(entry: Entry, quiet_s: float, now: datetime) -> bool:
    """Whether a file may still be written: it did not come whole, and was not quiet for so long."""
    if entry.whole or not entry.modified:
        return False
    return -PATIENCE < now - entry.modified < timedelta(seconds=quiet_s)


def _globs(lake: "Lake") -> str:
    return ", ".join(f"{table.glob} is {name}'s" for name, table in lake.tables.items())


def _met_before(
    lake: "Lake", known: ledger.Known, pointer: dict[str, Any] | None, waiting: list[File], max_bytes: int
) -> list[tuple[File, str | None]]:
    """The files whose path is in the lake, and why they are refused: None when the content is, too."""
    digests = {ledger.of_path(file.path): file for file in waiting}
    batches = known.find([*digests])
    if not batches or not pointer:
        return []
    rows = ledger.published(lake, pointer, batches.values())
    met = [digests[digest] for digest in batches if digests[digest].name in {*rows["path"]}]
    return [(file, _unlike(lake, known, pointer, file, max_bytes)) for file in met]


def _unlike(lake: "Lake", known: ledger.Known, pointer: dict[str, Any], file: File, max_bytes: int) -> str | None:
    """Why a file whose path was ingested is not the same file; None when it is."""
    try:
        sha256 = hashlib.sha256(lake.root.read_at_most(file.landing, max_bytes)).hexdigest()
    except Unreadable as error:
        return str(error)
    digests = ledger.of_path(file.path), ledger.of_content(file.table, sha256)
    rows = ledger.published(lake, pointer, known.find(digests).values()).filter(path=file.name)
    if sha256 in {*rows["sha256"]}:
        return None
    return f"was ingested in batch {max(rows['batch'].to_list())} with other content"


def cut(files: tuple[File, ...], max_files: int, max_bytes: int) -> tuple[File, ...]:
    """The first of `files` that make one batch; those of one sequence stay together where a batch can hold them."""
    taken, size = 0, 0
    while taken < len(files) and taken < max_files and (size := size + files[taken].bytes) <= max_bytes:
        taken += 1
    whole = taken
    while 0 < whole < len(files) and None is not files[whole - 1].sequence == files[whole].sequence:
        whole -= 1
    return files[: whole or taken]


def archive(
    root: Root,
    files: Iterable[tuple[File, str]],
    date: str,
    run_id: str,
    require: Callable[[], None] = lambda: None,
) -> list[File]:
    """Move ingested files (and their sha256) to the archive of that day. Returns those that changed meanwhile: refused.

    May be called again after a crash. A file that cannot be taken away from landing is copied. What another run has
    archived may be there again by now, with other content. So `require` is asked between the look at each and its move,
    and no other file is moved than the one that was looked at, however long that was ago.
    """
    files = [*files]
    moved = root.each(lambda file: _archive(root, *file, date, require), files)
    changed = [file for file in moved if file.why]
    folders = {posixpath.dirname(file.archived(date)) for file in moved if not file.why}
    if root.may_tear:
        root.sync(filter(root.exists, sorted(folders)))
    refuse(root, changed, date, run_id)
    return changed


def _archive(root: Root, file: File, sha256: str, date: str, require: Callable[[], None]) -> File:
    """Move a file; where it changed meanwhile it stays, and is returned with the reason."""
    crash_point(f"before the archive: {file.table}")
    target = free(root, file, date)
    if not _is_moved_as_listed(root, file, target, require):
        entry = root.entry(file.landing)
        if entry and entry.mark != file.mark and not _is(root, file, sha256):
            why = "changed while it was ingested: the lake has what it was before"
            return replace(file, why=why, mark=entry.mark)
        require()
        if entry:  # when it is not there it was moved before, by a run that may have died before it was synced
            root.move(file.landing, target, entry.mark)
    crash_point(f"after the archive: {file.table}")
    return file


def _is_moved_as_listed(root: Root, file: File, target: str, require: Callable[[], None]) -> bool:
    """Whether the file is moved without another look at it: where the store moves no other than the one listed."""
    if root.may_tear or not file.mark:
        return False
    require()
    try:
        return root.move(file.landing, target, file.mark)
    except FileNotFoundError:
        return False


def free(root: Root, file: File, date: str) -> str:
    """A path of the archive that has nothing yet: of a file under whose path others came before one of its own."""
    if not file.again:
        return file.archived(date)
    others = (f"archive/{date}/{AGAIN}/{number}/{file.path}" for number in itertools.count(1))
    return next(rel for rel in itertools.chain([file.archived(date)], others) if not root.exists(rel))


def in_archive(root: Root, file: File, date: str) -> list[str]:
    """Where a file may be in the archive of a day."""
    others = [f"archive/{date}/{AGAIN}/{name}/{file.path}" for name in root.names(f"archive/{date}/{AGAIN}")]
    return [file.archived(date), *others]


def path_of(rel: str) -> str:
    """The path below landing/ that a file in the archive has, or had."""
    path = rel.split("/", 2)[2]
    return path.split("/", 2)[2] if path.startswith(f"{AGAIN}/") else path


def _is(root: Root, file: File, sha256: str) -> bool:
    try:
        return hashlib.sha256(root.read_at_most(file.landing, 1 << 40)).hexdigest() == sha256
    except Unreadable:
        return False


def set_aside(root: Root, repeated: Iterable[File], date: str) -> None:
    """Move files that were ingested before to the archive, apart from the first ones."""
    for file in repeated:
        root.move(file.landing, _repeated(file, date), file.mark)


def refuse(root: Root, files: Iterable[File], date: str, run_id: str) -> None:
    """Move files to `refused/<date>/`, each beside a file that says why; one that is another by now stays."""
    for file in files:
        entry = root.entry(file.landing)
        if entry and file.mark not in ("", entry.mark):
            continue
        file = replace(file, mark=entry.mark if entry else file.mark)
        target = _refused(file, date)
        root.write(target + WHY, _why(file, run_id))
        crash_point("a refused file is not moved yet")
        left = entry and not root.move(file.landing, target, file.mark)
        if left and root.mark(file.landing) == file.mark and not root.exists(target):
            root.write(target, b"")  # what cannot be copied either, as a pipe


def _repeated(file: File, date: str) -> str:
    return f"archive/{date}/{REPEATED}/{file.apart}"


def _refused(file: File, date: str) -> str:
    return f"refused/{date}/{file.apart}"


def _why(file: File, run_id: str) -> bytes:
    why = {"table": file.table or None, "file": file.name, "landing": file.landing, "why": file.why}
    return json.dumps(why | {"bytes": file.bytes, "run_id": run_id}, indent=1).encode()


class Grown(NamedTuple):
    """What was written to a file after it was ingested. `date`: of the archive that it is in."""

    file: File
    content: bytes
    date: str


def grown(root: Root, document: dict[str, Any]) -> Iterator[Grown]:
    """Of a batch's files, as its manifest has them, those that have grown, but what `keep` has kept.

    Who has a file open does not notice that it is moved.
    """
    date, batch = document["date"], document["batch"]
    for file in document["files"] if root.may_tear else ():
        rel = f"archive/{date}/{file['path']}"
        entry = root.entry(rel)
        if entry and entry.problem is None and entry.bytes > file["bytes"]:
            path = f"{RETRIED}/{file['table']}/{ledger.of_path(file['path'])}-{batch}"
            why = f"was written to {ledger.shown(file['path'])} after that was ingested in batch {batch}"
            content = root.read(rel)
            if hashlib.sha256(content[: file["bytes"]]).hexdigest() != file["sha256"]:
                continue
            added = content[file["bytes"] :]
            rest = File(path, file["table"], len(added), f"{len(added)}", why=why)
            if not root.exists(_refused(rest, date) + WHY):
                yield Grown(rest, added, date)


def keep(root: Root, parts: Iterable[Grown], run_id: str) -> None:
    """Put what was written too late into `refused/`, to be ingested as a file of its own by whoever wants to."""
    for file, content, date in parts:
        root.write(_refused(file, date), content)
        root.write(_refused(file, date) + WHY, _why(file, run_id))
