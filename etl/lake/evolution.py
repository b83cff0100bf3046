"""Tables are given the columns that they are declared to have, in one commit each, before a batch is committed.

Where Delta needs no more than a new schema, that is all: a new column that may be null, an old one that may be by now,
or that is declared no more. For a wider type, and for a new column with a default, every file is written again: Delta's
readers give a file's rows other types only with a feature that not all of them have.
"""

import io
import json
import uuid
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl import delta
from etl.lake import compaction, schemas
from etl.storage import crash_point

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

Change = Callable[[str, pa.Table], pa.Table | None]  # of a file's path and rows; None when nothing of them changes


class Changed(NamedTuple):
    """What came of it: the version of the table now, and the one whose files were looked at."""

    version: int
    read: int


@dataclass(frozen=True)
class Written:
    """A file that has another one's rows. `stats`: what the log says of them, as JSON."""

    path: str
    bytes: int
    stats: str


def move(lake: "Lake", pointer: dict[str, Any] | None, run_id: str, created: Container[str] = ()) -> dict[str, int]:
    """Give the tables that are not as they are declared the columns that they are to have. Only under the writer's
    lease.

    Returns table -> version, of those that were looked at; all of it is on the disk. Killed anywhere and called again
    it does what is left. `created`: tables that were made as they are declared a moment ago. Raises SchemasDiffer
    before it has changed any when one of them cannot be moved.
    """
    published, versions = (pointer or {}).get("tables", {}), {}
    for table in schemas.check(lake, pointer, but=created):
        versions[table] = change(lake, table, run_id).version
        delta.sync(lake.root, f"lake/{table}", after=published.get(table, -1), until=versions[table])
    return versions


def change(
    lake: "Lake", table: str, run_id: str, rows: Change | None = None, operation: str = "CHANGE COLUMN"
) -> Changed:
    """Give a table its declared columns, and its rows what `rows` makes of them, in one commit.

    The commit is the version after the one that was read or none, so that nothing comes between; then it is tried
    again, and files that were written are used again. No commit is made where nothing changes. Raises SchemasDiffer.
    """
    made: dict[tuple[str, str], Written | None] = {}
    while True:
        handle = lake.table(table)
        todo, wrong = schemas.plan(lake, table, handle)
        if wrong:
            raise schemas.SchemasDiffer(schemas.refusal([wrong]))
        read, lines = handle.version(), [] if todo is None else [_meta_data(handle, table, todo.fields)]
        if (todo and todo.rewrites) or rows:
            fields = todo.fields if todo else [*schemas.stored(handle).values()]
            lines += _files_again(lake, table, handle, fields, todo, rows, made)
        if not lines:
            return Changed(read, read)
        crash_point(f"before its columns are changed: {table}")
        how = {"operationParameters": {}, "readVersion": read, "isBlindAppend": False}
        info = delta.commit_info(operation, how | {"run_id": run_id, "stage": lake.ingested_by})
        if delta.commit(lake.root, f"lake/{table}", read + 1, [info, *lines]):
            crash_point(f"its columns are changed: {table}")
            return Changed(read + 1, read)


def _meta_data(handle: "DeltaTable", table: str, fields: list[delta.Action]) -> delta.Action:
    """The line that gives a table these columns; all else of it stays."""
    known = handle.metadata()
    line = delta.meta_data(known.name or table, fields, known.configuration, str(known.id))
    line["metaData"] |= {"createdTime": known.created_time}
    line["metaData"] |= {"description": known.description} if known.description else {}
    return line


def _files_again(
    lake: "Lake",
    table: str,
    handle: "DeltaTable",
    fields: list[delta.Action],
    todo: schemas.Move | None,
    rows: Change | None,
    made: dict[tuple[str, str], Written | None],
) -> list[delta.Action]:
    """The lines that put files with these columns in the place of a version's; memory holds one file at a time."""
    from deltalake import Schema

    text = json.dumps({"type": "struct", "fields": fields})
    arrow = pa.schema(Schema.from_json(text).to_arrow())
    every = bool(todo and todo.rewrites)
    defaults = {name: (lake.columns[table][name], value) for name, value in (todo.defaults if todo else {}).items()}
    lines = []
    for path, size in files(handle):
        if (path, text) not in made:
            made[path, text] = _again(lake, table, path, arrow, defaults, rows, every=every)
            crash_point(f"written again, not committed: {table}")
        if new := made[path, text]:
            lines += [
                delta.remove(path, size, changes=rows is not None),
                delta.add(new.path, new.bytes, new.stats, changes=rows is not None),
            ]
    return lines


def files(handle: "DeltaTable") -> list[tuple[str, int]]:
    """The files of a version: path, bytes."""
    actions = pa.table(handle.get_add_actions(flatten=True))
    return [*zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)]


def _again(
    lake: "Lake",
    table: str,
    path: str,
    arrow: pa.Schema,
    defaults: Mapping[str, tuple[Any, Any]],
    rows: Change | None,
    *,
    every: bool,
) -> Written | None:
    """Write a file's rows again, in the types of `arrow`; None when none of them changes, unless `every` file has to.

    Raises compaction.RowsDiffer when what was there does not come back.
    """
    part = pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{unquote(path)}")))
    whole = compaction.as_declared(part, arrow, defaults)
    changed = rows(path, whole) if rows else None
    if changed is None and not every:
        return None
    made = whole if changed is None else changed
    buffer = io.BytesIO()
    pq.write_table(made, buffer, row_group_size=compaction.ROW_GROUP)
    name = f"changed-{uuid.uuid4()}.snappy.parquet"
    lake.root.write(f"lake/{table}/{name}", buffer.getvalue())
    back = pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{name}")))
    if (made.num_rows, *_sum(back.cast(made.schema))) != (whole.num_rows, *_sum(made)) or (
        changed is None and _sum(back.select(part.column_names).cast(part.schema)) != _sum(part)
    ):
        lake.root.remove(f"lake/{table}/{name}")
        raise compaction.RowsDiffer(f"{table}: the rows of {path} do not come back in other types: left as they were")
    stats = delta.statistics(_frame(back))
    return Written(name, len(buffer.getvalue()), json.dumps(stats))


def _frame(rows: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame), "a table is no column"
    return frame


def _sum(rows: pa.Table) -> tuple[int, int]:
    return rows.num_rows, compaction.checksum(_frame(rows))
