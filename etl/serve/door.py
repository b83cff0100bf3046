"""The door of the service: a process that takes up all connections, answers some, and hands on the others as they came.

Whatever the service is at, a probe waits for a core and for nothing else: the service's interpreter may be held by a
call for a tenth of a second. `etl.serve.web` starts this file, which needs the standard library alone: 10 MB. Over
the socket between both

- the service says every BEAT_S what to answer, its sign of life, too: a JSON object, path -> what `Answer` has;
- the door hands it connections, their first bytes unread, and a line of JSON of each request that was answered.

When the service has gone, so has the door.
"""

import collections
import contextlib
import hmac
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import time

BEAT_S = 0.5
SILENT_S = 5  # without a word of the service, after which it is said to hang
FRESH_S = 0.2  # without a byte, after which the service waits for the rest, which knows deadlines
FRESH = 256  # connections without a byte that are waited for
FILES = 16  # of those that the process may have open, left for what is no connection
PAUSE_S = 0.005  # until what the service had no room for is offered again
HEAD_BYTES = 4096  # that are looked at
MOST = 4000  # connections at once, however many files there may be
AT_ONCE = 64  # connections that are taken up, before those that are there are seen to
LARGEST = 100_000  # bytes of a message
# all of a request that is answered here; whatever is odd about one the service sees
HEAD = re.compile(rb"GET (/[\w/-]*) HTTP/1\.[01]\r\n((?:[\w-]+:[\t -~]*\r\n)+)\r\n", re.A)
BODY = (b"content-length", b"transfer-encoding", b"expect", b"upgrade")
ID = re.compile(rb"[\w.-]{1,64}", re.A)
PHRASES = {200: "OK", 503: "Service Unavailable"}


class Answer:
    """To a GET of a path: `body`, JSON, with `status`; or `silent` with 503 while the service is silent.

    `names`: that the Host header may have, besides a port; `clients`: the addresses of who may ask, None for any;
    `authorization`: the header that is asked for, None for any. What differs is handed on: the service says why not."""

    def __init__(
        self,
        *,
        body: str,
        silent: str,
        status: int = 200,
        names: list[str],
        clients: list[str] | None = None,
        authorization: str | None = None,
    ):
        self.status, self.body, self.silent = status, body, silent
        self.names, self.clients = frozenset(name.encode() for name in names), clients
        self.authorization = None if authorization is None else authorization.encode()

    def is_for(self, client: str, headers: dict[bytes, bytes]) -> bool:
        host, colon, port = headers.get(b"host", b"").lower().rpartition(b":")
        name = host if port.isdigit() else host + colon + port
        return (
            name in self.names
            and (self.clients is None or client in self.clients)
            and (
                self.authorization is None
                or hmac.compare_digest(self.authorization, headers.get(b"authorization", b""))
            )
        )


