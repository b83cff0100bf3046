"""How fast JSON becomes tables: this project, pandas with write_deltalake, and the limit that Polars sets.

The same files of TPC-H orders and line items, scale 0.1, are ingested by each, in a process of its own, round after
round (pandas in the first SLOW_ROUNDS of them only); imports are not counted, the files are in the page cache. Three
shapes: 288 ticks of 1 MB, as they wait after `preprocess` was away for 2.4 hours of the default schedule, the same in
gzip, and 4 ticks of 73 MB.

- `ours`: as preprocess runs it, with every promise kept (checked rows, manifest, exactly once, synced, archived);
- `pandas`: `pandas.read_json` and `write_deltalake` of one file after the other, as the pipeline coiled/etl-tpch does
  it (without its task runner). Types are what pandas guesses: amounts are floats, days stay texts, nothing is checked;
- `pandas, typed`: the same, made the types that the tables have (decimals, dates, times) before it is written;
- `limit, as text`: Polars reads all files at once and writes one bare Parquet file a table, and no promise is kept;
  amounts, days and times stay the texts they are in JSON;
- `limit, typed`: the same, made the types that the tables have;
- `inflating alone`, of files in gzip: Python's gzip in a thread a core, and nothing is done with what comes of it. That
  and `limit, typed` of the same files as they are is the limit of files in gzip.

Then what one tick costs on a lake of 10,000 versions, beside one on a fresh lake. Medians are printed and written to
outputs/benchmarks/ingest.json.

    python benchmarks/ingest.py [--rounds 9] [--versions 10000]        # 0: leave that part out
"""

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from etl.storage import PROJECT, Root
from pipeline import Lake

AT = "2026-03-01T12:00:10+00:00"
SCALE = 0.1  # of the files that are ingested: 150,000 orders, 600,000 line items, 290 MB
SHAPES = {"288 ticks of 1 MB": 288, "288 ticks of 1 MB in gzip": 288, "4 ticks of 73 MB": 4}
SLOW_ROUNDS = 3  # of the ways that take half a minute
ZIPPED = "in gzip"  # ends the name of such a shape
LIMITS = {"max_files": 500, "max_bytes": 256_000_000, "max_bad_share": 0.0, "for_s": 1e9, "scheduled_for": AT}
AGE_S = 60  # between two versions of the old lake, as on schedule
TICKS = 15  # measured on each lake, in turn


def ours(root: str) -> None:
    Lake(root).drain(**LIMITS, run_id="bench")


def with_pandas(root: str) -> None:
    import pandas
    from deltalake import write_deltalake

    for path in sorted(Path(root, "landing").glob("*/*.json")):
        write_deltalake(f"{root}/lake/{path.parent.name}", pandas.read_json(path, lines=True), mode="append")


def with_pandas_typed(root: str) -> None:
    import pandas
    import polars as pl
    import pyarrow as pa
    from deltalake import write_deltalake

    from pipeline.tables import TABLES

    for path in sorted(Path(root, "landing").glob("*/*.json")):
        schema = pl.DataFrame(schema=TABLES[path.parent.name].types).to_arrow().schema
        frame = pandas.read_json(path, lines=True, dtype=False, convert_dates=False)
        for field in schema:
            if pa.types.is_timestamp(field.type):
                frame[field.name] = pandas.to_datetime(frame[field.name], format="ISO8601")
        text = pa.Table.from_pandas(frame, preserve_index=False)
        write_deltalake(f"{root}/lake/{path.parent.name}", text.select(schema.names).cast(schema), mode="append")


def limit_as_text(root: str) -> None:
    import polars as pl

    from etl.lake.parse import BOUNDS
    from pipeline.tables import STREAMED, TABLES

    for table in STREAMED:
        columns = TABLES[table].types
        schema = {name: dtype if dtype in BOUNDS else pl.String for name, dtype in columns.items()}
        pl.scan_ndjson(f"{root}/landing/{table}/*.json", schema=schema).collect().write_parquet(
            f"{root}/{table}.parquet"
        )


def limit_typed(root: str) -> None:
    import polars as pl

    from etl.lake.parse import BOUNDS
    from pipeline.tables import DAY, STREAMED, TABLES, TIME

    for table in STREAMED:
        columns = TABLES[table].types
        schema = {name: dtype if dtype in BOUNDS else pl.String for name, dtype in columns.items()}
        typed = {
            name: pl.col(name).str.to_date()
            if dtype == DAY
            else pl.col(name).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z")
            if dtype == TIME
            else pl.col(name).cast(dtype)
            for name, dtype in columns.items()
        }
        frame = pl.scan_ndjson(f"{root}/landing/{table}/*.json", schema=schema).with_columns(**typed).collect()
        frame.write_parquet(f"{root}/{table}.parquet")


