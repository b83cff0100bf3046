"""JSON files become Delta tables: each row exactly once, whatever dies on the way.

A batch is numbered and written down first (`lake/batches/<n>.json`: the files with their sizes and sha256), then
committed to each table under its number, then published, then its files are archived, then it is marked done. Each of
these steps is on the disk before the next one is taken. A run that finds an unfinished batch finishes that one, from
the same files. Rows that do not fit go to `quarantine` with file, line, reason and the raw text; files that cannot be
read at all, or of which no line fits, go to `refused/`.
"""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl.lake import commit as commits
from etl.lake import evolution, formats, landing, ledger, parse, schemas, snapshot
from etl.lake.landing import File
from etl.lake.table import QUARANTINE, RESCUED, DataType, Table
from etl.storage import Damaged, Root, Unreadable, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

MAX_BYTES = 256_000_000  # of JSON in a batch: about four times that in memory
GROUP_BYTES = 16_000_000  # of files that are parsed at once
AHEAD = timedelta(days=1)  # of its batch that a row may be: `as_of` never goes back, so one far ahead would stay it
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
    "committed": pl.Boolean,
    "worst": pl.String,
}


class Overtaken(RuntimeError):
    """Another run took this batch's number for other files; nothing was written."""


@dataclass(frozen=True)
class Batch:
    """The files one run ingests. `manifest`: what was written down, when an earlier run left the batch unfinished.
    `repeated`: files in landing that were ingested before; they are set aside, not read. `refused`: those that cannot
    be read, each with its reason."""

    lake: "Lake"
    number: int
    date: str  # of the archive: the day on which the files are really moved, UTC
    at: str  # ISO 8601: the run's own time or the clock's, whichever is later; when it was written down, if it was
    files: tuple[File, ...]
    repeated: tuple[File, ...] = ()
    refused: tuple[File, ...] = ()
    manifest: dict[str, Any] | None = None


@dataclass(frozen=True)
class Parsed:
    """A batch read and checked, nothing written yet.

    `frames`: table -> typed rows. `refused`: rows for quarantine (columns of `table.QUARANTINE`).
    `files`: one row a file: table, file, bytes, sha256, lines, good, bad. `batch.refused`: all files that are refused.
    """

    batch: Batch
    frames: dict[str, pl.DataFrame]
    refused: pl.DataFrame
    files: pl.DataFrame
    as_of: str | None

    @property
    def rows(self) -> int:
        return int(self.files["lines"].sum())

    @property
    def bad_share(self) -> float:
        """The share of all lines that do not fit, 0 to 1."""
        return int(self.files["bad"].sum()) / max(self.rows, 1)

    @property
    def rescued(self) -> int:
        """How many rows have fields that no column takes."""
        return sum(frame[RESCUED].count() for frame in self.frames.values())

    @property
    def worst(self) -> str:
        """The file with the most lines that do not fit, in words."""
        if self.refused.is_empty():
            return "every line fits"
        file = self.files.sort("bad", descending=True).row(0, named=True)
        return f"{file['file']} has {file['bad']:,} of {file['lines']:,}"


def next_batch(
    lake: "Lake",
    *,
    max_files: int,
    scheduled_for: str | None,
    max_bytes: int = MAX_BYTES,
    now: datetime | None = None,
) -> Batch | None:
    """The unfinished batch when there is one, else the files that wait, lowest sequence first.

    At most `max_files`, and at most `max_bytes` of JSON; a larger file is refused before it is read. None when nothing
    waits. `scheduled_for`: what the run says of its time, ISO 8601; `now`: what the clock says, if not the machine's.
    Raises storage.Damaged when it cannot be known what was ingested, schemas.SchemasDiffer when the lake's tables are
    not those that are declared.
    """
    root, now = lake.root, now or datetime.now(UTC)
    pointer = snapshot.read_pointer(root)
    if pointer is None and root.exists(ledger.done(1)):
        raise Damaged(f"{snapshot.POINTER} is gone, though batches were published: see `orchestrate.py rebuild`")
    schemas.check(lake, pointer)
    date = f"{now:%Y-%m-%d}"
    number = pointer["batch"] if pointer else 0
    for unfinished in (number + 1, number):
        manifest = ledger.read(root, unfinished)
        if manifest and not root.exists(ledger.done(unfinished)):
            files = tuple(File(file["name"], file["table"], file["bytes"]) for file in manifest["files"])
            return Batch(lake, unfinished, date, ledger.time_of(manifest, now), files, manifest=manifest)
    waiting = landing.look(lake, number, ledger.ingested_until(root, number), max_bytes)
    files = landing.cut(waiting.files, max_files, max_bytes)
    if not files and not waiting.repeated and not waiting.refused:
        return None
    at = max(now, _utc(scheduled_for) if scheduled_for else now).isoformat(timespec="seconds")
    return Batch(lake, number + 1, date, at, files, waiting.repeated, waiting.refused)


