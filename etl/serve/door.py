"""The door of the service: a thread that takes up all connections, and answers some by a loop of its own.

Whatever the service's loop is at, a probe waits for a turn of Python's interpreter and for nothing else. A connection
is looked at when its first bytes are there: a request for what is answered apart stays here and ends with its answer,
all others are handed to the service's loop, as they came.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

HEAD_BYTES = 4096  # that are looked at
FRESH_S = 0.2  # without a byte, after which the service's loop waits for the rest, which knows deadlines
AT_ONCE = 64  # connections that are taken up, before the loop sees to those that are there
PAUSE_S = 0.01  # when there are as many as there may be
BODY = (b"content-length", b"transfer-encoding", b"expect", b"upgrade")


class Door(threading.Thread):
    """Of a service that listens on `sockets`, until `close`."""

    def __init__(
        self,
        sockets: list[socket.socket],
        *,
        loop: asyncio.AbstractEventLoop,
        apart: frozenset[bytes],
        protocol: Callable[[], asyncio.Protocol],
        hand_over: Callable[[socket.socket], None],
        has_room: Callable[[int], bool],
    ):
        """`loop`: a new one; `apart`: what is answered here, by `protocol`, where a GET asks for it.

        `hand_over`: takes the connections of all others, called here. `has_room`: whether there may be another one
        besides so many that are here."""
        super().__init__(name="door", daemon=True)
        self._sockets, self._loop, self._apart, self._protocol = sockets, loop, apart, protocol
        self._hand_over, self._has_room = hand_over, has_room
        self._fresh: dict[socket.socket, asyncio.TimerHandle] = {}
        self._tasks = set[asyncio.Task[None]]()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)
        try:
            self._loop.run_forever()
        finally:
            for listening in self._sockets:
                self._loop.remove_reader(listening)
            for connection in [*self._fresh]:
                self._forget(connection)
                connection.close()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                if not self._has_room(len(self._fresh) + len(self._tasks)):
                    raise OSError("there are as many connections as there may be")
                connection, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # or as many files
                self._loop.remove_reader(listening)
                self._loop.call_later(PAUSE_S, self._loop.add_reader, listening, self._accept, listening)
                return
            connection.setblocking(False)
            self._fresh[connection] = self._loop.call_later(FRESH_S, self._lead_on, connection)
            self._loop.add_reader(connection, self._first_bytes, connection)

    def _first_bytes(self, connection: socket.socket) -> None:
        try:
            head = connection.recv(HEAD_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:  # it has gone
            head = b""
        if head and self._is_apart(head):
            self._forget(connection)
            task = self._loop.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._lead_on(connection)

    def _is_apart(self, head: bytes) -> bool:
        """Whether that is all of a request, and one that is answered here."""
        method, _, rest = head.partition(b" ")
        is_whole = head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1
        return method == b"GET" and rest.partition(b" ")[0] in self._apart and is_whole and not _has(head, BODY)

    async def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone
            await self._loop.connect_accepted_socket(self._protocol, connection)

    def _lead_on(self, connection: socket.socket) -> None:
        self._forget(connection)
        self._hand_over(connection)

    def _forget(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._fresh.pop(connection).cancel()


def _has(head: bytes, names: tuple[bytes, ...]) -> bool:
    lower = head.lower()
    return any(b"\n" + name in lower for name in names)
