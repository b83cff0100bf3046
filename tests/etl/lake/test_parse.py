"""Lines become rows or reasons: the two together are all lines, whichever way a piece is read."""

import json
from datetime import UTC, datetime
from decimal import Decimal

import polars as pl
import pytest
from faults.lake_malformed import GOOD, LINES, line
from polars.testing import assert_frame_equal

from etl.lake import parse
from etl.lake.table import FLOAT, INT, TEXT, Column, Table, decimal
from pipeline.tables import RESCUED, TABLES

ORDERS = TABLES["orders"]


@pytest.mark.parametrize("case", LINES, ids=lambda case: case[0])
def test_a_line_that_does_not_fit_is_set_apart_with_its_reason(case):
    _, bad, reason = case
    data = b"\n".join([line().encode(), bad, line(o_orderkey=2).encode(), b""])
    kept, refused = parse.parse(data, ORDERS)
    assert kept["o_orderkey"].to_list() == [1, 2]
    assert refused["line"].to_list() == [2]
    assert reason in refused["reason"][0]
    came = parse.as_it_came(refused["raw"][0], refused["reason"][0])
    assert came == bad if len(bad) < parse.RAW_CHARS else came is None
    assert len(refused["reason"][0]) <= 4 * parse.VALUE_CHARS + 1


@pytest.mark.parametrize(
    "odd",
    [
        line(extra="one"),
        line(extra=None),
        line(o_comment='says "hi": {[ü\\'),
        line(o_totalprice=12.5),
        line(o_orderkey=2) + "\r",
        line() + "  ",
        json.dumps(GOOD, separators=(" , ", " : ")),
        json.dumps(dict(reversed(GOOD.items()))),
        line(o_comment=""),
        line(o_comment="ü\u2028\x00"),
    ],
)
def test_what_fits_is_kept_however_it_is_written(odd):
    kept, refused = parse.parse(f"{line()}\n{odd}\n".encode(), ORDERS)
    assert refused.is_empty()
    want = json.loads(odd)
    assert kept["o_comment"][1] == want["o_comment"]
    assert str(kept["o_totalprice"][1]) == f"{float(want['o_totalprice']):.2f}"
    extra = {name: value for name, value in want.items() if name not in ORDERS.columns}
    assert kept[RESCUED].to_list() == [None, json.dumps(extra) if extra else None]


@pytest.mark.parametrize(
    "odd",
    [
        '{"o_orderkey":1,"o_orderkey":2,' + line()[len('{"o_orderkey": 1, ') :],
        line(o_comment=5),
        line(o_comment=["a"]),
        line(o_comment={"a": "b"}),
        line(o_clerk=True),
        line(o_orderkey="1"),
        line(o_comment="X").replace("X", "\\ud800"),
        line(o_orderkey=1.0),
    ],
)
def test_what_polars_alone_would_take_is_not_taken_for_plain(odd):
    """Unknown fields dropped, the first of two equal keys, numbers as text, a NUL for a surrogate: found one by one."""
    data = json.dumps(json.loads(line()), separators=(",", ":")).encode() + b"\n"
    assert parse._plain(data, ORDERS, 1).height == 1
    assert parse._plain(data + odd.replace('": ', '":').replace(', "', ',"').encode() + b"\n", ORDERS, 2) is None


Z = GOOD["o_order_time"].replace("+00:00", "Z")


@pytest.mark.parametrize(
    ("lines", "rescued", "reasons"),
    [
        ([line(o_totalprice=12.34, o_order_time=Z, o_channel=7)], ['{"o_channel": 7}'], []),
        ([line(o_totalprice=12.34, o_order_time=Z), line(o_channel=7)], [None, '{"o_channel": 7}'], []),
        ([line(o_comment=12345), line(o_channel="web")], ['{"o_channel": "web"}'], ["o_comment: 12345 is not a text"]),
        ([line(o_comment=True, o_channel="web")], [], ["o_comment: true is not a text"]),
        (
            [line(o_comment=True), line()[:-1] + ', "o_clerk": "a"}'],
            [],
            ["o_comment: true is not a text", "the key 'o_clerk' comes twice"],
        ),
        ([line(o_comment={"a": "b"}), line(o_comment=5)], [], ['o_comment: {"a": "b"} is not', "o_comment: 5 is not"]),
    ],
)
def test_two_oddities_do_not_make_up_for_each_other(lines, rescued, reasons):
    """A number has no quotes and Z no colon, an unknown field has both: what is counted may err to one side only."""
    kept, refused = parse.parse("\n".join([line(), *lines]).encode(), ORDERS)
    assert kept[RESCUED].to_list() == [None, *rescued]
    assert [found[: len(why)] for found, why in zip(refused["reason"], reasons, strict=True)] == reasons


