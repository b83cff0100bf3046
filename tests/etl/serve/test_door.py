"""The door of the service, here in a thread, between clients and a service that the test plays."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from etl.serve import door

GET = b"GET /health HTTP/1.1\r\nHost: localhost:8000\r\nAccept: */*\r\n\r\n"
HEALTH = {"body": '{"status": "up"}', "silent": '{"status": "hangs"}', "names": ["etl.internal", "localhost"]}
READY = {"status": 503, "body": "{}", "silent": "{}", "names": ["localhost", "[::1]"]}


class Played:
    """A service: the socket on which clients connect, and its end of the channel."""

    def __init__(self, most: int = 1000):
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.listening.setblocking(False)
        self.port = self.listening.getsockname()[1]
        self.channel, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(30)
        self.door = door.Door(self._other, [self.listening], most)
        self.thread = threading.Thread(target=self.door.serve)
        self.thread.start()

    def say(self, **answers: dict) -> None:
        """What to answer. The door has heard it when this returns."""
        before = self.door._heard
        self.channel.send(json.dumps({f"/{path}": answer for path, answer in answers.items()}).encode())
        while self.door._heard == before:
            time.sleep(0.001)

    def handed(self) -> socket.socket | dict:
        """The next connection, or line of what was answered."""
        said, numbers, _, _ = socket.recv_fds(self.channel, door.LARGEST, 1)
        return socket.socket(fileno=numbers[0]) if numbers else json.loads(said)

    def ask(self, request: bytes = GET) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.sendall(request)
        return client

    def asked(self, request: bytes = GET) -> bytes:
        with self.ask(request) as client:
            return b"".join(iter(lambda: client.recv(4096), b""))

    def end(self) -> None:
        self.channel.close()
        self.thread.join(30)
        assert not self.thread.is_alive()
        for each in (self._other, self.listening):
            each.close()


@pytest.fixture
def service():
    made = Played()
    yield made
    made.end()


def test_it_answers_and_says_what(service):
    service.say(health=HEALTH, ready=READY)
    head, _, body = service.asked(GET.replace(b"Accept: ", b"X-Request-ID: mine\r\nAccept: ")).partition(b"\r\n\r\n")
    assert json.loads(body) == {"status": "up"}
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 200 OK"
    assert headers.pop("date").endswith(" GMT") and headers == {
        **{"content-type": "application/json", "content-length": str(len(body)), "server": "uvicorn"},
        **{"connection": "close", "x-request-id": "mine"},
    }
    told = service.handed()
    assert told.pop("took") >= 0
    assert told == {"path": "/health", "client": "127.0.0.1", "id": "mine", "status": 200, "sent": len(body)}
    assert service.asked(GET.replace(b"health", b"ready")).startswith(b"HTTP/1.1 503 Service Unavailable")


@pytest.mark.parametrize(
    "request_",
    [
        GET.replace(b"/health", b"/healthy"),
        GET.replace(b"/health", b"/health?a"),
        GET.replace(b"GET", b"HEAD"),
        GET[:-2],
        GET + GET,
        GET.replace(b"Accept: */*", b"Content-Length: 2") + b"ab",
        GET.replace(b"localhost", b"evil.example"),
        GET.replace(b"localhost", b"localhost:"),
        GET.replace(b"Host: localhost:8000\r\n", b""),
        GET.replace(b"Accept: */*", b"Host: localhost"),
        GET.replace(b"*/*", b"\r\n folded"),
        GET.replace(b"*/*", b"\x00"),
        GET.replace(b"/health", b"/ready"),
        GET.replace(b"/health", b"/ready").replace(b"*/*", b"*/*\r\nAuthorization: Bearer other"),
        GET.replace(b"/health", b"/local"),
    ],
)
def test_what_differs_is_handed_on_as_it_came(service, request_):
    token = READY | {"authorization": "Bearer t0ken"}
    service.say(health=HEALTH, ready=token, local=READY | {"clients": ["::1"]})
    with service.ask(request_) as client, service.handed() as connection:
        connection.settimeout(30)
        assert connection.recv(4096) == request_
        assert connection.getpeername() == client.getsockname()


def test_who_sends_the_token_is_answered(service):
    service.say(ready=READY | {"authorization": "Bearer t0ken"})
    asked = GET.replace(b"health", b"ready").replace(b"*/*", b"*/*\r\nauthorization:  Bearer t0ken")
    assert b" 503 " in service.asked(asked.replace(b"localhost", b"[::1]"))


def test_before_the_service_said_anything_all_is_its_own(service):
    with service.ask(), service.handed() as connection:
        assert connection.recv(4096) == GET


def test_a_service_that_says_nothing_any_more_is_said_to_hang(service, monkeypatch):
    service.say(health=HEALTH)
    monkeypatch.setattr(door, "SILENT_S", -1)
    answer = service.asked()
    assert (
        answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer and answer.endswith(b'{"status": "hangs"}')
    )
    monkeypatch.setattr(door, "SILENT_S", 60)
    assert service.asked().startswith(b"HTTP/1.1 200 ")


def test_while_the_service_takes_nothing_the_door_answers_and_keeps_what_comes(service):
    with asking(service, 600) as sent:
        assert sorted(taken(service, len(sent))) == sent


def test_who_has_waited_longest_goes_when_there_are_more_than_there_may_be():
    service = Played(most=20)
    with asking(service, 900) as sent:
        first = taken(service, 20)
        service.channel.settimeout(1)
        rest = taken(service, len(sent))
    assert {*first} <= {*sent[:100]} and {*sent[-10:]} <= {*rest} and len(first) + len(rest) < len(sent)
    service.end()


@contextlib.contextmanager
def asking(service: Played, count: int) -> Iterator[list[bytes]]:
    """What so many clients have sent that wait for their answers; the door still gives its own."""
    service.say(health=HEALTH)
    sent = [b"GET /%03d HTTP/1.1\r\n" % number for number in range(count)]
    with contextlib.ExitStack() as clients:
        for each in sent:
            clients.enter_context(service.ask(each))
        assert service.asked().startswith(b"HTTP/1.1 200 ")
        yield sent


def taken(service: Played, most: int) -> list[bytes]:
    """What so many connections brought that were handed on, or as many as come."""
    came: list[bytes] = []
    with contextlib.suppress(TimeoutError):
        while len(came) < most:
            if isinstance(handed := service.handed(), socket.socket):
                with handed:
                    came.append(handed.recv(100))
    return came
