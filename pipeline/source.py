"""The source: canonical TPC-H, cut into slices and given out over time.

Tick k of a stream brings slice k of N: the orders as `tpchgen-cli --parts=N --part=k+1` makes them, and their line
items, so after N ticks the tables are TPC-H at that scale, row by row. Past N the stream goes on: epoch e repeats the
slices with order keys moved up by e times the highest key. The first tick also brings the six tables that do not grow.

What a tick holds depends on the stream's description (`landing/stream.json`) and on its number alone: made twice, it
is the same bytes under the same names. Nothing larger than a slice, or a part of another table, is in memory at once.
"""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

import polars as pl

from etl.storage import Root, temporary_folder
from pipeline.tables import STREAMED, TABLES

TICK_S = 30  # seconds of event time between two ticks
SHIP_STEP = timedelta(minutes=36)  # one day between order and shipping takes this long in the live stream
DESCRIPTION = "landing/stream.json"
FILE_ROWS = 150_000  # line items are the longest rows: 64 MB of them, far below what a batch of preprocess may have
PART_ROWS = 500_000  # of a table that does not grow, made at once
GROUP_ORDERS = 500_000  # of the ticks that are in memory at once, where a slice is smaller; 4 line items each
ROWS = {  # at scale 1, of the tables that do not grow; the first two are the same at any
    **{"region": 5, "nation": 25},
    **{"customer": 150_000, "supplier": 10_000, "part": 200_000, "partsupp": 800_000},
}
# tpchgen-cli cuts a part of a table into chunks, the row groups of its file, as many as its estimate of a row's bytes
# asks for, and rounds the rows of a chunk down. Orders and line items are cut alike when their chunks are as many.
CHUNK_BYTES = 7 << 20  # its default
ORDER_BYTES, LINE_ITEMS_BYTES = 75, 4 * 64  # what it takes an order, and the line items of one, for
FILES = {"tick": pl.Int64, "table": pl.String, "rows": pl.Int64, "bytes": pl.Int64, "file": pl.String}
WORKERS = min(4, os.cpu_count() or 1)  # generators at once, 360 MB each


@dataclass(frozen=True)
class Stream:
    """One stream. `origin`: the UTC time of tick 0, ISO 8601. `next_tick`: the first tick not given out yet.

    `file_rows`: rows of a table in one file at most; None, as in streams begun before there was a limit: all of them.
    """

    scale: float
    slices: int
    origin: str
    next_tick: int = 0
    file_rows: int | None = FILE_ROWS

    @classmethod
    def of(cls, root: Root) -> "Stream":
        """The stream under `root`. Raises FileNotFoundError."""
        return cls(**({"file_rows": None} | json.loads(root.read(DESCRIPTION))))

    def time_of(self, tick: int) -> datetime:
        """The event time of a tick, UTC; its orders were placed in the 30 seconds before."""
        return datetime.fromisoformat(self.origin) + timedelta(seconds=TICK_S * tick)

    @property
    def orders_a_slice(self) -> int:
        """As the generator counts: the last slice has what the division leaves, too."""
        return int(1_500_000 * self.scale) // self.slices

    @property
    def highest_key(self) -> int:
        """The highest order key of one epoch: of every 32 keys 8 are used (TPC-H 4.2.3)."""
        orders = round(1_500_000 * self.scale)
        return orders // 8 * 32 + orders % 8


