"""The index's files: fewer, with the same rows, while runs go on; what nothing needs goes after a day, nothing else."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import polars as pl
import pytest
from deltalake import write_deltalake
from faults import synthetic
from polars.testing import assert_frame_equal

from etl import delta
from etl.findings import Finding
from etl.runs import index, upkeep
from etl.storage import Root

DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def records() -> list:
    return synthetic.month(3, days=1)[:60]


def rows(root: Root) -> pl.DataFrame:
    return index.scan(root).collect().sort("run_id")


def files(root: Root) -> set[str]:
    """The files that are there, needed or not."""
    return {name for name in root.names(index.TABLE) if name.endswith(".parquet")}


def age(root: Root, seconds: float) -> None:
    """Let every file that is there have been written so long ago."""
    then = time.time() - seconds
    for path in Path(root.url, index.TABLE).iterdir():
        if path.is_file():
            os.utime(path, (then, then))


def came_since(root: Root, days: int) -> None:
    """Let something have been written every six hours of the last days: so the clock was not moved."""
    for number in range(1, days * 4):
        name = f"{index.TABLE}/came-{number}.parquet"
        root.write(name, b"x")
        then = time.time() - number * 6 * 3600
        os.utime(f"{root.url}/{name}", (then, then))


@pytest.mark.parametrize("where", ["root", "s3_root"])
def test_small_files_become_one_with_the_same_rows(request, where, records):
    root = Root.at(request.getfixturevalue(where))
    upkeep.tidy(root)  # nothing yet
    for record in records[:19]:  # with a checkpoint
        index.append(root, record)
    before = rows(root)
    upkeep.tidy(root)
    assert len(root.table(index.TABLE).file_uris()) == 1
    assert_frame_equal(rows(root), before)
    assert len(files(root)) == 20, "readers may be on the version before"
    version = delta.newest_version(root, index.TABLE)
    upkeep.tidy(root)
    assert delta.newest_version(root, index.TABLE) == version, "a second time there is nothing to do"
    assert index.examine(root) == [Finding("the index of runs")]
    newest = max(records[:19], key=lambda record: (record.started_at, record.run_id))
    assert index.newest(root, limit=1)[0]["run_id"] == newest.run_id
    assert index.newest(root, until=min(record.started_at for record in records[:19])) == []


def test_files_of_an_older_release_and_of_delta_rs_are_taken_in(root, records):
    place = Root.at(root)
    for record in records[:5]:
        older = index.frame([record]).drop("cells", "receipt")
        write_deltalake(place.url_of(index.TABLE), older, mode="append")
    for record in records[5:10]:
        index.append(place, record)
    before = rows(place)
    upkeep.tidy(place)
    assert len(place.table(index.TABLE).file_uris()) == 1
    assert_frame_equal(rows(place), before)
    assert before["cells"].null_count() == 5


def appending(url: str, some: list, together) -> None:
    together.wait(timeout=60)
    for record in some:
        index.append(Root.at(url), record)


def test_no_row_is_lost_or_doubled_while_runs_append_and_two_tidy(root, records, monkeypatch):
    monkeypatch.setattr(upkeep, "FEW", 2)
    place, spawn = Root.at(root), multiprocessing.get_context("spawn")
    together = spawn.Barrier(3)
    workers = [spawn.Process(target=appending, args=(root, records[k::2], together)) for k in range(2)]
    for worker in workers:
        worker.start()
    together.wait(timeout=60)
    while any(worker.is_alive() for worker in workers):
        upkeep.tidy(place)
    assert [worker.exitcode for worker in workers] == [0, 0]
    upkeep.tidy(place)
    assert rows(place)["run_id"].to_list() == sorted(record.run_id for record in records)
    log = [
        delta.actions(place, index.TABLE, version) for version in range(delta.newest_version(place, index.TABLE) + 1)
    ]
    compactions = [lines for lines in log if any("remove" in line for line in lines)]
    assert len(compactions) > 1, "it came in between"


def test_of_two_compactions_of_the_same_files_one_gives_way(root, records, monkeypatch):
    place, real = Root.at(root), delta.commit
    for record in records[:9]:
        index.append(place, record)

    def after_another(*asked):
        monkeypatch.setattr(delta, "commit", real)
        upkeep.compact(place)
        return real(*asked)

    monkeypatch.setattr(delta, "commit", after_another)
    upkeep.compact(place)
    assert rows(place)["run_id"].to_list() == sorted(record.run_id for record in records[:9])
    assert len([name for name in files(place) if name.startswith("compacted-")]) == 1


def test_an_unneeded_file_goes_after_a_day_and_a_needed_one_never(root, records):
    place = Root.at(root)
    for record in records[:10]:
        index.append(place, record)
    small = files(place)
    upkeep.compact(place)
    needed = files(place) - small
    for name in ("orphan.parquet", "compacted-orphan.parquet", ".orphan.part"):
        place.write(f"{index.TABLE}/{name}", b"x")
    orphans = {"orphan.parquet", "compacted-orphan.parquet"}
    age(place, DAY_S * 0.9)
    index.append(place, records[10])
    upkeep.remove_unneeded(place)
    assert files(place) >= small | orphans | needed, "not before"
    age(place, DAY_S * 400)
    place.write(f"{index.TABLE}/orphan-new.parquet", b"x")
    upkeep.remove_unneeded(place)
    assert files(place) >= orphans, "a clock that is 400 days ahead since nobody wrote"
    came_since(place, 2)
    upkeep.remove_unneeded(place)
    assert files(place) & (small | orphans) == small, "the log says that they were needed until now"
    assert files(place) >= needed | {"orphan-new.parquet"}
    assert not Path(root, index.TABLE, ".orphan.part").exists()
    assert len(rows(place)) == 11


def test_what_a_compaction_replaced_goes_a_day_later(root, records, monkeypatch):
    place, real = Root.at(root), delta.remove
    for record in records[:10]:
        index.append(place, record)
    small = files(place)

    def a_day_ago(*asked):
        line = real(*asked)
        line["remove"]["deletionTimestamp"] -= 1000 * (DAY_S + 60)
        return line

    monkeypatch.setattr(delta, "remove", a_day_ago)
    upkeep.compact(place)
    age(place, DAY_S * 2)
    came_since(place, 2)
    index.append(place, records[10])
    upkeep.tidy(place)
    assert not files(place) & small and len(rows(place)) == 11


def test_a_clock_that_jumped_takes_nothing_that_is_about_to_be_committed(root, records):
    """The machine says that it is a year later; the store's files are all of today."""
    place = Root.at(root)
    for record in records[:10]:
        index.append(place, record)
    place.write(f"{index.TABLE}/not-committed-yet.parquet", b"x")
    age(place, DAY_S * 365)
    upkeep.remove_unneeded(place)
    assert "not-committed-yet.parquet" in files(place) and len(rows(place)) == 10


