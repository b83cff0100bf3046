"""Small Parquet files become large ones, the same rows in fewer files; what nothing needs any more is removed.

A table that grows by a file a minute costs its readers a request a file. Compaction rewrites the small files of what is
published, sorted by key so that a file's and a row group's statistics tell which keys it can hold, and swaps them in
one commit that changes no row. It does not stand in preprocess's way: its commit says itself which files it replaces,
so a batch may be committed meanwhile, and the writer's lease is held only to publish.
"""

import io
import json
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.lake import documents, durability
from etl.lake import snapshot as lake
from etl.storage import LeaseHeld, Root, crash_point

VACUUM_HOURS = 24  # at least: a reader may still be on a version this old
ARCHIVE_DAYS = 7
INDEX = "runs"  # the index of runs is a table of the lake too, though no snapshot names it
LEASE_S = 1800  # of one table; longer than any of them takes
CLOCK = "lake/clock.json"
SLACK = timedelta(minutes=5)  # between two machines' clocks
GAP = timedelta(days=2)  # without a run: the clock may have been moved
ROW_GROUP = 100_000  # rows: what a reader skips or reads at once


class RowsDiffer(RuntimeError):
    """A compaction would have changed rows, or did and was taken back."""


class Overlapped(RuntimeError):
    """Another writer replaced a file that this compaction had read."""


@dataclass(frozen=True)
class Rewrite:
    """Small files, and the one that holds the same rows. `checksum`: of the rows, whatever their order."""

    removed: tuple[tuple[str, int], ...]  # path, bytes
    path: str
    bytes: int
    rows: int
    checksum: int
    stats: dict


def tables(root: str) -> list[str]:
    """The tables that there are, by name."""
    place = Root.at(root)
    return [name for name in (*lake.COLUMNS, INDEX) if place.list(f"lake/{name}/_delta_log")]


def survey(root: str, small_mb: float) -> pl.DataFrame:
    """One row a table: table, rows, files, small_files (below `small_mb` megabytes), mb, mean_mb."""
    lines = []
    for name in tables(root):
        sizes, rows = lake.file_stats(lake.open_table(Root.at(root), name))
        small = sum(size < small_mb * 1e6 for size in sizes)
        lines.append((name, rows, len(sizes), small, sum(sizes) / 1e6, sum(sizes) / 1e6 / max(len(sizes), 1)))
    schema = ["table", "rows", "files", "small_files", "mb", "mean_mb"]
    return pl.DataFrame(lines, schema=schema, orient="row")


def compact(
    root: str,
    *,
    target_mb: int,
    min_small_files: int,
    vacuum_hours: int,
    run_id: str,
    now: datetime | None = None,
) -> pl.DataFrame:
    """Compact and vacuum every table with at least `min_small_files` files below half of `target_mb`, and publish.

    Returns one row a table: table, version, rows_before, rows_after, files_before, files_after, mb_before, mb_after,
    removed (files vacuumed), note (why something was left out). The snapshot moves to the compacted versions; its batch
    stays. A table that another compaction is at work on is left to it.
    Raises ValueError when `vacuum_hours` is under 24, RowsDiffer when a table would not have the same rows after as
    before: then it is as it was, and nothing is published.
    """
    if vacuum_hours < VACUUM_HOURS:
        raise ValueError(f"vacuum_hours is {vacuum_hours}: readers may be on versions up to {VACUUM_HOURS} hours old")
    place, done = Root.at(root), []
    suspicion = clock_problem(place, now or datetime.now(UTC), vacuum_hours)
    published = lake.read_published(place)
    versions = published["tables"] if published else {}
    for table in tables(root):
        try:
            with place.lease(f"lake/leases/{table}", run_id, ttl_s=LEASE_S, wait_s=0):
                crash_point(f"compaction holds: {table}")
                line = _compact_table(place, table, versions.get(table), target_mb, min_small_files, run_id)
                done.append(line | _vacuum(place, table, vacuum_hours, suspicion, run_id))
        except (LeaseHeld, Overlapped) as error:
            done.append({"table": table, "note": f"left to another compaction: {error}"})
    if published:
        _publish(place, [line["table"] for line in done if line.get("version") is not None], run_id)
    schema = {"table": pl.String, "version": pl.Int64} | {
        f"{what}_{when}": kind
        for what, kind in (("rows", pl.Int64), ("files", pl.Int64), ("mb", pl.Float64))
        for when in ("before", "after")
    }
    return pl.DataFrame(done, schema=schema | {"removed": pl.Int64, "note": pl.String}).with_columns(
        pl.col("note").fill_null("")
    )


