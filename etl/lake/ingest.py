"""JSON files become Delta tables: each row exactly once, whatever dies on the way.

A batch is numbered and written down first (`lake/batches/<n>.json`: the files with their sizes and sha256), then
committed to each table under its number, the ledger `files` among them, then published, then its files are archived,
then it is marked done. Each of these steps is on the disk before the next one is taken. A run that finds an unfinished
batch finishes that one, from the same files. Rows that do not fit go to `quarantine` with file, line, reason and the
raw text; files that cannot be read at all, or of which no line fits, or too few, go to `refused/`.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from etl.clusters import connected
from etl.figures import utc
from etl.lake import commit as commits
from etl.lake import evolution, formats, landing, ledger, memory, reading, schemas, snapshot, upsert, workers
from etl.lake.landing import File
from etl.lake.reading import Opened, Reading, Written
from etl.lake.table import QUARANTINE, RESCUED, DataType, Table
from etl.leases import LeaseHeld, LeaseLost
from etl.storage import Root, crash_point

if TYPE_CHECKING:
    import distributed

    from etl.lake.lake import Lake

MAX_BYTES = 256_000_000  # of JSON in a batch: about four times that in memory
MOST_PARTITIONS = 1_000  # of a table in a batch
EARLIEST = "1970-01-01T00:00:00+00:00"  # of `as_of`: what is asked for goes back from it, and time begins with year 1
FILES: dict[str, DataType] = {
    "table": pl.String,
    "file": pl.String,
    "bytes": pl.Int64,
    "sha256": pl.String,
    "lines": pl.Int64,
    "good": pl.Int64,
    "bad": pl.Int64,
}
SUMMARY: dict[str, DataType] = {
    "batch": pl.Int64,
    "files": pl.Int64,
    "files_refused": pl.Int64,
    "mb": pl.Float64,
    "rows": pl.Int64,
    "refused": pl.Int64,
    "rescued": pl.Int64,  # rows with fields that no column takes
    "tables": pl.List(pl.String),
    "files_unfit": pl.Int64,  # of those refused: too few of their lines fit
    "unfit": pl.List(pl.Struct({"lines": pl.Int64, "bad": pl.Int64, "file": pl.String, "why": pl.String})),
}
UNFIT: dict[str, DataType] = {
    "table": pl.String,
    "file": pl.String,
    "lines": pl.Int64,
    "bad": pl.Int64,
    "why": pl.String,
}
SHOWN_FILES = 5  # of those of which too few lines fit
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Overtaken(LeaseHeld):
    """Another run took this batch's number for other files; nothing was written."""


class TooManyPartitions(ValueError):
    """A batch would become too many files; nothing was written."""


@dataclass(frozen=True)
class Batch:
    """The files one run ingests. `manifest`: what was written down, when an earlier run left the batch unfinished.
    `repeated`: files in landing that were ingested before; they are set aside, not read. `refused`: those that cannot
    be read, each with its reason. `growing` and `unmatched`: files that are still written, and that are no table's:
    they are left alone. `grown`: what was written to files after they were ingested, which is refused. `known`: what
    is in the lake; `again`: also what has the content of another file of its table, whatever is declared. `held`: files
    of tables that cannot become what they are declared to be; they wait. `blocked`: which tables these are, and why,
    for people; empty for none. `pointer` and `looks`: what was published when the batch was taken, and what had come
    to each table since."""

    lake: "Lake"
    number: int
    date: str  # of the archive: the day on which the files are really moved, UTC
    at: str  # ISO 8601: the run's own time or the clock's, whichever is later; when it was written down, if it was
    files: tuple[File, ...]
    repeated: tuple[File, ...] = ()
    refused: tuple[File, ...] = ()
    manifest: dict[str, Any] | None = None
    growing: tuple[File, ...] = ()
    unmatched: tuple[File, ...] = ()
    grown: tuple[landing.Grown, ...] = ()
    known: ledger.Known | None = None
    again: bool = False
    held: tuple[File, ...] = ()
    blocked: str = ""
    pointer: dict[str, Any] | None = None
    looks: Mapping[str, schemas.Look] = field(default_factory=dict)

    @property
    def mb(self) -> float:
        """Of its files, in millions of bytes."""
        return sum(file.bytes for file in self.files) / 1e6

    def __str__(self) -> str:
        """For people: what it has, and what it leaves."""
        told = [f"batch {self.number}: {len(self.files):,} files"]
        for files, one, many in (
            (self.repeated, "was ingested before and is set aside", "were ingested before and are set aside"),
            (self.growing, "is still being written", "are still being written"),
            (self.held, "waits for its table's declaration", "wait for their tables' declarations"),
            (self.unmatched, "is no table's", "are no table's"),
        ):
            told.append(landing.said(len(files), (file.name for file in files), one, many))
        return "; ".join(filter(None, told))


