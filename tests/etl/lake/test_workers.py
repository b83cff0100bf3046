"""A batch that Dask's workers read is what this process makes of it: rows, reasons, refused files, ledger."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from threading import Timer
from typing import ClassVar

import polars as pl
import pytest
from distributed import Client, LocalCluster
from polars.testing import assert_frame_equal

from etl import clusters
from etl import lake as lakes
from etl.lake import commit as commits
from etl.lake import workers
from etl.lake.table import INT, TEXT, TIME, Column, Table

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)

EMPTY = {
    "n_workers": 0,
    "processes": False,
    "protocol": "tcp://",
    "host": "127.0.0.1",
    "dashboard_address": "127.0.0.1:0",
}


class Lake(lakes.Lake):
    tables: ClassVar = {
        "event": Table("event", {"id": INT, "name": TEXT, "at": TIME}, key=("id",), time="at", partition_by="name"),
        "plain": Table("plain", {"id": INT, "note": Column(TEXT, nullable=True)}, key=("id",)),
        "last": Table("last", {"id": INT, "value": INT}, key=("id",), mode="upsert", on_duplicate="keep"),
    }


@pytest.fixture(scope="module")
def client(cluster):
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        yield client


def lines(rows: list) -> bytes:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def fill(lake: Lake, further: int = 0) -> None:
    if further:
        for number in range(6):
            row = {"id": 9000 + further, "name": f"n{number % 2}", "at": AT.isoformat()}
            lake.root.write(
                f"landing/event/{further}-{number}.json", lines([row | {"id": 9000 + 10 * further + number}])
            )
        lake.root.write(f"landing/plain/{further}.json", lines([{"id": n, "note": str(further)} for n in range(50)]))
        lake.root.write(f"landing/last/{further}.json", lines([{"id": n, "value": further} for n in range(5)]))
        return
    for number in range(6):
        rows = [{"id": n, "name": f"n{n % 2}", "at": AT.isoformat()} for n in range(100 * number, 100 * number + 90)]
        lake.root.write(f"landing/event/{number}.json", lines(rows))
    lake.root.write("landing/event/copy.json", lake.root.read("landing/event/3.json"))
    lake.root.write("landing/event/damaged.json.gz", b"\x1f\x8b nothing")
    lake.root.write("landing/plain/bad.json", lines([{"id": 1}, "no", "json"]))
    odd = [{"id": n, "note": "x" * 90, **({"more": 1} if n == 700 else {})} for n in range(2000)]
    odd[500], odd[1700] = "not json", '{"id": "text"}'
    lake.root.write("landing/plain/large.json", b"\xef\xbb\xbf" + lines([*odd[:900], "", *odd[900:]]))
    lake.root.write(
        "landing/plain/array.json", json.dumps([{"id": n, "note": "y" * 99} for n in range(3000, 5000)]).encode()
    )
    for number in range(2):
        lake.root.write(f"landing/last/{number}.json", lines([{"id": n, "value": number} for n in range(9)]))


def batch_of(lake: Lake):
    return lake.next_batch(max_files=99, scheduled_for=AT.isoformat())


def state(lake: Lake) -> list[pl.DataFrame]:
    snapshot = lake.snapshot()
    tables = [snapshot.frame(table).collect() for table in ("event", "plain", "last", "quarantine")]
    ledger = snapshot.frame("files").collect().drop("at")
    refused = [(rel, lake.root.read(rel)) for rel in lake.root.files("refused") if not rel.endswith(".why.json")]
    why = [
        (rel, json.loads(lake.root.read(rel))["why"]) for rel in lake.root.files("refused") if rel.endswith(".why.json")
    ]
    archived = lake.root.files("archive")
    every = (*refused, *why, *archived, snapshot.batch, snapshot.as_of)
    told = pl.DataFrame({"told": [re.sub(r"~\w{8}", "", str(each)) for each in every]})  # of a refused file's inode
    return [frame.sort(frame.columns) for frame in (*tables, ledger, told)]


def test_workers_make_the_same_of_a_batch(tmp_path, client, monkeypatch):
    monkeypatch.setattr(workers, "TASK_BYTES", 40_000)
    states = []
    for name, dask in (("here", None), ("there", client)):
        fill(lake := Lake(tmp_path / name))
        parsed = lake.read(batch_of(lake), max_bad_share=0.01, dask=dask)
        assert (parsed.heights, parsed.rescued, parsed.rows) == ({"event": 540, "plain": 3998, "last": 9}, 1, 4558)
        assert {*parsed.written} == ({"event", "plain"} if dask else set())
        summary = lake.summary(parsed, lake.commit(parsed, run_id="r")).drop("unfit")
        states.append((*state(lake), summary, parsed.files.sort("file"), parsed.unfit))
    for here, there in zip(*states, strict=True):
        assert_frame_equal(here, there)
    assert len(lake.snapshot().files("plain")) > 3  # the large file was cut


def test_workers_compact_to_the_same_files(tmp_path, client, monkeypatch):
    done = []
    asked = {"target_mb": 1, "min_small_files": 2, "vacuum_hours": 24, "run_id": "c"}
    for name, dask in (("here", None), ("there", client)):
        lake = Lake(tmp_path / name)
        for number in range(3):
            fill(lake, number)
            lake.commit(lake.read(batch_of(lake)), run_id="r")
        if dask:  # nothing is rewritten here
            monkeypatch.setattr("etl.lake.sorting.look", None)
        made = lake.compact(**asked, dask=dask)
        monkeypatch.undo()
        files = [pl.DataFrame(lake.table(t).get_add_actions(flatten=True)) for t in ("event", "plain", "last")]
        rows = [frame.drop("path", "modification_time").sort(pl.all()) for frame in files]
        done.append((*state(lake)[:5], made.drop("mb_before", "mb_after"), *rows))
    for here, there in zip(*done, strict=True):
        assert_frame_equal(here, there)
    assert made["failed"].null_count() == made.height and sum(made["files_before"]) > sum(made["files_after"])


def test_a_batch_that_workers_read_is_finished_without_them(tmp_path, bare_cluster, monkeypatch):
    """They do not have the project: its code comes with what they are asked."""
    fill(lake := Lake(tmp_path))
    parsed = lake.read(batch_of(lake), dask=bare_cluster)

    def die(name: str) -> None:
        if name == "after the commit: event":
            raise KeyboardInterrupt

    monkeypatch.setattr("etl.lake.ingest.crash_point", die)
    with pytest.raises(KeyboardInterrupt):
        lake.commit(parsed, run_id="r")
    monkeypatch.undo()
    assert commits.last_batch(lake, "event") == 1
    lake.commit(lake.read(batch_of(lake)), run_id="again")
    lake.commit(lake.read(batch_of(lake), dask=bare_cluster), run_id="next")  # what was refused and not moved
    assert lake.snapshot().frame("event").collect().height == 540
    assert batch_of(lake) is None


def test_a_batch_below_the_bound_is_read_here(tmp_path, client):
    fill(lake := Lake(tmp_path))
    assert not lake.read(batch_of(lake), dask=client, dask_above_mb=1).written


def test_workers_that_do_not_see_the_root_refuse_no_file(tmp_path, client, monkeypatch):
    fill(lake := Lake(tmp_path))
    elsewhere = Lake(tmp_path / "elsewhere").root

    def submit(at, call, asked, *rest):
        return clusters.submit(at, call, replace(asked, root=elsewhere), *rest)

    monkeypatch.setattr(workers, "submit", submit)
    with pytest.raises(workers.Unseen, match="do not see .*landing/"):
        lake.read(batch_of(lake), dask=client)
    assert not lake.root.files("refused")


def test_a_file_that_changes_while_it_is_read_in_stretches_is_read_again(tmp_path, client, monkeypatch):
    monkeypatch.setattr(workers, "TASK_BYTES", 10_000)
    lake = Lake(tmp_path)
    lake.root.write("landing/plain/large.json", lines([{"id": n, "note": "x" * 90} for n in range(1000)]))
    batch, joined = batch_of(lake), workers._joined

    def changed(*asked):
        lake.root.write("landing/plain/large.json", lines([{"id": n, "note": "y" * 90} for n in range(1000)]))
        return joined(*asked)

    monkeypatch.setattr(workers, "_joined", changed)
    parsed = lake.read(batch, dask=client)
    lake.commit(parsed, run_id="r")
    rows = lake.snapshot().frame("plain").collect()
    assert (rows.height, rows["note"].unique().to_list()) == (1000, ["y" * 90])


def test_the_first_worker_of_a_cluster_is_waited_for(caplog):
    with LocalCluster(**EMPTY) as late, clusters.connected(late.scheduler_address) as client:
        Timer(0.3, late.scale, [1]).start()
        assert clusters.submit(client, json.dumps, [1]).result() == "[1]"
    said = [record.getMessage() for record in caplog.records if record.name == "etl.clusters"]
    assert said == [f"the Dask scheduler at {late.scheduler_address} has no worker; waiting for one for 180 s"]


def test_a_cluster_without_workers_is_an_error_and_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "WORKER_S", 0.2)
    lake = Lake(tmp_path)
    fill(lake)
    with LocalCluster(**EMPTY) as never, pytest.raises(OSError, match=r"had no worker for 0.2 s$"):
        lake.read(batch_of(lake), dask=never.scheduler_address, dask_above_mb=0)
