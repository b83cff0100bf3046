"""Lines of JSON, and other rows, become typed rows, or a reason why they do not. Knows nothing of batches or the lake.

A plain piece (no escapes, nothing nested, just the table's keys) is read at once by Polars; any other is cut smaller,
and what is still not plain is read line by line, strictly: a wrong type, a key that comes twice, NaN, a lone surrogate
or a number that no column holds is a reason to refuse the line. Unknown fields are no reason: they are kept, as JSON,
in the column `_rescued`. Blank lines are no rows and no reason, but they count in the numbers of the others.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, Self

import numpy as np
import polars as pl

from etl.lake.formats import Content, delimiter, elements, header, opened, records
from etl.lake.table import DAY, RESCUED, TEXT, TIME, UNITS, Column, DataType, Table
from etl.storage import Unreadable

RAW_CHARS = 4000  # of a refused line that quarantine keeps
VALUE_CHARS = 80  # of a value that a reason shows
INEXACT = "is a number that its column would round"
NOT_UTF8 = "not UTF-8"  # begins a reason
ESCAPED = r"; here \xNN stands for such a byte, \\ for a backslash"  # ends it, where the line can be had back from raw
SHOWN_KINDS = 3  # of reasons why a whole file is refused
LINE_BYTES = 1 << 20  # a longer line is refused unread
PIECE_BYTES = 64 << 10  # a piece that is not plain is cut down to this before it is read line by line
OVER_LINES = "has JSON objects over several lines each: lines of JSON, each an object, or one array of them are read"
MOST_DIGITS = 38  # of a decimal
WHOLE = 0  # in place of a line's number: what is said of the whole file
REFUSED: dict[str, DataType] = {"line": pl.Int64, "reason": TEXT, "raw": TEXT, "kinds": pl.List(TEXT)}
POSITION = re.compile(r" at (character|byte) \d+$")  # of a reason, in which lines differ that are wrong in the same way
YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # those that Python, JSON and Delta's statistics can say
FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}  # in a unit; a thousand nanoseconds are one
DAY_TEXT = rf"^{YEAR}-[0-9]{{2}}-[0-9]{{2}}$"  # beside the format, which alone takes year 6, year -1996 and blanks
MIDNIGHT = r"(?:T00:00:00(?:\.0{1,9})?Z?)?$"  # behind a day, as pandas writes one
# the seconds end at 59: of a 60th Polars would make the next minute
TIME_TEXT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-][0-9]{2}(:[0-9]{2})?)$"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%.f%:z"
# the form that the standard library writes, which Polars reads in a third of the time: milliseconds, UTC
UTC_TEXT = rf"^{YEAR}-[0-9]{{2}}-[0-9]{{2}}T[0-9]{{2}}:[0-9]{{2}}:[0-5][0-9]\.[0-9]{{3}}\+00:00$"
UTC_FORMAT, UTC_CHARS = "%Y-%m-%dT%H:%M:%S.%3f", 23
COUNTED_BYTES = 1 << 18  # at once: they stay in the core's cache
KINDS: dict[DataType, str] = {
    **dict.fromkeys((pl.Int8, pl.Int16, pl.Int32, pl.Int64), "a whole number"),
    **dict.fromkeys((pl.Float32, pl.Float64), "a number"),
    pl.Boolean: "true or false",
    TEXT: "a text",
    DAY: "a date of the years 1 to 9999",
    TIME: "a time with zone of the years 1 to 9999 in UTC",
}
BOUNDS: dict[DataType, int] = {pl.Int8: 2**7, pl.Int16: 2**15, pl.Int32: 2**31, pl.Int64: 2**63}
READ_AS: dict[DataType, DataType] = {  # by Polars, which then takes nothing else; every other type is read as text
    **dict.fromkeys((pl.Int8, pl.Int16, pl.Int32), pl.Int32),
    **dict.fromkeys((pl.Float32, pl.Float64), pl.Float64),
    **{pl.Int64: pl.Int64, pl.Boolean: pl.Boolean},
}
BETWEEN = re.compile(rb"\}\s*,\s*\{")  # elements of an array
WHOLE_TEXT = r"^-?[0-9]{1,19}$"
FLOAT_TEXT = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
TRUTHS = {"true": True, "false": False}


class Unfit(ValueError):
    """Why a line does not fit. `kinds`: the same without what is the line's own, so that lines can be counted by it."""

    def __init__(self, why: str, kinds: Sequence[str]):
        super().__init__(why)
        self.kinds = list(kinds)


class _Wrong(ValueError):
    """What is wrong with a value, which is shown before it."""

    def __init__(self, value: Any, kind: str):
        super().__init__(f"{_shown(value)} {kind}")
        self.kind = kind


def why_whole(refused: pl.DataFrame, lines: int) -> str:
    """Why a file is refused whole, of whose `lines` lines these (`REFUSED`) do not fit: the kinds of reasons with how
    many lines have each, the most frequent first, and the first line's own."""
    if not lines:
        return "has no rows, only blank lines"
    if refused["line"][0] == WHOLE:
        return str(refused["reason"][0])
    kinds = refused.select(pl.col("kinds").explode()).group_by("kinds", maintain_order=True).len()
    often = kinds.sort("len", descending=True, maintain_order=True).head(SHOWN_KINDS)
    said = ", ".join(f"{kind} {count:,}" for kind, count in often.iter_rows())
    others = f", and {kinds.height - SHOWN_KINDS} others" if kinds.height > SHOWN_KINDS else ""
    first = refused.row(0, named=True)
    return f"{refused.height:,} of {lines:,} lines do not fit: {said}{others}; line {first['line']}: {first['reason']}"


def fits(raw: bytes, table: Table) -> bool:
    """Whether a line that quarantine has fits the table: of JSON, or a header and a record of CSV."""
    if b"\n" not in raw:
        return parse(raw, table)[0].height == 1
    try:
        content = opened(raw, table.named)
    except Unreadable:
        return False
    rows, _, lines = parse_all([content], table)
    return content.kind == "csv" and (rows.height, lines) == (1, [1])