@dataclass(frozen=True)
class Parsed:
    """A batch read and checked, nothing committed yet.

    `frames`: table -> typed rows; `written`: the same, where workers have put them into files. `refused`: rows for
    quarantine (columns of `table.QUARANTINE`). `files`: one row a file: table, file, bytes, sha256, lines, good, bad.
    `batch.refused`: all files that are refused. `clocks`: table -> its newest time, ISO 8601, of those that have one.
    `unfit`: of the refused files those of which too few lines fit, the worst first: table, file, lines, bad, why.
    """

    batch: Batch
    frames: dict[str, pl.DataFrame]
    refused: pl.DataFrame
    files: pl.DataFrame
    clocks: dict[str, str]
    unfit: pl.DataFrame
    written: dict[str, Written] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.files["lines"].sum())

    @property
    def rescued(self) -> int:
        """How many rows have fields that no column takes."""
        here = sum(frame[RESCUED].count() for frame in self.frames.values())
        return here + sum(written.rescued for written in self.written.values())

    @property
    def heights(self) -> dict[str, int]:
        """Table -> how many rows it gets."""
        here = {table: frame.height for table, frame in self.frames.items()}
        return here | {table: written.rows for table, written in self.written.items()}


def next_batch(
    lake: "Lake",
    *,
    max_files: int,
    scheduled_for: str | None,
    max_bytes: int = MAX_BYTES,
    quiet_s: float = 0,
    now: datetime | None = None,
    again: bool = False,
) -> Batch | None:
    """The unfinished batch when there is one, else the files that wait, in the order of `landing.look`.

    At most `max_files`, and at most `max_bytes` of input; a larger file is refused before it is read. A file that is
    written in place is left alone until nothing was written to it for `quiet_s` seconds. None when nothing waits.
    Those of a table that cannot become what it is declared to be wait. `scheduled_for`: what the run says of its time,
    ISO 8601; `now`: what the clock says, if not the machine's. `again`: as in `Batch`. Raises storage.Damaged when it
    cannot be known what was ingested, schemas.SchemasDiffer when there is nothing to ingest and such a table, or one
    that has files in an unfinished batch.
    """
    batch, wrong = _next(lake, max_files, max_bytes, quiet_s, scheduled_for, now, again=again)
    if batch is None:
        schemas.require_none(wrong, wrong)
    return batch


def blocked(lake: "Lake") -> str:
    """Which tables cannot become what they are declared to be, so that their files wait, and why; empty for none."""
    return _said(schemas.blocked(schemas.unsettled(lake, snapshot.read_pointer(lake.root))))


def _said(wrong: Mapping[str, str]) -> str:
    return schemas.refusal([*wrong.values()]) if wrong else ""


