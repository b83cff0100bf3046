"""Small Parquet files become large ones, the same rows in fewer files; what nothing needs any more is removed.

A table that grows by a file a minute costs its readers a request a file. Compaction rewrites small files as one commit
that changes no row; vacuum later removes the files that no version of the last day names.
"""

from datetime import date, timedelta

import polars as pl

from pipeline import lake
from storage import Root

VACUUM_HOURS = 24  # at least: a reader may still be on a version this old
ARCHIVE_DAYS = 7
INDEX = "runs"  # the index of runs is a table of the lake too, though no snapshot names it


class UnfinishedBatch(RuntimeError):
    """A batch is committed to some tables and not to others: preprocess has to finish it first."""


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


def compact(root: str, *, target_mb: int, min_small_files: int, vacuum_hours: int, run_id: str) -> pl.DataFrame:
    """Compact and vacuum every table with at least `min_small_files` files below half of `target_mb`, and publish.

    Returns one row a table: table, version, rows_before, rows_after, files_before, files_after, mb_before, mb_after,
    removed (files vacuumed). The snapshot moves to the compacted versions; its batch stays.
    Raises UnfinishedBatch, storage.LeaseHeld, ValueError when `vacuum_hours` is under 24, and RuntimeError when a table
    does not have the same number of rows after as before: then it is put back and nothing is published.
    """
    if vacuum_hours < VACUUM_HOURS:
        raise ValueError(f"vacuum_hours is {vacuum_hours}: readers may be on versions up to {VACUUM_HOURS} hours old")
    place = Root.at(root)
    with lake.writing(place, run_id):
        published = lake.read_published(place)
        following = published["batch"] + 1 if published else 1
        if place.exists(f"lake/batches/{following:08d}.json"):
            raise UnfinishedBatch(f"batch {following} is not finished: the next preprocess run will")
        done = [
            _compact_table(place, table, target_mb, min_small_files, vacuum_hours, run_id) for table in tables(root)
        ]
        if published:
            versions = published["tables"] | {
                line["table"]: line["version"] for line in done if line["table"] in published["tables"]
            }
            lake.publish(
                place,
                batch=published["batch"],
                as_of=published["as_of"],
                versions=versions,
                run_id=published["run_id"],
            )
    return pl.DataFrame(done)


def _compact_table(
    place: Root, table: str, target_mb: int, min_small_files: int, vacuum_hours: int, run_id: str
) -> dict:
    from deltalake import CommitProperties

    handle = lake.open_table(place, table)
    before, (sizes, rows) = handle.version(), lake.file_stats(handle)
    properties = CommitProperties(custom_metadata={"run_id": run_id, "stage": "compact"})
    if sum(size < target_mb * 1e6 / 2 for size in sizes) >= min_small_files:
        handle.optimize.compact(
            target_size=target_mb * 1_000_000,
            commit_properties=properties,
            min_commit_interval=timedelta(hours=1),
        )
    handle = lake.open_table(place, table)
    sizes_after, rows_after = lake.file_stats(handle)
    # the index of runs may grow meanwhile: its writers do not wait for this lease
    if rows_after != rows and not (table == INDEX and rows_after > rows):
        handle.restore(before, commit_properties=properties)
        raise RuntimeError(f"{table} had {rows} rows before its compaction and {rows_after} after: put back")
    removed = handle.vacuum(retention_hours=vacuum_hours, dry_run=False, commit_properties=properties)
    handle = lake.open_table(place, table)
    return {
        "table": table,
        "version": handle.version(),
        "rows_before": rows,
        "rows_after": rows_after,
        "files_before": len(sizes),
        "files_after": len(sizes_after),
        "mb_before": sum(sizes) / 1e6,
        "mb_after": sum(sizes_after) / 1e6,
        "removed": len(removed),
    }


def prune_archive(root: str, scheduled_for: str | None, days: int = ARCHIVE_DAYS) -> list[str]:
    """Remove the archive's days that are older than `days` before `scheduled_for` (ISO 8601). Returns them.

    A run without a time of its own removes nothing.
    """
    if scheduled_for is None:
        return []
    place, oldest = Root.at(root), date.fromisoformat(scheduled_for[:10]) - timedelta(days=days)
    old = [day for day in place.list("archive") if date.fromisoformat(day) < oldest]
    for day in old:
        place.remove_tree(f"archive/{day}")
    return old


def chart(done: pl.DataFrame):
    """Files per table before and after, as bars; `done` as from `compact`."""
    from pipeline.charts import plot

    files = done.select("table", before="files_before", after="files_after")
    long = files.unpivot(index="table", variable_name="when", value_name="files")
    return plot(long).bar(x="table", y="files", by="when", title="Files before and after", xlabel="", ylabel="files")
