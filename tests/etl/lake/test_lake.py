"""A lake of tables that are not TPC-H goes through everything that the engine does; the engine knows none of them."""

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import ClassVar

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import pipeline
from etl import lake as lakes
from etl.findings import Finding
from etl.lake import NothingPublished
from etl.lake.table import DAY, INT32, RESCUED, TEXT, TIME, Column, Table, decimal
from etl.storage import Root

SENSOR = Table("sensor", {"name": TEXT, "built": DAY, "kind": Column(TEXT, choices=("wind", "rain"))}, ("name",))
READING = Table(
    "reading",
    {
        "sensor": TEXT,
        "number": INT32,
        "level": Column(decimal(9, 3), range=(0, None)),
        "share": decimal(4, 4),
        "taken": TIME,
    },
    ("sensor", "number"),
    time="taken",
)
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROWS = 40  # of a file


class Weather(lakes.Lake):
    """Made by stages of other names."""

    tables: ClassVar = {table.name: table for table in (SENSOR, READING)}
    ingested_by = "gather"
    compacted_by = "tidy"


@pytest.fixture
def weather(root) -> Weather:
    return Weather(root)


def readings(sequence: int) -> list[dict]:
    return [
        {
            "sensor": f"s{n % 4}",
            "number": sequence * ROWS + n,
            "level": f"{n}.{n:03}",
            "share": f"0.{n:04}",
            "taken": (START + timedelta(minutes=sequence, seconds=n)).isoformat(timespec="milliseconds"),
        }
        for n in range(ROWS)
    ]


def land(lake: lakes.Lake, table: str, sequence: int, rows: list[dict]) -> None:
    data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    lake.root.write(f"landing/{table}/{table}-{sequence:08d}.json", data.encode())


def ingest(lake: lakes.Lake, run_id: str, now: datetime = START) -> dict[str, int]:
    batch = lake.next_batch(max_files=9, scheduled_for=None, now=now)
    return lake.commit(lake.read(batch), run_id=run_id)


@pytest.fixture
def gathered(weather) -> Weather:
    """Three batches; in the second a line that does not fit, one with a field more, and a file that is none."""
    land(weather, "sensor", 0, [{"name": f"s{n}", "built": "2020-02-29", "kind": "wind"} for n in range(4)])
    for sequence in range(3):
        rows = readings(sequence)
        if sequence == 1:
            rows[3]["level"], rows[5]["colour"] = "-1", "red"
            weather.root.write("landing/sensor/sensor-00000001.json", b"")
        land(weather, "reading", sequence, rows)
        ingest(weather, f"gather-{sequence}", START + timedelta(minutes=sequence))
    return weather


def content(lake: lakes.Lake) -> dict[str, pl.DataFrame]:
    snapshot = lake.snapshot()
    return {
        table: snapshot.frame(table, list(columns)).collect().sort(lake.keys[table])
        for table, columns in lake.columns.items()
    }


def test_a_lake_of_other_tables_is_ingested(gathered):
    snapshot = gathered.snapshot()
    assert (snapshot.lake, snapshot.root, snapshot.batch) == (gathered, gathered.root, 3)
    assert snapshot.as_of == START + timedelta(minutes=2, seconds=ROWS - 1)
    assert set(snapshot.versions) == {"sensor", "reading", "quarantine", "files"}
    assert dict(snapshot.rows().select("table", "rows").rows()) == {
        "sensor": 4,
        "reading": 3 * ROWS - 1,
        "quarantine": 1,
        "files": 4,
    }
    reading = snapshot.frame("reading").sort("number").collect()
    assert reading.schema == pl.Schema(READING.types)
    wanted = [row for sequence in range(3) for row in readings(sequence)]
    del wanted[ROWS + 3]
    assert reading["level"].to_list() == [Decimal(row["level"]) for row in wanted]
    assert reading["share"].to_list() == [Decimal(row["share"]) for row in wanted]
    assert reading["taken"].to_list() == [datetime.fromisoformat(row["taken"]) for row in wanted]
    assert snapshot.frame("reading", [RESCUED]).collect()[RESCUED].drop_nulls().to_list() == ['{"colour": "red"}']
    lines = gathered.refused_lines()
    assert lines.select("batch", "table", "file", "line", "reason").rows() == [
        (2, "reading", "reading/reading-00000001.json", 4, "level: -1.000 is not at least 0")
    ]
    (whole,) = gathered.refused_files()
    assert (whole["file"], whole["why"]) == ("sensor/sensor-00000001.json", "is empty")
    assert whole["path"].startswith("refused/2026-03-01/sensor/sensor-00000001.json~")
    assert gathered.root.exists(whole["path"])
    assert gathered.next_batch(max_files=9, scheduled_for=None) is None


