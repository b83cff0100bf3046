"""The lake: where its tables are, and every read and every write of them.

Delta Lake has no transaction over several tables, so a batch is committed table by table and becomes visible at once
by one small file: `lake/published.json` names the version of every table that belongs to the same batch. Readers open
those versions and nothing else.
"""

import hashlib
import io
import json
import time
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import polars as pl

from etl.lake import documents, kept
from etl.lake.table import INT, RESCUED, TEXT
from etl.storage import Root, crash_point
from pipeline.tables import TABLES

if TYPE_CHECKING:
    import pyarrow
    from deltalake import DeltaTable

PUBLISHED = "lake/published.json"
PINNED = "lake/pinned.json"  # a root that reads a snapshot of another one, as a replay does
WRITER = "lake/writer.lease"
APP_ID = "preprocess"  # whose transactions number the batches
QUARANTINE = {"batch": INT, "table": TEXT, "file": TEXT, "line": INT, "reason": TEXT, "raw": TEXT}
COLUMNS = {name: table.stored for name, table in TABLES.items()} | {"quarantine": QUARANTINE}
KEYS = {name: table.key for name, table in TABLES.items()} | {"quarantine": ("batch", "table", "file", "line")}
CHECKPOINT_INTERVAL = 20  # commits
PROPERTIES = {
    "delta.checkpointInterval": str(CHECKPOINT_INTERVAL),
    "delta.logRetentionDuration": "interval 24 hours",  # listing it is the greater part of what opening a table costs
    "delta.deletedFileRetentionDuration": "interval 24 hours",
}


