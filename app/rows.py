"""What a request to the model holds: pydantic's models of what the domain declares in its card."""

import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from etl.lake.table import Column
from etl.models.card import Card
from etl.models.rows import whole_numbers

LIKELY_FROM = 0.5  # probability
NUMBER = re.compile(
    r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.A
)  # in a text; Python takes 1_0, blanks and all of Unicode's digits
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:.*", re.A)


def row_model(card: Card) -> type[BaseModel]:
    """The model of one row. Raises ValueError for a column of a type that JSON has no plain value for."""
    columns = {name: c if isinstance(c, Column) else Column(c) for name, c in card.row.items()}
    fields = {name: _field(name, column, card.described.get(name)) for name, column in columns.items()}
    config = ConfigDict(extra="forbid", json_schema_extra={"example": dict(card.example)})
    return create_model("Row", __config__=config, __doc__=card.about or None, **fields)


def prediction_model(card: Card) -> type[BaseModel]:
    """The model of the answer for one row."""
    return create_model(
        "Prediction",
        probability=(float, Field(description=f"Of `{card.outcome}`, 0 to 1")),
        **{card.outcome: (bool, Field(description=f"Whether that is at least {LIKELY_FROM}"))},
        model_id=(str, ...),
    )


def explained_model(prediction: type[BaseModel]) -> type[BaseModel]:
    """The model of the answer for one row that says why."""
    about = "What each feature adds to it; the logarithm of the odds of the probability is the sum"
    base = (float, Field(description="The logarithm of the odds before anything is known of the row"))
    contributions = (dict[str, float], Field(description=about))
    return create_model("Explained", __base__=prediction, base=base, contributions=contributions)


def _field(name: str, column: Column, description: str | None) -> tuple[Any, Any]:
    """(annotation, default) of one column."""
    lowest, highest = column.range or (None, None)
    limits = {key: bound for key, bound in (("ge", lowest), ("le", highest)) if bound is not None}
    kind = Literal[tuple(column.choices)] if column.choices else _plain(name, column.type)
    annotated = Annotated[kind, Field(**limits, description=description)]
    if column.nullable:
        return annotated | None, None
    return annotated, ... if column.default is None else column.default


def _plain(name: str, dtype: Any) -> Any:
    """What a value of a Polars type is in JSON."""
    if dtype.is_decimal():
        digits = Field(max_digits=dtype.precision, decimal_places=dtype.scale)
        return Annotated[Decimal, BeforeValidator(_number), digits]
    if dtype.is_integer():
        least, most = whole_numbers(dtype)
        return Annotated[int, BeforeValidator(_number), Field(ge=least, le=most)]
    if dtype.is_float():
        return Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
    plain = {pl.String: str, pl.Boolean: bool, pl.Date: Annotated[date, BeforeValidator(_written_out)]}
    if dtype in plain:
        return plain[dtype]
    if isinstance(dtype, pl.Datetime):
        return Annotated[AwareDatetime, BeforeValidator(_moment)]
    raise ValueError(f"{name} is of type {dtype}, which a request cannot hold")


def _written_out(value: Any) -> Any:
    """FastAPI hands over what JSON gave, which pydantic's strict mode refuses, and its lax mode takes 0 for a date."""
    if not (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII)):
        raise ValueError("Input should be a day such as 1996-03-13")
    return value


def _moment(value: Any) -> Any:
    """A number would be seconds or milliseconds since 1970, by its size."""
    if not (isinstance(value, str) and MOMENT.fullmatch(value)):
        raise ValueError("Input should be a time such as 1996-03-13T12:00:00Z")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or isinstance(value, str) and not NUMBER.fullmatch(value):
        raise ValueError("Input should be a number")
    return value