def test_each_table_has_its_own_newest_time(gathered):
    snapshot = gathered.snapshot()
    assert snapshot.clocks == {"reading": snapshot.as_of}
    gathered.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="tidy-1")
    assert gathered.snapshot().clocks == snapshot.clocks


def test_rows_without_a_time_are_as_new_as_their_batch(weather):
    """Until the first row with a time comes: that says more than when somebody ran something."""
    land(weather, "sensor", 1, [{"name": "roof", "built": "2020-01-01", "kind": "wind"}])
    ingest(weather, "gather-1", START + timedelta(days=30))
    assert weather.snapshot().as_of == START + timedelta(days=30)
    land(weather, "reading", 1, readings(1))
    ingest(weather, "gather-2", START + timedelta(days=30, minutes=1))
    assert weather.snapshot().as_of == START + timedelta(minutes=1, seconds=ROWS - 1)


def test_what_waits_is_drained_lowest_sequence_first(weather, monkeypatch):
    monkeypatch.setattr(Weather, "sequence", r"-(\d+)")
    for sequence in (2, 0, 1):
        land(weather, "reading", sequence, readings(sequence))
    asked = {"max_files": 2, "max_bytes": 10**6, "max_bad_share": 0.0, "for_s": 60, "scheduled_for": None}
    done = weather.drain(**asked, run_id="gather-1", now=START)
    assert done.select("batch", "files", "rows", "tables").rows() == [
        (1, 2, 2 * ROWS, ["reading"]),
        (2, 1, ROWS, ["reading"]),
    ]


def test_its_commits_name_the_stages_that_it_says(gathered):
    gathered.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="tidy-1")
    history = [(one.get("stage"), one["run_id"]) for one in gathered.table("reading").history()]
    assert history == [("tidy", "tidy-1"), *(("gather", f"gather-{n}") for n in (2, 1, 0, 0))]


def test_it_is_compacted_and_made_again_and_nothing_is_wrong(gathered):
    before = content(gathered)
    surveyed = gathered.survey(small_mb=32)
    assert dict(surveyed.select("table", "small_files").rows()) == {
        "sensor": 1,
        "reading": 3,
        "quarantine": 1,
        "files": 3,
    }
    done = gathered.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="tidy-1")
    assert done.filter(table="reading").select("files_before", "files_after", "failed").row(0) == (3, 1, None)
    (file,) = gathered.snapshot().files("reading")
    assert pl.read_parquet(file).select("sensor", "number").equals(before["reading"].select("sensor", "number"))
    for table, frame in content(gathered).items():
        assert_frame_equal(frame, before[table])
    found = gathered.examine()
    assert [one.what for one in found if one.what.startswith("table ")] == [
        "table sensor",
        "table reading",
        "table quarantine",
        "table files",
    ]
    assert found == [Finding(one.what) for one in found]
    compared = gathered.rebuild()
    assert compared.rows() == [
        ("sensor", 4, 4, True),
        ("reading", 119, 119, True),
        ("quarantine", 1, 1, True),
        ("files", 4, 4, True),
    ]
    for table, frame in content(gathered).items():
        assert_frame_equal(frame, before[table])
    land(gathered, "reading", 3, readings(3))
    ingest(gathered, "gather-3", START + timedelta(minutes=3))
    assert gathered.snapshot().frame("reading").collect().height == 4 * ROWS - 1
    assert not [one for one in gathered.examine() if one.problem]


