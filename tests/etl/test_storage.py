"""Roots: written whole or not at all, on this machine and over the S3 protocol alike."""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import s3fs

from etl import storage
from etl.leases import LeaseHeld
from etl.storage import PROJECT, Root, Unreachable
from pipeline import Lake


@pytest.fixture(params=["local", "s3"])
def place(request) -> Root:
    return Root.at(request.getfixturevalue("root" if request.param == "local" else "s3_root"))


def test_a_relative_root_is_relative_to_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Root.at("outputs").url == str(PROJECT / "outputs")
    assert Root.at("/somewhere").url == "/somewhere"


def test_what_is_written_is_read_back(place):
    place.write("a/b.json", b"1")
    place.write("a/b.json", b"22")
    assert place.read("a/b.json") == b"22"
    assert place.size("a/b.json") == 2
    assert place.names("a") == ["b.json"]
    assert place.exists("a/b.json")


def test_what_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    place, limits = Root.at(tmp_path / "root"), resource.getrlimit(resource.RLIMIT_FSIZE)
    place.write("old", b"x")
    (tmp_path / "large").write_bytes(b"x" * 20_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError):
            place.write("new", b"x" * 20_000)
        with pytest.raises(OSError):
            place.put("new", tmp_path / "large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "root") == ["old"]


def test_what_is_missing_says_so(place):
    assert not place.exists("nothing")
    assert place.names("nothing") == []
    place.remove("nothing")
    place.remove_tree("nothing")
    with pytest.raises(FileNotFoundError):
        place.read("nothing")


def test_many_folders_are_removed_and_their_neighbours_stay(place):
    for rel in ("a/1", "a/2", "a/10", "b/1"):
        for name in ("run.json", "page.html", "more/deep"):
            place.write(f"{rel}/{name}", b"x")
    place.remove_trees(["a/1", "a/2", "a/none", "b/1", "none/1"], first="run.json")
    assert place.names("a") == ["10"] and place.names("b") == []
    assert place.names("a/10") == ["more", "page.html", "run.json"]


def test_of_many_creators_one_wins(place):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if place.create("one", str(i).encode()) else None)
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert place.read("one") == str(won[0]).encode()


def test_a_move_done_before_is_fine_and_a_lost_file_is_not(place):
    place.write("here", b"x")
    place.move("here", "there/it")
    place.move("here", "there/it")
    assert place.read("there/it") == b"x"
    with pytest.raises(FileNotFoundError):
        place.move("here", "elsewhere")


def test_only_the_file_that_was_looked_at_is_moved(place):
    place.write("here", b"first")
    mark = place.mark("here")
    place.write("here", b"another")
    assert not place.move("here", "there/it", mark)
    assert (place.read("here"), place.exists("there/it")) == (b"another", not place.may_tear)  # moto takes no condition
    assert place.move("here", "there/it", place.mark("here"))
    assert (place.exists("here"), place.read("there/it")) == (False, b"another")


def test_a_file_that_comes_while_another_is_moved_stays(root, monkeypatch):
    place, replace = Root.at(root), os.replace
    place.write("here", b"first")

    def late(source: str, target: str) -> None:
        if target.endswith("there/it"):
            monkeypatch.undo()
            place.write("here", b"another")
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert not place.move("here", "there/it", place.mark("here"))
    assert (place.read("here"), place.names("there")) == (b"another", [])


def test_an_object_that_comes_while_another_is_moved_stays(s3_root, faulty):
    place = Root.at(s3_root)
    place.write("here", b"first")
    faulty.before("DELETE", "/here", lambda: place.write("here", b"another"))
    assert not place.move("here", "there/it", place.mark("here"))
    assert (place.read("here"), place.read("there/it")) == (b"another", b"first")


