"""What several tests call: the command line in a copy of the project, one run of preprocess without its notebook."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat

from etl.storage import PROJECT
from pipeline import Lake

AT = "2026-03-01T12:00:10+00:00"  # a scheduled time; any will do
SMALL = ("-p", "scale=0.01", "-p", "slices=40", "-p", "history=2", "-p", "min_rows=500")  # for the command line


def ingest_all(root: str, run_id: str = "preprocess-test") -> dict[str, int]:
    """One run of preprocess without its notebook."""
    lake = Lake(root)
    batch = lake.next_batch(max_files=500, scheduled_for=AT)
    return lake.commit(lake.read(batch), run_id=run_id)


def orchestrate(
    project: Path, *arguments: str, env: dict | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """The command line in a copy of the project; no Prefect server is looked for."""
    return subprocess.run(
        [sys.executable, "orchestrate.py", *arguments],
        cwd=project,
        env=environment(project) | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def copy_project(folder: Path) -> Path:
    """A copy of the project, with its notebooks and YAML, in a folder that is not there yet."""
    folder.mkdir()
    for name in ("app", "etl", "notebooks", "params", "pipeline"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
    shutil.copy(PROJECT / "orchestrate.py", folder)
    return folder


def environment(project: Path) -> dict[str, str]:
    """This process's variables, with the copy's modules before the installed ones."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ETL_"))}
    return kept | {"PYTHONPATH": str(project), "COLUMNS": "200"}


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
