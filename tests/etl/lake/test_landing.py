"""What waits in landing, seen without opening it: nothing there can block a run or make it read too much."""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from etl import lake as lakes
from etl.lake import landing, ledger
from etl.lake.table import INT, TEXT, Column, Table
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
        landing.File(f"{table}/{table}-{sequence:08d}.json", table, 10, sequence=sequence)
        for sequence in range(3)
        for table in ("orders", "lineitem")
    )
    assert landing.cut(files, most_files, most_bytes) == files[:taken]


class Shop(lakes.Lake):
    tables = {
        "sales": Table("sales", {"id": INT, "what": TEXT}, key=("id",)),
        "visits": Table("visits", {"id": INT}, key=("id",), files="web/**/visits-*.json*", on_duplicate="keep"),
    }
    beside = ("cursor.json",)


ASKED = {"max_files": 99, "max_bytes": 10**6, "max_bad_share": 0.0, "for_s": 60.0, "scheduled_for": None}


def drained(lake: Shop, run_id: str = "r", **asked) -> list[tuple]:
    return lake.drain(**ASKED | asked, run_id=run_id).select("files", "rows", "files_refused").rows()


def test_the_ending_of_a_name_is_for_people(root):
    lake = Shop(root)
    lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
    lake.root.write("landing/sales/2.csv", b"id,what\n2,b\n")
    lake.root.write("landing/sales/3.csv.GZ", gzip.compress(b"id,what\n3,c\n"))
    lake.root.write("landing/sales/4", b'{"id": 4, "what": "d"}\n')
    assert drained(lake) == [(4, 4, 0)]
    assert lake.snapshot().frame("sales").sort("id").collect()["what"].to_list() == ["a", "b", "c", "d"]
    assert lake.rebuild()["equal"].all()


NAMES = [
    "sales/2026/11/26/events.0001.json.gz",
    "sales/Sales Of Monday (copy).JSON",
    "sales/a#b%20c?d&e=f.json",
    "sales/日本.json",
    "sales/" + "n" * 250 + ".json",
    os.fsdecode(b"sales/\xff\xfe.json"),
    "sales/two\nlines.json",
    "sales/repeated/x.json",
    "sales/-rf",
]


def test_a_file_may_have_any_name(root):
    lake, rows = Shop(root), range(len(NAMES))
    for number, name in enumerate(NAMES):
        lake.root.write(f"landing/{name}", b'{"id": %d, "what": "a"}\n{}\n' % number)
    assert drained(lake, max_bad_share=0.5) == [(len(NAMES), len(NAMES), 0)]
    assert lake.snapshot().frame("sales").sort("id").collect()["id"].to_list() == [*rows]
    files = lake.snapshot().frame("files").collect()
    shown = {ledger.shown(name) for name in NAMES}
    assert {*files["path"]} == shown == {*lake.refused_lines()["file"]}
    assert files.select("batch", "table", "rows", "refused").unique().rows() == [(1, "sales", 1, 1)]
    assert [*files["bytes"].unique()] == [len(b'{"id": 1, "what": "a"}\n{}\n')]
    for number, name in enumerate(NAMES):  # the same again, and one with other content
        lake.root.write(f"landing/{name}", b'{"id": %d, "what": "a"}\n{}\n' % (number or 77))
    assert drained(lake, max_bad_share=0.5) == [(0, 0, 1)]
    assert lake.root.tree("landing") == []
    (refused,) = lake.refused_files()
    assert (refused["file"], refused["why"]) == (NAMES[0], "was ingested in batch 1 with other content")
    assert lake.rebuild()["equal"].all()
    for name in NAMES[1:]:  # refused whole, and brought back
        lake.root.write(f"landing/{name[:-1]}2", b"")
    assert drained(lake, max_bad_share=0.5) == [(0, 0, len(NAMES) - 1)]
    for file in (file for file in lake.refused_files() if file["why"] == "is empty"):
        assert lake.retry(file["file"]) == [file["landing"]]
    assert {path for path, _ in lake.root.tree("landing")} == {f"{name[:-1]}2" for name in NAMES[1:]}


