"""Rows into tables: each batch's once, by one writer at a time."""

import io
import json
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from etl import delta
from etl.lake import ledger, schemas, snapshot, switch
from etl.leases import Lease, LeaseLost
from etl.storage import Damaged, Root, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

WRITER = "leases/writer.lease"  # not in the lake, so that it stays when that goes
WRITERS = 8  # files of a batch that are written at once
APP_ID = schemas.APP_ID


@dataclass(frozen=True)
class Writer:
    """Who holds the writer's lease. `pointer`: what was published when it was taken."""

    lake: "Lake"
    lease: Lease
    pointer: dict[str, Any] | None

    def require_first(self) -> None:
        """Raises LeaseLost unless the lease is held and nothing was published under it."""
        self.lease.require()
        if snapshot.read_pointer(self.lake.root) != self.pointer:
            raise LeaseLost("another run published meanwhile: run this one again")

    def publish(self, *, batch: int, run_id: str, **what: Any) -> dict[str, Any]:
        """Move the pointer, as `snapshot.swap_pointer` does. Once."""
        self.lease.require()
        pointer = snapshot.swap_pointer(
            self.lake.root, self.pointer, batch=batch, run_id=run_id, fence=self.lease.fence, **what
        )
        self.lease.about["batch"] = batch
        return pointer


@contextmanager
def writing(lake: "Lake", run_id: str) -> Iterator[Writer]:
    """The one writer's lease on the lake; what a rebuild left undone is done then. Raises leases.LeaseHeld, and Damaged
    where what was published has vanished."""
    root = lake.root
    with root.lease(WRITER, run_id) as lease:
        pointer = snapshot.read_pointer(root)
        if pointer is None:
            require_beginning(root, lease.about)
        else:
            lease.rise(pointer.get("fence", 0))
            if "under" in pointer:
                pointer = switch.finish(root, pointer, lease)
        yield Writer(lake, lease, pointer)


def settled(lake: "Lake", run_id: str) -> dict[str, Any] | None:
    """The pointer, None before the first batch; where a rebuild left something undone, once that is done. Raises as
    `writing`."""
    pointer = snapshot.read_pointer(lake.root)
    if pointer and "under" in pointer:  # one died, or is at work
        with writing(lake, run_id) as writer:
            return writer.pointer
    return pointer


def require_beginning(root: Root, left: Mapping[str, Any] | None = None) -> None:
    """Raises Damaged where no pointer is there, though a batch was published once: a lake that vanished, or a part of
    it, is no lake that begins. `left`: what the last writer's lease has; read where it is None."""
    if left is None:
        with suppress(Damaged):  # it is not synced
            left = (root.read_json(WRITER) or {}).get("about")
        left = left or {}
    traces = [f"batch {left['batch']} was published"] if left.get("batch") else []
    archived = any(root.files(f"archive/{date}") for date in root.names("archive"))
    traces += ["archive/ has what was ingested"] * archived
    is_done = any(name.endswith(".done") for name in root.names(ledger.BATCHES))
    traces += [f"{ledger.BATCHES} has batches that are done"] * is_done
    if traces:
        raise Damaged(
            f"{snapshot.POINTER} is gone, though {' and '.join(traces)}: nothing begins anew here. What to do: bring "
            f"lake/ back, or have it made again from the archive: `orchestrate.py rebuild`. Who wants an empty lake "
            f"takes another root, or moves archive/, lake/ and leases/ away"
        )


def create_tables(lake: "Lake", run_id: str, known: Container[str] = ()) -> None:
    """Create the tables that are not there yet, but for those that are known to be; safe to race."""
    about = {"run_id": run_id, "stage": lake.ingested_by}
    for name, columns in lake.columns.items():
        if name not in known:
            how: Any = {"keys": lake.required[name], "partitions": lake.partitions[name], "about": about}
            delta.create_table(lake.root, f"lake/{name}", columns, properties=delta.PROPERTIES, **how)