def _utc(moment: str) -> datetime:
    """ISO 8601, in UTC where no zone is given."""
    given = datetime.fromisoformat(moment)
    return given.astimezone(UTC) if given.tzinfo else given.replace(tzinfo=UTC)


def rules(table: Table, at: str) -> Table:
    """A table as a batch of the time `at` (ISO 8601) takes its rows: none is more than a day ahead of it."""
    moment = _utc(at)
    return table.until(moment + min(AHEAD, parse.LAST - moment))


def read(batch: Batch) -> Parsed:
    """Read a batch's files, type their rows and set apart those that do not fit. Writes nothing.

    A file that cannot be read or has no line that fits is refused, and one that is no longer what the manifest of an
    unfinished batch says.
    """
    lake = batch.lake
    expected = {f["name"]: f["sha256"] for f in batch.manifest["files"]} if batch.manifest else {}
    good: dict[str, list[pl.DataFrame]] = {}
    quarantined, files, kept, refused = [], [], [], list(batch.refused)
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:  # one reads and hashes while Polars has the cores
        for looked in pool.map(lambda group: _look(batch, group, expected), _groups(batch)):
            for file, why in looked.refused:
                refused.append(file.refused(why))
            for (file, sha256, size), lines, bad in zip(looked.files, looked.lines, looked.bad, strict=True):
                if bad.height:
                    quarantined.append(_for_quarantine(bad, batch, file))
                files.append((file.table, file.name, size, sha256, lines, lines - bad.height, bad.height))
                kept.append(file)
                crash_point(f"read: {file.table}")
            if looked.files:
                good.setdefault(looked.files[0][0].table, []).append(looked.rows)
    frames = {table: pl.concat(parts) for table, parts in good.items()}
    columns = ((frame, lake.tables[table].time) for table, frame in frames.items() if frame.height)
    times: list[Any] = [frame[time].max() for frame, time in columns if time]  # datetimes
    newest = max(times, default=None)
    return Parsed(
        replace(batch, files=tuple(kept), refused=tuple(refused)),
        frames,
        pl.concat([pl.DataFrame(schema=QUARANTINE), *quarantined]),
        pl.DataFrame(files, schema=FILES, orient="row"),
        newest.isoformat() if newest else None,
    )


class _Looked(NamedTuple):
    """A group of files of one table, read: `rows` of all of them together; `lines` and `bad` of each."""

    files: list[tuple[File, str, int]]  # with sha256 and bytes
    rows: pl.DataFrame
    lines: list[int]
    bad: list[pl.DataFrame]
    refused: list[tuple[File, str]]


def _groups(batch: Batch) -> list[list[File]]:
    """Files of the same table, a few megabytes together: what is read at once, so that a small file costs little."""
    groups: list[list[File]] = []
    order = list(batch.lake.tables)
    for file in sorted(batch.files, key=lambda file: order.index(file.table)):  # stable: a table's oldest first
        last = groups[-1] if groups else []
        if last and last[0].table == file.table and sum(f.bytes for f in last) + file.bytes <= GROUP_BYTES:
            last.append(file)
        else:
            groups.append([file])
    return groups


