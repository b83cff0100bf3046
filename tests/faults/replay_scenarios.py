"""A run replayed is the same run, and a version's run is the one that wrote it.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import io
import json
import random
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import polars as pl

from etl import findings, params
from etl.runs import dispatch, provenance
from etl.runs import index as run_index
from etl.runs import replay as replays
from etl.storage import PROJECT, Root
from pipeline import queries, source

START = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)
STREAM = source.Stream(0.01, 40, "2026-03-01T11:00:00+00:00")
SLACK_S = 0.002  # a commit's time and a run's are both cut to milliseconds


def replays_equal(n: int, seed: int) -> str:
    """`n` ok runs of query, with other questions each, over a lake that grows and is compacted; then all replayed."""
    rng, names = random.Random(seed), [question.name for question in queries.questions()]
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        kept, replays.REPLAYS = replays.REPLAYS, f"{folder}/replay"
        try:
            root, made, ran = f"{folder}/root", 0, []
            for i in range(n):
                if i == 0 or rng.random() < 0.4:
                    made = _grow(root, rng, made)
                if i and rng.random() < 0.2:
                    _run("compact", root, i, min_small_files=2)
                asked = rng.sample(names, rng.randint(1, len(names)))
                ran.append(_run("query", root, i, questions=asked, rows_shown=rng.randint(0, 6)))
            batches = {run["metrics"]["batch"] for run in ran}
            answers = 0
            for run in rng.sample(ran, n):
                stage, environment, _ = replays.recorded(PROJECT, "local", run)
                found = replays.replay(run, stage, replace(environment, root=root))
                assert found.equal, (run["run_id"], found.differences)
                assert found.compared["results"] == run["metrics"]["questions"]
                answers += found.compared["results"]
        finally:
            replays.REPLAYS = kept
    return f"{n} of {n} runs of query replayed: {n} equal ({answers} answers, from {len(batches)} batches)"


def whence_right(n: int, seed: int) -> str:
    """A lake that `n` runs of preprocess and some of compact wrote, held against `whence` as in `check_whence`."""
    rng, made = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="whence-") as root:
        for i in range(n):
            made = _grow(root, rng, made)
            if rng.random() < 0.5 or i == n - 1:
                _run("compact", root, i, min_small_files=2)
        return check_whence(root)


def check_whence(root: str) -> str:
    """Every version of every table under `root`: its run is in the index, was at work at the time, and what runs
    recorded as written is theirs. A row of the index is from the run whose row it is."""
    place, versions = Root.at(root), 0
    index = {row["run_id"]: run_index.get(place, row["run_id"]) for row in run_index.newest(place, limit=10**6)}
    tables = {name: f"lake/{name}" for name in place.names("lake")} | {"runs": run_index.TABLE}
    tables = {name: folder for name, folder in tables.items() if place.exists(f"{folder}/_delta_log/{0:020d}.json")}
    for table, folder in tables.items():
        numbers = [int(m[1]) for name in place.names(f"{folder}/_delta_log") if (m := findings.COMMIT.match(name))]
        for version in numbers:
            found = provenance.whence(place, table, version)
            where = f"{table}@{version}"
            assert found["run_id"] in index, f"{where}: {found} is not in the index"
            run = index[found["run_id"]]
            assert found["stage"] == run["stage"], where
            if table == "runs" and found["operation"] == "WRITE":
                assert _rows_of(place, table, version) == {found["run_id"]}, where
            else:
                began, ended, at = (
                    datetime.fromisoformat(t) for t in (run["started_at"], run["ended_at"], found["at"])
                )
                slack = timedelta(seconds=SLACK_S)
                # the index is made when the first run, which has ended, gets its row
                assert began - slack <= at and (at <= ended + slack or where == "runs@0"), (
                    f"{where}: {began} {at} {ended}"
                )
        versions += len(numbers)
    for run in index.values():
        for table, version in run["versions_written"].items():
            if place.exists(f"lake/{table}/_delta_log/{version:020d}.json"):
                assert provenance.whence(place, table, version)["run_id"] == run["run_id"], f"{table}@{version}"
    return f"whence right for {versions} of {versions} versions of {len(tables)} tables, {len(index)} runs"


def _grow(root: str, rng: random.Random, made: int) -> int:
    """Six ticks, then one to three more, ingested by a run of preprocess; how many there are now."""
    more = rng.randint(1, 3) if made else 6  # two whole minutes, so that each question has an answer
    source.land(Root.at(root), replace(STREAM, next_tick=made), source.make_ticks(STREAM, range(made, made + more)))
    _run("preprocess", root, made)
    return made + more


def _run(stage: str, root: str, minute: int, **values) -> dict:
    project = params.load(PROJECT, "local", [f"{name}={json.dumps(value)}" for name, value in values.items()], stage)
    at = START + timedelta(minutes=minute)
    record = dispatch.run_stage(project.stages[stage], replace(project.environment, root=root), scheduled_for=at)
    assert record.state == "ok", record.reason
    return run_index.get(Root.at(root), record.run_id)


def _rows_of(place: Root, table: str, version: int) -> set[str]:
    """The run_ids in the files that a version added."""
    actions = map(json.loads, place.read(f"{table}/_delta_log/{version:020d}.json").splitlines())
    files = [action["add"]["path"] for action in actions if "add" in action]
    return {name for file in files for name in pl.read_parquet(io.BytesIO(place.read(f"{table}/{file}")))["run_id"]}
