"""The rows of many files in order, a part of them in memory at a time.

They are read twice: once to see how many there are, how much memory they take and how their keys are spread, then once
for each range of keys whose rows fit into the memory that is given. A file's row groups that a range cannot need are
not read for it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl import delta

if TYPE_CHECKING:
    from etl.storage import Root

BATCH_ROWS, BATCH_BYTES = 50_000, 8_000_000  # that are read at once, at most, and of the file
SAMPLED = 100_000  # rows at most, of which the ranges are made
Bound = tuple[Any, ...]  # a row's values in the columns that it is sorted by


@dataclass(frozen=True)
class Source:
    """The files of a table that are read. `declared`: the columns and types of their rows, in which `values` are those
    of the files' partition."""

    root: "Root"
    table: str  # its folder
    files: Sequence[delta.File]
    declared: pa.Schema
    values: Mapping[str, Any]

    def rows(
        self, file: delta.File, groups: list[int] | None = None, within: pl.Expr | None = None
    ) -> Iterator[pl.DataFrame]:
        """Some of its rows after the others, of all its row groups or some, all or those `within`; without what its
        partition says."""
        with self.root.open(f"{self.table}/{file.rel}") as opened:
            parquet = pq.ParquetFile(opened)
            most = max(1, min(BATCH_ROWS, BATCH_BYTES * parquet.metadata.num_rows // max(1, file.bytes)))
            for batch in parquet.iter_batches(most, row_groups=groups):
                part = as_declared(pa.Table.from_batches([batch], parquet.schema_arrow), self.declared)
                if within is not None:  # by Arrow: texts that Polars filters keep the memory of those that went
                    looked_at = pl.DataFrame(part.select([*dict.fromkeys(within.meta.root_names())]))
                    part = part.filter(looked_at.select(within).to_series().to_arrow())
                yield pl.DataFrame(part)


@dataclass(frozen=True)
class Seen:
    """What the rows of a source are. `bytes`: in memory. `bounds`: where the next range of keys begins."""

    rows: int
    checksum: int
    bounds: list[Bound]


def look(source: Source, by: Sequence[str], memory: int) -> Seen:
    """Read all rows once. `by`: the columns that they are sorted by; `memory`: bytes of rows that are held at once."""
    rows, total, size, samples = 0, 0, 0, []
    every = max(1, sum(file.rows for file in source.files) // SAMPLED)
    for file in source.files:
        for part in source.rows(file):
            rows, total, size = rows + part.height, total + checksum(part), size + int(part.estimated_size())
            samples.append(part.select(by).gather_every(every))
    ranges = -(-size // memory)
    if ranges < 2 or not by:
        return Seen(rows, total, [])
    sample = pl.concat(samples).sort(by)
    bounds = [sample.row(n * sample.height // ranges) for n in range(1, ranges)]
    return Seen(rows, total, [bound for bound, _ in itertools.groupby(bounds)])


def ranges(source: Source, by: Sequence[str], bounds: list[Bound]) -> Iterator[pl.DataFrame]:
    """The rows from each bound to the next, the first range's first; the rows of a range are as they come."""
    if not bounds:
        yield pl.concat([empty(source.declared), *(part for file in source.files for part in source.rows(file))])
        return
    groups = [_groups(source, file, by[0]) for file in source.files]
    for low, high in itertools.pairwise([None, *bounds, None]):
        yield _range(source, by, groups, low, high)


def _range(
    source: Source, by: Sequence[str], groups: "list[list[Span]]", low: Bound | None, high: Bound | None
) -> pl.DataFrame:
    """The rows from a bound to before another. `groups`: what is known of the row groups of each file."""
    from_low = [_from(by, low)] if low is not None else []
    within = pl.all_horizontal(*from_low, *([~_from(by, high)] if high is not None else []))
    parts = [empty(source.declared)]
    for file, known in zip(source.files, groups, strict=True):
        needed = [number for number, span in enumerate(known) if _meets(span, low, high)]
        parts += source.rows(file, needed, within) if needed else []
    return pl.concat(parts)


def _from(by: Sequence[str], bound: Bound) -> pl.Expr:
    """Whether a row comes at the bound or after it; null is before all others, as it is in sorted rows."""
    later = pl.lit(value=True)
    for name, value in reversed([*zip(by, bound, strict=True)]):
        column = pl.col(name)
        if value is None:
            later = column.is_not_null() | later
        else:
            later = (column > value).fill_null(value=False) | ((column == value).fill_null(value=False) & later)
    return later


Span = tuple[Any, Any] | None  # lowest and highest value of a row group; None where it is not known, or it has nulls


def _groups(source: Source, file: delta.File, column: str) -> list[Span]:
    """What is known of the row groups of a file."""
    with source.root.open(f"{source.table}/{file.rel}") as opened:
        metadata = pq.ParquetFile(opened).metadata
    names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    declared = source.declared.field(column).type
    exact = not pa.types.is_floating(declared) and (metadata.created_by or "").startswith("parquet-cpp")
    if column not in names or not exact:  # others may cut off what is long
        return [None] * metadata.num_row_groups
    at = names.index(column)
    return [_span(metadata.row_group(n).column(at).statistics) for n in range(metadata.num_row_groups)]


def _span(known: Any) -> Span:
    if known is None or not known.has_min_max or known.null_count != 0:
        return None
    return known.min, known.max


def _meets(span: Span, low: Bound | None, high: Bound | None) -> bool:
    """Whether a row group may have rows of a range."""
    if span is None:
        return True
    after = low is None or low[0] is None or bool(span[1] >= low[0])
    return after and (high is None or high[0] is None or bool(span[0] <= high[0]))


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


def empty(declared: pa.Schema) -> pl.DataFrame:
    """No row of these columns."""
    return pl.DataFrame(declared.empty_table())


def as_arrow(frame: pl.DataFrame, declared: pa.Schema) -> pa.Table:
    """Rows in these columns and types, in which every reader of Arrow has them."""
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(declared)
