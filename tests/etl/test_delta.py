"""What we write of a Delta log by hand is what delta-rs would write, and on the disk when it should be."""

import io
import json
import os
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable, Schema, write_deltalake
from support import AT, ingest_all

from etl import delta
from etl.lake import commit as commits
from etl.storage import Damaged, Root
from pipeline import Lake, source
from pipeline.tables import TABLES


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The paths of all that is synced from now on."""
    paths, real = [], os.fsync

    def noted(descriptor):
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    return paths


def test_a_table_is_as_delta_rs_would_make_it(root, tmp_path):
    lake = Lake(root)
    commits.create_tables(lake, "x")
    commits.create_tables(lake, "y")
    for name, columns in lake.columns.items():
        arrow = pl.DataFrame(schema=columns).to_arrow().schema
        for at, field in enumerate(arrow):
            arrow = arrow.set(at, field.with_nullable(field.name not in lake.required[name]))
        theirs = DeltaTable.create(
            str(tmp_path / name), Schema.from_arrow(arrow), name=name, configuration=delta.PROPERTIES
        )
        ours = lake.table(name)
        assert ours.schema() == theirs.schema()
        assert (ours.protocol(), ours.version()) == (theirs.protocol(), 0)
        assert ours.metadata().configuration == theirs.metadata().configuration == delta.PROPERTIES
        assert ours.history()[0]["run_id"] == "x"


def test_a_checkpoint_goes_on_from_the_one_before(filled):
    """Also where the log is cut off before that; what it says is what delta-rs reads, and what its own would say."""
    lake = Lake(filled)
    before = lake.snapshot()
    one = before.frame("orders", list(lake.columns["orders"])).collect().head(1)
    rows, height = commits.encode(lake, "orders", one), before.frame("orders").collect().height
    log = Path(filled, "lake/orders/_delta_log")
    for batch in range(2, 41):
        commits.append(lake, "orders", rows, batch=batch, run_id="x", after=max(batch - 2, 1))
        if batch == 30:
            for commit in log.glob("*[0-9].json"):
                if int(commit.stem) < 19:
                    commit.unlink()
    assert sorted(path.name[:20] for path in log.glob("*.parquet")) == [f"{19:020d}", f"{39:020d}"]
    assert json.loads((log / "_last_checkpoint").read_text())["version"] == 39
    data = (log / f"{39:020d}.checkpoint.parquet").read_bytes()
    lake.table("orders", 39).create_checkpoint()
    ours, theirs = (
        pl.read_parquet(io.BytesIO(d)) for d in (data, (log / f"{39:020d}.checkpoint.parquet").read_bytes())
    )
    added = [frame["add"].struct.field("path").drop_nulls().sort().to_list() for frame in (ours, theirs)]
    assert added[0] == added[1] and len(added[0]) == 39
    for commit in log.glob("*[0-9].json"):
        if int(commit.stem) < 39:
            commit.unlink()
    handle = lake.table("orders")
    assert (handle.version(), handle.transaction_version(commits.APP_ID)) == (40, 40)
    assert delta.file_stats(handle)[1] == height + 39


def test_what_a_batch_wrote_is_synced_before_its_files_are_archived(landed, synced, monkeypatch):
    """Every data file, its commit and both folders, on the disk before the first file leaves landing."""
    archived = []
    monkeypatch.setattr("etl.lake.landing.archive", lambda *_: archived.append(len(synced)))
    parsed = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT))
    Lake.commit(parsed, run_id="one")
    snapshot, before = Lake(landed).snapshot(), set(synced[: archived[0]])
    for table in TABLES:
        folder = f"{landed}/lake/{table}"
        names = {os.path.basename(path): path for path in snapshot.files(table)}
        assert {f"{folder}/_delta_log", folder} <= before
        assert len(names) == 1  # a file is synced under the name that it has until then
        assert [path for path in before if path.startswith(f"{folder}/.")]
        assert [path for path in before if path.startswith(f"{folder}/_delta_log/.")]


def test_what_others_committed_is_synced_before_it_is_published(filled, stream, synced):
    before = Lake(filled).snapshot()
    rows = before.frame("orders", list(Lake(filled).columns["orders"])).collect().head(1)
    write_deltalake(f"{filled}/lake/orders", rows, mode="append")
    (theirs,) = {*Lake(filled).table("orders").file_uris()} - {*before.files("orders")}
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(filled)
    commit = f"{filled}/lake/orders/_delta_log/{before.versions['orders'] + 1:020d}.json"
    assert {theirs, commit} <= set(synced)
    assert not [path for path in synced if "lineitem/_delta_log/0" in path]  # nothing that is ours a second time


@pytest.mark.parametrize("damage", [b'{"add": {"pa', b"\x00" * 40, b"[1]"])
def test_a_commit_that_is_none_is_named(filled, damage):
    path = Path(filled, f"lake/orders/_delta_log/{1:020d}.json")
    path.write_bytes(damage)
    with pytest.raises(Damaged, match=f"lake/orders/_delta_log/{1:020d}.json is damaged"):
        delta.actions(Root.at(filled), "lake/orders", 1)
