"""What a sample file says about a table: columns, types, a key and a time, as its rows are written.

What a sample cannot say is guessed, and said to be. All its rows fit what comes of it: a field of which the values are
of several kinds is no column, so that it is kept in `_rescued`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import polars as pl

from etl.lake.formats import DELIMITERS, Content, delimiter, elements, header, opened, records
from etl.lake.parse import DAY_TEXT, FLOAT_TEXT, TIME_TEXT, decoded, no_number, parse_all
from etl.lake.table import (
    BOOL,
    DAY,
    FLOAT,
    INT,
    RESCUED,
    TEXT,
    TIME,
    UNNAMEABLE,
    Column,
    DataType,
    Table,
    decimal,
    list_of,
    struct,
)
from etl.storage import Unreadable

WHOLE_TEXT = re.compile(r"-?(0|[1-9][0-9]*)")  # others, as 00501, are names
AMOUNT_TEXT = re.compile(r"-?(0|[1-9][0-9]*)\.([0-9]+)")
NO_ZONE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?")
DAY_FORM = r"(?:[0-9]{1,2}([./-])[0-9]{1,2}\1(?:[0-9]{2}|[0-9]{4})|[0-9]{4}([./])[0-9]{1,2}\2[0-9]{1,2})"
LOOK_LIKE = {  # what people write and no column reads -> its form
    "a decimal with a comma": re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:[. '][0-9]{3})+),[0-9]+"),
    "a number with marks between its thousands": re.compile(r"[+-]?[0-9]{1,3}(?:[,' ][0-9]{3})+(?:\.[0-9]+)?"),
    "an amount with a currency or percent": re.compile(
        r"[+-]?(?:[$€£¥] ?|[A-Z]{3} )[+-]?[0-9][0-9.,' ]*|[+-]?[0-9][0-9.,' ]*?(?: ?[$€£¥%]| [A-Z]{3})"
    ),
    "a day that is not written as 2026-11-26": re.compile(DAY_FORM),
    "a time that is not written as 2026-11-26T05:00:00Z": re.compile(rf"{DAY_FORM},?[ T][0-9]{{1,2}}:[0-9]{{2}}.*"),
}
CENTS, MOST_DECIMALS = 2, 4  # behind the point of an amount
DIGITS, SPARE_DIGITS, MOST_DIGITS = 15, 3, 38  # of an amount: at least, beyond those of the sample, at most
MOST_FIELDS = 400  # of all rows together: more are keys that are data
KEY_COLUMNS = 12  # that pairs are tried of


class NotInferable(ValueError):
    """A sample that says of no table what it is; the message says why."""


class _Unnamed(str):
    """What `formats.header` calls a column of a CSV that has no name."""


class _Written(str):
    """A JSON number that is not whole, as it is written."""


@dataclass
class _Field:
    """What is seen of one field over all rows."""

    values: list[Any] = field(default_factory=list)
    seen: int = 0  # rows in which it is anything but null


@dataclass(frozen=True)
class Inferred:
    """A table as a sample has it. `notes`: column -> what is to be said of it; `left_out`: field -> why it is none.
    `rows`, `fitting`: the sample's lines that are not blank, and those that fit; `reasons`: why others do not."""

    table: Table
    notes: Mapping[str, str]
    left_out: Mapping[str, str]
    key_is_guessed: bool
    time_is_guessed: bool
    rows: int
    fitting: int
    reasons: tuple[str, ...] = ()


def infer(
    data: bytes, name: str, *, key: tuple[str, ...] = (), time: str | None = None, files: str | None = None
) -> Inferred:
    """The table that a file's bytes are rows of. `key`, `time`: its columns, by name or path; guessed when not given.

    Raises Unreadable for what no line of can be read, NotInferable for a name, a key, a time or a glob that is none.
    """
    content = _content(data)
    if content.kind == "parquet":
        frame = content.frame
        columns, notes, left_out = _of_frame(frame)
        rows: list[dict[str, Any]] = frame.to_dicts()
    else:
        rows = list(_rows(content))
        if not rows:
            raise Unreadable("has no row that can be read")
        columns, notes, left_out = _of_rows(rows, content.kind == "csv")
    if not columns:
        raise NotInferable("the sample has no field that could be a column")
    by_path = {".".join(column.keys(column_name)): column_name for column_name, column in columns.items()}
    for given in [*key, *filter(None, [time])]:
        if given not in columns and given not in by_path:
            raise NotInferable(f"there is no column {given!r}; the sample has {', '.join(columns)}")
    asked_key = tuple(given if given in columns else by_path[given] for given in key)
    asked_time = time and (time if time in columns else by_path[time])
    times = [column for column, said in columns.items() if said.type == TIME]
    if asked_time and asked_time not in times:
        raise NotInferable(f"{asked_time!r} is no time with a zone in all rows, so it cannot be the time of the table")
    for column in asked_key:
        if columns[column].nullable or columns[column].type.is_nested():
            raise NotInferable(f"{column!r} is missing or null in a row, or a list: it cannot be in the key")
    guessed_time = times[0] if len(times) == 1 else None
    key_columns = asked_key or _key(name, columns, rows)
    try:
        table = Table(
            name,
            {column: said if said != Column(said.type) else said.type for column, said in columns.items()},
            key_columns,
            asked_time or guessed_time,
            files=files,
        )
    except ValueError as error:  # what a declaration may not have
        raise NotInferable(str(error)) from None
    _, (refused,), (lines,) = parse_all([content], table)
    reasons = tuple(f"line {line}: {reason}" for line, reason in refused.select("line", "reason").head(3).iter_rows())
    return Inferred(
        table,
        notes,
        left_out,
        not asked_key,
        not asked_time and guessed_time is not None,
        lines,
        lines - refused.height,
        reasons,
    )


