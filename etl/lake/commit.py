"""Rows into tables: each batch's once, by one writer at a time."""

import io
import json
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from etl import delta
from etl.lake import schemas
from etl.storage import Root, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

WRITER = "lake/writer.lease"
WRITERS = 8  # files of a batch that are written at once
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


def create_tables(lake: "Lake", run_id: str, known: Container[str] = ()) -> None:
    """Create the tables that are not there yet, but for those that are known to be; safe to race."""
    about = {"run_id": run_id, "stage": lake.ingested_by}
    for name, columns in lake.columns.items():
        if name not in known:
            how: Any = {"keys": lake.required[name], "properties": PROPERTIES, "partitions": lake.partitions[name]}
            delta.create_table(lake.root, f"lake/{name}", columns, **how, about=about)


@dataclass(frozen=True)
class Encoded:
    """Rows of one table as a Parquet file. `stats`: what the Delta log says of them, as JSON. `values`: those of their
    partition, which are not in the file."""

    data: bytes
    stats: str
    values: dict[str, Any] = field(default_factory=dict)


def encode(lake: "Lake", table: str, frame: pl.DataFrame) -> list[Encoded]:
    """Rows as they are appended, a file a partition. Raises ValueError when what is never null is, or the columns are
    not the table's."""
    declared = pl.Schema(lake.columns[table])
    if frame.schema != declared:
        raise ValueError(f"{table} has the columns {declared}, not {frame.schema}")
    if nulls := [name for name in lake.required[table] if frame[name].null_count()]:
        raise ValueError(f"{table}: {', '.join(nulls)} may not be null")
    if not (by := lake.partitions[table]):
        return [_encoded(frame, {})]
    parts = frame.partition_by(by, maintain_order=True, include_key=False, as_dict=True)
    return [_encoded(part, dict(zip(by, values, strict=True))) for values, part in parts.items()]


def _encoded(frame: pl.DataFrame, values: dict[str, Any]) -> Encoded:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression_level=1)
    return Encoded(buffer.getvalue(), json.dumps(delta.statistics(frame)), values)


def append(lake: "Lake", table: str, rows: Sequence[Encoded], *, batch: int, run_id: str, after: int) -> int:
    """Append a batch's rows exactly once; returns the version that holds them. `after`: the version that is published.

    The commits since then are looked through for this batch, and the commit is the version after them or none: of two
    writers with the same batch the second finds that version taken, looks again, and finds the batch done. All of it is
    on the disk then: the rows before the commit that names them, and what others committed since. Of the second
    writer's nothing is removed here, where a commit might name it after all: compaction does, a day later.
    """
    root, folder, paths = lake.root, f"lake/{table}", list[str]()
    while True:
        newest, last = head(lake, table, after)
        if last >= batch:
            delta.sync(root, folder, after, newest)
            return newest
        if not paths:
            paths = [f"{delta.folder_of(file.values)}batch-{batch:08d}-{uuid.uuid4()}.zstd.parquet" for file in rows]
            with ThreadPoolExecutor(min(len(rows), WRITERS)) as pool:
                list(pool.map(lambda path, file: root.write(f"{folder}/{path}", file.data), paths, rows))
            crash_point(f"written, not committed: {table}")
        about = {"run_id": run_id, "stage": lake.ingested_by, "batch": str(batch)}
        if delta.commit(root, folder, newest + 1, _append_lines(paths, rows, newest, batch, about)):
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

    Raises SchemasDiffer when somebody gave the table columns in them that cannot become the declared ones, or what this
    engine does not write, ChangedMeanwhile when they can become it.
    """
    version, batch, touched = after, 0, False
    for number, lines in delta.since(lake.root, f"lake/{table}", after):
        version = number
        for line in lines:
            schemas.require_protocol(table, line.get("protocol", {}))
            touched |= "metaData" in line
            if line.get("txn", {}).get("appId") == APP_ID:
                batch = max(batch, line["txn"]["version"])
    if touched:
        todo, why = schemas.plan(lake, table, lake.table(table, version))
        if why:
            raise schemas.SchemasDiffer(schemas.refusal([why]))
        if todo:
            raise schemas.ChangedMeanwhile(f"{table}: somebody changed its columns meanwhile; run this one again")
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
    paths: list[str], rows: Sequence[Encoded], read_version: int, batch: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    how = {"operationParameters": {"mode": "Append"}, "readVersion": read_version, "isBlindAppend": True}
    info = delta.commit_info("WRITE", how | about)
    transaction = {"appId": APP_ID, "version": batch, "lastUpdated": info["commitInfo"]["timestamp"]}
    files = zip(paths, rows, strict=True)
    adds = [delta.add(path, len(f.data), f.stats, changes=True, values=f.values) for path, f in files]
    return [info, {"txn": transaction}, *adds]


def last_batch(lake: "Lake", table: str) -> int:
    """The number of the last batch that was committed to a table; 0 when none was, or there is no table yet."""
    from deltalake.exceptions import TableNotFoundError

    try:
        return lake.table(table).transaction_version(APP_ID) or 0
    except TableNotFoundError:
        return 0
