"""Rows as numbers: the columns of what a model is asked about as arrays, the same from a table as from a request.

A domain declares of a model's row its columns, and of each feature how it is computed from them, once: training hands
over a frame, the service what came as JSON. Each column becomes an array of float64: a number as it is, a day as days
since 1970, a time as seconds since then, true and false as 1 and 0, one of the choices as its number among them. What
is missing, or is none of the choices, is NaN. Any other text stays one, in an array of objects.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from etl.lake.table import Column, DataType

if TYPE_CHECKING:
    import polars as pl

Columns = dict[str, np.ndarray]  # name -> float64, or texts
Feature = Callable[[Columns], np.ndarray]
EPOCH = datetime.date(1970, 1, 1)
EXACT = 2**53  # whole numbers up to it are their own float64


def columns_of(row: Mapping[str, Column | DataType]) -> dict[str, Column]:
    """A row's columns, also those that are declared by their type alone."""
    return {name: said if isinstance(said, Column) else Column(said) for name, said in row.items()}


def of_frame(frame: "pl.DataFrame", row: Mapping[str, Column]) -> Columns:
    """A frame's columns; days may be text, as JSON has them."""
    import polars as pl

    def numbers(name: str, column: Column) -> pl.Expr:
        value, dtype = pl.col(name), frame.schema[name]
        if column.choices:
            value = value.replace_strict([*column.choices], range(len(column.choices)), default=None)
            return value.cast(pl.Float64).fill_null(float("nan"))
        if dtype == pl.String:
            value = value.str.to_date() if column.type == pl.Date else value
        if column.type == pl.Date:
            value = value.cast(pl.Int32)
        if isinstance(column.type, pl.Datetime):
            value = value.dt.timestamp("us") / 1_000_000
        return value if column.type == pl.String else value.cast(pl.Float64).fill_null(float("nan"))

    made = frame.select(numbers(name, column) for name, column in row.items())
    return {name: made[name].to_numpy() for name in row}


def of_rows(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Column]) -> Columns:
    """The columns of rows that the declaration was held against before; days and times may be text, as JSON has them.

    Raises ValueError, KeyError or TypeError where it was not."""
    return {name: _array([given[name] for given in rows], column) for name, column in row.items()}


def _array(values: Sequence[Any], column: Column) -> np.ndarray:
    import polars as pl

    nan = float("nan")
    if column.choices:
        number = {choice: float(at) for at, choice in enumerate(column.choices)}
        return np.array([number.get(value, nan) for value in values])
    if column.type == pl.Date:
        first = EPOCH.toordinal()
        return np.array([nan if value is None else float(_day(value).toordinal() - first) for value in values])
    if isinstance(column.type, pl.Datetime):
        return np.array([nan if value is None else _moment(value).timestamp() for value in values])
    if column.type == pl.String:
        return np.array(values, object)
    return np.array([nan if value is None else value for value in values], np.float64)


def _day(value: Any) -> datetime.date:
    return value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)


def _moment(value: Any) -> datetime.datetime:
    return value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(value)


def matrix(columns: Columns, features: Mapping[str, Feature]) -> np.ndarray:
    """One Float32 column for each feature, as XGBoost takes them."""
    with np.errstate(all="ignore"):  # what is divided by nothing, or above Float32, is infinite or NaN
        return np.column_stack([feature(columns) for feature in features.values()]).astype(np.float32)


class Decoder:
    """Rows out of a request's body, where nothing about them is odd: `decode` gives their columns, or None.

    Then the body has to be read by who can say what is wrong with it, or takes it after all: a number as a text, say.
    What `decode` takes the other takes too, as the same values.
    """

    def __init__(self, row: Mapping[str, Column | DataType], most: int):
        """`most`: rows in a body. Raises ValueError for a column of a type that it has no plain form for."""
        self.row = columns_of(row)
        fields = [(f"f{at}", *_field(name, column)) for at, (name, column) in enumerate(self.row.items())]
        renamed = dict(zip((field[0] for field in fields), self.row, strict=True))
        kind = msgspec.defstruct("Row", fields, rename=renamed, forbid_unknown_fields=True, kw_only=True, gc=False)
        self._names = [*zip(self.row, renamed, strict=True)]
        several: Any = list.__class_getitem__(kind)
        self._decoder: Any = msgspec.json.Decoder(Annotated[several, msgspec.Meta(min_length=1, max_length=most)])

    def decode(self, body: bytes) -> Columns | None:
        """The columns of the rows in a body, or None when something is odd."""
        try:
            rows = self._decoder.decode(body)
            columns = {
                name: _array([getattr(given, field) for given in rows], self.row[name]) for name, field in self._names
            }
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
            return None
        return columns if all(_kept(columns[name], column) for name, column in self.row.items()) else None


def whole_numbers(dtype: DataType) -> tuple[int, int]:
    """The least and the largest that a column of whole numbers holds."""
    bits = int(str(dtype).lstrip("UInt"))
    return (0, 2**bits - 1) if str(dtype).startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _field(name: str, column: Column) -> tuple[Any, Any]:
    """(type, default) of a column for msgspec; what is taken otherwise than by it, the slow way takes."""
    lowest, highest = column.range or (None, None)
    kind: Any = Literal[tuple(column.choices)] if column.choices else _plain(name, column.type)
    if kind is int:
        least, most = whole_numbers(column.type)
        lowest = max(least, -(2**63), least if lowest is None else int(lowest))
        highest = min(most, 2**63 - 1, most if highest is None else int(highest))
    if kind in (int, float) and (lowest, highest) != (None, None):
        ge, le = (None if bound is None else kind(bound) for bound in (lowest, highest))
        kind = Annotated[kind, msgspec.Meta(ge=ge, le=le)]
    if column.nullable:
        return kind | None, None
    return kind, msgspec.NODEFAULT if column.default is None else column.default


def _plain(name: str, dtype: Any) -> Any:
    import polars as pl

    if dtype.is_decimal() or dtype.is_float():
        return float
    if dtype.is_integer():
        return int
    plain: dict[Any, Any] = {pl.Boolean: bool, pl.Date: datetime.date}
    if dtype in plain:
        return plain[dtype]
    if isinstance(dtype, pl.Datetime):
        return Annotated[datetime.datetime, msgspec.Meta(tz=True)]
    raise ValueError(f"{name} is of type {dtype}, of which no number can be made")


def _kept(values: np.ndarray, column: Column) -> bool:
    """Whether numbers are what their column holds: finite, and a decimal with no more digits than it has."""
    import polars as pl

    if column.choices or not (column.type.is_float() or isinstance(column.type, pl.Decimal)):
        return True
    known = values[~np.isnan(values)] if column.nullable else values
    if not np.isfinite(known).all():
        return False
    if not isinstance(column.type, pl.Decimal):
        return True
    parts = 10.0**column.type.scale
    if not (np.abs(known) < min(10.0**column.type.precision, EXACT) / parts).all():
        return False
    # a float is written with so many decimals if it is the one nearest to a number that has no more
    return bool((np.round(known * parts) / parts == known).all())
