"""Which resource ends first at 1 GB, 100 GB, 1 TB and 100 TB of JSON a day, on which machine, at what cost?

A day of the engine's own protocol is played minute by minute: files come every 30 seconds; each minute a run takes
them in batches under the one lease, each with its requests, bytes and CPU, until its time is up; every 30 minutes
compaction takes a core for what came. What a minute leaves waits. The constants are measured, by the benchmark that
stands beside each; the machines' prices are Amazon's, on demand, in us-east-2, of 2025. Questions over all history
and training are asked of machines of their own, which go afterwards.

`--measure` measures those of CPU on this machine, by real work in small: ingest, compaction, and the 22 questions.

    python benchmarks/capacity.py [--days 30] [--measure]
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable

import measure

# --- measured ---
JSON_MB_A_SCALE = 2_960  # of TPC-H's orders and line items at scale 1, 7.5 million rows: ingest.py
INGEST_CPU_S_A_MB = 0.0101  # capacity.py --measure; ingest.py, on quiet cores: at most 0.0083
PARQUET_SHARE = 0.11  # of the JSON's bytes: capacity.py --measure
COMPACT_CPU_S_A_MB = 0.0080  # of JSON that came: capacity.py --measure
QUESTIONS_CPU_S_A_SCALE = 4.74  # the 22 over all rows, 2.37 s on 2 cores: queries.py
QUESTIONS_MB = (351, 118)  # of memory at scale 1, and for each further one: queries.py
BATCH_MEMORY = 4  # bytes for each of a batch's: ingest.py
TRAIN_BYTES_A_ROW = 59  # of a line item, in memory at the most: of 60 million, workers.py
REQUESTS_A_BATCH = 44  # with two files: store_requests.py
SERIAL_A_BATCH = 24  # of those one after the other: store_requests.py --trace batch
REQUESTS_AN_HOUR = 2_400  # the questions and two compactions: store_requests.py --batches 8
REQUESTS_A_RUN = 20  # its report, row and page: given
RUN_S = 0.6  # CPU of a run besides its work, its kernel, report and row: notebook_overhead.py, scheduled_run.py
UP_MB = 1_000  # of memory, `up` with its kernels: footprint.py
LATENCY_S = 0.025  # of a request, given
BOOT_S = 90  # of a machine of its own, given
# --- declared ---
BATCH_MB, FILE_MB, TICK_S, DRAIN_S, QUESTIONS_DEADLINE_S, ARCHIVE_DAYS = 256, 64, 30, 25, 300, 7
# --- prices, 2025 ---
DOLLARS_A_REQUEST = 0.0000035  # by the kinds of a batch's: 32 of 44 are PUT, COPY or LIST
GB_MONTH, HOURS = 0.023, 730
COLUMNS = (
    "one t3.medium: ends first",
    "ingest holds on",
    "ends first there",
    "born to published, p50 / p99, s",
    "dollars a month",
    "all 22 questions over all history, hourly",
    "training on a day's line items",
)


@dataclasses.dataclass(frozen=True)
class Machine:
    name: str
    cores: int
    memory_gb: int
    mb_s: float  # of network, lasting
    dollars_h: float


MACHINES = [
    Machine("t3.medium", 2, 4, 32, 0.0416),
    Machine("m7i.xlarge", 4, 16, 195, 0.2016),
    Machine("m7i.4xlarge", 16, 64, 780, 0.8064),
    Machine("m7i.24xlarge", 96, 384, 4_680, 4.8384),
]
VOLUMES_GB = {"1 GB": 1, "100 GB": 100, "1 TB": 1_000, "100 TB": 100_000}


@dataclasses.dataclass
class Day:
    """A day of ingest, compaction and live questions. Shares are of what there is; above 1 it does not hold. `fresh_s`:
    from a row's birth to its publication, p50 and p99. `waits_mb`: of JSON, at the end of the day."""

    shares: dict[str, float]
    fresh_s: tuple[float, float]
    waits_mb: float
    dollars: float  # a month: machines, requests, storage

    @property
    def holds(self) -> bool:
        return max(self.shares.values()) <= 1 and self.waits_mb < 1

    @property
    def first(self) -> str:
        """What ends first, and how much of it is used."""
        name = max(self.shares, key=self.shares.__getitem__)
        return f"{name}, {self.shares[name]:.0%}"


