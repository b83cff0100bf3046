"""Backups that are made while everything runs, and roots again from them."""

import json
import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support import ingest_all

from etl.findings import Finding
from etl.lake import backup
from etl.storage import Damaged, LeaseHeld, Root
from pipeline import Lake, source

MANY = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24, "run_id": "compact-1"}


@pytest.fixture
def target(tmp_path) -> Root:
    return Root.at(tmp_path / "a backup, né")


def tables(root: str) -> dict:
    snapshot = Lake(root).snapshot()
    return {
        table: snapshot.frame(table, list(columns)).collect().sort(snapshot.lake.keys[table])
        for table, columns in snapshot.lake.columns.items()
    }


def assert_same(root: str, other: dict) -> None:
    for table, frame in tables(root).items():
        assert_frame_equal(frame, other[table])


def land(root: str, stream, first: int, last: int) -> None:
    source.land(Root.at(root), stream, source.make_ticks(stream, range(first, last)))


def test_a_restored_root_goes_on(scattered, target, tmp_path, stream):
    before, lake = tables(scattered), Lake(scattered)
    Root.at(scattered).write("refused/2026-01-01/orders/x.json~1", b"x")
    Root.at(scattered).write("models/current.json", b"{}")
    Root.at(scattered).write("results/q/current.json", b"{}")
    Root.at(scattered).write("results/q/a.parquet", b"rows")
    Root.at(scattered).write("reports/query/2026-01-01/query-1/report.html", b"page")
    Root.at(scattered).write("reports/query/2026-01-01/query-1/report.ipynb", b"{}")
    made = lake.backup(target)
    assert made.written == len(made.point.files)
    other = str(tmp_path / "another root, né")
    point, moved = Lake(other).restore(target)
    assert (point, moved) == (made.point, [])
    assert_same(other, before)
    assert [finding for finding in Lake(other).examine() if finding.problem] == []
    copied = {*Root.at(other).files("refused"), *Root.at(other).files("reports"), *Root.at(other).files("results")}
    assert {path.rpartition("/")[2] for path in copied} == {"x.json~1", "report.ipynb", "current.json", "a.parquet"}
    assert Root.at(other).names("") == ["lake", "landing", "models", "refused", "reports", "results"]
    land(other, stream, 2, 4)  # tick 2 is known, 3 is new; the stream's memory came along
    land(scattered, stream, 2, 4)
    assert ingest_all(other) == ingest_all(scattered)
    assert Lake(other).snapshot().batch == Lake(scattered).snapshot().batch == point.batch + 1
    assert_same(other, {k: v for k, v in tables(scattered).items() if k != "files"} | {"files": tables(other)["files"]})
    assert not Lake(other).compact(**MANY)["failed"].drop_nulls().to_list()
    assert_same(other, tables(other))


def test_only_what_it_lacks_is_written_and_points_are_kept(filled, target, tmp_path, stream):
    lake, at = Lake(filled), datetime(2026, 3, 1, tzinfo=UTC)
    states = []
    for day in range(4):
        if day:
            land(filled, stream, day + 2, day + 3)
            ingest_all(filled)
        if day == 2:
            lake.compact(**MANY)
        states.append(tables(filled))
        # a clock that jumped ahead, and back again, removes nothing that the next one would not
        made = lake.backup(target, keep=3, now=at + timedelta(days=day if day != 1 else 9000))
        data = [copy.path for copy in made.point.files if copy.path.endswith(".parquet")]
        assert made.removed == (day == 3)
    assert made.written < len(made.point.files)
    assert {f"files/{path}" for path, _ in target.tree("files")} >= {f"files/{path}" for path in data}
    assert [point.number for point in backup.points(target)] == [2, 3, 4]
    first = str(tmp_path / "first")
    point, _ = Lake(first).restore(target, as_of=at + timedelta(days=2))
    assert point.number == 3
    assert_same(first, states[2])
    with pytest.raises(backup.NoBackup):
        Lake(tmp_path / "second").restore(target, as_of=at)
    lake.backup(target, keep=1)
    [last] = backup.points(target)
    assert {copy.stored for copy in last.files} == {
        f"{folder}/{path}"
        for folder in ("files", "points")
        for path, _ in target.tree(folder)
        if not path.endswith(f"{last.name}.json")
    }
    # both folders laid over each other are a root
    by_hand = tmp_path / "by hand"
    shutil.copytree(target.url_of("files"), by_hand)
    shutil.copytree(target.url_of(f"points/{last.name}"), by_hand, dirs_exist_ok=True)
    assert_same(str(by_hand), states[3])


