"""Tables of which the newest row of a key counts (`Table.mode` is `upsert`).

A batch's rows are appended, as those of any table: with the number of their batch, one row a key. Compaction replaces
all files by ones that have one row a key, whose names say so. So a reader takes those as they are, and puts the rows of
what came after them, which are few, over them; after a compaction there is nothing to put over, and every other reader
of Delta tables sees the newest rows, too.
"""

from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from etl.lake.table import BATCH, Table

if TYPE_CHECKING:
    from deltalake import DeltaTable

NEWEST = "newest-"  # begins the name of a file that has the only row of each of its keys, but for later files


class Overlay(NamedTuple):
    """What is put over the files that have one row a key. `kept`: their URLs; `keys`: the keys of which another row
    counts; `rows`: these rows, in the columns of the version."""

    kept: list[str]
    keys: pl.DataFrame
    rows: pl.DataFrame


def ranks(table: Table) -> list[str]:
    """By which of two rows of a key the newer is told: null is the oldest."""
    return [*([table.order_by] if table.order_by else []), BATCH]


def newest(rows: pl.DataFrame, table: Table) -> pl.DataFrame:
    """One row a key: the one with the highest ranks, and of equal ones the last."""
    ordered = rows.sort(ranks(table), nulls_last=False, maintain_order=True)
    return ordered.unique(table.key, keep="last", maintain_order=True)


def of_batch(rows: pl.DataFrame, table: Table, number: int) -> pl.DataFrame:
    """A batch's rows as they are stored."""
    return newest(rows.with_columns(pl.lit(number, pl.Int64).alias(BATCH)), table)


def files(handle: "DeltaTable") -> tuple[list[str], list[str]]:
    """The URLs of a version's files that have one row a key, and those of the files that came after them."""
    urls = handle.file_uris()
    kept = [url for url in urls if url.rpartition("/")[2].startswith(NEWEST)]
    return kept, [url for url in urls if url not in {*kept}]


def overlay(handle: "DeltaTable", table: Table, storage_options: dict[str, str]) -> Overlay | None:
    """What came after the files with one row a key; None when nothing did."""
    kept, later = files(handle)
    if not later:
        return None
    schema = pl.scan_delta(handle).collect_schema()
    rows = newest(scan(later, schema, storage_options).collect(), table)
    if not kept:
        return Overlay(kept, rows.select(table.key), rows)
    compared = [*table.key, *ranks(table)]
    before = scan(kept, schema, storage_options).select(compared)
    before = before.join(rows.lazy().select(table.key), on=table.key, how="semi")
    both = pl.concat([before.collect().with_columns(later=False), rows.select(compared).with_columns(later=True)])
    keys = newest(both, table).filter("later").select(table.key)
    return Overlay(kept, keys, rows.join(keys, on=table.key, how="semi"))


def scan(urls: list[str], schema: pl.Schema, storage_options: dict[str, str]) -> pl.LazyFrame:
    """The rows of some files of a table, and of each the batch; what a file does not have is null."""
    rows = pl.scan_parquet(
        urls,
        glob=False,
        schema=schema,
        missing_columns="insert",
        extra_columns="ignore",
        storage_options=storage_options or None,
    )
    return rows if BATCH in schema else rows.with_columns(pl.lit(None, pl.Int64).alias(BATCH))
