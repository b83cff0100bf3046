"""Our worker beside Prefect's own process worker, on a real server: the same flows end in the same states."""

import contextlib
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from support import free_port

from etl.serve import services
from etl.storage import PROJECT

DRIVER = Path(__file__).parent.parent / "compared_workers.py"
EXPECTED = {  # flow: type and name of its last state, how often it was run
    "completes": ["COMPLETED", "Completed", 1],
    "fails": ["FAILED", "Failed", 1],
    "says_failed": ["FAILED", "CheckFailed", 1],
    "is_retried": ["COMPLETED", "Completed", 2],
    "crashes": ["CRASHED", "Crashed", 1],
    "waits": ["CANCELLED", "Cancelled", 1],
    "is_long": ["COMPLETED", "Completed", 1],
    "is_refused": ["CANCELLED", "Cancelled", 0],
    "logs": [["prefect.flow_runs", "seen in Prefect's logs"]],
}


@contextlib.contextmanager
def prefect_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server as `up` has it; the variables that lead there."""
    port = free_port()
    service = services.prefect_server(port, folder, folder)
    service.start()
    try:
        service.wait_ready()
        yield {
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(folder),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(PROJECT),
        }
    finally:
        services.stop([service])


@contextlib.contextmanager
def failing(server: dict[str, str], *kinds: bytes, times: int) -> Iterator[dict[str, str]]:
    """The way to the server on which the first `times` requests that begin with each pattern get a 500."""
    upstream = int(server["PREFECT_API_URL"].split(":")[2].split("/")[0])
    left = dict.fromkeys(kinds, times)

    class Way(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("127.0.0.1", upstream)) as there:
                back = threading.Thread(target=self.pump, args=(there, self.request), daemon=True)
                back.start()
                self.pump(self.request, there)

        def pump(self, source, target):
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    kind = next((kind for kind in kinds if left[kind] and re.match(kind, data)), None)
                    if kind:
                        left[kind] -= 1
                        source.sendall(b"HTTP/1.1 500 Not Well\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
                        break
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    class Ways(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address, block_on_close = True, True, False

    with Ways(("127.0.0.1", 0), Way) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield server | {"PREFECT_API_URL": f"http://127.0.0.1:{proxy.server_address[1]}/api"}
        finally:
            proxy.shutdown()
    assert not any(left.values()), f"not all were asked for: {left}"


def ended(server: dict[str, str], folder: Path, *kinds: str) -> list[dict]:
    """How the flows ended with each kind of worker, all at once."""
    # what `up` sets for itself when it is imported, in this process too, is not for Prefect's own worker
    working, others = [], {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    for kind in kinds:
        marks = folder / kind
        marks.mkdir()
        command, pipe = [sys.executable, str(DRIVER), kind, str(marks)], subprocess.PIPE
        working.append(subprocess.Popen(command, env=others | server, stdout=pipe, stderr=pipe, text=True))
    try:
        said = [process.communicate(timeout=240) for process in working]
    finally:
        for process in working:
            process.kill()
    assert all(process.returncode == 0 for process in working), "\n".join(err[-9000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def same_states(n: int, seed: int) -> str:
    """`n` times all flows by both workers."""
    for _ in range(n):
        with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as server:
            ours, its = ended(server, Path(folder), "in-place", "process")
        assert ours == its == EXPECTED, f"ours {ours}, Prefect's {its}"
    return f"{n * (len(EXPECTED) - 1)} flow runs by each worker: the same states, run counts and logs"
