"""Small Parquet files become large ones, the same rows in fewer files; what nothing needs any more is removed.

A table that grows by a file a minute costs its readers a request a file. Compaction rewrites the small files of what is
published, sorted by key so that a file's and a row group's statistics tell which keys it can hold, and swaps them in
one commit that changes no row. It does not stand in the way of new rows: its commit says itself which files it
replaces, so a batch may be committed meanwhile, and the writer's lease is held only to publish.
"""

import io
import json
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl import delta
from etl.lake import commit, ledger, retention, schemas, snapshot, upsert
from etl.storage import LeaseHeld, crash_point

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

LEASE_S = 1800  # of one table; longer than any of them takes
ROW_GROUP = 100_000  # rows: what a reader skips or reads at once
LEDGER_ROW_GROUP = 5_000  # of the ledger, which is asked for single batches


class RowsDiffer(RuntimeError):
    """A compaction would have changed rows, or did and was taken back."""


class Overlapped(RuntimeError):
    """Another writer replaced a file that this compaction had read."""


@dataclass(frozen=True)
class Rewrite:
    """A file that was written, and the ones whose place it takes: of several for the same ones the first has them.
    `checksum`: of its rows, whatever their order."""

    removed: tuple[tuple[str, int], ...]  # path, bytes
    path: str
    bytes: int
    rows: int
    checksum: int
    stats: dict[str, Any]
    superseded: int = 0  # rows of `removed` that newer ones of the same key replaced


def tables(lake: "Lake") -> list[str]:
    """The tables that there are, by name."""
    return [name for name in lake.columns if lake.root.names(f"lake/{name}/_delta_log")]


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
) -> pl.DataFrame:
    """Compact every table with at least `min_small_files` files below half of `target_mb`, publish, and sweep.

    Returns one row a table: table, version, rows_before (but those that newer ones replaced), rows_after, files_before,
    files_after, mb_before, mb_after, removed (files that nothing has needed for `vacuum_hours`), note (why something
    was left out), failed (what went wrong with it, null when nothing did). Of a table in which the newest row of a key
    counts all files are made new as soon as there is something newer. The snapshot moves to the compacted versions; its
    batch stays. A table that another compaction is at work on is left to it, and one that fails, RowsDiffer above all,
    stays as it was and keeps no other from its turn. Raises ValueError when `vacuum_hours` is under 24.
    """
    if vacuum_hours < retention.VACUUM_HOURS:
        raise ValueError(
            f"vacuum_hours is {vacuum_hours}: readers may be on versions up to {retention.VACUUM_HOURS} hours old"
        )
    root = lake.root
    clock = retention.clock(root, now, vacuum_hours)
    published = snapshot.read_pointer(root)
    versions = published["tables"] if published else {}
    lines: dict[str, dict[str, Any]] = {table: {"table": table, "note": ""} for table in tables(lake)}
    began: dict[str, set[str]] = {}
    handles: dict[str, DeltaTable] = {}
    for table, line in lines.items():
        with _told(line), root.lease(f"lake/leases/{table}", run_id, ttl_s=LEASE_S, wait_s=0):
            crash_point(f"compaction holds: {table}")
            handle = lake.table(table, versions.get(table))
            began[table] = retention.names_of(handle)
            line |= _compact_table(lake, table, handle, target_mb, min_small_files, run_id)
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
    except (LeaseHeld, Overlapped) as error:
        line["note"] = f"left to another compaction: {error}"
    except Exception as error:
        traceback.print_exc()
        line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]


def _compact_table(
    lake: "Lake", table: str, handle: "DeltaTable", target_mb: int, min_small_files: int, run_id: str
) -> dict[str, Any]:
    """Rewrite what is small among the files of a version: the published one, or the newest where none is."""
    schemas.require_ours(table, handle)
    sizes, rows = delta.file_stats(handle)
    target, upserts = target_mb * 1_000_000, table in lake.tables and lake.tables[table].upserts
    groups = _with_later(handle) if upserts else _worth_it(lake, handle, table, target, min_small_files)
    if groups:
        _require_live(lake.table(table), table, {path for group in groups for path, _ in group})
    declared = pa.schema(handle.schema().to_arrow())
    rewrite = partial(_newest, target=target) if upserts else _rewrite
    rewrites = [made for files in groups for made in rewrite(lake, table, files, declared)]
    crash_point(f"rewritten: {table}")
    if rewrites:
        version = _swap(lake, table, rewrites, run_id)
        crash_point(f"swapped: {table}")
        _assert_same(lake, table, version, rewrites, run_id)
    moved = [size for rewrite in rewrites for _, size in rewrite.removed]
    made = [rewrite.bytes for rewrite in rewrites]
    return {
        "rows_before": rows - sum(rewrite.superseded for rewrite in rewrites),
        "rows_after": rows - sum(_rows(handle, rewrite) for rewrite in rewrites) + sum(r.rows for r in rewrites),
        "files_before": len(sizes),
        "files_after": len(sizes) - len(moved) + len(made),
        "mb_before": sum(sizes) / 1e6,
        "mb_after": (sum(sizes) - sum(moved) + sum(made)) / 1e6,
    }


