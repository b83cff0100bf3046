"""Roots for the API and the dashboard to read."""

import shutil
import sys
from contextlib import contextmanager

import pytest
from published import QUERY_RUN, TRAIN_RUN, add_run, fill
from support import free_port

import orchestrate
from app import front, poller
from etl.serve import health, services


@pytest.fixture(autouse=True)
def _main(monkeypatch):
    """Streamlit puts the page in the place of __main__, which processes that other tests start would run."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture(autouse=True)
def _look_each_time(monkeypatch):
    """What a test changes is seen at once."""
    monkeypatch.setattr(poller, "LOOK_S", 0)
    monkeypatch.setattr(health, "SLOWLY_S", 0)


@pytest.fixture(scope="session", autouse=True)
def logged():
    """The lines of the API's log, which come a moment after the requests: pytest would show them between two tests."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "_write", lambda text: lines.extend(text.decode().splitlines()))
        yield lines


@pytest.fixture(scope="session")
def filled(tmp_path_factory) -> str:
    """A root in which everything is published. Only to read."""
    url = str(tmp_path_factory.mktemp("filled"))
    fill(url)
    add_run(url, QUERY_RUN, minute=1)
    add_run(url, TRAIN_RUN, minute=2)
    add_run(url, "train-20261122T110000-ffffff", "failed", "ValueError: no such column", minute=3)
    return url


@pytest.fixture
def root(filled, tmp_path, monkeypatch) -> str:
    """A root of the test's own in which everything is published; what ETL_ROOT names."""
    url = shutil.copytree(filled, tmp_path / "root")
    monkeypatch.setenv("ETL_ROOT", str(url))
    return str(url)


@pytest.fixture
def empty(tmp_path, monkeypatch) -> str:
    """A root before the first run; what ETL_ROOT names."""
    monkeypatch.setenv("ETL_ROOT", str(tmp_path / "empty"))
    return str(tmp_path / "empty")


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`with served(root) as url`: the dashboard, as `up` serves it. Its first answer takes seconds, for its imports."""

    @contextmanager
    def serving(root: str):
        ports = orchestrate.PORTS | {"dashboard": free_port()}
        service = orchestrate.services(root, ports, tmp_path_factory.mktemp("dashboard"))[-1]
        service.start()
        try:
            service.wait_ready()
            yield service.page
        finally:
            services.stop([service])

    return serving


@pytest.fixture(scope="session")
def dashboard_url(filled, served) -> str:
    """The dashboard over `filled`."""
    with served(filled) as url:
        yield url


@pytest.fixture
def dashboard(browser_window, dashboard_url):
    """A tab of its own on the dashboard. What the browser complains of meanwhile fails the test."""
    from browser import Dashboard

    with Dashboard.opened(browser_window, dashboard_url) as tab:
        yield tab