def _compact_table(
    place: Root, table: str, published: int | None, target_mb: int, min_small_files: int, run_id: str
) -> dict:
    """Rewrite what is small among the published files of a table. `published`: None where no snapshot names it."""
    handle = lake.open_table(place, table, published)
    sizes, rows = lake.file_stats(handle)
    rewrites = [
        _rewrite(place, table, files) for files in _worth_it(handle, table, target_mb * 1_000_000, min_small_files)
    ]
    crash_point(f"rewritten: {table}")
    if rewrites:
        version = _swap(place, table, rewrites, run_id)
        crash_point(f"swapped: {table}")
        _assert_same(place, table, version, rewrites, run_id)
    moved = [size for rewrite in rewrites for _, size in rewrite.removed]
    made = [rewrite.bytes for rewrite in rewrites]
    return {
        "table": table,
        "version": lake.open_table(place, table).version(),
        "rows_before": rows,
        "rows_after": rows - sum(_rows(handle, rewrite) for rewrite in rewrites) + sum(r.rows for r in rewrites),
        "files_before": len(sizes),
        "files_after": len(sizes) - len(moved) + len(made),
        "mb_before": sum(sizes) / 1e6,
        "mb_after": (sum(sizes) - sum(moved) + sum(made)) / 1e6,
        "note": "",
    }


def _rows(handle, rewrite: Rewrite) -> int:
    """How many rows the log says that the replaced files have."""
    actions = pa.table(handle.get_add_actions(flatten=True)).select(["path", "num_records"]).to_pylist()
    gone = {path for path, _ in rewrite.removed}
    return sum(action["num_records"] for action in actions if action["path"] in gone)


