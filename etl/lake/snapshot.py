"""What is published: the versions of all tables that belong to the same batch, and every read of them.

Delta Lake has no transaction over several tables, so a batch is committed table by table and becomes visible at once
by one small file: `lake/published.json` names the version of every table that belongs to the same batch. Readers open
those versions and nothing else.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import polars as pl

from etl import delta
from etl.lake import schemas, upsert
from etl.lake.table import BATCH, RESCUED
from etl.leases import LeaseLost
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

POINTER = "lake/published.json"
IN_POINTER = {"batch", "as_of", "tables", "run_id", "published_at"}
PIECE_ROWS = 150_000
HELD_BYTES = 256_000_000  # of files that a snapshot of an object store reads once, and keeps: the smallest
PINNED = "lake/pinned.json"  # a root that reads a snapshot of another one, as a replay does


class NothingPublished(LookupError):
    """There is no snapshot yet: no batch has been published under this root."""


@dataclass(frozen=True)
class Snapshot:
    """One version of every table, all of the same batch; each is opened once. `as_of`: UTC, the newest time of a row
    in the tables that have one; without such a table when the batch came."""

    lake: "Lake"  # where its tables are
    batch: int
    as_of: datetime
    versions: dict[str, int]
    run_id: str  # the run that published it
    clocks: dict[str, datetime] = field(default_factory=dict, compare=False)  # table -> its newest time, if it has one
    _handles: "dict[str, DeltaTable]" = field(default_factory=dict, repr=False, compare=False)
    _overlays: dict[str, upsert.Overlay | None] = field(default_factory=dict, repr=False, compare=False)
    _stored: dict[str, dict[str, str | delta.Action]] = field(default_factory=dict, repr=False, compare=False)
    _held: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # path in the root -> the file
    _added: dict[tuple[str, int], list[delta.Action] | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def root(self) -> Root:
        """The root of its tables."""
        return self.lake.root

    def frame(self, table: str, columns: list[str] | None = None) -> pl.LazyFrame:
        """The table's rows, lazily; `columns` in that order; when None all declared ones, but not what begins with _.

        Of a table in which the newest row of a key counts that one. A declared column that the version does not have
        yet is its default, or null; one that it has in a narrower type has the declared one. A column that is declared
        no more is there when it is asked for.
        """
        names = columns or [name for name in self.lake.columns[table] if name not in (RESCUED, BATCH)]
        return self._rows(table).with_columns(self.otherwise(table)).select(names)

    def _rows(self, table: str) -> pl.LazyFrame:
        """All that counts, in the columns of the version."""
        handle, over = self.table(table), self.overlay(table)
        if over is None:
            return pl.scan_delta(handle) if self.root.may_tear else self._of_store(table)
        if not over.kept:
            return over.rows.lazy()
        schema = over.rows.schema
        kept = upsert.scan(over.kept, schema, self.root.storage_options).select(schema.names())
        others = kept.join(over.keys.lazy(), on=over.keys.columns, how="anti")
        return pl.concat([others, over.rows.lazy()])

    def _of_store(self, table: str) -> pl.LazyFrame:
        """As `pl.scan_delta`, of a table whose files are each some requests away."""
        handle = self.table(table)
        rows, files = pl.scan_delta(handle), delta.files(handle)
        if not files:
            return rows
        schema = rows.collect_schema()
        sources = self._sources(table, [(file.rel, file.bytes, file.values) for file in files])
        return upsert.scan(sources, schema, self.root.storage_options).select(schema.names())

    def _sources(self, table: str, files: list[tuple[str, int, dict[str, Any]]]) -> list[upsert.File]:
        """Files of the table (path in its folder, bytes, values of its partition) to be scanned. In an object store the
        small ones are read now, once for all who ask this snapshot, as long as there is room."""
        folder, room = f"lake/{table}", HELD_BYTES - sum(map(len, self._held.values()))
        wanted: list[str] = []
        for rel, size, _ in sorted(files, key=lambda file: file[1]) if not self.root.may_tear else ():
            if (path := f"{folder}/{rel}") not in self._held and (room := room - size) >= 0:
                wanted.append(path)
        self._held.update(zip(wanted, self.root.each(self.root.read, wanted), strict=True))
        paths = ((f"{folder}/{rel}", values) for rel, _, values in files)
        return [upsert.File(self._held.get(path) or self.root.url_of(path), values) for path, values in paths]

    def added(self, table: str, after: int) -> list[delta.Action] | None:
        """As `delta.added`, up to this version; looked up once."""
        if (table, after) not in self._added:
            until = self.versions[table]
            known = delta.added(self.root, f"lake/{table}", after, until) if after <= until else None
            self._added[table, after] = known
        return self._added[table, after]

    def frame_of(self, table: str, files: list[delta.Action]) -> pl.LazyFrame:
        """The rows of some files of the table, as its log adds them, in the declared columns: as `frame`, where the
        table's columns are those of when the files came."""
        schema = self._rows(table).collect_schema()
        named = [(unquote(file["path"]), file["size"], delta.values_of(file, schema)) for file in files]
        return self._of_files(table, self._sources(table, named))

    def _of_files(self, table: str, sources: list[upsert.File]) -> pl.LazyFrame:
        """The rows of files of the table."""
        rows = upsert.scan(sources, self._rows(table).collect_schema(), self.root.storage_options)
        return rows.with_columns(self.otherwise(table)).select(name for name in self.lake.columns[table])

    def pieces(
        self, table: str, columns: list[str], *, where: pl.Expr | None = None, most: int = PIECE_ROWS
    ) -> Iterator[pl.DataFrame]:
        """The table's rows, at most `most` at a time, and no more of them in memory; but for a table in which the
        newest row of a key counts. `where`: which of them, by any of the declared columns.

        A stream that Polars collects reads ahead without end: six million rows of eight columns took 350 MB more.
        """
        every = pl.lit(True) if where is None else where
        if self.overlay(table):
            yield from self.frame(table).filter(every).select(columns).collect().iter_slices(most)
            return
        for file in delta.files(self.table(table)):
            rows = self._of_files(table, [upsert.File(self.root.url_of(f"lake/{table}/{file.rel}"), file.values)])
            if where is not None and not rows.filter(every).select(pl.len()).collect().item():
                continue
            for start in range(0, file.rows, most):
                yield rows.slice(start, most).filter(every).select(columns).collect()

    def overlay(self, table: str) -> upsert.Overlay | None:
        """Of a table in which the newest row of a key counts, what counts beside its compacted files."""
        if not self.lake.upserts(table):
            return None
        if table not in self._overlays:
            declared = self.lake.tables[table]
            self._overlays[table] = upsert.overlay(self.table(table), declared, self.root.storage_options)
        return self._overlays[table]

    def otherwise(self, table: str) -> list[pl.Expr]:
        """The declared columns that the version has otherwise, as they are declared."""
        has, defaults = self.stored(table), self.lake.defaults[table]
        return [
            schemas.column(name, has.get(name), dtype, defaults.get(name))
            for name, dtype in self.lake.columns[table].items()
            if has.get(name) != delta.type_of(dtype)
        ]

    def stored(self, table: str) -> dict[str, str | delta.Action]:
        """The columns that the version has -> their types, as Delta's schema has them."""
        if table not in self._stored:
            fields = schemas.stored(self.table(table))
            self._stored[table] = {name: field["type"] for name, field in fields.items()}
        return self._stored[table]

    def files(self, table: str) -> list[str]:
        """The full paths or URLs of the Parquet files that hold the table's rows, as they are called."""
        return self.table(table).file_uris()

    def table(self, table: str) -> "DeltaTable":
        """A handle on the version."""
        if table not in self._handles:
            self._handles[table] = self.lake.table(table, self.versions[table])
        return self._handles[table]

    def row_count(self, table: str) -> int:
        """How many rows the table has: from the log, where none has to be put over another."""
        if self.overlay(table):
            return int(self.frame(table).select(pl.len()).collect().item())
        return delta.file_stats(self.table(table))[1]

    def rows(self, tables: Iterable[str] | None = None) -> pl.DataFrame:
        """One row a table, of these or of all: table, version, rows, files, mb.

        From the log: also rows that newer ones have replaced.
        """
        lines, asked = [], self.versions.keys() if tables is None else {*tables}
        versions = {name: version for name, version in self.versions.items() if name in asked}
        self.root.each(self.table, versions)
        for name, version in versions.items():
            sizes, rows = delta.file_stats(self.table(name))
            lines.append((name, version, rows, len(sizes), sum(sizes) / 1e6))
        return pl.DataFrame(lines, schema=["table", "version", "rows", "files", "mb"], orient="row")


