"""What a column may be declared as, and that both ways of reading JSON make the same of it."""

import json
import random
import struct
from datetime import UTC, date, datetime
from decimal import Decimal

import polars as pl
import pytest
from faults.lake_malformed import mutated_lines, same_both_ways
from faults.lake_tables import EVENTS, TABLES_OF_ALL_KINDS
from polars.testing import assert_frame_equal

from etl import delta
from etl.lake import parse, schemas
from etl.lake.table import DAY, INT, RESCUED, TEXT, TIME, Column, Table, decimal

NESTED = Table(
    "orders",
    {
        "id": Column(INT, path="order.id"),
        "dotted": Column(TEXT, path=r"order.a\.b", nullable=True),
        "tags": Column(pl.List(TEXT), default=[]),
        "items": Column(pl.List(pl.Struct({"sku": TEXT, "price": decimal(9, 2), "day": DAY})), nullable=True),
    },
    ("id",),
)


def parsed(table: Table, *values: object) -> tuple[list[dict], list[str]]:
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    rows, refused = parse.parse(data, table)
    assert rows.schema == pl.Schema(table.stored)
    return rows.to_dicts(), refused["reason"].to_list()


def test_what_may_be_missing_is_null_or_its_default_and_the_rest_is_refused():
    given = {"id": 1, "kind": "click", "price": None, "score": 1, "at": "2026-03-01T00:00:00.000Z"}
    rows, reasons = parsed(EVENTS, given, {**given, "id": None}, {"id": 3})
    moment = datetime(2026, 3, 1, tzinfo=UTC)
    want = {"id": 1, "kind": "click", "price": None, "score": 1.0, "ok": True, "small": None, "day": None, "at": moment}
    assert rows == [{**want, RESCUED: None}]
    assert reasons == ["id: null", "kind: missing; at: missing"]


def test_a_default_stands_for_no_value_and_not_for_one_that_does_not_fit():
    day = Column(DAY, default=date(2026, 1, 1))
    table = Table("t", {"id": INT, "day": day, "net": Column(decimal(9, 2), default=Decimal(0))}, ("id",))
    rows, reasons = parsed(table, {"id": 1}, {"id": 2, "day": "1996-02-30"}, {"id": 3, "net": "x"})
    assert [row["id"] for row in rows] == [1]
    assert reasons == ["day: '1996-02-30' is not a date of the years 1 to 9999", "net: 'x' is not an amount"]


MOMENT = datetime(2026, 3, 1, 11, 59, 37, 919000, tzinfo=UTC)
COUNTS = {  # unit -> what fits, and what does not
    "s": ([(1772366377, MOMENT.replace(microsecond=0)), (-62135596800, datetime(1, 1, 1, tzinfo=UTC))], [253402300800]),
    "ms": ([(1772366377919, MOMENT), (-1, datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC))], [1772366377919.5]),
    "us": ([(1772366377919000, MOMENT), ("2026-03-01T11:59:37.919Z", MOMENT)], ["1772366377919000"]),
    "ns": ([(1772366377919000000, MOMENT)], [1772366377919000001, 1772366377919.0, True]),
}


@pytest.mark.parametrize("unit", COUNTS)
def test_a_whole_number_is_a_time_where_its_unit_is_declared(unit):
    fit, unfit = COUNTS[unit]
    table = Table("t", {"id": INT, "at": Column(TIME, unit=unit)}, ("id",))
    plain = Table("t", {"id": INT, "at": TIME}, ("id",))
    for values in ([value for value, _ in fit], [value for value, _ in fit] + unfit):
        rows, reasons = parsed(table, *({"id": 1, "at": value} for value in values))
        assert [row["at"] for row in rows] == [moment for _, moment in fit]
        assert len(reasons) == len(values) - len(fit) and all("since 1970" in why or "not a" in why for why in reasons)
    whole = "".join(json.dumps({"id": 1, "at": value}) + "\n" for value, _ in fit if type(value) is int).encode()
    assert parse._plain(whole, table, whole.count(b"\n")) is not None
    assert parsed(plain, {"id": 1, "at": 1772366377919})[1] == [
        "at: 1772366377919 is not a time with zone of the years 1 to 9999 in UTC"
    ]


