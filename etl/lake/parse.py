"""Lines of JSON become typed rows, or a reason why they do not. Knows nothing of files, batches or the lake.

A plain piece (no escapes, nothing nested, just the table's keys) is read at once by Polars; any other is cut smaller,
and what is still not plain is read line by line, strictly: a wrong type, a key that comes twice, NaN, a lone surrogate
or a number that no column holds is a reason to refuse the line. Unknown fields are no reason: they are kept, as JSON,
in the column `_rescued`. Blank lines are no rows and no reason, but they count in the numbers of the others.
"""

import io
import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NoReturn, Self

import numpy as np
import polars as pl

from etl.lake.table import DAY, INT, INT32, RESCUED, TEXT, TIME, DataType, Table

RAW_CHARS = 4000  # of a refused line that quarantine keeps
VALUE_CHARS = 80  # of a value that a reason shows
NOT_UTF8 = "not UTF-8"  # begins a reason: what quarantine keeps of the line is not what it was
SHOWN_REASONS = 3  # why a whole file is refused
LINE_BYTES = 1 << 20  # a longer line is refused unread
PIECE_BYTES = 64 << 10  # a piece that is not plain is cut down to this before it is read line by line
REFUSED: dict[str, DataType] = {"line": INT, "reason": TEXT, "raw": TEXT}
NOT_JSON_LINES = {
    b"\x1f\x8b": "is compressed with gzip: JSON lines are wanted as they are",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: JSON lines are wanted as they are",
    b"BZh": "is compressed with bzip2: JSON lines are wanted as they are",
    b"PK\x03\x04": "is a zip archive: JSON lines are wanted as they are",
    b"PAR1": "is Parquet, not JSON lines",
    b"\xff\xfe": "is UTF-16, not UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8",
    b"{\x00": "is UTF-16, not UTF-8",
    b"\x00{": "is UTF-16, not UTF-8",
}
YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # those that Python, JSON and Delta's statistics can say
FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
DAY_TEXT = rf"^{YEAR}-[0-9]{{2}}-[0-9]{{2}}$"  # beside the format, which alone takes year 6, year -1996 and blanks
# the seconds end at 59: of a 60th Polars would make the next minute
TIME_TEXT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%.f%:z"
# the form that the standard library writes, which Polars reads in a third of the time: milliseconds, UTC
UTC_TEXT = rf"^{YEAR}-[0-9]{{2}}-[0-9]{{2}}T[0-9]{{2}}:[0-9]{{2}}:[0-5][0-9]\.[0-9]{{3}}\+00:00$"
UTC_FORMAT, UTC_CHARS = "%Y-%m-%dT%H:%M:%S.%3f", 23
COUNTED_BYTES = 1 << 18  # at once: they stay in the core's cache
KINDS: dict[DataType, str] = {
    INT: "a whole number",
    INT32: "a whole number",
    TEXT: "a text",
    DAY: "a date of the years 1 to 9999",
    TIME: "a time with zone of the years 1 to 9999 in UTC",
}
BOUNDS: dict[DataType, int] = {INT: 2**63, INT32: 2**31}


def refusal(data: bytes) -> str | None:
    """Why a whole file is refused by what is in it; None when its lines are to be looked at."""
    if not data:
        return "is empty"
    if data.lstrip().startswith(b"[") and data.rstrip().endswith(b"]"):
        return "is one JSON array: a JSON object a line is wanted"
    return next((why for beginning, why in NOT_JSON_LINES.items() if data.startswith(beginning)), None)


def no_line_fits(refused: pl.DataFrame) -> str:
    """Why a file of which every line is refused (`REFUSED`) is refused whole: its most frequent reasons, in words."""
    if refused.is_empty():
        return "has only blank lines"
    reasons = refused.group_by("reason", maintain_order=True).agg(pl.first("line"), pl.len())
    often = reasons.sort("len", descending=True, maintain_order=True).head(SHOWN_REASONS)
    said = [f"{why} (line {line}{f' and {n - 1:,} more' * (n > 1)})" for why, line, n in often.iter_rows()]
    return f"has no line that fits: {'; '.join(said)}{'; ...' * (reasons.height > often.height)}"


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


