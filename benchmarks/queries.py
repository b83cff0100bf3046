"""TPC-H's 22 questions from the lake: Polars, DuckDB's own SQL over the same Parquet files, and two Dask workers.

Each engine has a process of its own and two threads (Dask: two workers of 4 GB, one thread each). They take turns,
question by question and round after round, after one that warms up and whose answers are compared; medians of wall and
CPU seconds, the highest peak of memory, the ratio of Polars to DuckDB and what workers were lost on the way are printed
and written to outputs/benchmarks/queries.json. With several scales also how the total grows with the data. The lakes
stay in outputs/benchmarks/tpch; scale 10 takes 4 GB and some minutes to make.

    python benchmarks/queries.py [--scale 0.1 --scale 1 --scale 10] [--engine polars --engine duckdb --engine dask]
        [--question 9 --question 21] [--rounds 3]
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.table import Table

from etl.lake import commit
from etl.lake.snapshot import swap_pointer
from etl.storage import PROJECT, Root
from pipeline import Lake, queries, source
from pipeline.tables import RESCUED

THREADS, WORKERS, WORKER_MEMORY = 2, 2, "4GB"
FOLDER = PROJECT / "outputs" / "benchmarks"
NUMBERS = range(1, 23)
ORIGIN = "2026-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class Taken:
    """What one answer cost. `wall`, `cpu`: seconds; `peak_mb`: resident memory of all the engine's processes; `lost`:
    workers that ended meanwhile, also those that were started again."""

    wall: float
    cpu: float
    peak_mb: float
    lost: int


def main(
    scale: Annotated[list[float], typer.Option(help="TPC-H scale factor, 1 is a gigabyte.")] = [0.1, 1],  # noqa: B006
    engine: Annotated[list[str], typer.Option(help="polars, duckdb or dask.")] = ["polars", "duckdb", "dask"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each question is asked, after once to compare.")] = 3,
    question: Annotated[list[int], typer.Option(help="By its number.")] = list(NUMBERS),  # noqa: B006
):
    console, results = Console(width=130), {}
    for factor in scale:
        root = lake_at(factor)
        console.print(f"scale {factor:g}: load {os.getloadavg()[0]:.1f}", highlight=False)
        taken, unlike = measure(root, engine, question, rounds)
        results[f"{factor:g}"] = {
            name: {n: [asdict(t) for t in ts] for n, ts in one.items()} for name, one in taken.items()
        }
        console.print(table_of(factor, taken, rounds))
        console.print(f"answers unlike DuckDB's: {', '.join(unlike) or 'none'}", highlight=False)
        lost = sum(cost.lost for one in taken.values() for costs in one.values() for cost in costs)
        console.print(f"workers lost: {lost}; load at the end {os.getloadavg()[0]:.1f}", highlight=False)
        Root.at(FOLDER).write("queries.json", json.dumps(results, indent=1).encode())
    for name in engine:
        totals = [
            (f, sum(statistics.median(t["wall"] for t in ts) for ts in results[f"{f:g}"][name].values())) for f in scale
        ]
        for (small, before), (large, after) in itertools.pairwise(totals):
            power = math.log(after / before) / math.log(large / small)
            console.print(
                f"{name}: {before:.2f} s at {small:g}, {after:.2f} s at {large:g}: grows as data to the {power:.2f}"
            )


def lake_at(scale: float) -> str:
    """A root whose lake is TPC-H at that scale, in a slice for each unit of it; made once."""
    lake = Lake(FOLDER / "tpch" / f"{scale:g}")
    root = lake.root
    if lake.published():
        return root.url
    stream = source.Stream(scale, max(1, math.ceil(scale)), ORIGIN)
    commit.create_tables(lake, "benchmark")
    versions = dict.fromkeys(lake.columns, 0)
    for tick in range(stream.slices):
        frames = source.make_tick(stream, tick)
        for table, frame in frames.items():
            rows = commit.encode(lake, table, frame.with_columns(pl.lit(None, pl.String).alias(RESCUED)))
            versions[table] = commit.append(
                lake, table, rows, batch=tick + 1, run_id="benchmark", after=versions[table]
            )
    as_of = frames["orders"]["o_order_time"].max().isoformat()
    swap_pointer(root, None, batch=stream.slices, as_of=as_of, versions=versions, run_id="benchmark")
    return root.url


def measure(
    root: str, engines: list[str], numbers: list[int], rounds: int
) -> tuple[dict[str, dict[int, list[Taken]]], list[str]]:
    """Engine -> question -> what each round took, and where an engine's answer is not DuckDB's.

    With no rounds what the first answers took, which are compared and pay for all that is done once.
    """
    taken: dict[str, dict[int, list[Taken]]] = {name: {n: [] for n in numbers} for name in engines}
    unlike = []
    with contextlib.ExitStack() as stack:
        asked = {name: stack.enter_context(process(name, root)) for name in engines}
        for turn, number in itertools.product(range(rounds + 1), numbers):
            rows = {}
            for name in engines if turn % 2 else engines[::-1]:
                rows[name], cost = asked[name](number)
                if turn or not rounds:
                    taken[name][number].append(cost)
            if "duckdb" in rows and not turn:
                unlike += [f"{name} q{number:02}" for name in engines if not alike(rows[name], rows["duckdb"])]
    return taken, unlike


@contextlib.contextmanager
def process(engine: str, root: str) -> Iterator[Callable[[int], tuple[list[tuple], Taken]]]:
    """A process with one engine in it, to be asked by number."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(engine, root, theirs))
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)  # read when it is imported
    child.start()

    def ask(number: int) -> tuple[list[tuple], Taken]:
        ours.send(number)
        return ours.recv()

    try:
        yield ask
    finally:
        ours.send(None)
        child.join()


