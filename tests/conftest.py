"""What the tests share: small real data from tpchgen, a copy of the project to change, an S3 server on loopback."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline import ingest, source
from storage import PROJECT

SCALE, SLICES = 0.01, 40
AT = "2026-03-01T12:00:10+00:00"  # a scheduled time; any will do


@pytest.fixture(scope="session")
def stream() -> source.Stream:
    """A small stream: 15,000 orders in 40 slices."""
    return source.Stream(SCALE, SLICES, "2026-03-01T11:00:00+00:00")


@pytest.fixture(scope="session")
def made(stream) -> dict:
    """Its first three ticks: tick -> table -> frame."""
    return source.make_ticks(stream, range(3))


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def landed(root, stream, made) -> str:
    """A root with the three ticks' files in landing."""
    source.land(root, stream, made)
    return root


@pytest.fixture
def filled(landed) -> str:
    """A root with the three ticks in the lake, published."""
    ingest_all(landed)
    return landed


def ingest_all(root: str, run_id: str = "preprocess-test") -> dict[str, int]:
    """One run of preprocess without its notebook."""
    batch = ingest.next_batch(root, max_files=500, scheduled_for=AT)
    return ingest.commit(ingest.read(batch), run_id=run_id)


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project whose notebooks and YAML a test may change."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("app", "notebooks", "params", "pipeline", "runner"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("orchestrate.py", "storage.py"):
        shutil.copy(PROJECT / name, copy)
    return copy


def orchestrate(project: Path, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    """The command line in a copy of the project; no Prefect server is looked for."""
    return subprocess.run(
        [sys.executable, "orchestrate.py", *arguments],
        cwd=project,
        env=environment(project) | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def environment(project: Path) -> dict[str, str]:
    """This process's variables, with the copy's modules before the installed ones."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ETL_"))}
    return kept | {"PYTHONPATH": str(project), "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def s3_server() -> str:
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


@pytest.fixture
def s3_root(s3_server, monkeypatch, request) -> str:
    """An empty bucket's URL, and the variables that lead there."""
    for name, value in s3_variables(s3_server).items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/etl"


def s3_variables(server: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
