"""Two `up` on one root: the second is told who is there. Here the lease alone, in processes that are really killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etl import leases
from etl.serve import lease
from etl.storage import PROJECT, Root

PAGES = {"dashboard": "http://127.0.0.1:8501"}
HOLD = """
import pathlib, sys, time
from etl import leases
from etl.serve import lease
from etl.storage import Root
leases.RENEW_S = 0.2
if sys.argv[3] == "elsewhere":
    leases.machine = lambda: "another machine"
pages = {"dashboard": "http://127.0.0.1:8501"}
held = lease.Lease(pathlib.Path(sys.argv[1]), Root.at(sys.argv[2]), pages, lambda: None)
held.take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.2)
    monkeypatch.setattr(leases, "DEAD_S", 3)
    monkeypatch.setattr(leases, "LOOK_S", 0.1)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lease of a root."""
    started = []

    def start(folder: Path, root: str, where: str = "here") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder), root, where]
        env = os.environ | {"PYTHONPATH": str(PROJECT)}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(folder: Path, root: str, on_lost=lambda: None) -> lease.Lease:
    taken = lease.Lease(folder, Root.at(root), PAGES, on_lost)
    taken.take()
    return taken


def asleep(*_):
    """As a request of a machine that sleeps."""
    raise OSError("the machine sleeps")


def refused(folder: Path, root: str) -> str:
    with pytest.raises(lease.Held) as told:
        take(folder, root)
    return str(told.value)


def test_on_this_machine_it_is_free_the_moment_its_holder_dies(tmp_path, holder):
    first = holder(tmp_path / "services", str(tmp_path))
    told = refused(tmp_path / "services", str(tmp_path))
    assert told.startswith(f"`up` is at work on {tmp_path} already: process {first.pid} on ")
    assert "since 20" in told and told.endswith("its pages: dashboard http://127.0.0.1:8501")
    assert lease.pages(tmp_path / "services") == PAGES  # for `run`, whatever the ports are
    first.kill()
    first.wait()
    assert lease.pages(tmp_path / "services") == {} == lease.pages(tmp_path / "nowhere")
    second = take(tmp_path / "services", str(tmp_path))
    assert second.after_death and f"process {os.getpid()} on " in refused(tmp_path / "services", str(tmp_path))
    second.release()
    third = take(tmp_path / "services", str(tmp_path))
    assert not third.after_death
    third.release()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_in_an_object_store_a_renewed_lease_is_kept_and_one_left_behind_is_taken(tmp_path, s3_root, holder, where):
    first = holder(tmp_path / "first", s3_root, where)
    told = refused(tmp_path / "second", s3_root)  # another folder for its services: another machine or checkout
    assert f"process {first.pid} on " in told and s3_root in told
    first.kill()
    first.wait()
    began = time.monotonic()
    second = take(tmp_path / "second", s3_root)
    assert (time.monotonic() - began > leases.DEAD_S) == (where == "elsewhere")
    assert Root.at(s3_root).read_json(lease.PLACE)["fence"] == 2
    second.release()
    take(tmp_path / "third", s3_root).release()  # at once: it was given back


def test_of_two_that_find_a_dead_one_one_takes_it_and_who_lost_it_is_told(tmp_path, s3_root, monkeypatch):
    told = []
    first = take(tmp_path / "first", s3_root, on_lost=lambda: told.append(True))
    awake, first._root.replace = first._root.replace, asleep
    monkeypatch.setattr(leases, "machine", lambda: "another machine")
    second = take(tmp_path / "second", s3_root)
    first._root.replace = awake
    until = time.monotonic() + 30
    while not told:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert f"process {os.getpid()} on " in first.lost
    first.release()
    assert "`up` is at work" in refused(tmp_path / "third", s3_root)
    second.release()


def test_a_root_that_cannot_be_reached_is_an_error_and_holds_nothing(tmp_path, s3_root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    gone = Root.at("s3://no-such-bucket-at-all/etl")
    with pytest.raises(Exception, match="."):
        lease.Lease(tmp_path / "services", gone, PAGES, lambda: None).take()
    take(tmp_path / "services", str(tmp_path)).release()
