"""What waits in landing, seen without opening it: nothing there can block a run or make it read too much."""

import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from etl import lake as lakes
from etl.lake import landing
from etl.lake.table import INT, TEXT, Table
from etl.storage import PROJECT, Root, Unreadable

UNREADABLE = """
import os, sys
from deltalake import DeltaTable, write_deltalake
from pipeline import Lake
root = sys.argv[1]
lake = Lake(root)
if os.geteuid() == 0:
    os.setuid(65534)
batch = lake.next_batch(max_files=9, scheduled_for="2026-03-01")
lake.commit(lake.read(batch), run_id="x")
print(lake.refused_files()[0]["why"], os.listdir(f"{root}/landing/orders"))
"""


def test_a_file_that_may_not_be_read_is_refused():
    with tempfile.TemporaryDirectory() as root:  # not tmp_path: nobody else may enter that
        place = Root.at(root)
        place.write("landing/orders/orders-00000001.json", b"{}\n")
        os.chmod(f"{root}/landing/orders/orders-00000001.json", 0)
        for folder in [root, *(path for path in Path(root).rglob("*") if path.is_dir())]:
            os.chmod(folder, 0o777)
        command = [sys.executable, "-c", UNREADABLE, root]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "may not be read: permission denied []", done.stderr


def test_a_file_that_is_larger_than_asked_is_not_read(root):
    place = Root.at(root)
    place.write("a", b"x" * 100)
    assert place.read_at_most("a", 100) == b"x" * 100
    with pytest.raises(Unreadable, match="has 100 bytes: more than the 99"):
        place.read_at_most("a", 99)


def test_what_is_no_file_is_refused_when_it_is_opened_too(root):
    """Whatever was listed may be something else by the time it is opened: a pipe must not be waited for."""
    place = Root.at(root)
    place.write("file", b"x")
    os.mkfifo(f"{root}/pipe")
    os.symlink(f"{root}/file", f"{root}/link")
    os.mkdir(f"{root}/folder")
    found = {}
    for name in ("pipe", "link", "folder"):
        with pytest.raises(Unreadable) as error:
            place.read_at_most(name, 100)
        found[name] = str(error.value)
        assert place.entry(name).problem == found[name]
    assert found == {"pipe": "is a named pipe", "link": "is a symbolic link", "folder": "is a folder"}


@pytest.mark.parametrize(
    ("most_files", "most_bytes", "taken"),
    [(9, 999, 6), (5, 999, 4), (4, 999, 4), (3, 999, 2), (1, 999, 1), (9, 40, 4), (9, 25, 2), (9, 15, 1)],
)
def test_files_of_one_sequence_stay_together_where_a_batch_can_hold_them(most_files, most_bytes, taken):
    files = tuple(
        landing.File(landing.name_of(table, sequence), table, 10)
        for sequence in range(3)
        for table in ("orders", "lineitem")
    )
    assert landing.cut(files, most_files, most_bytes) == files[:taken]


class Shop(lakes.Lake):
    tables = {"sales": Table("sales", {"id": INT, "what": TEXT}, key=("id",))}
    beside = ("cursor.json",)


def test_the_ending_of_a_name_is_for_people(root):
    lake = Shop(root)
    lake.root.write("landing/sales/sales-00000001.json", b'{"id": 1, "what": "a"}\n')
    lake.root.write("landing/sales/sales-00000002.csv", b"id,what\n2,b\n")
    lake.root.write("landing/sales/sales-00000003.csv.GZ", gzip.compress(b"id,what\n3,c\n"))
    asked = {"max_files": 9, "max_bytes": 10**6, "max_bad_share": 0.0, "for_s": 60.0, "scheduled_for": None}
    assert lake.drain(**asked, run_id="one").select("files", "rows", "files_refused").rows() == [(3, 3, 0)]
    assert lake.snapshot().frame("sales").sort("id").collect().rows() == [(1, "a"), (2, "b"), (3, "c")]
    lake.root.write("landing/sales/sales-00000002.json", b'{"id": 4, "what": "d"}\n')
    assert lake.drain(**asked, run_id="two").select("files", "files_refused").rows() == [(0, 1)]
    (refused,) = lake.refused_files()
    assert refused["why"] == "number 2 of sales was ingested before, under another name"
    assert lake.rebuild()["equal"].all()


def test_what_is_no_tables_is_left_alone_and_named(root):
    lake = Shop(root)
    lake.root.write("landing/cursor.json", b"{}")
    lake.root.write("landing/sales/sales-00000001.json", b'{"id": 1, "what": "a"}\n')
    assert [finding.problem for finding in lake.look("landing")] == [None]
    for name in ("sales/report.xlsx", "sales/2026/sales-00000002.json", "sale/sales-00000003.json", "Cursor.json"):
        lake.root.write(f"landing/{name}", b"{}")
    batch = lake.next_batch(max_files=9, scheduled_for=None)
    assert [file.name for file in batch.files] == ["sales-00000001.json"]
    (finding,) = lake.look("landing")
    assert finding.problem == "4 files are no table's and left alone, landing/Cursor.json among them"
    assert "<table>-<8 digits>.json, .csv or .parquet" in finding.remedy
