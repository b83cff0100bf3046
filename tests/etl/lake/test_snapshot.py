"""The snapshot is the one way to read, and every commit says who made it."""

import json
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support import AT, ingest_all

from etl import delta
from etl.lake import NothingPublished
from etl.lake import commit as commits
from etl.lake import snapshot as snapshots
from etl.storage import Damaged, Root
from pipeline import Lake, source
from pipeline.tables import TABLES


def test_before_the_first_batch_it_says_what_to_do(root):
    assert Lake(root).published() is None
    with pytest.raises(NothingPublished, match="nothing is published under .*: run all stages once"):
        Lake(root).snapshot()


def test_a_snapshot_names_batch_time_and_versions(filled, made):
    snapshot = Lake(filled).snapshot()
    assert snapshot.batch == 1
    assert snapshot.as_of == max(frames["orders"]["o_order_time"].max() for frames in made.values())
    assert set(snapshot.versions) == set(Lake(filled).columns)
    assert snapshot.rows().filter(table="orders")["rows"][0] == snapshot.frame("orders").collect().height
    assert {*snapshot.rows()["table"]} - {*snapshot.rows(Lake(filled).tables)["table"]} == {"files", "quarantine"}


def test_a_snapshot_stays_as_it_was(filled):
    lake = Lake(filled)
    before = lake.snapshot()
    height = before.frame("orders").collect().height
    one = before.frame("orders", list(lake.columns["orders"])).collect().head(1)
    rows = commits.encode(lake, "orders", one)
    commits.append(lake, "orders", rows, batch=2, run_id="x", after=before.versions["orders"])
    assert before.frame("orders").collect().height == height
    assert Lake(filled).snapshot().frame("orders").collect().height == height


def test_a_batch_is_appended_once_and_another_writers_version_is_not_taken(filled, monkeypatch):
    """Also by a writer that looked before the other had committed."""
    lake = Lake(filled)
    before = lake.snapshot()
    one = before.frame("orders", list(lake.columns["orders"])).collect().head(1)
    ask = {"rows": commits.encode(lake, "orders", one), "run_id": "x", "after": before.versions["orders"]}
    version = commits.append(lake, "orders", batch=2, **ask)
    assert commits.append(lake, "orders", batch=2, **ask) == version
    heads = iter([(before.versions["orders"], 0)])  # what it saw then; after that, what is there
    head = commits.head
    monkeypatch.setattr(commits, "head", lambda *asked: next(heads, None) or head(*asked))
    assert commits.append(lake, "orders", batch=2, **ask) == version
    assert lake.table("orders").version() == version
    assert commits.last_batch(lake, "orders") == 2
    written = [path.name for path in Path(filled, "lake/orders").glob("batch-00000002-*")]
    named = [url.rsplit("/", 1)[-1] for url in lake.table("orders").file_uris()]
    assert len(written) == 2 and len({*written} & {*named}) == 1  # the second's goes a day later


def test_every_twentieth_version_has_a_checkpoint_that_delta_reads(filled):
    lake = Lake(filled)
    before = lake.snapshot()
    one = before.frame("orders", list(lake.columns["orders"])).collect().head(1)
    rows, height = commits.encode(lake, "orders", one), before.frame("orders").collect().height
    for batch in range(2, 22):
        version = commits.append(lake, "orders", rows, batch=batch, run_id="x", after=before.versions["orders"])
    log = Path(filled, "lake/orders/_delta_log")
    assert [path.name for path in log.glob("*.parquet")] == [f"{19:020d}.checkpoint.parquet"]
    for commit in log.glob("*[0-9].json"):
        if int(commit.stem) < 19:
            commit.unlink()
    handle = lake.table("orders")
    assert (handle.version(), handle.transaction_version(commits.APP_ID)) == (version, 21)
    assert delta.file_stats(handle)[1] == height + 20


def test_columns_are_read_in_the_order_asked(filled):
    assert Lake(filled).snapshot().frame("orders", ["o_custkey", "o_orderkey"]).collect().columns == [
        "o_custkey",
        "o_orderkey",
    ]


def test_every_commit_carries_run_and_stage(landed):
    ingest_all(landed, "preprocess-20260301T120010-abc123")
    for table in Lake(landed).columns:
        for commit in Lake(landed).table(table).history():
            assert (commit["run_id"], commit["stage"]) == ("preprocess-20260301T120010-abc123", "preprocess")


def test_a_pinned_root_reads_the_versions_of_another(filled, tmp_path, stream):
    before = Lake(filled).snapshot()
    pinned = {
        "source_root": filled,
        "batch": before.batch,
        "as_of": before.as_of.isoformat(),
        "tables": before.versions,
        "run_id": before.run_id,
    }
    scratch = str(tmp_path / "scratch")
    assert Lake(scratch).published() is None
    Root.at(scratch).write(snapshots.PINNED, json.dumps(pinned).encode())
    source.land(Root.at(filled), stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(filled)
    assert Lake(filled).snapshot().batch == 2
    assert Lake(scratch).published() is not None
    assert Lake(scratch).snapshot() == before


def test_a_key_is_never_null(filled):
    orders = Lake(filled).snapshot().frame("orders", list(Lake(filled).columns["orders"])).collect().head(1)
    orders = orders.with_columns(o_orderkey=pl.lit(None, pl.Int64))
    with pytest.raises(ValueError, match="orders: o_orderkey may not be null"):
        commits.encode(Lake(filled), "orders", orders)


def test_types_in_the_lake_are_those_of_the_tables(filled):
    for table, spec in TABLES.items():
        assert Lake(filled).snapshot().frame(table).collect_schema() == pl.Schema(spec.types)


@pytest.mark.parametrize("damage", [b"", b'{"batch": 1', b"\x00" * 40, b"[]", b"{}"])
def test_a_damaged_pointer_is_refused_by_name(filled, damage):
    Root.at(filled).write(snapshots.POINTER, damage)
    lake = Lake(filled)
    for ask in (lake.snapshot, lake.published, lambda: lake.next_batch(max_files=9, scheduled_for=AT)):
        with pytest.raises(Damaged, match="lake/published.json is damaged"):
            ask()


def test_no_batch_is_begun_where_the_pointer_is_gone(filled):
    """Or every name would be new again."""
    Root.at(filled).remove(snapshots.POINTER)
    with pytest.raises(Damaged, match="lake/published.json is gone"):
        Lake(filled).next_batch(max_files=9, scheduled_for=AT)


def test_rows_in_pieces_are_those_of_the_frame(filled):
    lake = Lake(filled)
    snapshot, columns = lake.snapshot(), ["l_orderkey", "l_linenumber", "l_quantity"]
    every = snapshot.frame("lineitem", columns).collect().sort(columns)
    pieces = [*snapshot.pieces("lineitem", columns, most=1_000)]
    assert len(pieces) > every.height // 1_000 and max(piece.height for piece in pieces) == 1_000
    assert_frame_equal(pl.concat(pieces).sort(columns), every)
    few = pl.col("l_discount") > 0.08  # of a column that is not read
    expected = snapshot.frame("lineitem").filter(few).select(columns).collect().sort(columns)
    assert 0 < expected.height < every.height
    assert_frame_equal(pl.concat(snapshot.pieces("lineitem", columns, where=few)).sort(columns), expected)
    assert not [*snapshot.pieces("lineitem", columns, where=pl.col("l_discount") > 1)]
