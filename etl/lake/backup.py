"""What is published under a root, copied elsewhere while everything runs: several points in time, and a root again.

    files/<path>             what never changes under its name, as a table's data files: all points share it
    points/<point>/<path>    what does: the pointer, the logs from their last checkpoint on, the list of answers
    points/<point>.json      what the point has: each file with its size and sha256, each table with its rows

The pointer is read first, then exactly what it names is copied; what comes meanwhile belongs to a later point. Both
folders, laid over each other, are a root: `cp -r` is enough to have it back without this program. Points are told apart
and removed by their number, since the clock that gave them their time may have been wrong.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from etl import delta
from etl.lake import commit, ledger, quarantine, snapshot
from etl.storage import Damaged, LocalRoot, Root, crash_point, temporary_folder

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

FILES, POINTS = "files", "points"
LEASE = "backup.lease"
NOTE = "backups.json"  # under the root that was copied: URL -> its newest point
SCRATCH = "restoring"
BESIDE = ("runs", "scores")  # Delta tables without a pointer: the index of runs, what models predicted
REPLACED = (*BESIDE, "results", "models", "lake")  # as they are in the point; what else it has is added. The lake last
MADE_AGAIN = re.compile(r"^reports/.*/report\.html$|^results/[^/]+/portion/")  # from the notebook, and from all rows
KEEP = 30  # points
WORKERS = 4  # each holds a file in memory
ATTEMPTS = 5  # to find a state that is whole, where tables are swapped meanwhile
NAMED = re.compile(r"(\d{8})-\d{8}T\d{6}Z\.json")


class NoBackup(LookupError):
    """There is no point, or none that is as old as was asked for."""


class NotEmpty(RuntimeError):
    """Where a root would be restored there is one."""


class Moved(RuntimeError):
    """What was being copied was swapped for something else meanwhile."""


@dataclass(frozen=True)
class Copy:
    """A file of a point. `path`: below the root; `stored`: below the backup."""

    path: str
    stored: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """A table of a point: its files with their bytes, and the rows that its log says they have."""

    version: int
    rows: int
    files: dict[str, int]


@dataclass(frozen=True)
class Point:
    """What was published at a time. `at`: by the clock of the machine that made it. `tables`: path -> what it has."""

    number: int
    at: datetime
    batch: int
    as_of: str
    tables: dict[str, Content] = field(repr=False)
    files: tuple[Copy, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.number:08d}-{self.at:%Y%m%dT%H%M%SZ}"

    @property
    def bytes(self) -> int:
        return sum(copy.bytes for copy in self.files)


@dataclass(frozen=True)
class Made:
    """What a backup did: its point, how many files and bytes it had to write, how many points went."""

    point: Point
    written: int
    bytes: int
    removed: int


@dataclass
class _State:
    """What is to be copied. `changing`: path -> content. `lasting`: path -> bytes; `needed`: those without which there
    is no point, others may be gone by the time they are read."""

    pointer: dict[str, Any]
    tables: dict[str, Content]
    changing: dict[str, bytes]
    lasting: dict[str, int]
    needed: set[str]


def backup(
    lake: "Lake",
    target: Root,
    *,
    archive: bool = False,
    reports: bool = True,
    keep: int = KEEP,
    verify: bool = False,
    now: datetime | None = None,
) -> Made:
    """Copy what is published to another root, as a new point; of `keep` points (0: all) the oldest go.

    Every file that is written is read again. With `verify` all files of the point are, also those that were there.
    Raises snapshot.NothingPublished, leases.LeaseHeld when another backup is under way, Damaged when what was written
    is not what is read, and ValueError when one of the roots is inside the other.
    """
    root, at = lake.root, (now or datetime.now(UTC)).replace(microsecond=0)
    if f"{target.url}/".startswith(f"{root.url}/") or f"{root.url}/".startswith(f"{target.url}/"):
        raise ValueError(f"a backup of {root.url} in {target.url} would be lost with it: name another folder or bucket")
    if not commit.settled(lake, "backup"):
        raise snapshot.NothingPublished(f"nothing is published under {root.url} yet: there is nothing to copy")
    with target.lease(LEASE, f"process {os.getpid()}", wait_s=0):
        earlier = points(target)
        _remove_unfinished(target, earlier)
        number = 1 + max((point.number for point in earlier), default=0)
        there = {f"{FILES}/{path}": entry.bytes for path, entry in target.tree(FILES)}
        known = {(copy.path, copy.bytes): copy for point in earlier for copy in point.files}
        known = {key: copy for key, copy in known.items() if there.get(copy.stored) == copy.bytes}
        point, written = _copy(lake, target, Point(number, at, 0, "", {}, ()), known, archive, reports)
        _require_whole(target, point)
        if verify:
            _each(partial(_require_same, target), point.files)
        crash_point("a point without its list")
        target.write(_list_of(point.name), _written(point))
        removed = _prune(target, [*earlier, point], keep)
    _note(root, target, point)
    return Made(point, len(written), sum(copy.bytes for copy in written), removed)


def points(target: Root) -> list[Point]:
    """The points of a backup, the oldest first. Raises Damaged."""
    return [_read(target, name) for name in target.names(POINTS) if NAMED.fullmatch(name)]


def newest(root: Root) -> tuple[str, datetime] | None:
    """The newest backup that was made of a root: its URL without credentials, and when. None when none ever was."""
    try:
        notes = (root.read_json(NOTE) or {"backups": {}})["backups"]
        made = {url: datetime.fromisoformat(note["at"]) for url, note in notes.items()}
    except (Damaged, KeyError, ValueError, TypeError, AttributeError):
        return None
    return max(made.items(), key=lambda item: item[1], default=None)


def restore(
    lake: "Lake", source: Root, *, as_of: datetime | None = None, force: bool = False, run_id: str = "restore"
) -> tuple[Point, list[str]]:
    """A point, the newest or the last one of before `as_of`, into a root. Returns it and the folders that were moved.

    All of it is copied and looked at beside the root before anything is moved. With `force` the folders of REPLACED
    that are there are moved aside, as `lake-before-<time>`. Raises NoBackup, Damaged, leases.LeaseHeld, and NotEmpty
    when there is something without `force`; nothing is changed then.
    """
    root = lake.root
    if f"{source.url}/".startswith(f"{root.url}/") or f"{root.url}/".startswith(f"{source.url}/"):
        raise ValueError(f"{root.url} and its backup are to be apart: name another folder or bucket")
    made = [point for point in points(source) if as_of is None or point.at <= as_of]
    if not made:
        raise NoBackup(f"there is no backup in {source.url}" + (f" of {as_of} or before" if as_of else ""))
    point = made[-1]
    held = [folder for folder in REPLACED if _holds(root, folder)]
    if held and not force:
        raise NotEmpty(f"{root.url} has {' and '.join(held)} already")
    root.make()
    root.remove_tree(SCRATCH)
    _each(partial(_bring, source, root), point.files)
    for table, content in point.tables.items():
        if (came := _content(root.table(f"{SCRATCH}/{table}", content.version))) != content:
            raise Damaged(f"{table} has {came.rows:,} rows in {len(came.files)} files, not {content.rows:,}")
    crash_point("restored beside the root")
    before, moved = f"before-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}", []
    with root.lease(commit.WRITER, run_id) as lease:
        pointer = json.loads(root.read(f"{SCRATCH}/{snapshot.POINTER}")) | {"fence": lease.fence}
        # a writer that was stopped may wait for the very pointer that comes back: with another fence it is not that
        root.write(f"{SCRATCH}/{snapshot.POINTER}", json.dumps(pointer, indent=1).encode())
        for folder in REPLACED:
            if root.files(folder):
                aside = f"{folder}-{before}" if folder in held else f"{SCRATCH}/.{folder}"
                moved += [aside] if folder in held else []
                root.move_tree(folder, aside)
            if root.files(f"{SCRATCH}/{folder}"):
                root.remove_tree(folder)
                root.move_tree(f"{SCRATCH}/{folder}", folder, last="published.json" if folder == "lake" else None)
        for path, _ in root.tree(SCRATCH):
            if not path.startswith(".") and not root.entry(path):
                root.move(f"{SCRATCH}/{path}", path)
        root.remove_tree(SCRATCH)
        lease.about["batch"] = point.batch
    return point, moved


def _copy(
    lake: "Lake", target: Root, point: Point, known: dict[tuple[str, int], Copy], archive: bool, reports: bool
) -> tuple[Point, list[Copy]]:
    """The files of a point, and those of them that had to be written. `known`: by path and bytes what is there."""
    taken = {copy.stored for copy in known.values()}
    for attempt in range(ATTEMPTS):
        try:
            identity = _identity(lake)
            state = _state(lake, archive, reports)
            copies = _each(partial(_copy_lasting, lake.root, target, known, taken, state), sorted(state.lasting))
            if _identity(lake) != identity:
                raise Moved(f"{lake.root.url}/lake was swapped for another one meanwhile")
            break
        except (FileNotFoundError, Moved):
            if attempt + 1 == ATTEMPTS:
                raise
    folder = f"{POINTS}/{point.name}"
    small = _each(lambda path: _write(target, path, f"{folder}/{path}", state.changing[path]), sorted(state.changing))
    lasting = [copy for copy in copies if copy]
    files = tuple(sorted([*lasting, *small], key=lambda copy: copy.path))
    pointer = state.pointer
    made = Point(point.number, point.at, pointer["batch"], pointer["as_of"], state.tables, files)
    return made, [*small, *(copy for copy in lasting if known.get((copy.path, copy.bytes)) != copy)]


def _identity(lake: "Lake") -> str | None:
    """What tells this lake from one that is swapped in for it: the id of the ledger, or of another table."""
    for table in reversed(lake.columns):
        if delta.newest_version(lake.root, f"lake/{table}") is not None:
            return str(lake.table(table).metadata().id)
    return None


def _state(lake: "Lake", archive: bool, reports: bool) -> _State:
    """What is published now, of one lake. Raises FileNotFoundError and Moved where it goes while it is looked at."""
    root = lake.root
    # before the pointer: what is scored is in it, or a restored root would leave out rows that it takes up once more
    beside = {table: delta.newest_version(root, table) for table in BESIDE}
    pointer = snapshot.read_pointer(root)
    if pointer is None or "under" in pointer:
        raise Moved(f"{snapshot.POINTER} went meanwhile, or a rebuild puts another lake into its place")
    handles = {f"lake/{table}": root.table(f"lake/{table}", version) for table, version in pointer["tables"].items()}
    handles |= {table: root.table(table, version) for table, version in beside.items() if version is not None}
    changing = {snapshot.POINTER: json.dumps(pointer, indent=1).encode()}
    for table, handle in handles.items():
        changing |= {rel: root.read(rel) for rel in _log(root, table, handle.version())}
    tables = {table: _content(handle) for table, handle in handles.items()}
    data = {f"{table}/{path}": size for table, content in tables.items() for path, size in content.files.items()}
    lasting = dict(data)
    for path, content in _around(lake, pointer):
        changing[path] = content
    index = (ledger.read(root, pointer["batch"]) or {}).get("known", {}).get("index")
    if index and (entry := root.entry(index)):
        lasting[index] = entry.bytes
    for path, size in _beside(root, archive, reports):
        if _changes(path):
            changing |= _if_there(root, path)
        else:
            lasting[path] = size
    return _State(pointer, tables, changing, lasting, {*data})


def _around(lake: "Lake", pointer: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """What of the lake's own files a run needs besides the tables. The batch is over: its files are in the ledger."""
    manifest = ledger.manifest(pointer["batch"])
    beside = [f"landing/{name}" for name in lake.beside]
    for path in (manifest, quarantine.TRIED, *beside):
        yield from _if_there(lake.root, path).items()
    yield ledger.done(pointer["batch"]), b""


