"""A lake that begins as another one is: what happens there, and that nothing of it happens to the other."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import polars as pl
import pytest

from etl import lake as lakes
from etl.lake import branch
from etl.lake.table import INT, TEXT, TIME, Column, Table
from etl.storage import Damaged

START = datetime(2026, 3, 1, tzinfo=UTC)
EVENT = Table("event", {"id": INT, "what": Column(TEXT, nullable=True)}, key=("id",), partition_by="what")
USER = Table(
    "user", {"id": INT, "plan": TEXT, "at": TIME}, key=("id",), mode="upsert", order_by="at", on_duplicate="newest"
)
LOG = Table("log", {"text": TEXT}, key=(), on_duplicate="keep")
ASKED = {"max_files": 99, "max_bytes": 10**8, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": None}
COMPACT = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24}


class Lake(lakes.Lake):
    tables: ClassVar = {"event": EVENT, "user": USER, "log": LOG}


def land(lake: lakes.Lake, path: str, *rows: dict) -> None:
    lake.root.write(f"landing/{path}", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def user(number: int, minute: int, plan: str) -> dict:
    return {"id": number, "plan": plan, "at": (START + timedelta(minutes=minute)).isoformat()}


def fill(lake: lakes.Lake, batches: int = 3) -> None:
    """Batches, of which the first two are compacted; the values of `what` are awkward names of folders."""
    for batch, what in enumerate(("a/b", "50%", None)[:batches]):
        land(lake, f"event/{batch}.json", *({"id": batch * 10 + n, "what": what} for n in range(3)))
        land(lake, f"user/{batch}.json", user(1, batch, f"plan {batch}"), user(10 + batch, 0, "free"))
        land(lake, f"log/{batch}.json", {"text": "a"}, {"text": f"{batch}"})
        lake.drain(**ASKED, run_id=f"r{batch}")
        if batch == 1:
            lake.compact(**COMPACT, run_id="c")


def contents(root: str) -> dict[str, str]:
    """Path -> sha256 of all that is there, but for what was tried."""

    def files() -> Iterator[Path]:
        for folder, folders, names in os.walk(root):
            if folder == root:
                folders[:] = [name for name in folders if name != "tries"]
            yield from (Path(folder, name) for name in names)

    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files()}


def faults(lake: lakes.Lake) -> list[str]:
    return [finding.problem for finding in lake.examine() if finding.problem]


def rows(lake: lakes.Lake) -> dict[str, pl.DataFrame]:
    return {name: lake.snapshot().frame(name).collect().sort(pl.all()) for name in ("event", "user", "log")}


def test_what_is_written_compacted_and_removed_in_a_branch_stays_there(tmp_path):
    lake = Lake(tmp_path)
    fill(lake)
    land(lake, "event/3.json", {"id": 30, "what": "a/b"}, {"id": 31, "what": "new"}, {"id": 0, "what": "a/b"})
    land(lake, "user/3.json", user(1, 60, "pro"), user(10, -9, "older"), user(13, 0, "free"))
    land(lake, "log/3.json", {"text": "a"}, {"text": "3"})
    before, shown = contents(str(tmp_path)), rows(lake)

    began = lake.branch("tries/t")
    branched = lake.at(lake.root.url_of("tries/t"))
    assert branched.snapshot().versions == began.versions and faults(branched) == []
    assert all(frame.equals(shown[name]) for name, frame in rows(branched).items())
    assert branch.differences(began, branched.snapshot()).is_empty()
    shared = [path.stat().st_nlink for path in (tmp_path / "tries/t/lake").glob("*/*.parquet")]
    assert shared and {*shared} == {2}, "not copied"

    branched.drain(**ASKED, run_id="tried")
    assert branched.compact(**COMPACT, run_id="tried")["failed"].null_count() == 5
    branched.prune(archive_days=1, refused_days=1)
    differs = {row["table"]: row for row in branch.differences(began, branched.snapshot()).to_dicts()}
    counts = {table: [row[name] for name in branch.COMPARED][1:6] for table, row in differs.items()}
    assert counts["event"] == [9, 12, 2, 0, 0] and differs["event"]["first"] == "id 30"
    assert counts["user"] == [4, 5, 1, 0, 1] and differs["user"]["first"] == "id 1"
    assert counts["log"] == [6, 8, 1, 0, 0], "without a key a row is known by all that it has"
    assert counts["files"][2:] == [3, 0, 0] and "quarantine" not in counts
    assert contents(str(tmp_path)) == before

    lake.drain(**ASKED, run_id="r3")
    assert all(frame.equals(rows(branched)[name]) for name, frame in rows(lake).items())
    shown = rows(lake)
    lake.root.remove_tree("tries/t")
    assert all(frame.equals(shown[name]) for name, frame in rows(lake).items()) and faults(lake) == []


def test_a_row_that_is_changed_or_gone_is_named(tmp_path):
    lake = Lake(tmp_path)
    fill(lake)
    began = lake.branch("tries/t")
    branched = lake.at(lake.root.url_of("tries/t"))
    other = Lake(tmp_path / "other")  # what a stage would make otherwise: one row less, one with another text
    land(other, "event/0.json", {"id": 0, "what": "a/b"}, {"id": 1, "what": "50%"})
    other.drain(**ASKED, run_id="o")
    assert branch.differences(began, other.snapshot()).filter(table="event").row(0) == (
        *("event", 9, 2),
        *(0, 7, 1, "id 1"),
    )
    assert branch.differences(None, branched.snapshot()).filter(table="user").row(0)[1:6] == (0, 4, 4, 0, 0)


def test_a_batch_that_was_begun_is_finished_there_as_it_was_begun(tmp_path, monkeypatch):
    """Also where the table's files are committed and not published: production's commit is none of the branch's."""
    lake = Lake(tmp_path)
    fill(lake)
    land(lake, "event/3.json", {"id": 30, "what": "a/b"})
    monkeypatch.setattr("etl.lake.commit.Writer.publish", lambda *_, **__: 1 / 0, raising=True)
    with pytest.raises(ZeroDivisionError):
        lake.drain(**ASKED, run_id="r3")
    monkeypatch.undo()
    land(lake, "event/4.json", {"id": 40, "what": "a/b"})
    before = contents(str(tmp_path))
    lake.branch("tries/t")
    branched = lake.at(lake.root.url_of("tries/t"))
    batch = branched.next_batch(max_files=99, scheduled_for=None)
    assert (batch.number, [file.path for file in batch.files]) == (4, ["event/3.json"]) and batch.manifest
    branched.drain(**ASKED, run_id="tried")
    assert branched.snapshot().batch == 5 and branched.snapshot().row_count("event") == 11
    assert contents(str(tmp_path)) == before


