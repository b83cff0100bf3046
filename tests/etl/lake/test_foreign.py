"""Others write into our tables, with plain deltalake, and bring back what they have copied: no row of ours is lost."""

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from etl.lake import Lake, rebuild
from etl.lake.table import INT, TEXT, TIME, Table

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ASK = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24, "run_id": "compact"}
DECLARED = {
    "item": Table("item", {"id": INT, "name": TEXT, "at": TIME}, ("id",), time="at"),
    "other": Table("other", {"id": INT}, ("id",)),
}


class Shop(Lake):
    tables = DECLARED


def ingest(lake: Lake, number: int) -> None:
    """A batch: two rows of item, one of other."""
    rows = [{"id": 2 * number + n, "name": f"n{number}", "at": f"2026-03-01T11:00:{number:02d}Z"} for n in range(2)]
    lake.root.write(f"landing/item/{number}.json", "\n".join(map(json.dumps, rows)).encode())
    lake.root.write(f"landing/other/{number}.json", json.dumps({"id": number}).encode())
    again(lake)


def again(lake: Lake) -> None:
    """As the stage does it."""
    limits: dict[str, Any] = {"max_files": 99, "max_bytes": 1 << 30, "max_bad_share": 1.0, "for_s": 60}
    lake.drain(**limits, scheduled_for=None, now=NOW, run_id="run")


def ids(lake: Lake, table: str = "item") -> list[int]:
    return sorted(lake.snapshot().frame(table, ["id"]).collect()["id"])


def problems(lake: Lake) -> list[str]:
    return [finding.problem for finding in lake.examine() if finding.problem]


@pytest.fixture
def lake(root) -> Lake:
    """Three batches."""
    made = Shop(root)
    for number in range(3):
        ingest(made, number)
    return made


def theirs(lake: Lake) -> DeltaTable:
    return DeltaTable(f"{lake.root.url}/lake/item")


def append(lake: Lake, mode: str = "append") -> None:
    rows = {"id": [1000], "name": ["theirs"], "at": [NOW], "_rescued": pa.nulls(1, pa.string())}
    schema = pa.schema(theirs(lake).schema().to_arrow())
    write_deltalake(theirs(lake), pa.table(rows).cast(schema), mode=mode)


def optimize(lake: Lake) -> None:
    theirs(lake).optimize.compact()


def vacuum(lake: Lake) -> None:
    optimize(lake)
    theirs(lake).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)


def clean(lake: Lake) -> None:
    """Some commits, a checkpoint, and none of the log before it."""
    optimize(lake)
    theirs(lake).alter.set_table_properties({"delta.logRetentionDuration": "interval 0 seconds"})
    theirs(lake).create_checkpoint()
    log = Path(lake.root.url, "lake/item/_delta_log")
    for path in log.glob("*.json"):  # as cleanup_metadata does a moment later
        if int(path.stem) < theirs(lake).version():
            path.unlink()


def test_a_table_whose_published_version_was_cleaned_away_is_compacted_and_published(lake):
    clean(lake)
    assert lake.compact(**ASK)["failed"].is_null().all()
    assert ids(lake) == [*range(6)]


@pytest.mark.parametrize("what", [append, optimize, vacuum, clean])
def test_what_others_write_costs_no_row_of_ours(lake, what):
    what(lake)
    extra = [1000] * (what is append)
    ingest(lake, 3)
    assert ids(lake) == [*range(8), *extra]
    lake.compact(**ASK)
    ingest(lake, 4)
    assert ids(lake) == [*range(10), *extra] and ids(lake, "other") == [*range(5)]
    told = problems(lake)
    assert told == ["item has 11 rows, and 10 were ingested: another writer added the others"] * (what is append)
    if what is append:
        with pytest.raises(rebuild.RowsWouldGo, match="1 of 11 rows of item would go"):
            lake.rebuild()


def restore(lake: Lake) -> None:
    theirs(lake).restore(lake.snapshot().versions["item"] - 1)


def delete(lake: Lake) -> None:
    theirs(lake).delete("id = 1")


def overwrite(lake: Lake) -> None:
    append(lake, mode="overwrite")