def due_ticks(
    root: Root,
    *,
    scale: float,
    slices: int,
    history: int,
    max_ticks: int,
    scheduled_for: str | None,
    tick: int | None = None,
) -> tuple[Stream, range]:
    """The stream under `root` and the ticks that are due at `scheduled_for` (ISO 8601, UTC) and not given out yet.

    A new stream starts `history` ticks before `scheduled_for`, and its first run brings all of them. Later runs catch
    up at most `max_ticks` at a time. Without `scheduled_for` exactly the next tick is due, whatever the time. With
    `tick` that one is made again.
    Raises ValueError when the stream under `root` was begun with another scale or number of slices.
    """
    if not root.exists(DESCRIPTION):
        now = datetime.fromisoformat(scheduled_for) if scheduled_for else datetime.now(UTC)
        seconds = int(now.timestamp()) // TICK_S * TICK_S - history * TICK_S
        stream = Stream(scale, slices, datetime.fromtimestamp(seconds, UTC).isoformat())
        return stream, range(history + 1)
    stream = Stream.of(root)
    if (stream.scale, stream.slices) != (scale, slices):
        raise ValueError(
            f"the stream under {root.url} has scale {stream.scale} in {stream.slices} slices, not {scale} in {slices};"
            " a stream keeps its scale: use another root, or remove this one"
        )
    if tick is not None:
        return stream, range(tick, tick + 1)
    if scheduled_for is None:
        return stream, range(stream.next_tick, stream.next_tick + 1)
    elapsed_s = (datetime.fromisoformat(scheduled_for) - stream.time_of(0)).total_seconds()
    due = int(elapsed_s // TICK_S)
    return stream, range(stream.next_tick, min(due + 1, stream.next_tick + max_ticks))


def given(root: Root) -> dict[str, dict]:
    """What a run of the source starts from, for its replay: place -> JSON; nothing before the first tick."""
    try:
        return {DESCRIPTION: json.loads(root.read(DESCRIPTION))}
    except FileNotFoundError:
        return {}


def make_tick(stream: Stream, tick: int) -> dict[str, pl.DataFrame]:
    """The rows of one tick: table -> frame with the columns of `pipeline.tables`. A pure function of its arguments."""
    return make_ticks(stream, range(tick, tick + 1))[tick]


def make_ticks(stream: Stream, ticks: range) -> dict[int, dict[str, pl.DataFrame]]:
    """Several ticks: tick -> table -> frame, each what `make_tick` gives."""
    made = _streamed(stream, ticks)
    if 0 in made:
        made[0] = {table: pl.concat(frames) for table, frames in _others(stream)} | made[0]
    return made


def _streamed(stream: Stream, ticks: range) -> dict[int, dict[str, pl.DataFrame]]:
    """The tables that grow: tick -> table -> frame."""
    slices = _slices(stream, {tick % stream.slices + 1 for tick in ticks})
    return {tick: _timed(stream, tick, slices[tick % stream.slices + 1]) for tick in ticks}


def _others(stream: Stream) -> Iterator[tuple[str, Iterable[pl.DataFrame]]]:
    """The tables that do not grow, and the frames of each, in turn: a large one is made part by part."""
    parts = {table: math.ceil(rows * stream.scale / PART_ROWS) for table, rows in ROWS.items()}
    small = _tpchgen(stream.scale, tuple(table for table, count in parts.items() if count <= 1))[1]
    for table, count in parts.items():
        yield table, [_columns(table, small[table])] if table in small else _part_by_part(stream, table, count)


def _part_by_part(stream: Stream, table: str, count: int) -> Iterator[pl.DataFrame]:
    for part in range(1, count + 1):
        yield _columns(table, _tpchgen(stream.scale, (table,), count, {part})[part][table])


def _columns(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(*TABLES[table].columns)


def _timed(stream: Stream, tick: int, frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """A slice's orders and line items as those of a tick: with its event times, and the keys of its epoch."""
    shift = tick // stream.slices * stream.highest_key
    placed = pl.lit(stream.time_of(tick - 1)).dt.cast_time_unit("us")
    orders = frames["orders"].with_columns(
        (pl.col("o_orderkey") + shift),
        # 7919 is a prime that shares no factor with 30000: neighbouring keys spread over the 30 seconds
        (placed + pl.duration(milliseconds=pl.col("o_orderkey") * 7919 % (TICK_S * 1000))).alias("o_order_time"),
    )
    lineitem = frames["lineitem"].with_columns(pl.col("l_orderkey") + shift)
    lineitem = lineitem.join(
        orders.select("o_orderkey", "o_orderdate", "o_order_time"),
        left_on="l_orderkey",
        right_on="o_orderkey",
        how="left",
        maintain_order="left",
    ).with_columns(
        (
            pl.col("o_order_time") + (pl.col("l_shipdate") - pl.col("o_orderdate")).dt.total_days() * pl.lit(SHIP_STEP)
        ).alias("l_ship_time")
    )
    return {"orders": _columns("orders", orders), "lineitem": _columns("lineitem", lineitem)}


def file_name(table: str, tick: int, piece: int = 0) -> str:
    """The path of one table's rows of one tick, under the root; more than one file holds are in several pieces."""
    return f"landing/{table}/{table}-{tick:08d}{f'-{piece:04d}' if piece else ''}.json"


@dataclass(frozen=True)
class GivenOut:
    """What a run brought. `files`: one row a file, as from `land`. The others: what kept a tick from being written."""

    files: pl.DataFrame
    orphans: int
    repeated_keys: int


def give_out(root: Root, stream: Stream, ticks: range) -> GivenOut:
    """Make the ticks, a few at a time, check them, write their files and move the stream on.

    Ends before the first of them in which a line item is without its order, or an order key comes twice.
    """
    at_once = max(1, GROUP_ORDERS // max(1, stream.orders_a_slice))
    files = [pl.DataFrame(schema=FILES, orient="row")]
    for start in range(ticks.start, ticks.stop, at_once):
        group = ticks[start - ticks.start :][:at_once]
        made = _streamed(stream, group)
        if orphans(made) or repeated_keys(made):
            return GivenOut(pl.concat(files), orphans(made), repeated_keys(made))
        files.append(land(root, stream, made, _others(stream) if 0 in group else ()))
    return GivenOut(pl.concat(files), 0, 0)


def land(
    root: Root,
    stream: Stream,
    made: dict[int, dict[str, pl.DataFrame]],
    first: Iterable[tuple[str, Iterable[pl.DataFrame]]] = (),
) -> pl.DataFrame:
    """Write the ticks' files, then move the stream on. Returns one row a file: tick, table, rows, bytes, file.

    `first`: further tables of tick 0, each in frames that are made when their turn comes.
    """
    written = []
    if not root.create(DESCRIPTION, _describe(stream)):  # first, so that a crash cannot lose the origin
        begun = Stream.of(root)
        if begun.origin != stream.origin:
            raise RuntimeError(f"another run began the stream under {root.url} at {begun.origin}; run this one again")
    of_ticks = ((tick, table, [frame]) for tick, frames in made.items() for table, frame in frames.items())
    for tick, table, frames in chain(((0, table, frames) for table, frames in first), of_ticks):
        for piece, frame in enumerate(_pieces(frames, stream.file_rows)):
            data = to_json_lines(frame)
            name = file_name(table, tick, piece)
            root.write(name, data)
            written.append((tick, table, frame.height, len(data), name))
    root.write(DESCRIPTION, _describe(replace(stream, next_tick=max(stream.next_tick, max(made) + 1))))
    return pl.DataFrame(written, schema=FILES, orient="row")


def _pieces(frames: Iterable[pl.DataFrame], rows: int | None) -> Iterator[pl.DataFrame]:
    """The same rows in frames of `rows`, the last with what is left, however they were cut; None: in one."""
    left = pl.DataFrame()
    for frame in frames:
        left = pl.concat([left, frame]) if left.width else frame
        while rows and left.height > rows:
            yield left.head(rows)
            left = left.slice(rows)
    yield left


def _describe(stream: Stream) -> bytes:
    return json.dumps(asdict(stream), indent=1).encode()


def to_json_lines(frame: pl.DataFrame) -> bytes:
    """Newline-delimited JSON: money and dates as strings, so that no reader turns them into floats."""
    buffer = io.BytesIO()
    frame.write_ndjson(buffer)
    return buffer.getvalue()


def _slices(stream: Stream, parts: set[int]) -> dict[int, dict[str, pl.DataFrame]]:
    """The streamed tables of some slices, 1 the first: part -> table -> frame.

    The generator takes about a second for a slice, nearly all of it to begin, and about 1 + 10 x scale seconds for all
    of them at once: the cheaper way is taken, as long as all of them are no more than a gigabyte.
    """
    if stream.scale <= 1 and len(parts) / WORKERS > 1 + 10 * stream.scale:
        return _tpchgen_slices(stream, parts)
    with ThreadPoolExecutor(WORKERS) as pool:
        made = pool.map(lambda part: _tpchgen_slices(stream, {part}), parts)
        return {part: frames for piece in made for part, frames in piece.items()}


def _tpchgen_slices(stream: Stream, parts: Collection[int]) -> dict[int, dict[str, pl.DataFrame]]:
    """Those slices of the streamed tables, cut at the same orders: where the generator cuts orders by itself."""
    chunks = stream.orders_a_slice * ORDER_BYTES // CHUNK_BYTES + 1
    bytes_a_slice = 4 * int(1_500_000 * stream.scale) // stream.slices * (LINE_ITEMS_BYTES // 4)
    chunk_bytes = max(CHUNK_BYTES, bytes_a_slice // chunks + 1)
    if chunks == 1:  # of orders, too, when a chunk has room for more
        return _tpchgen(stream.scale, STREAMED, stream.slices, parts, chunk_bytes)
    orders = _tpchgen(stream.scale, ("orders",), stream.slices, parts)
    lineitem = _tpchgen(stream.scale, ("lineitem",), stream.slices, parts, chunk_bytes)
    return {part: orders[part] | lineitem[part] for part in parts}


def _tpchgen(
    scale: float,
    tables: tuple[str, ...],
    slices: int = 1,
    parts: Collection[int] = (1,),
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[int, dict[str, pl.DataFrame]]:
    """Those parts of the tables' `slices` at `scale`: part -> table -> frame, from one process of the generator.

    Raises RuntimeError with the generator's own words.
    """
    command = [str(Path(sys.executable).with_name("tpchgen-cli")), "parquet", f"--scale-factor={scale}"]
    command += [f"--tables={','.join(tables)}", f"--row-group-bytes={chunk_bytes}"]
    if slices > 1:
        command.append(f"--parts={slices}")
    if slices > 1 and len(parts) == 1:
        command.append(f"--part={next(iter(parts))}")
    with temporary_folder("tpchgen-") as folder:
        done = subprocess.run([*command, f"--output-dir={folder}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"tpchgen-cli failed with status {done.returncode}: {done.stderr.strip()}")
        file_name = "{0}/{0}.{1}.parquet" if slices > 1 else "{0}.parquet"
        return {
            part: {table: pl.read_parquet(f"{folder}/{file_name.format(table, part)}", glob=False) for table in tables}
            for part in parts
        }


def rows_per_tick(files: pl.DataFrame) -> pl.DataFrame:
    """One row a tick: tick, orders, lineitem (both counts of rows); `files` as from `land`."""
    counts = {table: pl.col("rows").filter(pl.col("table") == table).sum() for table in STREAMED}
    return files.group_by("tick", maintain_order=True).agg(**counts).sort("tick")


def orphans(made: dict[int, dict[str, pl.DataFrame]]) -> int:
    """How many line items have no order in their own tick."""
    return sum(
        frames["lineitem"].join(frames["orders"], left_on="l_orderkey", right_on="o_orderkey", how="anti").height
        for frames in made.values()
    )


def repeated_keys(made: dict[int, dict[str, pl.DataFrame]]) -> int:
    """How many order keys come more than once in these ticks."""
    keys = pl.concat([frames["orders"]["o_orderkey"] for frames in made.values()])
    return keys.len() - keys.n_unique()


def chart(rows: pl.DataFrame):
    """Rows per tick as bars; `rows` as from `rows_per_tick`."""
    from etl.charts import plot

    return plot(rows).bar(
        x="tick", y=["orders", "lineitem"], stacked=True, title="Rows per tick", xlabel="tick", ylabel="rows"
    )
