"""Files of CSV and Parquet with odd values: what is read of a file at once is what is read of it row by row."""

import contextlib
import io
import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from unittest import mock

import polars as pl
from faults.lake_tables import TABLES_OF_ALL_KINDS
from faults.lake_world import NotHeld

from etl.lake import formats, parse
from etl.lake.table import Column, Table, decimal
from etl.storage import Unreadable

CELLS = {  # of a CSV, for a column of the type; the first of each fits everywhere
    "Int64": ["1", "0", "-5", "1.0", "007", "+1", " 1", "", "9223372036854775808", "1e2", "true", '"1"'],
    "Int16": ["1", "-32768", "32768", ""],
    "Int8": ["1", "127", "128", "-129"],
    "Float64": ["1.5", "1", "-0", "-0.0", "1e-400", "1e999", "NaN", "inf", "1.", ".5", "1e5", "9" * 30, "1,5", ""],
    "Float32": ["0.1", "1e39", "16777217", "", "3"],
    "Boolean": ["true", "FALSE", "1", "yes", "", " true"],
    "String": ["click", "view", "", '""', "a b", "[x", "{", "\u00fc", "null", '"a,b"', '"a\nb"', '"q""', " "],
    "Date": ["2026-03-01", "1996-02-30", "2026-03-01T00:00:00", "0000-01-01", "", "01.03.2026"],
    "Datetime": ["2026-03-01T11:59:37.919Z", "2026-03-01 11:59:37+00", "2026-03-01 11:59:37", "1772366377919", ""],
    "Decimal": ["1.50", "1.5", "2", "1.505", "-1", "1e2", "", "1,50", "00001.5"],
    "Epoch": ["0", "-1000", "1772366377000", "1772366377919001", "9223372036854775808", "9" * 20, "1.0", ""]
    + ["2026-03-01T11:59:37.919Z", "253402300799", "253402300800", "-62135596800", "-62135596801", "+5", "007"],
}
MOMENT = datetime(2026, 3, 1, 11, 59, 37, 919123, tzinfo=UTC)
VALUES = [  # of a column of Parquet: its type, and what is in it
    (
        pl.Int64,
        [0, 1000, -1, 127, 128, 2**31, 253402300799, 253402300800, 1772366377919, 2**53, 2**53 + 1, 2**62, 2**63 - 1],
    ),
    (pl.UInt64, [0, 1, 2**24 + 1, 2**63, 2**64 - 1]),
    (pl.Int8, [0, 1, -128]),
    (pl.Float64, [0.0, -0.0, 1.0, 1.5, 0.1, 1e300, 1e-400, float("nan"), float("inf"), 2.0**53, 1e18]),
    (pl.Float32, [0.0, 1.0, 0.1, 3e38, float("nan")]),
    (decimal(9, 2), [Decimal("1.50"), Decimal("0.10"), Decimal("-1.00"), Decimal("0.00")]),
    (decimal(38, 10), [Decimal("1.5"), Decimal("0.1"), Decimal("9007199254740993"), Decimal("0.1234567891")]),
    (decimal(38, 0), [Decimal(1), Decimal(2**53 + 1), Decimal(10**30), Decimal(10**37 + 1)]),
    (pl.Boolean, [True, False]),
    (pl.String, ["click", "view", "", "1", "1.5", "true", "2026-03-01", "2026-03-01T11:59:37.919Z", "a\0b", "\u00fc"]),
    (pl.Date, [date(2026, 3, 1), date(1, 1, 1), date(9999, 12, 31)]),
    (pl.Datetime("us", "UTC"), [MOMENT, datetime(1, 1, 1, tzinfo=UTC)]),
    (pl.Datetime("ms", "Europe/Berlin"), [MOMENT.replace(microsecond=919000)]),
    (pl.Datetime("ns", "UTC"), [MOMENT]),
    (pl.Datetime("us"), [MOMENT.replace(tzinfo=None), datetime(2026, 3, 1)]),
    (pl.Time, [time(11, 59)]),
    (pl.Binary, [b"a", b"\xff"]),
    (pl.Null, [None]),
]
FITTING = {  # the number in VALUES of a type that fits, by the type of the column
    "Int64": 0, "Int16": 2, "Int8": 2, "Float64": 3, "Float32": 4, "Boolean": 8, "String": 9, "Date": 10,
    "Datetime": 11, "Decimal": 5, "Epoch": 0,
}  # fmt: skip