def test_blank_lines_are_no_rows_but_count_in_the_numbers_of_the_others():
    data = f"\n{line()}\n \t\r\n{{oops\n\n{line(o_orderkey=2)}\n\n   ".encode()
    kept, refused = parse.parse(data, ORDERS)
    assert kept["o_orderkey"].to_list() == [1, 2]
    assert refused["line"].to_list() == [4]
    clean = data.replace(b"{oops\n", b"")
    plain = parse._plain(clean, ORDERS, parse.line_count(clean))
    assert_frame_equal(plain, kept)
    rows, bad, lines = parse.parse_all([data, clean, b"\n", line().encode()], ORDERS)
    assert (rows.height, [one.height for one in bad], lines) == (5, [1, 0, 0, 0], [3, 2, 0, 1])
    rows, bad, lines = parse.parse_all([clean, line().encode()], ORDERS)
    assert (rows.height, [one.height for one in bad], lines) == (3, [0, 0], [2, 1])


TIMES = [
    "2026-03-01T11:59:37.919+00:00",  # the stream's own form
    "2026-03-01T11:59:37+00:00",
    "2026-03-01T11:59:37.919Z",
    "2026-03-01T11:59:37.9+00:00",
    "2026-03-01T11:59:37.919123+00:00",
    "2026-03-01T11:59:37.919+01:30",
    "1969-12-31T23:59:59.999+00:00",
    "2024-02-29T00:00:00.000+00:00",
    "0001-01-01T00:00:00.000+00:00",
    "9999-12-31T23:59:59.999999Z",
]


def test_a_time_is_the_same_in_whichever_form():
    lines = "".join(line(o_order_time=time) + "\n" for time in TIMES).encode()
    plain = parse._plain(b"".join(lines.splitlines(keepends=True)[:2]), ORDERS, 2)
    kept, refused = parse.parse(lines, ORDERS)
    assert refused.is_empty()
    assert kept["o_order_time"].to_list() == [datetime.fromisoformat(time) for time in TIMES]
    assert plain["o_order_time"].to_list() == kept["o_order_time"].to_list()[:2]


@pytest.mark.parametrize(
    "time",
    [
        "2026-02-29T11:59:37.919+00:00",
        "2026-03-01T24:00:00.000+00:00",
        "2026-03-01T11:59",
        "2026-03-01T11:59:60.000+00:00",
        "9999-12-31T23:59:60.000+00:00",
        "9999-12-31T23:30:00.000-01:00",
        "0000-12-31T23:59:59.999+00:00",
        "0001-01-01T00:00:00.000+00:01",
    ],
)
def test_a_time_that_is_none_is_refused(time):
    assert parse.parse(line(o_order_time=time).encode(), ORDERS)[1]["reason"].str.contains("o_order_time").all()


def test_no_row_may_have_come_to_be_later_than_it_is_said():
    latest = datetime(2026, 3, 2, 12, tzinfo=UTC)
    times = ["2026-03-02T12:00:00.000+00:00", "2026-03-02T13:00:00+01:00", "2026-03-02T12:00:00.000001+00:00"]
    kept, refused = parse.parse("\n".join(line(o_order_time=time) for time in times).encode(), ORDERS.until(latest))
    assert kept["o_order_time"].to_list() == [latest, latest]
    assert refused["reason"].to_list() == [
        "o_order_time: 2026-03-02 12:00:00.000001+00:00 is not at most 2026-03-02 12:00:00+00:00"
    ]
    assert TABLES["lineitem"].until(latest) == TABLES["lineitem"]  # it says no such time


def test_a_clean_piece_reads_the_same_line_by_line(made):
    from pipeline.source import to_json_lines

    for table in TABLES:
        data = to_json_lines(made[0][table].head(200))
        rows, refused = parse._line_by_line(data, TABLES[table], 1)
        assert refused.is_empty()
        assert_frame_equal(parse._plain(data, TABLES[table], data.count(b"\n")), rows)