def _look(batch: Batch, group: list[File], expected: dict[str, str]) -> _Looked:
    """Read the files of one group. Raises AssertionError when a line is neither a row nor refused."""
    files, pieces, refused = [], [], []
    for file in group:
        try:
            data, sha256 = _read(batch.lake.root, file, expected.get(file.name))
            if expected.get(file.name, sha256) != sha256:
                raise Unreadable(f"changed since batch {batch.number} was written down")
            content = formats.opened(data, batch.lake.tables[file.table].named)
        except Unreadable as error:
            refused.append((file, str(error)))
            continue
        files.append((file, sha256, len(data)))
        pieces.append(content)
    rows, bad, lines = parse.parse_all(pieces, rules(batch.lake.tables[group[0].table], batch.at))
    if sum(lines) != rows.height + sum(frame.height for frame in bad):
        raise AssertionError(f"{group[0].landing} and others: {sum(lines)} lines, but {rows.height} rows fit")
    kept = [number for number, frame in enumerate(bad) if frame.height < lines[number]]
    refused += [(files[n][0], parse.no_line_fits(bad[n])) for n in range(len(files)) if n not in kept]
    return _Looked([files[n] for n in kept], rows, [lines[n] for n in kept], [bad[n] for n in kept], refused)


def commit(parsed: Parsed, *, run_id: str) -> dict[str, int]:
    """Write a batch down, commit it to every table, publish it, archive its files. Returns table -> version.

    May be killed anywhere and called again: every step looks first whether it is done. Raises storage.LeaseHeld when
    another writer is at work, Overtaken when one took this number.
    """
    batch = parsed.batch
    root = batch.lake.root
    versions = {}
    if batch.files or batch.manifest:
        with commits.writing(root, run_id):
            if batch.manifest:  # who began it may have died before its names were on the disk
                root.sync(["lake", "lake/batches"])
            _write_down(parsed, run_id)
            versions = _commit_tables(parsed, run_id)
        sha256s = dict(parsed.files.select("file", "sha256").rows())
        landing.archive(root, [(file, sha256s[file.name]) for file in batch.files], batch.date, run_id)
    landing.set_aside(root, batch.repeated, batch.date)
    landing.refuse(root, batch.refused, batch.date, run_id)
    if batch.files or batch.manifest:
        crash_point("before it is marked done")
        root.write(ledger.done(batch.number), b"")
    crash_point("after all")
    return versions


def _commit_tables(parsed: Parsed, run_id: str) -> dict[str, int]:
    """Append to each table, publish. Returns table -> version."""
    number, lake = parsed.batch.number, parsed.batch.lake
    pointer = snapshot.read_pointer(lake.root)
    before = pointer or {"batch": 0, "tables": {}, "as_of": None}
    versions = {table: before["tables"].get(table, 0) for table in lake.columns}
    if before["batch"] >= number:
        return versions
    frames = {t: frame for t, frame in (parsed.frames | {"quarantine": parsed.refused}).items() if frame.height}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        encoded = pool.map(lambda table: commits.encode(lake, table, frames[table]), frames)
        if parsed.batch.manifest and parsed.batch.manifest.get("declared", lake.declaration) != lake.declaration:
            heights = {table: frame.height for table, frame in frames.items()}
            commits.require_same_rows(lake, heights, batch=number, published=before["tables"])
        commits.create_tables(lake, run_id, known=before["tables"])
        moved = evolution.move(lake, pointer, run_id)
        if (
            moved and snapshot.read_pointer(lake.root) != pointer
        ):  # an object store's lease ends while files are written
            raise Overtaken("another run published while tables were given their columns; run this one again")
        versions |= moved
        for table, rows in zip(frames, encoded, strict=True):
            crash_point(f"before the commit: {table}")
            after = before["tables"].get(table, -1)
            versions[table] = commits.append(lake, table, rows, batch=number, run_id=run_id, after=after)
            crash_point(f"after the commit: {table}")
    as_of = max(filter(None, (before["as_of"], parsed.as_of, EARLIEST)))
    crash_point("before it is published")
    snapshot.swap_pointer(
        lake.root, pointer, batch=number, as_of=as_of, versions=versions, run_id=run_id, schemas=lake.fingerprints
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
    now: datetime | None = None,
) -> pl.DataFrame:
    """Commit batch after batch until nothing waits; one row each, as `summary` has it.

    None is begun that, going by the slowest so far, would not be over within `for_s` seconds. One with a larger share
    than `max_bad_share` of lines that do not fit is not committed, and ends it.
    """
    done = [pl.DataFrame(schema=SUMMARY)]
    began, slowest = time.monotonic(), 0.0
    while (started := time.monotonic()) - began + slowest < for_s:
        batch = next_batch(lake, max_files=max_files, max_bytes=max_bytes, scheduled_for=scheduled_for, now=now)
        if batch is None:
            break
        parsed = read(batch)
        fits = parsed.bad_share <= max_bad_share
        if fits:
            try:
                commit(parsed, run_id=run_id)
            except Overtaken:  # what it did not take is still there: look again
                continue
        done.append(summary(parsed, committed=fits))
        if not fits:
            break
        slowest = max(slowest, time.monotonic() - started)
    return pl.concat(done)


