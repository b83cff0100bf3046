"""What several tests call: the command line in a copy of the project, one run of preprocess without its notebook."""

import atexit
import contextlib
import fcntl
import functools
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat

from etl.storage import PROJECT
from pipeline import Lake

AT = "2026-03-01T12:00:10+00:00"  # a scheduled time; any will do
SMALL = ("-p", "scale=0.01", "-p", "slices=40", "-p", "history=2", "-p", "min_rows=500")  # for the command line

SHARED = "ETL_TESTS_SHARED"  # the variable with the folder in which the tests' processes find what is made once


@functools.cache
def _own() -> tempfile.TemporaryDirectory:
    """For a process that shares nothing, as long as it is there."""
    return tempfile.TemporaryDirectory(prefix="made-")


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` filled, for whichever of the tests' processes asked first. Only to read, and to copy."""
    folder = Path(os.environ.get(SHARED) or _own().name, name)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder.with_suffix(".done")).exists():
            shutil.rmtree(folder, ignore_errors=True)  # what one that failed has left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def ingest_all(root: str, run_id: str = "preprocess-test") -> dict[str, int]:
    """One run of preprocess without its notebook."""
    lake = Lake(root)
    batch = lake.next_batch(max_files=500, scheduled_for=AT)
    return lake.commit(lake.read(batch), run_id=run_id)


def orchestrate(
    project: Path, *arguments: str, env: dict | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """The command line in a copy of the project; no Prefect server is looked for."""
    if not _one_command.acquire(blocking=False):
        raise RuntimeError("one command at a time: start a second one by subprocess")
    with contextlib.ExitStack() as stack:
        stack.callback(_one_command.release)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="command-"))
        told = {name: f"{folder}/{name}" for name in ("out", "err")}
        asked = {"folder": str(project), "arguments": [*map(str, arguments)]}
        commands = _commands()
        commands.stdin.write(json.dumps(asked | told | {"environment": environment(project) | (env or {})}) + "\n")
        commands.stdin.flush()
        if not select.select([commands.stdout], [], [], timeout_s)[0]:
            commands.kill()
            raise subprocess.TimeoutExpired(arguments, timeout_s)
        status = int(commands.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(Path(path).read_text() for path in told.values()))


_one_command = threading.Lock()


@functools.cache
def _commands() -> subprocess.Popen:
    """What starts commands."""
    script = Path(__file__).with_name("commands.py")
    started = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(started.kill)
    return started


def copy_project(folder: Path) -> Path:
    """A copy of the project, with its notebooks and YAML, in a folder that is not there yet."""
    folder.mkdir()
    for name in ("app", "etl", "notebooks", "params", "pipeline"):  # compiled code as well, which nobody compiles again
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(PROJECT / "orchestrate.py", folder)
    return folder


def environment(project: Path) -> dict[str, str]:
    """This process's variables, with the copy's modules before the installed ones."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ETL_")) or k == "ETL_KERNELS"}
    return ours | {"PYTHONPATH": str(project), "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """moto's S3 on loopback; its URL."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
                break
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def busy_s(seconds: float) -> float:
    """At least `seconds`, and longer on busy cores: a deadline that a kernel has to have started by."""
    return round(seconds * max(1, os.getloadavg()[0] / os.cpu_count()), 1)


WEBSOCKET = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def asked(
    port: int, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the answer to a request with these headers: `host`, `origin` and so on."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        if body is not None:
            headers["content_length"] = str(len(body))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body and body.encode())
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, told, b"" if answer.status == 101 else answer.read()


def s3_variables(server: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def write_stage(project, name: str, *cells: str, parameters: str = "", yml: str = "") -> None:
    """A notebook and its YAML, nothing else: a stage."""
    declared = 'root: str = "outputs/dev"  # root\nrun_id: str = "dev"  # run\n' + parameters
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(f"# {name}"),
            nbformat.v4.new_code_cell("from etl.notebook import check, record, stop"),
            nbformat.v4.new_code_cell(declared, metadata={"tags": ["parameters"]}),
            *(nbformat.v4.new_code_cell(cell) for cell in cells),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(nb, project / "notebooks" / f"{name}.ipynb")
    (project / "params" / f"{name}.yml").write_text(f"every: 5 seconds\ndeadline: 1 minute\n{yml}")
