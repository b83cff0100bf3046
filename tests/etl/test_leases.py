"""A lease under test: holders that die, that are stopped and go on, and clocks that nobody may trust."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from etl import leases
from etl.leases import LeaseHeld, LeaseLost
from etl.storage import Root

HOUR_OF = {"behind": -600, "ahead": 600}  # seconds, of a machine's clock


def hold(url: str, pipe, watches: tuple[float, float, float]) -> None:
    """A holder in a process of its own: says its fence, and whenever it is asked, whether it holds the lease."""
    leases.RENEW_S, leases.DEAD_S, leases.LOOK_S = watches
    with Root.at(url).lease("leases/lock", "another") as lease:
        pipe.send(lease.fence)
        while pipe.recv():
            try:
                lease.require()
                pipe.send("held")
            except LeaseLost as error:
                pipe.send(str(error))


@pytest.fixture
def holder(request, quick):
    """Starts such a process: gives it and its pipe."""

    def start(url: str):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        watches = leases.RENEW_S, leases.DEAD_S, leases.LOOK_S
        process = context.Process(target=hold, args=(url, theirs, watches), daemon=True)
        process.start()
        request.addfinalizer(process.kill)
        assert ours.poll(60)
        return process, ours

    return start


@pytest.mark.parametrize("clock", HOUR_OF)
def test_a_holder_that_was_stopped_is_taken_over_and_finds_out(s3_root, holder, monkeypatch, clock):
    process, pipe = holder(s3_root)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + HOUR_OF[clock])
    place = Root.at(s3_root)
    assert pipe.recv() == 1
    time.sleep(2 * leases.DEAD_S)
    with pytest.raises(LeaseHeld, match="another"), place.lease("leases/lock", "we", wait_s=0):
        pass  # it renews it, whatever the clocks say
    os.kill(process.pid, signal.SIGSTOP)
    with place.lease("leases/lock", "we", wait_s=0) as lease:
        assert lease.fence == 2
        pipe.send(True)
        os.kill(process.pid, signal.SIGCONT)
        assert "was taken over" in pipe.recv()
        pipe.send(False)
        process.join(30)
        assert place.read_json("leases/lock")["holder"] == "we"  # it has not let go of what is another's
        lease.require()


def test_a_killed_holder_is_waited_for_and_no_longer(s3_root, holder):
    process, pipe = holder(s3_root)
    pipe.recv()
    process.kill()
    with Root.at(s3_root).lease("leases/lock", "next", wait_s=0) as lease:
        assert lease.fence == 2
    assert leases.DEAD_S * 30 < 45  # seconds


def test_what_a_holder_leaves_is_the_next_ones(root, s3_root):
    for place in (Root.at(root), Root.at(s3_root)):
        with place.lease("leases/lock", "first") as lease:
            lease.about["batch"] = 7
            lease.rise(40)
        with place.lease("leases/lock", "second") as lease:
            assert (lease.fence, lease.about) == (42, {"batch": 7})
        told = place.read_json("leases/lock")
        assert (told["holder"], told["fence"], told["about"]) == (None, 42, {"batch": 7})


def test_a_lease_that_was_removed_is_no_lease(root):
    place = Root.at(root)
    with place.lease("leases/lock", "first") as lease:
        lease.require()
        shutil.rmtree(f"{root}/leases")
        with pytest.raises(LeaseLost, match="was removed while first held it"):
            lease.require()
        with place.lease("leases/lock", "second", wait_s=0):
            pass


def test_a_document_that_a_power_cut_left_is_as_good_as_none(root):
    place = Root.at(root)
    for left in (b"", b"\0" * 80, b'{"holder": "x", "fen', b"preprocess-20261101"):
        place.write("leases/lock", left)
        with place.lease("leases/lock", "next", wait_s=0) as lease:
            assert lease.fence == 1


def test_a_renewal_that_fails_is_tried_again(s3_root, faulty, quick):
    with Root.at(s3_root).lease("leases/lock", "we") as lease:
        faulty.answer("PUT", "leases/lock", 403, "AccessDenied", times=2)
        time.sleep(leases.DEAD_S / 2)
        lease.require()
    assert faulty.count("PUT", "leases/lock", 403) == 2
    assert json.loads(Root.at(s3_root).read("leases/lock"))["fence"] == 1


def test_a_file_is_replaced_by_one_of_those_who_have_read_it(root, s3_root):
    for place in (Root.at(root), Root.at(s3_root)):
        assert place.replace("a/pointer", b"1", None)
        assert place.replace("a/pointer", b"2", None) is None
        mark = place.mark("a/pointer")
        assert place.replace("a/pointer", b"2", mark) == place.mark("a/pointer") != mark
        assert place.replace("a/pointer", b"3", mark) is None
        assert place.replace("a/other", b"3", mark) is None
        assert place.read("a/pointer") == b"2"
        assert place.which(["a/pointer", "a/point", "a/pointer2"]) == {"a/pointer"}
