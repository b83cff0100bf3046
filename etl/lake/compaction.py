"""Small Parquet files become large ones, the same rows in fewer files; what nothing needs any more is removed.

A table that grows by a file a minute costs its readers a request a file. Compaction rewrites the small files of what is
published, sorted by key so that a file's and a row group's statistics tell which keys it can hold, and swaps them in
one commit that changes no row. It does not stand in the way of new rows: its commit says itself which files it
replaces, so a batch may be committed meanwhile, and the writer's lease is held only to publish.
"""

import json
import math
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl import delta
from etl.clusters import connected, submit
from etl.lake import commit, ledger, retention, schemas, sorting, switch, upsert
from etl.leases import LeaseHeld
from etl.storage import crash_point, temporary_folder

if TYPE_CHECKING:
    import distributed
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

MEMORY = 1  # times the target: of rows that are sorted at once, which takes about four times that
ROW_GROUP = 100_000  # rows: what a reader skips or reads at once
LEDGER_ROW_GROUP = 5_000  # of the ledger, which is asked for single batches


class RowsDiffer(RuntimeError):
    """A compaction would have changed rows, or did and was taken back."""


class Left(RuntimeError):
    """A table that cannot be compacted before something else was done, which the message says."""


class Overlapped(RuntimeError):
    """Another writer replaced a file that this compaction had read."""


@dataclass(frozen=True)
class Rewrite:
    """A file that was written, and the ones whose place it takes: of several for the same ones the first has them.
    `checksum`: of its rows, whatever their order."""

    removed: tuple[delta.File, ...]
    path: str  # as it is called
    bytes: int
    rows: int
    checksum: int
    stats: dict[str, Any]
    values: Mapping[str, Any]  # of its partition
    superseded: int = 0  # rows of `removed` that newer ones of the same key replaced


def tables(lake: "Lake") -> list[str]:
    """The tables that there are, by name."""
    return [name for name in lake.columns if schemas.is_there(lake, name)]


def survey(lake: "Lake", small_mb: float) -> pl.DataFrame:
    """One row a table: table, rows, files, small_files (below `small_mb` megabytes), mb, mean_mb, failed.

    `failed`: why the table has no figures; null when it has.
    """
    lines = []
    for name in tables(lake):
        line: dict[str, Any] = {"table": name}
        with _told(line):
            sizes, rows = delta.file_stats(lake.table(name))
            line |= {"rows": rows, "files": len(sizes), "small_files": sum(size < small_mb * 1e6 for size in sizes)}
            line |= {"mb": sum(sizes) / 1e6, "mean_mb": sum(sizes) / 1e6 / max(len(sizes), 1)}
        lines.append(line)
    counts = {"rows": pl.Int64, "files": pl.Int64, "small_files": pl.Int64, "mb": pl.Float64, "mean_mb": pl.Float64}
    return pl.DataFrame(lines, schema={"table": pl.String} | counts | {"failed": pl.String})


def compact(
    lake: "Lake",
    *,
    target_mb: int,
    min_small_files: int,
    vacuum_hours: int,
    run_id: str,
    now: datetime | None = None,
    dask: "str | distributed.Client | None" = None,
    dask_above_mb: float = 0,
) -> pl.DataFrame:
    """Compact every table with at least `min_small_files` files below half of `target_mb`, publish, and sweep.

    Returns one row a table: table, version, rows_before (but those that newer ones replaced), rows_after, files_before,
    files_after, mb_before, mb_after, removed (files that nothing has needed for `vacuum_hours`), note (why something
    was left out), failed (what went wrong with it, null when nothing did). Of a table in which the newest row of a key
    counts all files are made new as soon as there is something newer. The snapshot moves to the compacted versions; its
    batch stays. A table that another compaction is at work on is left to it, and one that fails, RowsDiffer above all,
    stays as it was and keeps no other from its turn. What is rewritten of a table, if it is more than `dask_above_mb`
    megabytes, the workers of the Dask cluster at `dask` rewrite, if there is one, and it is committed here. Raises
    OSError when nobody answers there, and ValueError when `vacuum_hours` is under 24.
    """
    if vacuum_hours < retention.VACUUM_HOURS:
        raise ValueError(
            f"vacuum_hours is {vacuum_hours}: readers may be on versions up to {retention.VACUUM_HOURS} hours old"
        )
    root = lake.root
    clock = retention.clock(root, now, vacuum_hours)
    published = commit.settled(lake, run_id)
    versions = published["tables"] if published else {}
    lines: dict[str, dict[str, Any]] = {table: {"table": table, "note": ""} for table in tables(lake)}
    began: dict[str, set[str]] = {}
    handles: dict[str, DeltaTable] = {}
    with connected(dask) as client:
        rewritten = partial(_rewritten, client, dask_above_mb)
        for table, line in lines.items():
            with _told(line), root.lease(f"leases/tables/{table}", run_id, wait_s=0):
                crash_point(f"compaction holds: {table}")
                handle, began[table] = _readable(lake, table, published)
                line |= _compact_table(lake, table, handle, target_mb, min_small_files, run_id, rewritten)
    if published and "files" in published["tables"]:
        ledger.prune(root, published["batch"])
    if published:
        versions, handles = _publish(lake, [*lines.values()], run_id)
    for table, names in began.items():
        line = lines[table]
        with _told(line):
            handle = handles.get(table) or lake.table(table)
            line["version"] = handle.version()
            line["removed"] = retention.sweep(lake, table, handle, versions.get(table), names, vacuum_hours, clock)
        if clock.problem and not line["note"]:
            line["note"] = f"nothing removed: {clock.problem}"
    retention.remove_unfinished(root, vacuum_hours, clock)
    schema = {"table": pl.String, "version": pl.Int64} | {
        f"{what}_{when}": kind
        for what, kind in (("rows", pl.Int64), ("files", pl.Int64), ("mb", pl.Float64))
        for when in ("before", "after")
    }
    return pl.DataFrame(
        [*lines.values()], schema=schema | {"removed": pl.Int64, "note": pl.String, "failed": pl.String}
    )


