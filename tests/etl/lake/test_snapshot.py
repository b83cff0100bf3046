"""The snapshot is the one way to read, and every commit says who made it."""

import json
from pathlib import Path

import polars as pl
import pytest
from support import AT, ingest_all

from etl.lake import ingest
from etl.lake import snapshot as lake
from etl.storage import Damaged, Root
from pipeline import source
from pipeline.tables import TABLES


def test_before_the_first_batch_it_says_what_to_do(root):
    assert not lake.is_published(root)
    with pytest.raises(lake.NothingPublished, match="run generate, then preprocess"):
        lake.snapshot(root)


def test_a_snapshot_names_batch_time_and_versions(filled, made):
    snapshot = lake.snapshot(filled)
    assert snapshot.batch == 1
    assert snapshot.as_of == max(frames["orders"]["o_order_time"].max() for frames in made.values())
    assert set(snapshot.versions) == set(lake.COLUMNS)
    assert snapshot.rows().filter(table="orders")["rows"][0] == snapshot.frame("orders").collect().height


def test_a_snapshot_stays_as_it_was(filled):
    before = lake.snapshot(filled)
    height = before.frame("orders").collect().height
    place = Root.at(filled)
    one = before.frame("orders", list(lake.COLUMNS["orders"])).collect().head(1)
    lake.append(place, "orders", lake.encode("orders", one), batch=2, run_id="x", after=before.versions["orders"])
    assert before.frame("orders").collect().height == height
    assert lake.snapshot(filled).frame("orders").collect().height == height


def test_a_batch_is_appended_once_and_another_writers_version_is_not_taken(filled, monkeypatch):
    """Also by a writer that looked before the other had committed."""
    place, before = Root.at(filled), lake.snapshot(filled)
    one = before.frame("orders", list(lake.COLUMNS["orders"])).collect().head(1)
    ask = {"rows": lake.encode("orders", one), "run_id": "x", "after": before.versions["orders"]}
    version = lake.append(place, "orders", batch=2, **ask)
    assert lake.append(place, "orders", batch=2, **ask) == version
    heads = iter([(before.versions["orders"], 0)])  # what it saw then; after that, what is there
    head = lake.head
    monkeypatch.setattr(lake, "head", lambda *asked: next(heads, None) or head(*asked))
    assert lake.append(place, "orders", batch=2, **ask) == version
    assert lake.open_table(place, "orders").version() == version
    assert lake.last_batch(place, "orders") == 2
    written = [path.name for path in Path(filled, "lake/orders").glob("batch-00000002-*")]
    named = [url.rsplit("/", 1)[-1] for url in lake.open_table(place, "orders").file_uris()]
    assert len(written) == 2 and len({*written} & {*named}) == 1  # the second's goes a day later


def test_every_twentieth_version_has_a_checkpoint_that_delta_reads(filled):
    place, before = Root.at(filled), lake.snapshot(filled)
    one = before.frame("orders", list(lake.COLUMNS["orders"])).collect().head(1)
    rows, height = lake.encode("orders", one), before.frame("orders").collect().height
    for batch in range(2, 22):
        version = lake.append(place, "orders", rows, batch=batch, run_id="x", after=before.versions["orders"])
    log = Path(filled, "lake/orders/_delta_log")
    assert [path.name for path in log.glob("*.parquet")] == [f"{19:020d}.checkpoint.parquet"]
    for commit in log.glob("*[0-9].json"):
        if int(commit.stem) < 19:
            commit.unlink()
    handle = lake.open_table(place, "orders")
    assert (handle.version(), handle.transaction_version(lake.APP_ID)) == (version, 21)
    assert lake.file_stats(handle)[1] == height + 20


def test_columns_are_read_in_the_order_asked(filled):
    assert lake.snapshot(filled).frame("orders", ["o_custkey", "o_orderkey"]).collect().columns == [
        "o_custkey",
        "o_orderkey",
    ]


def test_every_commit_carries_run_and_stage(landed):
    ingest_all(landed, "preprocess-20260301T120010-abc123")
    for table in lake.COLUMNS:
        for commit in lake.open_table(Root.at(landed), table).history():
            assert (commit["run_id"], commit["stage"]) == ("preprocess-20260301T120010-abc123", "preprocess")


def test_a_pinned_root_reads_the_versions_of_another(filled, tmp_path, stream):
    before = lake.snapshot(filled)
    pinned = {
        "source_root": filled,
        "batch": before.batch,
        "as_of": before.as_of.isoformat(),
        "tables": before.versions,
        "run_id": before.run_id,
    }
    scratch = str(tmp_path / "scratch")
    assert not lake.is_published(scratch)
    Root.at(scratch).write(lake.PINNED, json.dumps(pinned).encode())
    source.land(filled, stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(filled)
    assert lake.snapshot(filled).batch == 2
    assert lake.is_published(scratch)
    assert lake.snapshot(scratch) == before


def test_a_key_is_never_null(filled):
    orders = lake.snapshot(filled).frame("orders", list(lake.COLUMNS["orders"])).collect().head(1)
    orders = orders.with_columns(o_orderkey=pl.lit(None, pl.Int64))
    with pytest.raises(ValueError, match="orders: o_orderkey may not be null"):
        lake.encode("orders", orders)


def test_types_in_the_lake_are_those_of_the_tables(filled):
    for table, spec in TABLES.items():
        assert lake.snapshot(filled).frame(table).collect_schema() == pl.Schema(spec.columns)


@pytest.mark.parametrize("damage", [b"", b'{"batch": 1', b"\x00" * 40, b"[]", b"{}"])
def test_a_damaged_pointer_is_refused_by_name(filled, damage):
    Root.at(filled).write(lake.PUBLISHED, damage)
    for ask in (lake.snapshot, lake.is_published, lambda root: ingest.next_batch(root, max_files=9, scheduled_for=AT)):
        with pytest.raises(Damaged, match="lake/published.json is damaged"):
            ask(filled)


def test_no_batch_is_begun_where_the_pointer_is_gone(filled):
    """Or every name would be new again."""
    Root.at(filled).remove(lake.PUBLISHED)
    with pytest.raises(Damaged, match="lake/published.json is gone"):
        ingest.next_batch(filled, max_files=9, scheduled_for=AT)
