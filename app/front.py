"""The outermost layer of the service: who may ask, how much of it at once, and what came of each request.

It takes a request's body whole before anything else sees it, and refuses what is too large, too much at once, not
addressed to this service or not allowed. Every request has an id, a line in the log and its part in the metrics.
"""

import asyncio
import base64
import contextlib
import hmac
import itertools
import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from app.metrics import Requests
from app.settings import Settings

log = logging.getLogger(__name__)
HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-f:.]+\])(:\d+)?", re.A | re.I)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "testserver"})  # the last is Starlette's TestClient
HERE = frozenset({"127.0.0.1", "::1", "testclient"})  # addresses of this machine's programs
ID = re.compile(rb"[\w.-]{1,64}", re.A)
PROBE = "/health"  # answered to anybody who knows the service's name, at any rate
QUICK = {PROBE, "/ready", "/metrics", "/", "/predict", "/v1/predict"}  # what has limits of its own, or needs none
READING = 64  # other requests at once: four are answered, the others wait for them
BODIES = 64_000_000  # bytes of bodies at once
SMALL = 16_000  # bytes of a body that comes at once
READS = 4  # of larger ones, each time the loop comes round
LINGER_S = 2  # a client that still sends its body is listened to for a little, so that it sees why it was refused
CLIENTS = 10_000  # whose rates are known
FLUSH_S = 0.2
END_S = 2  # for the last lines of the log
Message = dict[str, Any]


class Entrance:
    """Who may ask, and what is written down of each request, whichever way it is answered."""

    def __init__(self, settings: Callable[[], Settings], requests: Requests):
        """`settings`: gives the same ones until there are others."""
        self._settings, self._requests, self._log = settings, requests, Log()
        self.end = self._log.end
        self._known: tuple[Settings, Known] | None = None
        self._ids, self._start = itertools.count(1), os.urandom(4).hex()

    @property
    def known(self) -> "Known":
        settings = self._settings()
        if self._known is None or self._known[0] is not settings:
            self._known = settings, Known(settings)
        return self._known[1]

    def id_of(self, headers: dict[bytes, bytes]) -> bytes:
        """The id that a request brings, or one of its own."""
        request_id = headers.get(b"x-request-id", b"")
        return request_id if ID.fullmatch(request_id) else f"{self._start}-{next(self._ids)}".encode()

    def write_down(self, scope: Message, request_id: bytes, status: int, took: float, sent: int) -> None:
        """`took`: seconds; `sent`: bytes of the answer."""
        self._requests.count(scope, status, took)
        self._log.add(scope, request_id.decode(), status, took, sent)


class Front:
    """ASGI middleware. `limit`: bytes of a body, at most."""

    def __init__(self, app: Any, entrance: Entrance, limit: int):
        self.app, self.entrance, self.limit = app, entrance, limit
        self.reading, self.held = 0, 0
        self.reading_bodies = Pace(READS)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 0, 0
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers[name] = value if name not in headers else headers[name] + b", " + value
        request_id = self.entrance.id_of(headers)

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._serve(scope, headers, receive, answer)
        except Exception:
            log.exception("request %s failed", request_id.decode())
            if status:
                raise
            sentence = f"the service failed; its log says why, at request {request_id.decode()}"
            await refuse(answer, 500, sentence)
        finally:
            self.entrance.write_down(scope, request_id, status, time.perf_counter() - began, sent)

    async def _serve(self, scope: Message, headers: dict[bytes, bytes], receive: Any, answer: Any) -> None:
        declared = headers.get(b"content-length", b"0")
        size = int(declared[:20]) if declared.isdigit() else 0
        has_body = bool(size or b"transfer-encoding" in headers)
        if refusal := self.entrance.known.refusal(scope, headers):
            await (self._refuse_body(receive, answer, *refusal) if has_body else refuse(answer, *refusal))
        elif has_body:
            await self._with_body(scope, size, receive, answer)
        else:
            await self._within_limits(scope, receive, answer)

    async def _with_body(self, scope: Message, declared: int, receive: Any, answer: Any) -> None:
        parts, size, more = [], 0, True
        try:
            while more and max(size, declared) <= self.limit and self.held <= BODIES:
                if size or declared > SMALL:
                    await self.reading_bodies.come()
                message = await receive()
                if message["type"] != "http.request":
                    return  # it went away
                parts.append(part := message.get("body", b""))
                size, more = size + len(part), message.get("more_body", False)
                self.held += len(part)
            if max(size, declared) > self.limit:
                await self._refuse_body(receive, answer, 413, f"the body is larger than {self.limit:,} bytes")
            elif more:
                sentence = f"the service holds {BODIES:,} bytes of requests; try again in a second"
                await self._refuse_body(receive, answer, 503, sentence)
            else:
                await self._within_limits(
                    scope, again({"type": "http.request", "body": b"".join(parts), "more_body": False}, receive), answer
                )
        finally:
            self.held -= size

    async def _within_limits(self, scope: Message, receive: Any, answer: Any) -> None:
        if scope["path"] in QUICK:
            await self.app(scope, receive, answer)
        elif self.reading >= READING:
            await refuse(answer, 503, f"{READING} requests are being answered already; try again in a second")
        else:
            self.reading += 1
            try:
                await self.app(scope, receive, answer)
            finally:
                self.reading -= 1

    async def _refuse_body(self, receive: Any, answer: Any, status: int, sentence: str) -> None:
        """The connection ends with the answer, and not before the client has had the time to read it."""

        async def drained() -> None:
            left = self.limit
            while left > 0 and (message := await receive())["type"] == "http.request":
                left -= len(message.get("body", b""))

        await refuse(answer, status, sentence, [(b"connection", b"close")], more_body=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drained(), LINGER_S)
        await answer({"type": "http.response.body", "body": b""})


