"""Where a question's frames come from and who computes its answer: Polars in this process, or a Dask cluster.

Both read the files of one snapshot, only the columns asked for, every decimal as a whole number of hundredths, and
leave out files that hold nothing in the question's window by the statistics in Delta's log.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import polars as pl

from etl import clusters, delta
from etl.storage import object_store_options

if TYPE_CHECKING:
    import distributed
    import narwhals as nw
    import pandas as pd

    from etl.lake.snapshot import Snapshot

PIECE_ROWS = 1 << 20  # of a file that one Dask task reads
Window = dict[str, tuple[str, datetime]]  # table -> the time column, and since when its rows matter


class Piece(NamedTuple):
    """Some rows of one Parquet file."""

    url: str
    first: int
    rows: int
    values: dict[str, Any]  # of its partition, which the file does not have itself


def by_polars(
    answer: Callable[..., Any],
    snapshot: "Snapshot",
    tables: dict[str, list[str]],
    window: Window,
    parameters: dict[str, Any],
    files: Mapping[str, list[delta.Action]] = {},
) -> pl.DataFrame:
    """The answer, by Polars' streaming engine: large intermediate results are never in memory as a whole.

    `files`: of these tables only some files are read, as the log adds them.
    """
    import narwhals as nw

    frames = {
        # prunes files by the log's statistics, and row groups by the files' own
        name: nw.from_native(_rows(_frame(snapshot, name, files.get(name)), columns, window.get(name)))
        for name, columns in tables.items()
    }
    result: pl.DataFrame = answer(**frames, **parameters).collect("polars", engine="streaming").to_native()
    return result


def _frame(snapshot: "Snapshot", table: str, files: list[delta.Action] | None) -> pl.LazyFrame:
    return snapshot.frame(table) if files is None else snapshot.frame_of(table, files)


def by_dask(
    client: "distributed.Client",
    answer: Callable[..., Any],
    snapshot: "Snapshot",
    tables: dict[str, list[str]],
    window: Window,
    parameters: dict[str, Any],
) -> pl.DataFrame:
    """The answer, by the workers of a Dask cluster; they spill what does not fit their memory.

    They need this project's packages, in the same versions, and not the project itself.
    """
    clusters.require_worker(client)
    _always_shuffle()
    with client.as_current():  # the scheduler of everything computed inside
        frames = {name: _dask_frame(snapshot, name, columns, window.get(name)) for name, columns in tables.items()}
        result: pl.DataFrame = answer(**frames, **parameters).collect("polars").to_native()
        return result


def pieces(snapshot: "Snapshot", table: str, since: tuple[str, datetime] | None = None) -> list[Piece]:
    """A table in pieces of PIECE_ROWS rows, without the files whose newest row is older than `since`; at least one."""
    files = pl.DataFrame(delta.live(snapshot.table(table)))
    if over := snapshot.overlay(table):
        names = [str(file.url).rpartition("/")[2] for file in over.kept]
        files = files.filter(pl.col("path").str.split("/").list.last().is_in(names))
    if since is not None:
        column, oldest = since
        if f"max.{column}" in files.columns:  # not where the version does not have the column yet
            newest = pl.col(f"max.{column}").dt.offset_by("1ms")  # the log cuts times to whole milliseconds
            files = files.filter((newest >= oldest).fill_null(True))
    folder, partitions = snapshot.root.url_of(f"lake/{table}"), snapshot.table(table).metadata().partition_columns
    return [
        Piece(
            f"{folder}/{unquote(file['path'])}",  # the log has it percent-encoded
            first,
            PIECE_ROWS,
            {name: file[f"partition.{name}"] for name in partitions},
        )
        for file in files.iter_rows(named=True)
        for first in range(0, file["num_records"], PIECE_ROWS)
    ]


def _dask_frame(
    snapshot: "Snapshot", table: str, columns: list[str], since: tuple[str, datetime] | None
) -> "nw.LazyFrame[Any]":
    import dask.dataframe as dd
    import narwhals as nw

    typed = snapshot.frame(table).clear().collect()
    empty = _pandas(_rows(typed.lazy(), columns, since))
    parts, over = pieces(snapshot, table, since), snapshot.overlay(table)
    if parts:
        wanted = _wanted(snapshot, table, {*columns} | ({since[0]} if since else set()))
        frame = dd.from_map(
            clusters.Sent(_read),
            *zip(*parts, strict=True),
            wanted=wanted,
            columns=columns,
            since=since,
            without=over.keys if over else None,
            meta=empty,
            enforce_metadata=False,
        )
    else:
        frame = dd.from_pandas(empty, npartitions=1)
    if over:
        later = over.rows.lazy().with_columns(snapshot.otherwise(table))
        frame = dd.concat([frame, dd.from_pandas(_pandas(_rows(later, columns, since)), npartitions=1)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dask support is moving out of Narwhals", FutureWarning)
        lazy: nw.LazyFrame[Any] = nw.from_native(frame)
        return lazy


def _always_shuffle() -> None:
    """Have Dask forget by which columns it believes a frame to be partitioned already.

    Dask 2026.8 believes it of the result of a broadcast join, which is not, and then groups each partition by itself:
    wrong answers without an error, as soon as the smaller table has two pieces. After a rename it looks for columns
    that are gone: KeyError, or "'tuple' object is not callable".
    """
    from dask.dataframe.dask_expr._expr import Expr

    belief, kinds = "unique_partition_mapping_columns_from_shuffle", [Expr]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if belief in vars(kind):
            setattr(kind, belief, property(lambda expression: set()))


def _read(
    url: str,
    first: int,
    rows: int,
    values: dict[str, Any],
    columns: list[str],
    since: tuple[str, datetime] | None,
    wanted: Sequence[tuple[str, pl.DataType, Any]] = (),
    without: pl.DataFrame | None = None,
) -> "pd.DataFrame":
    """A piece, on a worker."""
    return _pandas(_rows(_piece(Piece(url, first, rows, values), wanted, without), columns, since))


def _piece(
    piece: Piece, wanted: Sequence[tuple[str, pl.DataType, Any]], without: pl.DataFrame | None = None
) -> pl.LazyFrame:
    """A piece, on a worker: credentials are those of its own environment.

    `wanted`: name, type and default of the columns; a file from before one was added does not have it. `without`: keys
    of which the rows do not count.
    """
    options = object_store_options() if "://" in piece.url else None
    file = pl.scan_parquet(piece.url, glob=False, storage_options=options)
    has = file.collect_schema()
    otherwise = [
        pl.col(name).cast(dtype) if name in has else pl.lit(pl.Series([default], dtype=dtype)).first().alias(name)
        for name, dtype, default in wanted
        if has.get(name) != dtype and name not in piece.values
    ]
    given = [pl.lit(pl.Series([value])).first().alias(name) for name, value in piece.values.items()]
    rows = file.slice(piece.first, piece.rows).with_columns(given)
    if without is not None:
        rows = rows.join(without.lazy(), on=without.columns, how="anti")
    return rows.with_columns(otherwise)


def each_piece(
    client: "distributed.Client",
    work: Callable[[pl.DataFrame], Any],
    snapshot: "Snapshot",
    table: str,
    columns: list[str],
    since: tuple[str, datetime] | None = None,
) -> "list[distributed.Future[Any]]":
    """What a function of a module makes of the rows of each piece of a table, on the workers. Of a table in which the
    newest row of a key counts, of its compacted rows alone. `since`: the time column, and since when its rows count."""
    wanted = _wanted(snapshot, table, {*columns} | ({since[0]} if since else set()))
    return [
        clusters.submit(client, _work, work, piece, wanted, columns, since) for piece in pieces(snapshot, table, since)
    ]


def _work(
    work: Callable[[pl.DataFrame], Any],
    piece: Piece,
    wanted: Sequence[tuple[str, pl.DataType, Any]],
    columns: list[str],
    since: tuple[str, datetime] | None,
) -> Any:
    rows = _piece(piece, wanted)
    recent = rows if since is None else rows.filter(pl.col(since[0]) > since[1])
    return work(recent.select(columns).collect())


def _wanted(snapshot: "Snapshot", table: str, names: set[str]) -> list[tuple[str, pl.DataType, Any]]:
    """Name, type and default of some columns."""
    defaults, schema = snapshot.lake.defaults[table], snapshot.frame(table).collect_schema()
    return [(name, dtype, defaults.get(name)) for name, dtype in schema.items() if name in names]


def _rows(frame: pl.LazyFrame, columns: list[str], since: tuple[str, datetime] | None) -> pl.LazyFrame:
    """Those that matter. A decimal(15,2) is held in memory as the number of its hundredths: taking that is free."""
    recent = frame if since is None else frame.filter(pl.col(since[0]) >= since[1])
    return recent.select(columns).with_columns(pl.selectors.decimal().to_physical().cast(pl.Int64))


def _pandas(frame: pl.LazyFrame) -> "pd.DataFrame":
    """In types that Dask can compare, join and send: text and days in Arrow's, all else in NumPy's."""
    import pandas as pd
    import pyarrow as pa

    types = {pa.large_string(): pd.StringDtype("pyarrow"), pa.date32(): pd.ArrowDtype(pa.date32())}
    return frame.collect().to_arrow(compat_level=pl.CompatLevel.oldest()).to_pandas(types_mapper=types.get)
