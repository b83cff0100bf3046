"""A PDF of Chromium's, written smaller: the same pages, pixel for pixel, in less than half of the bytes.

Chromium writes each of the thousand objects that tell readers of screens what is where as text, and pictures of few
colours with all three bytes a pixel. Here the former are compressed together, and the latter have a palette.
"""

import io
import re
import struct
import zlib
from itertools import pairwise

OBJECT = re.compile(rb"(\d+) 0 obj\n(.*)endobj\n\s*", re.S)
STREAM = b">> stream\n"
PICTURE = re.compile(
    rb"<<(?P<before>.*)/ColorSpace \[?/(?:ICCBased \d+ 0 R\]|DeviceRGB)\s+/BitsPerComponent 8\s+/Filter /FlateDecode\s+"
    rb"/Length \d+>> stream\n(?P<pixels>.*)\nendstream\n",
    re.S,
)
SIZE = re.compile(rb"/Width (\d+)\s+/Height (\d+)")
COLOURS = 256  # of a palette, at most


def packed(pdf: bytes) -> bytes:
    """The same document; as it was where it is not written as Chromium writes."""
    at = int(pdf[pdf.rindex(b"startxref") + 9 :].split()[0])
    table, _, trailer = pdf[at:].partition(b"trailer\n")
    starts = sorted(int(line[:10]) for line in table.splitlines() if line.endswith(b" n "))
    matches = [OBJECT.fullmatch(pdf[start:end]) for start, end in pairwise([*starts, at])]
    objects = {int(match[1]): match[2] for match in matches if match}
    if not objects or len(objects) < len(starts) or b"/Prev" in trailer or b"/Encrypt" in trailer:
        return pdf
    small = {number: body for number, body in objects.items() if STREAM not in body}
    together, last = max(objects) + 1, max(objects) + 2
    out = bytearray(b"%PDF-1.5\n%\xd3\xeb\xe9\xe1\n")
    where = {0: (0, 0, 65535)}  # of each object: kind, offset or the stream that holds it, its number in there
    where |= {number: (2, together, at) for at, number in enumerate(small)}
    streams = {number: _with_palette(body) for number, body in objects.items() if number not in small}
    for number, body in (streams | {together: _together(small)}).items():
        where[number] = (1, len(out), 0)
        out += b"%d 0 obj\n%sendobj\n" % (number, body)
    where[last] = (1, len(out), 0)
    rows = b"".join(struct.pack(">BIH", *where.get(number, (0, 0, 0))) for number in range(last + 1))
    kept = b" ".join(re.findall(rb"/(?:Root|Info) \d+ 0 R|/ID \[[^]]*\]", trailer))
    index = _stream(b"/Type /XRef /Size %d /W [1 4 2] %s" % (last + 1, kept), zlib.compress(rows))
    return bytes(out) + b"%d 0 obj\n%sendobj\nstartxref\n%d\n%%%%EOF\n" % (last, index, len(out))


def _together(objects: dict[int, bytes]) -> bytes:
    """One stream that holds them all."""
    ends = [0]
    for body in objects.values():
        ends.append(ends[-1] + len(body))
    head = b" ".join(b"%d %d" % pair for pair in zip(objects, ends, strict=False)) + b"\n"
    said = b"/Type /ObjStm /N %d /First %d" % (len(objects), len(head))
    return _stream(said, zlib.compress(head + b"".join(objects.values()), 9))


def _with_palette(body: bytes) -> bytes:
    """A picture of few colours as a PNG has it, which a PDF may hold as it is; anything else as it was."""
    from PIL import Image

    if not ((picture := PICTURE.fullmatch(body)) and (size := SIZE.search(body))):
        return body
    width, height = int(size[1]), int(size[2])
    pixels = Image.frombytes("RGB", (width, height), zlib.decompress(picture["pixels"]))
    if not (colours := pixels.getcolors(COLOURS)):
        return body
    made = io.BytesIO()
    pixels.quantize(len(colours), dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    chunks = _chunks(made.getvalue())
    palette, bits = chunks[b"PLTE"], chunks[b"IHDR"][8]
    space = b"/ColorSpace [/Indexed /DeviceRGB %d <%s>]" % (len(palette) // 3 - 1, palette.hex().encode())
    row = b"/BitsPerComponent %d /DecodeParms <</Predictor 15 /Columns %d /BitsPerComponent %d>>" % (bits, width, bits)
    return _stream(b"%s %s %s" % (picture["before"], space, row), chunks[b"IDAT"])


def _chunks(png: bytes) -> dict[bytes, bytes]:
    """Of a PNG, by kind; those of one kind joined."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks[kind] = chunks.get(kind, b"") + png[at + 8 : at + 8 + length]
        at += length + 12
    return chunks


def _stream(said: bytes, compressed: bytes) -> bytes:
    return b"<<%s /Filter /FlateDecode /Length %d>> stream\n%s\nendstream\n" % (said, len(compressed), compressed)
