"""An S3 server that misbehaves: a proxy on loopback that loses replies, gives answers of its own, or takes its time.

What is asked of it reaches the server behind it unless a fault says otherwise. Faults are matched by method and by a
part of the key; each happens so many times and is gone.
"""

import contextlib
import http.client
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

HOP = ("connection", "transfer-encoding", "keep-alive", "expect", "date", "server", "content-length")
CONDITION = re.compile(rb"<Condition>.*?</Condition>", re.S)


@dataclass
class Fault:
    """One way to misbehave. `times`: how often it still happens."""

    method: str
    key: str  # a part of it
    times: int = 1
    forwarded: bool = True  # whether the server hears of the request
    status: int | None = None  # of the answer that is given instead; None: the connection is closed without one
    code: str = ""  # of S3's error
    between: Callable[[], object] = lambda: None  # what happens before the client hears anything, or nothing
    ahead: Callable[[], object] | None = None  # what happens before the server hears of it, which answers as always


@dataclass
class FaultyS3:
    """The proxy. `seen`: method, key and status of every request, as the client was told; None where it was not.
    `asked`: kind and key of each, a kind being a method, LIST or COPY."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    lost_share: float = 0.0  # of the replies to PUT and DELETE, at random
    busy_share: float = 0.0  # of all requests, at random, answered with 503
    latency_s: Mapping[str, float] = field(default_factory=dict)  # by kind; of others that of PUT
    says_which_condition: bool = True  # False: a 412 has no <Condition>, as SeaweedFS has it
    seen: list[tuple[str, str, int | None]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def lose_reply(self, method: str, key: str, times: int = 1, between: Callable[[], object] = lambda: None) -> None:
        """The server does what it is asked, and the client never hears of it."""
        self.faults.append(Fault(method, key, times, between=between))

    def answer(self, method: str, key: str, status: int, code: str, times: int = 1) -> None:
        """The server is not asked, and the client gets this error."""
        self.faults.append(Fault(method, key, times, forwarded=False, status=status, code=code))

    def before(self, method: str, key: str, ahead: Callable[[], object]) -> None:
        """Something else happens first."""
        self.faults.append(Fault(method, key, ahead=ahead))

    def count(self, method: str, key: str, status: int | None) -> int:
        """How often a request of this kind ended so."""
        return sum(m == method and key in k and s == status for m, k, s in self.seen)

    def fault_of(self, method: str, key: str) -> Fault | None:
        """What happens to this request; one that is due is used up by asking."""
        for fault in self.faults:
            if fault.times and fault.method == method and fault.key in key:
                fault.times -= 1
                return fault
        if self.busy_share and self.dice.random() < self.busy_share:
            return Fault(method, key, forwarded=False, status=503, code="SlowDown")
        lost = method in ("PUT", "DELETE") and self.dice.random() < self.lost_share
        return Fault(method, key) if lost else None


@contextlib.contextmanager
def faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """A proxy before the S3 server at `upstream`, for the length of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.handle_error = lambda *_: None  # a client that goes away
    server.upstream = urlsplit(upstream).netloc
    server.proxy = FaultyS3(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        proxy, (_, _, path, query, _) = self.server.proxy, urlsplit(self.path)
        key = unquote(path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = "COPY" if "x-amz-copy-source" in self.headers else self.command
        if kind == "GET" and "list-type=" in query:
            kind, prefix = "LIST", parse_qs(query).get("prefix", [""])[0]
            proxy.asked.append((kind, f"{key}/{prefix}"))
        else:
            proxy.asked.append((kind, key))
        time.sleep(proxy.latency_s.get(kind, proxy.latency_s.get("PUT", 0)))
        fault = proxy.fault_of(self.command, key)
        if fault and fault.ahead:
            fault = fault.ahead() and None
        status, headers, data = self._forward(body) if not fault or fault.forwarded else (fault.status, [], b"")
        if fault:
            fault.between()
            if fault.status is None:
                proxy.seen.append((self.command, key, None))
                self.close_connection = True
                return
            status, headers = fault.status, [("Content-Type", "application/xml")]
            data = f"<Error><Code>{fault.code}</Code><Message>as told</Message></Error>".encode()
        if not proxy.says_which_condition:
            data = CONDITION.sub(b"", data) if status == 412 else data
        proxy.seen.append((self.command, key, status))
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is signed
                if name.lower() not in HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP]
        if self.command == "HEAD" and (length := response.getheader("Content-Length")):
            headers.append(("Content-Length", length))
        return response.status, headers, data

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, *_) -> None:
        """Say nothing."""