def test_the_same_content_under_another_name_follows_the_declaration(root):
    lake = Shop(root)
    for name in ("sales/a.json", "sales/b.json", "web/visits-1.json", "web/x/visits-2.json"):
        lake.root.write(f"landing/{name}", b'{"id": 1, "what": "a"}\n')
    assert drained(lake) == [(3, 3, 1)]
    lake.root.write("landing/sales/c.json", b'{"id": 1, "what": "a"}\n')
    lake.root.write("landing/web/visits-3.json", b'{"id": 1, "what": "a"}\n')
    assert drained(lake) == [(1, 1, 1)]
    assert {(file["file"], file["why"]) for file in lake.refused_files()} == {
        ("sales/b.json", "has the same content as sales/a.json"),
        ("sales/c.json", "has the same content as sales/a.json of batch 1"),
    }
    assert lake.snapshot().frame("visits").collect().height == 3
    assert lake.rebuild()["equal"].all()


def test_a_repeated_file_is_known_whatever_came_between(root, monkeypatch):
    """Also when the manifests are gone, the index was folded, and it is lost."""
    monkeypatch.setattr(ledger, "RECENT", 6)
    lake = Shop(root)
    for number in range(12):
        lake.root.write(f"landing/sales/{number}.json", b'{"id": %d, "what": "a"}\n' % number)
        assert drained(lake, f"r{number}") == [(1, 1, 0)]
        if number % 4 == 3:
            lake.compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="c")
    assert len(lake.root.names("lake/batches")) == 2  # the newest, and that it is done
    (index,) = lake.root.names("lake/known")
    for lose in (False, True):
        if lose:
            lake.root.remove(f"lake/known/{index}")
        for number in (0, 5, 11):
            lake.root.write(f"landing/sales/{number}.json", b'{"id": %d, "what": "a"}\n' % number)
            lake.root.write(f"landing/sales/{number}-again.json", b'{"id": %d, "what": "a"}\n' % number)
        assert drained(lake) == [(0, 0, 3)]
    assert lake.snapshot().frame("sales").collect()["id"].sort().to_list() == [*range(12)]
    assert lake.rebuild()["equal"].all()


def test_what_is_no_tables_is_named_and_refused_after_a_day(root):
    lake = Shop(root)
    lake.root.write("landing/cursor.json", b"{}")
    lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
    assert [finding.problem for finding in lake.look("landing")] == [None]
    strays = ["sale/1.json", "Cursor.json", "web/other.json", "sales/.hidden", ".DS_Store"]
    for name in strays:
        lake.root.write(f"landing/{name}", b"{}")
    os.mkfifo(f"{root}/landing/pipe")
    os.symlink("/etc/hostname", f"{root}/landing/link.json")
    strays += ["pipe", "link.json"]
    batch = lake.next_batch(max_files=9, scheduled_for=None)
    assert [file.path for file in batch.files] == ["sales/1.json"]
    assert str(batch) == f"batch 1: 1 files; 7 are no table's: {', '.join(sorted(strays))}"
    (finding,) = lake.look("landing")
    assert finding.problem == "7 files are no table's, landing/.DS_Store among them: they are refused after a day"
    assert finding.remedy.endswith("sales/** (sales), web/**/visits-*.json* (visits)")
    lake.commit(lake.read(batch), run_id="r")
    assert lake.idle().startswith("no new files in landing; 7 are no table's: .DS_Store, Cursor.json, ")
    assert lake.unmatched() == sorted(strays)
    assert drained(lake, now=datetime.now(UTC) + timedelta(hours=25)) == [(0, 0, 7)]
    assert {file["file"] for file in lake.refused_files()} == {*strays}
    assert lake.root.tree("landing")[0][0] == "cursor.json"
    assert os.readlink(next(Path(root, "refused").glob("*/link.json~????????"))) == "/etc/hostname"