def inflating(root: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda path: gzip.decompress(path.read_bytes()), Path(root, "landing").glob("*/*.gz")):
            pass


WAYS = {
    "pandas": with_pandas,
    "pandas, typed": with_pandas_typed,
    "limit, as text": limit_as_text,
    "limit, typed": limit_typed,
    "ours": ours,
    "inflating alone": inflating,
}


def in_this_process(way: str, root: str) -> None:
    """One way, once, on the files in `root`; prints seconds (imports not counted) and the peak of resident MB."""
    import deltalake  # noqa: F401
    import pandas  # noqa: F401
    import polars
    import pyarrow.parquet  # noqa: F401

    polars.DataFrame({"a": [1]}).lazy().filter(polars.col("a") > 0).collect()  # its threads are up
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    began = time.perf_counter()
    WAYS[way](root)
    seconds = time.perf_counter() - began
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"seconds": seconds, "mb": peak_kb / 1024}))


def throughput(folder: Path, rounds: int) -> dict:
    found = {}
    for shape, slices in SHAPES.items():
        files = folder / "files"
        size, rows = _land(str(files), slices)
        zipped = shape.endswith(ZIPPED)
        if zipped:
            _zip(files)
        ways = ("ours", "inflating alone") if zipped else [way for way in WAYS if way != "inflating alone"]
        taken: dict[str, list[dict]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways:
                if number >= SLOW_ROUNDS and way.startswith("pandas"):
                    continue
                root = folder / "root"
                shutil.copytree(files, root)
                os.sync()  # what the copy left to be written is not this one's to pay
                command = [sys.executable, __file__, "--way", way, "--root", str(root)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
                taken[way].append(json.loads(done.stdout))
                shutil.rmtree(root)
        shutil.rmtree(files)
        found[shape] = {"mb": size / 1e6, "rows": rows, "taken": taken}
    return found


def _land(root: str, slices: int) -> tuple[int, int]:
    from pipeline import source

    stream = source.Stream(SCALE, slices, "2026-03-01T11:00:00+00:00", file_rows=None)  # one file a table and tick
    ticks = range(1, slices + 1)  # without tick 0, which brings the small tables
    written = source.land(Root.at(root), stream, source.make_ticks(stream, ticks))
    return int(written["bytes"].sum()), int(written["rows"].sum())


def _zip(root: Path) -> None:
    for path in Path(root, "landing").glob("*/*.json"):
        path.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes(), 6))
        path.unlink()


def aged(root: str, versions: int) -> None:
    """A lake whose streamed tables have that many versions, each a minute older than the next, and compacted."""
    import polars as pl

    from etl.lake import commit, ledger
    from etl.lake.snapshot import read_pointer, swap_pointer
    from pipeline.tables import RESCUED

    rescued = pl.lit(None, pl.String).alias(RESCUED)
    lake = Lake(root)
    place = lake.root
    made = {table: commit.encode(lake, table, f.head(2).with_columns(rescued))[0] for table, f in _ticks(1)[0].items()}
    commit.create_tables(lake, "bench")
    pointer = read_pointer(place) or {"batch": 0, "tables": dict.fromkeys(lake.columns, 0)}
    handles = {table: lake.table(table) for table in made}
    for table in made:
        _date_back(place, table, 0, versions * AGE_S)
    for number in range(pointer["batch"] + 1, versions + 1):
        for table, handle in handles.items():
            _append(place, table, handle, made[table], number)
            _date_back(place, table, handle.version(), (versions - number) * AGE_S)
        if number % 30 == 0 or number == versions:
            known = {"index": None, "recent": {}}
            manifest = {"batch": number, "files": [], "date": AT[:10], "known": known}
            place.write(ledger.manifest(number), json.dumps(manifest).encode())
            place.write(ledger.done(number), b"")
            pointer["tables"] |= {table: handle.version() for table, handle in handles.items()}
            swap_pointer(place, read_pointer(place), batch=number, as_of=AT, versions=pointer["tables"], run_id="bench")
            lake.compact(target_mb=128, min_small_files=8, vacuum_hours=24, run_id="bench")
            pointer = read_pointer(place)
            for table in made:
                handles[table] = lake.table(table)
                _date_back(place, table, handles[table].version(), (versions - number) * AGE_S)
                handles[table].cleanup_metadata()  # compact does so too, once it has known the clock for a day


