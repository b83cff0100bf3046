"""Journals of the tests go into a folder of their own."""

import pytest


@pytest.fixture(autouse=True)
def spool(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("spool")
    monkeypatch.setenv("ETL_SPOOL", str(folder))
    return folder
