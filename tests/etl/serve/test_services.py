"""What `up` starts beside the worker: real processes that die, on a clock that can be set forward."""

import logging
import socket
import threading

import pytest

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


def test_what_is_essential_ends_up_when_it_dies_six_times_within_an_hour(dying):
    service, clock = dying(essential=True)
    with pytest.raises(RuntimeError, match="dashboard ended with status 1, for the 6th time within an hour"):
        die(service, clock, times=20, apart_s=children.SLOWEST_S)
    assert clock.now < children.FORGET_S


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
