"""What the tests share: small real data from tpchgen, a copy of the project to change, an S3 server on loopback."""

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import toy
from s3_faults import FaultyS3, faulty_s3
from support import SHARED, copy_project, ingest_all, made_once, s3, s3_variables

from etl import leases
from etl.storage import Root
from pipeline import source

# hundreds of processes import the project: what one has compiled is there for the next
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # without credentials nobody asks a cloud's metadata address

SCALE, SLICES = 0.01, 40
LONGEST = (
    "test_faults",
    "test_end_to_end",
    "test_up",
    "test_queries",
    "test_replay",
    "test_cli",
    "test_notebooks",
    "test_clicks",
    "test_source",
    "test_rebuild",
    "test_evolution",
    "test_schemas",
    "test_kernels",
    "test_ingest",
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


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory):
    """What is made once is made once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    folder.mkdir(exist_ok=True)
    os.environ[SHARED] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def generator(_shared) -> Callable:
    """The generator itself. It takes most of a second to begin, and is a function of what it is asked: in the tests
    the same is made once."""
    real = source._tpchgen

    @functools.wraps(real)
    def kept(scale, tables, slices=1, parts=(1,), chunk_bytes=source.CHUNK_BYTES):
        asked = repr((scale, tables, slices, sorted(parts), chunk_bytes))

        def make(folder: Path) -> None:
            (folder / "frames").write_bytes(pickle.dumps(real(scale, tables, slices, parts, chunk_bytes)))

        made = made_once(f"tpchgen-{hashlib.sha256(asked.encode()).hexdigest()[:16]}", make)
        return pickle.loads((made / "frames").read_bytes())

    source._tpchgen = kept
    return real


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
def prepared(stream, made) -> Callable[[str], Path]:
    """The roots that tests get copies of, by the fixture's name, each made when it is first asked for."""

    def make(name: str, folder: Path) -> None:
        root = str(folder / "root")
        for frames in [made] if name != "scattered" else [{tick: frames} for tick, frames in made.items()]:
            source.land(Root.at(root), stream, frames)
            if name != "landed":
                ingest_all(root)

    return lambda name: made_once(name, functools.partial(make, name)) / "root"


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


KEEP = """import pathlib, select, sys
from etl.kernels import client
keeper = client.Keeper(1, pathlib.Path(sys.argv[1]))
keeper.start()
while not select.select([sys.stdin], [], [], 1)[0]:
    keeper.ensure()  # a server ends when a file that it has imported is touched
keeper.end()"""


@pytest.fixture(scope="session")
def fork_server() -> Iterator[str]:
    """The folder of a fork server of the project's, as ETL_KERNELS names it. The worker that asks first keeps it for
    all; after its end kernels are cold again."""
    folder = Path(os.environ[SHARED])
    with (folder / "kernels.lock").open("w") as lock, contextlib.ExitStack() as stack:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            keeper = subprocess.Popen(
                [sys.executable, "-c", KEEP, folder / "kernels.log"],
                stdin=subprocess.PIPE,
                env=os.environ | {"ETL_KERNELS": str(folder / "k")},
            )
            stack.callback(keeper.communicate)
        toy.until((folder / "k/socket").exists, 240, "the fork server answers")
        yield str(folder / "k")


@pytest.fixture
def warm(fork_server, monkeypatch) -> None:
    """Kernels of the project's folder have imported, as those of `up`, what draws charts: that takes seconds."""
    monkeypatch.setenv("ETL_KERNELS", fork_server)


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
