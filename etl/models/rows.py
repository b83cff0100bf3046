"""Rows as numbers: the columns of what a model is asked about as arrays, the same from a table as from a request.

A domain declares of a model's row its columns, and of each feature how it is computed from them, once: training hands
over a frame, the service what came as JSON. Each column becomes an array of float64: a number as it is, a day as days
since 1970, a time as seconds since then, true and false as 1 and 0, one of the choices as its number among them. What
is missing, or is none of the choices, is NaN. Any other text stays one, in an array of objects.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from etl.lake.table import Column, DataType

if TYPE_CHECKING:
    import polars as pl

Columns = dict[str, np.ndarray]  # name -> float64, or texts
Feature = Callable[[Columns], np.ndarray]
EPOCH = datetime.date(1970, 1, 1)
NAN = float("nan")
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
    return _converter(column)(values)


def _converter(column: Column) -> Callable[[Sequence[Any]], np.ndarray]:
    """What makes an array of a column's values; None is NaN."""
    import polars as pl

    if column.choices:
        number = _Numbered({choice: float(at) for at, choice in enumerate(column.choices)})
        return lambda values: np.array([*map(number.__getitem__, values)], np.float64)
    if column.type == pl.Date:
        return _days
    if isinstance(column.type, pl.Datetime):
        return lambda values: np.array([NAN if value is None else _moment(value).timestamp() for value in values])
    if column.type == pl.String:
        return lambda values: np.array(values, object)
    return lambda values: np.array(values, np.float64)


class _Numbered(dict[Any, float]):
    def __missing__(self, _: Any) -> float:
        return NAN


def _days(values: Sequence[Any]) -> np.ndarray:
    try:
        ordinals = np.fromiter(map(datetime.date.toordinal, values), np.float64, len(values))
    except TypeError:  # some are missing, or texts
        ordinals = np.array([None if value is None else _day(value).toordinal() for value in values], np.float64)
    return ordinals - EPOCH.toordinal()


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
        several: Any = list.__class_getitem__(kind)
        self._decoder: Any = msgspec.json.Decoder(Annotated[several, msgspec.Meta(min_length=1, max_length=most)])
        self._columns = [(name, _converter(column)) for name, column in self.row.items()]
        types: dict[str, Any] = {name: column.type for name, column in self.row.items() if not column.choices}
        self._floats = [name for name, dtype in types.items() if dtype.is_float()]
        # all of them are held against their digits together: each call of NumPy's costs as much as many numbers
        self._decimals = {name: dtype for name, dtype in types.items() if dtype.is_decimal()}
        self._parts = np.array([[10.0**dtype.scale] for dtype in self._decimals.values()])
        most_parts = np.array([[min(10.0**dtype.precision, EXACT)] for dtype in self._decimals.values()])
        self._limits = most_parts / self._parts

    def decode(self, body: bytes) -> Columns | None:
        """The columns of the rows in a body, or None when something is odd."""
        try:
            # in one list, a column every so many: tuples that live on are looked through for garbage
            values = [*chain.from_iterable(map(msgspec.structs.astuple, self._decoder.decode(body)))]
            count = len(self._columns)
            columns = {name: convert(values[at::count]) for at, (name, convert) in enumerate(self._columns)}
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
            return None
        return columns if self._are_kept(columns) else None

    def _are_kept(self, columns: Columns) -> bool:
        """Whether numbers are what their column holds: finite, and a decimal with no more digits than it has."""
        if any(np.isinf(columns[name]).any() for name in self._floats):
            return False
        if not self._decimals:
            return True
        given = np.stack([columns[name] for name in self._decimals])
        with np.errstate(over="ignore"):
            # a float is written with so many decimals if it is the one nearest to a number that has no more
            kept = (np.abs(given) < self._limits) & (np.rint(given * self._parts) / self._parts == given)
        return bool((kept | np.isnan(given)).all())


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