def _content(data: bytes) -> Content:
    """What is in the sample; a CSV is one whose first line does not begin as JSON, whatever its header says."""
    content = opened(data, ())
    if content.kind != "lines" or content.data.lstrip()[:1] == b"{":
        return content
    line = content.data.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r")
    mark = max(DELIMITERS, key=line.count)
    return opened(data, {cell.strip('"') for cell in line.split(mark)})


def _rows(content: Content) -> Iterator[dict[str, Any]]:
    """The rows that can be read, as JSON: numbers that are not whole as they are written, cells of a CSV as texts."""
    decoder, text = json.JSONDecoder(parse_float=_Written, parse_constant=no_number), decoded(content.data)
    if content.kind == "csv":
        first = text.split("\n", 1)[0].rstrip("\r")
        cells_of_first = {cell.strip('"') for mark in DELIMITERS for cell in first.split(mark)}
        every = records(text, delimiter(content.data, cells_of_first) or ",")
        _, (cells_named, raw) = next(every)
        named, unnamed = header(cells_named, raw)
        names = [_Unnamed(name) if name in unnamed else name for name in named]
        for _, (cells, _) in every:
            if cells is not None and len(cells) == len(named):
                pairs = zip(names, cells, strict=True)
                yield {name: cell for name, cell in pairs if cell is not None or not isinstance(name, _Unnamed)}
        return
    values = (
        (value for _, (value, _) in elements(text, decoder)) if content.kind == "array" else _each_line(text, decoder)
    )
    yield from (value for value in values if isinstance(value, dict))


def _each_line(text: str, decoder: json.JSONDecoder) -> Iterator[Any]:
    for line in text.split("\n"):
        if line.strip():
            try:
                yield decoder.decode(line)
            except (ValueError, RecursionError):  # told when the whole sample is read through the declaration
                continue


Columns = tuple[dict[str, Column], dict[str, str], dict[str, str]]  # name -> column, notes, what is none


def _of_rows(rows: list[dict[str, Any]], is_csv: bool) -> Columns:
    fields: dict[tuple[str, ...], _Field] = {}
    for row in rows:
        _see(row, (), fields)
        if len(fields) > MOST_FIELDS:
            raise NotInferable(f"the rows have more than {MOST_FIELDS} fields: some keys are data, not names")
    objects = {keys[:n] for keys in fields for n in range(1, len(keys))}
    columns: dict[str, Column] = {}
    notes: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for keys, seen in fields.items():
        shown = ".".join(keys)
        if keys in objects:
            if seen.seen:
                left_out[shown] = "is an object in some rows and none in others"
            continue
        if any(keys[:n] in objects and fields[keys[:n]].seen for n in range(1, len(keys)) if keys[:n] in fields):
            continue
        values = [value for value in seen.values if value is not None]
        try:
            path = _path(keys)
            if isinstance(keys[0], _Unnamed):
                raise NotInferable("has no name in the header, as pandas' index has none")
            dtype, note = (_of_cells if is_csv else _of_values)(values)
        except NotInferable as error:
            left_out[shown] = str(error)
            continue
        name = _named(keys, columns)
        columns[name] = Column(dtype, nullable=seen.seen < len(rows), path=None if keys == (name,) else path)
        if note:
            notes[name] = note
    return columns, notes, left_out


def _see(value: dict[str, Any], above: tuple[str, ...], fields: dict[tuple[str, ...], _Field]) -> None:
    """Count the fields of an object, those of objects in it under the keys that lead there."""
    for key, inner in value.items():
        keys = (*above, key)
        if isinstance(inner, dict) and inner:
            _see(inner, keys, fields)
            continue
        seen = fields.setdefault(keys, _Field())
        seen.values.append(inner)
        seen.seen += inner is not None and inner != {}