class Pace:
    """Those who wait go on as they came, so many each time the loop comes round: it sees to all else in between."""

    def __init__(self, most: int):
        """`most`: of what `come` is given, each time."""
        self.most = self._left = most
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._is_due = False

    async def come(self, weight: int = 1) -> None:
        """Wait for a turn. What weighs more than there is at all goes alone."""
        if self._waiting or self._left <= 0:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, weight))
            await turn
        else:
            self._left -= weight
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._left = self.most
        while self._waiting and self._left > 0:
            turn, weight = self._waiting.popleft()
            if not turn.done():  # or its client has gone
                turn.set_result(None)
                self._left -= weight
        self._is_due = bool(self._waiting) or self._left < self.most
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._round)


class Known:
    """What the settings say of who may ask: the names of this service, its token, the rate of a client."""

    def __init__(self, settings: Settings):
        self.hosts = known_hosts(settings)
        self.token, self.rate = settings.api_token.encode(), settings.api_rate
        self._names: dict[bytes, str] = {}  # of Host headers as they came, that name this service
        self._left: dict[str, tuple[float, float]] = {}  # client -> requests that it may send, and since when

    def refusal(self, scope: Message, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and sentence for a request that is not served."""
        host = headers.get(b"host", b"")
        name, client = self._names.get(host), (scope.get("client") or ("",))[0]
        if name is None:
            match = HOST.fullmatch(host.decode("latin-1"))
            if match and match["name"].lower() in self.hosts:
                name = match["name"].lower()
                if len(self._names) < 1000:  # there may be any port behind it
                    self._names[host] = name
        if name is None:
            # or a page anywhere could have its own name lead to this machine, and read all that is served here
            sentence = "this service is not known by that name; ETL_API_HOSTS lists the names it has besides localhost"
            return 400, sentence
        if scope["path"] == PROBE:
            return None
        if self.token:
            if not self._is_allowed(headers.get(b"authorization", b"")):
                return 401, "a token is needed: send Authorization: Bearer and what ETL_API_TOKEN holds"
        elif client not in HERE or name not in LOOPBACK:
            sentence = (
                "this service has no ETL_API_TOKEN, without which it answers nobody but its own machine's programs"
            )
            return 403, sentence
        if self.rate and not self._is_due(client):
            return 429, f"more than {self.rate:g} requests a second; try again in a second"
        return None

    def _is_allowed(self, said: bytes) -> bool:
        """A browser, which asks for a name and a password, may send the token as the password."""
        kind, _, value = said.partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self.token)

    def _is_due(self, client: str) -> bool:
        """Up to two seconds' requests may come at once."""
        most, now = max(1, 2 * self.rate), time.monotonic()
        left, since = self._left.pop(client, (most, now))
        left = min(most, left + (now - since) * self.rate)
        self._left[client] = (left - 1 if left >= 1 else left), now
        if len(self._left) > CLIENTS:
            del self._left[next(iter(self._left))]  # who has not asked for longest
        return left >= 1


def known_hosts(settings: Settings) -> frozenset[str]:
    """The names by which this service may be asked: this machine's own, ETL_API_URL's and those in ETL_API_HOSTS."""
    named = [urlsplit(settings.api_url).netloc, *settings.api_hosts.split(",")]
    matches = (HOST.fullmatch(name.strip()) for name in named)
    return LOOPBACK | {match["name"].lower() for match in matches if match}


MORE = {
    401: [(b"www-authenticate", b'Bearer, Basic realm="the token is the password"')],
    429: [(b"retry-after", b"1")],
    503: [(b"retry-after", b"1")],
}


async def refuse(
    answer: Any, status: int, sentence: str, more: list[tuple[bytes, bytes]] | None = None, more_body: bool = False
) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [*MORE.get(status, []), *(more or [])]
    await answer({"type": "http.response.start", "status": status, "headers": headers})
    await answer({"type": "http.response.body", "body": body, "more_body": more_body})


def again(message: Message, receive: Any) -> Any:
    """`receive` after a message that was received already."""
    waiting = iter([message])

    async def next_message() -> Message:
        return next(waiting, None) or await receive()

    return next_message


class Line(msgspec.Struct):
    """Of the log. `ms`: from the head of the request to the end of its answer; `bytes` of that."""

    time: datetime
    id: str
    client: str
    method: str
    path: str
    status: int
    ms: float
    bytes: int


class Log:
    """Lines of JSON on stderr, several at once: each write of its own would cost as much as all else about a line."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._writer = ThreadPoolExecutor(1, "log")  # a disk that is busy would keep the loop
        self._encode = msgspec.json.Encoder().encode
        self._written: Future[None] | None = None  # by the last of all writes
        self._due = 0.0

    def add(self, scope: Message, request_id: str, status: int, took: float, sent: int) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        asked = scope["query_string"]
        path = (path + b"?" + asked if asked else path)[:500].decode("latin-1")
        client = (scope.get("client") or ("",))[0]
        now = time.time()
        at = datetime.fromtimestamp(now, UTC)
        line = Line(at, request_id, client, scope["method"], path, status, round(1000 * took, 2), sent)
        self._lines.append(self._encode(line))
        if len(self._lines) == 1:
            self._due = now + FLUSH_S
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        elif len(self._lines) >= 200 or now > self._due + 1:
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._written = self._writer.submit(_write, b"\n".join([*lines, b""]))

    def end(self) -> None:
        """Until all is written, or END_S: the process may be ended by a signal, which waits for no thread."""
        self.flush()
        if self._written:
            wait([self._written], END_S)


def _write(lines: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        sys.stderr.write(lines.decode())
        sys.stderr.flush()
