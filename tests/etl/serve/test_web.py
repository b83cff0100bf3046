"""A server that no client keeps from the others, on a small application."""

import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from support import environment, free_port

from etl.serve import web
from etl.storage import PROJECT

RECEIVE_S = 1.5


async def application(scope, receive, send):
    """Answers how many bytes came; `/large` with 20 MB."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = b"x" * 20_000_000 if scope["path"] == "/large" else b"%d" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def served(monkeypatch, most=1000, application=application):
    monkeypatch.setattr(web, "MOST", most)
    server = web.Server(web.config(application, RECEIVE_S, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture
def port(monkeypatch):
    with served(monkeypatch) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def to_the_end(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    while True:
        try:
            part = client.recv(1 << 20)
        except ConnectionResetError:
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n123", GET + b"GET / HT"],
    ids=["nothing", "half a head", "half a body", "a second request, half"],
)
def test_a_request_has_a_time_to_arrive(port, sent):
    with connect(port) as client:
        client.sendall(sent)
        answers = to_the_end(client)
    assert (b"HTTP/1.1 408" in answers) == (sent != b"")
    assert (b"HTTP/1.1 200" in answers) == sent.startswith(GET)


def test_a_body_that_trickles_has_no_more_time(port):
    with connect(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"1\r\nx\r\n")
                time.sleep(0.1)


def test_an_answer_that_is_read_slowly_comes_whole_and_one_that_is_not_read_ends(port):
    with connect(port) as reads, connect(port) as does_not:
        for client in (reads, does_not):
            client.sendall(GET.replace(b"/ ", b"/large "))
        got = 0
        while got < 20_000_000:
            got += len(reads.recv(400_000))
            time.sleep(0.1)
        time.sleep(2)
        assert len(to_the_end(does_not)) < 20_000_000


def test_more_than_there_may_be_keep_nobody_out(monkeypatch):
    with served(monkeypatch, most=20) as port:
        half_open = [connect(port) for _ in range(60)]
        with connect(port) as client:
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert to_the_end(client).endswith(b"\r\n\r\n0")
        assert to_the_end(half_open[0]) == b""
        for each in half_open:
            each.close()


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (b"GET / HTTP/1.1\r\n", b"X-A: " + b"a" * 90 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX-A: ", b"a" * 100, 431),
        (b"GET /", b"a" * 100, 431),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: " + b"a" * 90 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 100, 431),
        (b"GET / HTTP/1.1 \x00\r\n", b"", 400),
        (b"\x16\x03\x01", b"", 400),
    ],
    ids=["headers", "a header", "a path", "trailers", "a chunk's extension", "no version", "TLS"],
)
def test_a_head_ends_somewhere(port, start, more, status):
    with connect(port) as client:
        client.sendall(start)
        try:
            for _ in range(10_000 if more else 0):
                client.sendall(more)
        except OSError:
            return  # ended, and what it said is lost
        head, _, body = to_the_end(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(body)["detail"]


def test_bodies_in_many_reads_are_no_head(port):
    with connect(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n")
        client.sendall(b" " * 3_000_000)
        assert to_the_end(client).endswith(b"3000000")


@pytest.mark.parametrize("cut", [0, 40, 131, 133])
def test_a_request_that_would_rather_have_another_protocol_is_answered_in_this_one(port, cut):
    asked = b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n%sContent-Length: 5\r\n\r\n" % asked
    assert len(head) == 131
    with connect(port) as client:
        sent = head + b"12345" + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        client.sendall(sent[:cut])
        if cut:
            time.sleep(0.1)  # so that the server most likely reads twice; both ways hold
        client.sendall(sent[cut:])
        answers = to_the_end(client).split(b"HTTP/1.1 ")[1:]
    assert [(answer[:3], answer[-1:]) for answer in answers] == [(b"200", b"5"), (b"200", b"0")]


def test_nothing_is_passed_through(port):
    with connect(port) as client:
        client.sendall(b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n")
        assert to_the_end(client).startswith(b"HTTP/1.1 400 ")


def test_requests_are_not_taken_far_ahead(port):
    with connect(port) as client:
        client.sendall(GET * 5 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert to_the_end(client).count(b"HTTP/1.1 200") == 6
    with connect(port) as client:
        client.sendall(GET * 5000)
        assert to_the_end(client).count(b"HTTP/1.1 200") < 100


def test_what_comes_whole_and_is_plain_is_answered_by_one_call(monkeypatch):
    """All else the application gets as it came, in the order that it came in."""
    post = b"POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n%s"

    class Summing:
        urls = frozenset({b"/sum"})

        def answer(self, scope, headers, body):
            assert scope["client"][0] == "127.0.0.1" and headers[b"host"] == b"a"
            return (b"x-way: straight\r\n", b"[%d]" % sum(body)) if body != b"odd" else None

    async def asked(scope, receive, send):
        await application(scope, receive, send)

    asked.state = SimpleNamespace(straight=Summing())
    with served(monkeypatch, application=asked) as port, connect(port) as client:
        first = [(b"", b"\1\2"), (b"", b"odd"), (b"", b"\3\4"), (b"", b"\5")]
        rest = [(b"X-Forwarded-For: b\r\n", b"\6"), (b"Connection: close\r\n", b"\7")]
        sent = [post % (len(body), more, body) for more, body in (*first, *rest)]
        client.sendall(b"".join(sent[:4])[:-1])
        time.sleep(0.1)
        client.sendall(b"\5" + b"".join(sent[4:]) + sent[0])  # nothing is answered after the last
        answers = to_the_end(client).split(b"HTTP/1.1 ")[1:]
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    # one that waits behind another's answer waits for the application, too
    assert bodies[:2] == [b"[3]", b"3"] and bodies[2] in (b"[7]", b"2") and bodies[3] in (b"[5]", b"1")
    assert len(bodies) == 6 and bodies[4:] in ([b"1", b"[7]"], [b"1", b"1"])
    assert answers[0].startswith(b"200 OK\r\n") and b"content-length: 3\r\n" in answers[0]
    with served(monkeypatch, application=asked) as port, connect(port) as client:
        client.sendall(post % (9, b"", b"odd"))
        assert to_the_end(client).startswith(b"HTTP/1.1 408")
    with served(monkeypatch, application=asked) as port, connect(port) as client:
        monkeypatch.setattr(web, "IDLE_S", 0.5)
        client.sendall(post % (2, b"", b"\1\2"))
        assert to_the_end(client).endswith(b"[3]")


@pytest.mark.parametrize("body, answer", [(b"\1\2\3", b"[6]"), (b"odd", b"3")])
def test_what_has_come_in_part_is_answered_when_the_server_ends(monkeypatch, body, answer):
    class Summing:
        urls = frozenset({b"/sum"})

        def answer(self, scope, headers, body):
            return (b"", b"[%d]" % sum(body)) if body != b"odd" else None

    async def asked(scope, receive, send):
        await application(scope, receive, send)

    asked.state = SimpleNamespace(straight=Summing())
    server = web.Server(web.config(asked, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with connect(listening.getsockname()[1]) as client:
            client.sendall(b"POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n" + body[:1])
            while not any(connection.whole for connection in server.server_state.connections):
                time.sleep(0.01)
            server.should_exit = True
            while server._channel.fileno() >= 0:
                time.sleep(0.01)
            time.sleep(0.2)  # it has most likely told its connections by then; both ways hold
            client.sendall(body[1:])
            answers = to_the_end(client)
        thread.join()
    assert answers.startswith(b"HTTP/1.1 200 ") and answers.endswith(b"\r\n\r\n" + answer), answers


def test_without_a_token_it_listens_to_this_machine_alone():
    command = [sys.executable, "-m", "etl.serve.web", "app.api:app", "--port", str(free_port()), "--host", "0.0.0.0"]
    done = subprocess.run(command, cwd=PROJECT, env=environment(PROJECT), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ETL_API_TOKEN" in done.stderr and "Traceback" not in done.stderr


def test_at_the_keyboard_it_ends_without_a_traceback(tmp_path):
    (tmp_path / "small.py").write_text("async def app(scope, receive, send):\n    pass\n")
    port, variables = free_port(), environment(PROJECT)
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(PROJECT)])
    command = [sys.executable, "-m", "etl.serve.web", "small:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                with suppress(ConnectionRefusedError), connect(port):
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "")


def test_connections_leave_room_for_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert web.most_connections() == 768


class Apart:
    """What `application` has answered at the door."""

    def __init__(self, body="0"):
        self.body, self.told = body, []

    def answers(self):
        return {"/health": {"body": self.body, "silent": "1", "names": ["a"]}}

    def write_down(self, **told):
        self.told.append(told)


PROBE = """
import socket, sys
sys.stdin.read(1)
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
    client.sendall(b"GET /health HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
    print(client.recv(4096).decode(), flush=True)
"""


def test_what_is_answered_at_the_door_waits_for_nothing_of_the_service(monkeypatch):
    """The loop is at a call that keeps the interpreter until a client in another process has its answer."""
    began, go_on, poll = threading.Event(), threading.Event(), ctypes.PyDLL(None).poll
    pipes, probe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}, None

    async def busy(scope, receive, send):
        if scope["path"] == "/begin":
            asked = ctypes.create_string_buffer(struct.pack("ihh", probe.stdout.fileno(), select.POLLIN, 0))
            os.write(probe.stdin.fileno(), b"1")
            assert poll(asked, 1, 30_000) == 1, "it had to wait"
            began.set()
            go_on.wait(30)  # the loop sees to nobody
        await application(scope, receive, send)

    busy.state = SimpleNamespace(apart=Apart())
    with served(monkeypatch, application=busy) as port:
        command = [sys.executable, "-I", "-S", "-c", PROBE, str(port)]
        probe = subprocess.Popen(command, bufsize=0, **pipes)
        with connect(port) as first:
            while b"x-request-id" not in health(port):  # the door knows what to answer
                time.sleep(0.01)
            first.sendall(GET.replace(b"/ ", b"/begin "))
            assert began.wait(60)
            assert probe.communicate(timeout=30)[0].startswith(b"HTTP/1.1 200 OK")
            with connect(port) as other:
                other.sendall(GET)
                assert health(port).endswith(b"\r\n\r\n0")
                go_on.set()
                assert first.recv(1000).startswith(b"HTTP/1.1 200") and other.recv(1000).startswith(b"HTTP/1.1 200")
        while len(busy.state.apart.told) < 3:
            time.sleep(0.01)
    assert {told["path"] for told in busy.state.apart.told} == {"/health"}


def test_what_is_too_long_for_the_door_the_service_says(monkeypatch):
    async def asked(scope, receive, send):
        await application(scope, receive, send)

    asked.state = SimpleNamespace(apart=Apart(body="x" * 150_000))
    monkeypatch.setattr(web.door, "BEAT_S", 0.01)
    with served(monkeypatch, application=asked) as port:
        for _ in range(10):
            time.sleep(0.02)
            assert health(port).endswith(b"\r\n\r\n0")


def health(port: int) -> bytes:
    with connect(port) as client:
        client.sendall(GET.replace(b"/ ", b"/health ").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return to_the_end(client)


def test_without_its_door_the_service_ends_and_is_started_again(monkeypatch, caplog):
    server = web.Server(web.config(application, RECEIVE_S, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not (server.started and server._door):
            time.sleep(0.01)
        server._door.kill()
        thread.join(30)
    assert not thread.is_alive() and server.has_failed and "has ended" in caplog.text
