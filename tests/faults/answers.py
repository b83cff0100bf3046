"""TPC-H's questions have TPC-H's answers: with any parameters, at any scale, on Polars and on Dask.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import hypothesis
from hypothesis import strategies
from support import AT
from tpch_sql import PARAMETERS, QUESTIONS, connect, tpch, unlike

from etl import params
from etl.lake import Snapshot, ingest
from etl.questions import engines
from etl.runs import dispatch
from etl.storage import PROJECT, Root
from pipeline import Lake, queries, source

# TPC-H specification 3.0.1, clause 2.4: what the validation output begins with at scale 1
VALIDATION = {
    "q06": [{"revenue": Decimal("123141078.23")}],
    "q13": [{"orders": 0, "customers": 50005}, {"orders": 9, "customers": 6641}],
    "q14": [{"promotion_percent": 16.38}],
    "q15": [{"supplier_key": 8449, "address": "Wp34zim9qYFbVctdW", "revenue": Decimal("1772627.21")}],
}


def draws(n: int, seed: int) -> str:
    """Each of the 22 with `n` draws of its parameters, over scale 0.01; fewer where there are not so many."""
    with tempfile.TemporaryDirectory(prefix="draws-") as folder:
        snapshot, connection = one_tick(Path(folder), 0.01)
        known, rows = {question.name: question for question in queries.questions()}, []

        def equal(number: int, parameters: dict) -> None:
            expected = tpch(connection, number, **parameters)
            answer = queries.ask(known[f"q{number:02}"], snapshot, **parameters)
            assert not (found := unlike(answer, expected)), f"q{number:02} {parameters}: {found}"
            rows.append(len(expected))

        for number, strategy in PARAMETERS.items():
            check = hypothesis.given(strategies.just(number), strategy)(equal)
            check = hypothesis.settings(max_examples=n, deadline=None, database=None)(check)
            hypothesis.seed(seed)(check)()
    return (
        f"{len(rows)} answers of {len(PARAMETERS)} questions equal DuckDB's, {sum(map(bool, rows))} of them with rows"
    )


def at_scales(hundredths: int, seed: int) -> str:
    """TPC-H at scale 0.01, 0.1 and 1, up to that, in twelve ticks through the pipeline.

    Its 22 answers are held against SQL, those of Polars and those of two Dask workers.
    """
    return "; ".join(_at_scale(scale) for scale in (0.01, 0.1, 1) if 100 * scale <= hundredths)


def _at_scale(scale: float) -> str:
    ticks = [f"generate.scale={scale}", "generate.slices=12", "generate.history=11", "preprocess.max_files=2"]
    project = params.load(PROJECT, "full", ticks)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        environment, seconds = replace(project.environment, root=f"{folder}/root"), {}

        def run(name: str, dask: dict | None = None) -> str:
            stage = replace(project.stages[name], dask=dask)
            record = dispatch.run_stage(stage, environment, scheduled_for=datetime.fromisoformat(AT))
            assert record.ok, f"{name}: {record.reason}"
            what = f"{name} on Dask" if dask else name
            seconds[what] = round(seconds.get(what, 0) + record.seconds, 1)
            return record.state

        run("generate")
        while run("preprocess") == "ok":  # until nothing waits
            pass
        files = len(Lake(environment.root).snapshot().files("lineitem"))
        run("compact")
        compacted = len(Lake(environment.root).snapshot().files("lineitem"))
        assert compacted < files
        run("query")
        connection = connect(generated(Path(folder), scale))
        _compare(environment.root, connection)
        if scale == 1:
            _validate(environment.root)
        with _small_cluster() as address:
            run("query", {"address": address})
        equal = _compare(environment.root, connection)
    return f"scale {scale:g}: {equal} answers of each engine equal SQL's, {compacted} files of {files}, s: {seconds}"


def in_pieces(hundredths: int, seed: int) -> str:
    """Every answer by two Dask workers at that scale, from as many pieces of the tables as there are at scale 10."""
    with tempfile.TemporaryDirectory(prefix="pieces-") as folder, _small_cluster() as address:
        snapshot, connection = one_tick(Path(folder), hundredths / 100)
        rows, engines.PIECE_ROWS = engines.PIECE_ROWS, engines.PIECE_ROWS * hundredths // 1000
        try:
            for question in queries.questions():
                answer = queries.ask(question, snapshot, dask=address)
                expected = QUESTIONS[question.name](connection, snapshot.as_of)
                assert not (found := unlike(answer, expected)), f"{question.name}: {found}"
            count = len(engines.pieces(snapshot, "lineitem"))
        finally:
            engines.PIECE_ROWS = rows
    return f"{len(QUESTIONS)} answers by Dask equal SQL's, line items in {count} pieces"


def one_tick(folder: Path, scale: float) -> tuple[Snapshot, duckdb.DuckDBPyConnection]:
    """A lake that one tick filled, and DuckDB over the Parquet files of the same data."""
    stream = source.Stream(scale, 1, "2026-03-01T12:00:00+00:00", file_rows=None)
    source.land(Root.at(f"{folder}/root"), stream, source.make_ticks(stream, range(1)))
    while batch := Lake(f"{folder}/root").next_batch(max_files=500, scheduled_for=AT):
        ingest.commit(ingest.read(batch), run_id="preprocess-test")
    return Lake(f"{folder}/root").snapshot(), connect(generated(folder, scale), placed=_origin(f"{folder}/root"))


def generated(folder: Path, scale: float) -> Path:
    """tpchgen's own Parquet."""
    command = [Path(sys.executable).with_name("tpchgen-cli"), "parquet", "--quiet", f"--scale-factor={scale}"]
    subprocess.run([*command, f"--output-dir={folder}/tpchgen"], check=True)
    return folder / "tpchgen"


def _origin(root: str) -> datetime:
    """When the first tick's orders begin."""
    return datetime.fromisoformat(json.loads(Root.at(root).read(source.DESCRIPTION))["origin"]) - timedelta(seconds=30)


def _compare(root: str, connection: duckdb.DuckDBPyConnection) -> int:
    """How many of TPC-H's questions there are; the current answer to each is what SQL says."""
    for number in PARAMETERS:
        _, answer = queries.current(Root.at(root), f"q{number:02}")
        assert not (found := unlike(answer, tpch(connection, number))), f"q{number:02}: {found}"
    return len(PARAMETERS)


def _validate(root: str) -> None:
    for name, rows in VALIDATION.items():
        _, answer = queries.current(Root.at(root), name)
        for wanted, row in zip(rows, answer.to_dicts(), strict=False):
            for column, value in wanted.items():
                got = row[column] if isinstance(value, str | int) else round(row[column], 2)
                assert got == value, f"{name}: {column} is {row[column]}, not {value}"


@contextmanager
def _small_cluster() -> Iterator[str]:
    """Two workers of 4 GB; every one of them is alive at the end."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit="4GB",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs="CRITICAL",
    ) as cluster:
        before = set(cluster.scheduler.workers)
        yield cluster.scheduler_address
        assert set(cluster.scheduler.workers) == before, "a worker was lost"
