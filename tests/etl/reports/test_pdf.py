"""A report as a PDF, printed by Chromium."""

import shutil

import pytest

from etl.reports import pdf


@pytest.mark.skipif(not any(map(shutil.which, pdf.BROWSERS)), reason="no browser that prints")
def test_a_page_is_printed():
    assert pdf.printed(b"<!DOCTYPE html><title>a report</title><h1>Revenue</h1>").startswith(b"%PDF-")


def test_what_is_not_printed_says_why(monkeypatch):
    monkeypatch.setattr(pdf, "BROWSERS", ["false"])
    with pytest.raises(pdf.NotPrinted, match="did not print, and ended with status 1"):
        pdf.printed(b"x")
    monkeypatch.setattr(pdf, "BROWSERS", ["no-such-browser"])
    with pytest.raises(pdf.NoBrowser, match="none is installed: looked for no-such-browser"):
        pdf.printed(b"x")