def _next(
    lake: "Lake",
    max_files: int,
    max_bytes: int,
    quiet_s: float,
    scheduled_for: str | None,
    now: datetime | None,
    *,
    again: bool,
) -> tuple[Batch | None, dict[str, str]]:
    """As `next_batch`, and the tables that are blocked."""
    root, now = lake.root, now or datetime.now(UTC)
    pointer = commits.settled(lake, "next batch")
    if pointer is None:
        commits.require_beginning(root)
    looks = schemas.look_at_all(lake, pointer)
    wrong = schemas.blocked(schemas.unsettled(lake, pointer, looks))
    schemas.require_none(wrong, ())
    date, looked_at = f"{now:%Y-%m-%d}", pointer
    last = max((seen.batch for seen in looks.values()), default=0)
    if pointer and last > pointer["batch"] and (last > pointer["batch"] + 1 or not _is_begun(root, last)):
        pointer = commits.catch_up(lake, "catch-up")
    if pointer and "files" not in pointer["tables"]:  # before any batch: its ledger would begin with that one
        pointer = _adopt(lake)
    number = pointer["batch"] if pointer else 0
    seen: dict[str, Any] = {"pointer": pointer, "looks": looks if pointer == looked_at else {}, "blocked": _said(wrong)}
    there, manifest = ledger.there(root, number), None
    for unfinished in (number + 1, number):
        manifest = ledger.read(root, unfinished) if ledger.manifest(unfinished) in there else None
        # what was marked done and is not published was published once: the pointer, or more, was copied back
        if manifest and (unfinished > number or ledger.done(unfinished) not in there):
            if unfinished > number:  # of one that is published nothing is written to tables any more
                schemas.require_none(wrong, {file["table"] for file in manifest["files"]})
            files = tuple(replace(landing.of(lake, f["path"], f["bytes"]), again=True) for f in manifest["files"])
            return Batch(lake, unfinished, date, ledger.time_of(manifest, now), files, manifest=manifest, **seen), wrong
    known = ledger.known(lake, pointer, manifest)
    waiting = landing.look(lake, known, pointer, max_bytes=max_bytes, quiet_s=quiet_s, now=now)
    files = landing.cut(tuple(file for file in waiting.files if file.table not in wrong), max_files, max_bytes)
    held = tuple(file for file in waiting.files if file.table in wrong)
    grown = tuple(landing.grown(root, manifest)) if manifest else ()
    if not files and not waiting.repeated and not waiting.refused and not grown:
        return None, wrong
    at = max(now, utc(scheduled_for) if scheduled_for else now).isoformat(timespec="seconds")
    left: dict[str, Any] = {"growing": waiting.growing, "unmatched": waiting.unmatched, "grown": grown, "held": held}
    left |= {"known": known, "again": again, **seen}
    return Batch(lake, number + 1, date, at, files, waiting.repeated, waiting.refused, **left), wrong


def _is_begun(root: Root, number: int) -> bool:
    """Whether a batch was written down and not ended."""
    return root.exists(ledger.manifest(number)) and not root.exists(ledger.done(number))


def _adopt(lake: "Lake") -> dict[str, Any]:
    """Give a lake of an earlier release its ledger, from its manifests; returns the pointer that names it."""
    with commits.writing(lake, "adopt") as writer:
        pointer = writer.pointer
        assert pointer is not None, "the caller has seen it, and a lake that vanished is refused"
        if "files" in pointer["tables"]:
            return pointer
        rows = commits.encode(lake, "files", ledger.adopt(lake, pointer))
        commits.create_tables(lake, pointer["run_id"], known=pointer["tables"])
        about = {"batch": pointer["batch"], "run_id": pointer["run_id"]}
        versions = pointer["tables"] | {"files": commits.append(lake, "files", rows, **about, after=-1)}
        return writer.publish(as_of=pointer["as_of"], versions=versions, **about)


