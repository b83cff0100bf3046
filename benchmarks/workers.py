"""Data that one process does not hold: what two of Dask's workers make of it, beside one process; is it the same?

- *ingest*: the same JSON of the stream, as one batch;
- *train*: the same line items, in a file a tick as `preprocess` leaves them;
- *compact*: those files.

The rows of a table are the same where DuckDB counts as many of them and adds up their hashes to the same number, before
and after; models are, where their trees are as many and their losses on held-out rows are equal to nine digits. Each
way has processes of its own, and a cluster for it alone. Memory is resident memory at its peak, of the process that
asks and of the larger worker. Printed and written to outputs/benchmarks/workers.json.

    python benchmarks/workers.py [--mb 500] [--scale 1]     # 2,000 MB, and 60 million line items: --mb 2000 --scale 10
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import measure
import training

from etl.storage import Root
from pipeline import Lake, source

WAYS = ("here", "workers")
WORKERS = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
MB_OF_SCALE = 3200  # of JSON, at TPC-H's scale 1
LARGE = {"max_files": 500, "max_bytes": 1 << 40, "max_bad_share": 0.0, "for_s": 1e9, "scheduled_for": training.AT}
COMPACTED = {"target_mb": 128, "min_small_files": 2, "vacuum_hours": 24, "run_id": "bench"}


def ingest(root: str, dask: Any) -> dict[str, Any]:
    done = Lake(root).drain(**LARGE, run_id="bench", dask=dask)
    return {"mb": done["mb"].sum(), "batches": done.height, "rows": done["rows"].sum()}


def compact(root: str, dask: Any) -> dict[str, Any]:
    done = Lake(root).compact(**COMPACTED, dask=dask)
    assert done["failed"].null_count() == done.height, done["failed"]
    (of,) = done.filter(table="lineitem").to_dicts()
    return {name: of[name] for name in ("files_before", "files_after", "rows_after", "mb_after")}


def train(root: str, dask: Any) -> dict[str, Any]:
    from pipeline import model

    snapshot = Lake(root).snapshot()
    parts = model.split(snapshot, dask=dask.scheduler.address if dask else None)
    read_s = time.monotonic()
    booster = model.fit(parts)
    fit_s = time.monotonic() - read_s
    judged = model.judge(booster, parts.held_out)
    above = judged["log_loss"] / judged["best_log_loss"] - 1
    return {"fit_s": fit_s, "trees": judged["trees"], "log_loss": judged["log_loss"], "above_best": above}


WORK: dict[str, Callable[[str, Any], dict[str, Any]]] = {"ingest": ingest, "train": train, "compact": compact}


def in_this_process(work: str, root: str, by_workers: bool) -> None:
    import deltalake  # noqa: F401
    import distributed
    import polars  # noqa: F401
    import xgboost.dask  # noqa: F401

    if not by_workers:
        print(json.dumps(_timed(work, root, None)))
        return
    with distributed.LocalCluster(**WORKERS) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        client.run(_from_here)
        told = _timed(work, root, client)
        print(json.dumps(told | {"worker_mb": max(client.run(_peak_mb).values())}))


def _timed(work: str, root: str, client: Any) -> dict[str, Any]:
    from_mb = _from_here()
    began = time.monotonic()
    told = WORK[work](root, client)
    return told | {"seconds": time.monotonic() - began, "from_mb": from_mb, "peak_mb": _peak_mb()}


def _from_here() -> float:
    """The peak begins here; MB that are resident already."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def asked(work: str, root: Path, by_workers: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", work, "--root", str(root), *["--by-workers"] * by_workers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{work}, by workers: {by_workers}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(root: Path) -> dict[str, tuple[int, int]]:
    """Of each table: how many rows, and the sum of their hashes, by DuckDB."""
    snapshot, found = Lake(str(root)).snapshot(), {}
    for table in Lake.tables:
        told = duckdb.sql(f"select count(*), sum(hash(t)::hugeint) from read_parquet({snapshot.files(table)}) t")
        found[table] = told.fetchone()
    assert snapshot.row_count("quarantine") == 0, "lines were refused"
    return found


def land(root: Path, mb: float) -> None:
    """About so many megabytes of JSON, in four ticks."""
    stream = source.Stream(mb / MB_OF_SCALE, 4, "2026-03-01T11:00:00+00:00")
    for tick in range(stream.slices):
        source.land(Root.at(root), stream, source.make_ticks(stream, range(tick, tick + 1)))


def both(work: str, folder: Path) -> dict[str, dict[str, Any]]:
    return {way: asked(work, folder / way, way == "workers") for way in WAYS}


def main(mb: float, scale: float) -> None:
    began, found = measure.machine(), {}
    with measure.own_state() as folder:
        land(folder / "ingest/here", mb)
        shutil.copytree(folder / "ingest/here", folder / "ingest/workers", copy_function=shutil.copy)
        found["ingest"] = both("ingest", folder / "ingest")
        here, there = (rows_of(folder / "ingest" / way) for way in WAYS)
        assert here == there, (here, there)
        shutil.rmtree(folder / "ingest")
        rows = training.fill(str(folder / "large/here"), scale)
        shutil.copytree(folder / "large/here", folder / "large/workers", ignore=shutil.ignore_patterns("archive"))
        before = rows_of(folder / "large/here")
        found["train"] = both("train", folder / "large")
        found["compact"] = both("compact", folder / "large")
        for way in WAYS:
            after = rows_of(folder / "large" / way)
            assert after == before, (way, before, after)
    models = [(told["trees"], f"{told['log_loss']:.9g}") for told in found["train"].values()]
    here = found["train"]["here"]
    here["bytes_a_row"] = (here["peak_mb"] - here["from_mb"]) * 1e6 / rows
    lines = [
        [
            f"{work}, {'two workers' if way == 'workers' else 'one process'}",
            f"{told['seconds']:.1f}",
            f"{told['peak_mb']:,.0f}",
            f"{told['worker_mb']:,.0f}" if "worker_mb" in told else "",
        ]
        for work, ways in found.items()
        for way, told in ways.items()
    ]
    title = f"{found['ingest']['here']['mb']:,.0f} MB ingested; {rows:,} line items trained on and compacted"
    columns = ["", "seconds", "peak, MB", "of a worker, MB"]
    measure.publish("workers", title, columns, lines, {"rows": rows, "found": found, "models": models}, began)
    print("the rows are the same before and after, in both ways")
    print(f"trees and log loss: {', '.join(f'{trees} and {loss}' for trees, loss in models)}")
    print(
        f"one process: {here['bytes_a_row']:.0f} bytes a row, log loss {here['above_best']:.4%} above the best possible"
    )
    assert models[0] == models[1], models


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=500)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--by-workers", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        in_this_process(given.work, given.root, given.by_workers)
    else:
        main(given.mb, given.scale)