def _beside(root: Root, archive: bool, reports: bool) -> Iterator[tuple[str, int]]:
    """What stands beside the lake: path, bytes."""
    folders = ["results", "models", "releases", "refused"]
    folders += [*(["reports"] if reports else []), *(["archive"] if archive else [])]
    for folder in folders:
        for path, entry in root.tree(folder):
            if not entry.problem and not MADE_AGAIN.search(f"{folder}/{path}"):
                yield f"{folder}/{path}", entry.bytes


def _changes(path: str) -> bool:
    """Whether a file beside the lake is another one later under the same name: the pointers and lists."""
    folder, *below = path.split("/")
    return (folder in ("models", "releases") and len(below) == 1) or (folder == "results" and path.endswith(".json"))


def _if_there(root: Root, path: str) -> dict[str, bytes]:
    try:
        return {path: root.read(path)}
    except (FileNotFoundError, IsADirectoryError):
        return {}


def _log(root: Root, table: str, version: int) -> list[str]:
    """The files of a table's log by which a version opens: its last checkpoint, and the commits from that on."""
    log, names = delta.log_of(table), delta.end_of_log(root, table, version)
    names = [name for name in names if name[20:] == ".json" or ".checkpoint." in name]
    start = max((int(name[:20]) for name in names if ".checkpoint." in name), default=-1)
    if not {f"{number:020d}.json" for number in range(start + 1, version + 1)} <= {*names}:
        raise FileNotFoundError(f"{log} has not all commits up to version {version}")
    return [f"{log}/{name}" for name in names]


