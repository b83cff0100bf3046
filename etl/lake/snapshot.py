"""The lake: where its tables are, and every read and every write of them.

Delta Lake has no transaction over several tables, so a batch is committed table by table and becomes visible at once
by one small file: `lake/published.json` names the version of every table that belongs to the same batch. Readers open
those versions and nothing else.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import polars as pl

from etl import delta
from etl.lake.table import INT, RESCUED, TEXT
from etl.storage import Damaged, Root, crash_point
from pipeline.tables import TABLES

if TYPE_CHECKING:
    from deltalake import DeltaTable

PUBLISHED = "lake/published.json"
POINTER = {"batch", "as_of", "tables", "run_id", "published_at"}
PINNED = "lake/pinned.json"  # a root that reads a snapshot of another one, as a replay does
WRITER = "lake/writer.lease"
APP_ID = "preprocess"  # whose transactions number the batches
QUARANTINE = {"batch": INT, "table": TEXT, "file": TEXT, "line": INT, "reason": TEXT, "raw": TEXT}
COLUMNS = {name: table.stored for name, table in TABLES.items()} | {"quarantine": QUARANTINE}
KEYS = {name: table.key for name, table in TABLES.items()} | {"quarantine": ("batch", "table", "file", "line")}
PROPERTIES = {
    "delta.checkpointInterval": str(delta.CHECKPOINT_INTERVAL),
    "delta.logRetentionDuration": "interval 24 hours",  # listing it is the greater part of what opening a table costs
    "delta.deletedFileRetentionDuration": "interval 24 hours",
}


class SchemasDiffer(RuntimeError):
    """The lake's tables do not have the columns that are declared; nothing was written."""


class NothingPublished(LookupError):
    """There is no snapshot yet: no batch has been published under this root."""


@dataclass(frozen=True)
class Snapshot:
    """One version of every table, all of the same batch. `as_of`: UTC, the newest order in it."""

    root: str  # where its tables are
    batch: int
    as_of: datetime
    versions: dict[str, int]
    run_id: str  # the run that published it

    def frame(self, table: str, columns: list[str] | None = None) -> pl.LazyFrame:
        """The table's rows, lazily; `columns` in that order; when None all that it has, but `_rescued`."""
        handle = self.table(table)
        there = columns_of(handle) if columns is None else {}
        lazy = pl.scan_delta(handle)
        return lazy.select(columns or [name for name in COLUMNS[table] if name != RESCUED and name in there])

    def files(self, table: str) -> list[str]:
        """The full paths or URLs of the Parquet files that hold the table's rows, as they are called."""
        return self.table(table).file_uris()

    def table(self, table: str) -> "DeltaTable":
        """A handle on the version."""
        return open_table(Root.at(self.root), table, self.versions[table])

    def rows(self) -> pl.DataFrame:
        """One row a table: table, version, rows, files, mb (counted from the log, no data is read)."""
        lines = []
        for name, version in self.versions.items():
            sizes, rows = file_stats(self.table(name))
            lines.append((name, version, rows, len(sizes), sum(sizes) / 1e6))
        return pl.DataFrame(lines, schema=["table", "version", "rows", "files", "mb"], orient="row")


def snapshot(root: str) -> Snapshot:
    """The published snapshot: the one way to read the lake. Raises NothingPublished.

    Where `lake/pinned.json` names another root and its versions, that snapshot is read, whatever came after it.
    """
    place = Root.at(root)
    published = place.read_json(PINNED) or read_published(place)
    if published is None:
        raise NothingPublished(f"nothing is published under {place.url} yet: run generate, then preprocess")
    return Snapshot(
        published.get("source_root", place.url),
        published["batch"],
        datetime.fromisoformat(published["as_of"]),
        published["tables"],
        published["run_id"],
    )


def is_published(root: str) -> bool:
    """Whether there is a snapshot to read."""
    place = Root.at(root)
    return (place.read_json(PINNED) or read_published(place)) is not None


def read_published(place: Root) -> dict | None:
    """The pointer itself: batch, as_of, tables, schemas, run_id, published_at; None before the first batch.

    Raises etl.storage.Damaged.
    """
    published = place.read_json(PUBLISHED)
    if published is not None and (lost := POINTER - published.keys()):
        raise Damaged(f"{PUBLISHED} is damaged: it has no {', '.join(sorted(lost))}")
    return published