def parse(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that fit (the table's columns, typed, and `_rescued`), and the lines that do not (`REFUSED`).

    Lines are counted from 1. The two together are as many as the lines that are not blank.
    """
    plain = _plain(data, table, line_count(data))
    if plain is not None:
        return plain, pl.DataFrame(schema=REFUSED)
    good = [pl.DataFrame(schema=table.stored)]
    bad, line = [pl.DataFrame(schema=REFUSED)], 1
    for piece in _pieces(data):
        lines = line_count(piece)
        plain = _plain(piece, table, lines)
        rows, refused = (plain, bad[0]) if plain is not None else _line_by_line(piece, table, line)
        good.append(rows)
        bad.append(refused)
        line += lines
    return pl.concat(good), pl.concat(bad)


def parse_all(files: list[bytes], table: Table) -> tuple[pl.DataFrame, list[pl.DataFrame], list[int]]:
    """As `parse`, of several files: the rows of all in their order, each one's lines that do not fit, and how many
    lines each has that are not blank."""
    lines = [line_count(data) for data in files]
    if files:
        whole = files[0] if len(files) == 1 else b"".join(d if d.endswith(b"\n") else d + b"\n" for d in files)
        plain = _plain(whole, table, sum(lines))
        if plain is not None and plain.height == sum(lines):
            return plain, [pl.DataFrame(schema=REFUSED)] * len(files), lines
    parsed = [parse(data, table) for data in files]
    rows = [pl.DataFrame(schema=table.stored), *(rows for rows, _ in parsed)]
    return pl.concat(rows), [bad for _, bad in parsed], [rows.height + bad.height for rows, bad in parsed]


def _plain(data: bytes, table: Table, lines: int) -> pl.DataFrame | None:
    """All the rows of a piece of `lines` lines in which nothing is odd; None when something is, or a row does not fit.

    Polars alone would drop unknown fields, take the first of two equal keys, write down a number or a nested value as
    text and make a NUL of a lone surrogate. None of that can be in a piece that has no backslash, no text that begins
    with a bracket, and so many commas and quotes. Each of the two counts can err in one direction only, so that no
    oddity makes up for another: every key of the table is there with a value, so one that is unknown or comes twice
    adds a comma and nothing takes one away; and of as many values as there are keys, none that has to be a number can
    be in quotes, so a text that is not takes its quotes away and nothing adds any.
    """
    if not data or b"\\" in data:
        return None
    if len(data) > LINE_BYTES and _longest_line(data) > LINE_BYTES:
        return None
    schema = {name: dtype if dtype in BOUNDS else TEXT for name, dtype in table.columns.items()}
    try:
        text = pl.read_ndjson(io.BytesIO(data), schema=schema)
    except pl.exceptions.PolarsError:
        return None
    rows = lines if text.height == lines else lines - blank_lines(data)
    names = [name for name, dtype in schema.items() if dtype == TEXT]
    free = pl.col([name for name in names if table.columns[name] == TEXT])  # the others are typed: no bracket passes
    if b"[" in data or _count(data, b"{") != rows:
        nested = pl.any_horizontal((free.str.starts_with("[") | free.str.starts_with("{")).any())
        if text.select(nested).item():
            return None
    inside = text.select(pl.sum_horizontal(free.str.count_matches(",", literal=True).sum())).item() or 0
    commas = (len(schema) - 1) * rows + inside
    quotes = 2 * (len(schema) + len(names)) * rows  # around each key and each text
    if text.height != rows or _count(data, b",") != commas or _count(data, b'"') != quotes:
        return None
    typed = _all_typed(text, table)
    if typed is None:
        return None
    return typed.with_columns(pl.lit(None, TEXT).alias(RESCUED)) if typed.select(_fits(table)).item() else None


def _all_typed(text: pl.DataFrame, table: Table) -> pl.DataFrame | None:
    """As `_typed` of each column, but faster where every amount and day has its form; None where one has not."""
    formed = [_formed(name, dtype) for name, dtype in table.columns.items() if _has_form(dtype)]
    if formed and not text.select(pl.all_horizontal(like.all() for like in formed)).item():
        return None
    typed = text.select(_parsed(name, dtype) for name, dtype in table.columns.items())
    for name in [name for name, dtype in table.columns.items() if dtype == TIME and typed[name].null_count()]:
        rest = typed[name].is_null().arg_true()
        others = text.select(pl.col(name).gather(rest)).select(_typed(name, TIME)).select(_sayable(name))
        typed = typed.with_columns(typed[name].scatter(rest, others[name]))
    return typed


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
    rows, numbers, refused = [], [], []
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, table))
            numbers.append(number)
        except (ValueError, RecursionError) as error:  # ValueError: also what json and the decoder raise
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            refused.append((number, _short(reason, 4 * VALUE_CHARS), _as_text(line)))
    schema = {name: dtype if dtype in BOUNDS else TEXT for name, dtype in table.columns.items()} | {RESCUED: TEXT}
    text = pl.DataFrame(rows, schema=schema, orient="row")
    typed = text.select(*(_typed(name, dtype) for name, dtype in table.columns.items()), RESCUED)
    typed = typed.with_columns(_sayable(name) for name, dtype in table.columns.items() if dtype == TIME)
    reasons = {} if typed.select(_fits(table)).item() else _misfits(typed.drop(RESCUED), text, table)
    refused += [(numbers[row], why, _as_text(lines[numbers[row] - first])) for row, why in reasons.items()]
    fits = typed.with_row_index("_row").filter(~pl.col("_row").is_in(list(reasons))).drop("_row")
    return fits, pl.DataFrame(refused, schema=REFUSED, orient="row").sort("line")


class _Number(float):
    """A JSON number that is not whole, with its own text: money is never made a float."""

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        if math.isinf(number):
            raise ValueError(f"{text} is out of range")
        number.text = text
        return number


def _row(line: bytes, table: Table) -> list[Any]:
    """The values of a line in the table's order, money and times as text, and its unknown fields as JSON.

    Raises ValueError with the reason, or RecursionError.
    """
    if len(line) > LINE_BYTES:
        raise ValueError(f"a line of {len(line):,} bytes; at most {LINE_BYTES:,}")
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError("not JSON: begins with a byte order mark")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{NOT_UTF8}: {error.reason} at byte {error.start + 1}") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not JSON: a {type(value).__name__}, not an object")
    row, wrong = [], []
    for name, dtype in table.columns.items():
        try:
            row.append(_value(value.pop(name, _MISSING), dtype))
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return [*row, json.dumps(value, allow_nan=False) if value else None]


_MISSING = object()


def _value(value: Any, dtype: DataType) -> int | str:
    """A JSON value as its column takes it: numbers as they are, everything else as text that is typed later."""
    if value is _MISSING:
        raise ValueError("missing")
    if value is None:
        raise ValueError("null")
    if dtype in BOUNDS:
        if type(value) is not int:
            raise ValueError(f"{_shown(value)} is not a whole number")
        if not -BOUNDS[dtype] <= value < BOUNDS[dtype]:
            raise ValueError(f"{_shown(value)} is out of range")
        return value
    if _is_decimal(dtype) and isinstance(value, _Number):
        return value.text
    if _is_decimal(dtype) and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not {_kind(dtype)}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("a lone surrogate, which no text has")
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


def _constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name}")


_DECODER = json.JSONDecoder(parse_float=_Number, parse_constant=_constant, object_pairs_hook=_pairs)


def _shown(value: Any) -> str:
    return _short(repr(value) if isinstance(value, str) else json.dumps(value), VALUE_CHARS)


def _short(text: str, chars: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= chars else f"{text[:chars]}…"


def _as_text(line: bytes) -> str:
    return line[:RAW_CHARS].decode("utf-8", "replace")


def _typed(name: str, dtype: DataType) -> pl.Expr:
    """Text to `dtype`; what does not fit becomes null."""
    if dtype == TIME:
        text = pl.when(pl.col(name).str.contains(TIME_TEXT)).then(name)
        return _time(text.str.replace("Z$", "+00:00"), TIME_FORMAT).alias(name)
    if _has_form(dtype):
        return pl.when(_formed(name, dtype)).then(_parsed(name, dtype)).alias(name)
    return pl.col(name)


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


def _is_decimal(dtype: DataType) -> bool:
    return isinstance(dtype, pl.Decimal)


def _kind(dtype: DataType) -> str:
    """What a value of the type is, in words."""
    return "an amount" if _is_decimal(dtype) else KINDS.get(dtype, "a text")


def _parsed(name: str, dtype: DataType) -> pl.Expr:
    """Text of the right form to `dtype`, and a time in milliseconds and UTC; any other time becomes null."""
    text = pl.col(name)
    if dtype == DAY:
        return text.str.to_date("%Y-%m-%d", strict=False, cache=False)
    if dtype == TIME:
        return _time(pl.when(text.str.contains(UTC_TEXT)).then(text.str.head(UTC_CHARS)), UTC_FORMAT).alias(name)
    return text.cast(dtype, strict=False) if _is_decimal(dtype) else text


def _time(text: pl.Expr, form: str) -> pl.Expr:
    return text.str.to_datetime(form, time_unit="us", time_zone="UTC", strict=False, cache=False)


def _rules(table: Table) -> Iterator[tuple[str, pl.Expr, str]]:
    """The rules of a row: (column, whether the row keeps it, what a value has to be). Null keeps all but the first."""
    for name, dtype in table.columns.items():
        column, (lowest, highest) = pl.col(name), table.ranges.get(name, (None, None))
        yield name, column.is_not_null(), _kind(dtype)
        if lowest is not None:
            yield name, column >= lowest, f"at least {lowest}"
        if highest is not None:
            yield name, column <= highest, f"at most {highest}"
        if choices := table.choices.get(name):
            yield name, column.is_in(choices), f"one of {', '.join(choices)}"


def _fits(table: Table) -> pl.Expr:
    """Whether every row keeps the table's rules."""
    return pl.all_horizontal(kept.all() for _, kept, _ in _rules(table))


def _misfits(frame: pl.DataFrame, text: pl.DataFrame, table: Table) -> dict[int, str]:
    """Row number -> why it does not fit its table, for the rows that do not; `text`: what they were typed from."""
    reasons: dict[int, list[str]] = {}
    for name, kept, wanted in _rules(table):
        for row in frame.select(pl.arg_where(~kept)).to_series():
            typed = frame[name][row]
            value = _shown(text[name][row]) if typed is None else _short(str(typed), VALUE_CHARS)
            reasons.setdefault(row, []).append(f"{name}: {value} is not {wanted}")
    return {row: "; ".join(why) for row, why in reasons.items()}