def _content(handle: "DeltaTable") -> Content:
    return Content(handle.version(), delta.file_stats(handle)[1], delta.sizes(handle))


def _copy_lasting(
    root: Root, target: Root, known: dict[tuple[str, int], Copy], taken: set[str], state: _State, path: str
) -> Copy | None:
    """A file that never changes; None when it went meanwhile and need not be there."""
    size = state.lasting[path]
    if copy := known.get((path, size)):
        return copy
    try:
        data = root.read(path)
    except FileNotFoundError:
        if path in state.needed:
            raise
        return None
    if path in state.needed and len(data) != size:
        raise Damaged(f"{path} has {len(data):,} bytes, not {size:,} as its table says: see `doctor`")
    stored = f"{FILES}/{ledger.shown(path)}"
    if stored in taken:
        stored += f"~{hashlib.sha256(data).hexdigest()[:8]}"  # another one of that name, which an older point has
    return _write(target, path, stored, data)


def _write(target: Root, path: str, stored: str, data: bytes) -> Copy:
    """Write a file, and read it again. Raises Damaged."""
    target.write(stored, data)
    copy = Copy(path, stored, len(data), hashlib.sha256(data).hexdigest())
    _require_same(target, copy)
    return copy


def _require_same(target: Root, copy: Copy) -> bytes:
    """What is stored of a file. Raises Damaged when it is not what was copied."""
    try:
        data = target.read(copy.stored)
    except FileNotFoundError:
        raise Damaged(f"{target.url_of(copy.stored)} is gone") from None
    if hashlib.sha256(data).hexdigest() != copy.sha256:
        raise Damaged(f"{target.url_of(copy.stored)} is damaged: it has not the sha256 of what was copied")
    return data


