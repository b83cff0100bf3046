"""Tables of which the newest row of a key counts (`Table.mode` is `upsert`).

A batch's rows are appended, as those of any table: with the number of their batch, one row a key. Compaction replaces
all files by ones that have one row a key, whose names say so. So a reader takes those as they are, and puts the rows of
what came after them, which are few, over them; after a compaction there is nothing to put over, and every other reader
of Delta tables sees the newest rows, too.
"""

from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import polars as pl

from etl import delta
from etl.lake.table import BATCH, Table

if TYPE_CHECKING:
    from deltalake import DeltaTable

NEWEST = "newest-"  # begins the name of a file that has the only row of each of its keys, but for later files


class File(NamedTuple):
    """A file of a table, to be read. `url`: or the file itself. `values`: of its partition, which it does not have
    itself."""

    url: str | bytes
    values: dict[str, Any]


class Overlay(NamedTuple):
    """What is put over the files that have one row a key. `kept`: these; `keys`: the keys of which another row
    counts; `rows`: these rows, in the columns of the version."""

    kept: list[File]
    keys: pl.DataFrame
    rows: pl.DataFrame


def ranks(table: Table) -> list[str]:
    """By which of two rows of a key the newer is told: null is the oldest."""
    return [*([table.order_by] if table.order_by else []), BATCH]


def newest(rows: pl.DataFrame, table: Table, without: Container[str] = ()) -> pl.DataFrame:
    """One row a key: the one with the highest ranks, and of equal ones the last. `without`: columns of which all rows
    have the same, and which they lack."""
    key, by = ([name for name in names if name not in without] for names in (table.key, ranks(table)))
    numbered = rows.select(*dict.fromkeys([*key, *by])).with_row_index("_row")
    ordered = numbered.sort(by, nulls_last=False, maintain_order=True)
    counts = ordered.unique(key, keep="last", maintain_order=True) if key else ordered.tail(1)
    return rows[counts["_row"]]


def of_batch(rows: pl.DataFrame, table: Table, number: int) -> pl.DataFrame:
    """A batch's rows as they are stored."""
    return newest(rows.with_columns(pl.lit(number, pl.Int64).alias(BATCH)), table)


def files(handle: "DeltaTable") -> tuple[list[File], list[File]]:
    """A version's files that have one row a key, and those that came after them."""
    folder = unquote(handle.table_uri.removeprefix("file://").rstrip("/"))
    every = delta.files(handle)
    kept, later = (
        [File(f"{folder}/{file.rel}", file.values) for file in every if is_newest(file.rel) is first]
        for first in (True, False)
    )
    return kept, later


def is_newest(path: str) -> bool:
    """Whether a file has one row a key, by its name."""
    return path.rpartition("/")[2].startswith(NEWEST)


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


def scan(files: list[File], schema: pl.Schema, storage_options: dict[str, str]) -> pl.LazyFrame:
    """The rows of some files of a table, and of each the batch; what a file does not have is null."""
    urls: dict[tuple[type, tuple[tuple[str, Any], ...]], list[Any]] = {}  # a scan has either URLs or files
    for file in files:
        urls.setdefault((type(file.url), (*file.values.items(),)), []).append(file.url)
    return pl.concat(_scan(of, dict(values), schema, storage_options) for (_, values), of in urls.items())


def _scan(
    urls: list[str] | list[bytes], values: dict[str, Any], schema: pl.Schema, storage_options: dict[str, str]
) -> pl.LazyFrame:
    """As `scan`, of one partition."""
    rows = pl.scan_parquet(
        urls,
        glob=False,
        schema=pl.Schema({name: dtype for name, dtype in schema.items() if name not in values}),
        missing_columns="insert",
        extra_columns="ignore",
        storage_options=storage_options or None,
    )
    if values:
        rows = rows.with_columns(pl.lit(value, schema[name]).alias(name) for name, value in values.items())
        rows = rows.select(schema.names())
    return rows if BATCH in schema else rows.with_columns(pl.lit(None, pl.Int64).alias(BATCH))