def _append(place: Root, table: str, handle, rows, number: int) -> None:
    """As commit.append, without opening the table anew, and without syncing."""
    from deltalake import CommitProperties, Transaction
    from deltalake.transaction import AddAction

    from etl.lake.commit import APP_ID

    path = f"batch-{number:08d}.zstd.parquet"
    Path(place.url_of(f"lake/{table}/{path}")).write_bytes(rows.data)
    added = AddAction(path, len(rows.data), {}, time.time_ns() // 1_000_000, True, rows.stats)
    properties = CommitProperties(app_transactions=[Transaction(APP_ID, number)])
    handle.create_write_transaction([added], "append", handle.schema(), commit_properties=properties)
    handle.update_incremental()


def _date_back(place: Root, table: str, version: int, age_s: float) -> None:
    """A commit, and a checkpoint made with it, as old as on schedule: by that delta-rs cleans up the log."""
    then = time.time() - age_s
    for path in Path(place.url_of(f"lake/{table}/_delta_log")).glob(f"{version:020d}.*"):
        os.utime(path, (then, then))


def _ticks(count: int) -> list[dict]:
    from pipeline import source

    stream = source.Stream(0.1, 288, "2026-03-01T11:00:00+00:00")
    made = source.make_ticks(stream, range(1, count + 1))
    return [made[tick] for tick in sorted(made)]


def ticks(folder: Path, versions: int) -> dict:
    """Seconds of each of some ticks on an old lake and on a fresh one, one after the other."""
    from pipeline import source

    stream = source.Stream(0.1, 288, "2026-03-01T11:00:00+00:00")
    roots = {"old": str(folder / "old"), "fresh": str(folder / "fresh")}
    began = time.perf_counter()
    aged(roots["old"], versions)
    aged(roots["fresh"], 1)
    print(f"{versions} versions made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    taken: dict[str, list[float]] = {name: [] for name in roots}
    for number, made in enumerate(_ticks(TICKS + 2)):
        for name, root in roots.items():
            source.land(Root.at(root), stream, {versions + number: made})
            began = time.perf_counter()
            ours(root)
            taken[name].append(time.perf_counter() - began)
    log = len(list(Path(roots["old"], "lake/orders/_delta_log").iterdir()))
    return {"versions": versions, "log_files": log, "seconds": {name: every[2:] for name, every in taken.items()}}


def main(rounds: int, versions: int) -> None:
    folder, console = Path(tempfile.mkdtemp(prefix="bench-")), Console()
    result: dict = {"load": os.getloadavg()}
    if rounds:
        result["throughput"] = throughput(folder, rounds)
        for shape, found in result["throughput"].items():
            console.print(_shown(shape, found))
        told = {shape: _medians(found) for shape, found in result["throughput"].items()}
        for shape in [shape for shape in told if shape.endswith(ZIPPED)]:
            limit = told[shape]["inflating alone"] + told[shape.removesuffix(f" {ZIPPED}")]["limit, typed"]
            console.print(f"{shape}: {limit / told[shape]['ours']:.2f} of inflating alone and the typed limit")
    if versions:
        result["ticks"] = ticks(folder, versions)
        every = result["ticks"]["seconds"]
        old, fresh = (statistics.median(every[name]) for name in ("old", "fresh"))
        console.print(
            f"a tick: {old * 1000:.0f} ms on {versions:,} versions ({result['ticks']['log_files']} files in the log), "
            f"{fresh * 1000:.0f} ms on a fresh lake: {old / fresh:.2f} times"
        )
    console.print(f"load {result['load'][0]:.1f}")
    Root.at(PROJECT / "outputs").write("benchmarks/ingest.json", json.dumps(result, indent=1).encode())
    shutil.rmtree(folder)


def _medians(found: dict) -> dict[str, float]:
    return {way: statistics.median(one["seconds"] for one in every) for way, every in found["taken"].items()}


def _shown(shape: str, found: dict) -> Table:
    medians = _medians(found)
    rounds = len(found["taken"]["ours"])
    table = Table("way", "seconds", "MB/s", "rows/s", "memory MB", "ours is", title=f"{shape}, {rounds} rounds")
    for way, median in medians.items():
        memory = max(one["mb"] for one in found["taken"][way])
        speed = f"{found['mb'] / median:.0f}", f"{found['rows'] / median:,.0f}"
        table.add_row(way, f"{median:.2f}", *speed, f"{memory:,.0f}", f"{median / medians['ours']:.2f} times as fast")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        in_this_process(asked.way, asked.root)
    else:
        main(asked.rounds, asked.versions)