def test_a_file_that_is_still_written_is_left_out(tmp_path):
    lake = Lake(tmp_path)
    (tmp_path / "landing/event").mkdir(parents=True)
    for name, age_s in (("new", 0), ("old", 60)):
        path = tmp_path / f"landing/event/{name}.json"
        path.write_text('{"id": 1, "what": "x"}\n')
        if age_s:
            os.utime(path, (time.time() - age_s,) * 2)
    assert lake.branch("tries/t") is None
    assert [path.name for path in (tmp_path / "tries/t/landing/event").iterdir()] == ["old.json"]
    (tmp_path / "tries/t/landing/event/old.json").write_text("written in place")
    assert (tmp_path / "landing/event/old.json").read_text().startswith("{")


def test_a_lake_that_is_being_replaced_has_no_branch(tmp_path):
    lake = Lake(tmp_path)
    fill(lake)
    pointer = json.loads((tmp_path / "lake/published.json").read_text())
    (tmp_path / "lake/published.json").write_text(json.dumps(pointer | {"under": "rebuilding-1"}))
    with pytest.raises(Damaged, match="not in its place yet"):
        lake.branch("tries/t")


def test_in_an_object_store_files_are_copied_there(s3_root):
    lake = Lake(s3_root)
    fill(lake, 1)
    land(lake, "event/3.json", {"id": 30, "what": "a/b"})
    before = {rel: lake.root.mark(rel) for rel in lake.root.files("")}
    began = lake.branch("tries/t")
    branched = lake.at(lake.root.url_of("tries/t"))
    branched.drain(**ASKED, run_id="tried")
    assert branch.differences(began, branched.snapshot()).filter(table="event").row(0)[1:6] == (3, 4, 1, 0, 0)
    assert {rel: lake.root.mark(rel) for rel in lake.root.files("") if not rel.startswith("tries/")} == before
