"""Files as they come, all in one landing folder: of pandas, DuckDB, Spark, jq, a spreadsheet, a sink, a logger.

The rows are those that DuckDB's own reader finds in the same file, or that stand beside it here; what is refused says
why, and what is no table's is named.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import socket
import tarfile
import warnings
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.lake import Lake, ledger, parse
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


def as_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


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
    "DuckDB, JSON in zstd": (
        lambda: copied("json, compression zstd"), SALES, JSON_LINES.replace(")", ", compression = 'zstd')"), TIMED,
    ),
    "DuckDB, CSV in gzip.csv": (
        lambda: copied("csv, compression gzip"), SALES, "read_csv('file', compression = 'gzip')", TIMED,
    ),
    "DuckDB, Parquet in zstd": (lambda: copied("parquet, compression zstd"), SALES, "read_parquet('file')", TIMED),
    "DuckDB, Parquet": (lambda: copied("parquet"), SALES, "read_parquet('file')", TIMED),
    "a spreadsheet": (spreadsheet, SALES, "read_csv('file', delim = ';', quote = '\"', escape = '\"')", COUNTED),
    "a sink of Kafka": (
        lambda: lines(MESSAGED), MESSAGES, JSON_LINES, "value.id, value.user.name, \"offset\", \"timestamp\"",
    ),
    "a logger": (lambda: lines(LOGGED), LOGS, JSON_LINES, "time, level, msg, req.url, res.responseTime"),
}  # fmt: skip


PRETTY = "".join(json.dumps(row, indent=2) + "\n" for row in json.loads(as_json(orient="records")))
SEVERAL = "has JSON objects over several lines each: lines of JSON, each an object, or one array of them are read"


def line(number: int, **more) -> str:
    return json.dumps({"id": number, "at": number} | more) + "\n"


def row(number: int, price: str | None = None, note: str | None = None) -> tuple:
    return number, price and Decimal(price), note, number


def arrow_ipc() -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame({"id": [1], "at": [1]}).write_ipc(buffer)
    return buffer.getvalue()


def archived(kind: str) -> bytes:
    """A member `sales.json` in a zip archive or a tar."""
    buffer, data = io.BytesIO(), line(1).encode()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("sales.json", data)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as archive:
            member = tarfile.TarInfo("sales.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def polars_lines() -> str:
    return pl.DataFrame({"id": [20, 21], "price": [Decimal("1.50"), None], "at": [20, 21]}).write_ndjson()


def spark_part(numbers: list[int]) -> bytes:
    """As Spark writes one: snappy, times in microseconds, decimals of a fixed width."""
    prices, times = [Decimal("2.50") for _ in numbers], [number * 1000 for number in numbers]
    rows = {"id": numbers, "price": prices, "note": [None for _ in numbers], "at": times}
    types = {"id": pa.int64(), "price": pa.decimal128(9, 2), "note": pa.string(), "at": pa.timestamp("us", "UTC")}
    buffer = io.BytesIO()
    table = pa.table(rows, pa.schema(types))
    pq.write_table(table, buffer, compression="snappy", store_decimal_as_integer=False, use_dictionary=True)
    return buffer.getvalue()


# path below sales/ -> its bytes, and the rows that are in it (id, price, note, at in milliseconds)
TAKEN = {
    "pandas with index.csv": (",id,price,note,at\n0,30,1.5,x,30\n1,31,,,31\n", [row(30, "1.50", "x"), row(31)]),
    "columns that are empty.csv": ("id;at;;\r\n32;32;;\r\n", [row(32)]),
    "polars.ndjson": (polars_lines(), [row(20, "1.50"), row(21)]),
    "part-00000-c1b7-c000.snappy.parquet": (spark_part([22, 23]), [row(22, "2.50"), row(23, "2.50")]),
    "tabs.TSV": ("id\tat\tnote\n24\t24\ta,b\n", [row(24, note="a,b")]),
    "BOM.json": ("\ufeff" + line(1) + line(2), [row(1), row(2)]),
    "BOM and an array.json": ("\ufeff[" + line(3) + "]\n\n", [row(3)]),
    "CRLF.json": (line(4).replace("\n", "\r\n") + "\r\n" + line(5).replace("\n", "\r\n"), [row(4), row(5)]),
    "no newline at the end.json": (line(6) + line(7).strip(), [row(6), row(7)]),
    "blank lines.json": ("\n\n" + line(8) + " \t\n" + line(9) + "\n\n", [row(8), row(9)]),
    "two members.json.gz": (gzip.compress(line(10).encode()) + gzip.compress(line(11).encode()), [row(10), row(11)]),
    "gzip that is called.json": (gzip.compress(line(12).encode()), [row(12)]),
    "plain that is called.json.gz": (line(13), [row(13)]),
    "gzip with a BOM.csv.gz": (gzip.compress("\ufeffid,at\n14,14\n".encode()), [row(14)]),
    "zstd.json.zst": (pa.Codec("zstd").compress(line(15).encode(), asbytes=True), [row(15)]),
    "escapes.json": (
        '{"\\u0069d":16,"at":16,"note":"\\ud83d\\ude00 \\u00e9\\u0000"}\n',
        [row(16, note="\U0001f600 é\0")],
    ),
    "floats.json": (
        line(17, price=1) + '{"id":18,"at":18,"price":1.5E1,"x":1e21}\n',
        [row(17, "1.00"), row(18, "15.00")],
    ),
    "fields that are new.json": (line(19, a={"b": [1, {"c": None}]}, d=[[1], []]), [row(19)]),
    "date=2026-11-26/hour=05/part.json": (line(40), [row(40)]),
    "-rf *.json": (line(41), [row(41)]),
    "n" * 255: (line(42), [row(42)]),
    os.fsdecode(b"latin \xe9.json"): (line(43), [row(43)]),
    "a#b%20c?d&e=f.JSON": (line(44), [row(44)]),
    "quoted, with newlines.csv": ('id;note;at\r\n45;"a\r\nb;""c""";45\r\n', [row(45, note='a\r\nb;"c"')]),
    # of these some lines are refused: their numbers and reasons come after the rows
    "numbers that are none.json": (
        line(50) + '{"id":51,"at":NaN}\n{"id":52,"at":1,"price":Infinity}\n' + line(53),
        [row(50), row(53)],
        [(2, "not JSON: NaN"), (3, "not JSON: Infinity")],
    ),
    "keys that come twice.json": (
        line(54) + '{"id":1,"id":2,"at":1}\n{"id":1,"at":1,"x":{"y":1,"y":1}}\n',
        [row(54)],
        [(2, "the key 'id' comes twice"), (3, "the key 'y' comes twice")],
    ),
    "an array of anything.json": (
        "[" + line(55) + ', 1, null, [1], "a", {}]',
        [row(55)],
        [
            (2, "not JSON: a int, not an object"),
            (3, "not JSON: a NoneType, not an object"),
            (4, "not JSON: a list, not an object"),
            (5, "not JSON: a str, not an object"),
            (6, "id: missing; at: missing"),
        ],
    ),
    "half a surrogate.json": (
        line(56) + '{"id":57,"at":1,"note":"\\ud83d"}\n',
        [row(56)],
        [(2, "note: a lone surrogate, which no text has")],
    ),
    "a line that breaks off.json": (
        line(58) + line(59)[:9],
        [row(58)],
        [(2, "not JSON: Expecting ',' delimiter at character 10")],
    ),
    "bytes that are no text.json": (
        line(60).encode() + b'{"id":1,"at":1,"note":"\xe9"}\n',
        [row(60)],
        [(2, f"not UTF-8: invalid continuation byte at byte 24{parse.ESCAPED}")],
    ),
    "a number too large.json": (
        line(61) + '{"id":1e21,"at":1}\n{"id":9223372036854775808,"at":1}\n{"id":"1","at":1}\n'
        '{"id":1,"at":1,"price":1e-99999999999999999999}\n',
        [row(61)],
        [
            (2, "id: 1e+21 is not a whole number"),
            (3, "id: 9223372036854775808 is out of range"),
            (4, "id: '1' is not a whole number"),
            (5, "price: '1e-99999999999999999999' is not an amount"),
        ],
    ),
    "NULs at the end.json": (
        line(62).encode() + b"\0" * 64,
        [row(62)],
        [(2, "not JSON: Expecting value at character 1")],
    ),
    "cells too many.csv": ("id,at\n63,63\n64,64,\n", [row(63)], [(3, "not CSV: 3 fields, where the header has 2")]),
}
NO_ROWS = "has no rows, only blank lines"
REFUSED = {  # path below sales/ -> its bytes, and what the reason begins with
    "jq, objects.json": (PRETTY, SEVERAL),
    "jq, one object.json": (PRETTY[: PRETTY.index("}") + 1], SEVERAL),
    "pandas, split.json": (as_json(orient="split"), "1 of 1 lines do not fit: `id` missing 1, `at` missing 1;"),
    "pandas, columns.json": (as_json(), "1 of 1 lines do not fit: `id` is not a whole number 1, `price` is not an "),
    "pandas, times without zone.json": (
        '{"id": 1, "at": "2026-03-01T11:59:37.919"}\n',
        "1 of 1 lines do not fit: `at` is not a time with zone of the years 1 to 9999 in UTC 1;",
    ),
    "decimal commas.csv": ("id;price;at\r\n1;12,50;5\r\n", "1 of 1 lines do not fit: `price` is not an "),
    "a page.html": ("<html>\n</html>\n", "2 of 2 lines do not fit: not JSON: Expecting value 2;"),
    "empty.json": ("", "is empty"),
    "only a BOM.json": ("\ufeff", "is empty"),
    "only blanks.json": (" \r\n\t\n", NO_ROWS),
    "gzip of nothing.gz": (gzip.compress(b""), "is empty"),
    "only a header.csv": ("id,at\n", NO_ROWS),
    "an empty array.json": ("[]\n", NO_ROWS),
    "no rows.parquet": (spark_part([]), NO_ROWS),
    "cut off.json.gz": (gzip.compress(line(1).encode() * 99)[:-9], "is damaged gzip"),
    "cut off.parquet": (spark_part([1])[:-99], "is damaged Parquet"),
    "cut off.json": ("[" + line(1) + "," + line(2)[:-3], "is a JSON array that cannot be read from element 2 on"),
    "a spreadsheet.xlsx": (archived("zip"), "is a zip archive"),
    "a tar.tar": (archived("w"), "is a tar archive"),
    "a tar.tar.gz": (archived("w:gz"), "is a tar archive"),
    "bzip2.json.bz2": (bz2.compress(line(1).encode()), "is compressed with bzip2"),
    "xz.json.xz": (lzma.compress(line(1).encode()), "is compressed with xz"),
    "feather.arrow": (arrow_ipc(), "is Arrow IPC"),
    "rows.avro": (b"Obj\x01\x04\x14avro.codec", "is Avro"),
    "rows.orc": (b"ORC\x08\x03\n\x01", "is ORC"),
    "UTF-16 with a BOM.json": (line(1).encode("utf-16"), "is UTF-16"),
    "UTF-16.json": (line(1).encode("utf-16-le"), "is UTF-16"),
    "UTF-16, big ends first.csv": ("id,at\n1,1\n".encode("utf-16-be"), "is UTF-16"),
    "UTF-16.csv": ("id,at\n1,1\n".encode("utf-16-le"), "is UTF-16"),
    "Latin-1.csv": ("id,at,note\n1,1,é\n".encode("latin-1"), "is not UTF-8: invalid continuation byte at byte 16"),
    "only CR.csv": ("id,at\r1,1\r2,2\r", "is a CSV whose lines end with CR alone"),
    "a column twice.csv": ("id,at,id\n1,1,1\n", "is a CSV with the column 'id' twice"),
    "a column too few.csv": ("id,note\n1,a\n", "is a CSV without the column 'at'"),
    "lists of lists.json": ("[[1, 2], [3]]", "2 of 2 lines do not fit: not JSON: a list, not an object 2;"),
    "numbers.json": ("1\n2\n", "2 of 2 lines do not fit: not JSON: a int, not an object 2;"),
    "a text.txt": ("hello\n", "1 of 1 lines do not fit: not JSON: Expecting value 1;"),
}
STRAYS = [  # paths below landing/ that are no table's
    *("sales/.hidden.json", "sales/.DS_Store", ".DS_Store", "Sales/1.json", "sale/1.json", "1.json", "sales.json"),
    *("sales/_SUCCESS", "sales/._SUCCESS.crc", "sales/_temporary/0/task_1/part-00001.json", "sales/_committed_17"),
    *("__MACOSX/sales/._1.json", "Thumbs.db"),
]