def snapshot(lake: "Lake") -> Snapshot:
    """What is published, each table at one version: the one way to read. Raises NothingPublished, storage.Damaged."""
    newest = published(lake)
    if newest is None:
        raise NothingPublished(f"nothing is published under {lake.root.url} yet: run all stages once")
    return newest


def published(lake: "Lake") -> Snapshot | None:
    """As `snapshot`; None before the first batch.

    Where `lake/pinned.json` names another root and its versions, that snapshot is read, whatever came after it.
    """
    pinned = lake.root.read_json(PINNED)
    pointer = pinned or read_pointer(lake.root)
    return of_pointer(lake.at(pinned["source_root"]) if pinned else lake, pointer) if pointer else None


def of_pointer(lake: "Lake", pointer: dict[str, Any]) -> Snapshot:
    """The snapshot that a pointer names. `under`: the folder that has its lake, where that has not been moved yet."""
    if "under" in pointer:
        lake = lake.at(lake.root.url_of(pointer["under"]))
    as_of = datetime.fromisoformat(pointer["as_of"])
    newest = {table: datetime.fromisoformat(time) for table, time in clocks_of(pointer).items() if table}
    return Snapshot(lake, pointer["batch"], as_of, pointer["tables"], pointer["run_id"], newest)


def clocks_of(pointer: dict[str, Any] | None) -> dict[str, str]:
    """Table -> its newest time, ISO 8601; of all tables under no name where an earlier release wrote the pointer."""
    if pointer is None or "clocks" in pointer:
        return dict(pointer["clocks"]) if pointer else {}
    return {"": pointer["as_of"]} if pointer["as_of"] > "1971" else {}


