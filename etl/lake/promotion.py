"""A field that no column took is given its column, in the rows of before as well: out of `_rescued`, typed as ever."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from etl import delta
from etl.lake import commit, evolution, parse, snapshot, sorting
from etl.lake.table import BOOL, DAY, FLOAT, INT, INT32, RESCUED, TEXT, TIME, Column, DataType, Table, decimal
from etl.storage import crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

SHOWN = 3  # reasons
TYPES: dict[str, DataType] = {  # as they are called in a declaration
    **{"TEXT": TEXT, "INT": INT, "INT32": INT32, "FLOAT": FLOAT, "BOOL": BOOL, "DAY": DAY, "TIME": TIME},
    **{f"pl.{t}": t for t in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Float32, pl.Float64, pl.Boolean, pl.String)},
    "pl.Date": pl.Date,
}
GUESSED = ("BOOL", "INT", "FLOAT", "DAY", "TIME", "TEXT")  # the first that every value fits
DECIMAL = re.compile(r"decimal\((\d+), ?(\d+)\)", re.IGNORECASE)


class NotDeclared(LookupError):
    """No column takes the field yet."""


class NotFinished(RuntimeError):
    """The table has rows of a batch that is not published yet."""


@dataclass(frozen=True)
class Promoted:
    """What came of it. `rows`: that have the field's value in the column now; `left`: whose value does not fit, and is
    in `_rescued` as before; `why`: the most frequent reasons, each with how many rows."""

    table: str
    column: str
    version: int
    rows: int
    left: int
    why: dict[str, int]


@dataclass(frozen=True)
class Proposal:
    """A column that would take a field. `line`: to add to the declaration; `rows`: that have the field; `left`: of
    them, whose value would not fit."""

    line: str
    rows: int
    left: int


def type_named(text: str) -> DataType:
    """A type by its name in a declaration (`INT`, `decimal(9, 2)`, `pl.Float64`), in Polars (`Int64`) or in Delta
    (`long`, `timestamp`). Raises ValueError."""
    if match := DECIMAL.fullmatch(text):
        dtype: DataType = decimal(int(match[1]), int(match[2]))
        delta.type_of(dtype)
        return dtype
    by_name = {name.lower().removeprefix("pl."): dtype for name, dtype in TYPES.items()}
    by_name |= {str(delta.type_of(dtype)): dtype for dtype in TYPES.values()}
    if text.lower().removeprefix("pl.") not in by_name:
        raise ValueError(f"{text!r} is no type: one of {', '.join(TYPES)}, decimal(9, 2)")
    return by_name[text.lower().removeprefix("pl.")]


def column_for(table: Table, name: str) -> str | None:
    """The column that takes a field, by its own name or its path; None where none does."""
    paths = {".".join(column.keys(own)): own for own, column in table.fields.items()}
    return name if name in table.fields else paths.get(name)


def promote(lake: "Lake", table: str, name: str, run_id: str) -> Promoted:
    """Give the rows of before the values that `_rescued` has of a field that a column takes by now; publishes it.

    One commit under the writer's lease, with the change of columns where the table has not had it yet. Only files with
    such rows are written again. Killed anywhere and called again it does what is left. Raises NotDeclared, ValueError
    for a column of which it cannot be known who has it already, schemas.SchemasDiffer, snapshot.NothingPublished,
    leases.LeaseHeld, NotFinished.
    """
    declared = lake.tables[table]
    column = column_for(declared, name)
    if column is None:
        raise NotDeclared(f"{table} has no column for {name}")
    if column in (*declared.partitions, *declared.days.values()):
        raise ValueError(f"{table}.{column} partitions the table: rows would have to move from file to file")
    if declared.fields[column].type.is_nested() and declared.fields[column].default is not None:
        raise ValueError(f"{table}.{column} has a default, and of a list or struct `_rescued` has a part as well")
    root, work = lake.root, _Work(declared, column)
    with commit.writing(lake, run_id) as writer:
        pointer = writer.pointer
        if pointer is None:
            raise snapshot.NothingPublished(f"nothing is published under {root.url} yet")
        published = pointer["tables"].get(table, -1)
        if (lake.table(table).transaction_version(commit.APP_ID) or 0) > pointer["batch"]:
            raise NotFinished(f"batch {pointer['batch'] + 1} is not finished: run {lake.ingested_by} first")
        done = evolution.change(lake, table, run_id, work, "UPDATE", writer.lease.require)
        delta.sync(root, f"lake/{table}", after=published, until=done.version)
        known = pointer.get("schemas", {}) | {table: lake.fingerprints[table]}
        if done.version != published or known != pointer.get("schemas"):
            crash_point("before the promotion is published")
            writer.publish(
                batch=pointer["batch"],
                as_of=pointer["as_of"],
                versions=pointer["tables"] | {table: done.version},
                run_id=pointer["run_id"],
                schemas=known,
            )
            crash_point("promotion published")
    paths = [file.path for file in delta.files(lake.table(table, done.read))]
    looked = [work.seen[path] for path in paths if path in work.seen]
    why: Counter[str] = sum((reasons for _, reasons in looked), Counter())
    return Promoted(
        table, column, done.version, sum(taken for taken, _ in looked), why.total(), dict(why.most_common(SHOWN))
    )


@dataclass(frozen=True)
class _Work:
    """What promotion makes of a file's rows. `seen`: path -> how many rows took their value, and why others did not."""

    table: Table
    column: str
    seen: dict[str, tuple[int, Counter[str]]] = field(default_factory=dict)

    def __call__(self, path: str, rows: pa.Table) -> pa.Table | None:
        frame = pl.DataFrame(rows)
        declared = self.table.fields[self.column]
        where = _holding(frame, declared.keys(self.column))
        if declared.type.is_nested():  # a row that has the column has what else was in it in `_rescued`
            where = where & frame[self.column].is_null()
        numbered = frame.with_row_index("_row")
        made, reasons = parse.promoted(numbered.filter(where), self.column, self.table)
        self.seen[path] = made.height - len(reasons), Counter(reasons.values())
        if not self.seen[path][0]:
            return None
        whole = pl.concat([numbered.filter(~where), made]).sort("_row").drop("_row")
        return sorting.as_arrow(whole, rows.schema)