@pytest.fixture
def unknown(s3_root, monkeypatch) -> Root:
    """A root for which there are no credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    yield Root.at(s3_root)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "ask",
    [
        lambda place: place.names(""),
        lambda place: place.read("a"),
        lambda place: place.read_marked("a"),
        lambda place: place.write("a", b"x"),
        lambda place: place.create("a", b"x"),
        lambda place: place.exists("a"),
        lambda place: place.tree(""),
        lambda place: place.move("a", "b", "mark"),
        lambda place: place.remove("a"),
        lambda place: place.has_bucket(),
        lambda place: pickle.loads(pickle.dumps(place)).names(""),
    ],
)
def test_a_store_that_cannot_be_asked_is_an_os_error(unknown, ask):
    with pytest.raises(Unreachable) as raised:
        ask(unknown)
    assert str(raised.value) == f"{unknown.url} cannot be reached: Unable to locate credentials"


def test_nobody_at_a_stores_address_is_told_without_what_was_asked(s3_root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(Unreachable, match=r'Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket-\d+"$'):
        Root.at(s3_root).names("")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_is_there_or_not(s3_root):
    assert Root.at(s3_root).has_bucket() and not Root.at("s3://nobodys-bucket/etl").has_bucket()


def test_remove_tree_removes_a_folder(place):
    place.write("days/monday/a", b"x")
    place.write("days/tuesday/a", b"x")
    place.remove_tree("days/monday")
    assert place.names("days") == ["tuesday"]


def test_a_lease_has_one_holder(place, quick):
    with (
        place.lease("lock", "first"),
        pytest.raises(LeaseHeld, match="first"),
        place.lease("lock", "second", wait_s=0.3),
    ):
        pass
    with place.lease("lock", "third", wait_s=0):
        pass


@pytest.mark.parametrize("says", [True, False])
def test_what_was_created_is_ours_though_its_reply_was_lost(s3_root, faulty, says):
    faulty.says_which_condition = says
    place = Root.at(s3_root)
    faulty.lose_reply("PUT", "mine")
    assert place.create("mine", b"1")
    assert (faulty.count("PUT", "mine", None), faulty.count("PUT", "mine", 412)) == (1, 1)
    assert not place.create("mine", b"2")
    assert place.read("mine") == b"1"


@pytest.mark.parametrize("status,code", [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")])
def test_a_conflict_with_nothing_there_is_tried_again(s3_root, faulty, status, code):
    place = Root.at(s3_root)
    faulty.answer("PUT", "mine", status, code)
    assert place.create("mine", b"1")
    faulty.answer("PUT", "mine", status, code)
    assert not place.create("mine", b"2")
    faulty.answer("PUT", "other", status, code, times=100)
    with pytest.raises(OSError, match="as told"):
        place.create("other", b"1")


def test_a_file_is_created_over_a_network_share_that_lost_the_reply(root, monkeypatch):
    link = os.link

    def linked_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr("os.link", linked_twice)
    assert Root.at(root).create("mine", b"1")
    monkeypatch.undo()
    assert not Root.at(root).create("mine", b"1")
    assert os.listdir(root) == ["mine"]


@pytest.mark.parametrize("says", [True, False])
def test_a_lease_whose_replies_are_lost_is_held_and_let_go(s3_root, faulty, quick, says):
    """At its first taking, at the taking over of one whose holder died, at a renewal, and at its release."""
    faulty.says_which_condition = says
    place = Root.at(s3_root)
    for holder in ("first", "second"):
        faulty.lose_reply("PUT", "lock")
        with place.lease("lock", holder, wait_s=0):
            pass
    place.write("lock", b'{"holder": "dead", "fence": 7}')
    faulty.lose_reply("PUT", "lock")
    with place.lease("lock", "alive", wait_s=0) as lease:
        assert (place.read_json("lock")["holder"], lease.fence) == ("alive", 8)
        faulty.lose_reply("PUT", "lock")
        with pytest.raises(LeaseHeld, match="alive"), place.lease("lock", "third", wait_s=0):
            pass
        lease.require()
        faulty.lose_reply("PUT", "lock")
        faulty.lose_reply("DELETE", "lock")
    with place.lease("lock", "last", wait_s=0):
        pass


def test_a_release_whose_reply_was_lost_does_not_free_the_next_holders_lease(s3_root, s3_server, faulty, quick):
    place, next_one = Root.at(s3_root), contextlib.ExitStack()
    with place.lease("lock", "first", wait_s=0):
        # before the release is repeated, somebody else has the lease
        for method in ("PUT", "DELETE"):
            faulty.lose_reply(
                method, "lock", between=lambda: next_one.enter_context(_reached_directly(place, s3_server))
            )
    faulty.faults.clear()
    with next_one, pytest.raises(LeaseHeld, match="next"), place.lease("lock", "third", wait_s=0):
        pass


def _reached_directly(place: Root, s3_server: str):
    """The next holder's lease, taken past the proxy."""
    fs = s3fs.S3FileSystem(endpoint_url=s3_server, use_listings_cache=False, skip_instance_cache=True)
    return Root(place.url, fs, place._prefix).lease("lock", "next", wait_s=5)


