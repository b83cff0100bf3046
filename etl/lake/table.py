"""What a table is: the declaration that the domain makes and that everything in the lake goes by."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import polars as pl

from etl import delta

DataType: TypeAlias = pl.DataType | type[pl.DataType]

INT, INT32, TEXT, DAY = pl.Int64, pl.Int32, pl.String, pl.Date
FLOAT, BOOL = pl.Float64, pl.Boolean
TIME = pl.Datetime("us", "UTC")
QUARANTINE: dict[str, DataType] = {"batch": INT, "table": TEXT, "file": TEXT, "line": INT, "reason": TEXT, "raw": TEXT}
QUARANTINE_KEY = ("batch", "table", "file", "line")
LEDGER: dict[str, DataType] = {
    **{"batch": INT, "path": TEXT, "table": TEXT, "bytes": INT, "sha256": TEXT},
    **{"rows": INT, "refused": INT, "at": TIME},  # lines of it; null where nobody counted. The batch's time
}
LEDGER_KEY = ("batch", "path")
PARTITION_BYTES = 64  # of a text: with all of them percent-encoded it is still the name of a folder
RESERVED = ("files", "quarantine")  # tables that every lake has
BATCH = "_batch"  # in the lake, in a table of which the newest row of a key counts: the number of the row's batch
RESCUED = "_rescued"  # in the lake, beside a table's own columns: the fields of a line that no column takes, as JSON
NAME = re.compile(r"\w[\w-]*", re.ASCII)  # of a table: a folder's, and part of URLs
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}  # since 1970, UTC
HIDDEN = {".", "_"}  # begin names that are not data: of a shell, and of Spark, which writes below _temporary/
UNMATCHABLE = re.compile(r"//|/\.{1,2}/|[{}]|^/landing/")  # in a glob between slashes: no path has it, or none is meant
UNNAMEABLE = re.compile(r'[ ,;{}()\n\t="\\]')  # what Parquet, Delta or JSON do not take in a name as it is


def decimal(precision: int, scale: int) -> pl.Decimal:
    """An exact number of at most `precision` digits, `scale` of them behind the point."""
    return pl.Decimal(precision, scale)


def list_of(dtype: DataType) -> pl.List:
    """Any number of values of a type."""
    return pl.List(dtype)


def struct(fields: Mapping[str, DataType]) -> pl.Struct:
    """An object with these fields, each of which may be null."""
    return pl.Struct(dict(fields))


@dataclass(frozen=True)
class Column:
    """A column that is more than its type.

    `nullable`: a field that is missing or null is null. `default`: what stands for it instead. `path`: where the value
    is in nested JSON, as `user.id`; a dot in a key is written `\\.`. `range`: (lowest, highest) allowed, None for open.
    `choices`: the values allowed. `check`: (expression, message): a row for which it is false is refused with the
    message; it goes by one row, not by its neighbours. `unit`, of a `TIME`: what a whole number counts since 1970, `s`,
    `ms`, `us` or `ns`; without it no number is a time.
    """

    type: DataType
    nullable: bool = False
    default: Any = None
    path: str | None = None
    range: tuple[Any, Any] | None = None
    choices: Sequence[Any] | None = None
    check: tuple[pl.Expr, str] | None = field(default=None, compare=False)
    unit: str | None = None

    @property
    def optional(self) -> bool:
        """Whether a row fits without it."""
        return self.nullable or self.default is not None

    def keys(self, name: str) -> tuple[str, ...]:
        """The keys that lead to its value, from the outermost."""
        if self.path is None:
            return (name,)
        return tuple(key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", self.path))


@dataclass(frozen=True)
class Table:
    """One table. `columns`: name -> type or `Column`, in order. `key`: the columns that name a row, never null.

    `partition_by`: the column, or a few, of which each value has files of its own, in a folder of its own; of a `TIME`
    it is the day (UTC), which is a column of the table then, `at_day` for `at`. `time`: the column that says when a row
    came to be (UTC), where there is one; the newest over all tables is how new the lake is. `slack`: how far ahead of
    its batch a row's time may be, since a lake's newest time never goes back. `cluster_by`: the columns by which
    compacted files are sorted, the key where it is None. `files`: a glob of the paths below landing/ of its files, `**`
    for any folders; by default all that is in the folder of its name. Names that begin with a dot or `_` are taken
    where the glob has a name that does. `on_duplicate`: what becomes of a file with the content of another one of the
    table's that is in the lake: `refuse`, or `keep` to have its rows again. `mode`: with `upsert` the newest row of a
    key counts, which is the one with the highest `order_by`, a column, and of equal ones the one that came last; its
    files may come again with other content under the same path where `on_duplicate` is `newest`. `fresh_within`:
    without new rows for so long the table is late. Raises ValueError, with table and column, for what cannot be stored
    or read.
    """

    name: str
    columns: Mapping[str, Column | DataType]
    key: tuple[str, ...]
    time: str | None = None
    slack: timedelta = timedelta(days=1)
    cluster_by: tuple[str, ...] | None = None
    files: str | None = None
    on_duplicate: Literal["refuse", "keep", "newest"] = "refuse"
    mode: Literal["append", "upsert"] = "append"
    order_by: str | None = None
    partition_by: str | tuple[str, ...] = ()
    fresh_within: timedelta | None = field(default=None, repr=False)  # says nothing of what is stored

    def __post_init__(self) -> None:
        for name in self.cluster_by or ():
            if name not in self.fields or self.types[name].is_nested():
                raise ValueError(f"{self.name} has cluster_by={self.cluster_by}: its columns, no list and no struct")
        if self.fresh_within is not None and self.fresh_within <= timedelta(0):
            raise ValueError(f"{self.name} has fresh_within={self.fresh_within}: it is a timedelta above 0")
        for wrong in (*_wrong_modes(self), *_wrong_partitions(self)):
            raise ValueError(f"{self.name} {wrong}")
        if not NAME.fullmatch(self.name) or self.name in RESERVED:
            raise ValueError(
                f"{self.name!r} is no name for a table: letters, digits, _ and -, and not {' or '.join(RESERVED)}"
            )
        if isinstance(self.key, str) or (self.upserts and not self.key):
            raise ValueError(f"{self.name} has key={self.key!r}: it is the names of columns, as ('id',)")
        if self.files is not None and UNMATCHABLE.search(f"/{self.files}/"):
            raise ValueError(
                f"{self.name} has files={self.files!r}: it is a glob of paths below landing/, as 'events/**/*.json'; "
                "{a,b} is none"
            )
        for column, why in _faults(self):
            raise ValueError(f"{self.name}.{column} {why}")

    def until(self, latest: datetime) -> "Table":
        """The table, of which no row may have come to be after `latest`."""
        if not self.time:
            return self
        column = self.fields[self.time]
        low, high = column.range or (None, None)
        column = replace(column, range=(low, latest if high is None else min(high, latest)))
        return replace(self, columns={**self.columns, self.time: column})

    @property
    def glob(self) -> str:
        """Its files' paths below landing/."""
        return self.files or f"{self.name}/**"

    @cached_property
    def _begins(self) -> str:
        """What each path begins with that its glob takes."""
        return re.split(r"[*?\[]", self.glob, maxsplit=1)[0]

    def takes(self, path: str) -> bool:
        """Whether a path below landing/ is one of its files'."""
        if not path.startswith(
            self._begins
        ):  # nearly always: it is looked at for every table and every file that waits
            return False
        names, patterns = path.split("/"), self.glob.split("/")
        hidden = {name[:1] for name in names} & HIDDEN
        return hidden <= {name[:1] for name in patterns} and _matches(names, patterns)

    @cached_property
    def fields(self) -> dict[str, Column]:
        """Its columns, each with what is declared of it."""
        return {name: said if isinstance(said, Column) else Column(said) for name, said in self.columns.items()}

    @property
    def named(self) -> set[str]:
        """What its columns are called by the header of a CSV: their names and paths."""
        return {*self.fields, *(".".join(column.keys(name)) for name, column in self.fields.items())}

    @cached_property
    def types(self) -> dict[str, DataType]:
        """Its columns' types."""
        return {name: column.type for name, column in self.fields.items()}

    @property
    def upserts(self) -> bool:
        """Whether only the newest row of a key counts."""
        return self.mode == "upsert"

    @property
    def parsed(self) -> dict[str, DataType]:
        """The columns of its rows as they are read from files."""
        return {**self.types, RESCUED: TEXT}

    @property
    def stored(self) -> dict[str, DataType]:
        """Its columns as they are in the lake."""
        return self.parsed | dict.fromkeys(self.days, DAY) | ({BATCH: INT} if self.upserts else {})

    @cached_property
    def _partition_by(self) -> tuple[str, ...]:
        return (self.partition_by,) if isinstance(self.partition_by, str) else self.partition_by

    @cached_property
    def days(self) -> dict[str, str]:
        """The columns that are the day of another one -> that one."""
        return {f"{name}_day": name for name in self._partition_by if self.types[name] == TIME}

    @cached_property
    def partitions(self) -> tuple[str, ...]:
        """The columns of the lake by which it is partitioned."""
        return tuple(f"{name}_day" if self.types[name] == TIME else name for name in self._partition_by)

    def with_days(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows as they were read, with the days by which they are partitioned."""
        return rows.with_columns(pl.col(time).dt.date().alias(day) for day, time in self.days.items())

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that are never null in the lake."""
        days = {time: day for day, time in self.days.items()}
        never_null = [name for name, column in self.fields.items() if not column.nullable]
        return (*never_null, *(days[name] for name in never_null if name in days))

    @cached_property
    def flat(self) -> bool:
        """Whether each column is a field of the line itself and has one value."""
        return not any(column.path or column.type.is_nested() for column in self.fields.values())

    @cached_property
    def rules(self) -> list[tuple[str, pl.Expr, str]]:
        """What a typed row must keep: (column, whether the row keeps it, what is said of a value that does not).

        Raises ValueError, with table and column, for a check that cannot be asked.
        """
        for column, why in _unanswerable(self):
            raise ValueError(f"{self.name}.{column} {why}")
        rules = [(name, *rule) for name, column in self.fields.items() for rule in _rules(name, column)]
        texts = [name for name in self.partitions if self.stored[name] == TEXT]
        for name in texts:
            rules.append((name, pl.col(name) != "", "is empty, and a partition without a name is null"))
            fits = pl.col(name).str.len_bytes() <= PARTITION_BYTES
            rules.append(
                (name, fits, f"is longer than {PARTITION_BYTES} bytes, which the name of a partition may have")
            )
        return rules


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether the folders and the name of a path are as a glob has them."""
    if not patterns:
        return not names
    if patterns == ["**"]:
        return bool(names)
    if patterns[0] == "**":
        return any(_matches(names[n:], patterns[1:]) for n in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _rules(name: str, column: Column) -> Iterator[tuple[pl.Expr, str]]:
    """A column's rules; null keeps all of them."""
    value, (lowest, highest) = pl.col(name), column.range or (None, None)
    if column.type.is_float():
        yield value.is_finite(), "is not a number that its column holds"
    if lowest is not None:
        yield value >= lowest, f"is not at least {lowest}"
    if highest is not None:
        yield value <= highest, f"is not at most {highest}"
    if column.choices:
        yield value.is_in(list(column.choices)), f"is not one of {', '.join(map(str, column.choices))}"
    if column.check:
        yield column.check


def _wrong_modes(table: Table) -> Iterator[str]:
    if table.mode not in ("append", "upsert"):
        yield f"has mode={table.mode!r}: it is 'append' or 'upsert'"
    if table.on_duplicate not in ("refuse", "keep", "newest"):
        yield f"has on_duplicate={table.on_duplicate!r}: it is 'refuse', 'keep' or 'newest'"
    if not table.upserts and (table.on_duplicate == "newest" or table.order_by):
        yield "has on_duplicate='newest' or an order_by, which only mode='upsert' has"
    if table.order_by and (table.order_by not in table.fields or table.types[table.order_by].is_nested()):
        yield f"has order_by={table.order_by!r}: it is a column, and no list or struct"


def _wrong_partitions(table: Table) -> Iterator[str]:
    asked = table._partition_by
    said = f"has partition_by={table.partition_by!r}"
    if not isinstance(asked, tuple) or not all(isinstance(name, str) for name in asked):
        yield f"{said}: it is a column's name, or a few as ('country', 'day')"
        return
    for name in asked:
        if name not in table.fields:
            yield f"{said}: {name} is no column"
        elif not (table.types[name] in (TEXT, DAY, BOOL, TIME) or table.types[name].is_integer()):
            yield f"{said}: {name} is a {table.types[name]}; a partition has a text, whole number, day or BOOL"
        elif table.types[name] == TIME and f"{name}_day".lower() in {other.lower() for other in table.fields}:
            yield f"{said}: the day of {name} would be {name}_day, which is a column: partition by that one"
        elif len(quote(name, safe="")) > PARTITION_BYTES:
            yield f"{said}: {name} is too long for the names of its folders"
        elif table.upserts and name not in table.key:
            yield f"{said} and mode='upsert': {name} has to be in the key, or a key's rows were in several partitions"
    if len({*asked}) < len(asked):
        yield f"{said}: a column twice"


def _faults(table: Table) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with how it is declared)."""
    taken: dict[tuple[str, ...], str] = {}
    names: set[str] = set()
    for name, column in table.fields.items():
        yield from ((name, why) for why in _unstorable(name, column))
        if name.lower() in names:
            yield name, "is there twice: Delta does not tell a small letter from a capital one"
        names.add(name.lower())
        keys = column.keys(name)
        if not all(keys):
            yield name, f"has a path with an empty key: {column.path!r}"
        for other, its in taken.items():
            if keys[: len(other)] == other[: len(keys)]:
                yield name, f"is read from {'.'.join(keys)}, which {its} takes"
        taken[keys] = name
    for name in table.key:
        if name not in table.fields:
            yield name, "is in the key, and no column"
        if table.fields[name].nullable or table.fields[name].type.is_nested():
            yield name, "is in the key: it cannot be nullable, a list or a struct"
    if table.time and table.types.get(table.time) != TIME:
        yield table.time, "is the time of the table: it has to be a column with the type TIME"
    yield from _unruly(table)


def _unstorable(name: str, column: Column) -> Iterator[str]:
    try:
        delta.type_of(column.type)
    except ValueError as error:
        yield str(error)
        return
    if not name or UNNAMEABLE.search(name) or name in (RESCUED, BATCH):
        yield f'is no name for a column: {RESCUED!r}, {BATCH!r} and what has a blank or one of ,;{{}}()="\\ are none'
    if column.unit is not None and (column.type != TIME or column.unit not in UNITS):
        yield f"has the unit {column.unit!r}: only a TIME has any, {', '.join(UNITS)}"
    if column.default is not None and not _holds(column, column.default):
        yield f"has the default {column.default!r}, which does not fit"


def _holds(column: Column, value: Any) -> bool:
    """Whether a value can stand in the column as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    lowest, highest = column.range or (None, None)
    try:
        in_range = (lowest is None or value >= lowest) and (highest is None or value <= highest)
    except TypeError:  # a range that does not go with the type is named as that
        in_range = True
    return _fits_type(column, value) and in_range and (not column.choices or value in column.choices)


