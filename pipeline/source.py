"""The source: canonical TPC-H, cut into slices and given out over time.

Tick k of a stream brings slice k of N, as `tpchgen-cli --parts=N --part=k+1` makes it, so after N ticks the tables are
TPC-H at that scale, row by row. Past N the stream goes on: epoch e repeats the slices with order keys moved up by
e times the highest key. The first tick also brings the six small tables.

What a tick holds depends on the stream's description (`landing/stream.json`) and on its number alone: made twice, it
is the same bytes under the same names.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from etl.storage import Root
from pipeline.tables import STREAMED, TABLES

TICK_S = 30  # seconds of event time between two ticks
SHIP_STEP = timedelta(minutes=36)  # one day between order and shipping takes this long in the live stream
DESCRIPTION = "landing/stream.json"


@dataclass(frozen=True)
class Stream:
    """One stream. `origin`: the UTC time of tick 0, ISO 8601. `next_tick`: the first tick not given out yet."""

    scale: float
    slices: int
    origin: str
    next_tick: int = 0

    def time_of(self, tick: int) -> datetime:
        """The event time of a tick, UTC; its orders were placed in the 30 seconds before."""
        return datetime.fromisoformat(self.origin) + timedelta(seconds=TICK_S * tick)

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
    stream = Stream(**json.loads(root.read(DESCRIPTION)))
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
    slices = _slices(stream, {tick % stream.slices + 1 for tick in ticks})
    made = {tick: _timed(stream, tick, slices[tick % stream.slices + 1]) for tick in ticks}
    if 0 in made:
        made[0] = _tpchgen(stream.scale, tuple(t for t in TABLES if t not in STREAMED))[1] | made[0]
    return {
        tick: {name: frame.select(*TABLES[name].columns) for name, frame in frames.items()}
        for tick, frames in made.items()
    }


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
    return {"orders": orders, "lineitem": lineitem}


def file_name(table: str, tick: int) -> str:
    """The path of one table's rows of one tick, under the root."""
    return f"landing/{table}/{table}-{tick:08d}.json"


def land(root: Root, stream: Stream, made: dict[int, dict[str, pl.DataFrame]]) -> pl.DataFrame:
    """Write the ticks' files, then move the stream on. Returns one row a file: tick, table, rows, bytes, file."""
    written = []
    if not root.create(DESCRIPTION, _describe(stream)):  # first, so that a crash cannot lose the origin
        begun = Stream(**json.loads(root.read(DESCRIPTION)))
        if begun.origin != stream.origin:
            raise RuntimeError(f"another run began the stream under {root.url} at {begun.origin}; run this one again")
    for tick, frames in made.items():
        for table, frame in frames.items():
            data = to_json_lines(frame)
            name = file_name(table, tick)
            root.write(name, data)
            written.append((tick, table, frame.height, len(data), name))
    root.write(DESCRIPTION, _describe(replace(stream, next_tick=max(stream.next_tick, max(made) + 1))))
    return pl.DataFrame(written, schema=["tick", "table", "rows", "bytes", "file"], orient="row")


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
    of them at once: the cheaper way is taken.
    """
    if len(parts) / os.cpu_count() > 1 + 10 * stream.scale:
        return _tpchgen(stream.scale, STREAMED, stream.slices, parts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda part: _tpchgen(stream.scale, STREAMED, stream.slices, {part}), parts)
        return {part: frames for piece in made for part, frames in piece.items()}


def _tpchgen(
    scale: float, tables: tuple[str, ...], slices: int = 1, parts: Collection[int] = (1,)
) -> dict[int, dict[str, pl.DataFrame]]:
    """Those parts of the tables' `slices` at `scale`: part -> table -> frame, from one process of the generator.

    Raises RuntimeError with the generator's own words.
    """
    command = [str(Path(sys.executable).with_name("tpchgen-cli")), "parquet", f"--scale-factor={scale}"]
    with tempfile.TemporaryDirectory(prefix="tpchgen-") as folder:
        if slices > 1:
            command.append(f"--parts={slices}")
        if slices > 1 and len(parts) == 1:
            command.append(f"--part={next(iter(parts))}")
        done = subprocess.run(
            [*command, f"--tables={','.join(tables)}", f"--output-dir={folder}"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"tpchgen-cli failed with status {done.returncode}: {done.stderr.strip()}")
        file_name = "{0}/{0}.{1}.parquet" if slices > 1 else "{0}.parquet"
        return {
            part: {table: pl.read_parquet(f"{folder}/{file_name.format(table, part)}", glob=False) for table in tables}
            for part in parts
        }


def rows_per_tick(made: dict[int, dict[str, pl.DataFrame]]) -> pl.DataFrame:
    """One row a tick: tick, orders, lineitem (both counts of rows)."""
    rows = [(tick, frames["orders"].height, frames["lineitem"].height) for tick, frames in made.items()]
    return pl.DataFrame(rows, schema=["tick", "orders", "lineitem"], orient="row")


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
