"""An ASGI application over HTTP that no client keeps from the others: `python -m etl.serve.web app.api:app --port N`.

uvicorn, and what it leaves open. A request has RECEIVE_S to arrive, an answer to be fetched as long as its reader goes
on. There are never more connections than the process may have files open: above that the one that has waited longest
goes, so that a thousand half-open ones keep nobody out. What is neither body nor a reasonable head is refused, and so
are requests that are sent far ahead of their answers.
"""

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import json
import logging
import os
import resource
import socket
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, cast

import httptools
import uvicorn
from uvicorn.importer import import_from_string
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from etl.serve import door
from etl.serve.prefect_server import HOST, NAMES

log = logging.getLogger(__name__)
RECEIVE_S = 10  # from a request's first byte, or its connection's, to its last
IDLE_S = 5  # of a kept connection, for its next request
HEAD_BYTES = 64_000  # of a request, besides its body
AHEAD = 16  # requests on a connection that wait for the answers before
END_S = 2  # for the door, once it is told to end
FILES = 256  # of those that a process may have open, left for what is no connection
AT_ONCE = 64  # of them that are taken from the door, before the loop sees to those that are there
PAUSE_S = 0.01  # when there are as many as there may be
MOMENT_S = 1  # after which a connection from which nothing came makes way for another
MOST = 4000  # connections, however many files there may be
STRAIGHT_BYTES = 32_000  # of a body that may be answered straight
PLAIN = frozenset(  # headers that such a request may have, and no other
    {b"host", b"content-type", b"content-length", b"accept", b"accept-encoding", b"accept-language", b"user-agent"}
    | {b"connection", b"authorization", b"x-request-id"}
)
SWITCH_S = 0.001  # between threads that want the interpreter: the loop waits for it as often as others work
TOKEN = "ETL_API_TOKEN"
GROWN = 16_000_000  # bytes more than there were, before what is free is given back to the system
LARGE = 400_000  # bytes of a piece of memory that is given back as soon as it is free; a thousand rows have 200,000
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1  # of glibc's mallopt


