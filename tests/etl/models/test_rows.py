"""Rows of every type become the same numbers, whether they come from a table or from a request."""

import json
import math
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import polars as pl
import pytest

from etl.lake.table import BOOL, DAY, FLOAT, INT32, TEXT, TIME, Column, decimal
from etl.models import rows
from etl.models.rows import Decoder

ROW = {
    "count": Column(INT32, range=(0, 100)),
    "share": Column(FLOAT, range=(0.0, None)),
    "price": Column(decimal(9, 2), nullable=True),
    "is_new": BOOL,
    "kind": Column(TEXT, choices=("a", "b")),
    "day": Column(DAY, nullable=True),
    "at": TIME,
    "more": Column(INT32, default=7),
}
GIVEN = {"count": 5, "share": 0.25, "price": 1.25, "is_new": True, "kind": "b", "day": "2026-03-01"}
GIVEN |= {"at": "2026-03-01T12:00:00.5+01:00", "more": 1}
NUMBERS = [5, 0.25, 1.25, 1, 1, 20513, 1772362800.5, 1]


def decode(*given, most=10):
    return Decoder(ROW, most).decode(json.dumps(given).encode())


def test_a_row_from_a_request_and_from_a_table():
    typed = GIVEN | {
        "price": Decimal("1.25"),
        "day": date(2026, 3, 1),
        "at": datetime(2026, 3, 1, 11, 0, 0, 500_000, UTC),
    }
    frame = pl.DataFrame([typed], schema={name: column.type for name, column in rows.columns_of(ROW).items()})
    for columns in (
        decode(GIVEN),
        rows.of_rows([GIVEN], rows.columns_of(ROW)),
        rows.of_rows([typed], rows.columns_of(ROW)),
        rows.of_frame(frame, rows.columns_of(ROW)),
    ):
        assert [float(values[0]) for values in columns.values()] == NUMBERS
        assert {values.dtype for values in columns.values()} == {np.dtype("float64")}


def test_what_is_missing_is_no_number_or_the_default():
    less = {name: value for name, value in GIVEN.items() if name not in ("price", "day", "more")}
    columns = decode(less, GIVEN | {"price": None, "day": None})
    assert [math.isnan(value) for value in (*columns["price"], *columns["day"])] == [True] * 4
    assert columns["more"].tolist() == [7, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"count": 101},
            {"count": -1},
            {"count": 5.5},
            {"count": "5"},
            {"count": True},
            {"share": -0.1},
            {"share": "x"},
        ),
        *({"price": 1.255}, {"price": 1e7}, {"price": "1.25"}, {"is_new": 1}, {"kind": "c"}, {"day": "1.3.2026"}),
        *({"at": "2026-03-01T12:00:00"}, {"more": None}, {"other": 1}),
    ],
)
def test_what_is_odd_is_left_to_who_can_say_why(wrong):
    assert decode(GIVEN | wrong) is None


def test_only_so_many_rows():
    assert len(decode(*[GIVEN] * 10)["count"]) == 10
    assert decode(*[GIVEN] * 11) is decode() is None


def test_a_text_stays_one_and_goes_the_long_way():
    row = {"name": Column(TEXT)}
    for columns in (rows.of_rows([{"name": "x"}], row), rows.of_frame(pl.DataFrame({"name": ["x"]}), row)):
        assert columns["name"].tolist() == ["x"]
    with pytest.raises(ValueError, match="name is of type String, of which no number can be made"):
        Decoder(row, 1)