def test_two_with_one_name_have_one_lease(place, quick):
    with place.lease("lock", "dev"), pytest.raises(LeaseHeld), place.lease("lock", "dev", wait_s=0.3):
        pass


def _hold(url: str, ready) -> None:
    with Root.at(url).lease("leases/lock", "doomed"):
        ready.set()
        time.sleep(60)


def test_a_holder_that_is_stopped_is_named_and_a_killed_one_frees_a_local_lease(root):
    ready = multiprocessing.get_context("spawn").Event()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(root, ready))
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, signal.SIGSTOP)
    ends = rf"doomed \(process {holder.pid} on .*, since .* UTC\): it is stopped: .*`kill -9 {holder.pid}` ends it"
    with pytest.raises(LeaseHeld, match=ends), Root.at(root).lease("leases/lock", "next", wait_s=0.1):
        pass
    (finding,) = Lake(root).look("the writers")
    assert "leases/lock is held by doomed, since" in finding.problem and f"kill -CONT {holder.pid}" in finding.remedy
    os.kill(holder.pid, signal.SIGKILL)
    with Root.at(root).lease("leases/lock", "next", wait_s=10):
        assert [finding.problem for finding in Lake(root).look("the writers")] == [None]
    holder.join()


def test_a_reader_never_sees_half_a_file(root):
    place, torn = Root.at(root), []
    place.write("f", b"a" * 1_000_000)
    done = threading.Event()

    def read():
        while not done.is_set():
            data = place.read("f")
            if len(data) != 1_000_000 or len(set(data)) != 1:
                torn.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcdefghij":
        place.write("f", bytes([letter]) * 1_000_000)
    done.set()
    reader.join()
    assert not torn


@pytest.mark.parametrize("last", [None, "_delta_log/1.json"])
def test_a_tree_is_moved_with_all_that_is_in_it(place, last):
    for name in ("a.parquet", "_delta_log/0.json", "_delta_log/1.json"):
        place.write(f"from/here/{name}", name.encode())
    place.move_tree("from/here", "to", last=last)
    assert place.files("to") == ["to/_delta_log/0.json", "to/_delta_log/1.json", "to/a.parquet"]
    assert place.files("from") == [] and place.read("to/a.parquet") == b"a.parquet"
    with pytest.raises(FileNotFoundError):
        place.move_tree("from/here", "again", last=last)


def test_what_killed_processes_left_of_temporary_folders_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from etl.storage import temporary_folder\n"
        "with temporary_folder('made-') as folder:\n"
        "    open(f'{folder}/a', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "made-by-somebody-else").mkdir()
    (tmp_path / "made-note").write_text("a file")
    with storage.temporary_folder("made-") as first, storage.temporary_folder("made-") as second:
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"made-by-somebody-else", "made-note", Path(first).name, Path(second).name}
    assert {path.name for path in tmp_path.iterdir()} == {"made-by-somebody-else", "made-note"}


def test_a_file_in_the_place_of_a_folder_is_an_empty_folder(tmp_path):
    place = Root.at(tmp_path)
    place.write("a", b"x")
    assert (place.names("a"), place.entries("a"), place.tree("a"), place.files("a"), place.entry("a/b")) == (
        [],
        [],
        [],
        [],
        None,
    )
    with pytest.raises(FileNotFoundError):
        place.read("a/b")
    assert place.read_json("a/b") is None
    (tmp_path / "c").mkdir()
    place.remove("c")
    place.remove("a/b")
    assert place.names("") == ["a", "c"]
