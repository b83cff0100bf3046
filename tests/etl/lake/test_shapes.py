"""Files as they come: what pandas, DuckDB, jq, a spreadsheet, a sink of Kafka and a logger write.

The rows are those that DuckDB's own reader finds in the same file; what is refused says why.
"""

import json
import warnings
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas
import polars as pl
import pytest

from etl.lake import formats, parse
from etl.lake.table import INT, RESCUED, TEXT, TIME, Column, Table, decimal

SALES = Table(
    "sales",
    {
        "id": INT,
        "price": Column(decimal(9, 2), nullable=True),
        "note": Column(TEXT, nullable=True),
        "at": Column(TIME, unit="ms"),
    },
    ("id",),
    time="at",
)
MESSAGES = Table(
    "messages",
    {
        "id": Column(INT, path="value.id"),
        "user": Column(TEXT, path="value.user.name", nullable=True),
        "offset": INT,
        "at": Column(TIME, path="timestamp", unit="ms"),
    },
    ("id",),
)
LOGS = Table(
    "logs",
    {
        "time": Column(TIME, unit="ms"),
        "level": pl.Int16,
        "msg": Column(TEXT, nullable=True),
        "url": Column(TEXT, path="req.url", nullable=True),
        "took": Column(pl.Float64, path="res.responseTime", nullable=True),
    },
    (),
    time="time",
)
WHEN = [1772366377919, 1772366378000, -1]
FRAME = pandas.DataFrame(
    {
        "id": [1, 2, 2**53 + 1],
        "price": [1.5, None, 1234.56],
        "note": ['a,b;"c"', "two\nlines", None],
        "at": pandas.to_datetime(WHEN, unit="ms", utc=True),
    }
)
NAMES = "id, price::decimal(9, 2), note, "
COUNTED = NAMES + '"at"'
TIMED = NAMES + 'epoch_ms("at"::timestamptz)'
MESSAGE = {"topic": "t", "partition": 0, "offset": 7, "timestamp": WHEN[0], "key": None}
MESSAGED = [
    MESSAGE | {"value": {"id": 1, "user": {"name": "a", "age": 3}}},
    MESSAGE | {"value": {"id": 2}, "headers": []},
]
LOGGED = [
    {"level": 30, "time": WHEN[0], "pid": 657, "hostname": "web", "msg": "hello"},
    {"level": 30, "time": WHEN[1], "pid": 657, "req": {"id": 1, "url": "/"}, "res": {"statusCode": 200}},
    {"level": 50, "time": WHEN[1], "req": {"url": "/a"}, "res": {"responseTime": 12.25}, "err": {"stack": "a\nb"}},
]


def as_json(**how) -> str:
    """As pandas before 4 writes it; 4 writes times as `iso`."""
    with warnings.catch_warnings(action="ignore"):
        return FRAME.to_json(date_format="epoch", date_unit="ms", **how)


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def copied(how: str) -> bytes:
    """What DuckDB's COPY writes."""
    FRAME.to_parquet("sales.parquet")
    select = "select * replace (price::decimal(9, 2) as price) from 'sales.parquet'"
    duckdb.connect().execute(f"set timezone = 'UTC'; copy ({select}) to 'copied' (format {how})")
    return Path("copied").read_bytes()


def spreadsheet() -> bytes:
    rows = [["id", "price", "note", "at"], *FRAME.assign(at=WHEN).astype(object).where(FRAME.notna(), None).values]
    quoted = [["" if c is None else f'"{str(c).replace(chr(34), chr(34) * 2)}"' for c in row] for row in rows]
    return "".join(";".join(row) + "\r\n" for row in quoted).encode("utf-8-sig")