def read(
    batch: Batch,
    *,
    max_bad_share: float = 1.0,
    max_inflated: int = formats.INFLATED_BYTES,
    dask: "str | distributed.Client | None" = None,
    dask_above_mb: float = 0,
) -> Parsed:
    """Read a batch's files, type their rows and set apart those that do not fit. Writes nothing to any table.

    A file is refused that cannot be read, of which no line fits, or a larger share of lines than `max_bad_share` (0 to
    1) does not; unless that is 0, a single line is no such share, however small the file. So is one that is no longer
    what the manifest of an unfinished batch says; but none of those that it names by its share, for its rows may be in
    the lake.

    The batch ends before the file with which it would inflate to more than `max_inflated` bytes, or to more than its
    files have as they are, whichever is more; the rest waits for the next batch. So the rows of that many bytes are
    held, and while they are parsed `reading.GROUP_BYTES` a table and two or three files a core, each of at most
    `formats.INFLATED_BYTES`.

    A batch of more than `dask_above_mb` megabytes is read by the workers of the Dask cluster at `dask`, if there is
    one: they write their rows into files, which `commit` names, and none are held here; but those of tables of which
    the newest row of a key counts, which are read here. Raises OSError when nobody answers at `dask`, and
    workers.Unseen when the workers do not see the root.
    """
    lake, cores = batch.lake, os.cpu_count() or 1
    asked = Reading(
        lake.root,
        batch.number,
        {name: reading.rules(table, batch.at) for name, table in lake.tables.items()},
        {f["path"]: f["sha256"] for f in batch.manifest["files"]} if batch.manifest else {},
        1.0 if batch.manifest else max_bad_share,
    )
    there: list[File] = []
    if dask is not None and batch.mb > dask_above_mb:
        there = [file for file in batch.files if not lake.tables[file.table].upserts]
    here = batch.files if not there else tuple(file for file in batch.files if lake.tables[file.table].upserts)
    room = math.inf if batch.manifest or there else max(max_inflated, sum(file.bytes for file in here))
    written: dict[str, Written] = {}
    met: dict[str, File] = {}
    with memory.kept(), ThreadPoolExecutor(cores + 1) as pool:  # one reads and hashes while Polars has the cores
        opened = _under_way(pool, lambda file: reading.open_file(asked, file), here, cores)
        opened = _within(_without_copies(batch, opened, met), room)
        groups = list(_under_way(pool, lambda group: reading.look(asked, group), reading.groups(opened), cores))
    ends = sum(len(looked.files) + len(looked.refused) for looked in groups)
    if ends < len(here):
        groups = [looked.of(_first(batch, ends)) for looked in groups]
    if there:
        with connected(dask) as client:
            assert client is not None, "there is an address"
            looks, written = workers.read(client, asked, there, lambda file, of: _same_content(batch, file, of, met))
        groups += looks
    order = list(lake.tables)
    groups.sort(key=lambda looked: order.index(looked.table))  # stable: a table's oldest first
    good: dict[str, list[pl.DataFrame]] = {}
    quarantined, files, kept, refused, unfit = [], [], [], list(batch.refused), []
    for looked in groups:
        refused += [file.refused(why) for file, why in looked.refused]
        unfit += looked.unfit
        for (file, sha256, size), lines, bad in zip(looked.files, looked.lines, looked.bad, strict=True):
            if bad.height:
                quarantined.append(_for_quarantine(bad, batch, file))
            files.append((file.table, file.name, size, sha256, lines, lines - bad.height, bad.height))
            kept.append(file)
            crash_point(f"read: {file.table}")
        if looked.files and looked.table not in written:
            good.setdefault(looked.table, []).append(looked.rows)
    frames = {table: pl.concat(parts) for table, parts in good.items()}
    for table in frames:
        frames[table] = frames[table].pipe(lake.tables[table].with_days)
        if partitions := lake.tables[table].partitions:
            _require_few(lake.tables[table], frames[table].select(partitions).n_unique())
        if lake.tables[table].upserts:
            frames[table] = upsert.of_batch(frames[table], lake.tables[table], batch.number)
    for table, rows in written.items():
        _require_few(lake.tables[table], len({(*file.values.values(),) for file in rows.files}))
    timed = {table: frame[time] for table, frame in frames.items() if (time := lake.tables[table].time)}
    newest: dict[str, Any] = {table: times.max() for table, times in timed.items() if times.len()}  # datetimes
    newest |= {table: rows.newest for table, rows in written.items() if rows.newest}
    clocks = {table: time.isoformat() for table, time in newest.items()}
    return Parsed(
        replace(batch, files=tuple(kept), refused=tuple(refused)),
        frames,
        pl.concat([pl.DataFrame(schema=QUARANTINE), *quarantined]),
        pl.DataFrame(files, schema=FILES, orient="row"),
        clocks,
        pl.DataFrame(unfit, schema=UNFIT, orient="row").sort(pl.col("bad") / pl.col("lines"), "bad", descending=True),
        written,
    )