DELTA_TYPES = {
    pl.Int64: "long",
    pl.Int32: "integer",
    pl.String: "string",
    pl.Date: "date",
    pl.Decimal: "decimal(15,2)",
    pl.Datetime: "timestamp",
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
        """A handle on the version. Raises documents.Damaged rather than open a log that is not what was written."""
        place, version = Root.at(self.root), self.versions[table]
        if place.may_tear and (part := kept.damaged(place, table, version, CHECKPOINT_INTERVAL)):
            raise documents.Damaged(f"{part} is not what was written: run preprocess, which puts it right")
        return open_table(place, table, version)

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
    published = _pinned(place) or read_published(place)
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
    return (_pinned(place) or read_published(place)) is not None


def _pinned(place: Root) -> dict | None:
    try:
        return json.loads(place.read(PINNED))
    except FileNotFoundError:
        return None


def read_published(place: Root) -> dict | None:
    """The pointer itself: batch, as_of, tables, schemas, run_id, published_at; None before the first batch.

    Read from its copy when it is damaged. Raises documents.Damaged when both are.
    """
    return documents.read(place, PUBLISHED)


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
    documents.keep(place, PUBLISHED, pointer)


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
    kinds = {name: dtype if isinstance(dtype, type) else type(dtype) for name, dtype in COLUMNS[table].items()}
    return {name: DELTA_TYPES.get(kind, kind.__name__) for name, kind in kinds.items()}


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
    if declared_columns(table).items() - there.items() == {(RESCUED, DELTA_TYPES[TEXT])}:
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
    from deltalake import CommitProperties, DeltaTable, Schema

    for name in COLUMNS:
        if name in there:
            continue
        DeltaTable.create(
            place.url_of(f"lake/{name}"),
            Schema.from_arrow(arrow_schema(name)),
            mode="ignore",
            name=name,
            configuration=PROPERTIES,
            storage_options=place.storage_options,
            commit_properties=CommitProperties(custom_metadata={"run_id": run_id, "stage": "preprocess"}),
        )


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
    return Encoded(buffer.getvalue(), json.dumps(statistics(frame)))


def append(place: Root, table: str, rows: Encoded, *, batch: int, run_id: str, after: int) -> int:
    """Append a batch's rows exactly once; returns the version that holds them. `after`: the version that is published.

    delta-rs does not deduplicate by itself, so the commits since the last batch are looked through for this one, and
    the commit is the version after them or none: of two writers with the same batch the second finds that version
    taken, looks again, and finds the batch done. The rows are on the disk before the commit that names them; of the
    second writer's nothing is removed here, where a commit might name it after all: compaction does, a day later.
    """
    path = None
    while True:
        newest, last = head(place, table, after)
        if last >= batch:
            return newest
        if path is None:
            path = f"batch-{batch:08d}-{uuid.uuid4()}.zstd.parquet"
            place.write(f"lake/{table}/{path}", rows.data)
            crash_point(f"written, not committed: {table}")
        if commit(place, table, newest + 1, _append_actions(path, rows, newest, batch, run_id)):
            return newest + 1


def head(place: Root, table: str, after: int) -> tuple[int, int]:
    """The newest version of a table, and the newest batch in the commits after version `after`, 0 when there is none.

    As delta-rs would say it, but at the cost of these few commits: to open a table it lists the whole log.
    Raises SchemasDiffer when somebody gave the table other columns in them.
    """
    version, batch, columns = after, 0, declared_columns(table)
    while True:
        try:
            data = place.read(f"lake/{table}/_delta_log/{version + 1:020d}.json")
        except FileNotFoundError:
            if differs := unlike_declared(table, columns):
                raise SchemasDiffer(_refusal([differs], schema_remedy(table, columns))) from None
            return version, batch
        version += 1
        for action in map(json.loads, data.splitlines()):
            if "metaData" in action:
                columns = _columns(action["metaData"]["schemaString"])
            if action.get("txn", {}).get("appId") == APP_ID:
                batch = max(batch, action["txn"]["version"])


def _append_actions(path: str, rows: Encoded, read_version: int, batch: int, run_id: str) -> list[dict]:
    """The lines of the commit, by the Delta protocol: https://github.com/delta-io/delta/blob/master/PROTOCOL.md"""
    now = time.time_ns() // 1_000_000
    about = {
        "timestamp": now,
        "operation": "WRITE",
        "operationParameters": {"mode": "Append"},
        "readVersion": read_version,
        "isBlindAppend": True,
        "run_id": run_id,
        "stage": "preprocess",
        "batch": str(batch),
    }
    transaction = {"appId": APP_ID, "version": batch, "lastUpdated": now}
    return [{"commitInfo": about}, {"txn": transaction}, add(path, len(rows.data), rows.stats, now, changes=True)]


def add(path: str, size: int, stats: str, now: int, *, changes: bool) -> dict:
    """A commit's line that adds a file. `now`: in milliseconds; `changes`: whether its rows are new to the table."""
    return {
        "add": {
            "path": path,
            "partitionValues": {},
            "size": size,
            "modificationTime": now,
            "dataChange": changes,
            "stats": stats,
        }
    }


def commit(place: Root, table: str, version: int, actions: list[dict]) -> bool:
    """Add a version to a table's log, unless it is there already: then False. With it goes the checkpoint that is due.

    By hand: delta-rs lists the whole log for it, twice, which on an old table costs more than all the rest of a batch.
    """
    lines = "\n".join(map(json.dumps, actions))
    if not place.create(f"lake/{table}/_delta_log/{version:020d}.json", lines.encode()):
        return False
    if (version + 1) % CHECKPOINT_INTERVAL == 0:
        crash_point(f"committed, no checkpoint: {table}")
        open_table(place, table, version).create_checkpoint()
    return True


def statistics(frame: pl.DataFrame) -> dict:
    """What a file's rows have, as the Delta log says it; texts have no bounds, only their nulls."""
    ranged = frame.select(pl.selectors.numeric() | pl.selectors.temporal())
    lowest, highest = (side.row(0, named=True) for side in (ranged.min(), ranged.max()))
    return {
        "numRecords": frame.height,
        "minValues": {name: _plain(value) for name, value in lowest.items() if value is not None},
        "maxValues": {name: _plain(value) for name, value in highest.items() if value is not None},
        "nullCount": frame.null_count().row(0, named=True),
    }


def _plain(value: int | float | Decimal | date | datetime) -> int | float | str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value if isinstance(value, int) else float(value)


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


def arrow_schema(table: str) -> "pyarrow.Schema":
    """The table's Arrow schema: keys are never null."""
    import pyarrow as pa

    arrow = {
        pl.Int64: pa.int64(),
        pl.Int32: pa.int32(),
        pl.String: pa.string(),
        pl.Date: pa.date32(),
        pl.Decimal: pa.decimal128(15, 2),
        pl.Datetime: pa.timestamp("us", "UTC"),
    }
    return pa.schema(
        [
            pa.field(
                column,
                arrow[dtype if isinstance(dtype, type) else type(dtype)],
                nullable=column not in KEYS[table],
            )
            for column, dtype in COLUMNS[table].items()
        ]
    )


def open_table(place: Root, table: str, version: int | None = None) -> "DeltaTable":
    """A handle on a table, at its newest version when `version` is None: for its writers, and for `Snapshot`."""
    return place.table(f"lake/{table}", version)