def test_a_file_that_is_written_in_place_is_left_alone_until_it_is_quiet(root):
    lake, path = Shop(root), Path(root, "landing/sales/1.json")
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        file.write('{"id": 1, "what": "a"}\n' * 100)
        file.flush()
        asked = {"max_files": 9, "scheduled_for": None, "quiet_s": 10}
        assert lake.next_batch(**asked) is None
        assert lake.idle() == "no new files in landing; 1 is still being written: sales/1.json"
        for ahead_s, taken in ((5, False), (11, True)):
            batch = lake.next_batch(**asked, now=datetime.now(UTC) + timedelta(seconds=ahead_s))
            assert bool(batch) == taken
        file.write('{"id": 2, "what": "b"}\n' * 400)
    lake.root.write("landing/sales/2.json", b'{"id": 3, "what": "c"}\n')  # by a rename: it is whole
    assert [file.path for file in lake.next_batch(**asked).files] == ["sales/2.json"]
    os.rename(path, f"{root}/landing/sales/3.json")
    assert len(lake.next_batch(**asked).files) == 2


def test_what_is_written_to_a_file_after_it_was_ingested_is_told(root):
    lake, path = Shop(root), Path(root, "landing/sales/1.json")
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        file.write('{"id": 1, "what": "a"}\n')
        file.flush()
        assert drained(lake) == [(1, 1, 0)]
        assert lake.idle() == "no new files in landing"
        file.write('{"id": 2, "what": "b"}\n')
    (finding,) = lake.look("the archive")
    assert "sales/1.json has 23 bytes more than were ingested" in finding.problem
    lake.commit(lake.read(lake.next_batch(max_files=9, scheduled_for=None)), run_id="told")
    assert lake.next_batch(max_files=9, scheduled_for=None) is None
    (refused,) = lake.refused_files()
    assert refused["why"] == "was written to sales/1.json after that was ingested in batch 1"
    lake.retry(refused["file"])
    assert drained(lake) == [(1, 1, 0)]
    assert [finding.problem for finding in lake.look("the archive")] == [None]
    assert lake.snapshot().frame("sales").sort("id").collect()["id"].to_list() == [1, 2]
    assert lake.rebuild()["equal"].all()


def test_a_file_that_comes_while_the_one_before_is_archived_stays(root):
    lake, path = Shop(root), "landing/sales/1.json"
    lake.root.write(path, b'{"id": 1, "what": "a"}\n')
    lake.root.write("landing/sales/2.json", b"{oops\n")
    batch = lake.next_batch(max_files=9, scheduled_for=None)
    parsed = lake.read(batch)
    sha256s = dict(parsed.files.select("file", "sha256").rows())

    def come() -> None:  # the writer is stopped after it has asked for its lease
        lake.root.write(path, b'{"id": 2, "what": "b"}\n')
        lake.root.write("landing/sales/2.json", b'{"id": 3, "what": "c"}\n')

    landing.archive(lake.root, [(parsed.batch.files[0], sha256s["sales/1.json"])], batch.date, "late", come)
    landing.refuse(lake.root, parsed.batch.refused, batch.date, "late")
    assert [file for file, _ in lake.root.tree("landing")] == ["sales/1.json", "sales/2.json"]
    assert (lake.refused_files(), lake.root.files("archive")) == ([], [])
    assert drained(lake) == [(2, 2, 0)]