class Shapes(Lake):
    tables = {table.name: table for table in (SALES, MESSAGES, LOGS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Shapes, dict[str, list], list[str]]:
    """A lake that has ingested all of it in one pass; table -> the rows that others read; what is left in landing."""
    base = tmp_path_factory.mktemp("shapes")
    lake, db = Shapes(str(base / "root")), duckdb.connect()
    expected: dict[str, list] = {table: [] for table in lake.tables}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        for what, (write, table, reader, select) in SHAPES.items():
            data = as_bytes(write())
            Path("file").write_bytes(data)
            expected[table.name] += db.sql(f"select {select} from {reader}").fetchall()
            lake.root.write(f"landing/{table.name}/{what}", data)
    for name, (data, rows, *_) in TAKEN.items():
        expected["sales"] += rows
        lake.root.write(f"landing/sales/{name}", as_bytes(data))
    for name, (data, _) in REFUSED.items():
        lake.root.write(f"landing/sales/{name}", as_bytes(data))
    lake.root.write("landing/sales/zz a copy.json", as_bytes(TAKEN["BOM.json"][0]))
    for name in STRAYS:
        lake.root.write(f"landing/{name}", line(99).encode())
    sales = base / "root/landing/sales"
    os.mkfifo(sales / "pipe.json")
    os.symlink(sales / "BOM.json", sales / "link.json")
    os.symlink("/nowhere", sales / "link to nothing.json")
    os.symlink(base, sales / "link to a folder")
    (sales / "a folder.json").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        patch.chdir(sales)
        server.bind("socket")
        done = lake.drain(max_files=999, max_bytes=10**6, max_bad_share=0.9, for_s=60, scheduled_for=None, run_id="r")
    patch.undo()
    assert done["batch"].to_list() == [1]
    return lake, expected, lake.unmatched()


def test_each_row_is_what_another_reader_has(folder):
    lake, expected, _ = folder
    for table, rows in expected.items():
        columns = lake.tables[table].types
        times = [name for name, dtype in columns.items() if dtype == TIME]
        frame = lake.snapshot().frame(table).select(*columns).with_columns(pl.col(times).dt.epoch("ms")).collect()
        ours, theirs = Counter(frame.rows()), Counter(rows)
        assert (ours - theirs, theirs - ours) == ({}, {})


def test_each_line_that_does_not_fit_has_its_reason(folder):
    lake, *_ = folder
    expected = {
        (f"sales/{ledger.shown(name)}", number, why)
        for name, (_, _, *refused) in TAKEN.items()
        for number, why in itertools.chain(*refused)
    }
    assert {*lake.refused_lines().select("file", "line", "reason").iter_rows()} == expected


def test_each_file_that_is_refused_says_why(folder):
    lake, *_ = folder
    said = {row["file"]: row["why"] for row in lake.refused_files()}
    expected = {f"sales/{name}": why for name, (_, why) in REFUSED.items()}
    expected |= {
        "sales/zz a copy.json": "has the same content as sales/BOM.json",
        "sales/pipe.json": "is a named pipe",
        "sales/socket": "is a socket",
        **dict.fromkeys(("sales/link.json", "sales/link to nothing.json"), "is a symbolic link"),
        "sales/link to a folder": "is a symbolic link",
    }
    assert said.keys() == expected.keys()
    assert {name: said[name] for name in said if not said[name].startswith(expected[name])} == {}


def test_nothing_of_the_folder_is_ignored(folder):
    lake, _, left = folder
    assert left == sorted(STRAYS) == [path for path, _ in lake.root.tree("landing")]
    files = lake.snapshot().frame("files").collect()
    taken = [f"{table.name}/{what}" for what, (_, table, *_) in SHAPES.items()] + [f"sales/{name}" for name in TAKEN]
    assert sorted(files["path"]) == sorted(map(ledger.shown, taken))
    assert lake.rebuild()["equal"].all()


def test_what_no_column_takes_is_kept_as_it_is_nested(folder):
    lake, *_ = folder

    def rescued(table: str, column: str, value: object) -> dict:
        rows = lake.snapshot().frame(table, [column, RESCUED]).filter(pl.col(column) == value)
        return json.loads(rows.select(RESCUED).collect().item() or "null")

    assert rescued("messages", "id", 1) == {"topic": "t", "partition": 0, "key": None, "value": {"user": {"age": 3}}}
    assert rescued("logs", "level", 50) == {"err": {"stack": "a\nb"}}
    assert rescued("sales", "id", 18) == {"x": 1e21}
    assert rescued("sales", "id", 19) == {"a": {"b": [1, {"c": None}]}, "d": [[1], []]}
    assert rescued("sales", "id", 30) == {"column 1": "0"}
    assert rescued("sales", "id", 32) is None
