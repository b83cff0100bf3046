"""A file's bytes become what `parse` understands: inflated, without its byte order mark, and what kind it is.

What a file is called says nothing here; what is in it does. Nothing is inflated beyond a bound.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.storage import Unreadable

INFLATED_BYTES = 256_000_000  # of a file, at most: as many as a batch may have
CHUNK_BYTES = 1 << 20
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MARK = b"\xef\xbb\xbf"  # of byte order
OTHERS = {
    b"BZh": "is compressed with bzip2: gzip and zstd are read",
    b"PK\x03\x04": "is a zip archive: gzip and zstd are read",
    b"\xfd7zXZ\x00": "is compressed with xz: gzip and zstd are read",
    b"ARROW1": "is Arrow IPC (Feather): Parquet is read",
    b"Obj\x01": "is Avro: JSON, CSV and Parquet are read",
    b"ORC": "is ORC: Parquet is read",
    b"\xff\xfe": "is UTF-16, not UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8",
}
TAR, TAR_AT = b"ustar", 257  # where it is in a tar archive
OBJECT = re.compile(rb"\s*\{")  # begins JSON lines, in whose texts the names of columns may stand
ARRAY = re.compile(rb"\s*\[\s*[{\]]")
BLANKS = re.compile(r"[ \t\r\n]*")
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Content:
    """What is in a file. `kind`: `lines` (of JSON), `array` (of JSON), `csv` or `parquet`; its rows are in `frame`."""

    kind: str
    data: bytes
    frame: pl.DataFrame = field(default_factory=pl.DataFrame)

    @property
    def size(self) -> int:
        """The bytes that it takes in memory."""
        return len(self.data) + int(self.frame.estimated_size())


def opened(data: bytes, names: Collection[str], most: int = INFLATED_BYTES) -> Content:
    """What is in a file. `names`: what a CSV's header may name; `most`: the bytes that it may inflate to.

    Raises Unreadable, with the reason, for what no line of can be read.
    """
    if data.startswith((GZIP, ZSTD)):
        data = _inflated(data, most)
    data = data.removeprefix(MARK)
    if not data:
        raise Unreadable("is empty")
    if why := next((why for beginning, why in OTHERS.items() if data.startswith(beginning)), None):
        raise Unreadable(why)
    if data.startswith(TAR, TAR_AT):
        raise Unreadable("is a tar archive: gzip and zstd are read, of one file each")
    if len(data) > 1 and (data[0] == 0) != (data[1] == 0):
        raise Unreadable("is UTF-16, not UTF-8")
    if data.startswith(b"PAR1"):
        return Content("parquet", b"", parquet(data, most))
    if ARRAY.match(data) or (data.lstrip().startswith(b"[") and data.rstrip().endswith(b"]")):
        return Content("array", data)
    return Content("lines" if OBJECT.match(data) or not delimiter(data, names) else "csv", data)


def _inflated(data: bytes, most: int) -> bytes:
    """All members of a gzip or zstd file. Raises Unreadable."""
    kind = "gzip" if data.startswith(GZIP) else "zstd"
    parts, size = [], 0
    try:
        plain = io.BytesIO(data)
        with gzip.GzipFile(fileobj=plain) if kind == "gzip" else pa.CompressedInputStream(plain, kind) as stream:
            while part := stream.read(CHUNK_BYTES):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise Unreadable(f"inflates to more than {most:,} bytes")
    except (zlib.error, EOFError, OSError, pa.ArrowException) as error:
        raise Unreadable(f"is damaged {kind}: {error}") from None
    return b"".join(parts)


def elements(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[int, tuple[Any, str]]]:
    """Of one JSON array each element: its number, from 1, its value or the error it is refused with, and its text.

    Raises Unreadable where it is no array to its end.
    """
    lenient = json.JSONDecoder(strict=False)
    at, number = _past_blanks(text, _past_blanks(text, 0) + 1), 0
    while text[at : at + 1] != "]" or number:
        number, start = number + 1, at
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            value = error
            try:
                _, at = lenient.raw_decode(text, start)
            except (ValueError, RecursionError) as broken:
                raise Unreadable(f"is a JSON array that cannot be read from element {number} on: {broken}") from None
        yield number, (value, text[start:at])
        at = _past_blanks(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise Unreadable(f"is a JSON array that cannot be read beyond element {number}: no comma and no end")
        at = _past_blanks(text, at + 1)
    if text[at + 1 :].strip():
        raise Unreadable("is a JSON array with more behind its end")


def _past_blanks(text: str, at: int) -> int:
    blanks = BLANKS.match(text, at)
    return blanks.end() if blanks else at


def delimiter(data: bytes, names: Collection[str]) -> str | None:
    """What stands between the names of a CSV's header; None when it names no column, so that it is none."""
    line = data[: data.find(b"\n") + 1 or len(data)].decode("utf-8", "replace").rstrip("\r\n")
    named = {mark: sum(name.strip('"') in names for name in line.split(mark)) for mark in DELIMITERS}
    best = max(named, key=lambda mark: named[mark])
    return best if named[best] else None


def records(text: str, mark: str) -> Iterator[tuple[int, tuple[list[str | None] | None, str]]]:
    """Of a CSV each record that is not blank: the number of the line that it begins on, its fields and its text.

    A field is null when nothing is in it, not even quotes. The fields are None where quotes are not as they should be;
    then the record ends with the line.
    """
    field = re.compile(rf'(?:"((?:[^"]|"")*+)"|([^"{mark}\r\n]*+))({mark}|\r?\n|\Z)')
    at, line = 0, 1
    while at < len(text):
        start, fields, end = at, [], mark
        while end == mark:
            match = field.match(text, at)
            if match is None:
                break
            quoted, plain, end = match.groups()
            fields.append(plain or None if quoted is None else quoted.replace('""', '"'))
            at = match.end()
        if match is None:
            at = text.find("\n", start) + 1 or len(text)
        raw = text[start:at].rstrip("\r\n")
        if raw.strip():
            yield line, (fields if match else None, raw)
        line += text.count("\n", start, at)


def header(names: list[str | None] | None, raw: str) -> tuple[list[str], set[str]]:
    """The names of a CSV's columns, by its first record as `records` has it, and which of them have none in the file:
    pandas' index, or what a spreadsheet has beside its columns. Those are called by their number, as `column 1`.

    Raises Unreadable.
    """
    if names is None:
        if "\r" in raw:
            raise Unreadable("is a CSV whose lines end with CR alone: LF and CRLF are read")
        raise Unreadable("is a CSV with quotes in its header that are not closed, or not around a whole name")
    numbers = {f"column {number}" for number, name in enumerate(names, 1) if not name}
    return [name or f"column {number}" for number, name in enumerate(names, 1)], numbers


def parquet(data: bytes, most: int = INFLATED_BYTES) -> pl.DataFrame:
    """The rows of a Parquet file. Raises Unreadable."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > most:
            raise Unreadable(f"inflates to more than {most:,} bytes")
        batches, size = [], 0
        for batch in file.iter_batches(batch_size=16_384):
            batches.append(batch)
            size += batch.nbytes
            if size > most:
                raise Unreadable(f"inflates to more than {most:,} bytes")
        frame = pl.from_arrow(pa.Table.from_batches(batches, file.schema_arrow))
    except (pa.ArrowException, OSError, pl.exceptions.PolarsError) as error:
        raise Unreadable(f"is damaged Parquet: {str(error).splitlines()[0] if str(error) else error!r}") from None
    if not isinstance(frame, pl.DataFrame):
        raise Unreadable("is Parquet without columns")
    return frame
