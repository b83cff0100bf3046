"""What `up` starts beside the worker: real processes that die, on a clock that can be set forward."""

import contextlib
import logging
import os
import signal
import socket
import sqlite3
import sys
import threading
import time

import pytest
from support import free_port

import orchestrate
from etl.kernels import children
from etl.serve import services


class Clock:
    """Seconds, set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def dying(tmp_path):
    """A service that dies at once, on a clock of its own."""
    made = []

    def make(essential: bool) -> tuple[services.Service, Clock]:
        clock = Clock()
        service = services.Service("dashboard", ["false"], 0, "", "", log_path=tmp_path / "log", essential=essential)
        service.deaths = children.Deaths(clock)
        service.start()
        made.append(service)
        return service, clock

    yield make
    services.stop(made)


def die(service: services.Service, clock: Clock, times: int, apart_s: float) -> None:
    for _ in range(times):
        service.process.wait()
        service.ensure()
        clock.now += apart_s
        if service.process is None:
            service.ensure()
        assert service.process, "it was not started again"


def test_deaths_that_are_months_apart_end_nothing(dying):
    die(*dying(essential=True), times=20, apart_s=30 * 24 * 3600)


def test_what_is_not_essential_may_die_as_often_as_it_will_later_and_later_and_with_one_warning(dying, caplog):
    service, clock = dying(essential=False)
    with caplog.at_level(logging.WARNING):
        die(service, clock, times=20, apart_s=children.SLOWEST_S)
        assert len(caplog.records) == 1 and "dashboard ended with status 1" in caplog.text
        service.process.wait()
        service.ensure()
        clock.now += children.SLOWEST_S - 1
        service.ensure()
        assert service.process is None  # it dies again and again: not yet
    clock.now += 1
    service.ensure()
    assert service.process.wait() == 1


def test_what_is_essential_ends_up_never_either_and_each_death_is_a_warning(dying, caplog):
    service, clock = dying(essential=True)
    die(service, clock, times=20, apart_s=children.SLOWEST_S)
    assert "dashboard ended with status 1, 20 times within an hour" in caplog.text and len(caplog.records) == 20


BEATS = "import os, pathlib, time\nwhile True: pathlib.Path(os.environ['ETL_BEAT']).touch(), time.sleep(0.1)"


@pytest.mark.parametrize("has_page", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_what_hangs_is_found_by_its_page_or_beat_and_started_again(tmp_path, monkeypatch, caplog, stopped, has_page):
    monkeypatch.setattr(services, "LOOK_S", 0.3)
    monkeypatch.setattr(services, "BEAT_S", 1)
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    service = services.Service("page", command, port, f"http://127.0.0.1:{port}/", "", log_path=tmp_path / "log")
    if not has_page:
        service = services.Service("beats", [sys.executable, "-c", BEATS], 0, "", "", log_path=tmp_path / "log")
        service.beat = tmp_path / "beat"
    service.start()
    ready = service.wait_ready if has_page else list
    try:
        ready()
        first, until = service.process, time.monotonic() + 60
        while not service.health._has_answered and time.monotonic() < until:
            service.ensure()
            time.sleep(0.05)
        if stopped:
            first.send_signal(signal.SIGSTOP)
        for _ in range(200 if stopped else 30):
            service.ensure()
            time.sleep(0.05)
            if service.process is not first:
                break
        assert (service.process is not first) == stopped == ("starting it again" in caplog.text)
        ready()
    finally:
        services.stop([service])


def test_a_damaged_database_of_prefects_is_set_aside_and_one_that_is_locked_is_not(tmp_path):
    path = tmp_path / "prefect.db"
    assert services.set_aside_damaged(path) == ""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("a" * 500,)] * 200)
        database.commit()
        database.execute("BEGIN EXCLUSIVE")
        assert services.set_aside_damaged(path) == ""
        assert f"prefect.db is locked by process {os.getpid()} (" in services.who_locks(path)
        assert services.who_locks(path, os.getpid()) == "", "its own server's"
        database.rollback()
        assert services.set_aside_damaged(path) == services.who_locks(path) == ""
    whole = path.read_bytes()
    for damaged in (b"x" * len(whole), whole[:8192] + bytes(8192) + whole[16384:], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        told = services.set_aside_damaged(path)
        [aside] = tmp_path.glob("prefect.db.damaged-*")
        assert f"{path} is damaged" in told and aside.name in told and not path.exists()
        assert aside.read_bytes() == damaged
        aside.unlink()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_who_locks_prefects_database_is_told_once_and_for_as_long_as_it_does(tmp_path, monkeypatch, caplog, journal):
    monkeypatch.setattr(services, "LOOK_S", 0)
    service = services.prefect_server(0, tmp_path, tmp_path)
    service.command, service.health_url = ["sleep", "60"], f"http://127.0.0.1:{free_port()}/"

    def look(is_ill: bool, times: int) -> None:
        until = time.monotonic() + 60
        while times and time.monotonic() < until:
            time.sleep(0.02)
            service.ensure()
            times -= bool(service.ill) == is_ill
        assert not times

    with contextlib.closing(sqlite3.connect(tmp_path / "prefect.db", isolation_level=None)) as database:
        database.execute(f"PRAGMA journal_mode={journal}")
        database.execute("CREATE TABLE runs (name TEXT)")
        database.execute("BEGIN EXCLUSIVE")
        try:
            service.start()
            service.health._has_answered = True
            first = service.process
            look(is_ill=True, times=60)
            assert service.process is first, "another start would not help"
            assert caplog.text.count(f"is locked by process {os.getpid()}") == len(caplog.records) == 1
            [told] = services.ill(["no service", service])
            assert told["name"] == "Prefect server" and told["why"].partition("; ")[2].startswith("end that process")
            database.execute("ROLLBACK")
            look(is_ill=False, times=1)
            assert services.ill([service]) == []
        finally:
            services.stop([service])


def test_what_cannot_be_started_is_tried_again(dying, caplog):
    service, clock = dying(essential=False)
    service.process.wait()
    service.command = ["/no/such/program"]
    for _ in range(20):
        service.ensure()
        clock.now += children.SLOWEST_S
    assert "could not be started" in caplog.text or service.process is None
    service.command = ["false"]
    service.ensure()
    assert service.process.wait() == 1


def test_only_up_cannot_do_without_prefects_server(tmp_path):
    made = orchestrate.services("root", orchestrate.PORTS, tmp_path)
    assert [service.name for service in made if service.essential] == ["Prefect server"]


def test_a_port_that_is_given_up_soon_is_waited_for(tmp_path):
    """By the children of an `up` that was killed."""
    with socket.socket() as other:
        other.bind((services.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(services.PortTaken, match=f"port {port}, for the API, is taken"):
            services.ensure_free(port, "API")
        threading.Timer(0.5, other.close).start()
        services.ensure_free(port, "API", within_s=60)


def test_a_long_log_moves_aside_while_its_service_goes_on_writing(tmp_path):
    path = tmp_path / "log"
    services.shorten(path)  # none yet
    with path.open("ab", buffering=0) as log:
        log.write(b"a" * 90)
        services.shorten(path, most=99)
        assert path.stat().st_size == 90
        log.write(b"b" * 10)
        services.shorten(path, most=99)
        log.write(b"c")
    assert path.read_bytes() == b"c" and path.with_name("log.before").read_bytes() == b"a" * 90 + b"b" * 10