def batch_s(mb: float, files: float, machine: Machine, cores: float) -> float:
    """Seconds of a batch: its requests, then bytes and CPU, which overlap."""
    asked = (SERIAL_A_BATCH + files / 8) * LATENCY_S  # 16 moves at a time, of two requests each
    return asked + max(mb / machine.mb_s * (1 + PARQUET_SHARE), mb * INGEST_CPU_S_A_MB / cores)


def most_a_minute(machine: Machine) -> float:
    """MB that the holder of a lease takes in a run, which begins no batch that would not be over in time."""
    return BATCH_MB * max(1, DRAIN_S // batch_s(BATCH_MB, BATCH_MB / FILE_MB, machine, machine.cores))


def play(gb_a_day: float, machine: Machine, holders: int, history_days: int) -> Day:
    """A day at this volume. `holders`: partitions of the lake, each with a lease and a machine of its own."""
    mb_a_minute = gb_a_day * 1000 / 1440 / holders
    waiting = compacting_s = cpu_s = net_mb = 0.0
    batches, ages = 0, list[float]()
    for minute in range(1440):
        waiting += mb_a_minute
        cores = max(machine.cores - (compacting_s > 0), 0.5)
        compacting_s = max(0.0, compacting_s - 60)
        if minute % 30 == 29:
            compacting_s += mb_a_minute * 30 * COMPACT_CPU_S_A_MB
            cpu_s += mb_a_minute * 30 * COMPACT_CPU_S_A_MB
            net_mb += mb_a_minute * 30 * PARQUET_SHARE * 2
        waited_s, took, last = (waiting / mb_a_minute - 1) * 60, 0.0, 0.0
        while waiting > 1e-9 and (not took or took + last < DRAIN_S):
            mb = min(waiting, BATCH_MB)
            last = batch_s(mb, max(2, mb / FILE_MB), machine, cores)
            took, batches, waiting = took + last, batches + 1, waiting - mb
            cpu_s, net_mb = cpu_s + mb * INGEST_CPU_S_A_MB, net_mb + mb * (1 + PARQUET_SHARE)
        # the files of a tick come when the minute's run has begun, and their rows were born in the 30 seconds before it
        ages += [waited_s + born + tick + took + RUN_S for tick in (TICK_S, 60) for born in range(0, TICK_S, 5)]
        cpu_s += 3 * RUN_S
    cpu_s += gb_a_day * 1000 / holders / JSON_MB_A_SCALE * QUESTIONS_CPU_S_A_SCALE  # of live ones, of what came
    requests = batches * REQUESTS_A_BATCH + 24 * REQUESTS_AN_HOUR + 4_400 * REQUESTS_A_RUN
    stored_gb = gb_a_day * (PARQUET_SHARE * history_days + ARCHIVE_DAYS)
    shares = {
        "CPU": cpu_s / 86_400 / machine.cores,
        "the lease": mb_a_minute / most_a_minute(machine),
        "network": net_mb / 86_400 / machine.mb_s,
        "memory": (min(mb_a_minute, BATCH_MB) * BATCH_MEMORY + UP_MB) / (machine.memory_gb * 1000),
    }
    dollars = holders * (machine.dollars_h * HOURS + requests * 30 * DOLLARS_A_REQUEST) + stored_gb * GB_MONTH
    ages.sort()
    return Day(shares, (ages[len(ages) // 2], ages[int(len(ages) * 0.99)]), waiting, dollars)


def enough(gb_a_day: float, history_days: int) -> tuple[Machine, int, Day]:
    """The cheapest machines that hold, in as few partitions as can be."""
    for holders in (1, 2, 4, 8, 16, 32, 64, 128):
        for machine in MACHINES:
            if (day := play(gb_a_day, machine, holders, history_days)).holds:
                return machine, holders, day
    raise SystemExit(f"{gb_a_day} GB a day: no such number of machines holds")


def for_questions(scale: float) -> str:
    """The smallest machine that answers all 22 over this scale in time, and what an hourly run costs a month."""
    for machine in MACHINES:
        seconds = scale * QUESTIONS_CPU_S_A_SCALE / machine.cores
        memory_gb = (QUESTIONS_MB[0] + QUESTIONS_MB[1] * scale) / 1000
        if memory_gb <= machine.memory_gb * 0.8 and seconds <= QUESTIONS_DEADLINE_S:
            dollars = (seconds + BOOT_S) / 3600 * machine.dollars_h * 24 * 30
            return f"{machine.name}, {seconds:.0f} s, {dollars:,.0f} dollars"
    return f"none: {scale * QUESTIONS_CPU_S_A_SCALE / 3600:,.0f} core hours"


def for_training(rows: float) -> str:
    """The smallest machine that holds so many line items."""
    memory_gb = rows * TRAIN_BYTES_A_ROW / 1e9 + UP_MB / 1000
    for machine in MACHINES:
        if memory_gb <= machine.memory_gb * 0.8:
            return f"{machine.name}, {memory_gb:,.1f} GB"
    return f"none: {memory_gb:,.0f} GB"


def main(history_days: int) -> None:
    began, rows, result = measure.machine(), [], {}
    for name, gb in VOLUMES_GB.items():
        home, (machine, holders, day) = play(gb, MACHINES[0], 1, history_days), enough(gb, history_days)
        scale = gb * 1000 / JSON_MB_A_SCALE
        fresh = "{:.0f} / {:.0f}".format(*day.fresh_s)
        others = [for_questions(scale * history_days), for_training(scale * 6e6)]
        at_home = home.first if home.waits_mb < 1 else f"{home.first}: falls behind"
        rows.append([name, at_home, f"{holders} x {machine.name}", day.first, fresh, f"{day.dollars:,.0f}", *others])
        result[name] = {"home": dataclasses.asdict(home), "enough": dataclasses.asdict(day), "others": others}
    for row in rows:
        print(f"{row[0]} of JSON a day")
        for what, told in zip(COLUMNS, row[1:], strict=True):
            print(f"  {what:44} {told}")
    columns = ["JSON a day", "machines", "ends first", "fresh, s", "dollars a month"]
    shown = [[row[0], *row[2:6]] for row in rows]
    measure.publish("capacity", f"Ingest after {history_days} days", columns, shown, {"cases": result}, began)


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measured() -> None:
    """The constants of CPU and bytes, by real work in small."""
    from etl.storage import Root
    from pipeline import Lake, queries, source

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        lake, stream = Lake(f"{folder}/root"), source.Stream(0.1, 20, "2026-03-01T11:00:00+00:00")
        limits = {"max_files": 500, "max_bytes": 256_000_000, "max_bad_share": 0.0, "for_s": 1e9}
        size = ingest = 0.0
        for tick in range(20):
            made = source.land(
                Root.at(lake.root.url), stream, {tick: source.make_ticks(stream, range(tick, tick + 1))[tick]}
            )
            mb = made.filter(table="lineitem")["bytes"].sum() + made.filter(table="orders")["bytes"].sum()
            took = cpu_of(lambda: lake.drain(**limits, scheduled_for=None, run_id="bench"))
            size, ingest = size + mb / 1e6, ingest + (took if tick else 0)
        compact = cpu_of(lambda: lake.compact(target_mb=128, min_small_files=2, vacuum_hours=24, run_id="bench"))
        snapshot = lake.snapshot()
        tables = (
            snapshot.rows().filter(table="orders")["mb"].sum() + snapshot.rows().filter(table="lineitem")["mb"].sum()
        )
        asked = [question for question in queries.questions() if question.name.startswith("q")]
        queries.ask_all(asked, snapshot)
        questions = cpu_of(lambda: queries.ask_all(asked, snapshot))
        print(f"{size:,.0f} MB of JSON, CPU seconds; load {os.getloadavg()[0]:.1f}")
        print(f"ingest: {ingest / (size * 19 / 20):.4f} a MB")
        print(f"compaction: {compact / size:.4f} a MB that came; Parquet: {tables / size:.3f} of the bytes")
        print(f"the 22 questions: {questions / 0.1:.2f} at scale 1, were it to grow so")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--measure", action="store_true")
    asked = parser.parse_args()
    measured() if asked.measure else main(asked.days)
