"""A report as a PDF, printed by Chromium."""

import shutil

import pytest

from etl.reports import pdf


@pytest.mark.skipif(not any(map(shutil.which, pdf.BROWSERS)), reason="no browser that prints")
def test_a_page_is_printed(tmp_path):
    pdf.write(b"<!DOCTYPE html><title>a report</title><h1>Revenue</h1>", tmp_path / "a b.pdf")
    assert (tmp_path / "a b.pdf").read_bytes().startswith(b"%PDF-")


def test_a_page_that_is_not_printed_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "BROWSERS", ["false"])
    with pytest.raises(pdf.NotPrinted, match="did not print, and ended with status 1"):
        pdf.write(b"x", tmp_path / "other.pdf")
    monkeypatch.setattr(pdf, "BROWSERS", ["no-such-browser"])
    with pytest.raises(pdf.NotPrinted, match="none is installed: looked for no-such-browser"):
        pdf.write(b"x", tmp_path / "other.pdf")
    assert [*tmp_path.iterdir()] == []
