"""What the tests share: small real data from tpchgen, a copy of the project to change, an S3 server on loopback."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_faults import FaultyS3, faulty_s3
from support import copy_project, ingest_all, s3, s3_variables

from etl import leases
from etl.storage import Root
from pipeline import source

SCALE, SLICES = 0.01, 40
LONGEST = (
    "test_faults",
    "test_end_to_end",
    "test_notebooks",
    "test_clicks",
    "test_up",
    "test_replay",
    "test_cli",
    "test_kernels",
    "test_s3",
    "test_browser",
)


def pytest_collection_modifyitems(items):
    """The longest files first: at the end nobody waits for one of them."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _journals(tmp_path_factory):
    """Journals go to a folder of the tests' own, also those of the processes they start."""
    os.environ["ETL_SPOOL"] = str(tmp_path_factory.mktemp("spool"))


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two processes."""
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as started:
        yield started


@pytest.fixture
def bare_cluster():
    """The address of a scheduler in another process whose worker cannot import the project."""
    script = Path(__file__).with_name("bare_cluster.py")
    cluster = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield cluster.stdout.readline().strip()
    cluster.communicate(timeout=60)


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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, stream, made) -> Callable[[str], Path]:
    """The roots that tests get copies of, by the fixture's name, each made when it is first asked for."""

    @functools.cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name) / "root"
        for frames in [made] if name != "scattered" else [{tick: frames} for tick, frames in made.items()]:
            source.land(Root.at(root), stream, frames)
            if name != "landed":
                ingest_all(str(root))
        return root

    return make


@pytest.fixture
def landed(root, prepared) -> str:
    """A root with the three ticks' files in landing."""
    return shutil.copytree(prepared("landed"), root, dirs_exist_ok=True)


@pytest.fixture
def filled(root, prepared) -> str:
    """A root with the three ticks in the lake, published."""
    return shutil.copytree(prepared("filled"), root, dirs_exist_ok=True)


@pytest.fixture
def scattered(root, prepared) -> str:
    """A lake with three files in each streamed table."""
    return shutil.copytree(prepared("scattered"), root, dirs_exist_ok=True)


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project whose notebooks and YAML a test may change."""
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="session")
def s3_server() -> str:
    """moto's S3 on loopback; its URL."""
    with s3() as url:
        yield url


@pytest.fixture
def s3_root(s3_server, monkeypatch, request) -> str:
    """An empty bucket's URL, and the variables that lead there."""
    for name, value in s3_variables(s3_server).items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/etl"


@pytest.fixture
def quick(monkeypatch):
    """Leases in object stores are renewed, and taken over, thirty times as quickly."""
    for name in ("RENEW_S", "DEAD_S", "LOOK_S"):
        monkeypatch.setattr(leases, name, getattr(leases, name) / 30)


@pytest.fixture
def faulty(s3_server, s3_root, monkeypatch) -> FaultyS3:
    """A proxy between `s3_root` and its server, that misbehaves as it is told."""
    import s3fs

    with faulty_s3(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # one knows its endpoint for good
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")  # while Playwright is there its event loop runs in this thread, which other tests mind
def browser_window():
    """A window of Debian's Chromium, not shown; its tabs share what they have loaded."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("not looked at with a browser: chromium is not installed")
    from browser import HEIGHT_PX, WIDTH_PX
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser.new_context(viewport={"width": WIDTH_PX, "height": HEIGHT_PX})
        browser.close()
