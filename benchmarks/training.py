"""What it takes to train the model: memory, and CPU beside XGBoost alone.

A lake of one epoch of the stream is read and a model trained on it, round after round in processes of their own:

- `ours`: rows piece by piece out of the lake, divided, trained, judged, as `train` does it;
- `bare`: all rows as one frame, one matrix of all those to train on, and XGBoost with the same settings.

Of each the peak of resident memory, the CPU seconds until the rows are XGBoost's and those of training alone; medians
are printed and written to outputs/benchmarks/training.json. Imports are in the memory and not in the seconds.

    python benchmarks/training.py [--scale 1] [--rounds 3]
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from etl.storage import PROJECT, Root
from pipeline import Lake

AT = "2026-03-01T12:00:10+00:00"
LIMITS = {"max_files": 500, "max_bytes": 256_000_000, "max_bad_share": 0.0, "for_s": 1e9, "scheduled_for": AT}


def ours(root: str) -> dict:
    from pipeline import model

    began = time.process_time()
    parts = model.split(Lake(root).snapshot())
    read = time.process_time()
    booster = model.train(parts.training, parts.validation)
    trained = time.process_time()
    judged = model.judge(booster, parts.held_out)
    return _told(booster, read - began, trained - read) | {
        "divergence": judged["divergence"],
        "share_of_entropy": judged["divergence"] / judged["expected_log_loss"],
    }


def bare(root: str) -> dict:
    import xgboost

    from pipeline import model

    began = time.process_time()
    rows = Lake(root).snapshot().frame("lineitem", model.COLUMNS).collect()
    matrix, late = model.SPEC.matrix(rows), model._late(rows).to_numpy()
    percent = model._content(matrix, rows["l_shipdate"]) % 100
    how = {"feature_names": [*model.FEATURES], "nthread": 1}
    seen = xgboost.QuantileDMatrix(matrix[percent >= 30], late[percent >= 30], **how)
    is_validation = (percent >= 20) & (percent < 30)
    validation = xgboost.QuantileDMatrix(matrix[is_validation], late[is_validation], ref=seen, **how)
    read = time.process_time()
    settings = {"objective": "binary:logistic", "eval_metric": "logloss", "learning_rate": 0.2, "max_depth": 3}
    settings |= {"tree_method": "hist", "monotone_constraints": {"days_to_commit": -1}, "nthread": 1}
    watched = {"evals": [(validation, "validation")], "early_stopping_rounds": 20, "verbose_eval": False}
    booster = xgboost.train(settings, seen, num_boost_round=500, **watched)
    return _told(booster[: booster.best_iteration + 1], read - began, time.process_time() - read)


WAYS = {"ours": ours, "bare": bare}


def _told(booster, read_s: float, train_s: float) -> dict:
    return {
        "read_s": read_s,
        "train_s": train_s,
        "trees": booster.num_boosted_rounds(),
        "sha256": hashlib.sha256(bytes(booster.save_raw("json"))).hexdigest(),
    }


def in_this_process(way: str, root: str) -> None:
    import deltalake  # noqa: F401
    import polars  # noqa: F401
    import xgboost  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    told = WAYS[way](root)
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps(told | {"mb": peak_kb / 1024}))


def fill(root: str, scale: float) -> int:
    """One epoch of the stream, in as many ticks as fit in memory; returns the line items."""
    from pipeline import source

    slices = max(2, round(12 * scale))
    stream = source.Stream(scale, slices, "2026-03-01T11:00:00+00:00")
    for tick in range(slices):
        source.land(Root.at(root), stream, source.make_ticks(stream, range(tick, tick + 1)))
        Lake(root).drain(**LIMITS, run_id="bench")
    return Lake(root).snapshot().row_count("lineitem")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        in_this_process(args.way, args.root)
        return
    taken: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        rows = fill(folder, args.scale)
        for _ in range(args.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--root", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
                taken[way].append(json.loads(done.stdout))
    keys = ("mb", "read_s", "train_s", "trees")
    medians = {way: {key: statistics.median(run[key] for run in runs) for key in keys} for way, runs in taken.items()}
    ratio = statistics.median(a["train_s"] / b["train_s"] for a, b in zip(*taken.values(), strict=True))
    table = Table(title=f"{rows:,} line items, load {os.getloadavg()[0]:.1f}")
    for name in ("", "peak MB", "CPU s to read", "CPU s to train", "trees"):
        table.add_column(name, justify="left" if not name else "right")
    for way, told in medians.items():
        table.add_row(way, f"{told['mb']:.0f}", f"{told['read_s']:.1f}", f"{told['train_s']:.1f}", f"{told['trees']:g}")
    first = taken["ours"][0]
    Console().print(table)
    print(f"training alone {ratio:.2f} of XGBoost's CPU; the models of all rounds are one: {len(_hashes(taken)) == 1}")
    print(f"divergence {first['divergence']:.2e}, {first['share_of_entropy']:.4%} of the entropy")
    found = {"rows": rows, "scale": args.scale, "medians": medians, "train_ratio": ratio, "runs": taken}
    path = PROJECT / "outputs/benchmarks/training.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))


def _hashes(taken: dict[str, list[dict]]) -> set[str]:
    return {run["sha256"] for runs in taken.values() for run in runs}


if __name__ == "__main__":
    main()