def summary(parsed: Parsed, committed: bool = True) -> pl.DataFrame:
    """A batch in one row: batch, files, files_refused, mb, rows, refused, rescued, tables, committed, worst."""
    batch, mb = parsed.batch, int(parsed.files["bytes"].sum()) / 1e6
    kept = int(parsed.files["good"].sum())
    row = (batch.number, len(batch.files), len(batch.refused), mb, kept, parsed.refused.height, parsed.rescued)
    return pl.DataFrame([(*row, sorted(parsed.frames), committed, parsed.worst)], schema=SUMMARY, orient="row")


def _read(root: Root, file: File, expected: str | None) -> tuple[bytes, str]:
    """A file's bytes and their sha256. `expected`: what that was when the batch was written down."""
    with contextlib.suppress(FileNotFoundError):
        data = root.read_at_most(file.landing, file.bytes)
        return data, hashlib.sha256(data).hexdigest()
    for date in reversed(root.names("archive")):  # a replay after some of its files were archived
        with contextlib.suppress(FileNotFoundError, Unreadable):
            data = root.read_at_most(file.archived(date), file.bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            if expected in (sha256, None):
                return data, sha256
    raise Unreadable("is gone from landing, and not in the archive")


def _for_quarantine(bad: pl.DataFrame, batch: Batch, file: File) -> pl.DataFrame:
    name = (
        pl.lit(batch.number, pl.Int64).alias("batch"),
        pl.lit(file.table).alias("table"),
        pl.lit(file.name).alias("file"),
    )
    return bad.select(*name, "line", "reason", "raw")


def _write_down(parsed: Parsed, run_id: str) -> None:
    """The manifest is there, with these files. Raises Overtaken when it is there with others."""
    batch, root = parsed.batch, parsed.batch.lake.root
    columns = parsed.files.select("table", "bytes", "sha256", name="file").select("name", "table", "bytes", "sha256")
    files = columns.to_dicts()
    known = ledger.read(root, batch.number)
    if known is None:
        manifest = {"batch": batch.number, "run_id": run_id, "date": batch.date, "at": batch.at, "files": files}
        manifest["declared"] = batch.lake.declaration
        manifest["ingested"] = _ingested(root, batch.number, files)
        crash_point("before it is written down")
        if root.create(ledger.manifest(batch.number), _json(manifest)):
            crash_point("written down")
            return
        known = ledger.read(root, batch.number) or {"files": []}
    if batch.manifest is None or known["files"] != batch.manifest["files"]:
        if known["files"] != files:
            raise Overtaken(f"another run wrote down batch {batch.number} with other files; run this one again")
        return
    of_now = {(file["name"], file["sha256"]) for file in files}
    missing = [file for file in known["files"] if (file["name"], file["sha256"]) not in of_now]
    if lost := [file for file in missing if commits.last_batch(batch.lake, file["table"]) < batch.number]:
        # files that changed or vanished before their rows were committed: the batch goes on without them
        left = [file for file in known["files"] if file not in lost]
        root.write(
            ledger.manifest(batch.number),
            _json(known | {"files": left, "ingested": _ingested(root, batch.number, left)}),
        )


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode()


def _ingested(root: Root, number: int, files: list[dict[str, Any]]) -> ledger.Ingested:
    after = ledger.ingested_until(root, number - 1)
    for file in files:
        table = file["table"]
        after[table] = ledger.with_sequence(after.get(table, []), landing.sequence_of(file["name"]))
    return after


def chart(files: pl.DataFrame) -> Any:
    """Rows kept and refused per table as bars; `files` as in `Parsed`."""
    from etl.charts import plot

    rows = files.group_by("table").agg(kept=pl.sum("good"), refused=pl.sum("bad")).sort("kept", descending=True)
    return plot(rows).bar(
        x="table", y=["kept", "refused"], stacked=True, title="Rows of this batch", xlabel="", ylabel="rows"
    )