@dataclass(frozen=True)
class Encoded:
    """Rows of one table as a Parquet file. `stats`: what the Delta log says of them, as JSON. `values`: those of their
    partition, which are not in the file. `path`: below the table's folder, once it is written there."""

    data: bytes
    stats: str
    values: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    bytes: int = 0


def encode(lake: "Lake", table: str, frame: pl.DataFrame) -> list[Encoded]:
    """Rows as they are appended, a file a partition. Raises ValueError when what is never null is, or the columns are
    not the table's."""
    return encode_rows(frame, table, lake.columns[table], lake.required[table], lake.partitions[table])


def encode_rows(
    frame: pl.DataFrame, table: str, columns: Mapping[str, Any], required: Sequence[str], by: Sequence[str]
) -> list[Encoded]:
    """As `encode`, of a table with these columns, those of them that are never null, and those it is partitioned by."""
    declared = pl.Schema(columns)
    if frame.schema != declared:
        raise ValueError(f"{table} has the columns {declared}, not {frame.schema}")
    if nulls := [name for name in required if frame[name].null_count()]:
        raise ValueError(f"{table}: {', '.join(nulls)} may not be null")
    if not by:
        return [_encoded(frame, {})]
    parts = frame.partition_by(by, maintain_order=True, include_key=False, as_dict=True)
    return [_encoded(part, dict(zip(by, values, strict=True))) for values, part in parts.items()]


def _encoded(frame: pl.DataFrame, values: dict[str, Any]) -> Encoded:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression_level=1)
    return Encoded(buffer.getvalue(), json.dumps(delta.statistics(frame)), values)


def stored(root: Root, table: str, file: Encoded, batch: int) -> Encoded:
    """A batch's rows in a file of the table's folder, which no commit names yet; as they are where they are in one."""
    if file.path:
        return file
    path = f"{delta.folder_of(file.values)}batch-{batch:08d}-{uuid.uuid4()}.zstd.parquet"
    root.write(f"lake/{table}/{path}", file.data)
    return replace(file, data=b"", path=path, bytes=len(file.data))