def test_landing_may_be_another_filesystem(root, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
        Path(root).mkdir()
        os.symlink(other, f"{root}/landing")
        lake = Shop(root)
        lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
        lake.root.write("landing/sales/2.json", b"")
        assert drained(lake) == [(1, 1, 1)]
        lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
        assert drained(lake) == [(0, 0, 0)]
        assert lake.root.tree("landing") == []
        assert lake.rebuild()["equal"].all()


def test_an_archive_that_takes_nothing_is_told_before_anything_is_committed(root, monkeypatch):
    lake = Shop(root)
    lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
    batch = lake.next_batch(max_files=9, scheduled_for=None)
    Path(root, "archive").write_text("in the way")
    with pytest.raises(OSError, match="archive"):
        lake.commit(lake.read(batch), run_id="r")
    assert lake.root.names("lake/batches") == [] and lake.root.names("lake/sales") == []
    os.unlink(f"{root}/archive")
    assert drained(lake) == [(1, 1, 0)]


def test_a_file_that_cannot_be_taken_away_is_ingested_once(root):
    lake, path = Shop(root), Path(root, "landing/sales/1.json")
    lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        assert drained(lake) == [(1, 1, 0), (0, 0, 0)]
        assert drained(lake) == []
        assert lake.snapshot().frame("sales").collect().height == 1
        assert len([*Path(root, "archive").glob("*/.repeated/*/*")]) == 1
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert lake.rebuild()["equal"].all()


def test_a_file_that_two_tables_take_is_refused_and_both_are_named(root):
    class Both(lakes.Lake):
        tables = {
            name: Table(name, {"id": INT}, key=("id",), files=glob) for name, glob in (("a", "m/**"), ("b", "m/*"))
        }

    lake = Both(root)
    lake.root.write("landing/m/1.json", b'{"id": 1}\n')
    lake.root.write("landing/m/x/2.json", b'{"id": 2}\n')
    assert drained(lake) == [(1, 1, 1)]
    assert [file["why"] for file in lake.refused_files()] == [
        "is taken by the globs of a and b: make one of them narrower"
    ]


def test_a_link_to_a_folder_is_listed_among_what_was_refused(root):
    lake = Shop(root)
    os.makedirs(f"{root}/landing/sales")
    os.symlink("/etc", f"{root}/landing/sales/link")
    assert drained(lake) == [(0, 0, 1)]
    assert [file["why"] for file in lake.refused_files()] == ["is a symbolic link"]


def test_a_run_that_dies_while_a_file_is_refused_leaves_it_to_the_next(root, monkeypatch):
    lake = Shop(root)
    lake.root.write("landing/sales/1.json", b'{"id": 1, "what": "a"}\n')
    drained(lake)
    lake.root.write("landing/sales/1.json", b'{"id": 2, "what": "b"}\n')

    def end(name):
        if name == "a refused file is not moved yet":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(landing, "crash_point", end)
        drained(lake)
    assert drained(lake) == [(0, 0, 1)]
    assert lake.root.tree("landing") == [] and len(lake.refused_files()) == 1


@pytest.mark.parametrize(
    ("glob", "path", "taken"),
    [
        (None, "t/a.json", True),
        (None, "t/x/y/a", True),
        (None, "t/.a", False),
        (None, "t/.x/a", False),
        (None, "tt/a", False),
        ("events/**/*", "events/a.json", True),
        ("events/**/*", "events/2026/11/a.json.gz", True),
        ("*.csv", "a.csv", True),
        ("*.csv", "x/a.csv", False),
        ("x/[ab]?.json", "x/b1.json", True),
        ("x/.in/*", "x/.in/a", True),
        ("x/.in/*", "x/.in/_a", False),
        (None, "t/_SUCCESS", False),
        (None, "t/_temporary/0/a.json", False),
        (None, "t/a_b/c_.json", True),
        ("_x/**", "_x/a", True),
        ("_x/**", "_x/.a", False),
    ],
)
def test_a_glob_says_which_files_are_a_tables(glob, path, taken):
    assert Table("t", {"id": INT}, key=("id",), files=glob).takes(path) == taken


@pytest.mark.parametrize(
    "wrong",
    [
        *({"files": glob} for glob in ("", "/x", "../x/*", "a/../b", "./a", "a//b", "x/*.{json,csv}", "landing/x/*")),
        *({"mode": "upsert", "key": ()}, {"key": "id"}),
        *({"columns": {"id": Column(INT, range=(3, 1))}}, {"columns": {"id": TEXT, "k": Column(TEXT, choices="abc")}}),
        *({"on_duplicate": "?"}, {"name": "files"}, {"name": "a/b"}),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match=r"files=|on_duplicate=|no name for a table|key=|nothing is|they are a list"):
        Table(**{"name": "t", "columns": {"id": INT}, "key": ("id",)} | wrong)