def publish(
    place: Root, *, batch: int, as_of: str, versions: dict[str, int], run_id: str, schemas: dict[str, str] | None = None
) -> None:
    """Swap the pointer. Only inside `writing`, so that preprocess and compact do not lose each other's change.

    `schemas`: table -> the fingerprint of the columns that it is known to have; None where nobody looked: then what was
    known stays so of the tables whose version does.
    """
    if schemas is None:
        before = read_published(place) or {"tables": {}}
        same = {table for table, version in versions.items() if before["tables"].get(table) == version}
        schemas = {table: known for table, known in before.get("schemas", {}).items() if table in same}
    pointer = {
        "batch": batch,
        "as_of": as_of,
        "tables": versions,
        "schemas": schemas,
        "run_id": run_id,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    place.write(PUBLISHED, json.dumps(pointer, indent=1).encode())


@contextmanager
def writing(place: Root, run_id: str) -> Iterator[None]:
    """The one writer's lease on the lake. Raises etl.storage.LeaseHeld."""
    with place.lease(WRITER, run_id):
        yield


def columns_of(handle: "DeltaTable") -> dict[str, str]:
    """Column -> type, as Delta names them."""
    return _columns(handle.schema().to_json())


def _columns(schema: str) -> dict[str, str]:
    return {field["name"]: str(field["type"]) for field in json.loads(schema)["fields"]}


def declared_columns(table: str) -> dict[str, str]:
    """As `columns_of`, of a table as it is declared."""
    return {name: delta.type_of(dtype) for name, dtype in COLUMNS[table].items()}


def fingerprint(columns: dict[str, str]) -> str:
    """The same for the same columns and types, in any order."""
    return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:16]


def declared() -> dict[str, str]:
    """Table -> the fingerprint of its declared columns."""
    return {table: fingerprint(declared_columns(table)) for table in COLUMNS}


def unlike_declared(table: str, there: dict[str, str]) -> str | None:
    """Where the columns of a table, as `columns_of` has them, are not the declared ones, in words; None nowhere."""
    wanted, found = declared_columns(table), []
    for name in dict.fromkeys([*wanted, *there]):
        if wanted.get(name) != there.get(name):
            here = f"declared as {wanted[name]}" if name in wanted else "not declared"
            found.append(f"{name} is {here} and {there.get(name, 'missing')} in the table")
    return f"{table}: {'; '.join(found)}" if found else None


def schema_remedy(table: str, there: dict[str, str]) -> str:
    """What to do about a table whose columns are not the declared ones."""
    if declared_columns(table).items() - there.items() == {(RESCUED, delta.type_of(TEXT))}:
        return "made by an older release: end `up`, then `orchestrate.py rebuild`"
    return "a table cannot change its columns yet: take the change of pipeline/tables.py back"


def check_schemas(place: Root, published: dict | None) -> None:
    """Raise SchemasDiffer when a table that there is does not have the declared columns.

    Only a table whose columns the pointer does not know to be these is opened, so nearly always none.
    """
    known, versions = ((published or {}).get(what, {}) for what in ("schemas", "tables"))
    wrong, remedies = [], []
    for table, wanted in declared().items():
        if known.get(table) == wanted or not place.list(f"lake/{table}/_delta_log"):
            continue
        there = columns_of(open_table(place, table, versions.get(table)))
        if differs := unlike_declared(table, there):
            wrong.append(differs)
            remedies.append(schema_remedy(table, there))
    if wrong:
        raise SchemasDiffer(_refusal(wrong, remedies[0]))


def _refusal(differences: list[str], remedy: str) -> str:
    what = ". ".join(differences)
    return f"the lake's tables are not as they are declared: {what}. Nothing was written; what to do: {remedy}"


def create_tables(place: Root, run_id: str, there: Container[str] = ()) -> None:
    """Create the tables that are not there yet, but for those that are known to be; safe to race."""
    about = {"run_id": run_id, "stage": "preprocess"}
    for name, columns in COLUMNS.items():
        if name not in there:
            delta.create_table(place, f"lake/{name}", columns, keys=KEYS[name], properties=PROPERTIES, about=about)