def read_pointer(root: Root) -> dict[str, Any] | None:
    """The pointer itself: batch, fence, as_of, tables, schemas, run_id, published_at; None before the first batch.

    Raises storage.Damaged.
    """
    return _read_pointer(root)[0]


def _read_pointer(root: Root) -> tuple[dict[str, Any] | None, str | None]:
    """As `read_pointer`, and the mark that it has."""
    pointer, mark = root.read_json_marked(POINTER)
    if pointer is not None and (lost := IN_POINTER - pointer.keys()):
        raise Damaged(f"{POINTER} is damaged: it has no {', '.join(sorted(lost))}")
    return pointer, mark


def swap_pointer(
    root: Root,
    before: dict[str, Any] | None,
    *,
    batch: int,
    as_of: str,
    versions: dict[str, int],
    run_id: str,
    schemas: dict[str, str] | None = None,
    clocks: dict[str, str] | None = None,
    fence: int = 0,
) -> dict[str, Any]:
    """Have the pointer name these versions, if it is still as `before`; returns it.

    Of two who have read the same one the second raises LeaseLost, whatever lease it believes to hold: so the pointer
    never moves back. `fence`: the number of the lease by which it is moved.

    `schemas`: table -> the fingerprint of the columns that it is known to have; None where nobody looked: then what was
    known stays so of the tables whose version does.
    """
    known, was = clocks_of(before), before
    if schemas is None:
        before = before or {"tables": {}}
        same = {table for table, version in versions.items() if before["tables"].get(table) == version}
        schemas = {table: known for table, known in before.get("schemas", {}).items() if table in same}
    pointer = {
        "batch": batch,
        "fence": fence,
        "as_of": as_of,
        "tables": versions,
        "schemas": schemas,
        "clocks": known if clocks is None else clocks,
        "run_id": run_id,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_pointer(root, was, pointer)
    return pointer


def replace_pointer(root: Root, before: dict[str, Any] | None, pointer: dict[str, Any]) -> None:
    """Put a pointer in the place of the one that is as `before`, None for none. Raises LeaseLost when it is not."""
    now, mark = _read_pointer(root)
    if now != before:
        raise LeaseLost("another run published meanwhile: run this one again")
    if root.replace(POINTER, json.dumps(pointer, indent=1).encode(), mark) is None:
        raise LeaseLost("another run published meanwhile: run this one again")