def test_lines_are_numbered_through_a_long_file(made):
    from pipeline.source import to_json_lines

    lines = to_json_lines(made[0]["lineitem"]).splitlines()
    assert sum(map(len, lines)) > 4 * parse.PIECE_BYTES
    for number in (1, 700, len(lines)):
        lines[number - 1] = b"{oops"
    kept, refused = parse.parse(b"\n".join(lines), TABLES["lineitem"])
    assert refused["line"].to_list() == [1, 700, len(lines)]
    assert kept.height == len(lines) - 3


def test_a_row_that_does_not_fit_says_why_and_only_such_a_row():
    for table in TABLES.values():
        for name in table.columns:
            values = [*(bound for bound in table.fields[name].range or () if bound is not None)]
            for value in values:
                dtype = table.types[name]
                for shift in (-1, 0, 1):
                    row = {n: pl.Series(n, [_fitting(table, n)], dtype) for n, dtype in table.types.items()}
                    row[name] = pl.Series(name, [value + shift], dtype)
                    frame = pl.DataFrame(row)
                    text = frame.cast(pl.String)
                    assert frame.select(parse._fits(table)).item() == (not parse._misfits(frame, frame, text, table))


def _fitting(table, name):
    import datetime

    if table.fields[name].choices:
        return table.fields[name].choices[0]
    lowest, highest = table.fields[name].range or (1, None)
    dtype = table.types[name]
    if dtype == pl.String:
        return "x"
    if dtype == pl.Date:
        return datetime.date(1996, 1, 1)
    if isinstance(dtype, pl.Datetime):
        return datetime.datetime(1996, 1, 1, tzinfo=datetime.UTC)
    return lowest if lowest is not None else highest


def test_types_are_exact():
    data = (
        line(o_totalprice=12.5) + "\n" + line(o_totalprice="0.01") + "\n" + line(o_totalprice=1234567890123.45)
    ).encode()
    kept, refused = parse.parse(data, ORDERS)
    assert refused.is_empty()
    assert [str(value) for value in kept["o_totalprice"]] == ["12.50", "0.01", "1234567890123.45"]
    assert kept.schema == pl.Schema(ORDERS.stored)
    assert str(kept["o_order_time"][0]) == "2026-03-01 11:59:37.919000+00:00"


MEASURED = Table(
    "measured",
    {
        "sensor": TEXT,
        "level": decimal(9, 3),
        "people": Column(decimal(5, 0), range=(-99_998, None)),
        "share": decimal(4, 4),
    },
    ("sensor",),
)
EXACT = {
    "level": ["0", "-0", "-0.001", "7.5", "007.250", "999999.999", "-999999.999"],
    "people": ["0", "-1", "00012", "99999", "-99998"],
    "share": ["0", "-0", "0.0", "0.5", "-0.25", "0.0001", "0.9999", "-0.9999", ".5"],
}
INEXACT = {
    "level": ["1000000", "0.0001", "-1234567.5", "1.", ".5", "1e3", "+1", " 1", "1,5", "", "-", "nan", "٣"],
    "people": ["100000", "-100000", "1.0", "0.", "1e3", "", "-", "1 "],
    "share": ["1", "-1", "1.0", "0.00001", "00.5", "10", "", "-", ".", "5e-1", "+.5", "inf"],
}


def measured(**changed) -> str:
    whole = {"sensor": "a", "level": "1.250", "people": "3", "share": "0.5"} | changed
    return json.dumps(whole, separators=(",", ":")) + "\n"


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in EXACT.items() for text in texts])
def test_a_decimal_of_any_size_is_exact_either_way(name, text):
    data = measured(**{name: text}).encode()
    plain, (rows, refused) = parse._plain(data, MEASURED, 1), parse._line_by_line(data, MEASURED, 1)
    assert refused.is_empty() and rows.schema == pl.Schema(MEASURED.stored)
    assert rows[name].to_list() == [Decimal(text)]
    assert_frame_equal(plain, rows)
    if not text.startswith((".", "00")):  # as a number, whose text is what counts
        as_number = data.replace(f'"{text}"'.encode(), text.encode())
        assert parse._plain(as_number, MEASURED, 1) is None
        assert_frame_equal(parse.parse(as_number, MEASURED)[0], rows)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in INEXACT.items() for text in texts])
def test_a_decimal_that_its_column_does_not_hold_is_refused_and_not_rounded(name, text):
    data = measured(**{name: text}).encode()
    assert parse._plain(data, MEASURED, 1) is None
    rows, refused = parse._line_by_line(data, MEASURED, 1)
    assert rows.is_empty()
    assert refused["reason"].to_list() == [f"{name}: {text!r} is not an amount"]