@pytest.mark.parametrize("what", [restore, delete, overwrite])
@pytest.mark.parametrize("remedy", ["restore", "rebuild"])
def test_rows_that_others_take_away_are_missed_and_come_back(lake, what, remedy):
    published = lake.snapshot()
    what(lake)
    lake.root.write("landing/other/9.json", b'{"id": 9}')
    again(lake)
    assert ids(lake, "other") == [0, 1, 2, 9]  # the other table goes on
    told = lake.blocked()
    assert re.search(r"item: another writer took rows of ours away, by version \d+", told)
    assert "took rows of ours away" in lake.compact(**ASK).filter(table="item")["failed"][0]
    assert lake.snapshot().versions["item"] == published.versions["item"]
    assert ids(lake) == [*range(6)]  # readers do not mind
    assert any("item: another writer took rows of ours away" in problem for problem in problems(lake))
    if remedy == "restore":
        version = re.search(r"\.restore\((\d+)\)", told)
        theirs(lake).restore(int(version[1]))
    else:
        lake.rebuild()
    again(lake)
    ingest(lake, 3)
    assert ids(lake) == [*range(8)] and ids(lake, "other") == [*range(4), 9]
    assert problems(lake) == []


def test_rows_that_others_took_before_they_cleaned_the_log_are_missed(lake):
    delete(lake)
    clean(lake)
    ingest(lake, 3)
    assert "took rows of ours away, 1 of 6, and cleaned its log" in lake.blocked()
    lake.rebuild()
    again(lake)
    assert ids(lake) == [*range(8)]


def test_what_others_append_and_take_away_again_is_their_business(lake):
    append(lake)
    theirs(lake).delete("id = 1000")
    ingest(lake, 3)
    assert ids(lake) == [*range(8)] and problems(lake) == []


@pytest.mark.parametrize(("old", "compacted"), [(1, False), (3, False), (5, True)])
def test_a_pointer_that_was_copied_back_goes_on_where_the_tables_are(lake, old, compacted):
    pointer = Path(lake.root.url, "lake/published.json")
    shutil.copy(pointer, f"{pointer}.copy")
    for number in range(3, 3 + old):
        ingest(lake, number)
        if compacted:
            lake.compact(**ASK)
    as_of = lake.snapshot().as_of
    shutil.move(f"{pointer}.copy", pointer)
    again(lake)
    assert ids(lake) == [*range(2 * (3 + old))] and ids(lake, "other") == [*range(3 + old)]
    assert (lake.snapshot().batch, lake.snapshot().as_of) == (3 + old, as_of)
    ingest(lake, 20)
    assert ids(lake) == [*range(2 * (3 + old)), 40, 41] and problems(lake) == []


def test_a_pointer_that_was_copied_back_while_a_batch_was_half_in(lake, monkeypatch):
    from etl.lake import ingest as stage

    pointer = Path(lake.root.url, "lake/published.json")
    shutil.copy(pointer, f"{pointer}.copy")
    ingest(lake, 3)

    def die(name: str) -> None:
        if name == "after the commit: item":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage, "crash_point", die)
        ingest(lake, 4)
    shutil.move(f"{pointer}.copy", pointer)
    ingest(lake, 5)
    assert ids(lake) == [*range(12)] and ids(lake, "other") == [*range(6)]


def test_a_pointer_and_tables_that_were_copied_back_are_filled_from_the_archive(lake, root):
    """Without the manifests, which are newer."""
    for name in ("item", "other", "files", "quarantine", "published.json"):
        path = Path(root, "lake", name)
        shutil.copytree(path, f"{root}/copy/{name}") if path.is_dir() else shutil.copy(path, f"{root}/copy/{name}")
    ingest(lake, 3)
    for name in ("item", "other", "files", "quarantine"):
        shutil.rmtree(f"{root}/lake/{name}")
    shutil.copytree(f"{root}/copy", f"{root}/lake", dirs_exist_ok=True)
    shutil.rmtree(f"{root}/copy")
    again(lake)
    assert ids(lake) == [*range(8)] and ids(lake, "other") == [*range(4)]


def test_rows_of_ours_that_others_have_rewritten_are_still_ours(lake):
    optimize(lake)
    delete(lake)
    ingest(lake, 3)
    assert re.search(r"version \d+ \(DELETE\)", lake.blocked())