class Door:
    """For sockets that listen. `channel`: to the service; `most`: connections that may be here at once."""

    def __init__(self, channel: socket.socket, sockets: list[socket.socket], most: int):
        channel.setblocking(False)
        self._channel, self._most = channel, most
        self._listening = {each.fileno(): each for each in sockets}
        self._fresh: dict[int, tuple[socket.socket, str, float]] = {}  # its client, until when; the oldest first
        self._due = collections.deque[socket.socket | bytes]()  # for the service
        self._answers: dict[bytes, Answer] = {}
        self._heard = time.monotonic()
        self._ids, self._count = os.urandom(4).hex(), 0
        self._poll = select.epoll()
        for number in (channel.fileno(), *self._listening):
            self._poll.register(number, select.EPOLLIN)

    def serve(self) -> None:
        """Until the service has gone."""
        while True:
            for number, _ in self._poll.poll(PAUSE_S if self._due else self._patience()):
                if number in self._listening:
                    self._accept(self._listening[number])
                elif number in self._fresh:
                    self._look(*self._fresh[number][:2])
                elif not self._hear():
                    self._hand_on()
                    return
            while self._patience() == 0:
                self._due.append(self._forget_oldest())
            self._hand_on()

    def _patience(self) -> float | None:
        """Seconds until the oldest without a byte is handed on."""
        until = next((until for _, _, until in self._fresh.values()), None)
        return None if until is None else max(0.0, until - time.monotonic())

    def _hear(self) -> bool:
        """Take what the service says; whether it is there."""
        try:
            said = self._channel.recv(LARGEST)
        except BlockingIOError:
            return True
        except OSError:  # what it had not read yet has gone with it
            return False
        if said:
            self._answers = {path.encode(): Answer(**answer) for path, answer in json.loads(said).items()}
            self._heard = time.monotonic()
        return bool(said)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(AT_ONCE):
            if len(self._fresh) + len(self._due) >= self._most:
                self._drop()
            elif len(self._fresh) >= FRESH:
                self._due.append(self._forget_oldest())
            try:
                connection, address = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no more files
                self._drop()
                return
            self._look(connection, address[0])

    def _drop(self) -> None:
        """Let go of who has waited longest: who comes may be a probe."""
        if self._due or self._fresh:
            dropped = self._due.popleft() if self._due else self._forget_oldest()
            if isinstance(dropped, socket.socket):
                dropped.close()

    def _look(self, connection: socket.socket, client: str) -> None:
        began = time.monotonic()
        try:
            head = connection.recv(HEAD_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            if connection.fileno() not in self._fresh:
                self._fresh[connection.fileno()] = connection, client, began + FRESH_S
                self._poll.register(connection, select.EPOLLIN)
            return
        except OSError:  # it has gone
            head = b""
        self._forget(connection)
        if not head:
            connection.close()
        elif not self._is_answered(connection, client, head, began):
            self._due.append(connection)

    def _forget_oldest(self) -> socket.socket:
        return self._forget(next(iter(self._fresh.values()))[0])

    def _forget(self, connection: socket.socket) -> socket.socket:
        if self._fresh.pop(connection.fileno(), None):
            self._poll.unregister(connection)
        return connection

    def _is_answered(self, connection: socket.socket, client: str, head: bytes, began: float) -> bool:
        match = HEAD.fullmatch(head)
        answer = self._answers.get(match[1]) if match else None
        if match is None or answer is None:
            return False
        lines = [line.partition(b":") for line in match[2].splitlines()]
        headers = {name.lower(): value.strip() for name, _, value in lines}
        if len(headers) < len(lines) or not headers.keys().isdisjoint(BODY) or not answer.is_for(client, headers):
            return False
        is_silent = began - self._heard > SILENT_S
        status, body = (503, answer.silent) if is_silent else (answer.status, answer.body)
        self._count += 1
        request_id = headers.get(b"x-request-id", b"")
        shown = request_id.decode() if ID.fullmatch(request_id) else f"{self._ids}-{self._count}"
        content = body.encode()
        lines_of_head = (
            f"HTTP/1.1 {status} {PHRASES[status]}",
            time.strftime("date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "server: uvicorn",
            f"content-length: {len(content)}",
            "content-type: application/json",
            *(["retry-after: 1"] if is_silent else []),
            f"x-request-id: {shown}",
            "connection: close",
        )
        with contextlib.suppress(OSError):  # it has gone
            connection.recv(len(head))
            connection.send("\r\n".join(lines_of_head).encode() + b"\r\n\r\n" + content, socket.MSG_DONTWAIT)
        connection.close()
        said = {"path": match[1].decode(), "client": client, "id": shown, "status": status, "sent": len(content)}
        self._due.append(json.dumps(said | {"took": time.monotonic() - began}).encode())
        return True

    def _hand_on(self) -> None:
        """As much as the service has room for."""
        with contextlib.suppress(OSError):  # it has none for now, or has gone, which is heard
            while self._due:
                if isinstance(due := self._due[0], bytes):
                    self._channel.send(due)
                else:
                    socket.send_fds(self._channel, [b"+"], [due.fileno()])
                    due.close()
                self._due.popleft()


def main(channel: str, *listening: str) -> None:
    for ignored in (signal.SIGTERM, signal.SIGINT):  # the service ends in order, and the door with it
        signal.signal(ignored, signal.SIG_IGN)
    sockets = [socket.socket(fileno=int(number)) for number in listening]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    Door(socket.socket(fileno=int(channel)), sockets, min(MOST, files - FILES)).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