def _holding(frame: pl.DataFrame, keys: tuple[str, ...]) -> pl.Series:
    """Which rows have in `_rescued` what the keys lead to."""
    like = frame[RESCUED].str.contains(f"{json.dumps(keys[-1])}:", literal=True).fill_null(value=False)
    has = pl.Series([parse.has_field(text, keys) for text in frame[RESCUED].filter(like)], dtype=pl.Boolean)
    return like if has.all() else like.scatter(like.arg_true(), has)


def propose(lake: "Lake", table: str, name: str, dtype: DataType | None = None) -> Proposal:
    """A column for a field that none takes: of the type, or of the first that as many of its values fit as can.

    Raises LookupError when no row has the field, snapshot.NothingPublished.
    """
    newest = snapshot.snapshot(lake)
    key = name.split(".")[-1]
    rescued = newest.frame(table, [RESCUED]).filter(pl.col(RESCUED).str.contains(json.dumps(key)[1:-1], literal=True))
    frame = rescued.collect()
    rows = frame.filter(_holding(frame, (name,)))
    path = None
    if rows.is_empty():
        rows, path = frame.filter(_holding(frame, (*name.split("."),))), name
    if rows.is_empty():
        raise LookupError(f"no row of {table} has a field {name} in {RESCUED}")
    column = re.sub(r"\W", "_", name)
    if path is None and column != name:
        path = name.replace(".", "\\.")
    path = None if path == column else path
    left = {}
    for called, kind in (
        {called: TYPES[called] for called in GUESSED}.items() if dtype is None else [(_called(dtype), dtype)]
    ):
        alone = replace(lake.tables[table], columns={column: Column(kind, nullable=True, path=path)}, key=(), time=None)
        left[called] = len(parse.promoted(rows, column, alone)[1])
    called = min(left, key=left.__getitem__)  # the first of several
    if left[called] == rows.height and dtype is None:
        raise LookupError(
            f"{rows.height:,} rows of {table} have {name}, as lists or structs: declare a pl.List or pl.Struct"
        )
    more = f", path={path!r}" if path else ""
    return Proposal(f'"{column}": Column({called}, nullable=True{more}),', rows.height, left[called])


def _called(dtype: DataType) -> str:
    """A type as a declaration calls it."""
    if isinstance(dtype, pl.Decimal):
        return f"decimal({dtype.precision}, {dtype.scale})"
    return next(name for name, known in TYPES.items() if known == dtype)
