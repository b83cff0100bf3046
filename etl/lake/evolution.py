"""Tables are given the columns that they are declared to have, in one commit each, before a batch is committed.

Where Delta needs no more than a new schema, that is all: a new column that may be null, an old one that may be by now,
or that is declared no more. For a wider type, and for a new column with a default, every file is written again: Delta's
readers give a file's rows other types only with a feature that not all of them have.
"""

import io
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl import delta
from etl.lake import commit, compaction, schemas, sorting
from etl.storage import crash_point

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

Change = Callable[[str, pa.Table], pa.Table | None]  # of a file's path and rows; None when nothing of them changes


class Changed(NamedTuple):
    """What came of it: the version of the table now, and the one whose files were looked at."""

    version: int
    read: int


def move(
    lake: "Lake",
    tables: Iterable[str],
    pointer: dict[str, Any] | None,
    run_id: str,
    require: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Give tables that are not as they are declared the columns that they are to have. Only under the writer's lease,
    which `require` asks for before each commit.

    Returns table -> version; all of it is on the disk. Killed anywhere and called again it does what is left. Raises
    SchemasDiffer when one of them cannot be moved.
    """
    published, versions = (pointer or {}).get("tables", {}), {}
    for table in tables:
        versions[table] = change(lake, table, run_id, require=require).version
        delta.sync(lake.root, f"lake/{table}", after=published.get(table, -1), until=versions[table])
    return versions


def change(
    lake: "Lake",
    table: str,
    run_id: str,
    rows: Change | None = None,
    operation: str = "CHANGE COLUMN",
    require: Callable[[], None] = lambda: None,
) -> Changed:
    """Give a table its declared columns, and its rows what `rows` makes of them, in one commit.

    The commit is the version after the one that was read or none, so that nothing comes between; then it is tried
    again, and files that were written are used again. No commit is made where nothing changes. Raises SchemasDiffer.
    """
    made: dict[tuple[str, str], commit.Encoded | None] = {}
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
        require()
        how = {"operationParameters": {}, "readVersion": read, "isBlindAppend": False}
        info = delta.commit_info(operation, how | {"run_id": run_id, "stage": lake.ingested_by})
        if delta.commit(lake.root, f"lake/{table}", read + 1, [info, *lines]):
            crash_point(f"its columns are changed: {table}")
            return Changed(read + 1, read)


def _meta_data(handle: "DeltaTable", table: str, fields: list[delta.Action]) -> delta.Action:
    """The line that gives a table these columns; all else of it stays."""
    known = handle.metadata()
    about = (known.name or table, fields, known.configuration, str(known.id))
    line = delta.meta_data(*about, partitions=known.partition_columns)
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
    made: dict[tuple[str, str], commit.Encoded | None],
) -> list[delta.Action]:
    """The lines that put files with these columns in the place of a version's; memory holds one file at a time."""
    from deltalake import Schema

    text = json.dumps({"type": "struct", "fields": fields})
    arrow = pa.schema(Schema.from_json(text).to_arrow())
    every = bool(todo and todo.rewrites)
    defaults = todo.defaults if todo else {}
    lines = []
    for file in delta.files(handle):
        path = file.path
        if (path, text) not in made:
            given = {name: (lake.columns[table][name], value) for name, value in (defaults | file.values).items()}
            made[path, text] = _again(lake, table, file, arrow, given, rows, every=every)
            crash_point(f"written again, not committed: {table}")
        if new := made[path, text]:
            about: Any = {"changes": rows is not None, "values": file.values}
            lines += [delta.remove(path, file.bytes, **about), delta.add(new.path, new.bytes, new.stats, **about)]
    return lines


def _again(
    lake: "Lake",
    table: str,
    file: delta.File,
    arrow: pa.Schema,
    given: Mapping[str, tuple[Any, Any]],
    rows: Change | None,
    *,
    every: bool,
) -> commit.Encoded | None:
    """Write a file's rows again, in the types of `arrow`, with what is `given` where it has no such column; None when
    none of them changes, unless `every` file has to.

    Raises compaction.RowsDiffer when what was there does not come back.
    """
    part = pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{file.rel}")))
    whole = sorting.as_declared(part, arrow, given)
    changed = rows(file.path, whole) if rows else None
    if changed is None and not every:
        return None
    whole, made = (rows_.drop_columns([*file.values]) for rows_ in (whole, whole if changed is None else changed))
    buffer = io.BytesIO()
    pq.write_table(made, buffer, row_group_size=compaction.ROW_GROUP)
    name = f"{delta.folder_of(file.values)}changed-{uuid.uuid4()}.snappy.parquet"
    lake.root.write(f"lake/{table}/{name}", buffer.getvalue())
    back = pq.read_table(io.BytesIO(lake.root.read(f"lake/{table}/{name}")))
    if (made.num_rows, *_sum(back.cast(made.schema))) != (whole.num_rows, *_sum(made)) or (
        changed is None and _sum(back.select(part.column_names).cast(part.schema)) != _sum(part)
    ):
        lake.root.remove(f"lake/{table}/{name}")
        raise compaction.RowsDiffer(
            f"{table}: the rows of {file.rel} do not come back in other types: left as they were"
        )
    stats = json.dumps(delta.statistics(pl.DataFrame(back)))
    return commit.Encoded(b"", stats, file.values, name, len(buffer.getvalue()))


def _sum(rows: pa.Table) -> tuple[int, int]:
    return rows.num_rows, sorting.checksum(pl.DataFrame(rows))