def serve(engine: str, root: str, pipe: Connection) -> None:
    """Answer numbers with rows and what they took, until there is None."""
    with ENGINES[engine](root) as (answer, processes, lost):
        while (number := pipe.recv()) is not None:
            processes(forget_peak)
            gone, cpu, began = len(lost), sum(processes(time.process_time)), time.perf_counter()
            rows = answer(number)
            wall = time.perf_counter() - began
            cost = sum(processes(time.process_time)) - cpu, sum(processes(peak_mb)), len(lost) - gone
            pipe.send((rows, Taken(wall, *cost)))


@contextlib.contextmanager
def polars_engine(root: str) -> Iterator[tuple[Callable, Callable, list]]:
    snapshot, known = Lake(root).snapshot(), {question.name: question for question in queries.questions()}
    yield lambda number: queries.ask(known[f"q{number:02}"], snapshot).rows(), lambda function: [function()], []


@contextlib.contextmanager
def dask_engine(root: str) -> Iterator[tuple[Callable, Callable, list]]:
    import distributed

    class Lost(distributed.SchedulerPlugin):
        """Workers that are gone, also those that their nanny starts again."""

        def __init__(self):
            self.workers = []

        def remove_worker(self, scheduler, worker, **_):
            self.workers.append(worker)

    snapshot, known = Lake(root).snapshot(), {question.name: question for question in queries.questions()}
    with (
        distributed.LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            memory_limit=WORKER_MEMORY,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        address, lost = cluster.scheduler_address, Lost()
        cluster.scheduler.add_plugin(lost)
        yield (
            lambda number: queries.ask(known[f"q{number:02}"], snapshot, dask=address).rows(),
            lambda function: [function(), *client.run(function).values()],
            lost.workers,
        )


@contextlib.contextmanager
def duckdb_engine(root: str) -> Iterator[tuple[Callable, Callable, list]]:
    import duckdb
    import duckdb_extension_tpch

    snapshot, connection = Lake(root).snapshot(), duckdb.connect()
    extension = next(Path(duckdb_extension_tpch.__path__[0]).rglob("tpch.duckdb_extension"))
    connection.execute(f"LOAD '{extension}'; SET threads = {THREADS}")
    for table in Lake.tables:
        connection.execute(f"CREATE VIEW {table} AS FROM read_parquet({snapshot.files(table)})")
    yield lambda number: connection.execute(f"PRAGMA tpch({number})").fetchall(), lambda function: [function()], []


ENGINES = {"polars": polars_engine, "duckdb": duckdb_engine, "dask": dask_engine}


def forget_peak() -> None:
    """Have the kernel measure this process's peak of memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def alike(rows: list[tuple], others: list[tuple]) -> bool:
    """The same rows; floats to the ninth digit, rows of equal rank in any order."""

    def near(a: Any, b: Any) -> bool:
        return a == b or isinstance(a, float) and b is not None and math.isclose(a, b, rel_tol=1e-9)

    if len(rows) != len(others):
        return False
    pairs = zip(sorted(rows, key=str), sorted(others, key=str), strict=True)
    return all(all(map(near, one, other)) for one, other in pairs)


def table_of(scale: float, taken: dict[str, dict[int, list[Taken]]], rounds: int) -> Table:
    """A line a question and one for all of them."""
    which = f"medians of {rounds}" if rounds else "the first answers"
    table = Table(title=f"TPC-H at scale {scale:g}, {which}, {THREADS} threads", title_justify="left")
    table.add_column("question")
    for name in taken:
        for figure in ("wall s", "CPU s", "peak MB"):
            table.add_column(f"{name}\n{figure}", justify="right")
    paired = {"polars", "duckdb"} <= set(taken)
    if paired:
        table.add_column("Polars /\nDuckDB", justify="right")
    medians = {
        name: {
            n: (statistics.median(t.wall for t in ts), statistics.median(t.cpu for t in ts), max(t.peak_mb for t in ts))
            for n, ts in one.items()
        }
        for name, one in taken.items()
    }
    for name, one in medians.items():
        walls, cpus, peaks = zip(*one.values(), strict=True)
        medians[name] = {**one, "all": (sum(walls), sum(cpus), max(peaks))}
    lines = list(next(iter(medians.values())))
    for line in lines:
        costs = [medians[name][line] for name in taken]
        cells = [text for wall, cpu, peak in costs for text in (f"{wall:.3f}", f"{cpu:.3f}", f"{peak:,.0f}")]
        ratio = [f"{medians['polars'][line][0] / medians['duckdb'][line][0]:.2f}"] if paired else []
        table.add_row(line if line == "all" else f"q{line:02}", *cells, *ratio, end_section=line == lines[-2])
    return table


if __name__ == "__main__":
    typer.run(main)