@contextmanager
def _told(line: dict[str, Any]) -> Iterator[None]:
    """What goes wrong with a table is told in its line, and in full on stderr; the next one has its turn."""
    try:
        yield
    except Left as error:
        line["note"] = str(error)
    except (LeaseHeld, Overlapped) as error:
        line["note"] = f"left to another compaction: {error}"
    except Exception as error:
        traceback.print_exc()
        line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]


def _readable(lake: "Lake", table: str, published: dict[str, Any] | None) -> tuple["DeltaTable", set[str]]:
    """The newest version of a table, or the published one when that holds a batch that is not published; and the files
    that either has.

    Raises schemas.RowsTaken: what others took away is no reason to leave the table to them.
    """
    from deltalake.exceptions import DeltaError

    newest = lake.table(table)
    if published is None or table not in published["tables"]:
        return newest, retention.names_of(newest)
    version = published["tables"][table]
    is_ahead = (newest.transaction_version(commit.APP_ID) or 0) > published["batch"]
    schemas.look(lake, table, version)
    try:
        before = lake.table(table, version)
    except DeltaError:  # others cleaned the log of it, or of what it builds on: nobody can open it any more
        if is_ahead:
            raise Left(f"others cleaned its log while a batch was half in: run {lake.ingested_by} first") from None
        return newest, retention.names_of(newest)
    return before if is_ahead else newest, retention.names_of(newest) | retention.names_of(before)


def _compact_table(
    lake: "Lake",
    table: str,
    handle: "DeltaTable",
    target_mb: int,
    min_small_files: int,
    run_id: str,
    rewritten: Callable[..., Iterator[list[Rewrite]]],
) -> dict[str, Any]:
    """Rewrite what is small among the files of a version, and commit it each time that there is about `target_mb` of
    it: a run that is killed has lost no more, and the next one goes on from there."""
    schemas.require_ours(lake, table, handle)
    sizes, rows = delta.file_stats(handle)
    target, upserts = int(target_mb * 1_000_000), lake.upserts(table)
    groups = _with_later(handle) if upserts else _worth_it(lake, handle, table, target, min_small_files)
    if groups:
        _require_live(lake.table(table), table, {file.path for group in groups for file in group})
    declared = pa.schema(handle.schema().to_arrow())
    rewrite = _newest if upserts else _rewrite
    done, waiting = list[Rewrite](), list[Rewrite]()
    for number, made in enumerate(rewritten(rewrite, lake, table, groups, declared, target), 1):
        waiting += made
        if number == len(groups) or sum(file.bytes for made in waiting for file in made.removed) >= target:
            _replace(lake, table, waiting, run_id)
            done, waiting = [*done, *waiting], []
    moved = [file for made in done for file in made.removed]
    made_bytes = [made.bytes for made in done]
    return {
        "rows_before": rows - sum(made.superseded for made in done),
        "rows_after": rows - sum(file.rows for file in moved) + sum(made.rows for made in done),
        "files_before": len(sizes),
        "files_after": len(sizes) - len(moved) + len(made_bytes),
        "mb_before": sum(sizes) / 1e6,
        "mb_after": (sum(sizes) - sum(file.bytes for file in moved) + sum(made_bytes)) / 1e6,
    }


