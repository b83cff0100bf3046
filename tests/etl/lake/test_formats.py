"""Files as pandas, DuckDB, spreadsheets and sinks write them become the rows that were written."""

import gzip
import io
import json
from datetime import UTC, date, datetime
from decimal import Decimal

import duckdb
import pandas
import polars as pl
import pyarrow as pa
import pytest
from faults.lake_tables import EVENTS

from etl.lake import formats, parse
from etl.lake.table import INT, RESCUED, TEXT, Column, Table, decimal
from etl.storage import Unreadable

ROWS = [
    (1, "click", Decimal("1.50"), 0.1, True, 5, date(2026, 3, 1), datetime(2026, 3, 1, 12, 30, tzinfo=UTC)),
    (2, "view", None, None, False, None, None, datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=UTC)),
]
COLUMNS = "id bigint, kind text, price decimal(9, 2), score double, ok boolean, small tinyint, "
COLUMNS += 'day date, "at" timestamptz'
NOTES = Table("notes", {"id": INT, "note": TEXT, "more": Column(TEXT, nullable=True)}, ("id",))


def read(data: bytes, table: Table = EVENTS) -> tuple[list[tuple], list[tuple]]:
    rows, (refused,), (lines,) = parse.parse_all([formats.opened(data, table.named)], table)
    assert rows.height + refused.height == lines and rows.schema == pl.Schema(table.stored)
    return rows.drop(RESCUED).rows(), refused.select("line", "reason").rows()


@pytest.mark.parametrize("how", ["json", "json, array true", "csv", "csv, delimiter ';'", "parquet"])
@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_what_duckdb_copies_comes_back(tmp_path, how, compression):
    path, db = tmp_path / "file", duckdb.connect()
    db.execute(f"set timezone = 'UTC'; create table events ({COLUMNS})")
    db.executemany("insert into events values (?, ?, ?, ?, ?, ?, ?, ?)", ROWS)
    packed = f", compression {compression}" if compression else ""
    db.execute(f"copy events to '{path}' (format {how}{packed})")
    assert read(path.read_bytes()) == (ROWS, [])


FRAME = pandas.DataFrame({"id": [1, 2], "note": ["a,b", 'q"\n'], "more": ["x", None]})
NOTED = [(1, "a,b", "x"), (2, 'q"\n', None)]


def test_what_pandas_writes_comes_back():
    buffer = io.BytesIO()
    FRAME.to_parquet(buffer)
    texts = [FRAME.to_json(orient="records"), FRAME.to_json(orient="records", lines=True), FRAME.to_csv(index=False)]
    texts += [json.dumps(json.loads(texts[0]), indent=2)]
    for data in (buffer.getvalue(), *(text.encode() for text in texts)):
        assert read(data, NOTES) == (NOTED, [])


def test_a_spreadsheet_a_logger_and_a_sink():
    spreadsheet = '\ufeffid;note;more\r\n1;a,b;x\r\n2;"q""\n";\r\n'.encode()
    assert read(spreadsheet, NOTES) == (NOTED, [])
    assert read(b"id\tnote\n1\ta\n2\tb\n", NOTES) == ([(1, "a", None), (2, "b", None)], [])
    logger = b'{"id":1,"note":"a,b","more":"x","pid":7}\n{"id":2,"note":"q\\"\\n"}\n'
    assert read(logger, NOTES) == (NOTED, [])
    first, second = logger.splitlines(keepends=True)
    assert read(gzip.compress(first) + gzip.compress(second), NOTES) == (NOTED, [])
    pack = pa.Codec("zstd").compress
    assert read(pack(first, asbytes=True) + pack(second, asbytes=True), NOTES) == (NOTED, [])


def test_what_does_not_fit_is_refused_by_its_number():
    csv = b'id,note\n1,"a\nb"\nx,c\n3\n4,"d"e\n5,\n6,f\n'
    assert read(csv, NOTES) == (
        [(1, "a\nb", None), (6, "f", None)],
        [
            (4, "id: 'x' is not a whole number"),
            (5, "not CSV: 1 fields, where the header has 2"),
            (6, "not CSV: quotes that are not closed, or not around a whole field"),
            (7, "note: null"),
        ],
    )
    array = b'[{"id":1,"note":"},{"},\n{"id":NaN,"note":"b"},{"id":3},{"id":4,"note":"d"}]'
    assert read(array, NOTES) == ([(1, "},{", None), (4, "d", None)], [(2, "not JSON: NaN"), (3, "note: missing")])
    assert read(b'[{"id":1,"note":"a\nb"}]', NOTES)[1] == [(1, "not JSON: Invalid control character at")]
    buffer = io.BytesIO()
    pl.DataFrame({"id": [1.0, 2.5, None], "note": ["a", "b", "c"], "x": [1, 2, 3]}).write_parquet(buffer)
    assert read(buffer.getvalue(), NOTES) == (
        [(1, "a", None)], [(2, "id: 2.5 is not a whole number"), (3, "id: null")]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (gzip.compress(b"\0" * 2_000_000), "inflates to more than 1,000,000 bytes"),
        (pa.Codec("zstd").compress(b"\0" * 2_000_000, asbytes=True), "inflates to more than 1,000,000 bytes"),
        (gzip.compress(b'{"id":1}')[:-5], "is damaged gzip"),
        ("{}".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
    ids=["gzip bomb", "zstd bomb", "cut off", "UTF-16", "only a mark"],
)
def test_what_cannot_be_opened_says_why(data, why):
    with pytest.raises(Unreadable, match=why):
        formats.opened(data, NOTES.named, most=1_000_000)


NUMBERS = Table("numbers", {"x": Column(pl.Float64, nullable=True), "y": Column(pl.Float32, nullable=True)}, ())


@pytest.mark.parametrize(
    ("name", "dtype", "fits", "rounded"),
    [
        ("x", pl.Int64, [2**53, -(2**53), 2**62], [2**53 + 1, 2**63 - 1]),
        ("x", pl.UInt64, [2**63], [2**64 - 1]),
        ("y", pl.Int64, [2**24, 2**30], [2**24 + 1]),
        ("x", decimal(38, 4), [Decimal("0.1"), Decimal("12345678.9012")], [Decimal("9007199254740993.5")]),
        ("y", decimal(38, 4), [Decimal("0.1"), Decimal("1234.5")], [Decimal("12345678.9012")]),
    ],
)
def test_a_float_column_rounds_no_exact_number_of_parquet(name, dtype, fits, rounded):
    for values in (fits, fits + rounded):  # all at once, then row by row
        buffer = io.BytesIO()
        pl.DataFrame({name: pl.Series(values, dtype=dtype)}).write_parquet(buffer)
        rows, refused = read(buffer.getvalue(), NUMBERS)
        assert [row[name == "y"] for row in rows] == pl.Series(fits, dtype=dtype).cast(NUMBERS.types[name]).to_list()
        assert len(refused) == len(values) - len(fits)
        assert all(why.endswith("is a number that its column would round") for _, why in refused)
        assert all(str(int(value)) in why for value, (_, why) in zip(rounded, refused, strict=False))


def test_a_text_with_the_names_of_columns_makes_no_csv_of_json():
    data = b'{"note":"a,id,note,b","id":1}\n{"id":2,"note":"c"}\n'
    assert formats.opened(data, NOTES.named).kind == "lines"
    assert read(data, NOTES) == ([(1, "a,id,note,b", None), (2, "c", None)], [])
