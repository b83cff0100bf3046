"""Backups that are made while everything runs, and roots again from them."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support import ingest_all

from etl.findings import Finding
from etl.lake import backup
from etl.leases import LeaseHeld
from etl.storage import Damaged, Root
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


def land(root: str, made, *numbers: int) -> None:
    """A few rows in files of these numbers, under keys that no other number has."""
    for number in numbers:
        orders = made[1]["orders"].head(5)
        lines = made[1]["lineitem"].filter(pl.col("l_orderkey").is_in(orders["o_orderkey"].to_list()))
        frames = {"orders": orders.with_columns(pl.col("o_orderkey") + number * 10**7)}
        frames["lineitem"] = lines.with_columns(pl.col("l_orderkey") + number * 10**7)
        for table, frame in frames.items():
            Root.at(root).write(source.file_name(table, number), source.to_json_lines(frame))


def test_a_restored_root_goes_on(scattered, target, tmp_path, stream, made):
    before, lake = tables(scattered), Lake(scattered)
    Root.at(scattered).write("refused/2026-01-01/orders/x.json~1", b"x")
    Root.at(scattered).write("models/current.json", b"{}")
    Root.at(scattered).write("results/q/current.json", b"{}")
    Root.at(scattered).write("results/q/a.parquet", b"rows")
    Root.at(scattered).write("results/q/portion/all.parquet", b"made again")
    Root.at(scattered).write("reports/query/2026-01-01/query-1/report.html", b"page")
    Root.at(scattered).write("reports/query/2026-01-01/query-1/report.ipynb", b"{}")
    copied = lake.backup(target)
    assert copied.written == len(copied.point.files)
    other = str(tmp_path / "another root, né")
    point, moved = Lake(other).restore(target)
    assert (point, moved) == (copied.point, [])
    assert_same(other, before)
    assert [finding for finding in Lake(other).examine() if finding.problem] == []
    beside = {*Root.at(other).files("refused"), *Root.at(other).files("reports"), *Root.at(other).files("results")}
    assert {path.rpartition("/")[2] for path in beside} == {"x.json~1", "report.ipynb", "current.json", "a.parquet"}
    assert Root.at(other).names("") == ["lake", "landing", "leases", "models", "refused", "reports", "results"]
    for each in (other, scattered):
        source.land(Root.at(each), stream, {2: made[2]})  # known
        land(each, made, 3)
    assert ingest_all(other) == ingest_all(scattered)
    assert Lake(other).snapshot().batch == Lake(scattered).snapshot().batch == point.batch + 1
    assert_same(other, {k: v for k, v in tables(scattered).items() if k != "files"} | {"files": tables(other)["files"]})
    assert not Lake(other).compact(**MANY)["failed"].drop_nulls().to_list()
    assert_same(other, tables(other))


def test_only_what_it_lacks_is_written_and_points_are_kept(filled, target, tmp_path, made):
    lake, at = Lake(filled), datetime(2026, 3, 1, tzinfo=UTC)
    states = []
    for day in range(4):
        if day:
            land(filled, made, day + 2)
            ingest_all(filled)
        if day == 2:
            lake.compact(**MANY)
        states.append(tables(filled))
        # a clock that jumped ahead, and back again, removes nothing that the next one would not
        done = lake.backup(target, keep=3, now=at + timedelta(days=day if day != 1 else 9000))
        data = [copy.path for copy in done.point.files if copy.stored.startswith("files/")]
        assert done.removed == (day == 3)
    assert done.written < len(done.point.files)
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


def test_where_there_is_a_lake_nothing_is_changed_unless_it_may_be_moved(filled, target, made):
    before = tables(filled)
    Lake(filled).backup(target)
    land(filled, made, 3)
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


def test_to_and_from_an_object_store(filled, s3_root, tmp_path, made):
    target, lake = Root.at(f"{s3_root}/backup"), Lake(filled)
    before = tables(filled)
    lake.backup(target)
    assert lake.backup(target).written < 40  # the logs
    there = f"{s3_root}/a root"
    Lake(there).restore(target)
    assert_same(there, before)
    land(there, made, 3)
    ingest_all(there)
    second = Root.at(tmp_path / "second")
    Lake(there).backup(second)
    Lake(tmp_path / "back").restore(second)
    assert_same(str(tmp_path / "back"), tables(there))
    with pytest.raises(backup.NotEmpty):
        Lake(there).restore(target)
    Lake(there).restore(target, force=True)
    assert_same(there, before)