def test_decimals_of_any_size_are_the_same_either_way_through_a_long_file():
    """Some of its pieces are plain, some are not: the rows and the refusals are those of line by line."""
    lines = [measured(sensor=f"s{n}", level=f"{n}.{n % 1000:03}").encode() for n in range(6000)]
    odd = [(name, text) for name, texts in INEXACT.items() for text in texts]
    for number, (name, text) in enumerate(odd):
        lines[2000 + number] = measured(sensor="odd", **{name: text}).encode()
    lines[4000] = measured(sensor="low", people="-99999").encode()
    data = b"".join(lines)
    pieces = [parse._plain(piece, MEASURED, parse.line_count(piece)) is None for piece in parse._pieces(data)]
    assert {*pieces} == {True, False}
    (kept, refused), (rows, reasons) = parse.parse(data, MEASURED), parse._line_by_line(data, MEASURED, 1)
    assert_frame_equal(kept, rows)
    assert_frame_equal(refused, reasons)
    assert kept.height == len(lines) - len(odd) - 1
    assert refused["line"].to_list() == [*range(2001, 2001 + len(odd)), 4001]
    assert refused["reason"][-1] == "people: -99999 is not at least -99998"
    together, bad, counts = parse.parse_all([data, data], MEASURED)
    assert_frame_equal(together, pl.concat([kept, kept]))
    assert [one.equals(refused) for one in bad] == [True, True] and counts == [len(lines)] * 2


PAIR = Table("pair", {"id": INT, "note": TEXT}, ("id",))


def whole(*lines: bytes) -> str:
    *_, (bad,), (count,) = parse.parse_all([b"\n".join(lines)], PAIR)
    return parse.why_whole(bad, count)


def test_why_a_file_is_refused_is_counted_by_kind_the_most_frequent_first():
    lines = [b"{oops", *[b'{"id": "a%d"}' % n for n in range(3)], b'{"id": 1, "note": 2}', b'{"id": null, "note": "a"}']
    assert whole(*lines) == (
        "6 of 6 lines do not fit: `id` is not a whole number 3, `note` missing 3, not JSON: Expecting property name "
        "enclosed in double quotes 1, and 2 others; line 1: not JSON: Expecting property name enclosed in double "
        "quotes at character 2"
    )
    assert whole(b"", b" ") == "has no rows, only blank lines"


def test_a_value_that_reads_like_a_reason_is_not_counted_as_one():
    assert whole(b'{"id": "x; note: missing", "note": "a"}', b'{"id": 1}') == (
        "2 of 2 lines do not fit: `id` is not a whole number 1, `note` missing 1; "
        "line 1: id: 'x; note: missing' is not a whole number"
    )


def test_a_table_without_texts_is_read_however_polars_cuts_the_piece():
    """Of no column at all Polars gives a row for each of its chunks."""
    table = Table("number", {"id": INT}, ("id",))
    values = (1, -(2**63), 2**63, 1.5, "1", True)
    data = "\n".join(json.dumps({"id": n, "it": value}) for n, value in enumerate(values)).encode()
    rows, refused = parse.parse(data, table)
    assert (rows["id"].to_list(), refused.height) == ([*range(6)], 0)


def test_a_table_without_a_text_is_read_as_any_other():
    """It had no row that could be read: what is asked of all texts gave a value a row, where there are none."""
    table = Table("sizes", {"id": INT, "mb": Column(FLOAT, nullable=True)}, ("id",))
    for data, rescued in (
        (b'{"id": 1, "mb": 0.5}\n{"id": 2, "mb": 1.5}\n', [None, None]),
        (b'{"id": 1}\n{"id": 2, "a": [1, 2]}\n', [None, '{"a": [1, 2]}']),
    ):
        rows, refused = parse.parse(data, table)
        assert rows["id"].to_list() == [1, 2] and refused.is_empty()
        assert rows[RESCUED].to_list() == rescued


@pytest.mark.parametrize("length", [0, 3, 4, 5, 7, 8, 1 << 18, (1 << 18) + 3, (1 << 18) + 7])
def test_a_null_is_seen_wherever_it_is(length):
    assert not parse._has_null(b"n" * length)
    for start in {0, 1, 2, 3, length // 2, length - 6, length - 5, length - 4} & {*range(length - 3)}:
        assert parse._has_null(b"n" * start + b"null" + b"l" * (length - start - 4)), start