def test_a_value_is_taken_from_where_its_path_leads_and_the_rest_is_kept():
    items = [{"sku": "a", "price": "1.50", "day": "2026-03-01", "x": 1}, {"sku": None}, None]
    given = {"order": {"id": 1, "a.b": "c", "more": True}, "tags": None, "items": items}
    rows, reasons = parsed(
        NESTED,
        given,
        {"order": {"id": 2}, "tags": ["x"]},
        {"order": 3},
        {"order": {"id": 4}, "items": [{"price": "1.505"}]},
    )
    assert rows == [
        {
            "id": 1,
            "dotted": "c",
            "tags": [],
            "items": [
                {"sku": "a", "price": Decimal("1.50"), "day": date(2026, 3, 1)},
                {"sku": None, "price": None, "day": None},
                None,
            ],
            RESCUED: json.dumps({"order": {"more": True}, "items": [{"x": 1}, None, None]}),
        },
        {"id": 2, "dotted": None, "tags": ["x"], "items": None, RESCUED: None},
    ]
    assert reasons == ["id: missing", "items: '1.505' is not an amount"]


def test_a_check_may_look_at_the_whole_row():
    cheaper = Column(INT, check=(pl.col("net") <= pl.col("gross"), "is more than gross"))
    table = Table("bill", {"net": cheaper, "gross": INT}, ("net",))
    rows, reasons = parsed(table, {"net": 1, "gross": 2}, {"net": 3, "gross": 2})
    assert [row["net"] for row in rows] == [1] and reasons == ["net: 3 is more than gross"]


@pytest.mark.parametrize(
    ("columns", "key", "why"),
    [
        ({"id": pl.UInt32}, (), "t.id no table has a column of the type UInt32"),
        ({"id": pl.Datetime("ms")}, (), "t.id no table has a column of the type"),
        ({"id": pl.List(pl.UInt8)}, (), "t.id no table has a column of the type UInt8"),
        ({"id": INT}, ("no",), "t.no is in the key, and no column"),
        ({"id": Column(INT, nullable=True)}, ("id",), "t.id is in the key: it cannot be nullable"),
        ({"id": Column(INT, default="a")}, (), "t.id has the default 'a', which does not fit"),
        ({"id": Column(INT, default=True)}, (), "t.id has the default True, which does not fit"),
        ({"id": Column(pl.Int8, default=128)}, (), "t.id has the default 128, which does not fit"),
        ({"id": Column(decimal(4, 2), default=Decimal("1.234"))}, (), "t.id has the default"),
        ({"id": Column(INT, default=5, range=(None, 4))}, (), "t.id has the default 5, which does not fit"),
        ({"id": Column(INT, path="a.b"), "b": Column(INT, path="a.b")}, (), "t.b is read from a.b, which id takes"),
        ({"a": pl.Struct({"b": INT}), "b": Column(INT, path="a.b")}, (), "t.b is read from a.b, which a takes"),
        ({"id": Column(INT, path="a..b")}, (), "t.id has a path with an empty key"),
        ({"id": Column(INT, unit="ms")}, (), "t.id has the unit 'ms': only a TIME has any, s, ms, us, ns"),
        ({"id": Column(TIME, unit="h")}, (), "t.id has the unit 'h'"),
        ({"id": INT, "ID": INT}, (), "t.ID is there twice"),
        ({"a b": INT}, (), "t.a b is no name for a column"),
        ({RESCUED: TEXT}, (), "t._rescued is no name for a column"),
        ({"id": Column(INT, range=("a", None))}, (), "t.id has 'a' in its range or choices, which does not go with"),
        ({"id": Column(INT, choices=(1, 2.5))}, (), "t.id has 2.5 in its range or choices"),
        ({"id": Column(INT, check=(pl.col("no") > 1, "x"))}, (), "t.id has a check that does not go with its columns"),
        ({"id": Column(INT, check=(pl.col("id") + 1, "x"))}, (), "t.id has a check that is neither true nor false"),
    ],
)
def test_what_cannot_be_stored_or_read_is_refused_where_it_is_declared(columns, key, why):
    with pytest.raises(ValueError) as raised:
        _ = Table("t", columns, key).rules  # a check is looked at when rows are held against it
    assert str(raised.value).startswith(why)