def _worth_it(handle, table: str, target: int, min_small_files: int) -> list[list[tuple[str, int]]]:
    """The small files of a table, in order of their keys, in groups that make one file of about `target` bytes."""
    actions = pa.table(handle.get_add_actions(flatten=True))
    first = f"min.{lake.KEYS[table][0]}" if table in lake.KEYS else None
    keys = actions[first].to_pylist() if first in actions.schema.names else [None] * len(actions)
    found = zip(keys, actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
    small = sorted((one for one in found if one[2] < target / 2), key=lambda one: (one[0] is None, one[0] or 0, one[1]))
    if len(small) < min_small_files:
        return []
    groups: list[list[tuple[str, int]]] = [[]]
    for _, path, size in small:
        if sum(bytes_ for _, bytes_ in groups[-1]) + size > target:
            groups.append([])
        groups[-1].append((path, size))
    return [group for group in groups if len(group) > 1]


def _rewrite(place: Root, table: str, files: list[tuple[str, int]]) -> Rewrite:
    """Write the rows of `files` into one, sorted by key, and read it again. Raises RowsDiffer."""
    parts = [pq.read_table(io.BytesIO(place.read(f"lake/{table}/{path}"))) for path, _ in files]
    before = pa.concat_tables(parts, promote_options="default")
    frame = pl.from_arrow(before)
    keys = [key for key in lake.KEYS.get(table, ()) if key in frame.columns]
    buffer = io.BytesIO()
    ordered = frame.sort(keys) if keys else frame
    as_before = ordered.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(before.schema)
    pq.write_table(as_before, buffer, row_group_size=ROW_GROUP)
    path = f"compacted-{uuid.uuid4()}.snappy.parquet"
    place.write(f"lake/{table}/{path}", buffer.getvalue())
    crash_point(f"written, not swapped: {table}")
    after = pl.from_arrow(pq.read_table(io.BytesIO(place.read(f"lake/{table}/{path}"))))
    if (frame.height, checksum(frame)) != (after.height, checksum(after)):
        place.remove(f"lake/{table}/{path}")
        raise RowsDiffer(
            f"{table}: {frame.height} rows of {len(files)} files do not come back from one: left as it was"
        )
    return Rewrite(tuple(files), path, len(buffer.getvalue()), after.height, checksum(after), lake.statistics(after))


def checksum(frame: pl.DataFrame) -> int:
    """The sum of a hash of each row: the same in any order of rows."""
    return int(frame.select(sorted(frame.columns)).hash_rows(seed=0).cast(pl.Int128).sum())


def _swap(place: Root, table: str, rewrites: list[Rewrite], run_id: str) -> int:
    """Commit to the table's log that these files take the place of those; returns the version.

    By hand, because delta-rs's own compaction neither sorts nor chooses its files. A commit is a file that must not be
    there yet; before each try the files to be replaced must all be live, so that no row can come twice.
    Raises Overlapped when one is not.
    """
    gone = {path for rewrite in rewrites for path, _ in rewrite.removed}
    while True:
        handle = lake.open_table(place, table)
        if not gone <= _live(handle):
            for rewrite in rewrites:
                place.remove(f"lake/{table}/{rewrite.path}")
            raise Overlapped(f"{table}: another writer replaced files that this compaction had read: left as it is")
        version = handle.version() + 1
        if lake.commit(place, table, version, _actions(rewrites, handle.version(), run_id)):
            return version


def _live(handle) -> set[str]:
    return set(pa.table(handle.get_add_actions(flatten=True))["path"].to_pylist())


def _actions(rewrites: list[Rewrite], read_version: int, run_id: str) -> list[dict]:
    """The lines of the commit, by the Delta protocol: https://github.com/delta-io/delta/blob/master/PROTOCOL.md"""
    now = time.time_ns() // 1_000_000
    removed = [one for rewrite in rewrites for one in rewrite.removed]
    about = {
        "timestamp": now,
        "operation": "OPTIMIZE",
        "operationParameters": {"predicate": "[]"},
        "readVersion": read_version,
        "isBlindAppend": False,
        "operationMetrics": {"numFilesAdded": len(rewrites), "numFilesRemoved": len(removed)},
        "run_id": run_id,
        "stage": "compact",
        "checksum": str(sum(rewrite.checksum for rewrite in rewrites)),
    }
    return [
        {"commitInfo": about},
        *(
            {
                "remove": {
                    "path": path,
                    "dataChange": False,
                    "deletionTimestamp": now,
                    "extendedFileMetadata": True,
                    "partitionValues": {},
                    "size": size,
                }
            }
            for path, size in removed
        ),
        *(lake.add(one.path, one.bytes, json.dumps(one.stats), now, changes=False) for one in rewrites),
    ]


def _assert_same(place: Root, table: str, version: int, rewrites: list[Rewrite], run_id: str) -> None:
    """The version before the swap and the one it made have the same rows, as the log counts them.

    Raises RowsDiffer when they have not; then the table is put back, and what came after the swap is kept out by that.
    """
    before, after = (lake.open_table(place, table, number) for number in (version - 1, version))
    gone = {path for rewrite in rewrites for path, _ in rewrite.removed}
    same_files = _live(after) == _live(before) - gone | {rewrite.path for rewrite in rewrites}
    rows = lake.file_stats(before)[1], lake.file_stats(after)[1]
    if same_files and rows[0] == rows[1]:
        return
    from deltalake import CommitProperties

    with lake.writing(place, run_id):
        handle = lake.open_table(place, table)
        if handle.version() == version:
            properties = CommitProperties(custom_metadata={"run_id": run_id, "stage": "compact"})
            handle.restore(version - 1, commit_properties=properties)
    raise RowsDiffer(f"{table} had {rows[0]} rows before its compaction and {rows[1]} after: put back")


def _vacuum(place: Root, table: str, hours: int, suspicion: str | None, run_id: str) -> dict:
    """Remove files that no version of the last `hours` names."""
    from deltalake import CommitProperties

    if suspicion:
        return {"removed": 0, "note": f"not vacuumed: {suspicion}"}
    handle = lake.open_table(place, table)
    handle.cleanup_metadata()  # what the log's retention allows; a checkpoint alone was not seen to do it
    durability.forget(place, table)
    if not handle.vacuum(retention_hours=hours):  # it would be two commits all the same
        return {"removed": 0}
    properties = CommitProperties(custom_metadata={"run_id": run_id, "stage": "compact"})
    removed = handle.vacuum(retention_hours=hours, dry_run=False, commit_properties=properties)
    crash_point(f"vacuumed: {table}")
    return {"removed": len(removed), "version": handle.version()}


def clock_problem(place: Root, now: datetime, hours: int) -> str | None:
    """Why the clock is not believed enough to delete by it; None when it has been steady for `hours`.

    A clock that jumped ahead makes yesterday of what is a minute old. So the times of runs are remembered, and after a
    jump, or a pause that looks the same, nothing is deleted until the clock has been steady for that long.
    """
    published = lake.read_published(place)
    newest = datetime.fromisoformat(published["published_at"]) if published else now
    seen = documents.read(place, CLOCK) or {"steady_since": now.isoformat(), "seen": now.isoformat()}
    last, since = (datetime.fromisoformat(seen[name]) for name in ("seen", "steady_since"))
    jumped = now < last - SLACK or now > last + GAP
    if jumped:
        since = now
    documents.keep(place, CLOCK, {"steady_since": since.isoformat(), "seen": now.isoformat()})
    if now < newest - SLACK:
        return f"the clock says {now:%Y-%m-%d %H:%M}, before the newest snapshot, of {newest:%Y-%m-%d %H:%M}"
    if jumped:
        return f"the clock went from {last:%Y-%m-%d %H:%M} to {now:%Y-%m-%d %H:%M} between two runs"
    if now - since < timedelta(hours=hours):
        return f"the clock is known to be steady only since {since:%Y-%m-%d %H:%M}"
    return None


def _publish(place: Root, names: list[str], run_id: str) -> None:
    """Move the snapshot to the newest versions, but not of a table that holds rows of a batch that is not published."""
    with lake.writing(place, run_id):
        published = lake.read_published(place)
        versions = dict(published["tables"])
        for table in set(names) & set(versions):
            handle = lake.open_table(place, table)
            if (
                handle.version() == versions[table]
                or (handle.transaction_version(lake.APP_ID) or 0) > published["batch"]
            ):
                continue
            durability.seal(place, table, after=versions[table], until=handle.version())
            crash_point(f"compaction sealed: {table}")
            versions[table] = handle.version()
        if versions != published["tables"]:
            crash_point("before the compaction is published")
            lake.publish(
                place,
                batch=published["batch"],
                as_of=published["as_of"],
                versions=versions,
                run_id=published["run_id"],
            )
            crash_point("compaction published")


def prune_archive(root: str, scheduled_for: str | None, days: int = ARCHIVE_DAYS) -> list[str]:
    """Remove the archive's days that are older than `days` before `scheduled_for` (ISO 8601). Returns them.

    What is removed cannot be made again from the archive. With 0 days, or without a time, nothing is removed.
    """
    if scheduled_for is None or not days:
        return []
    place, oldest = Root.at(root), date.fromisoformat(scheduled_for[:10]) - timedelta(days=days)
    old = [day for day in place.list("archive") if date.fromisoformat(day) < oldest]
    for day in old:
        place.remove_tree(f"archive/{day}")
    return old


def chart(done: pl.DataFrame):
    """Files per table before and after, as bars; `done` as from `compact`."""
    from etl.charts import plot

    files = done.select("table", before="files_before", after="files_after")
    long = files.unpivot(index="table", variable_name="when", value_name="files")
    return plot(long).bar(x="table", y="files", by="when", title="Files before and after", xlabel="", ylabel="files")