def _rewritten(
    client: "distributed.Client | None",
    above_mb: float,
    rewrite: Callable[..., list[Rewrite]],
    lake: "Lake",
    table: str,
    groups: list[list[delta.File]],
    *how: Any,
) -> Iterator[list[Rewrite]]:
    """What was written in the place of each group, in their order: one after the other here, or several at once by a
    cluster's workers, where it is more than `above_mb` megabytes."""
    if client is None or sum(file.bytes for group in groups for file in group) <= above_mb * 1e6:
        yield from (rewrite(lake, table, files, *how) for files in groups)
        return
    futures = deque(submit(client, rewrite, lake.plain(), table, files, *how) for files in groups)
    while futures:
        yield futures.popleft().result()


def _replace(lake: "Lake", table: str, rewrites: list[Rewrite], run_id: str) -> None:
    """Commit what was written in the place of what it is of, and look whether it is the same."""
    crash_point(f"rewritten: {table}")
    version = _swap(lake, table, rewrites, run_id)
    crash_point(f"swapped: {table}")
    _assert_same(lake, table, version, rewrites, run_id)


def _worth_it(
    lake: "Lake", handle: "DeltaTable", table: str, target: int, min_small_files: int
) -> list[list[delta.File]]:
    """The small files of a table, in order of their keys, in groups that make one file of about `target` bytes, each
    of one partition."""
    actions = delta.live(handle)
    first = f"min.{by[0]}" if (by := lake.sorted_by.get(table)) else None
    keys: dict[str, Any] = {}
    if first in actions.schema.names:
        keys = dict(zip(actions["path"].to_pylist(), actions[first].to_pylist(), strict=True))
    small = [file for file in delta.files(handle) if file.bytes < target / 2]
    if len(small) < min_small_files:
        return []
    small.sort(key=lambda file: (keys.get(file.path) is None, keys.get(file.path) or 0, file.path))
    groups: list[list[delta.File]] = []
    for files in _by_partition(small):
        size = target + 1
        for file in files:
            if size + file.bytes > target:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.bytes
    return [group for group in groups if len(group) > 1]


def _by_partition(files: list[delta.File]) -> list[list[delta.File]]:
    of: dict[tuple[Any, ...], list[delta.File]] = {}
    for file in files:
        of.setdefault((*file.values.values(),), []).append(file)
    return [*of.values()]


def _with_later(handle: "DeltaTable") -> list[list[delta.File]]:
    """All files of a partition of a table of which the newest row of a key counts, as a group, when some came after the
    compacted; a key is in one partition."""
    return [
        files for files in _by_partition(delta.files(handle)) if not all(upsert.is_newest(file.path) for file in files)
    ]


def _newest(lake: "Lake", table: str, files: list[delta.File], declared: pa.Schema, target: int) -> list[Rewrite]:
    """Write the newest row of each key of `files`, all of a partition's, into files of about `target` bytes, sorted."""
    declaration, source = lake.tables[table], _source(lake, table, files, declared)
    key = [name for name in declaration.key if name not in source.values]
    seen = sorting.look(source, key, MEMORY * target)
    superseded = 0

    def counting(rows: pl.DataFrame) -> pl.DataFrame:
        nonlocal superseded
        counts = upsert.newest(rows, declaration, without=source.values)
        superseded += rows.height - counts.height
        return _sorted(lake, table, counts)

    frames = map(counting, sorting.ranges(source, key, seen.bounds))
    made = _write(lake, table, source, frames, upsert.NEWEST, target)
    if seen.rows != sum(part.rows for part in made) + superseded:
        raise RowsDiffer(f"{table}: {seen.rows} rows were read, and others the second time: left as it was")
    return [replace(made[0], removed=tuple(files), superseded=superseded), *made[1:]]


def _rewrite(lake: "Lake", table: str, files: list[delta.File], declared: pa.Schema, target: int) -> list[Rewrite]:
    """Write the rows of `files` into one, sorted. `declared`: the table's own schema."""
    source = _source(lake, table, files, declared)
    seen = sorting.look(source, _order(lake, table, source.declared.names), MEMORY * target)
    frames = sorting.ranges(source, _order(lake, table, source.declared.names), seen.bounds)
    (made,) = _write(lake, table, source, map(partial(_sorted, lake, table), frames), "compacted-")
    if (seen.rows, seen.checksum) != (made.rows, made.checksum):
        lake.root.remove(f"lake/{table}/{made.path}")
        raise RowsDiffer(f"{table}: {seen.rows} rows do not come back from one file: left as it was")
    return [replace(made, removed=tuple(files))]