def _named(keys: tuple[str, ...], taken: Mapping[str, Any]) -> str:
    """A column's name: the field's, with _ for what no name has, and a number where that is taken."""
    name = UNNAMEABLE.sub("_", "_".join(keys).replace(".", "_")).strip("_") or "column"
    lower, number, unique = {other.lower() for other in taken} | {RESCUED}, 2, name
    while unique.lower() in lower:
        unique, number = f"{name}_{number}", number + 1
    return unique


def _path(keys: tuple[str, ...]) -> str:
    """The `Column.path` that leads by these keys. Raises NotInferable where none does."""
    path = ".".join(key.replace(".", r"\.") for key in keys)
    if not all(keys) or Column(TEXT, path=path).keys("") != keys:
        raise NotInferable("has a key that no path names: an empty one, or one with a backslash at its end")
    return path


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "true or false"
        case int():
            return "whole numbers"
        case _Written():
            return "numbers"
        case str():
            return "texts"
        case list():
            return "lists"
        case dict():
            return "objects"
    return "null"


def _of_values(values: list[Any]) -> tuple[DataType, str]:
    """The type of JSON values, and what is to be said of it. Raises NotInferable for values of several kinds."""
    kinds = {_kind(value) for value in values} - {"null"}
    values = [value for value in values if value is not None]
    if not kinds:
        return TEXT, "guessed: only null in the sample"
    if kinds == {"whole numbers", "numbers"} or kinds == {"numbers"}:
        return _of_numbers([str(value) for value in values])
    if len(kinds) > 1:
        raise NotInferable(f"has {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "whole numbers":
        return _of_integers([str(value) for value in values])
    if kind == "lists":
        dtype, note = _of_values([item for value in values for item in value])
        return list_of(dtype), note.replace("only null", "only empty")
    if kind == "objects":
        fields: dict[str, list[Any]] = {}
        for value in values:
            for name, inner in value.items():
                fields.setdefault(name, []).append(inner)
        if not fields:
            raise NotInferable("has only empty objects")
        return struct({name: _of_values(inner)[0] for name, inner in fields.items()}), ""
    return _of_texts(values) if kind == "texts" else (BOOL, "")


def _of_cells(cells: list[str]) -> tuple[DataType, str]:
    """As `_of_values`, of the cells of a CSV, which are all texts."""
    if not cells:
        return TEXT, "guessed: empty in the sample"
    if all(WHOLE_TEXT.fullmatch(cell) for cell in cells):
        return _of_integers(cells)
    if all(re.fullmatch(FLOAT_TEXT, cell) and not re.match(r"-?0[0-9]", cell) for cell in cells):
        return _of_numbers(cells)
    if all(cell.lower() in ("true", "false") for cell in cells):
        return BOOL, ""
    return _of_texts(cells)


def _of_integers(values: list[str]) -> tuple[DataType, str]:
    if all(-(2**63) <= int(value) < 2**63 for value in values):
        return INT, ""
    digits = max(len(value.lstrip("-")) for value in values)
    if digits > MOST_DIGITS:
        raise NotInferable(f"has whole numbers of {digits} digits")
    return decimal(MOST_DIGITS, 0), "beyond 64 bits"


def _of_numbers(values: list[str]) -> tuple[DataType, str]:
    """Amounts, where they are written as such, or floats."""
    if amount := _amount(values):
        return amount, f"amounts of {amount.scale} decimals, so no float"
    return FLOAT, ""


def _amount(values: list[str]) -> pl.Decimal | None:
    """What holds numbers exactly that are all written with so many decimals, or with cents at most."""
    parts = [AMOUNT_TEXT.fullmatch(value) or WHOLE_TEXT.fullmatch(value) for value in values]
    if not all(parts):
        return None
    decimals = [len(value.partition(".")[2]) for value in values]
    most = max(decimals)
    if not (most == CENTS or (min(decimals) == most and CENTS <= most <= MOST_DECIMALS)):
        return None
    whole = max(len(value.lstrip("-").partition(".")[0]) for value in values)
    digits = max(DIGITS, whole + most + SPARE_DIGITS)
    return decimal(digits, most) if digits <= MOST_DIGITS else None


def _of_texts(values: list[str]) -> tuple[DataType, str]:
    """Days, times, amounts in quotes, or texts. Whether one is a real day is Polars's to say."""
    texts = pl.Series(values, dtype=TEXT)
    if texts.str.contains(DAY_TEXT).all() and texts.str.to_date("%Y-%m-%d", strict=False).null_count() == 0:
        return DAY, ""
    if texts.str.contains(TIME_TEXT).all() and _are_times(values):
        return TIME, ""
    if all(NO_ZONE.fullmatch(value) for value in values):
        return TEXT, "times without a zone, so texts"
    decimals = {len(value.partition(".")[2]) for value in values if AMOUNT_TEXT.fullmatch(value)} or {0}
    if len(decimals) == 1 and (amount := _amount(values)) and amount.scale:
        return amount, f"amounts of {amount.scale} decimals, so no float"
    alike = next((what for what, form in LOOK_LIKE.items() if all(map(form.fullmatch, values))), None)
    return TEXT, f"looks like {alike}: declared as text" if alike else ""


def _are_times(values: list[str]) -> bool:
    lines = "".join(json.dumps({"at": value}) + "\n" for value in values).encode()
    _, (refused,), _ = parse_all([lines], Table("sample", {"at": TIME}, ()))
    return refused.is_empty()


def _of_frame(frame: pl.DataFrame) -> Columns:
    """As `_of_rows`, of a Parquet file, which has types of its own."""
    columns: dict[str, Column] = {}
    notes: dict[str, str] = {}
    left_out: dict[str, str] = {}
    fields: list[tuple[tuple[str, ...], pl.Series]] = [((name,), frame[name]) for name in frame.columns]
    while fields:
        keys, series = fields.pop(0)
        if isinstance(series.dtype, pl.Struct):
            unnested = series.struct.unnest()
            fields[:0] = [((*keys, name), unnested[name]) for name in unnested.columns]
            continue
        try:
            path = _path(keys)
            dtype, note = _stored(series.dtype)
        except NotInferable as error:
            left_out[".".join(keys)] = str(error)
            continue
        name = _named(keys, columns)
        odd = bool(dtype == FLOAT and not series.cast(pl.Float64).is_finite().all())
        columns[name] = Column(dtype, nullable=series.null_count() > 0, path=None if keys == (name,) else path)
        notes |= {name: "has values that are no finite numbers: their rows do not fit"} if odd else {}
        notes |= {name: note} if note else {}
    return columns, notes, left_out


def _stored(dtype: Any) -> tuple[DataType, str]:
    """What holds the values of a Parquet file's column. Raises NotInferable for what nothing holds."""
    if isinstance(dtype, pl.List):
        inner, note = _stored(dtype.inner)
        return list_of(inner), note
    if isinstance(dtype, pl.Struct):
        return struct({inner.name: _stored(inner.dtype)[0] for inner in dtype.fields}), ""
    if isinstance(dtype, pl.Datetime):
        return (TIME, "") if dtype.time_zone else (TEXT, "times without a zone, so texts")
    if dtype == pl.UInt64:
        return decimal(20, 0), "unsigned, which Delta has not"
    if dtype == pl.Null:
        return TEXT, "guessed: only null in the sample"
    if isinstance(dtype, pl.Decimal):
        return decimal(dtype.precision or MOST_DIGITS, dtype.scale), ""
    if dtype.is_integer():
        return INT, ""
    if dtype.is_float():
        return FLOAT, ""
    if dtype in (pl.Boolean, pl.Date):
        return (BOOL if dtype == pl.Boolean else DAY), ""
    if dtype in (TEXT, pl.Categorical, pl.Time) or isinstance(dtype, pl.Enum):
        return TEXT, ""
    raise NotInferable(f"is {dtype}, which Delta or JSON do not have")


def _key(name: str, columns: Mapping[str, Column], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The columns that name a row: one without a value twice, an id rather than another, or else two together."""
    able = [
        column
        for column, said in columns.items()
        if not said.nullable and (said.type in (INT, TEXT, DAY, TIME) or isinstance(said.type, pl.Decimal))
    ]
    able.sort(key=lambda column: _rank(column, name, columns[column]))
    for group in [*((column,) for column in able), *combinations(able[:KEY_COLUMNS], 2)]:
        counts = Counter(tuple(_value(row, columns[column].keys(column)) for column in group) for row in rows)
        if max(counts.values()) == 1:
            return tuple(group)
    raise NotInferable("no column and no two are different in each row and never null: name the key with --key")


def _rank(column: str, table: str, said: Column) -> tuple[int, bool, bool]:
    """How unlike a key a column is: the order in which they are tried."""
    lower, single = column.lower(), table.lower().removesuffix("s")
    likely = [
        lower in ("id", "_id", "uuid", f"{single}_id", f"{single}id", f"{table.lower()}_id"),
        bool(re.search(r"(^|_)(id|uuid|guid)$", lower)),
        "id" in lower or "key" in lower or lower in ("number", "code"),
    ]
    rank = likely.index(True) if True in likely else len(likely)
    return rank, said.type in (TIME, DAY) or isinstance(said.type, pl.Decimal), said.path is not None


def _value(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = row
    for key in keys:
        value = value[key]
    return value
