"""Our worker beside Prefect's own process worker, on a real server: the same flows end in the same states."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
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


def ended(server: dict[str, str], folder: Path, *kinds: str) -> list[dict]:
    """How the flows ended with each kind of worker, all at once."""
    working = []
    for kind in kinds:
        marks = folder / kind
        marks.mkdir()
        command, pipe = [sys.executable, str(DRIVER), kind, str(marks)], subprocess.PIPE
        working.append(subprocess.Popen(command, env=os.environ | server, stdout=pipe, stderr=pipe, text=True))
    try:
        said = [process.communicate(timeout=240) for process in working]
    finally:
        for process in working:
            process.kill()
    assert all(process.returncode == 0 for process in working), "\n".join(err[-2000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def same_states(n: int, seed: int) -> str:
    """`n` times all flows by both workers."""
    for _ in range(n):
        with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as server:
            ours, its = ended(server, Path(folder), "in-place", "process")
        assert ours == its == EXPECTED, f"ours {ours}, Prefect's {its}"
    return f"{n * (len(EXPECTED) - 1)} flow runs by each worker: the same states, run counts and logs"