def _kind(column: Column) -> str:
    return "Epoch" if column.unit else str(column.type.base_type())


def csv_of(table: Table, pick: random.Random) -> bytes:
    """A few records, most of them odd."""
    names, odd = [*table.fields], pick.choice([0.0, 0.0, 0.05, 0.3])
    for name in [name for name, column in table.fields.items() if column.optional]:
        if pick.random() < 0.2:
            names.remove(name)
    if pick.random() < odd:
        names.append(pick.choice(["x", names[0]]))
    mark, end = pick.choice(",,;\t"), pick.choice(["\n", "\n", "\r\n"])
    lines = [mark.join(names)]
    for _ in range(pick.randint(1, 4)):
        cells = []
        for name in names:
            kinds = CELLS[_kind(table.fields.get(name, Column(pl.String)))]
            cells.append(pick.choice(kinds) if pick.random() < odd else kinds[0])
        if pick.random() < odd / 4:
            cells = pick.choice([[*cells, "x"], cells[:-1], [""], [cells[0] + '"', *cells[1:]]])
        lines.append(mark.join(cells))
    return (end.join(lines) + pick.choice([end, end, "", end + end])).encode()


def parquet_of(table: Table, pick: random.Random) -> bytes:
    """A few rows in columns of types that may fit."""
    rows, odd, columns = pick.randint(1, 4), pick.choice([0.0, 0.1, 0.4]), {}
    for name, column in table.fields.items():
        if column.optional and pick.random() < 0.2:
            continue
        fitting = VALUES[FITTING[_kind(column)]]
        dtype, values = pick.choice(VALUES) if pick.random() < odd else fitting
        some = [pick.choice(values if pick.random() < max(odd, 0.2) else values[:2]) for _ in range(rows)]
        some = [None if pick.random() < odd / 4 else value for value in some]
        columns[name] = pl.Series(some, dtype=dtype)
    if not columns or pick.random() < odd / 4:
        columns["x"] = pl.Series([1] * rows)
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def row_by_row() -> Iterator[None]:
    """Nothing is read at once."""
    with mock.patch.multiple(parse, _plain_csv=lambda *_: None, _plain_parquet=lambda *_: None):
        yield


def same_both_ways(table: Table, data: bytes) -> int:
    """How many rows of the file are read at once; 0 where only row by row. Raises NotHeld where they differ."""
    try:
        content = formats.opened(data, table.named)
    except Unreadable:
        return 0
    if content.kind == "parquet":
        plain = parse._plain_parquet(content.frame, table)
        at_once = plain.height if plain is not None else 0
    else:
        with mock.patch.object(parse, "_each", side_effect=_NotAtOnce):
            try:
                at_once = parse.parse_all([content], table)[2][0]
            except _NotAtOnce:
                at_once = 0
    ways = [parse.parse_all([content], table)]
    with row_by_row():
        ways.append(parse.parse_all([content], table))
    (rows, (bad,), lines), (slow, (slow_bad,), slow_lines) = ways
    if str(rows.rows()) != str(slow.rows()) or not bad.equals(slow_bad) or lines != slow_lines:
        shown = content.frame.to_dict(as_series=False) if content.kind == "parquet" else data
        raise NotHeld(f"{shown!r} is {rows.rows()} {bad.rows()} at once, {slow.rows()} {slow_bad.rows()} row by row")
    return at_once


class _NotAtOnce(Exception):
    """It would be read row by row."""


def any_file(n: int, seed: int) -> str:
    """n files of CSV and as many of Parquet, of tables with columns of all kinds."""
    pick, at_once = random.Random(seed), {"CSV": 0, "Parquet": 0}
    for number in range(n):
        table = TABLES_OF_ALL_KINDS[number % len(TABLES_OF_ALL_KINDS)]
        at_once["CSV"] += same_both_ways(table, csv_of(table, pick))
        at_once["Parquet"] += same_both_ways(table, parquet_of(table, pick))
    if not all(at_once.values()):
        raise NotHeld(f"read at once: {at_once}")
    rows = f"{at_once['CSV']} rows of CSV, {at_once['Parquet']} of Parquet"
    return f"{n} files each, the same both ways; read at once: {rows}"
