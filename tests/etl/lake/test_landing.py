"""What waits in landing, seen without opening it: nothing there can block a run or make it read too much."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from etl.lake import landing
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