def test_what_is_wrong_with_it_names_its_own_stages(gathered):
    root = gathered.root
    root.write("lake/batches/00000004.json", root.read("lake/batches/00000003.json"))
    assert [one.remedy for one in gathered.look("landing") if one.problem] == [
        "run gather: it ends what was begun before anything else"
    ]
    next(Path(root.url, "archive").glob("*/reading/reading-00000001.json")).unlink()
    root.remove("lake/batches/00000004.json")
    with pytest.raises(
        RuntimeError, match=r"lacks 1 files .* reading/reading-00000001.json .* \(archive_days of tidy\)"
    ):
        gathered.rebuild()


def test_lines_that_another_declaration_takes_are_tried_again(gathered):
    class Below(Weather):
        tables: ClassVar = Weather.tables | {"reading": replace(READING, columns=READING.types)}

    below = Below(gathered.root)
    with pytest.raises(LookupError, match="nothing of reading-00000001.json fits"):
        gathered.retry("reading-00000001.json")
    (landed,) = below.retry("reading-00000001.json")
    assert landed.startswith("landing/.retried/reading/")
    ingest(below, "gather-4", START + timedelta(minutes=4))
    assert gathered.snapshot().frame("reading").collect().height == 3 * ROWS


def test_two_lakes_of_other_tables_do_not_know_of_each_other(gathered):
    """In one process, under the same root: each goes by its own declaration, and neither is the project's."""
    ours = pipeline.Lake(gathered.root)
    assert not ours.tables.keys() & gathered.tables.keys()
    assert ours.columns.keys() & gathered.columns.keys() == {"quarantine", "files"}
    theirs = {name: mark for name, mark in gathered.fingerprints.items() if name in gathered.tables}
    assert not ours.fingerprints.items() & theirs.items()
    land(gathered, "reading", 3, readings(3))
    assert ours.next_batch(max_files=9, scheduled_for=None) is None
    assert len(gathered.next_batch(max_files=9, scheduled_for=None).files) == 1

    class Renamed(Weather):
        tables: ClassVar = Weather.tables | {"sensor": replace(SENSOR, columns={**SENSOR.types, "place": TEXT})}

    renamed = Renamed(gathered.root)
    assert [file.table for file in renamed.next_batch(max_files=9, scheduled_for=None).files] == ["reading"]
    assert "sensor: place is declared as string and missing in the table: its 4 rows" in renamed.blocked()


def test_lakes_are_equal_by_their_tables_and_root(weather, tmp_path):
    assert Weather(weather.root) == Weather(weather.root.url) == weather
    assert len({weather, Weather(weather.root.url)}) == 1
    assert weather != weather.at(tmp_path / "other")
    assert weather != lakes.Lake(weather.root) and weather != weather.root.url
    assert type(weather.at(tmp_path)) is Weather
    with pytest.raises(NothingPublished, match="nothing is published under"):
        weather.snapshot()


def test_a_snapshot_opens_each_table_once(gathered, monkeypatch):
    opened, real = Counter(), Root.table

    def counted(root, table, *version):
        opened[table] += 1
        return real(root, table, *version)

    monkeypatch.setattr(Root, "table", counted)
    snapshot = gathered.snapshot()
    assert not opened
    snapshot.frame("reading").collect()
    assert opened == {"lake/reading": 1}
    for _ in range(3):
        for table in gathered.columns:
            snapshot.frame(table).collect()
            snapshot.frame(table, [gathered.keys[table][0]]).collect()
            assert snapshot.files(table) and snapshot.table(table).version() == snapshot.versions[table]
        snapshot.rows()
    assert opened == {f"lake/{table}": 1 for table in gathered.columns}
    gathered.snapshot().frame("reading").collect()
    assert opened["lake/reading"] == 2  # another snapshot may be of another version
