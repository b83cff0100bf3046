"""A report as a PDF, printed by Chromium."""

import base64
import io
import re
import shutil
import zlib

import pytest
from PIL import Image

from etl.reports import packing, pdf

has_browser = pytest.mark.skipif(not any(map(shutil.which, pdf.BROWSERS)), reason="no browser that prints")


@pytest.fixture(scope="module")
def chromium_wrote() -> bytes:
    """A page with a chart of three colours, before it is written smaller."""
    chart = Image.new("RGB", (300, 200), "white")
    chart.paste((47, 109, 181), (20, 20, 100, 200))
    chart.paste((224, 138, 46), (120, 60, 200, 200))
    chart.save(png := io.BytesIO(), "PNG")
    picture = f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" alt="">'
    page = f'<!DOCTYPE html><html lang="en"><title>a report</title><h1>Revenue</h1>{picture}{"<p>a line</p>" * 40}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdf, "packed", bytes)
        return pdf.printed(page.encode())


def objects(document: bytes) -> dict[int, bytes]:
    """What a reader finds by the index of a packed PDF: each object's text, of a stream what is before its data."""
    start = int(document[document.rindex(b"startxref") + 9 :].split()[0])
    rows = stream(document[start:])
    found = {}
    for number in range(len(rows) // 7):
        kind, at = rows[7 * number], int.from_bytes(rows[7 * number + 1 : 7 * number + 5])
        last = int.from_bytes(rows[7 * number + 5 : 7 * number + 7])
        if kind == 1:
            assert document[at:].startswith(b"%d 0 obj\n" % number)
            found[number] = document[at:].partition(b"endobj")[0].partition(b" obj\n")[2]
        elif kind == 2:
            found[number] = (at, last)
    for number, entry in found.items():
        if isinstance(entry, tuple):
            holder = document[document.index(b"\n%d 0 obj\n" % entry[0]) :]
            text, first = stream(holder), int(re.search(rb"/First (\d+)", holder)[1])
            heads = [int(part) for part in text[:first].split()]
            begin, *rest = heads[2 * entry[1] + 1 :: 2]
            assert heads[2 * entry[1]] == number
            found[number] = text[first:][begin : rest[0] if rest else None]
    return found


def stream(text: bytes) -> bytes:
    length = int(re.search(rb"/Length (\d+)", text)[1])
    return zlib.decompress(text.partition(b">> stream\n")[2][:length])


@has_browser
def test_a_page_is_printed(chromium_wrote):
    assert chromium_wrote.startswith(b"%PDF-")


@has_browser
def test_what_is_printed_is_written_smaller_and_nothing_is_lost(chromium_wrote):
    small = packing.packed(chromium_wrote)
    assert len(small) < 0.6 * len(chromium_wrote)
    before = dict(re.findall(rb"(?s)\n(\d+) 0 obj\n(.*?)endobj\n", chromium_wrote))
    after = objects(small)
    kept = {int(number): text for number, text in before.items() if b"stream\n" not in text}
    assert {number: after[number] for number in kept} == kept and len(kept) > 40
    assert set(map(int, before)) <= set(after)
    assert re.search(rb"/Root \d+ 0 R", small[-400:]) and b"/StructElem" in b"".join(
        kept.values()
    )  # for screen readers
    picture = small[small.index(b"/Indexed /DeviceRGB 2 <") - 300 :]
    palette = bytes.fromhex(re.search(rb"<([0-9a-f]+)>", picture)[1].decode())
    assert {palette[at : at + 3] for at in (0, 3, 6)} == {b"\xff\xff\xff", bytes((47, 109, 181)), bytes((224, 138, 46))}
    assert b"/BitsPerComponent 2 " in picture and len(stream(picture)) == 200 * (1 + 300 // 4)  # and a filter a row


@has_browser
def test_a_pdf_that_is_written_otherwise_is_left_as_it_is(chromium_wrote):
    small = packing.packed(chromium_wrote)
    assert packing.packed(small) == small
    for other in (
        chromium_wrote.replace(b"/Info", b"/Prev 7\n/Info"),
        chromium_wrote.replace(b" 0 obj\n<<", b" 0 obj  <<"),
    ):
        assert packing.packed(other) == other


def test_what_is_not_printed_says_why(monkeypatch):
    monkeypatch.setattr(pdf, "BROWSERS", ["false"])
    with pytest.raises(pdf.NotPrinted, match="did not print, and ended with status 1"):
        pdf.printed(b"x")
    monkeypatch.setattr(pdf, "BROWSERS", ["no-such-browser"])
    with pytest.raises(pdf.NoBrowser, match="none is installed: looked for no-such-browser"):
        pdf.printed(b"x")