@pytest.mark.parametrize("table", TABLES_OF_ALL_KINDS, ids=lambda table: table.name)
def test_the_quick_way_gives_what_the_slow_way_gives(table):
    """Seeded lines, most of them odd, a few at a time; tests/faults has many more."""
    quick = same_both_ways(table, mutated_lines(table, 3_000, random.Random(table.name)), random.Random(1))
    assert quick > 100


NULLS = [
    f'{{"id":1,"kind":"click","at":"2026-03-01T00:00:00.000Z"{more}}}'
    for more in (
        ',"price":null,"price":"1.00"', ',"price":"1.00","price":null', ',"price":null,"price":null', ',"x":null',
        ',"price":null,"x":null', ',"=price":""', ',"price":null,"=price":""', ',"price" :null',
        ',"ok":null,"day":null',
    )
]  # fmt: skip


@pytest.mark.parametrize("odd", NULLS)
def test_a_null_neither_hides_a_key_that_comes_twice_nor_one_that_is_unknown(odd):
    short = '{"id":2,"kind":"view","at":"2026-03-01T00:00:00.000Z"}'
    same_both_ways(EVENTS, [odd.encode(), short.encode(), odd.encode()], random.Random(1), few=3)
    assert parse._plain(f"{short}\n".encode(), EVENTS, 1) is not None


def test_a_float_is_the_one_that_python_reads():
    rng = random.Random(3)
    texts = [repr(rng.random()), "-0", "-0.0", "0.1e1", "123456789012345678901.5"]
    texts += [repr(number) for number in struct.unpack("<500d", rng.randbytes(4000)) if abs(number) < 1e300]
    table = Table("f", {"x": pl.Float64, "y": Column(pl.Float32, nullable=True)}, ())
    data = "".join(f'{{"x":{text}}}\n' for text in texts).encode()
    plain = parse._plain(data, table, len(texts))
    assert [str(x) for x in plain["x"]] == [str(float(json.loads(text))) for text in texts]
    for text in ("1e400", "9" * 400, "NaN", "Infinity", '"1.5"', "true"):
        assert parse._plain(data + f'{{"x":{text}}}\n'.encode(), table, len(texts) + 1) is None
        assert parse.parse(f'{{"x":{text}}}'.encode(), table)[0].is_empty()
    assert parse.parse(b'{"x":1,"y":1e39}', table)[1]["reason"].to_list() == [
        "y: inf is not a number that its column holds"
    ]


def test_the_log_says_bounds_only_where_there_are_any():
    frame = pl.DataFrame(
        {"i": [1, 2], "f": [1.0, float("nan")], "g": [1.5, None], "l": [[1], None], "b": [True, None]}
    ).with_columns(
        d=pl.Series([Decimal("0.1"), Decimal("12345678901234567890.1")], dtype=decimal(38, 1)), s=pl.struct("i")
    )
    stats = delta.statistics(frame)
    assert stats["minValues"] == {"i": 1, "g": 1.5} and stats["maxValues"] == {"i": 2, "g": 1.5}
    assert stats["nullCount"] == {"i": 0, "f": 0, "g": 1, "b": 1, "d": 0}


def test_any_delta_reader_reads_lists_structs_and_nulls(root):
    """Written by the lake's own ingest, read by delta-rs and DuckDB."""
    from deltalake import DeltaTable

    from etl.lake import Lake, commit
    from etl.storage import Root

    class Nested(Lake):
        tables = {NESTED.name: NESTED}

    lake = Nested(Root.at(root))
    rows, _ = parse.parse(
        b'{"order":{"id":1},"items":[{"sku":"a","price":2}]}\n{"order":{"id":2},"tags":["x"]}', NESTED
    )
    commit.create_tables(lake, "r")
    commit.append(lake, "orders", commit.encode(lake, "orders", rows), batch=1, run_id="r", after=0)
    handle = DeltaTable(f"{root}/lake/orders")
    assert_frame_equal(pl.read_delta(handle).sort("id"), rows.sort("id"))
    types = {name: field["type"] for name, field in schemas.stored(handle).items()}
    assert types == {name: delta.type_of(dtype) for name, dtype in NESTED.stored.items()}
    assert {field.name: field.nullable for field in handle.schema().fields} == {
        "id": False, "dotted": True, "tags": False, "items": True, RESCUED: True,
    }  # fmt: skip
