"""Reports are kept by what they tell; rows always; and a sweep may be killed anywhere."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from faults import killed_sweep, synthetic
from pydantic import ValidationError

from etl.params.retention import Rules
from etl.runs import index as run_index
from etl.runs import retention, upkeep
from etl.storage import PROJECT, Root

HOUR, NOW = timedelta(hours=1), synthetic.END


def toy(*ended: str, stage: str = "toy") -> pl.DataFrame:
    """Runs from lines such as "03-30 12:00 ok 2.0": when it ended, its state, its seconds."""
    rows = []
    for line in ended:
        day, clock, state, seconds = line.split()
        moment = datetime.fromisoformat(f"2026-{day}T{clock}+00:00")
        rows.append((f"{day} {clock}", stage, state, moment, float(seconds)))
    moment = pl.Datetime("us", "UTC")
    columns = {"run_id": pl.String, "stage": pl.String, "state": pl.String, "ended_at": moment, "seconds": pl.Float64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def kept(index: pl.DataFrame, **rules) -> list[str]:
    """What is kept where another stage runs all the while."""
    began = index["ended_at"].min()
    times = [began + n * 6 * HOUR for n in range((NOW - began) // (6 * HOUR) + 1)]
    rows = [(f"clock {time}", "clock", "noop", time, 1.0) for time in times]
    seen = pl.concat([index, pl.DataFrame(rows, schema=index.schema, orient="row")])
    return retention.wanted(seen, Rules(**rules), NOW).filter(pl.col("stage") != "clock")["run_id"].to_list()


def until(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("not within 30 s")


def folders(root: Root) -> set[str]:
    return {str(path.relative_to(root.url)) for path in Path(root.url).glob("reports/*/*/*")}


@pytest.fixture(scope="module")
def day() -> list:
    """A day of runs, many of them bad."""
    return synthetic.month(7, days=1, bad_share=0.05)


def test_all_that_is_not_ok_and_the_first_ok_after_it():
    old = toy(
        "03-01 00:10 ok 9", "03-01 00:20 failed 1", "03-01 00:25 noop 1", "03-01 00:30 ok 1", "03-01 00:40 ok 1",
        "03-01 00:50 killed 1", "03-01 00:51 timed_out 1", "03-01 00:52 cancelled 1", "03-01 00:53 check_failed 1",
        "03-01 00:54 ok 1", "03-01 00:55 ok 1",
    )  # fmt: skip
    bad_ones = ["00:20", "00:50", "00:51", "00:52", "00:53"]
    expected = sorted(f"03-01 {clock}" for clock in (*bad_ones, "00:30", "00:54"))
    assert kept(old, daily=False, slowest=False) == expected
    # another stage's run is not what comes after
    other = toy("03-01 00:21 ok 1", stage="other")
    assert kept(pl.concat([old, other]), daily=False, slowest=False) == expected


def test_the_slowest_and_the_first_of_each_day():
    old = toy("03-01 00:10 ok 2", "03-01 08:00 ok 5", "03-01 09:00 ok 5", "03-01 10:00 noop 7", "03-02 01:00 ok 1")
    assert kept(old) == ["03-01 00:10", "03-01 08:00", "03-02 01:00"]
    assert kept(old, daily=False) == ["03-01 08:00", "03-02 01:00"]
    assert kept(old, slowest=False) == ["03-01 00:10", "03-02 01:00"]


def test_one_an_hour_for_a_day_and_everything_for_an_hour():
    lines = [f"03-30 {hour:02d}:{minute} ok 1" for hour in range(24) for minute in (15, 45)]
    lines += ["03-30 23:10 noop 1", "03-30 22:10 noop 1", "03-29 22:00 ok 1", "03-29 23:00 ok 1"]
    hourly = [f"03-30 {hour:02d}:15" for hour in range(24)]
    assert kept(toy(*lines)) == [*hourly, "03-30 23:45", "03-30 23:10", "03-29 22:00"]
    assert kept(toy(*lines), hourly_days=2) == [*hourly, "03-30 23:45", "03-30 23:10", "03-29 22:00", "03-29 23:00"]
    assert kept(toy(*lines), all_hours=0, hourly_days=0) == ["03-30 00:15", "03-29 22:00"]


def test_of_many_bad_ones_of_a_day_the_first_and_the_newest_of_a_stage():
    """A broken stage leaves thousands."""
    states = ["failed"] * 20 + ["killed"] + ["failed"] * 20
    lines = [f"03-01 00:{minute} {state} 1" for minute, state in zip(range(10, 51), states, strict=True)]
    others = [*lines, "03-02 00:10 failed 1", "03-02 00:11 killed 1"]
    first, newest = [f"03-01 00:{minute}" for minute in range(10, 13)], ["03-01 00:49", "03-01 00:50"]
    assert kept(toy(*others), bad_a_day=5) == [*first, "03-01 00:30", *newest, "03-02 00:10", "03-02 00:11"]
    assert len(kept(toy(*lines))) == 41
    assert kept(toy(*lines), bad_a_day=0) == ["03-01 00:10", "03-01 00:30"]


def test_a_clock_that_jumps_ahead_makes_reports_older_by_hours():
    """By six of them, of the ten days that it jumped."""
    lines = [f"03-{day} {hour:02d}:10 ok 1" for day in (19, 20) for hour in range(24)]
    moved = toy(*lines, "03-30 23:50 ok 1")
    names = retention.wanted(moved, Rules(), NOW)["run_id"].to_list()
    hourly = [f"03-20 {hour:02d}:10" for hour in range(6, 24)]
    assert names == ["03-19 00:10", "03-20 00:10", *hourly, "03-30 23:50"]


def test_at_most_a_days_worth_goes_in_a_sweep(root):
    place, records = Root.at(root), synthetic.month(3, days=4, bad_share=0)[::40]
    synthetic.write_index(place, records, recent=0)
    for record in records:
        place.write(f"{record.report}/run.json", b"{}")
    later, removed = [], []
    while not later or later[-1]:
        counts = retention.sweep(place, now=NOW + HOUR)
        later.append(counts["later"])
        removed.append(counts["removed"])
    assert len(removed) == 4 and max(removed) <= len(records) / 3
    assert retention.sweep(place, now=NOW + HOUR)["removed"] == 0


def test_an_end_to_it_when_asked_for():
    old = toy("03-01 00:10 failed 2", "03-25 08:00 failed 5")
    assert kept(old) == ["03-01 00:10", "03-25 08:00"] and kept(old, days=10) == ["03-25 08:00"]


def test_rules_that_mean_nothing_are_refused():
    for wrong in ({"hours": 1}, {"days": -1}, {"daily": "sometimes"}, {"hourly_days": "x"}):
        with pytest.raises(ValidationError):
            Rules(**wrong)


def test_what_is_removed_is_never_wanted_again(day):
    """So sweeps need no memory, and it does not matter how often one comes."""
    index, before = run_index.frame(day), set()
    for step in range(1, 24 * 3):
        now = NOW - 24 * HOUR + step * HOUR / 3
        seen = index.filter(pl.col("ended_at") < now)
        wanted = set(retention.wanted(seen, Rules(all_hours=0.25, hourly_days=0.5), now)["run_id"])
        new = set(seen.filter(pl.col("ended_at") >= now - HOUR / 3)["run_id"])
        assert wanted - new <= before
        before = wanted


@pytest.mark.parametrize("where", ["root", "s3_root"])
def test_the_page_of_an_old_report_goes_and_the_report_stays(request, where, day):
    root, some = Root.at(request.getfixturevalue(where)), day[:6]
    synthetic.write_index(root, some, recent=0)
    for record in some:
        for name in synthetic.FILES:
            root.write(f"{record.report}/{name}", b"{}")
    for rules, names in ((Rules(page_days=2), synthetic.FILES), (Rules(page_days=0), synthetic.FILES[1:])):
        counts = retention.sweep(root, rules, now=NOW + HOUR)
        assert counts["kept"] > 0 and counts["pages"] == (0 if names == synthetic.FILES else counts["kept"])
        for row in run_index.newest(root):
            assert not row["kept"] or root.names(row["report"]) == sorted(names)
    assert retention.sweep(root, Rules(page_days=0), now=NOW + HOUR)["pages"] == 0


def test_a_page_is_as_old_as_its_run_and_not_as_what_it_was_scheduled_for(root, day):
    place, record = Root.at(root), next(record for record in day if record.stage == "query" and record.ok)
    record = replace(record, report=f"reports/query/1999-01-01/{record.run_id}")
    synthetic.write_index(place, [record], recent=0)
    for name in synthetic.FILES:
        place.write(f"{record.report}/{name}", b"{}")
    assert retention.sweep(place, now=NOW)["pages"] == 0
    assert place.names(record.report) == sorted(synthetic.FILES)
    # a clock that is eight days ahead since nobody ran makes nothing old; runs that came meanwhile do
    assert retention.sweep(place, now=NOW + 8 * 24 * HOUR)["pages"] == 0
    ended = [(NOW + n * 6 * HOUR).isoformat() for n in range(1, 32)]
    others = [replace(record, run_id=f"other-{at}", report=f"reports/other/{at}", ended_at=at) for at in ended]
    synthetic.write_index(place, [record, *others], recent=0)
    assert retention.sweep(place, now=NOW + 8 * 24 * HOUR)["pages"] == 1


@pytest.mark.parametrize("where", ["root", "s3_root"])
def test_a_sweep_leaves_what_is_wanted_and_finishes_what_was_left(request, where, day):
    root, some = Root.at(request.getfixturevalue(where)), day[:24]
    synthetic.write_index(root, some, recent=2)
    for record in some:
        for name in synthetic.FILES:
            root.write(f"{record.report}/{name}", b"{}")
    reports = {record.run_id: record.report for record in some}
    wanted = {reports[run_id] for run_id in retention.wanted(run_index.frame(some), Rules(), NOW)["run_id"]}
    doomed = sorted(set(reports.values()) - wanted)
    half, gone = doomed[0], doomed[1]
    root.remove(f"{half}/run.json")  # as a killed sweep leaves it
    root.remove_tree(gone)
    stray = doomed[2] + "0"
    root.write(f"{stray}/report.ipynb", b"{}")  # its row is still to come
    assert not {row["report"] for row in run_index.newest(root, limit=100) if row["kept"]} & {half, gone}
    counts = {
        "runs": 24,
        "kept": len(wanted),
        "removed": len(doomed) - 1,
        "later": 0,
        "missing": 0,
        "unknown": 1,
        "pages": 0,
    }
    assert retention.sweep(root, now=NOW, dry_run=True) == retention.sweep(root, now=NOW) == counts
    listed = run_index.newest(root, limit=100)
    assert len(listed) == 24 and {row["report"] for row in listed if row["kept"]} == wanted
    assert not root.exists(half) and root.exists(f"{stray}/report.ipynb")
    assert retention.sweep(root, now=NOW) == counts | {"removed": 0}
    root.remove_tree(sorted(wanted)[0])
    assert retention.sweep(root, now=NOW) == counts | {"removed": 0, "kept": len(wanted) - 1, "missing": 1}


def test_a_sweep_killed_anywhere_leaves_index_and_disk_in_agreement(tmp_path, day):
    """One event after another: before the first file goes, between two of a report, before its folder goes, later."""
    root, some = Root.at(tmp_path / "root"), day[:400]
    synthetic.write_index(root, some, recent=3)
    synthetic.write_reports(root, some, tmp_path / "templates")
    keep = {r.report for r in some if r.run_id in set(retention.wanted(run_index.frame(some), Rules(), NOW)["run_id"])}
    points = [("os.listdir", 1), ("os.remove", 1), ("os.remove", 2), ("os.rmdir", 1), ("os.remove", 300)]
    for event, number in points:
        command = [sys.executable, killed_sweep.__file__, root.url, NOW.isoformat(), event, str(number)]
        killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)})
        assert killed.returncode == -signal.SIGKILL
        assert keep <= folders(root)
        for row in run_index.newest(root, limit=1000):
            names = set(root.names(row["report"]))
            assert names == set(synthetic.FILES) if row["kept"] else "run.json" not in names
    assert len(keep) < len(folders(root)) < len(some)
    retention.sweep(root, now=NOW)
    assert folders(root) == keep and len(run_index.newest(root, limit=1000)) == len(some)


def test_it_comes_regularly_also_after_one_that_failed(tmp_path, caplog, day):
    root, said = Root.at(tmp_path / "root"), "could not be swept"
    root.write(f"{run_index.TABLE}/_delta_log/{0:020d}.json", b"{torn")
    end = retention.sweep_regularly(root, Rules(), every_s=0.05)
    until(lambda: said in caplog.text)
    root.remove_tree(run_index.TABLE)
    synthetic.write_index(root, day[:10], recent=9)
    synthetic.write_reports(root, day[:10], tmp_path / "templates")
    doomed = folders(root) - set(retention.wanted(run_index.frame(day[:10]), Rules(), datetime.now(UTC))["report"])
    until(lambda: doomed and not doomed & folders(root))
    # the index is tidied, too; rows that came after it was stay files of their own
    until(lambda: len(root.table(run_index.TABLE).file_uris()) <= upkeep.FEW)
    end.set()