def _require_whole(target: Root, point: Point) -> None:
    """Open each table by the log that was written, and see that all its files are there. Raises Damaged."""
    there = {f"{FILES}/{path}": entry.bytes for path, entry in target.tree(FILES)}
    stored = {copy.path: copy for copy in point.files}
    for table, content in point.tables.items():
        with temporary_folder("backup-") as folder:
            local = Root.at(folder)
            for path, copy in stored.items():
                if path.startswith(f"{delta.log_of(table)}/"):
                    local.write(path, target.read(copy.stored))
            opened = _content(local.table(table, content.version))
        if opened != content:
            raise Damaged(f"{table} has {opened.rows:,} rows by the log that was written, not {content.rows:,}")
        for path, size in content.files.items():
            copy = stored[f"{table}/{path}"]
            if there.get(copy.stored) != size:
                raise Damaged(f"{target.url_of(copy.stored)} has {there.get(copy.stored, 'no')} bytes, not {size:,}")


def _bring(source: Root, root: Root, copy: Copy) -> None:
    path = copy.path if isinstance(root, LocalRoot) else ledger.shown(copy.path)
    root.write(f"{SCRATCH}/{path}", _require_same(source, copy))


def _holds(root: Root, folder: str) -> bool:
    """Whether something is in a folder that a restore replaces; a lease is nothing."""
    return any(
        not path.endswith(".lease") and not path.startswith("leases/") and path.rpartition("/")[2][0] != "."
        for path, _ in root.tree(folder)
    )


