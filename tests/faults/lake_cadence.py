"""Days of a lake at the default cadence on a clock of their own: what is on the disk, and what a tick costs, by day.

The stages do what their notebooks do, without the notebooks, on a tenth of the usual data: what adds up over the years
is files and commits. Reports and the index of runs are left out, which `month` sweeps. A file's age goes by two clocks:
delta-rs cleans a log by the machine's, everything else by the one of the run. So logs are made older as time passes,
and the folders of the archive, whose times are compared with the run's, have its time.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from faults.lake_s3 import bucket
from faults.lake_world import NotHeld
from polars.testing import assert_frame_equal
from rich.console import Console
from rich.table import Table as Shown

from etl.storage import PROJECT, Root
from pipeline import Lake, queries, source

SCALE, SLICES = 0.01, 288  # a tenth of what the stream has by default
TICKS_A_DAY = 86_400 // source.TICK_S
COMPACT_TICKS, QUERY_TICKS = 1800 // source.TICK_S, 3600 // source.TICK_S
LIMITS = {"max_files": 500, "max_bytes": 256_000_000}
COMPACTION = {"target_mb": 128, "min_small_files": 8, "vacuum_hours": 24}
MOST = 1.15  # times what is live, was superseded within a day, or is in the archive
COLUMNS = {  # of the table by day
    **{"live": "live files", "data": "files of tables", "log": "files of logs", "files": "files in all"},
    **{"mb": "MB in all", "ratio": "of what is needed", "known": "KB of known"},
    **{"generate": "generate, ms", "preprocess": "preprocess, ms", "compact": "compact, ms", "query": "query, ms"},
    **{"requests": "requests", "peak": "MB of memory"},
}


@dataclass
class Days:
    """A root, the clock of its runs, and what they cost. `needed`: file -> when a version last named it."""

    lake: Lake
    began: datetime
    tick: int = 0
    cost: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # CPU seconds of each run
    needed: dict[str, datetime] = field(default_factory=dict)
    aged_at: float = field(default_factory=time.time)

    @property
    def now(self) -> datetime:
        return self.began + timedelta(seconds=source.TICK_S * self.tick)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        before = time.process_time()
        yield
        self.cost[stage].append(time.process_time() - before)


def cadence(n: int, seed: int) -> str:  # noqa: ARG001 -- nothing is drawn
    """n ticks of generate, and all that goes with them: batches each minute, compactions, questions.

    Raises NotHeld when a row is lost or doubled, or when more than MOST is on the disk. A table by day is printed, and
    written to outputs/benchmarks/cadence.json, when it is one day or more.
    """
    began, rows = datetime.now(UTC), list[dict[str, float]]()
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        days = Days(Lake(f"{folder}/root"), began)
        stream = source.Stream(SCALE, SLICES, began.isoformat())
        slices = source._slices(stream, {*range(1, min(n, SLICES) + 1)})
        others = {table: [*frames] for table, frames in source._others(stream)}
        for tick in range(n):
            days.tick = tick
            with days.of("generate"):
                made = {tick: source._timed(stream, tick, slices[tick % SLICES + 1])}
                source.land(days.lake.root, stream, made, () if tick else others.items())
            if tick % 2:
                _preprocess(days)
            if tick % QUERY_TICKS == QUERY_TICKS - 1:
                _query(days)
            if tick % COMPACT_TICKS == COMPACT_TICKS - 1:
                _compact(days)
                _age(days)
            if tick % TICKS_A_DAY == TICKS_A_DAY - 1:
                rows.append(_day(days))
                _publish(rows)
        _require_same_answers(days.lake)
        live, kept = _require_rows(days.lake, n, slices), _of_disk(days)
    if kept["ratio"] > MOST and n >= TICKS_A_DAY:  # of less than a day's data the logs are the greater part
        raise NotHeld(f"{kept['mb']:.0f} MB are on the disk, {kept['ratio']:.2f} times what is needed")
    return f"{n} ticks: {live:,} rows exact, {kept['files']:.0f} files, {kept['ratio']:.2f} times what is needed"


def _preprocess(days: Days) -> None:
    lake, about = days.lake, {"scheduled_for": days.now.isoformat(), "now": days.now}
    with days.of("preprocess"):
        batch = lake.next_batch(**LIMITS, **about)
        lake.commit(lake.read(batch, max_bad_share=0.01), run_id=f"preprocess-{days.tick}")
        lake.drain(**LIMITS, **about, max_bad_share=0.01, for_s=25, run_id=f"preprocess-{days.tick}")
        lake.unmatched(), lake.snapshot(), lake.blocked()


def _query(days: Days) -> None:
    with days.of("query"):
        snapshot = days.lake.snapshot()
        for answer in queries.ask_all(queries.questions(), snapshot, portions_in=days.lake.root):
            if answer.problem:
                raise NotHeld(f"{answer.question.name}: {answer.problem}")
            queries.changes(days.lake.root, answer.question, answer.frame)
            queries.save(days.lake.root, answer.frame, answer.question, snapshot, f"query-{days.tick}")


def _require_same_answers(lake: Lake) -> None:
    """A question that reads what came since has the answer of one that reads everything."""
    snapshot, asked = lake.snapshot(), [question for question in queries.questions() if question.portion]
    answers = zip(
        queries.ask_all(asked, snapshot, portions_in=lake.root), queries.ask_all(asked, snapshot), strict=True
    )
    for by_portions, whole in answers:
        try:
            assert_frame_equal(by_portions.frame, whole.frame, check_row_order=False)
        except AssertionError as error:
            raise NotHeld(f"{whole.question.name} by what came since is another answer: {error}") from None


def _compact(days: Days) -> None:
    days.needed |= dict.fromkeys(_live(days.lake), days.now)
    with days.of("compact"):
        done = days.lake.compact(**COMPACTION, run_id=f"compact-{days.tick}", now=days.now)
        days.lake.prune(now=days.now)
        days.lake.survey(small_mb=64)
    if failed := done.drop_nulls("failed")["failed"].to_list():
        raise NotHeld(f"tick {days.tick}: {failed}")
    days.needed |= dict.fromkeys(_live(days.lake), days.now)


def _live(lake: Lake) -> set[str]:
    """The files that the published versions name."""
    snapshot = lake.snapshot()
    return {*itertools.chain.from_iterable(snapshot.files(table) for table in snapshot.versions)}


def _age(days: Days) -> None:
    """What was written since the last time has the time that it would have."""
    lake, began, days.aged_at = days.lake, days.aged_at, time.time()
    older_s = COMPACT_TICKS * source.TICK_S - (days.aged_at - began)
    root = Path(lake.root.url)
    for path in root.glob("lake/*/_delta_log/*"):
        then = path.stat().st_mtime - older_s
        os.utime(path, (then, then))
    for folder, _, _ in os.walk(root / "archive"):
        if began - 1 <= os.stat(folder).st_mtime <= days.aged_at:
            os.utime(folder, (days.now.timestamp(),) * 2)


def _of_disk(days: Days) -> dict[str, float]:
    """What is there, in files and bytes, and how much more that is than what is needed."""
    root, sizes = days.lake.root.url, dict[str, int]()
    for folder, _, names in os.walk(root):
        sizes |= {f"{folder}/{name}": os.stat(f"{folder}/{name}").st_size for name in names}
    live, day_ago = _live(days.lake), days.now - timedelta(days=1, seconds=COMPACT_TICKS * source.TICK_S)
    superseded = {name for name, at in days.needed.items() if at >= day_ago}
    archived = {name for name in sizes if name.startswith(f"{root}/archive/")}
    needed = sum(sizes.get(name, 0) for name in live | superseded | archived)
    kinds = Counter(_kind(name.removeprefix(f"{root}/")) for name in sizes)
    return {
        "live": len(live),
        "data": kinds["data"],
        "log": kinds["log"],
        "files": len(sizes),
        "mb": sum(sizes.values()) / 1e6,
        "ratio": sum(sizes.values()) / needed,
        "known": sum(size for name, size in sizes.items() if "/lake/known/" in name) / 1e3,
        "by_folder": {
            top: sum(size for name, size in sizes.items() if name.startswith(f"{root}/{top}/")) / 1e6
            for top in sorted({name.removeprefix(f"{root}/").split("/")[0] for name in sizes})
        },
    }


def _kind(rel: str) -> str:
    return (
        "log" if "/_delta_log/" in rel else "data" if rel.endswith(".parquet") and rel[:4] in ("lake", "runs") else ""
    )


def _day(days: Days) -> dict[str, float]:
    """The day that is over, in figures; medians of what a run costs, of those since the day before."""
    told = _of_disk(days) | {stage: 1000 * statistics.median(costs) for stage, costs in days.cost.items()}
    days.cost.clear()
    with open("/proc/self/status") as status:
        told["peak"] = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3
    told["requests"] = _requests(days)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return told


def _requests(days: Days) -> int:
    """How many requests a batch of one file is in an object store that has this lake."""
    here, snapshot = days.lake.root, days.lake.snapshot()
    rels = [rel for rel in here.files("lake") if not rel.endswith(".parquet") or "/_delta_log/" in rel]
    for table in snapshot.versions:
        rels += [os.path.relpath(path, here.url) for path in snapshot.files(table)]
    with bucket() as (proxy, url):
        there = Root.at(url)
        there.each(lambda rel: there.write(rel, here.read(rel)), rels)
        rows = here.read(_newest(here, "orders")).replace(b'key":', b'key":9')
        there.write("landing/orders/orders-99999999.json", rows)
        proxy.seen.clear()
        lake = Lake(url)
        lake.commit(lake.read(lake.next_batch(**LIMITS, scheduled_for=None, now=days.now)), run_id="in an object store")
        return len(proxy.seen)


def _newest(root: Root, table: str) -> str:
    date = root.names("archive")[-1]
    return f"archive/{date}/{table}/{root.names(f'archive/{date}/{table}')[-1]}"


def _require_rows(lake: Lake, ticks: int, slices: dict) -> int:
    """Each row that was given out is there once."""
    snapshot, total = lake.snapshot(), 0
    for table, key in {"orders": ["o_orderkey"], "lineitem": ["l_orderkey", "l_linenumber"]}.items():
        wanted = sum(slices[tick % SLICES + 1][table].height for tick in range(ticks // 2 * 2))
        rows = snapshot.frame(table, key).collect()
        if (rows.height, rows.n_unique()) != (wanted, wanted):
            raise NotHeld(f"{table} has {rows.height} rows, {rows.n_unique()} unlike, not {wanted}")
        total += wanted
    return total


def _publish(rows: list[dict[str, float]]) -> None:
    shown = Shown("day", *COLUMNS.values(), title="A lake at the default cadence", title_justify="left")
    for number, row in enumerate(rows, 1):
        figures = (f"{row[name]:.2f}" if name == "ratio" else f"{row[name]:,.0f}" for name in COLUMNS)
        shown.add_row(str(number), *figures)
    Console(width=200, stderr=True).print(shown)
    Root.at(PROJECT / "outputs").write("benchmarks/cadence.json", json.dumps(rows, indent=1).encode())
