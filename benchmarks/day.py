"""A stream of 576 million records a day at its full cadence, by `up`: is every row there once, how fresh, at what cost?

`up` runs all five stages of `params/env/seed.yml` for so many minutes after the first tick, which brings the tables
that do not grow, is in the lake. A stage that had nothing to do until then is run by hand. Then the schedules end,
what still waits is ingested, and the lake is held against the ticks and lines that the generator wrote.

- Freshness is from a row's birth, which is spread over the 30 seconds before its tick, to when its batch is published.
- CPU and memory of a stage are those of its runs' receipts: the kernel and all that it started.
- The share of the machine is that of everything but the runs of generate, which stand for a source outside.

    python benchmarks/day.py [--minutes 60] [--env seed]
"""

import argparse
import json
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import footprint
import measure
import polars as pl

from etl import delta
from etl.runs import index
from etl.storage import PROJECT, Root
from pipeline import Lake
from pipeline.source import TICK_S, Stream

STAGES = ("generate", "preprocess", "compact", "query", "train")
KEYS = {"orders": ["o_orderkey"], "lineitem": ["l_orderkey", "l_linenumber"]}
DRAINED = {"max_files": 500, "max_bytes": 256_000_000, "max_bad_share": 0.01, "for_s": 3600}
POINTS = 30  # births of a tick's rows that are looked at, evenly spread


def main(minutes: float, env: str) -> None:
    began = measure.machine()
    with measure.own_state() as folder:
        root = Root.at(folder / "root")
        ports = [f"--{name}-port={measure.free_port()}" for name in ("prefect", "api", "dashboard")]
        log = folder / "up.log"
        with log.open("wb") as out:
            command = [sys.executable, "orchestrate.py", "up", "--env", env, "--root", root.url, *ports]
            up = subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=out, start_new_session=True)
        try:
            measure.wait_until(lambda: up.poll() is not None or _is_under_way(root), 1800)
            if up.poll() is not None:
                sys.exit(log.read_text())
            first = Stream.of(root).next_tick
            since = datetime.now(UTC)
            used = footprint.measured(up.pid, minutes * 60, root)
            last = Stream.of(root).next_tick
            by_hand = [stage for stage in STAGES[2:] if all(run["state"] == "noop" for run in told(root, stage))]
            for stage in by_hand:
                run(stage, env, root)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(120)
        Lake(root).drain(**DRAINED, scheduled_for=None, run_id="day")
        result = {"minutes": minutes, "ticks": last - first, "by_hand": by_hand, "footprint": used}
        result["generate_cpu_s"] = sum(run["receipt"].get("cpu_s") or 0 for run in told(root, "generate", since))
        result |= {"rows": rows(root), "freshness_s": freshness(root, range(first, last)), "stages": stages(root)}
    publish(result, began)


def _is_under_way(root: Root) -> bool:
    """Whether the first tick is in the lake, and another one after it."""
    snapshot = Lake(root).published()
    try:
        return snapshot is not None and snapshot.batch > 1 and Stream.of(root).next_tick > 1 and not _waits(root, 0)
    except FileNotFoundError:
        return False


def _waits(root: Root, tick: int) -> list[str]:
    return [name for table in KEYS for name in root.names(f"landing/{table}") if f"-{tick:08d}" in name]


def run(stage: str, env: str, root: Root) -> None:
    """A run by hand; how it ended is in its record."""
    command = [sys.executable, "orchestrate.py", "run", stage, "--env", env, "--root", root.url]
    subprocess.run(command, cwd=PROJECT, capture_output=True, check=False)


def told(root: Root, stage: str, since: datetime | None = None) -> Iterator[dict[str, Any]]:
    """The records of all runs of a stage."""
    return (index.get(root, row["run_id"]) for row in index.newest(root, stage=stage, since=since, limit=100_000))