def _each(work: Any, items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return [*pool.map(work, items)]


def _list_of(name: str) -> str:
    return f"{POINTS}/{name}.json"


def _written(point: Point) -> bytes:
    """The list of a point, as it is stored."""
    tables = {
        table: {"version": content.version, "rows": content.rows, "files": content.files}
        for table, content in point.tables.items()
    }
    about = {"number": point.number, "at": point.at.isoformat(), "batch": point.batch, "as_of": point.as_of}
    files = [[copy.path, copy.stored, copy.bytes, copy.sha256] for copy in point.files]
    return json.dumps({**about, "tables": tables, "files": files}).encode()


def _read(target: Root, name: str) -> Point:
    """The point of a list. Raises Damaged."""
    rel = f"{POINTS}/{name}"
    document = target.read_json(rel) or {}
    try:
        tables = {table: Content(**content) for table, content in document["tables"].items()}
        files = tuple(Copy(*copy) for copy in document["files"])
        at = datetime.fromisoformat(document["at"])
        return Point(document["number"], at, document["batch"], document["as_of"], tables, files)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{target.url_of(rel)} is damaged: {error!r}") from None


def _remove_unfinished(target: Root, whole: list[Point]) -> None:
    """Remove what is of no point: a backup that was killed left it, or a removal of a point."""
    names = {point.name for point in whole}
    folders = {path.partition("/")[0] for path, _ in target.tree(POINTS) if "/" in path}
    for folder in folders - names:
        if NAMED.fullmatch(f"{folder}.json"):
            target.remove_tree(f"{POINTS}/{folder}")


def _prune(target: Root, made: list[Point], keep: int) -> int:
    """Remove all but the last `keep` points, and the files that no other has; how many points went."""
    gone = made[:-keep] if keep else []
    for point in gone:
        target.remove(_list_of(point.name))  # from now on it is no point
        crash_point("a point is half removed")
        target.remove_tree(f"{POINTS}/{point.name}")
    if gone:
        kept = {copy.stored for point in made[len(gone) :] for copy in point.files}
        target.remove_all(sorted({f"{FILES}/{path}" for path, _ in target.tree(FILES)} - kept))
    return len(gone)


def _note(root: Root, target: Root, point: Point) -> None:
    """Write down under the root that it was copied, where to, and when."""
    try:
        notes = (root.read_json(NOTE) or {}).get("backups", {})
    except Damaged:
        notes = {}
    notes[_without_credentials(target.url)] = {"at": point.at.isoformat(), "point": point.name}
    root.write(NOTE, json.dumps({"backups": notes}, indent=1).encode())


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "://" in url else url
