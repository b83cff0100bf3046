"""Rows into tables: each batch's once, by one writer at a time."""

import io
import json
import uuid
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from etl import delta
from etl.lake import schemas
from etl.storage import Root, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

WRITER = "lake/writer.lease"
APP_ID = "preprocess"  # whose transactions number the batches; it is in the log of every lake, whatever the stage
PROPERTIES = {
    "delta.checkpointInterval": str(delta.CHECKPOINT_INTERVAL),
    "delta.logRetentionDuration": "interval 24 hours",  # listing it is the greater part of what opening a table costs
    "delta.deletedFileRetentionDuration": "interval 24 hours",
}


@contextmanager
def writing(root: Root, run_id: str) -> Iterator[None]:
    """The one writer's lease on the lake. Raises storage.LeaseHeld."""
    with root.lease(WRITER, run_id):
        yield


def create_tables(lake: "Lake", run_id: str, known: Container[str] = ()) -> list[str]:
    """Create the tables that are not there yet, but for those that are known to be; safe to race. Returns those that
    were not."""
    about, created = {"run_id": run_id, "stage": lake.ingested_by}, []
    for name, columns in lake.columns.items():
        if name not in known:
            keys, path = lake.required[name], f"lake/{name}"
            if delta.create_table(lake.root, path, columns, keys=keys, properties=PROPERTIES, about=about):
                created.append(name)
    return created


@dataclass(frozen=True)
class Encoded:
    """Rows of one table as a Parquet file. `stats`: what the Delta log says of them, as JSON."""

    data: bytes
    stats: str


def encode(lake: "Lake", table: str, frame: pl.DataFrame) -> Encoded:
    """Rows as they are appended. Raises ValueError when what is never null is, or the columns are not the table's."""
    declared = pl.Schema(lake.columns[table])
    if frame.schema != declared:
        raise ValueError(f"{table} has the columns {declared}, not {frame.schema}")
    if nulls := [name for name in lake.required[table] if frame[name].null_count()]:
        raise ValueError(f"{table}: {', '.join(nulls)} may not be null")
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression_level=1)
    return Encoded(buffer.getvalue(), json.dumps(delta.statistics(frame)))


def append(lake: "Lake", table: str, rows: Encoded, *, batch: int, run_id: str, after: int) -> int:
    """Append a batch's rows exactly once; returns the version that holds them. `after`: the version that is published.

    The commits since then are looked through for this batch, and the commit is the version after them or none: of two
    writers with the same batch the second finds that version taken, looks again, and finds the batch done. All of it is
    on the disk then: the rows before the commit that names them, and what others committed since. Of the second
    writer's nothing is removed here, where a commit might name it after all: compaction does, a day later.
    """
    root, folder, path = lake.root, f"lake/{table}", None
    while True:
        newest, last = head(lake, table, after)
        if last >= batch:
            delta.sync(root, folder, after, newest)
            return newest
        if path is None:
            path = f"batch-{batch:08d}-{uuid.uuid4()}.zstd.parquet"
            root.write(f"{folder}/{path}", rows.data)
            crash_point(f"written, not committed: {table}")
        about = {"run_id": run_id, "stage": lake.ingested_by, "batch": str(batch)}
        if delta.commit(root, folder, newest + 1, _append_lines(path, rows, newest, batch, about)):
            delta.sync(root, folder, after, newest)
            return newest + 1


def committed(lake: "Lake", published: Mapping[str, int], *, batch: int) -> dict[str, int]:
    """Of tables, each with its published version, those that have rows of a batch: table -> the newest version."""
    versions = {}
    for table, after in published.items():
        newest, last = head(lake, table, after)
        if last >= batch:
            delta.sync(lake.root, f"lake/{table}", after, newest)
            versions[table] = newest
    return versions


def head(lake: "Lake", table: str, after: int) -> tuple[int, int]:
    """The newest version of a table, and the newest batch in the commits after version `after`, 0 when there is none.

    Raises SchemasDiffer when somebody gave the table other columns in them, or what this engine does not write.
    """
    version, batch, touched = after, 0, False
    for number, lines in delta.since(lake.root, f"lake/{table}", after):
        version = number
        for line in lines:
            schemas.require_protocol(table, line.get("protocol", {}))
            touched |= "metaData" in line
            if line.get("txn", {}).get("appId") == APP_ID:
                batch = max(batch, line["txn"]["version"])
    if touched and any(planned := schemas.plan(lake, table, lake.table(table, version))):
        raise schemas.SchemasDiffer(schemas.refusal([planned[1] or f"{table}: somebody changed its columns meanwhile"]))
    return version, batch


def require_same_rows(lake: "Lake", rows: Mapping[str, int], *, batch: int, published: Mapping[str, int]) -> None:
    """Raise SchemasDiffer when one of these tables has rows of the batch already, and not as many as `rows` says.

    A batch that was begun by another declaration would be ended by this one: a line that fitted then and does not now
    would be in its table and in quarantine, or in none of them.
    """
    for table, count in rows.items():
        for _, lines in delta.since(lake.root, f"lake/{table}", published.get(table, -1)):
            transactions = [(line["txn"]["appId"], line["txn"]["version"]) for line in lines if "txn" in line]
            had = sum(json.loads(line["add"]["stats"])["numRecords"] for line in lines if "add" in line)
            if (APP_ID, batch) in transactions and had != count:
                raise schemas.SchemasDiffer(
                    f"batch {batch} was begun by another declaration: {table} has {had:,} rows of it already, and now "
                    f"{count:,} would fit. Nothing was written; what to do: take the change of the "
                    f"declaration back until the next run has ended the batch"
                )


def _append_lines(
    path: str, rows: Encoded, read_version: int, batch: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    how = {"operationParameters": {"mode": "Append"}, "readVersion": read_version, "isBlindAppend": True}
    info = delta.commit_info("WRITE", how | about)
    transaction = {"appId": APP_ID, "version": batch, "lastUpdated": info["commitInfo"]["timestamp"]}
    return [info, {"txn": transaction}, delta.add(path, len(rows.data), rows.stats, changes=True)]


def last_batch(lake: "Lake", table: str) -> int:
    """The number of the last batch that was committed to a table; 0 when none was, or there is no table yet."""
    from deltalake.exceptions import TableNotFoundError

    try:
        return lake.table(table).transaction_version(APP_ID) or 0
    except TableNotFoundError:
        return 0