def _require_few(table: Table, partitions: int) -> None:
    """Raises TooManyPartitions."""
    if table.partitions and partitions > MOST_PARTITIONS:
        raise TooManyPartitions(
            f"{table.name}: this batch has {partitions:,} values of {', '.join(table.partitions)}, and each would be a "
            f"file of its own: {MOST_PARTITIONS:,} are taken. What to do: fewer files in a batch (max_files), or "
            f"partition_by something of which there are fewer values; sort by this by cluster_by. Nothing was written"
        )


def _first(batch: Batch, count: int) -> set[File]:
    """The batch's first files, at most so many; those of a sequence stay together where that is possible."""
    return set(landing.cut(batch.files[: count + 1], count, sum(file.bytes for file in batch.files)))


def _under_way(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], most: int
) -> Iterator[_Result]:
    """The results in the order of the items, of which no more than `most` are worked at or wait to be taken."""
    futures: deque[Future[_Result]] = deque()
    for item in items:
        futures.append(pool.submit(work, item))
        if len(futures) > most:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _within(opened: Iterable[Opened], room: float) -> Iterator[Opened]:
    """The first files, which together have at most `room` bytes in memory; one has as many as it has."""
    size = 0
    for number, file in enumerate(opened):
        size += file.content.size if file.content else 0
        if size > room and number:
            return
        yield file


def _without_copies(batch: Batch, opened: Iterable[Opened], met: dict[str, File]) -> Iterator[Opened]:
    """The files in their order, those refused that have the content of another one of their table. `met`: as of
    `_same_content`."""
    for file in opened:
        why = _same_content(batch, file.file, file.sha256, met) if file.content else None
        yield file if why is None else file._replace(content=None, why=why)


def _same_content(batch: Batch, file: File, sha256: str, met: dict[str, File]) -> str | None:
    """Why a file is refused that has the content of another one of its table; None where it is not. `met`: by what
    stands for its content, the first file of the batch with it."""
    lake, digest = batch.lake, ledger.of_content(file.table, sha256)
    if batch.manifest or batch.again or lake.tables[file.table].on_duplicate != "refuse":
        return None
    if digest in met:
        return f"has the same content as {met[digest].name}"
    met[digest] = file
    known = batch.known.find([digest]) if batch.known else {}
    pointer = snapshot.read_pointer(lake.root) if known else None
    if not pointer:
        return None
    rows = ledger.published(lake, pointer, known.values()).filter(table=file.table, sha256=sha256)
    return f"has the same content as {rows['path'][0]} of batch {rows['batch'][0]}" if rows.height else None