def append(
    lake: "Lake",
    table: str,
    rows: Sequence[Encoded],
    *,
    batch: int,
    run_id: str,
    after: int,
    seen: schemas.Look | None = None,
    require: Callable[[], None] = lambda: None,
) -> int:
    """Append a batch's rows exactly once; returns the version that holds them. `after`: the version that is published;
    `seen`: what had come to the table since, if somebody has looked under the lease.

    The commits since then are looked through for this batch, and the commit is the version after them or none: of two
    writers with the same batch the second finds that version taken, looks again, and finds the batch done. All of it is
    on the disk then: the rows before the commit that names them, and what others committed since. Of the second
    writer's nothing is removed here, where a commit might name it after all: compaction does, a day later. `require`
    is asked between the look and the commit: whoever is stopped after it comes with a version that is taken, or that is
    older than a log that begins anew, where nobody reads it.
    """
    root, folder, written = lake.root, f"lake/{table}", list[Encoded]()
    while True:
        newest, last = head(lake, table, after) if seen is None or seen.touched else (seen.version, seen.batch)
        seen = None  # by what else came, if that was not enough
        if last > batch:  # its rows would never come
            raise LeaseLost(f"{table} has batch {last} already, and this is {batch}: run this one again")
        if last == batch:
            delta.sync(root, folder, after, newest)
            return newest
        if not written:
            with ThreadPoolExecutor(WRITERS) as pool:
                written = list(pool.map(lambda file: stored(root, table, file, batch), rows))
            crash_point(f"written, not committed: {table}")
        about = {"run_id": run_id, "stage": lake.ingested_by, "batch": str(batch)}
        require()
        if delta.commit(root, folder, newest + 1, _append_lines(written, newest, batch, about)):
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
    engine does not write, or took rows of ours away; ChangedMeanwhile when the columns can become it.
    """
    seen = schemas.look(lake, table, after)
    if seen.touched:
        todo, why = schemas.plan(lake, table, lake.table(table, seen.version))
        if why:
            raise schemas.SchemasDiffer(schemas.refusal([why]))
        if todo:
            raise schemas.ChangedMeanwhile(f"{table}: somebody changed its columns meanwhile; run this one again")
    return seen.version, seen.batch


def require_same_rows(lake: "Lake", rows: Mapping[str, int], *, batch: int, published: Mapping[str, int]) -> None:
    """Raise SchemasDiffer when one of these tables has rows of the batch already, and not as many as `rows` says.

    A batch that was begun by another declaration would be ended by this one: a line that fitted then and does not now
    would be in its table and in quarantine, or in none of them.
    """
    for table, count in rows.items():
        with suppress(delta.Cleaned):  # as far as the commits are still there
            for _, lines in delta.since(lake.root, f"lake/{table}", published.get(table, -1)):
                transactions = [(line["txn"]["appId"], line["txn"]["version"]) for line in lines if "txn" in line]
                had = sum(json.loads(line["add"]["stats"])["numRecords"] for line in lines if "add" in line)
                if (APP_ID, batch) in transactions and had != count:
                    raise schemas.SchemasDiffer(
                        f"batch {batch} was begun by another declaration: {table} has {had:,} rows of it already, and "
                        f"now {count:,} would fit. Nothing was written; what to do: take the change of the "
                        f"declaration back until the next run has ended the batch"
                    )


def catch_up(lake: "Lake", run_id: str) -> dict[str, Any]:
    """Move a pointer that is older than the tables, as one that was copied back, to the last batch that is whole in all
    of them: the ledger has a batch's rows after all others. Raises Damaged where nothing says what came after it."""
    with writing(lake, run_id) as writer:
        pointer = writer.pointer
        assert pointer is not None, "the caller has seen it, and a lake that vanished is refused"
        looks = schemas.look_at_all(lake, pointer)
        last = looks["files"].batch if "files" in looks else 0
        if last <= pointer["batch"]:
            raise Damaged(
                f"batch {max(seen.batch for seen in looks.values())} is in some tables, and nothing says which files "
                f"it has: `orchestrate.py rebuild`"
            )
        versions = {table: _until(lake, table, version, last) for table, version in pointer["tables"].items()}
        for table, version in versions.items():
            delta.sync(lake.root, f"lake/{table}", pointer["tables"][table], version)
        clocks = snapshot.clocks_of(pointer)
        newest = snapshot.of_pointer(lake, pointer | {"tables": versions})
        for table, declared in lake.tables.items():
            if declared.time and table in versions:
                time = newest.frame(table, [declared.time]).max().collect().item()
                clocks |= {table: max(time.isoformat(), clocks.get(table, ""))} if time else {}
        as_of = max(pointer["as_of"], *clocks.values()) if clocks else pointer["as_of"]
        return writer.publish(batch=last, run_id=run_id, as_of=as_of, versions=versions, clocks=clocks)


def _until(lake: "Lake", table: str, after: int, last: int) -> int:
    """The newest version of a table that has no batch after the last."""
    seen = schemas.look(lake, table, after)
    if seen.batch <= last:
        return seen.version
    with suppress(delta.Cleaned):
        for number, lines in delta.since(lake.root, f"lake/{table}", after):
            if any(line["txn"]["appId"] == APP_ID and line["txn"]["version"] > last for line in lines if "txn" in line):
                return number - 1
    return seen.version


def _append_lines(
    files: Sequence[Encoded], read_version: int, batch: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    how = {"operationParameters": {"mode": "Append"}, "readVersion": read_version, "isBlindAppend": True}
    info = delta.commit_info("WRITE", how | about)
    transaction = {"appId": APP_ID, "version": batch, "lastUpdated": info["commitInfo"]["timestamp"]}
    adds = [delta.add(file.path, file.bytes, file.stats, changes=True, values=file.values) for file in files]
    return [info, {"txn": transaction}, *adds]


def last_batch(lake: "Lake", table: str) -> int:
    """The number of the last batch that was committed to a table; 0 when none was, or there is no table yet."""
    from deltalake.exceptions import TableNotFoundError

    try:
        return lake.table(table).transaction_version(APP_ID) or 0
    except TableNotFoundError:
        return 0
