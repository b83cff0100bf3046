"""A log that a power cut left torn is put right from its second copy, or cut back to what was published."""

import os
from pathlib import Path

import pytest
from support import AT, ingest_all

from etl.lake import documents, durability, ingest, ledger
from etl.lake import snapshot as lake
from etl.storage import Root
from pipeline import source
from pipeline.tables import TABLES


def heights(root: str) -> dict[str, int]:
    snapshot = lake.snapshot(root)
    return {table: snapshot.frame(table).collect().height for table in TABLES}


def commit_of(root: str, table: str, version: int | None = None) -> Path:
    newest = lake.open_table(Root.at(root), table).version() if version is None else version
    return Path(root, f"lake/{table}/_delta_log/{newest:020d}.json")


def test_a_lake_that_is_whole_needs_nothing(filled):
    assert durability.repair(filled) == []


@pytest.mark.parametrize("damage", ["", "torn", "flipped", None])
def test_a_published_commit_is_written_again_from_its_copy(filled, damage):
    before, path = heights(filled), commit_of(filled, "orders")
    text = path.read_text()
    if damage is None:
        path.unlink()
    else:
        path.write_text({"": "", "torn": text[:200], "flipped": text.replace('"add"', '"adb"')}[damage])
    (said,) = durability.repair(filled)
    assert said.startswith("orders: commit 1 was ") and "written again from its copy" in said
    assert path.read_text() == text
    assert heights(filled) == before


@pytest.mark.parametrize("damage", [b"", b"torn", b"flipped"])
def test_a_reader_is_refused_what_was_not_written_until_it_is_repaired(filled, damage):
    """An empty commit would be read as one without rows, one with a flipped bit as if it were right."""
    before, path = heights(filled), commit_of(filled, "orders")
    data = path.read_bytes()
    path.write_bytes({b"": b"", b"torn": data[:200], b"flipped": data.replace(b'"numRecords', b'"numRecordt')}[damage])
    with pytest.raises(documents.Damaged, match=f"{path.name} is not what was written: run preprocess"):
        lake.snapshot(filled).frame("orders")
    durability.repair(filled)
    assert heights(filled) == before


def test_a_torn_commit_of_an_unfinished_batch_is_made_again(filled, stream, monkeypatch):
    source.land(filled, stream, source.make_ticks(stream, range(3, 4)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(durability, "seal", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        ingest_all(filled)
    before, path = heights(filled), commit_of(filled, "lineitem")
    path.write_bytes(path.read_bytes()[:-50])
    (said,) = durability.repair(filled)
    assert "of a batch not published yet, was torn: removed" in said
    assert heights(filled) == before
    ingest_all(filled)
    assert heights(filled)["lineitem"] > before["lineitem"]
    assert lake.snapshot(filled).batch == 2


def test_without_a_copy_it_is_refused_and_says_what_to_do(filled):
    path = commit_of(filled, "orders")
    path.write_bytes(b"")
    (copy,) = Path(filled, "lake/kept_log/orders").glob(f"{path.stem}*")
    copy.unlink()
    with pytest.raises(documents.Damaged, match="orders: commit 1 is damaged, and so is its copy: .*rebuild"):
        durability.repair(filled)


def test_a_damaged_checkpoint_is_left_out(root, stream, made):
    for tick in range(22):
        source.land(root, stream, {tick: {"orders": made[1]["orders"].head(1)}})
        ingest_all(root)
    log = Path(root, "lake/orders/_delta_log")
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(documents.Damaged, match="checkpoint.parquet is not what was written"):
        lake.snapshot(root).frame("orders")
    assert durability.repair(root) == ["orders: checkpoint 19 was damaged: removed, the commits before it say the same"]
    Path(log, "_last_checkpoint").write_text("{oops")
    assert durability.repair(root) == ["orders: _last_checkpoint was damaged: removed, the log says the same"]
    assert lake.snapshot(root).frame("orders").collect().height == 22


@pytest.mark.parametrize("half", [lambda rel: rel, documents.copy_of])
def test_a_damaged_manifest_is_written_again(filled, half):
    place, rel = Root.at(filled), ledger.manifest(1)
    whole = place.read(rel)
    place.write(half(rel), whole[:-30])
    assert durability.repair(filled) == [f"{rel} was damaged: written again from its copy"]
    assert (place.read(rel), place.read(documents.copy_of(rel))) == (whole, whole)


def test_what_a_batch_wrote_is_synced_before_its_files_are_archived(landed, monkeypatch):
    """Every data file, its commit and both folders, on the disk before the first file leaves landing."""
    synced, real = [], os.fsync

    def noted(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    archived = []
    monkeypatch.setattr("os.fsync", noted)
    monkeypatch.setattr("etl.lake.landing.archive", lambda *_: archived.append(len(synced)))
    parsed = ingest.read(ingest.next_batch(landed, max_files=500, scheduled_for=AT))
    ingest.commit(parsed, run_id="one")
    snapshot, before = lake.snapshot(landed), set(synced[: archived[0]])
    for table in TABLES:
        folder = f"{landed}/lake/{table}"
        wanted = {f"{folder}/_delta_log/{1:020d}.json", f"{folder}/_delta_log", folder, *snapshot.files(table)}
        assert wanted <= before, wanted - before