def rows(root: Root) -> dict[str, Any]:
    """How many lines the generator wrote, and what is in the lake. Raises AssertionError when it is not the same."""
    made = sum(root.read(rel).count(b"\n") for rel in root.files("archive"))
    snapshot, stream = Lake(root).snapshot(), Stream.of(root)
    counts = {table: snapshot.row_count(table) for table in Lake.tables}
    assert snapshot.row_count("quarantine") == 0, "lines were refused"
    assert counts["orders"] == stream.next_tick * stream.orders_a_slice, (counts["orders"], stream)
    assert sum(counts.values()) == made, (counts, made)
    for table, key in KEYS.items():
        unlike = snapshot.frame(table, key).unique().select(pl.len()).collect(engine="streaming").item()
        assert unlike == counts[table], f"{table}: {unlike:,} keys in {counts[table]:,} rows"
    return {"made": made, **counts}


def freshness(root: Root, ticks: range) -> dict[str, float]:
    """Seconds from a row's birth to the publication of its batch: the middle, the worst of a hundred, the worst."""
    stream, published = Stream.of(root), dict(published_at(root))
    files = Lake(root).snapshot().frame("files").collect()
    age: list[tuple[float, float]] = []  # seconds, rows
    for path, batch, count in files.select("path", "batch", "rows").iter_rows():
        table, _, name = path.partition("/")
        if table not in KEYS or (tick := int(name.split("-")[1][:8])) not in ticks:
            continue
        for point in range(POINTS):
            born = stream.time_of(tick) - timedelta(seconds=TICK_S * (point + 0.5) / POINTS)
            age.append(((published[batch] - born).total_seconds(), count / POINTS))
    age.sort()
    assert age, "no tick came meanwhile"
    every, ends = sum(count for _, count in age), {}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
        so_far = 0.0
        for seconds, count in age:
            so_far += count
            if so_far >= share * every - 1e-6:
                ends[name] = seconds
                break
    return ends


def published_at(root: Root) -> Iterator[tuple[int, datetime]]:
    """Batch -> when its ledger was committed, the last table's commit before it is published."""
    for name in root.names(delta.log_of("lake/files")):
        if name.endswith(".json") and delta.NUMBERED.match(name):
            lines = delta.actions(root, "lake/files", int(name[:20]))
            at = next(line["commitInfo"]["timestamp"] for line in lines if "commitInfo" in line)
            for line in lines:
                if "txn" in line:
                    yield line["txn"]["version"], datetime.fromtimestamp(at / 1000).astimezone()


def stages(root: Root) -> dict[str, dict[str, Any]]:
    """Of each stage: its runs, their states, seconds and deadline, CPU seconds and memory."""
    found = {}
    for stage in STAGES:
        runs, states = list(told(root, stage)), defaultdict(int)
        for run in runs:
            states[run["state"]] += 1
        worked = [run for run in runs if run["state"] != "noop"]
        found[stage] = {
            "runs": len(runs),
            "states": dict(states),
            "seconds": max((run["seconds"] for run in worked), default=0),
            "deadline_s": max((run["deadline_s"] or 0 for run in worked), default=0),
            "cpu_s": sum(run["receipt"].get("cpu_s") or 0 for run in runs),
            "memory_mb": max((run["receipt"].get("peak_memory_mb") or 0 for run in worked), default=0),
        }
    return found


def publish(result: dict[str, Any], began: dict[str, Any]) -> None:
    lines = []
    for stage, of in result["stages"].items():
        states = ", ".join(f"{count} {state}" for state, count in of["states"].items())
        within = f"{of['seconds']:.0f} of {of['deadline_s']:.0f}"
        lines.append([stage, states, within, f"{of['cpu_s']:.0f}", f"{of['memory_mb']:,.0f}"])
    share = sum(result["footprint"]["cpu_percent"].values()) / 100
    share -= result["generate_cpu_s"] / result["footprint"]["seconds"]
    result["share_of_machine"] = share / began["cores"]
    title = f"{result['rows']['made']:,} rows, {result['ticks']} ticks in {result['minutes']:g} minutes"
    columns = ["", "runs", "slowest of its deadline, s", "CPU, s", "MB at most"]
    measure.publish("day", title, columns, lines, result, began)
    print("every row is there exactly once:", json.dumps(result["rows"]))
    fresh = result["freshness_s"]
    print("born to published, s: " + ", ".join(f"{name} {value:.1f}" for name, value in fresh.items()))
    print(f"besides generate: {result['share_of_machine']:.0%} of the machine; run by hand: {result['by_hand']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--env", default="seed")
    asked = parser.parse_args()
    main(asked.minutes, asked.env)