def _fits_type(column: Column, value: Any) -> bool:
    try:
        held = pl.Series([value], dtype=column.type, strict=True).to_list()[0]
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return False
    number = type(value) is int and (column.type.is_float() or column.type.is_decimal())
    same = held == value or (column.type == pl.Float32 and type(value) is float and math.isfinite(held))
    return same and (number or type(held) is type(value))


def _unruly(table: Table) -> Iterator[tuple[str, str]]:
    for name, column in table.fields.items():
        bounds = [value for value in column.range or () if value is not None]
        if isinstance(column.choices, str):
            yield name, f"has the choices {column.choices!r}: they are a list, as ['a', 'b']"
            continue
        if len(bounds) == 2 and _ordered(bounds) is False:
            yield name, f"has the range {column.range}, in which nothing is"
        for value in [*bounds, *(column.choices or ())]:
            if not _fits_type(column, value):
                yield name, f"has {value!r} in its range or choices, which does not go with its type"


def _ordered(bounds: list[Any]) -> bool | None:
    """Whether the lower bound is the lower; None for what cannot be compared."""
    try:
        return bool(bounds[0] <= bounds[1])
    except TypeError:
        return None


def _unanswerable(table: Table) -> Iterator[tuple[str, str]]:
    """As `_faults`, of the checks. Not where tables are declared: to ask Polars starts threads, and a process that has
    any must not be forked, as kernels are."""
    plan = pl.LazyFrame(schema=table.types)
    for name, column in table.fields.items():
        try:
            if column.check and plan.select(column.check[0]).collect_schema().dtypes() != [pl.Boolean]:
                yield name, "has a check that is neither true nor false"
        except pl.exceptions.PolarsError as error:
            yield name, f"has a check that does not go with its columns: {str(error).splitlines()[0]}"