def _rows(handle: "DeltaTable", rewrite: Rewrite) -> int:
    """How many rows the log says that the replaced files have."""
    actions = pa.table(handle.get_add_actions(flatten=True)).select(["path", "num_records"]).to_pylist()
    gone = {path for path, _ in rewrite.removed}
    return sum(action["num_records"] for action in actions if action["path"] in gone)


def _worth_it(
    lake: "Lake", handle: "DeltaTable", table: str, target: int, min_small_files: int
) -> list[list[tuple[str, int]]]:
    """The small files of a table, in order of their keys, in groups that make one file of about `target` bytes."""
    actions = pa.table(handle.get_add_actions(flatten=True))
    first = f"min.{by[0]}" if (by := lake.sorted_by.get(table)) else None
    keys = actions[first].to_pylist() if first in actions.schema.names else [None] * len(actions)
    files = zip(keys, actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
    small = sorted(
        (file for file in files if file[2] < target / 2), key=lambda file: (file[0] is None, file[0] or 0, file[1])
    )
    if len(small) < min_small_files:
        return []
    groups: list[list[tuple[str, int]]] = [[]]
    for _, path, size in small:
        if sum(bytes_ for _, bytes_ in groups[-1]) + size > target:
            groups.append([])
        groups[-1].append((path, size))
    return [group for group in groups if len(group) > 1]


def _with_later(handle: "DeltaTable") -> list[list[tuple[str, int]]]:
    """All files of a table of which the newest row of a key counts, as a group, when some came after the compacted."""
    if not upsert.files(handle)[1]:
        return []
    actions = pa.table(handle.get_add_actions(flatten=True))
    return [[*zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)]]