def as_file(raws: Sequence[bytes], table: Table) -> bytes:
    """A file of lines that quarantine has of one file, as `fits`."""
    first = b""
    if b"\n" in raws[0]:
        _, (_, header) = next(records(raws[0].decode(), delimiter(raws[0], table.named) or ","))
        first = f"{header}\n".encode()
    return first + b"".join(raw.removeprefix(first) + b"\n" for raw in raws)


def line_count(data: bytes) -> int:
    """How many lines: a last one without its newline counts."""
    return _count(data, b"\n") + (not data.endswith(b"\n") and bool(data))


def blank_lines(data: bytes) -> int:
    """How many of the lines are blank."""
    return sum(not line.strip() for line in data.split(b"\n")[: line_count(data)])


def _count(data: bytes, byte: bytes) -> int:
    """As data.count(byte), in a quarter of its time where there are many, and other threads run meanwhile."""
    values = np.frombuffer(data, np.uint8)
    parts = (values[start : start + COUNTED_BYTES] for start in range(0, len(values), COUNTED_BYTES))
    return sum(int(np.count_nonzero(part == byte[0])) for part in parts)


def _has_null(data: bytes) -> bool:
    """As b"null" in data, in a third of its time: four bytes are a number, at each of four offsets."""
    null = np.frombuffer(b"null", np.uint32)
    for offset in range(min(4, len(data) - 3)):
        values = np.frombuffer(data, np.uint32, (len(data) - offset) // 4, offset)
        for start in range(0, len(values), COUNTED_BYTES // 4):
            if (values[start : start + COUNTED_BYTES // 4] == null).any():
                return True
    return False


def parse(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that fit (the table's columns, typed, and `_rescued`), and the lines that do not (`REFUSED`).

    Lines are counted from 1. The two together are as many as the lines that are not blank.
    """
    plain = _plain(data, table, line_count(data))
    if plain is not None:
        return plain, pl.DataFrame(schema=REFUSED)
    good = [pl.DataFrame(schema=table.parsed)]
    bad, line = [pl.DataFrame(schema=REFUSED)], 1
    for piece in _pieces(data):
        lines = line_count(piece)
        plain = _plain(piece, table, lines)
        rows, refused = (plain, bad[0]) if plain is not None else _line_by_line(piece, table, line)
        good.append(rows)
        bad.append(refused)
        line += lines
    return pl.concat(good), pl.concat(bad)


def parse_all(files: Sequence[bytes | Content], table: Table) -> tuple[pl.DataFrame, list[pl.DataFrame], list[int]]:
    """As `parse`, of several files: the rows of all in their order, each one's lines that do not fit, and how many
    lines each has that are not blank. Bytes are lines of JSON; of a `Content` the kind says what they are, and a line
    is an array's element, a CSV's record or a row. A file that cannot be read has one refused line, `WHOLE`."""
    contents = [file if isinstance(file, Content) else Content("lines", file) for file in files]
    pieces = [content.data for content in contents]
    lines = [line_count(data) for data in pieces]
    if files and all(content.kind == "lines" for content in contents):
        whole = pieces[0] if len(files) == 1 else b"".join(d if d.endswith(b"\n") else d + b"\n" for d in pieces)
        plain = _plain(whole, table, sum(lines))
        if plain is not None and plain.height == sum(lines):
            return plain, [pl.DataFrame(schema=REFUSED)] * len(files), lines
    parsed = [_parsed_file(content, table) for content in contents]
    rows = [pl.DataFrame(schema=table.parsed), *(rows for rows, _ in parsed)]
    return pl.concat(rows), [bad for _, bad in parsed], [rows.height + bad.height for rows, bad in parsed]


def _parsed_file(content: Content, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    if content.kind == "parquet":
        return _parquet(content.frame, table)
    try:
        rows, refused = {"lines": parse, "array": _array, "csv": _csv}[content.kind](content.data, table)
        if rows.is_empty() and content.kind == "lines" and _over_lines(content.data):
            raise Unreadable(OVER_LINES)
        return rows, refused
    except Unreadable as error:
        refused = pl.DataFrame([(WHOLE, str(error), "", [str(error)])], schema=REFUSED, orient="row")
        return pl.DataFrame(schema=table.parsed), refused


def _over_lines(data: bytes) -> bool:
    """Whether it begins with a JSON object that has several lines."""
    text = data[:LINE_BYTES].decode("utf-8", "replace").lstrip()
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text.startswith("{") and "\n" in text[:end]


def _array(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows and refused elements of one JSON array.

    Cut between `}` and `{` its elements are lines: if each is an object of its own, the cuts were between elements,
    for none was in a text or within another element. A newline within one becomes what no text may have, either.
    """
    body = data.strip()[1:-1] if data.rstrip().endswith(b"]") else b""
    lines = BETWEEN.sub(b"}\n{", body.replace(b"\n", b"\r"))
    plain = _plain(lines, table, line_count(lines))
    if plain is not None:
        return plain, pl.DataFrame(schema=REFUSED)
    fields = _fields(table)

    def take(element: tuple[Any, str]) -> list[Any]:
        value, text = element
        if len(text) > LINE_BYTES:
            raise ValueError(f"an element of {len(text):,} characters; at most {LINE_BYTES:,}")
        if isinstance(value, json.JSONDecodeError):
            raise ValueError(f"not JSON: {value.msg}")
        if isinstance(value, Exception):
            raise value
        return fields(value)

    return _each(elements(decoded(data), _DECODER), table, take, _on_a_line)


def _on_a_line(element: tuple[Any, str]) -> str:
    """An element without newlines: as a line it is tried again. One with a newline in a text stays as it is."""
    value, text = element
    return (text if isinstance(value, Exception) else re.sub(r"\s*\n\s*", " ", text))[:RAW_CHARS]


def decoded(data: bytes) -> str:
    """The text of a file. Raises Unreadable."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is {NOT_UTF8}: {error.reason} at byte {error.start + 1}") from None


def _csv(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows and refused records of a CSV: a column is under its name, or its path. Quarantine keeps the header too."""
    columns = {".".join(column.keys(name)): name for name, column in table.fields.items()}
    columns |= {name: name for name in table.fields}
    table = replace(table, columns={name: replace(column, path=None) for name, column in table.fields.items()})
    text = decoded(data)
    mark = delimiter(data, columns) or ","
    every = records(text, mark)
    _, (cells_named, first) = next(every)
    named, unnamed = header(cells_named, first)
    names = [columns.get(name, name) for name in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Unreadable(f"is a CSV with the column {min(twice)!r} twice")
    if lacks := [name for name, column in table.fields.items() if not column.optional and name not in names]:
        raise Unreadable(f"is a CSV without the column {lacks[0]!r}")
    plain = _plain_csv(data, names, mark, table)
    if plain is not None:
        return plain, pl.DataFrame(schema=REFUSED)
    fields = _fields(table)

    def take(record: tuple[list[str | None] | None, str]) -> list[Any]:
        cells, raw = record
        if len(raw) > LINE_BYTES:
            raise ValueError(f"a line of {len(raw):,} characters; at most {LINE_BYTES:,}")
        if cells is None:
            raise ValueError("not CSV: quotes that are not closed, or not around a whole field")
        if len(cells) != len(names):
            raise ValueError(f"not CSV: {len(cells)} fields, where the header has {len(names)}")
        return fields(
            {
                name: _cell(cell, table.fields.get(name))
                for name, cell in zip(names, cells, strict=True)
                if cell is not None or name not in unnamed
            }
        )

    return _each(every, table, take, lambda record: f"{first}\n{record[1]}"[:RAW_CHARS])


def _cell(cell: str | None, column: Column | None) -> Any:
    """A field of a CSV as JSON would have it; as it is where it does not have the form, or no column takes it."""
    if cell is None or column is None:
        return cell
    dtype = column.type
    if (dtype in BOUNDS or column.unit) and re.fullmatch(WHOLE_TEXT, cell):
        return int(cell)
    if (dtype.is_float() or _is_decimal(dtype)) and re.fullmatch(FLOAT_TEXT, cell):
        return _Number(cell)
    if dtype == pl.Boolean and cell.lower() in TRUTHS:
        return TRUTHS[cell.lower()]
    return _DECODER.decode(cell) if dtype.is_nested() else cell


def _plain_csv(data: bytes, names: list[str], mark: str, table: Table) -> pl.DataFrame | None:
    """All the rows of a CSV in which nothing is odd; None when something is, or a row does not fit.

    Without a quote every line is a record. Polars raises where one has too many fields; if all together are as many as
    they should be, then none has too few.
    """
    data = data.replace(b"\r\n", b"\n")
    rows = line_count(data) - 1
    if (
        b'"' in data
        or b"\r" in data
        or b"\n\n" in data
        or b"\0" in data
        or not table.flat
        or {*names} - {*table.fields}
    ):
        return None
    if _count(data, mark.encode()) != (len(names) - 1) * (rows + 1) or _longest_line(data) > LINE_BYTES:
        return None
    try:
        cells = pl.read_csv(
            io.BytesIO(data),
            separator=mark,
            quote_char=None,
            infer_schema=False,
            has_header=False,
            skip_rows=1,
            new_columns=names,
        )
    except pl.exceptions.PolarsError:
        return None
    if cells.height != rows or cells.width != len(names) or any(cells[c].str.strip_chars().eq("").any() for c in names):
        return None
    absent = [pl.lit(None, TEXT).alias(name) for name in table.fields if name not in names]
    cells = cells.with_columns(absent).select(*table.fields)
    read = cells.select(_cells(name, column) for name, column in table.fields.items())
    if not read.null_count().equals(cells.null_count()):
        return None
    if any(read[name].null_count() for name, column in table.fields.items() if not column.optional):
        return None
    timed = _timed(read, table)
    if timed is None:
        return None
    typed, reasons = _typed_rows(timed.with_columns(pl.lit(None, TEXT).alias(RESCUED)), table)
    return None if reasons else typed


def _cells(name: str, column: Column) -> pl.Expr:
    """As `_cell`, of a column; what does not have the form becomes null."""
    cell, dtype, read = pl.col(name), column.type, pl.Int64 if column.unit else READ_AS.get(column.type)
    if dtype == pl.Boolean:
        return cell.str.to_lowercase().replace_strict(TRUTHS, default=None, return_dtype=pl.Boolean)
    if read is None:
        return cell
    form = FLOAT_TEXT if dtype.is_float() else WHOLE_TEXT
    return pl.when(cell.str.contains(form)).then(cell).cast(read, strict=False).alias(name)


def _parquet(frame: pl.DataFrame, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows and refused rows of a Parquet file: columns by name; nothing is made another value to fit."""
    plain = _plain_parquet(frame, table)
    if plain is not None:
        return plain, pl.DataFrame(schema=REFUSED)
    frame = frame.with_columns(
        pl.col(name).dt.to_string("iso:strict")
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.Datetime)
        and dtype.time_unit == "ns"
        and not _unchanged(frame[name], pl.Datetime("us", dtype.time_zone))
    )
    fields = _fields(table)

    def values(row: dict[str, Any]) -> dict[str, Any]:
        return {name: _as_json(value, table.types.get(name)) for name, value in row.items()}

    return _each(
        enumerate(frame.iter_rows(named=True), start=1),
        table,
        lambda row: fields(values(row)),
        lambda row: json.dumps(values(row), default=str)[:RAW_CHARS],
    )


def _as_json(value: Any, dtype: Any) -> Any:
    """A value of a Parquet file as JSON would have it, for a column of the type. `_Inexact` where a float column would
    round it: it is refused as that when it is read."""
    if isinstance(value, dict):
        inner = {field.name: field.dtype for field in dtype.fields} if isinstance(dtype, pl.Struct) else {}
        return {key: _as_json(item, inner.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item, dtype.inner if isinstance(dtype, pl.List) else None) for item in value]
    if isinstance(value, float):
        if dtype in BOUNDS and value.is_integer():
            return int(value)
        return _Number(repr(value)) if _is_decimal(dtype) and math.isfinite(value) else value
    if isinstance(value, int | Decimal) and not isinstance(value, bool) and dtype is not None and dtype.is_float():
        return _as_float(value, dtype)
    if isinstance(value, Decimal):
        whole = value == value.to_integral_value() and dtype in BOUNDS
        return int(value) if whole else f"{value.normalize():f}"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value)
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


@dataclass(frozen=True)
class _Inexact:
    """An exact number that its column would round. Quarantine has it as a text, which is not taken when it is tried
    again."""

    value: int | Decimal

    def __str__(self) -> str:
        return f"{self.value:f}" if isinstance(self.value, Decimal) else str(self.value)


def _as_float(value: int | Decimal, dtype: DataType) -> float | _Inexact:
    """An exact number as the float that reads the same: equal, or written with the same digits."""
    number = float(pl.Series([float(value)]).cast(pl.Float32)[0]) if dtype == pl.Float32 else float(value)
    digits = str(np.float32(number)) if dtype == pl.Float32 else repr(number)
    same = math.isfinite(number) and (number == value or (isinstance(value, Decimal) and Decimal(digits) == value))
    return number if same else _Inexact(value)


def _plain_parquet(frame: pl.DataFrame, table: Table) -> pl.DataFrame | None:
    """All the rows, where no column is unknown and each is of a type that fits; None where a value does not."""
    if not table.flat or {*frame.columns} - {*table.fields}:
        return None
    columns = []
    for name, column in table.fields.items():
        if (name not in frame.columns or frame[name].null_count()) and not column.optional:
            return None
        series = frame[name] if name in frame.columns else pl.Series(name, [None] * frame.height, _read_as(column.type))
        if column.unit and series.dtype.is_integer():
            moments = _moments(series, column.unit)
            if moments is None:
                return None
            series = moments
        elif series.dtype != TEXT or column.type == TEXT:
            if not _alike(series.dtype, column.type) or not _unchanged(series, column.type):
                return None
            series = series.cast(column.type)
        elif column.type in READ_AS:
            return None
        columns.append(series)
    text = pl.DataFrame(columns)
    typed = text.select(
        _typed(name, dtype) if text[name].dtype == TEXT else pl.col(name) for name, dtype in table.types.items()
    ).with_columns(_sayable(name) for name, dtype in table.types.items() if dtype == TIME)
    if not typed.null_count().equals(text.null_count()):
        return None
    typed = _filled(typed, table).with_columns(pl.lit(None, TEXT).alias(RESCUED))
    years = [pl.col(name).dt.year().is_between(1, 9999).all() for name, dtype in table.types.items() if dtype == DAY]
    return typed if typed.select(pl.all_horizontal(_fits(table), *years)).item() else None


def _alike(source: DataType, dtype: DataType) -> bool:
    """Whether a type's values are of the other's kind, so that they may fit."""
    if dtype == TIME:
        return isinstance(source, pl.Datetime) and source.time_zone is not None
    return (
        source == dtype
        or (source.is_integer() and (dtype.is_integer() or _is_decimal(dtype) or dtype.is_float()))
        or (source.is_float() and dtype.is_float())
        or (_is_decimal(source) and _is_decimal(dtype))
        or source == pl.Null
    )


def _unchanged(series: pl.Series, dtype: DataType) -> bool:
    """Whether every value is the same in the type; a float may be rounded to the nearest that the type has."""
    cast = series.cast(dtype, strict=False)
    if series.dtype.is_float():
        return cast.null_count() == series.null_count()
    return bool(cast.cast(series.dtype, strict=False).eq_missing(series).all())


def _plain(data: bytes, table: Table, lines: int) -> pl.DataFrame | None:
    """All the rows of a piece of `lines` lines in which nothing is odd; None when something is, or a row does not fit.

    Polars alone would drop unknown fields, take the first of two equal keys, write down a number or a nested value as
    text and make a NUL of a lone surrogate. None of that can be in a piece that has no backslash, no text that begins
    with a bracket, and so many commas and quotes. Each of the two counts can err in one direction only, so that no
    oddity makes up for another:

    Commas outside texts, and one a row, are at least as many as keys. Each value that was read has a key of its own,
    so there are as many only if no key is unknown, comes twice or has null: each of these adds a comma and no value.
    Null is therefore given a key of its own first (`_nulls_marked`). Quotes: of as many values as there are keys, none
    that has to be a number can be in quotes, so a text that is not takes its quotes away and nothing adds any.
    """
    if not data or b"\\" in data or not table.flat:
        return None
    if len(data) > LINE_BYTES and _longest_line(data) > LINE_BYTES:
        return None
    schema = {n: pl.Int64 if column.unit else READ_AS.get(column.type, TEXT) for n, column in table.fields.items()}
    marked = _nulls_marked(data, table)
    if marked is None:
        return None
    marks, piece = marked
    try:
        text = pl.read_ndjson(io.BytesIO(piece), schema=schema | dict.fromkeys(marks.values(), TEXT))
    except pl.exceptions.PolarsError:
        return None
    rows = lines if text.height == lines else lines - blank_lines(piece)
    if text.height != rows or not _nothing_odd(text, piece, table):
        return None
    if any((text[name].is_not_null() & text[mark].is_not_null()).any() for name, mark in marks.items()):
        return None  # the key came twice, once with null
    timed = _timed(text.drop(marks.values()), table)
    typed = _all_typed(timed, table) if timed is not None else None
    if typed is None:
        return None
    typed = _filled(typed, table).with_columns(pl.lit(None, TEXT).alias(RESCUED))
    return typed if typed.select(_fits(table)).item() else None


def _nothing_odd(text: pl.DataFrame, data: bytes, table: Table) -> bool:
    """Whether the piece has the commas, the quotes and the brackets of what was read of it, and no more."""
    nulls = dict(zip(text.columns, text.null_count().row(0), strict=True))
    if any(nulls[name] for name, column in table.fields.items() if not column.optional):
        return False
    names = [name for name, dtype in table.types.items() if dtype == TEXT]  # the others are typed: no bracket
    free = pl.col(names)
    if (
        names
        and (b"[" in data or _count(data, b"{") != text.height)
        and text.select(
            pl.any_horizontal(pl.lit(False), (free.str.starts_with("[") | free.str.starts_with("{")).any())
        ).item()
    ):
        return False
    commas = pl.sum_horizontal(pl.lit(0), free.str.count_matches(",", literal=True).sum())
    inside = text.select(commas).item() or 0 if names else 0  # of no column Polars makes a row a chunk
    keys = text.height * text.width - sum(nulls.values())
    texts = sum(text.height - nulls[name] for name, dtype in text.schema.items() if dtype == TEXT)
    return bool(_count(data, b",") == keys - text.height + inside and _count(data, b'"') == 2 * (keys + texts))


def _nulls_marked(data: bytes, table: Table) -> tuple[dict[str, str], bytes] | None:
    """The piece, where `"a":null` became `"=a":""` for the columns that may be null, and name -> its new key.

    So every key has a value that is read. `"a":null` cannot be within a text, which has no quote. None when such a key
    is there already.
    """
    marks: dict[str, str] = {}
    optional = [name for name, column in table.fields.items() if column.optional]
    if not optional or not _has_null(data):
        return marks, data
    for name in optional:
        marked = data
        for colon in (":", ": "):
            marked = marked.replace(f'"{name}"{colon}null'.encode(), f'"={name}":""'.encode())
        if marked is not data and marked != data:
            if f'"={name}"'.encode() in data:
                return None
            marks[name], data = f"={name}", marked
    return marks, data


def _all_typed(text: pl.DataFrame, table: Table) -> pl.DataFrame | None:
    """As `_typed` of each column, but faster where every amount and day has its form; None where one does not fit."""
    formed = [_formed(name, dtype) for name, dtype in table.types.items() if _has_form(dtype)]
    if formed and not text.select(pl.all_horizontal(like.all() for like in formed)).item():
        return None
    given = text.schema
    typed = text.select(
        _parsed(name, dtype) if given[name] != dtype else pl.col(name) for name, dtype in table.types.items()
    )
    for name in [name for name, dtype in table.types.items() if dtype == TIME != given[name]]:
        if not typed[name].null_count():
            continue
        rest = (typed[name].is_null() & text[name].is_not_null()).arg_true()
        others = text.select(pl.col(name).gather(rest)).select(_typed(name, TIME)).select(_sayable(name))
        typed = typed.with_columns(typed[name].scatter(rest, others[name]))
    return typed if typed.null_count().equals(text.null_count()) else None


def _filled(typed: pl.DataFrame, table: Table) -> pl.DataFrame:
    """With each column's default where it has no value."""
    return typed.with_columns(
        pl.col(name).fill_null(pl.lit(pl.Series([column.default], dtype=column.type)).first())
        for name, column in table.fields.items()
        if column.default is not None
    )


def _longest_line(data: bytes) -> int:
    """The bytes of the longest line, or LINE_BYTES where there is none above."""
    longest = start = 0
    while start + LINE_BYTES < len(data):  # one jump a megabyte where no line is long
        end = data.rfind(b"\n", start, start + LINE_BYTES + 1)
        if end < start:
            end = data.find(b"\n", start)
            return (len(data) if end < 0 else end) - start
        start = end + 1
        longest = LINE_BYTES
    return longest


def _pieces(data: bytes) -> Iterator[bytes]:
    """Whole lines, together at least PIECE_BYTES where there are so many."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + PIECE_BYTES) + 1 or len(data)
        yield data[start:end]
        start = end


def _line_by_line(data: bytes, table: Table, first: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What fits and what does not, of a piece whose first line has the number `first`."""
    lines = data.split(b"\n")[: line_count(data)]
    fields = _fields(table)
    numbered = ((number, line) for number, line in enumerate(lines, start=first) if line.strip())
    return _each(numbered, table, lambda line: fields(_object(line)))


def _each(
    lines: Iterator[tuple[int, Any]],
    table: Table,
    take: Callable[[Any], list[Any]],
    shown: Callable[[Any], str] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What fits and what does not, of numbered lines. `take`: a line's values in the table's order, and its unknown
    fields as JSON, or ValueError with the reason; `shown`: what quarantine keeps of a line."""
    rows, numbers, kept, refused = [], [], [], []
    shown = shown or _as_text
    for number, line in lines:
        try:
            rows.append(take(line))
            numbers.append(number)
            kept.append(line)
        except (ValueError, RecursionError) as error:  # ValueError: also what json and the decoder raise
            why = _unfit(error)
            refused.append((number, _short(str(why), 4 * VALUE_CHARS), shown(line), why.kinds))
    types = [*((name, _read_as(dtype)) for name, dtype in table.types.items()), (RESCUED, TEXT)]
    columns = zip(*rows, strict=True) if rows else [[]] * len(types)
    text = pl.DataFrame([pl.Series(name, list(v), dtype) for (name, dtype), v in zip(types, columns, strict=True)])
    typed, reasons = _typed_rows(text, table)
    refused += [(numbers[row], str(why), shown(kept[row]), why.kinds) for row, why in reasons.items()]
    return typed, pl.DataFrame(refused, schema=REFUSED, orient="row").sort("line")


def _unfit(error: Exception) -> Unfit:
    """What a line was refused with, as a reason."""
    if isinstance(error, Unfit):
        return error
    why = "nested too deep" if isinstance(error, RecursionError) else str(error)
    return Unfit(why, [_short(POSITION.sub("", why), VALUE_CHARS)])


def _typed_rows(text: pl.DataFrame, table: Table) -> tuple[pl.DataFrame, dict[int, Unfit]]:
    """The rows that fit, of values as `_read_as` has them and `_rescued`; row number -> why, of the others."""
    given = text.schema
    typed = text.select(
        *(_typed(name, dtype) if given[name] != dtype else pl.col(name) for name, dtype in table.types.items()), RESCUED
    )
    typed = typed.with_columns(_sayable(name) for name, dtype in table.types.items() if dtype == TIME)
    whole = typed.null_count().equals(text.null_count())
    filled = _filled(typed, table)
    if whole and filled.select(_fits(table)).item():
        return filled, {}
    reasons = _misfits(typed, filled, text, table)
    return filled.with_row_index("_row").filter(~pl.col("_row").is_in(list(reasons))).drop("_row"), reasons


def _read_as(dtype: DataType) -> DataType:
    """What a value is before it has its type: texts have not been looked at yet."""
    return dtype if dtype.is_nested() else READ_AS.get(dtype, TEXT)


class _Number(float):
    """A JSON number that is not whole, with its own text: money is never made a float."""

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        if math.isinf(number):
            raise ValueError(f"{text} is out of range")
        number.text = text
        return number

    @property
    def plain(self) -> str:
        """Its text, without an exponent where that is one of numbers that a decimal may hold."""
        if "e" not in self.text.lower():
            return self.text
        try:
            exact = Decimal(self.text)
        except InvalidOperation:  # an exponent of twenty digits
            return self.text
        if abs(exact.adjusted()) >= MOST_DIGITS:
            return self.text
        plain = f"{exact:f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _object(line: bytes) -> Any:
    """A line as JSON. Raises ValueError, RecursionError."""
    if len(line) > LINE_BYTES:
        raise ValueError(f"a line of {len(line):,} bytes; at most {LINE_BYTES:,}")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{NOT_UTF8}: {error.reason} at byte {error.start + 1}{ESCAPED}") from None
    if text.startswith("\ufeff"):
        raise ValueError("not JSON: begins with a byte order mark")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.colno}") from None


def _fields(table: Table) -> Callable[[Any], list[Any]]:
    """What makes of a JSON value a row's values in the table's order, money and times as text, and its unknown fields
    as JSON.

    It raises ValueError with the reason, or RecursionError.
    """
    columns = [(name, column, column.keys(name), _reader_of(column)) for name, column in table.fields.items()]

    def take(value: Any) -> list[Any]:
        if not isinstance(value, dict):
            raise ValueError(f"not JSON: a {type(value).__name__}, not an object")
        row, wrong = [], []
        for name, column, keys, read in columns:
            try:
                row.append(_taken(value, keys, column, read))
            except ValueError as error:
                wrong.append((f"{name}: {error}", f"`{name}` {getattr(error, 'kind', error)}"))
        if wrong:
            raise Unfit("; ".join(why for why, _ in wrong), [kind for _, kind in wrong])
        row.append(json.dumps(value, allow_nan=False) if value else None)
        return row

    return take


_MISSING = object()


def _taken(value: dict[str, Any], keys: tuple[str, ...], column: Column, read: Callable[[Any], Any]) -> Any:
    """The value of a column, which is taken out of the line's; what a list or struct has of unknown fields stays."""
    inner: Any = value
    for key in keys[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    taken = inner.pop(keys[-1], _MISSING) if isinstance(inner, dict) else _MISSING
    if len(keys) > 1:
        _without_empty(value, keys[:-1])
    if taken is _MISSING or taken is None:
        if column.optional:
            return None if column.default is None or not column.type.is_nested() else column.default
        raise ValueError("missing" if taken is _MISSING else "null")
    if not column.type.is_nested():
        return read(taken)
    taken, rest = read(taken)
    if rest is not None:
        inner = value
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = rest
    return taken


def _without_empty(value: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Take the objects away that these keys lead to, as far as all in them was taken."""
    inner = value.get(keys[0])
    if isinstance(inner, dict):
        if len(keys) > 1:
            _without_empty(inner, keys[1:])
        if not inner:
            del value[keys[0]]


def _reader_of(column: Column) -> Callable[[Any], Any]:
    """As `_reader`, of a column's values."""
    unit = column.unit
    return _reader(column.type) if unit is None else lambda value: _moment(value, unit)


def _moment(value: Any, unit: str) -> str:
    """A whole number of units since 1970 as the text of that time; a text as it is."""
    if isinstance(value, str):
        return _text(value, TIME)
    if type(value) is not int:
        raise _Wrong(value, f"is not a whole number of {UNITS[unit]} since 1970, and not {KINDS[TIME]}")
    if unit == "ns" and value % 1000:
        raise _Wrong(value, "nanoseconds since 1970 are not a whole number of microseconds, which a time has")
    try:
        moment = EPOCH + timedelta(microseconds=value // 1000 if unit == "ns" else value * MICROSECONDS[unit])
    except OverflowError:
        raise _Wrong(value, f"{UNITS[unit]} since 1970 are not within the years 1 to 9999") from None
    return moment.isoformat(timespec="microseconds")


def _moments(counted: pl.Series, unit: str) -> pl.Series | None:
    """As `_moment`, of whole numbers; None where one does not fit."""
    whole = counted.cast(pl.Int64, strict=False)
    if whole.null_count() != counted.null_count():
        return None
    if unit == "ns":
        return (whole // 1000).cast(TIME) if (whole % 1000 == 0).all() else None
    first, last = ((end - EPOCH) // timedelta(microseconds=MICROSECONDS[unit]) for end in (FIRST, LAST))
    return (whole * MICROSECONDS[unit]).cast(TIME) if whole.is_between(first, last).all() else None


def _timed(read: pl.DataFrame, table: Table) -> pl.DataFrame | None:
    """With times where whole numbers count since 1970; None where one does not fit."""
    for name, column in table.fields.items():
        if column.unit:
            moments = _moments(read[name], column.unit)
            if moments is None:
                return None
            read = read.with_columns(moments.alias(name))
    return read


def _reader(dtype: DataType) -> Callable[[Any], Any]:
    """What makes of a JSON value one of a column: of its own type, or as text that is typed later, all at once.

    Of a list or struct it makes a pair: the value, and what is in it of unknown fields, None when nothing is.
    """
    if dtype.is_nested():
        return lambda value: _nested(value, dtype)
    if dtype in BOUNDS:
        bound = BOUNDS[dtype]
        return lambda value: _whole(value, bound)
    if dtype.is_float():
        return _float
    if dtype == pl.Boolean:
        return _truth
    return lambda value: _text(value, dtype)


def _whole(value: Any, bound: int) -> int:
    if type(value) is not int:
        raise _Wrong(value, "is not a whole number")
    if not -bound <= value < bound:
        raise _Wrong(value, "is out of range")
    return value


def _float(value: Any) -> float:
    if isinstance(value, _Inexact):
        raise _Wrong(value.value, INEXACT)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Wrong(value, "is not a number")
    try:
        return float(value)
    except OverflowError:
        raise _Wrong(value, "is out of range") from None


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(value, "is not true or false")
    return value


def _text(value: Any, dtype: DataType) -> str:
    """A text, or a number as its text where the column has exact numbers."""
    if _is_decimal(dtype) and isinstance(value, _Number):
        return value.plain
    if _is_decimal(dtype) and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise _Wrong(value, f"is not {_kind(dtype)}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError("a lone surrogate, which no text has")
    return value


def _nested(value: Any, dtype: Any) -> tuple[Any, Any]:
    """A value within a list or struct, and what is in it of unknown fields; a field that is missing is null."""
    if value is None:
        return None, None
    if isinstance(dtype, pl.List):
        if not isinstance(value, list):
            raise _Wrong(value, "is not a list")
        pairs = [_nested(item, dtype.inner) for item in value]
        rest = [unknown for _, unknown in pairs]
        return [item for item, _ in pairs], rest if any(unknown is not None for unknown in rest) else None
    if isinstance(dtype, pl.Struct):
        if not isinstance(value, dict):
            raise _Wrong(value, "is not an object")
        fields = {field.name: _nested(value.get(field.name), field.dtype) for field in dtype.fields}
        unknown = {key: item for key, item in value.items() if key not in fields}
        unknown |= {key: item for key, (_, item) in fields.items() if item is not None}
        return {key: item for key, (item, _) in fields.items()}, unknown or None
    return _alone(_reader(dtype)(value), dtype), None


def _alone(value: Any, dtype: DataType) -> Any:
    """A value within a list or struct in its own type, by the same rules as a column's."""
    if READ_AS.get(dtype) is None and dtype != TEXT:
        typed = pl.DataFrame({"it": [value]}).select(_typed("it", dtype))
        typed = typed.select(_sayable("it")) if dtype == TIME else typed
        if (value_typed := typed.item()) is None:
            raise _Wrong(value, f"is not {_kind(dtype)}")
        return value_typed
    if dtype == pl.Float32 and not math.isfinite(pl.Series([value]).cast(pl.Float32)[0]):
        raise _Wrong(value, "is out of range")
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members. Raises ValueError for a key that comes twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {_shown(name)} comes twice")
            seen.add(name)
    return members


def no_number(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name}")


_DECODER = json.JSONDecoder(parse_float=_Number, parse_constant=no_number, object_pairs_hook=_pairs)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else f"{value:f}" if isinstance(value, Decimal) else json.dumps(value)
    return _short(text, VALUE_CHARS)


def _short(text: str, chars: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= chars else f"{text[:chars]}…"


def _as_text(line: bytes) -> str:
    """What quarantine keeps of a line: `as_it_came` gives its bytes again."""
    kept = line[:RAW_CHARS]
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return kept.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    return kept.decode("utf-8", "replace")


def as_it_came(raw: str, reason: str) -> bytes | None:
    """The bytes of a line that quarantine has; None where it does not have all of them, as of a long one."""
    data = raw.encode()
    if reason.startswith(NOT_UTF8):
        if not reason.endswith(ESCAPED):  # until November 2026 what was no character was replaced
            return None
        data = re.sub(rb"\\(?:\\|x([0-9a-f]{2}))", lambda m: bytes.fromhex(m[1].decode()) if m[1] else b"\\", data)
    return data if len(data) < RAW_CHARS else None


def _typed(name: str, dtype: DataType) -> pl.Expr:
    """A value as it was read to `dtype`; what does not fit becomes null."""
    if dtype == TIME:
        text = pl.when(pl.col(name).str.contains(TIME_TEXT)).then(name).str.replace(" ", "T", literal=True)
        text = text.str.replace("Z$", "+00:00").str.replace(r"([+-]\d\d)$", "${1}:00")
        return _time(text, TIME_FORMAT).alias(name)
    if dtype == DAY:
        text = pl.col(name).str.replace(MIDNIGHT, "")
        return pl.when(text.str.contains(DAY_TEXT)).then(_day(text)).alias(name)
    if _has_form(dtype):
        return pl.when(_formed(name, dtype)).then(_parsed(name, dtype)).alias(name)
    return _parsed(name, dtype)


def _sayable(name: str) -> pl.Expr:
    """A time in the years 1 to 9999; null where it was moved out of them by its offset from UTC."""
    return pl.when(pl.col(name).is_between(FIRST, LAST)).then(name).alias(name)


def _formed(name: str, dtype: DataType) -> pl.Expr:
    return pl.col(name).str.contains(_form(dtype))


def _has_form(dtype: DataType) -> bool:
    return dtype == DAY or _is_decimal(dtype)


def _form(dtype: DataType) -> str:
    """What the text of a day or a decimal is like, as a regular expression."""
    if not isinstance(dtype, pl.Decimal):
        return DAY_TEXT
    whole, parts = dtype.precision - dtype.scale, dtype.scale  # more decimals are not rounded: they do not fit
    before = f"[0-9]{{1,{whole}}}" if whole else "0?"
    return rf"^-?{before}(\.[0-9]{{1,{parts}}})?$" if parts else rf"^-?{before}$"


def _is_decimal(dtype: Any) -> bool:
    return isinstance(dtype, pl.Decimal)


def _kind(dtype: DataType) -> str:
    """What a value of the type is, in words."""
    return "an amount" if _is_decimal(dtype) else KINDS[dtype]


def _parsed(name: str, dtype: DataType) -> pl.Expr:
    """A value of the right form to `dtype`, and a time in milliseconds and UTC; any other time becomes null."""
    value = pl.col(name)
    if dtype == DAY:
        return _day(value)
    if dtype == TIME:
        return _time(pl.when(value.str.contains(UTC_TEXT)).then(value.str.head(UTC_CHARS)), UTC_FORMAT).alias(name)
    return value if dtype.is_nested() or READ_AS.get(dtype, TEXT) == dtype else value.cast(dtype, strict=False)


def _day(text: pl.Expr) -> pl.Expr:
    return text.str.to_date("%Y-%m-%d", strict=False, cache=False)


def _time(text: pl.Expr, form: str) -> pl.Expr:
    return text.str.to_datetime(form, time_unit="us", time_zone="UTC", strict=False, cache=False)


def _fits(table: Table) -> pl.Expr:
    """Whether every row keeps the table's rules."""
    return pl.all_horizontal(pl.lit(True), *(kept.all() for _, kept, _ in table.rules))


def _misfits(typed: pl.DataFrame, filled: pl.DataFrame, text: pl.DataFrame, table: Table) -> dict[int, Unfit]:
    """Row number -> why it does not fit its table, for the rows that do not.

    `typed`: the rows, `filled`: with defaults where they have no value, `text`: what they were typed from.
    """
    reasons: dict[int, dict[str, list[tuple[str, str]]]] = {}  # row -> column -> what is shown of the value, and why
    for name, dtype in table.types.items():
        for row in (typed[name].is_null() & text[name].is_not_null()).arg_true():
            reasons.setdefault(row, {})[name] = [(_shown(text[name][row]), f"is not {_kind(dtype)}")]
    for name, kept, wrong in table.rules:
        for row in filled.select(pl.arg_where(~kept)).to_series():
            value = _short(str(filled[name][row]), VALUE_CHARS)
            reasons.setdefault(row, {}).setdefault(name, []).append((value, wrong))
    order = [*table.types]
    unfit = {}
    for row, columns in reasons.items():
        every = [(name, *why) for name in sorted(columns, key=order.index) for why in columns[name]]
        why = "; ".join(f"{name}: {value} {wrong}" for name, value, wrong in every)
        unfit[row] = Unfit(why, [f"`{name}` {wrong}" for name, _, wrong in every])
    return unfit


def promoted(rows: pl.DataFrame, name: str, table: Table) -> tuple[pl.DataFrame, dict[int, str]]:
    """Rows of a table with a column's value out of their `_rescued`, typed and judged as if it came in a line.

    `rows`: `_rescued`, in which each has the column's field, and the columns that the column's rules look at. Returns
    them, and row number -> why, of those whose value does not fit: they are as they were.
    """
    column, reasons = table.fields[name], dict[int, str]()
    keys, read = column.keys(name), _reader_of(column)
    values: list[Any] = []
    rest: list[str | None] = []
    for row, text in enumerate(rows[RESCUED]):
        unknown = _DECODER.decode(text)
        try:
            values.append(_taken(unknown, keys, column, read))
            rest.append(json.dumps(unknown, allow_nan=False) if unknown else None)
        except (ValueError, RecursionError) as error:
            values.append(None)
            rest.append(text)
            reasons[row] = f"{name}: {_short(str(error), 4 * VALUE_CHARS)}"
    read_as = pl.DataFrame([pl.Series(name, values, _read_as(column.type))])
    typed = read_as.select(_typed(name, column.type))
    typed = typed.select(_sayable(name)) if column.type == TIME else typed
    for row in (typed[name].is_null() & read_as[name].is_not_null()).arg_true():
        reasons.setdefault(row, f"{name}: {_shown(read_as[name][row])} is not {_kind(column.type)}")
    typed = _filled(typed, replace(table, columns={name: column}, key=(), time=None))
    made = rows.with_columns(typed[name], pl.Series(RESCUED, rest, TEXT))
    for about, kept, wrong in table.rules:
        if name in kept.meta.root_names():
            for row in made.select(pl.arg_where(~kept)).to_series():
                reasons.setdefault(row, f"{about}: {_short(str(made[about][row]), VALUE_CHARS)} {wrong}")
    stays = pl.Series(range(rows.height), dtype=pl.Int64).is_in(list(reasons))
    had = rows[name] if name in rows.columns else pl.Series(name, [None] * rows.height, column.type)
    return made.with_columns(
        pl.when(stays).then(had.cast(column.type)).otherwise(pl.col(name)).alias(name),
        pl.when(stays).then(rows[RESCUED]).otherwise(pl.col(RESCUED)).alias(RESCUED),
    ), reasons


def has_field(rescued: str, keys: tuple[str, ...]) -> bool:
    """Whether `_rescued` of a row has what these keys lead to."""
    inner: Any = _DECODER.decode(rescued)
    for key in keys:
        if not isinstance(inner, dict) or key not in inner:
            return False
        inner = inner[key]
    return True