def commit(parsed: Parsed, *, run_id: str) -> dict[str, int]:
    """Write a batch down, commit it to every table, publish it, archive its files. Returns table -> version; nothing
    where another run has published the batch, whose rows are that one's to count.

    May be killed anywhere and called again: every step looks first whether it is done. May be stopped anywhere and go
    on when others have done what they liked: the files that it archives are in the ledger that is published, in its
    batch. Raises leases.LeaseHeld when another writer is at work, or has taken over; Overtaken when one took this
    number.
    """
    batch = parsed.batch
    root = batch.lake.root
    if not batch.files and not batch.manifest:
        _clear(batch, run_id)
        return {}
    with commits.writing(batch.lake, run_id) as writer:
        if batch.manifest:  # who began it may have died before its names were on the disk
            root.sync(["lake", "lake/batches"])
        root.require_writable(f"archive/{batch.date}")
        if writer.pointer and writer.pointer["batch"] >= batch.number:
            _require_published(parsed, writer.pointer)
            versions = {table: writer.pointer["tables"].get(table, 0) for table in batch.lake.columns}
            versions = versions if writer.pointer["run_id"] == run_id else {}
        else:
            versions = _commit_tables(parsed, _write_down(parsed, writer, run_id), writer, run_id)
        sha256s = dict(parsed.files.select("file", "sha256").rows())
        files = [(file, sha256s[file.name]) for file in batch.files]
        landing.archive(root, files, batch.date, run_id, writer.lease.require)
        _clear(batch, run_id)
        crash_point("before it is marked done")
        writer.lease.require()
        root.write(ledger.done(batch.number), b"")
        batch.lake.finished = batch.number
    crash_point("after all")
    return versions


def _clear(batch: Batch, run_id: str) -> None:
    """Take away from landing what is no part of the batch."""
    root = batch.lake.root
    landing.set_aside(root, batch.repeated, batch.date)
    landing.refuse(root, batch.refused, batch.date, run_id)
    landing.keep(root, batch.grown, run_id)


def _require_published(parsed: Parsed, pointer: dict[str, Any]) -> None:
    """Raise Overtaken unless the files of a batch were published under its number: another run may have taken it."""
    batch = parsed.batch
    if "files" not in pointer["tables"]:  # an earlier release's lake, which has no ledger yet
        return
    rows = ledger.published(batch.lake, pointer, [batch.number])
    known = {*rows.select("path", "sha256").iter_rows()}
    if not known.issuperset(parsed.files.select("file", "sha256").iter_rows()):
        raise Overtaken(f"another run published batch {batch.number} with other files; run this one again")


