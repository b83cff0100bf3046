"""What compaction holds in memory: at its peak, beside its target, in a process of its own.

Two tables of synthetic rows in files of half the target less a little: one that grows, and one of which the newest row
of a key counts. Each is compacted alone. Printed and written to outputs/benchmarks/compaction.json.

    python benchmarks/compaction.py [--target-mb 128] [--total-mb 1500]
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from datetime import UTC, datetime
from typing import ClassVar

import polars as pl
from rich.console import Console

from etl import lake as lakes
from etl.lake import commit, snapshot
from etl.lake.table import BATCH, INT, RESCUED, TEXT, TIME, Table, decimal
from etl.storage import PROJECT, Root

COLUMNS = {"id": INT, "kind": TEXT, "amount": decimal(15, 2), "comment": TEXT, "at": TIME}
START = datetime(2026, 3, 1, tzinfo=UTC)
ROW_BYTES = 33  # in a file, about
KINDS = ["click", "view", "purchase of something", "refund"]


class Lake(lakes.Lake):
    tables: ClassVar = {
        "grows": Table("grows", COLUMNS, key=("id",), time="at"),
        "newest": Table("newest", COLUMNS, key=("id",), mode="upsert", order_by="at"),
    }


def rows_of(table: str, number: int, count: int, keys: int) -> pl.DataFrame:
    """A batch's rows as they are stored: in any order of the keys, of which a table with updates has so many."""
    hashed = pl.int_range(number * count, (number + 1) * count, eager=True).alias("n").to_frame().with_row_index("i")
    random = pl.col("n").hash(seed=7)
    frame = hashed.select(
        id=(random % keys).cast(INT),
        kind=pl.lit(pl.Series(KINDS)).gather(random % len(KINDS)),
        amount=((random % 10_000_019) / 100).cast(decimal(15, 2)),
        comment=pl.format("{} of {}", pl.col("n").hash(seed=1) % 10**12, pl.col("n").hash(seed=2) % 1000),
        at=pl.lit(START).dt.offset_by(pl.format("{}s", random % 10**7)),
    )
    if Lake.tables[table].upserts:
        frame = frame.unique("id", keep="last")
    stored = frame.with_columns(pl.lit(None, TEXT).alias(RESCUED), pl.lit(number + 1, INT).alias(BATCH))
    return stored.select(list(Lake.tables[table].stored)).cast(dict(Lake.tables[table].stored))


def make(root: str, table: str, target_mb: int, total_mb: int) -> None:
    lake = Lake(root)
    count = int(target_mb * 1e6 * 0.45 / ROW_BYTES)
    files = max(2, round(total_mb / target_mb / 0.45))
    commit.create_tables(lake, "bench")
    versions = dict.fromkeys(lake.columns, 0)
    for number in range(files):
        encoded = commit.encode(lake, table, rows_of(table, number, count, count * files))
        about = {"batch": number + 1, "run_id": "bench", "after": versions[table]}
        versions[table] = commit.append(lake, table, encoded, **about)
    snapshot.swap_pointer(lake.root, None, batch=files, as_of=START.isoformat(), versions=versions, run_id="bench")


def compact(root: str, table: str, target_mb: int) -> dict[str, float]:
    """Peak MB of this process, and what it did."""
    lake, began = Lake(root), time.perf_counter()
    asked = {"target_mb": target_mb, "min_small_files": 2, "vacuum_hours": 24, "run_id": "bench"}
    (done,) = lake.compact(**asked).filter(table=table).to_dicts()
    assert done["failed"] is None, done
    numbers = {name: done[name] for name in ("rows_before", "rows_after", "files_before", "files_after", "mb_before")}
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"peak_mb": peak_mb, "seconds": time.perf_counter() - began, **numbers}


def alone(function, *arguments):
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(target_mb: int, total_mb: int) -> None:
    console, result = Console(), {"load": os.getloadavg(), "target_mb": target_mb, "tables": {}}
    for table in Lake.tables:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            alone(make, folder, table, target_mb, total_mb)
            done = result["tables"][table] = alone(compact, folder, table, target_mb)
        console.print(
            f"{table}: {done['mb_before']:,.0f} MB in {done['files_before']} files became {done['files_after']}, "
            f"{done['rows_before']:,} rows {done['rows_after']:,}; peak {done['peak_mb']:,.0f} MB, "
            f"{done['peak_mb'] / target_mb:.1f} times the target, {done['seconds']:.1f} s"
        )
    console.print(f"load {result['load'][0]:.1f}")
    Root.at(PROJECT / "outputs").write("benchmarks/compaction.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--target-mb", type=int, default=128)
    parser.add_argument("--total-mb", type=int, default=1500)
    asked = parser.parse_args()
    main(asked.target_mb, asked.total_mb)