JSON_LINES = "read_json('file', format = 'newline_delimited')"
ARRAY = "read_json('file', format = 'array')"
SHAPES = {  # what writes it; the bytes; the table; how DuckDB reads the file, and what it selects
    "pandas, lines": (lambda: as_json(orient="records", lines=True), SALES, JSON_LINES, COUNTED),
    "pandas, records": (lambda: as_json(orient="records"), SALES, ARRAY, COUNTED),
    "pandas, ISO": (
        lambda: FRAME.to_json(orient="records", lines=True, date_format="iso"), SALES, JSON_LINES, TIMED,
    ),
    "jq, an array": (lambda: json.dumps(json.loads(as_json(orient="records")), indent=2), SALES, ARRAY, COUNTED),
    "pandas, Parquet": (lambda: FRAME.to_parquet(), SALES, "read_parquet('file')", TIMED),
    "DuckDB, JSON": (lambda: copied("json"), SALES, JSON_LINES, TIMED),
    "DuckDB, array": (lambda: copied("json, array true"), SALES, ARRAY, TIMED),
    "DuckDB, CSV": (lambda: copied("csv"), SALES, "read_csv('file')", TIMED),
    "DuckDB, Parquet": (lambda: copied("parquet"), SALES, "read_parquet('file')", TIMED),
    "a spreadsheet": (spreadsheet, SALES, "read_csv('file', delim = ';', quote = '\"', escape = '\"')", COUNTED),
    "a sink of Kafka": (
        lambda: lines(MESSAGED), MESSAGES, JSON_LINES, "value.id, value.user.name, \"offset\", \"timestamp\"",
    ),
    "a logger": (lambda: lines(LOGGED), LOGS, JSON_LINES, "time, level, msg, req.url, res.responseTime"),
}  # fmt: skip


def read(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    rows, (refused,), (count,) = parse.parse_all([formats.opened(data, table.named)], table)
    return rows, refused, count


@pytest.mark.parametrize("what", SHAPES)
def test_the_rows_are_those_that_another_engine_reads(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    write, table, reader, select = SHAPES[what]
    data = write()
    data = data.encode() if isinstance(data, str) else data
    Path("file").write_bytes(data)
    rows, refused, count = read(data, table)
    assert (refused.rows(), rows.height) == ([], count)
    times = [name for name, dtype in table.types.items() if dtype == TIME]
    ours = rows.drop(RESCUED).with_columns(pl.col(times).dt.epoch("ms")).rows()
    assert ours == duckdb.connect().sql(f"select {select} from {reader}").fetchall()


def test_what_no_column_takes_is_kept_as_it_is_nested():
    rows, *_ = read(lines(MESSAGED), MESSAGES)
    assert json.loads(rows[RESCUED][0]) == {
        "topic": "t", "partition": 0, "key": None, "value": {"user": {"age": 3}},
    }  # fmt: skip
    rows, *_ = read(lines(LOGGED), LOGS)
    assert json.loads(rows[RESCUED][2]) == {"err": {"stack": "a\nb"}}


PRETTY = "".join(json.dumps(row, indent=2) + "\n" for row in json.loads(as_json(orient="records")))
SEVERAL = "has JSON objects over several lines each: lines of JSON, each an object, or one array of them are read"
REFUSED = {  # what; the bytes; why none of it is read
    "jq, objects": (PRETTY, SEVERAL),
    "jq, one object": (PRETTY[: PRETTY.index("}") + 1], SEVERAL),
    "pandas, split": (as_json(orient="split"), "1 of 1 lines do not fit: `id` missing 1, `at` missing 1;"),
    "pandas, columns": (as_json(), "1 of 1 lines do not fit: `id` is not a whole number 1, `price` is not an "),
    "pandas, ISO times without zone": (
        lines([{"id": 1, "at": "2026-03-01T11:59:37.919"}]),
        "1 of 1 lines do not fit: `at` is not a time with zone of the years 1 to 9999 in UTC 1;",
    ),
    "a spreadsheet with decimal commas": (
        "id;price;at\r\n1;12,50;5\r\n",
        "1 of 1 lines do not fit: `price` is not an ",
    ),
    "a spreadsheet's own file": (b"PK\x03\x04" + b"\0" * 30, "is a zip archive"),
    "a page of HTML": ("<html>\n</html>\n", "2 of 2 lines do not fit: not JSON: Expecting value 2;"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_says_why(what):
    data, why = REFUSED[what]
    data = data.encode() if isinstance(data, str) else data
    try:
        rows, refused, count = read(data, SALES)
    except formats.Unreadable as error:
        said = str(error)
    else:
        assert rows.is_empty()
        said = parse.why_whole(refused, count)
    assert said.startswith(why)


def test_a_price_is_exact():
    rows, *_ = read(as_json(orient="records", lines=True).encode(), SALES)
    assert rows["price"].to_list() == [Decimal("1.50"), None, Decimal("1234.56")]
