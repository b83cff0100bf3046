"""How many requests the work on an object store takes, how long they last, and what they cost in a month.

moto's S3 server on loopback stands behind a proxy that counts, and that makes each request take as long as S3 does:
15 ms for a GET or HEAD, 30 ms for a PUT, 25 ms for a listing. The lake is the default stream's in small, with a
history of batches. Parts are `data`, by the calls that the notebooks make, `index`, of runs and their reports, `runs`
of the five stages as notebooks, and `tab`, an open page of the dashboard; from the last two follows what a month at
the default cadence costs.

    python benchmarks/store_requests.py [--part data] [--batches 30] [--files 500] [--error-share 0] [--trace batch]
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import measure

from etl.storage import PROJECT, Root

sys.path.insert(0, str(PROJECT / "tests"))
from s3_faults import FaultyS3, faulty_s3  # noqa: E402
from support import SMALL, orchestrate, s3, s3_variables  # noqa: E402

LATENCY_S = {"GET": 0.015, "HEAD": 0.015, "PUT": 0.030, "COPY": 0.030, "POST": 0.030, "DELETE": 0.030, "LIST": 0.025}
# dollars for 1,000 requests and a GB and month, S3 Standard in us-east-2: https://aws.amazon.com/s3/pricing/
PRICES = {"PUT": 0.005, "COPY": 0.005, "POST": 0.005, "LIST": 0.005, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0.0}
PRICES_OF = "2025"  # they have been the same for years
PARTS = ("data", "runs", "index", "tab")
LOOKS_AN_HOUR = 240  # of an open tab: one every 15 s
A_MONTH = {"generate": 86_400, "preprocess": 43_200, "compact": 1_440, "query": 720, "train": 120}  # runs, 30 days
AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMITS = {"max_files": 500, "max_bytes": 256_000_000, "quiet_s": 10}


@dataclasses.dataclass
class Taken:
    """What a piece of work took."""

    seconds: float
    kinds: dict[str, float]  # how many requests of each
    keys: list[tuple[str, str]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def requests(self) -> float:
        return sum(self.kinds.values())

    @property
    def dollars(self) -> float:
        return sum(PRICES[kind] / 1000 * count for kind, count in self.kinds.items())

    def per(self, times: int) -> "Taken":
        return Taken(self.seconds / times, {kind: count / times for kind, count in self.kinds.items()}, self.keys)


class Measured:
    """A bucket behind the proxy, and what was done there."""

    def __init__(self, proxy: FaultyS3, root: Root):
        self.proxy, self.root = proxy, root
        self.taken: dict[str, Taken] = {}

    @contextlib.contextmanager
    def work(self, name: str, times: int = 1) -> Iterator[None]:
        """Count and time the block, which does it so many times."""
        self.proxy.latency_s = LATENCY_S
        before, began = len(self.proxy.asked), time.perf_counter()
        yield
        seconds, asked = time.perf_counter() - began, self.proxy.asked[before:]
        self.proxy.latency_s = {}
        self.taken[name] = Taken(seconds, Counter(kind for kind, _ in asked), asked).per(times)


@contextlib.contextmanager
def bucket(name: str) -> Iterator[Measured]:
    """A server, a proxy before it and a bucket; the variables of this process lead there."""
    import s3fs

    before = dict(os.environ)
    with s3() as server, faulty_s3(server) as proxy:
        try:
            os.environ |= s3_variables(server)
            s3fs.S3FileSystem().mkdir(name)
            os.environ |= s3_variables(proxy.url)
            s3fs.S3FileSystem.clear_instance_cache()  # one knows its endpoint for good
            yield Measured(proxy, Root.at(f"s3://{name}/etl"))
        finally:
            os.environ.clear()
            os.environ |= before
            s3fs.S3FileSystem.clear_instance_cache()


class Stages:
    """The stages of data by the calls that their notebooks make."""

    def __init__(self, root: Root, scale: float = 0.01, slices: int = 1000):
        from pipeline import Lake, source

        self.lake, self.root = Lake(root), root
        self._stream = source.Stream(scale, slices, AT.isoformat())
        self._tick = 0

    def land(self, ticks: int = 1) -> None:
        from pipeline import source

        source.land(self.root, self._stream, source.make_ticks(self._stream, range(self._tick, self._tick + ticks)))
        self._tick += ticks

    def preprocess(self) -> int:
        """How many files it took."""
        lake, at, run_id = Lake(self.root), AT.isoformat(), f"preprocess-{self._tick}"
        batch = lake.next_batch(**LIMITS, scheduled_for=at)
        if batch is None:
            lake.idle()
            return 0
        parsed = lake.read(batch, max_bad_share=0.01)
        written = lake.commit(parsed, run_id=run_id)
        lake.drain(**LIMITS, max_bad_share=0.01, for_s=25, scheduled_for=at, run_id=run_id)
        lake.summary(parsed, written)
        lake.unmatched()
        lake.snapshot()
        assert not batch.blocked
        return len(batch.files)

    def compact(self) -> None:
        lake = Lake(self.root)
        lake.survey(small_mb=64)
        lake.compact(target_mb=128, min_small_files=8, vacuum_hours=24, run_id="compact-1")
        lake.prune(archive_days=7, refused_days=90)
        lake.survey(small_mb=64)

    def query(self, number: int) -> None:
        from pipeline import queries

        lake = Lake(self.root)
        snapshot = lake.published()
        snapshot.rows(lake.tables)
        asked = queries.questions()
        answers = [
            answer for answer in queries.ask_all(asked, snapshot, portions_in=self.root) if answer.frame is not None
        ]
        assert len(answers) == len(asked), [answer.problem for answer in answers]
        for answer in answers:
            queries.changes(self.root, answer.question, answer.frame)
        for answer in answers:
            queries.save(self.root, answer.frame, answer.question, snapshot, f"query-{number}", keep=168)


def Lake(root: Root):  # noqa: N802 - a new one each run, as a kernel has it
    from pipeline import Lake as Domain

    return Domain(Root.at(root.url))


def measure_data(at: Measured, batches: int, files: int) -> None:
    """Batches, questions, compaction, an archive of many files."""
    stages = Stages(at.root)
    stages.land(2)
    stages.preprocess()
    for _ in range(batches):
        stages.land()
        stages.preprocess()
    stages.land()
    with at.work("a batch of two files"):
        assert stages.preprocess() == 2
    with at.work("a look at an empty landing"):
        assert stages.preprocess() == 0
    stages.query(1)
    stages.land()
    stages.preprocess()
    with at.work("the hourly questions"):
        stages.query(2)
    with at.work("compaction"):
        stages.compact()
    with at.work("compaction, little to do"):
        stages.compact()
    measure_archive(at, stages, files)


def measure_archive(at: Measured, stages: Stages, files: int) -> None:
    from etl.lake import landing

    line = b'{"o_orderkey":%d,"o_custkey":1,"o_orderstatus":"O","o_totalprice":"1.00","o_orderdate":"1996-01-02",'
    line += b'"o_orderpriority":"5-LOW","o_clerk":"c","o_shippriority":0,"o_comment":"c",'
    line += b'"o_order_time":"2026-03-01T12:00:00Z"}\n'
    at.root.each(lambda n: at.root.write(f"landing/orders/many-{n:05d}.json", line % (10**9 + n)), range(files))
    moving = landing.archive

    def archive(*arguments, **named):
        with at.work(f"archiving {files} files"):
            return moving(*arguments, **named)

    landing.archive = archive
    try:
        assert stages.preprocess() == files
    finally:
        landing.archive = moving


def record(root: Root, number: int, started: datetime):
    from etl.runs.record import RunRecord

    run_id = f"preprocess-{started:%Y%m%dT%H%M%S}-{number:06x}"
    report = f"reports/preprocess/{started:%Y-%m-%d}/{run_id}"
    times = {"scheduled_for": started.isoformat(), "started_at": started.isoformat()}
    ended = (started + timedelta(seconds=5)).isoformat()
    return RunRecord(
        stage="preprocess",
        run_id=run_id,
        root=root.url,
        attempt=1,
        parameters={},
        origins={},
        report=report,
        host="here",
        ended_at=ended,
        seconds=5.0,
        **times,
    )


def measure_index(at: Measured, rows: int = 40) -> None:
    """Rows of runs, and sweeps of their reports: what is new, and nothing new."""
    from etl.runs import index, retention

    now = datetime.now(UTC)
    days = [now - timedelta(days=days) for days in range(8, 0, -1)]
    runs = [record(at.root, 1000 * n + k, day + timedelta(minutes=k)) for n, day in enumerate(days) for k in range(3)]
    for run in runs:
        index.append(at.root, run)
        for stage in ("generate", "preprocess", "compact", "query", "train"):
            at.root.write(f"{run.report.replace('reports/preprocess', f'reports/{stage}')}/run.json", b"{}")
    with at.work("a run's index row", rows):
        for number in range(rows):
            index.append(at.root, record(at.root, 10_000 + number, now + timedelta(seconds=number)))
    retention.sweep(at.root)
    with at.work("a sweep of the reports"):
        retention.sweep(at.root)


def measure_tab(at: Measured) -> None:
    """What an open tab asks: one look of each of its pages, the caches of the look before it run out."""
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    os.environ["ETL_ROOT"] = at.root.url
    page = AppTest.from_file(str(PROJECT / "app" / "dashboard.py"), default_timeout=120).run()
    assert not page.exception, page.exception
    time.sleep(16)
    with at.work("a look of an open tab"):
        page.run()
    st.cache_data.clear()


def measure_runs(at: Measured) -> None:
    """A run of each stage as a notebook, its report, row and page, after others of it."""
    variables = s3_variables(at.proxy.url)
    for number in range(2):
        for stage in A_MONTH:
            arguments = ["run", stage, "--env", "dev", "--root", at.root.url, *_small(stage)]
            with at.work(f"run of {stage}") if number else contextlib.nullcontext():
                done = orchestrate(PROJECT, *arguments, env=variables)
            assert done.returncode == 0, done.stdout + done.stderr


def _small(stage: str) -> list[str]:
    pairs = [SMALL[n : n + 2] for n in range(0, len(SMALL), 2)]
    own = {"generate": ("scale", "slices", "history"), "train": ("min_rows",)}.get(stage, ())
    return [word for flag, pair in pairs if pair.partition("=")[0] in own for word in (flag, pair)]


def rows(taken: dict[str, Taken]) -> list[list[str]]:
    order = ["GET", "HEAD", "PUT", "COPY", "DELETE", "LIST", "POST"]
    lines = []
    for name, it in taken.items():
        counts = [f"{it.kinds.get(kind, 0):,.1f}".removesuffix(".0") for kind in order]
        lines.append([name, f"{it.requests:,.1f}".removesuffix(".0"), *counts, f"{it.seconds:.2f}"])
    return lines


def a_month(taken: dict[str, Taken]) -> dict[str, float]:
    """Dollars of each part in 30 days at the default cadence, requests alone."""
    cost = {stage: taken[f"run of {stage}"].dollars * runs for stage, runs in A_MONTH.items()}
    cost["an open tab"] = taken["a look of an open tab"].dollars * LOOKS_AN_HOUR * 720
    cost["the sweeps of reports"] = taken["a sweep of the reports"].dollars * 48 * 30
    return cost


def main(parts: list[str], batches: int, files: int, error_share: float, trace: str | None) -> None:
    began = measure.machine()
    with measure.own_state(), bucket("requests") as at:
        at.proxy.busy_share = error_share
        works: dict[str, Callable[[], None]] = {
            "data": lambda: measure_data(at, batches, files),
            "index": lambda: measure_index(at),
            "runs": lambda: measure_runs(at),
            "tab": lambda: measure_tab(at),
        }
        for part in PARTS:
            if part in parts:
                works[part]()
        runs = {"index", "runs", "tab"} <= {*parts}
        columns = ["", "requests", "GET", "HEAD", "PUT", "COPY", "DELETE", "LIST", "POST", "seconds"]
        result = {name: dataclasses.asdict(it) | {"keys": None} for name, it in at.taken.items()}
        month = a_month(at.taken) if runs else {}
        title = "Requests to the object store, and seconds"
        measure.publish("store_requests", title, columns, rows(at.taken), {"taken": result, "month": month}, began)
        for name, dollars in month.items():
            print(f"{name:24} {dollars:6.2f} dollars a month")
        if month:
            print(f"{'requests in all':24} {sum(month.values()):6.2f} dollars a month, at the prices of {PRICES_OF}")
        for name, it in at.taken.items():
            if trace is not None and trace in name:
                print(f"--- {name}")
                for kind, key in it.keys:
                    print(f"{kind:6} {key}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--error-share", type=float, default=0.0)
    parser.add_argument("--trace", help="print every request of the works whose name has this in it")
    asked = parser.parse_args()
    main(asked.part or [*PARTS], asked.batches, asked.files, asked.error_share, asked.trace)