def _commit_tables(parsed: Parsed, listed: list[dict[str, Any]], writer: commits.Writer, run_id: str) -> dict[str, int]:
    """Append to each table, publish. Returns table -> version. `listed`: the files that the manifest has."""
    number, lake, pointer = parsed.batch.number, parsed.batch.lake, writer.pointer
    before = pointer or {"batch": 0, "tables": {}, "as_of": None}
    versions = {table: before["tables"].get(table, 0) for table in lake.columns}
    entries = ledger.of_batch(number, parsed.batch.at, listed, parsed.files)
    of_all = parsed.frames | {"quarantine": parsed.refused, "files": entries}
    frames = {table: frame for table, frame in of_all.items() if frame.height}
    heights = {table: frame.height for table, frame in frames.items()} | parsed.heights
    # the others are as they were seen when the batch was taken: nothing is written to them
    looks = {**parsed.batch.looks} if parsed.batch.pointer == pointer else {}
    looks |= schemas.look_at_all(lake, pointer, [table for table in lake.columns if table in heights or not looks])
    unsettled = schemas.unsettled(lake, pointer, looks)
    wrong = schemas.blocked(unsettled)
    schemas.require_none(wrong, [*parsed.heights, *(file["table"] for file in listed)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        encoded = {table: pool.submit(commits.encode, lake, table, frame) for table, frame in frames.items()}
        if parsed.batch.manifest and parsed.batch.manifest.get("declared", lake.declaration) != lake.declaration:
            # a table whose files are gone, or others by now, may have more rows than there are to be read
            gone = {
                file.table
                for file in parsed.batch.refused
                if (file.why or "").startswith((reading.GONE, reading.CHANGED))
            }
            asked = [table for table in lake.columns if table not in gone | ({"quarantine"} if gone else set())]
            had = {table: heights.get(table, 0) for table in asked}
            commits.require_same_rows(lake, had, batch=number, published=before["tables"])
        commits.create_tables(lake, run_id, known=before["tables"])
        moved = [table for table in unsettled if table not in wrong]
        versions |= evolution.move(lake, moved, pointer, run_id, writer.lease.require)
        for table in [*parsed.written, *frames]:  # the ledger is the last
            rows = parsed.written[table].files if table in parsed.written else encoded[table].result()
            crash_point(f"before the commit: {table}")
            after = before["tables"].get(table, -1)
            about: Any = {"batch": number, "run_id": run_id, "require": writer.lease.require}
            versions[table] = commits.append(lake, table, rows, after=after, seen=looks.get(table), **about)
            crash_point(f"after the commit: {table}")
        if parsed.batch.manifest:  # rows of files that are gone by now may be in the others
            others = {t: before["tables"].get(t, -1) for t in lake.columns if t not in heights and t not in wrong}
            versions |= commits.committed(lake, others, batch=number)
    known = {table: mark for table, mark in before.get("schemas", {}).items() if table in wrong}
    clocks = snapshot.clocks_of(pointer)
    for table, newest in parsed.clocks.items():
        clocks[table] = max(newest, clocks.get(table, newest))
    # rows without a time are as new as the run that brought them
    as_of = max(EARLIEST, *clocks.values()) if clocks else max(parsed.batch.at, before["as_of"] or "")
    crash_point("before it is published")
    writer.publish(
        batch=number,
        as_of=as_of,
        versions=versions,
        run_id=run_id,
        schemas={table: mark for table, mark in lake.fingerprints.items() if table not in wrong} | known,
        clocks=clocks,
    )
    crash_point("published")
    return versions


def drain(
    lake: "Lake",
    *,
    max_files: int,
    max_bytes: int,
    max_bad_share: float,
    for_s: float,
    scheduled_for: str | None,
    run_id: str,
    quiet_s: float = 0,
    now: datetime | None = None,
    again: bool = False,
    dask: str | None = None,
    dask_above_mb: float = 0,
) -> pl.DataFrame:
    """Commit batch after batch until nothing waits; one row each, as `summary` has it.

    None is begun that, going by the slowest so far, would not be over within `for_s` seconds. `max_bad_share`, `dask`
    and `dask_above_mb`: as of `read`. Files of a table that cannot become what it is declared to be wait, without a
    word: ask `blocked`.
    """
    done = [pl.DataFrame(schema=SUMMARY)]
    began, slowest = time.monotonic(), 0.0
    while (started := time.monotonic()) - began + slowest < for_s and not _is_idle(lake):
        batch, _ = _next(lake, max_files, max_bytes, quiet_s, scheduled_for, now, again=again)
        if batch is None:
            break
        parsed = read(batch, max_bad_share=max_bad_share, dask=dask, dask_above_mb=dask_above_mb)
        try:
            written = commit(parsed, run_id=run_id)
        except (Overtaken, LeaseLost):  # what it did not take is still there: look again
            continue
        done.append(summary(parsed, written))
        slowest = max(slowest, time.monotonic() - started)
    return pl.concat(done)


def _is_idle(lake: "Lake") -> bool:
    """Whether landing is empty, after a batch of this lake's that is published still: then no table is looked at."""
    if lake.finished is None or any(True for _ in landing.files(lake)):
        return False
    pointer = snapshot.read_pointer(lake.root)
    return pointer is not None and "under" not in pointer and pointer["batch"] == lake.finished


def summary(parsed: Parsed, written: Mapping[str, int] | None = None) -> pl.DataFrame:
    """A batch in one row: batch, files, files_refused, mb, rows, refused, rescued, tables, files_unfit, unfit.

    `written`: as of `commit`; no row where another run published the batch."""
    if parsed.batch.files and written is not None and not written:
        return pl.DataFrame(schema=SUMMARY)
    batch, mb = parsed.batch, int(parsed.files["bytes"].sum()) / 1e6
    kept = int(parsed.files["good"].sum())
    row = (batch.number, len(batch.files), len(batch.refused), mb, kept, parsed.refused.height, parsed.rescued)
    unfit = parsed.unfit.select("lines", "bad", "file", "why").to_dicts()
    return pl.DataFrame([(*row, sorted(parsed.heights), len(unfit), unfit)], schema=SUMMARY, orient="row")


def unfit(done: pl.DataFrame) -> str:
    """The files of some batches (rows of `summary`) of which too few lines fit, and why: the worst first."""
    files = done.select(pl.col("unfit").explode()).drop_nulls().unnest("unfit")
    if files.is_empty():
        return "none"
    worst = files.sort(pl.col("bad") / pl.col("lines"), "bad", descending=True)
    said = [f"{file}: {why}" for file, why in worst.head(SHOWN_FILES).select("file", "why").iter_rows()]
    more = f"; and {files.height - SHOWN_FILES} others" if files.height > SHOWN_FILES else ""
    return f"{files.height} file{'s' * (files.height > 1)}, {'; '.join(said)}{more}"


def _for_quarantine(bad: pl.DataFrame, batch: Batch, file: File) -> pl.DataFrame:
    name = (
        pl.lit(batch.number, pl.Int64).alias("batch"),
        pl.lit(file.table).alias("table"),
        pl.lit(file.name).alias("file"),
    )
    return bad.select(*name, "line", "reason", "raw")


def _write_down(parsed: Parsed, writer: commits.Writer, run_id: str) -> list[dict[str, Any]]:
    """The manifest is there, with these files; returns those that it has. Raises Overtaken when it has others.

    A manifest goes only once a later batch is published. So one that could be created, while what was published is as
    it was, has no other of its number before it.
    """
    batch, root = parsed.batch, parsed.batch.lake.root
    paths = {file.name: file.path for file in batch.files}
    columns = parsed.files.select("table", "bytes", "sha256", path="file").select("path", "table", "bytes", "sha256")
    files = [file | {"path": paths[file["path"]]} for file in columns.to_dicts()]
    mark = root.mark(ledger.manifest(batch.number)) if batch.manifest else None
    document = ledger.read(root, batch.number) if batch.manifest else None
    if document is None:
        known = (batch.known or ledger.Known(root)).folded(batch.number)
        document = {"batch": batch.number, "run_id": run_id, "date": batch.date, "at": batch.at, "files": files}
        document["known"] = {"index": known.index, "recent": known.recent}
        document["declared"], document["fence"] = batch.lake.declaration, writer.lease.fence
        crash_point("before it is written down")
        if root.create(ledger.manifest(batch.number), ledger.written(document)):
            crash_point("written down")
            try:
                writer.require_first()
            except LeaseLost:
                if ledger.read(root, batch.number) == document:
                    root.remove(ledger.manifest(batch.number))
                raise
            return files
        document = ledger.read(root, batch.number) or {"files": []}
    if batch.manifest is None or document["files"] != batch.manifest["files"]:
        if document["files"] != files:
            raise Overtaken(f"another run wrote down batch {batch.number} with other files; run this one again")
        return files
    of_now = {(file["path"], file["sha256"]) for file in files}
    missing = [file for file in document["files"] if (file["path"], file["sha256"]) not in of_now]
    lost = [file for file in missing if commits.last_batch(batch.lake, file["table"]) < batch.number]
    if not lost:
        return list(document["files"])
    # files that changed or vanished before their rows were committed: the batch goes on without them
    left = [file for file in document["files"] if file not in lost]
    changed = document | {"files": left, "fence": writer.lease.fence}
    if root.replace(ledger.manifest(batch.number), ledger.written(changed), mark) is None:
        raise Overtaken(f"another run wrote down batch {batch.number} again; run this one again")
    return left


def chart(files: pl.DataFrame) -> Any:
    """Rows kept and refused per table as bars; `files` as in `Parsed`."""
    from etl.charts import plot

    rows = files.group_by("table").agg(kept=pl.sum("good"), refused=pl.sum("bad")).sort("kept", descending=True)
    return plot(rows).bar(
        x="table", y=["kept", "refused"], stacked=True, title="Rows of this batch", xlabel="", ylabel="rows"
    )