def killed(url: str) -> None:
    os.environ["ETL_CRASH_AT"] = "index compacted, not swapped"
    upkeep.tidy(Root.at(url))


def test_a_compaction_that_is_killed_changes_nothing_and_is_done_again(root, records):
    place = Root.at(root)
    for record in records[:10]:
        index.append(place, record)
    before = rows(place)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(root,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL and len(files(place)) == 11
    assert_frame_equal(rows(place), before)
    upkeep.tidy(place)
    assert_frame_equal(rows(place), before)
    assert len(place.table(index.TABLE).file_uris()) == 1


def test_a_row_is_written_again_only_as_often_as_the_index_doubles():
    sizes: dict[str, int] = {}
    written = 0
    for day in range(200):
        sizes |= {f"{day}-{number}": 15_000 for number in range(10)}
        small = upkeep.worth_it(sizes)
        total = sum(sizes.pop(name) for name in small)
        sizes[f"compacted-{day}"] = total
        written += total
    assert len(sizes) < 20 and written < 8 * sum(sizes.values())
    assert upkeep.worth_it({"large": upkeep.LARGE} | {str(n): 1 for n in range(8)}) == []
    assert "large" not in upkeep.worth_it({"large": upkeep.LARGE} | {str(n): 1 for n in range(9)})
