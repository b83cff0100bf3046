"""What it costs to know which files were ingested: a tick, and a file that comes again, on long ledgers and short ones.

Two lakes side by side, one file of 100 rows at a time, in turn: their ledgers have no files and `--files` (1,000,000),
in as many batches as twenty files each make. Then a file of the first batch that comes again, with 10 batches and with
10,000 in the ledger, as compaction leaves it. Then how long it takes to look at `--waiting` (10,000) files in landing.
Medians are printed and written to outputs/benchmarks/ledger.json.

    python benchmarks/ledger.py [--files 1000000] [--batches 10000] [--waiting 10000] [--rounds 15]
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import polars as pl
from rich.console import Console

from etl import delta
from etl import lake as lakes
from etl.lake import commit, ledger, snapshot
from etl.lake.compaction import LEDGER_ROW_GROUP
from etl.lake.table import INT, LEDGER, TEXT, Table
from etl.storage import PROJECT, Root

LIMITS = {"max_files": 500, "max_bytes": 10**9, "max_bad_share": 0.0, "for_s": 1e9, "scheduled_for": None}
PER_BATCH = 20


class Lake(lakes.Lake):
    tables: ClassVar = {"event": Table("event", {"id": INT, "what": TEXT}, key=("id",))}


def content(number: int) -> bytes:
    return b"".join(b'{"id": %d, "what": "a row as any other"}\n' % (number * 100 + row) for row in range(100))


def tick(lake: Lake, name: str, number: int) -> float:
    """Seconds to ingest one file."""
    lake.root.write(f"landing/event/{name}", content(number))
    began = time.perf_counter()
    lake.drain(**LIMITS, run_id="bench")
    return time.perf_counter() - began


def lengthen(lake: Lake, files: int, batches: int) -> None:
    """Put so many files more into the ledger, as of so many batches, without their rows."""
    pointer = snapshot.read_pointer(lake.root)
    assert pointer is not None
    last = pointer["batch"] + batches
    numbers = pl.int_range(files, eager=True)
    rows = pl.DataFrame({"batch": pointer["batch"] + 1 + numbers * batches // files, "number": numbers}).select(
        "batch",
        path=pl.format("event/2026/11/26/part-{}.json.gz", "number"),
        table=pl.lit("event"),
        bytes=pl.lit(4000, pl.Int64),
        sha256=pl.col("number").cast(pl.String).map_elements(lambda n: f"{hash(n) & (1 << 64) - 1:064x}", pl.String),
        rows=pl.lit(100, pl.Int64),
        refused=pl.lit(0, pl.Int64),
        at=pl.lit(datetime.now(UTC)),
    )
    before = ledger.known(lake, pointer, ledger.read(lake.root, last))
    known = before.with_files(last, rows.select("path", "table", "sha256").iter_rows(named=True))
    known = known.folded(last)
    buffer, typed = io.BytesIO(), rows.cast(dict(LEDGER))
    typed.write_parquet(buffer, row_group_size=LEDGER_ROW_GROUP)
    made = commit.Encoded(buffer.getvalue(), json.dumps(delta.statistics(typed)))
    version = commit.append(lake, "files", [made], batch=last, run_id="bench", after=pointer["tables"]["files"])
    document = {"batch": last, "run_id": "bench", "date": "2026-11-26", "files": []}
    document["known"] = {"index": known.index, "recent": known.recent}
    lake.root.write(ledger.manifest(last), ledger.written(document))
    lake.root.write(ledger.done(last), b"")
    versions = pointer["tables"] | {"files": version}
    snapshot.swap_pointer(lake.root, pointer, batch=last, as_of=pointer["as_of"], versions=versions, run_id="bench")


def lake_of(folder: Path, name: str, files: int, batches: int) -> Lake:
    lake = Lake(folder / name)
    tick(lake, "first", 0)
    if files:
        lengthen(lake, files, batches)
    return lake


def main(files: int, batches: int, waiting: int, rounds: int) -> None:
    console, result = Console(), {"load": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        lakes_ = {"fresh": lake_of(folder, "fresh", 0, 0), "long": lake_of(folder, "long", files, files // PER_BATCH)}
        taken: dict[str, list[float]] = {name: [] for name in lakes_}
        for number in range(1, rounds + 3):
            for name, lake in lakes_.items():
                taken[name].append(tick(lake, f"{number}.json", number))
        result["ticks"] = {name: every[2:] for name, every in taken.items()}
        fresh, long = (statistics.median(result["ticks"][name]) for name in lakes_)
        console.print(
            f"a tick: {long * 1000:.1f} ms with {files:,} files in the ledger, {fresh * 1000:.1f} ms with none: "
            f"{long / fresh:.2f} times"
        )
        few, many = lake_of(folder, "few", 200, 10), lake_of(folder, "many", batches * PER_BATCH, batches)
        again: dict[str, list[float]] = {"few": [], "many": []}
        for _ in range(rounds + 2):
            again["few"].append(tick(few, "first", 0))
            again["many"].append(tick(many, "first", 0))
        result["again"] = {name: every[2:] for name, every in again.items()}
        few_s, many_s = (statistics.median(every) for every in result["again"].values())
        console.print(
            f"a file of batch 1 again: {many_s * 1000:.1f} ms with {batches:,} batches, {few_s * 1000:.1f} ms with 10: "
            f"{many_s / few_s:.2f} times"
        )
        for number in range(waiting):
            path = folder / f"fresh/landing/event/{number % 100}/{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(number + 10**6))
        looks = []
        for _ in range(rounds):
            began = time.perf_counter()
            batch = lakes_["fresh"].next_batch(max_files=500, scheduled_for=None)
            looks.append(time.perf_counter() - began)
        assert batch is None or len(batch.files) == min(500, waiting)
        result["looks"] = looks
        console.print(f"a look at {waiting:,} files in landing: {statistics.median(looks) * 1000:.0f} ms")
    console.print(f"load {result['load'][0]:.1f}")
    Root.at(PROJECT / "outputs").write("benchmarks/ledger.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    main(asked.files, asked.batches, asked.waiting, asked.rounds)
