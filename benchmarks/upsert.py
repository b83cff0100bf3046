"""What it costs readers that only the newest row of a key counts, and whether it is the newest.

So many updates of so many keys come in so many files, in any order, through the real ingest, a batch of files at a
time. What counts then is compared with DuckDB's answer over the same files, before compaction and after it. Readers are
measured against the same rows in a table that only grows, in turn, each with a snapshot of its own: medians of the
pairs' quotients are printed and written to outputs/benchmarks/upsert.json.

    python benchmarks/upsert.py [--keys 10000] [--updates 1000000] [--files 500] [--batch 50] [--rounds 31]
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import duckdb
import polars as pl
from rich.console import Console

from etl import lake as lakes
from etl.lake.table import INT, TEXT, TIME, Table, decimal
from etl.storage import PROJECT, Root

COLUMNS = {"id": INT, "plan": TEXT, "amount": decimal(9, 2), "changed": TIME}
START = datetime(2026, 3, 1, tzinfo=UTC)
LIMITS = {"max_bytes": 10**9, "max_bad_share": 0.0, "for_s": 1e9, "scheduled_for": None, "run_id": "bench"}
COMPACT = {"target_mb": 128, "min_small_files": 2, "vacuum_hours": 24, "run_id": "bench"}


class Lake(lakes.Lake):
    tables: ClassVar = {
        "newest": Table("newest", COLUMNS, key=("id",), mode="upsert", order_by="changed"),
        "grown": Table("grown", COLUMNS, key=("id",)),
    }


def write_files(folder: Path, keys: int, updates: int, files: int) -> list[Path]:
    """The updates, in files of about as many rows; no two are of the same moment, and both are in no order."""
    numbers = pl.int_range(updates, eager=True).alias("n").shuffle(seed=7).to_frame()
    rows = numbers.select(
        id=pl.col("n").hash(seed=3) % keys,
        plan=pl.lit(pl.Series(["free", "pro", "team"])).gather(pl.col("n") % 3),
        amount=pl.format("{}.{}", pl.col("n") % 9973, 10 + pl.col("n") % 90),
        changed=pl.lit(START).dt.offset_by(pl.format("{}s", "n")).dt.to_string("iso:strict"),
    )
    paths = []
    for number in range(files):
        part = rows.slice(number * updates // files, (number + 1) * updates // files - number * updates // files)
        paths.append(folder / f"{number:05d}.json")
        part.write_ndjson(paths[-1])
    return random.Random(5).sample(paths, files)


def answer(folder: Path) -> list[tuple]:
    """DuckDB's, of the same files."""
    return duckdb.sql(f"""
        SET TimeZone = 'UTC';
        SELECT id, arg_max(plan, changed), arg_max(amount::DECIMAL(9, 2), changed), max(changed)
        FROM read_json('{folder}/*.json', format = 'newline_delimited',
                       columns = {{id: 'BIGINT', plan: 'VARCHAR', amount: 'VARCHAR', changed: 'TIMESTAMPTZ'}})
        GROUP BY id ORDER BY id""").fetchall()


def require_same(lake: Lake, wanted: list[tuple]) -> None:
    rows = lake.snapshot().frame("newest").collect().sort("id").rows()
    assert [tuple(map(str, row)) for row in rows] == [tuple(map(str, row)) for row in wanted], "another answer"


def read(lake: Lake, table: str) -> pl.DataFrame:
    """As a question does: a snapshot of its own, all rows looked at."""
    rows = lake.snapshot().frame(table)
    return rows.group_by("plan").agg(pl.len(), pl.sum("amount"), pl.max("changed")).sort("plan").collect()


def quotients(lake: Lake, rounds: int, ask: Callable[[Lake, str], object]) -> dict[str, list[float]]:
    """Seconds of both tables, in turn."""
    seconds: dict[str, list[float]] = {"newest": [], "grown": []}
    for number in range(rounds + 3):
        for table in sorted(seconds, reverse=bool(number % 2)):
            began = time.perf_counter()
            ask(lake, table)
            seconds[table].append(time.perf_counter() - began)
    return {table: every[3:] for table, every in seconds.items()}


def said(of: dict[str, list[float]]) -> str:
    medians = {table: statistics.median(every) * 1000 for table, every in of.items()}
    times = statistics.median(a / b for a, b in zip(of["newest"], of["grown"], strict=True))
    return f"{medians['newest']:.1f} ms, {medians['grown']:.1f} ms where it only grows: {times:.2f} times"


def main(keys: int, updates: int, files: int, batch: int, rounds: int) -> None:
    console, result = Console(), {"load": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        lake, paths = Lake(Path(temporary, "root")), write_files(folder, keys, updates, files)
        wanted, began = answer(folder), time.perf_counter()
        for first in range(0, files, batch):
            for path in paths[first : first + batch]:
                lake.root.write(f"landing/newest/{path.name}", path.read_bytes())
            lake.drain(**LIMITS, max_files=batch)
        result["ingest_s"] = time.perf_counter() - began
        console.print(f"{updates:,} updates of {keys:,} keys in {files} files: {result['ingest_s']:.1f} s to ingest")
        require_same(lake, wanted)
        lines = lake.snapshot().frame("newest").collect().write_ndjson().splitlines(keepends=True)
        batches = len(range(0, files, batch))  # as long a history
        for number in range(batches):
            lake.root.write(f"landing/grown/{number}.json", "".join(lines[number::batches]).encode())
            lake.drain(**LIMITS, max_files=batch)
        assert read(lake, "newest").equals(read(lake, "grown"))
        result["before"] = quotients(lake, rounds, read)
        console.print(
            f"a reader before compact, {len(lake.snapshot().files('newest'))} files: {said(result['before'])}"
        )
        began = time.perf_counter()
        failed = lake.compact(**COMPACT)["failed"].drop_nulls()
        assert failed.is_empty(), failed
        result["compact_s"] = time.perf_counter() - began
        require_same(lake, wanted)
        assert read(lake, "newest").equals(read(lake, "grown"))
        result["after"] = quotients(lake, rounds, read)
        console.print(f"a reader after compact ({result['compact_s']:.1f} s): {said(result['after'])}")
    console.print(f"equal to DuckDB's answer, before and after; load {result['load'][0]:.1f}")
    Root.at(PROJECT / "outputs").write("benchmarks/upsert.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=31)
    asked = parser.parse_args()
    main(asked.keys, asked.updates, asked.files, asked.batch, asked.rounds)