def _newest(
    lake: "Lake", table: str, files: list[tuple[str, int]], declared: pa.Schema, *, target: int
) -> list[Rewrite]:
    """Write the newest row of each key of `files`, all of a table's, into files of about `target` bytes, sorted by key.

    All of the table is in memory meanwhile.
    """
    frame = _read(lake, table, files, declared)
    rows = upsert.newest(frame, lake.tables[table]).sort(lake.sorted_by[table])
    most = max(1, rows.height * target // max(1, sum(size for _, size in files)))
    parts = [rows.slice(first, most) for first in range(0, max(1, rows.height), most)]
    made = [_write(lake, table, part, declared, upsert.NEWEST) for part in parts]
    return [replace(made[0], removed=tuple(files), superseded=frame.height - rows.height), *made[1:]]


def _rewrite(lake: "Lake", table: str, files: list[tuple[str, int]], declared: pa.Schema) -> list[Rewrite]:
    """Write the rows of `files` into one, sorted by key. `declared`: the table's own schema."""
    frame = _read(lake, table, files, declared)
    keys = [key for key in lake.sorted_by.get(table, ()) if key in frame.columns]
    made = _write(lake, table, frame.sort(keys) if keys else frame, declared, "compacted-")
    return [replace(made, removed=tuple(files))]


def _read(lake: "Lake", table: str, files: list[tuple[str, int]], declared: pa.Schema) -> pl.DataFrame:
    """The rows of some files, all in the types of the table."""
    parts = [pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{path}"))) for path, _ in files]
    frame = pl.from_arrow(pa.concat_tables([as_declared(part, declared) for part in parts]))
    assert isinstance(frame, pl.DataFrame), "a table is no column"
    return frame


def _write(lake: "Lake", table: str, frame: pl.DataFrame, declared: pa.Schema, name: str) -> Rewrite:
    """Write rows into a file whose name begins with `name`, and read it again. Raises RowsDiffer."""
    buffer = io.BytesIO()
    rows = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(declared)
    pq.write_table(rows, buffer, row_group_size=LEDGER_ROW_GROUP if table == "files" else ROW_GROUP)
    path = f"{name}{uuid.uuid4()}.snappy.parquet"
    lake.root.write(f"lake/{table}/{path}", buffer.getvalue())
    crash_point(f"written, not swapped: {table}")
    after = pl.from_arrow(pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{path}"))))
    assert isinstance(after, pl.DataFrame), "a table is no column"
    if (frame.height, checksum(frame)) != (after.height, checksum(after)):
        lake.root.remove(f"lake/{table}/{path}")
        raise RowsDiffer(f"{table}: {frame.height} rows do not come back from one file: left as it was")
    return Rewrite((), path, len(buffer.getvalue()), after.height, checksum(after), delta.statistics(after))


def as_declared(part: pa.Table, declared: pa.Schema, defaults: Mapping[str, tuple[Any, Any]] = {}) -> pa.Table:
    """A file's rows in the table's types: Delta knows one string, writers have string, large_string and string_view.

    A column that the file has not is null, or what `defaults` says: name -> its Polars type, the value.
    Raises pyarrow.ArrowInvalid for a value that its column's type does not hold.
    """
    columns = []
    for field in declared:
        if field.name in part.column_names:
            columns.append(part[field.name].cast(field.type))
        elif field.name in defaults:
            dtype, value = defaults[field.name]
            column = pl.Series([value], dtype=dtype).new_from_index(0, part.num_rows)
            columns.append(column.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(field.type))
        else:
            columns.append(pa.nulls(part.num_rows, field.type))
    return pa.table(columns, schema=declared)


def checksum(frame: pl.DataFrame) -> int:
    """The sum of a hash of each row: the same in any order of rows."""
    return int(frame.select(sorted(frame.columns)).hash_rows(seed=0).cast(pl.Int128).sum())


def _swap(lake: "Lake", table: str, rewrites: list[Rewrite], run_id: str) -> int:
    """Commit to the table's log that these files take the place of those; returns the version.

    By hand, because delta-rs's own compaction neither sorts nor chooses its files. A commit is a file that must not be
    there yet; before each try the files to be replaced must all be live, so that no row can come twice.
    Raises Overlapped when one is not; what was written for it goes with a later sweep.
    """
    gone = {path for rewrite in rewrites for path, _ in rewrite.removed}
    while True:
        handle = lake.table(table)
        schemas.require_ours(table, handle)
        _require_live(handle, table, gone)
        version = handle.version() + 1
        if delta.commit(lake.root, f"lake/{table}", version, _actions(lake, rewrites, handle.version(), run_id)):
            return version


def _require_live(handle: "DeltaTable", table: str, paths: set[str]) -> None:
    """Raises Overlapped when a version does not have all these files."""
    if not paths <= _live(handle):
        raise Overlapped(f"{table}: another writer replaced files that this compaction had read: left as it is")


def _live(handle: "DeltaTable") -> set[str]:
    return set(pa.table(handle.get_add_actions(flatten=True))["path"].to_pylist())


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
    info = delta.commit_info("OPTIMIZE", about)
    return [
        info,
        *(
            {
                "remove": {
                    "path": path,
                    "dataChange": changes,
                    "deletionTimestamp": info["commitInfo"]["timestamp"],
                    "extendedFileMetadata": True,
                    "partitionValues": {},
                    "size": size,
                }
            }
            for path, size in removed
        ),
        *(delta.add(rewrite.path, rewrite.bytes, json.dumps(rewrite.stats), changes=changes) for rewrite in rewrites),
    ]


def _assert_same(lake: "Lake", table: str, version: int, rewrites: list[Rewrite], run_id: str) -> None:
    """The version before the swap and the one it made have the same rows, as the log counts them.

    Raises RowsDiffer when they have not; then the table is put back, and what came after the swap is kept out by that.
    """
    before, after = (lake.table(table, number) for number in (version - 1, version))
    gone = {path for rewrite in rewrites for path, _ in rewrite.removed}
    same_files = _live(after) == _live(before) - gone | {rewrite.path for rewrite in rewrites}
    rows = delta.file_stats(before)[1], delta.file_stats(after)[1]
    if same_files and rows[0] == rows[1] + sum(rewrite.superseded for rewrite in rewrites):
        return
    from deltalake import CommitProperties

    what = f"{table} had {rows[0]} rows before its compaction and {rows[1]} after"
    try:
        with commit.writing(lake.root, run_id):
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
    with commit.writing(lake.root, run_id):
        published = snapshot.read_pointer(lake.root)
        assert published is not None, "the caller has seen it, and nothing removes it"
        versions = dict(published["tables"])
        for line in lines:
            table = line["table"]
            if table in versions and not line["note"] and "failed" not in line:
                with _told(line):
                    handles[table] = lake.table(table)
                    versions[table] = _publishable(lake, table, handles[table], versions[table], published["batch"])
        if versions != published["tables"]:
            crash_point("before the compaction is published")
            snapshot.swap_pointer(
                lake.root,
                published,
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
    schemas.require_ours(table, newest)
    delta.sync(lake.root, f"lake/{table}", after=version, until=newest.version())
    crash_point(f"compaction synced: {table}")
    return newest.version()


def chart(done: pl.DataFrame) -> Any:
    """Files per table before and after, as bars; `done` as from `compact`."""
    from etl.charts import plot

    files = done.select("table", before="files_before", after="files_after")
    long = files.unpivot(index="table", variable_name="when", value_name="files")
    return plot(long).bar(x="table", y="files", by="when", title="Files before and after", xlabel="", ylabel="files")