@dataclass(frozen=True)
class Encoded:
    """Rows of one table as a Parquet file. `stats`: what the Delta log says of them, as JSON."""

    data: bytes
    stats: str


def encode(table: str, frame: pl.DataFrame) -> Encoded:
    """Rows as they are appended. Raises ValueError when a key is null or the columns are not the table's."""
    if frame.schema != pl.Schema(COLUMNS[table]):
        raise ValueError(f"{table} has the columns {pl.Schema(COLUMNS[table])}, not {frame.schema}")
    if nulls := [key for key in KEYS[table] if frame[key].null_count()]:
        raise ValueError(f"{table}: {', '.join(nulls)} may not be null")
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression_level=1)
    return Encoded(buffer.getvalue(), json.dumps(delta.statistics(frame)))


def append(place: Root, table: str, rows: Encoded, *, batch: int, run_id: str, after: int) -> int:
    """Append a batch's rows exactly once; returns the version that holds them. `after`: the version that is published.

    The commits since then are looked through for this batch, and the commit is the version after them or none: of two
    writers with the same batch the second finds that version taken, looks again, and finds the batch done. All of it is
    on the disk then: the rows before the commit that names them, and what others committed since. Of the second
    writer's nothing is removed here, where a commit might name it after all: compaction does, a day later.
    """
    path, where = None, f"lake/{table}"
    while True:
        newest, last = head(place, table, after)
        if last >= batch:
            delta.sync(place, where, after, newest)
            return newest
        if path is None:
            path = f"batch-{batch:08d}-{uuid.uuid4()}.zstd.parquet"
            place.write(f"{where}/{path}", rows.data)
            crash_point(f"written, not committed: {table}")
        if delta.commit(place, where, newest + 1, _append_lines(path, rows, newest, batch, run_id)):
            delta.sync(place, where, after, newest)
            return newest + 1


def head(place: Root, table: str, after: int) -> tuple[int, int]:
    """The newest version of a table, and the newest batch in the commits after version `after`, 0 when there is none.

    As delta-rs would say it, but at the cost of these few commits: to open a table it lists the whole log.
    Raises SchemasDiffer when somebody gave the table other columns in them.
    """
    version, batch, columns = after, 0, declared_columns(table)
    while True:
        try:
            lines = delta.actions(place, f"lake/{table}", version + 1)
        except FileNotFoundError:
            if differs := unlike_declared(table, columns):
                raise SchemasDiffer(_refusal([differs], schema_remedy(table, columns))) from None
            return version, batch
        version += 1
        for line in lines:
            if "metaData" in line:
                columns = _columns(line["metaData"]["schemaString"])
            if line.get("txn", {}).get("appId") == APP_ID:
                batch = max(batch, line["txn"]["version"])


def _append_lines(path: str, rows: Encoded, read_version: int, batch: int, run_id: str) -> list[dict]:
    about = {
        "operationParameters": {"mode": "Append"},
        "readVersion": read_version,
        "isBlindAppend": True,
        "run_id": run_id,
        "stage": "preprocess",
        "batch": str(batch),
    }
    info = delta.commit_info("WRITE", about)
    transaction = {"appId": APP_ID, "version": batch, "lastUpdated": info["commitInfo"]["timestamp"]}
    return [info, {"txn": transaction}, delta.add(path, len(rows.data), rows.stats, changes=True)]


def last_batch(place: Root, table: str) -> int:
    """The number of the last batch that was committed to a table; 0 when none was, or there is no table yet."""
    from deltalake.exceptions import TableNotFoundError

    try:
        return open_table(place, table).transaction_version(APP_ID) or 0
    except TableNotFoundError:
        return 0


def file_stats(handle: "DeltaTable") -> tuple[list[int], int]:
    """The size in bytes of each live file of a table, and the number of rows in all of them."""
    import pyarrow as pa

    actions = pa.table(handle.get_add_actions(flatten=True))
    return actions["size_bytes"].to_pylist(), sum(actions["num_records"].to_pylist())


def open_table(place: Root, table: str, version: int | None = None) -> "DeltaTable":
    """A handle on a table, at its newest version when `version` is None: for its writers, and for `Snapshot`."""
    return place.table(f"lake/{table}", version)