class Connections:
    """Those that are there, and since when each of them has waited for its client; the longest first."""

    def __init__(self, most: int, receive_s: float = RECEIVE_S, state: Any = None):
        """`state`: the application's."""
        self.apart: Apart | None = getattr(state, "apart", None)
        self.straight: Straight | None = getattr(state, "straight", None)
        self.most, self.receive_s, self.count = most, receive_s, 0
        self.waiting: dict[Connection, float] = {}  # loop's time
        self._look: asyncio.TimerHandle | None = None
        self.memory = Memory()

    def add(self, connection: "Connection") -> None:
        self.count += 1
        if self._look is None:
            self._look = connection.loop.call_later(1, self._end_overdue, connection.loop)

    def is_full(self, coming: int) -> bool:
        """Whether there may be no other one, besides `coming`, unless one goes."""
        return self.count + coming >= self.most

    def longest(self, now: float) -> "Connection | None":
        """The one that goes for another. Who has waited for a moment may have sent what is not read yet."""
        longest, since = next(iter(self.waiting.items()), (None, now))
        return longest if since <= now - MOMENT_S else None

    def remove(self, connection: "Connection") -> None:
        self.count -= 1
        self.waiting.pop(connection, None)

    def wait(self, connection: "Connection") -> None:
        """From now on this one waits for its client."""
        self.waiting.pop(connection, None)
        self.waiting[connection] = connection.loop.time()

    def _end_overdue(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection, since in [*self.waiting.items()]:
            if since > now - min(IDLE_S, self.receive_s):
                break
            if connection.is_kept or since <= now - self.receive_s:
                connection.end_overdue()
        if self.count == len(self.waiting):  # nothing is being answered
            self.memory.give_back()
        self._look = loop.call_later(1, self._end_overdue, loop) if self.count or self.memory.is_due else None


class Memory:
    """What the process holds of memory that nothing needs: glibc keeps what there was at most, for each thread."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._kept = 0  # bytes, after the last time

    @property
    def is_due(self) -> bool:
        return _resident() > self._kept + GROWN

    def give_back(self) -> None:
        if self.is_due and hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)
            self._kept = _resident()

    def keep_little(self) -> None:
        """Large pieces go back at once, and few threads have a heap of their own. Before there are any."""
        if hasattr(self._libc, "mallopt"):
            self._libc.mallopt(ARENA_MAX, 2)
            self._libc.mallopt(MMAP_THRESHOLD, LARGE)
            self._libc.mallopt(TRIM_THRESHOLD, GROWN)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Straight(Protocol):
    """What an application may have as `state.straight`: it answers small requests that came whole by one call.

    A scope, a task and what a framework does around them cost more than such an answer."""

    urls: frozenset[bytes]  # that are asked for by POST

    def answer(self, scope: Any, headers: dict[bytes, bytes], body: bytes) -> tuple[bytes, bytes] | None:
        """Lines of the head and the body of an answer 200; None when the application has to see the request."""


class Apart(Protocol):
    """What an application may have as `state.apart`: what is answered for it at the door, whatever its loop is at."""

    def answers(self) -> dict[str, dict[str, Any]]:
        """Path -> arguments of `etl.serve.door.Answer`. Asked by the loop, every BEAT_S: an answer is as old at most,
        or SILENT_S."""

    def write_down(self, path: str, client: str, id: str, status: int, took: float, sent: int) -> None:
        """That was answered. `took`: seconds; `sent`: bytes."""


class Connection(HttpToolsProtocol):
    """uvicorn's, which keeps its `Connections` up to date and ends when it asks for too much."""

    def __init__(self, connections: Connections, **arguments: Any):
        super().__init__(**arguments)
        self.beside = connections
        self.is_receiving = False  # part of a request
        self.is_ended = False
        self.is_first = False  # what comes is part of the first read of a message
        self.surplus = 0  # bytes of the message after that which are no body
        self.unsent = 0  # bytes of an answer, when it was looked at last
        self.is_kept = False  # for a next request, after one that was answered straight
        self.whole: bytes | None = None  # what came of a body that may be answered straight
        self.came = b""  # last
        self.is_last = False  # what is being received: the server ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.beside.wait(self)
        self.beside.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.beside.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_ended:
            return
        self.is_first, self.came = False, data
        super().data_received(data)
        if self.is_receiving and self.whole is None and self.cycle is not None and self.cycle.body:
            self.flow.pause_reading()  # of what is large, more is read when the application asks for it
        if self.is_receiving and not self.is_first:
            self.surplus += len(data)
            if self.surplus > HEAD_BYTES:
                self.refuse(431, f"the request has more than {HEAD_BYTES:,} bytes besides its body")

    def on_message_begin(self) -> None:
        if self.is_ended or len(self.pipeline) >= AHEAD:
            raise ValueError("too many requests ahead of their answers")  # the parser ends, and the message is refused
        super().on_message_begin()
        self.is_receiving, self.is_first, self.is_kept, self.surplus = True, True, False, 0
        self.beside.wait(self)

    def on_headers_complete(self) -> None:
        if self._is_straight():
            self.whole = b""
            return
        super().on_headers_complete()

    def _is_straight(self) -> bool:
        """Whether nothing about a request's head is other than of any, and nothing before it is under way."""
        straight, headers = self.beside.straight, dict(self.headers)
        size = headers.get(b"content-length", b"")
        return (
            straight is not None
            and self.url in straight.urls
            and PLAIN.issuperset(headers)
            and len(headers) == len(self.headers)
            and len(size) <= len(str(STRAIGHT_BYTES))
            and size.isdigit()
            and int(size) <= STRAIGHT_BYTES
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
        )

    def shutdown(self) -> None:
        """As uvicorn's, but that a request which may be answered straight, and has come in part, is answered."""
        if self.whole is None:
            super().shutdown()
        else:
            self.is_last = True

    def _should_upgrade(self) -> bool:
        return True

    def handle_websocket_upgrade(self) -> None:
        """No other protocol is spoken: the request is read again as one that asks for none.

        Its parser takes a body for the other protocol's, and the request for one without."""
        error, method = sys.exception(), self.parser.get_method()
        if method == b"CONNECT" or not isinstance(error, httptools.HttpParserUpgrade):
            self.send_400_response("")
            return
        lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        version = self.parser.get_http_version().encode()
        head = b"\r\n".join([b" ".join([method, self.url, b"HTTP/" + version]), *lines, b"\r\n"])
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + self.came[error.args[0] :])

    def on_body(self, body: bytes) -> None:
        self.surplus -= len(body)
        if self.whole is None:
            super().on_body(body)
        else:
            self.whole += body

    def on_message_complete(self) -> None:
        self.is_receiving = False
        self.beside.waiting.pop(self, None)
        if self.whole is not None:
            body, self.whole = self.whole, None
            if self._answered(body):
                return
            super().on_headers_complete()
            super().on_body(body)
            self.cycle.keep_alive = self.cycle.keep_alive and not self.is_last
        super().on_message_complete()

    def _answered(self, body: bytes) -> bool:
        straight, url = self.beside.straight, self.url
        self.scope |= {"method": "POST", "path": url.decode(), "raw_path": url, "query_string": b""}
        answer = straight.answer(self.scope, dict(self.headers), body) if straight and not self.is_ended else None
        if answer is None:
            return False
        lines = [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        head, content = answer
        if self.is_last or not self.parser.should_keep_alive():
            lines.append(b"connection: close\r\n")
            self.is_ended = True
        length = b"content-length: %d\r\n\r\n" % len(content)
        self.transport.write(b"".join([b"HTTP/1.1 200 OK\r\n", *lines, head, length, content]))
        self.server_state.total_requests += 1
        if self.is_ended:
            self.transport.close()
        self.is_kept, self.unsent = True, 0
        self.beside.wait(self)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.is_receiving:
            self.unsent = 0
            self.beside.wait(self)

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is no HTTP request that can be understood")

    def refuse(self, status: int, sentence: str) -> None:
        """Answer that, unless an answer has begun, and end."""
        if self.is_ended:
            return
        self.is_ended = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps({"detail": sentence}).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def end_overdue(self) -> None:
        """Its client was waited for long enough: unless it has taken more of an answer since, it ends."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and (self.unsent == 0 or unsent < self.unsent):
            self.unsent = unsent
            self.beside.wait(self)
        elif self.is_receiving and not unsent and not self.is_ended:
            self.refuse(408, f"the request did not arrive within {self.beside.receive_s:g} seconds")
        else:
            self.abort()

    def abort(self) -> None:
        self.is_ended = True
        self.beside.waiting.pop(self, None)
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's, whose connections come through a door. It has to be given the sockets on which it listens."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._beside: Connections = cast(Any, config.http).args[0]  # as `config` has it
        self._taking = set[asyncio.Task[Any]]()
        self._door: subprocess.Popen[bytes] | None = None
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        if not self.started:
            return
        self._channel, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for listening in sockets or []:
            listening.setblocking(False)
            listening.listen(self.config.backlog)
        numbers = [each.fileno() for each in (others, *(sockets or []))]
        command = [sys.executable, "-I", "-S", door.__file__, *map(str, numbers)]
        self._door = subprocess.Popen(command, pass_fds=numbers, stdin=subprocess.DEVNULL)
        others.close()
        self._channel.setblocking(False)
        self._has_ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel, self._hear, loop)
        self._beating = loop.create_task(self._beat())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._door:
            self._beating.cancel()
            if not self.has_failed:
                self._channel.shutdown(socket.SHUT_WR)  # it hands over what is there, and ends
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._has_ended.wait(), END_S)
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
            self._door.kill()
            self._door.wait()
        await super().shutdown(sockets)

    async def _beat(self) -> None:
        """Say what to answer: that it is said at all tells the door that the loop comes round."""
        while True:
            said = json.dumps(self._beside.apart.answers() if self._beside.apart else {}).encode()
            with contextlib.suppress(OSError):
                self._channel.send(said if len(said) <= door.LARGEST else b"{}")  # what is too long is not for the door
            await asyncio.sleep(door.BEAT_S)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take what comes from the door, as long as there is room for connections."""
        for _ in range(AT_ONCE):
            if self._beside.is_full(len(self._taking)) and not self._beside.longest(loop.time()):
                loop.remove_reader(self._channel)
                loop.call_later(PAUSE_S, self._go_on, loop)
                return
            try:
                said, numbers, _, _ = socket.recv_fds(self._channel, door.LARGEST, 1)
            except BlockingIOError:
                return
            except OSError:
                said, numbers = b"", []
            if not said:
                self._end(loop)
                return
            for number in numbers:
                self._take(loop, socket.socket(fileno=number))
            if not numbers and self._beside.apart:
                self._beside.apart.write_down(**json.loads(said))

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._channel.fileno() >= 0:
            loop.add_reader(self._channel, self._hear, loop)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """The door has ended. Unless it had to, nobody could come any more: so does the service."""
        loop.remove_reader(self._channel)
        self._has_ended.set()
        if not self.should_exit:
            log.error("the door of the service, process %d, has ended", self._door.pid if self._door else 0)
            self.has_failed = self.should_exit = True

    def _take(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> None:
        if self._beside.is_full(len(self._taking)) and (longest := self._beside.longest(loop.time())):
            longest.abort()
        accepted.setblocking(False)
        accepted.set_inheritable(False)
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, accepted))
        self._taking.add(task)
        task.add_done_callback(self._is_taken)

    def _is_taken(self, task: asyncio.Task[Any]) -> None:
        self._taking.discard(task)
        if not task.cancelled():
            task.exception()  # its client is gone already

    def _protocol(self) -> asyncio.Protocol:
        return Connection(
            self._beside, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def most_connections() -> int:
    """How many the files that this process may have open allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MOST, files - FILES)) if files != resource.RLIM_INFINITY else MOST


def config(application: Any, receive_s: float = RECEIVE_S, **settings: Any) -> uvicorn.Config:
    """uvicorn's configuration for an application, or its name as `app.api:app`."""
    if isinstance(application, str):
        application = import_from_string(application)
    state = getattr(application, "state", None)
    http: Any = functools.partial(Connection, Connections(most_connections(), receive_s, state))
    return uvicorn.Config(application, http=http, ws="none", access_log=False, timeout_keep_alive=IDLE_S, **settings)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("application", help="as app.api:app")
    arguments.add_argument("--host", default=HOST)
    arguments.add_argument("--port", type=int, required=True)
    asked = arguments.parse_args()
    if asked.host not in NAMES and not os.environ.get(TOKEN):
        sys.exit(f"{asked.host} is reached from other machines: {TOKEN} has to hold what they have to send, a secret")
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed > MOST + FILES:  # a shell's 1,024 is no limit of the system's
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST + FILES, allowed))
    sys.setswitchinterval(SWITCH_S)
    Memory().keep_little()
    configured = config(asked.application, host=asked.host, port=asked.port, log_level="warning")
    configured.load()
    gc.collect()
    gc.freeze()  # what is imported stays, and to look through it for garbage keeps the loop for 80 ms each time
    server = Server(configured)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once more, when all is ended in order
        server.run([configured.bind_socket()])
    sys.exit(0 if server.started and not server.has_failed else 3)


if __name__ == "__main__":
    main()