def test_while_batches_and_compactions_go_on(filled, target, tmp_path, stream):
    end, wrong = threading.Event(), []
    ticks = source.make_ticks(stream, range(3, 40))

    def running() -> None:
        try:
            for tick in range(3, 40):
                source.land(Root.at(filled), stream, {tick: ticks[tick]})
                ingest_all(filled)
                if tick % 3 == 0:
                    wrong.extend(Lake(filled).compact(**MANY)["failed"].drop_nulls().to_list())
                if end.is_set():
                    return
        except Exception as error:
            wrong.append(repr(error))

    thread = threading.Thread(target=running)
    thread.start()
    made = [Lake(filled).backup(target) for _ in range(4)]
    end.set()
    thread.join()
    assert wrong == []
    everything = tables(filled)
    for number, one in enumerate(made):
        root = str(tmp_path / f"restored-{number}")
        Lake(root).restore(target, as_of=None) if number == 3 else _restore(root, target, one.point)
        files = tables(root)["files"]
        expected = {t: f for t, f in everything.items() if t in ("orders", "lineitem")}
        assert files["batch"].max() == one.point.batch == Lake(root).snapshot().batch
        # what came later is landed again: known files are told from new ones
        land(root, stream, 0, int(everything["files"]["batch"].max()) + 2)
        while batch := Lake(root).next_batch(max_files=500, scheduled_for=None):
            Lake(root).commit(Lake(root).read(batch), run_id="preprocess-2")
        for table, frame in expected.items():
            assert_frame_equal(tables(root)[table], frame)


def _restore(root: str, target: Root, point: backup.Point) -> None:
    """The point, by its number: those of a second have the same time."""
    folder = Path(root).parent / f"only-{point.number}"
    shutil.copytree(target.url, folder)
    for other in backup.points(Root.at(folder)):
        if other.number > point.number:
            (folder / "points" / f"{other.name}.json").unlink()
    Lake(root).restore(Root.at(folder))


def test_where_there_is_a_lake_nothing_is_changed_unless_it_may_be_moved(filled, target, stream):
    before = tables(filled)
    Lake(filled).backup(target)
    land(filled, stream, 3, 4)
    ingest_all(filled)
    after = tables(filled)
    with pytest.raises(backup.NotEmpty, match="has lake already"):
        Lake(filled).restore(target)
    assert_same(filled, after)
    _, [moved] = Lake(filled).restore(target, force=True)
    assert_same(filled, before)
    assert Path(filled, moved, "published.json").exists()
    assert not Path(filled, "restoring").exists()
    # what had come since is in the archive: landed again it is ingested once
    for path, _ in Root.at(filled).tree("archive"):
        Root.at(filled).move(f"archive/{path}", f"landing/{path.partition('/')[2]}")
    ingest_all(filled)
    assert_same(filled, {**after, "files": tables(filled)["files"]})


def test_what_is_damaged_is_named_and_nothing_is_changed(filled, target, tmp_path):
    made = Lake(filled).backup(target)
    data = next(copy for copy in made.point.files if copy.path.startswith("lake/orders/") and "_log" not in copy.path)
    whole = target.read(data.stored)
    target.write(data.stored, whole[:-1] + b"x")
    with pytest.raises(Damaged, match="has not the sha256"):
        Lake(tmp_path / "other").restore(target)
    assert not (tmp_path / "other" / "lake").exists()
    with pytest.raises(Damaged, match="has not the sha256"):
        Lake(filled).backup(target, verify=True)
    target.write(data.stored, whole[:-1])  # a size tells by itself, and it is written again
    assert Lake(filled).backup(target).written > 0
    Lake(tmp_path / "other").restore(target)
    assert_same(str(tmp_path / "other"), tables(filled))


def test_a_backup_is_refused_in_words(filled, root, target, tmp_path):
    with pytest.raises(LookupError, match="nothing is published"):
        Lake(tmp_path / "nothing").backup(target)
    with pytest.raises(ValueError, match="would be lost with it"):
        Lake(filled).backup(Root.at(f"{filled}/backup"))
    with pytest.raises(backup.NoBackup, match="there is no backup"):
        Lake(tmp_path / "nothing").restore(target)
    target.make()
    with target.lease(backup.LEASE, "another"), pytest.raises(LeaseHeld):
        Lake(filled).backup(target)


def test_doctor_tells_how_old_the_newest_backup_is(filled, target):
    def told() -> list[Finding]:
        return [finding for finding in Lake(filled).examine() if "backup" in finding.what]

    assert told() == []
    Lake(filled).backup(target, now=datetime.now(UTC) - timedelta(days=2, hours=3))
    [finding] = told()
    assert finding.problem == "it is 2 days and 3 hours old"
    assert target.url in finding.remedy
    Lake(filled).backup(target)
    [finding] = told()
    assert finding.problem is None
    notes = json.loads(Path(filled, backup.NOTE).read_bytes())["backups"]
    assert notes.keys() == {target.url}
    assert backup._without_credentials("s3://key:secret@bucket/a") == "s3://bucket/a"


def test_to_and_from_an_object_store(filled, s3_root, tmp_path, stream):
    target, lake = Root.at(f"{s3_root}/backup"), Lake(filled)
    before = tables(filled)
    lake.backup(target)
    assert lake.backup(target).written < 40  # the logs
    there = f"{s3_root}/a root"
    Lake(there).restore(target)
    assert_same(there, before)
    land(there, stream, 3, 4)
    ingest_all(there)
    second = Root.at(tmp_path / "second")
    Lake(there).backup(second)
    Lake(tmp_path / "back").restore(second)
    assert_same(str(tmp_path / "back"), tables(there))
    with pytest.raises(backup.NotEmpty):
        Lake(there).restore(target)
    Lake(there).restore(target, force=True)
    assert_same(there, before)