def _source(lake: "Lake", table: str, files: list[delta.File], declared: pa.Schema) -> sorting.Source:
    values = files[0].values
    columns = pa.schema([column for column in declared if column.name not in values])
    return sorting.Source(lake.root, f"lake/{table}", files, columns, values)


def _order(lake: "Lake", table: str, columns: Collection[str]) -> list[str]:
    return [name for name in lake.sorted_by.get(table, ()) if name in columns]


def _sorted(lake: "Lake", table: str, frame: pl.DataFrame) -> pl.DataFrame:
    by = _order(lake, table, frame.columns)
    return frame.sort(by) if by else frame


def _write(
    lake: "Lake",
    table: str,
    source: sorting.Source,
    frames: Iterator[pl.DataFrame],
    name: str,
    target: float = math.inf,
) -> list[Rewrite]:
    """Write rows into files of about `target` bytes whose names begin with `name`, at least one, and read them again.

    Raises RowsDiffer.
    """
    made: list[Rewrite] = []
    step = LEDGER_ROW_GROUP if table == "files" else ROW_GROUP
    parts = _parts(frames, step, source.declared)
    with temporary_folder("compaction-") as folder:
        local, part = Path(folder, "file"), next(parts, None)
        while part:
            rows, total = 0, 0
            with pq.ParquetWriter(local, source.declared) as writer:
                while part and (not rows or local.stat().st_size < target):
                    writer.write_table(part[0], row_group_size=step)
                    rows, total, part = rows + part[0].num_rows, total + part[1], None
                    part = next(parts, None)
            path = f"{delta.folder_of(source.values)}{name}{uuid.uuid4()}.snappy.parquet"
            size = local.stat().st_size
            lake.root.put(f"lake/{table}/{path}", local)
            crash_point(f"written, not swapped: {table}")
            made.append(_read_again(source, path, size, (rows, total)))
    return made


