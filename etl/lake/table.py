"""What a table is: the declaration that the domain makes and that everything in the lake goes by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeAlias

import polars as pl

DataType: TypeAlias = pl.DataType | type[pl.DataType]

INT, INT32, TEXT, DAY = pl.Int64, pl.Int32, pl.String, pl.Date
TIME = pl.Datetime("us", "UTC")
QUARANTINE: dict[str, DataType] = {"batch": INT, "table": TEXT, "file": TEXT, "line": INT, "reason": TEXT, "raw": TEXT}
QUARANTINE_KEY = ("batch", "table", "file", "line")
RESCUED = "_rescued"  # in the lake, beside a table's own columns: the fields of a line that no column takes, as JSON


def decimal(precision: int, scale: int) -> pl.Decimal:
    """An exact number of at most `precision` digits, `scale` of them behind the point."""
    return pl.Decimal(precision, scale)


@dataclass(frozen=True)
class Table:
    """One table. `columns`: name -> type, in order. `key`: the columns that name a row, never null.

    `time`: the column that says when a row came to be (UTC), where there is one; the newest over all tables is how new
    the lake is. `ranges`: column -> (lowest, highest) allowed, None for open. `choices`: column -> the values allowed.
    """

    name: str
    columns: Mapping[str, DataType]
    key: tuple[str, ...]
    time: str | None = None
    ranges: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def until(self, latest: datetime) -> "Table":
        """The table, of which no row may have come to be after `latest`."""
        return replace(self, ranges={**self.ranges, self.time: (None, latest)}) if self.time else self

    @property
    def stored(self) -> dict[str, DataType]:
        """Its columns as they are in the lake."""
        return {**self.columns, RESCUED: TEXT}