def _parts(frames: Iterator[pl.DataFrame], step: int, declared: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
    """The rows, so many at a time, and the checksum of each part; at least one. No frame is held while the next is
    made."""
    count = 0
    for frame in frames:
        for first in range(0, frame.height, step):
            part, count = frame.slice(first, step), count + 1
            yield sorting.as_arrow(part, declared), sorting.checksum(part)
            del part
        del frame
    if not count:
        yield declared.empty_table(), 0


def _read_again(source: sorting.Source, path: str, size: int, wanted: tuple[int, int]) -> Rewrite:
    """What was written. `wanted`: its rows and their checksum."""
    rows, total, stats = 0, 0, []
    file = delta.File(quote(path, safe="/="), size, 0, {})
    for part in sorting.Source(source.root, source.table, [file], source.declared, {}).rows(file):
        rows, total = rows + part.height, total + sorting.checksum(part)
        stats.append(delta.statistics(part))
    if (rows, total) != wanted:
        source.root.remove(f"{source.table}/{path}")
        raise RowsDiffer(f"{source.table}: {wanted[0]} rows do not come back from one file: left as it was")
    said = delta.merged(stats) if stats else delta.statistics(sorting.empty(source.declared))
    return Rewrite((), path, size, rows, total, said, source.values)


def _swap(lake: "Lake", table: str, rewrites: list[Rewrite], run_id: str) -> int:
    """Commit to the table's log that these files take the place of those; returns the version.

    By hand, because delta-rs's own compaction neither sorts nor chooses its files. A commit is a file that must not be
    there yet; before each try the files to be replaced must all be live, so that no row can come twice.
    Raises Overlapped when one is not; what was written for it goes with a later sweep.
    """
    gone = {file.path for rewrite in rewrites for file in rewrite.removed}
    while True:
        handle = lake.table(table)
        schemas.require_ours(lake, table, handle)
        _require_live(handle, table, gone)
        version = handle.version() + 1
        if delta.commit(lake.root, f"lake/{table}", version, _actions(lake, rewrites, handle.version(), run_id)):
            return version


def _require_live(handle: "DeltaTable", table: str, paths: set[str]) -> None:
    """Raises Overlapped when a version does not have all these files."""
    if not paths <= delta.sizes(handle).keys():
        raise Overlapped(f"{table}: another writer replaced files that this compaction had read: left as it is")


def _actions(lake: "Lake", rewrites: list[Rewrite], read_version: int, run_id: str) -> list[delta.Action]:
    removed = [file for rewrite in rewrites for file in rewrite.removed]
    changes = any(rewrite.superseded for rewrite in rewrites)
    about = {
        "operationParameters": {"predicate": "[]"},
        "readVersion": read_version,
        "isBlindAppend": False,
        "operationMetrics": {"numFilesAdded": len(rewrites), "numFilesRemoved": len(removed)},
        "run_id": run_id,
        "stage": lake.compacted_by,
        "checksum": str(sum(rewrite.checksum for rewrite in rewrites)),
    }
    return [
        delta.commit_info("OPTIMIZE", about),
        *(delta.remove(file.path, file.bytes, changes=changes, values=file.values) for file in removed),
        *(
            delta.add(made.path, made.bytes, json.dumps(made.stats), changes=changes, values=made.values)
            for made in rewrites
        ),
    ]


def _assert_same(lake: "Lake", table: str, version: int, rewrites: list[Rewrite], run_id: str) -> None:
    """The version before the swap and the one it made have the same rows, as the log counts them.

    Raises RowsDiffer when they have not; then the table is put back, and what came after the swap is kept out by that.
    """
    before, after = (lake.table(table, number) for number in (version - 1, version))
    gone = {file.path for rewrite in rewrites for file in rewrite.removed}
    had, has = delta.sizes(before).keys(), delta.sizes(after).keys()
    came = {unquote(path) for path in has - (had - gone)}
    same_files = came == {rewrite.path for rewrite in rewrites} and not has & gone
    rows = delta.file_stats(before)[1], delta.file_stats(after)[1]
    if same_files and rows[0] == rows[1] + sum(rewrite.superseded for rewrite in rewrites):
        return
    from deltalake import CommitProperties

    what = f"{table} had {rows[0]} rows before its compaction and {rows[1]} after"
    try:
        with commit.writing(lake, run_id):
            handle = lake.table(table)
            if handle.version() == version:
                properties = CommitProperties(custom_metadata={"run_id": run_id, "stage": lake.compacted_by})
                handle.restore(version - 1, commit_properties=properties)
    except LeaseHeld as error:
        raise RowsDiffer(f"{what}, and it could not be put back: {error}") from error
    raise RowsDiffer(f"{what}: put back")


def _publish(lake: "Lake", lines: list[dict[str, Any]], run_id: str) -> tuple[dict[str, int], dict[str, "DeltaTable"]]:
    """Move the snapshot to the newest versions, but not of a table that holds rows of a batch that is not published.

    `lines`: as in `compact`; a table that failed, or was left to another, stays where it is. Returns table -> version,
    as it is published then, and table -> a handle on the newest one.
    """
    handles = {}
    with commit.writing(lake, run_id) as writer:
        published = writer.pointer
        assert published is not None, "the caller has seen it, and a lake that vanished is refused"
        switch.clear(lake.root, writer.lease)
        versions = dict(published["tables"])
        for line in lines:
            table = line["table"]
            if table in versions and not line["note"] and "failed" not in line:
                with _told(line):
                    handles[table] = lake.table(table)
                    versions[table] = _publishable(lake, table, handles[table], versions[table], published["batch"])
        if versions != published["tables"]:
            crash_point("before the compaction is published")
            writer.publish(
                batch=published["batch"],
                as_of=published["as_of"],
                versions=versions,
                run_id=published["run_id"],
            )
            crash_point("compaction published")
    return versions, handles


def _publishable(lake: "Lake", table: str, newest: "DeltaTable", version: int, batch: int) -> int:
    """The newest version of a table, made durable; the published `version` when it holds a batch after `batch`."""
    if newest.version() == version or (newest.transaction_version(commit.APP_ID) or 0) > batch:
        return version
    schemas.require_ours(lake, table, newest)
    schemas.look(lake, table, version)
    delta.sync(lake.root, f"lake/{table}", after=version, until=newest.version())
    crash_point(f"compaction synced: {table}")
    return newest.version()


def chart(done: pl.DataFrame) -> Any:
    """Files per table before and after, as bars; `done` as from `compact`."""
    from etl.charts import plot

    files = done.select("table", before="files_before", after="files_after")
    long = files.unpivot(index="table", variable_name="when", value_name="files")
    return plot(long).bar(x="table", y="files", by="when", title="Files before and after", xlabel="", ylabel="files")
