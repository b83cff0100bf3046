"""A lake that begins as another one is, to see what would come of something: a root of its own, below the root.

It has the published version of each table, which it shares, and what waits in landing, which is copied. Whatever is
written, compacted or removed there, the lake that it came from knows nothing of it.
"""

import json
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

import polars as pl

from etl import delta
from etl.lake import ledger, snapshot, upsert
from etl.lake.table import BATCH, LEDGER
from etl.storage import Damaged

if TYPE_CHECKING:
    from etl.lake.lake import Lake
    from etl.lake.snapshot import Snapshot

CONTENT = "_content"  # what stands for all of a row
QUIET = timedelta(seconds=10)  # a file that is written in place, and was so recently, may not be whole
COMPARED: dict[str, pl.DataType | type[pl.DataType]] = {
    "table": pl.String,
    **dict.fromkeys(("before", "after", "added", "removed", "changed"), pl.Int64),  # rows; the last three by key
    "first": pl.String,  # the key of a row that is changed or removed; of one that is added where none is
}


def branch(lake: "Lake", folder: str) -> "Snapshot | None":
    """Make one in `folder`, below the lake's root, where nothing is yet; returns what it begins with: the snapshot that
    is published, None before the first batch. Raises storage.Damaged."""
    root = lake.root
    pointer = snapshot.read_pointer(root)
    if pointer and "under" in pointer:
        raise Damaged("a lake that was made again is not in its place yet: the next run of ingestion puts it there")
    for table, version in (pointer["tables"] if pointer else {}).items():
        delta.share(root, f"lake/{table}", version, folder)
    until = datetime.now(UTC) - QUIET
    landing = {
        f"landing/{path}"
        for path, entry in root.tree("landing")
        if not entry.problem and (entry.whole or entry.modified is None or entry.modified < until)
    }
    root.duplicate(sorted(landing), folder)
    if pointer is None:
        return None
    _share_manifests(lake, pointer["batch"], landing, folder)
    root.write(f"{folder}/{snapshot.POINTER}", json.dumps(pointer, indent=1).encode())
    return snapshot.of_pointer(lake, pointer)


def _share_manifests(lake: "Lake", published: int, landing: set[str], folder: str) -> None:
    """What tells the files that are known, and the batch that is begun, where its files came along."""
    root, last = lake.root, ledger.read(lake.root, published)
    begun = ledger.read(root, published + 1)
    rels = [ledger.manifest(published)] if last else []
    if begun and {f"landing/{file['path']}" for file in begun["files"]} <= landing:
        rels.append(ledger.manifest(published + 1))
    indexes = {(manifest or {}).get("known", {}).get("index") for manifest in (last, begun)}
    root.copy([*rels, *filter(None, indexes)], "", f"{folder}/")
    root.write(f"{folder}/{ledger.done(published)}", b"")


def again(lake: "Lake", batch: int, folder: str) -> int:
    """Have the files of a published batch wait in `folder`, a root of its own that has no table; how many there were in
    the archive."""
    root, pointer = lake.root, snapshot.read_pointer(lake.root)
    rows = ledger.published(lake, pointer, [batch]) if pointer else pl.DataFrame(schema=LEDGER)
    count = 0
    for day in (0, 1):  # it may have been archived after midnight
        by_date = rows.select(pl.format("archive/{}/{}", (pl.col("at") + timedelta(day)).dt.date(), "path"))
        archived = root.which(by_date.to_series().to_list())
        count += len(archived)
        for date in {rel.split("/")[1] for rel in archived}:
            of_date = [rel for rel in archived if rel.split("/")[1] == date]
            root.copy(of_date, f"archive/{date}", f"{folder}/landing")
    return count


def differences(before: "Snapshot | None", after: "Snapshot | None") -> pl.DataFrame:
    """How a lake that went on from a snapshot differs from it, with the columns of COMPARED; a row a table that does.

    A file that both have is the same, so the cost is that of the others' rows.
    """
    tables = dict.fromkeys(chain(before.versions if before else (), after.versions if after else ()))
    lines = [_table(table, before, after) for table in tables]
    return pl.DataFrame([line for line in lines if line], schema=COMPARED, orient="row")


def _table(table: str, before: "Snapshot | None", after: "Snapshot | None") -> tuple[Any, ...] | None:
    sides = [snap if snap and table in snap.versions else None for snap in (before, after)]
    files = [{file.rel: file for file in delta.files(snap.table(table))} if snap else {} for snap in sides]
    own = [[file for rel, file in a.items() if rel not in b] for a, b in (files, files[::-1])]
    if not any(own):
        return None
    some = next(snap for snap in sides[::-1] if snap)
    key = [*some.lake.keys[table]] or [CONTENT]
    lazily = [_rows(snap or some, table, of_snap) for snap, of_snap in zip(sides, own, strict=True)]
    if some.lake.upserts(table):  # another file may have the row that counts
        touched = pl.concat(lazily).select(key).unique().collect().lazy()
        all_of = [_content(snap, table, snap.frame(table, _columns(snap, table))) if snap else None for snap in sides]
        lazily = [rows.join(touched, on=key, how="semi") if rows is not None else lazily[0].clear() for rows in all_of]
    old, new = pl.collect_all(lazily)
    counts = [snap.row_count(table) if snap else 0 for snap in sides]
    if _sum(old) == _sum(new):  # the same rows in other files
        return (table, *counts, 0, 0, 0, "")
    added, removed = (a.join(b, on=key, how="anti", nulls_equal=True) for a, b in ((new, old), (old, new)))
    both = new.unique(key, keep="last").join(old.unique(key, keep="last"), on=key, nulls_equal=True, suffix=".before")
    changed = both.filter(pl.col(CONTENT) != pl.col(f"{CONTENT}.before")) if key != [CONTENT] else both.clear()
    first = next((rows.select(key).row(0) for rows in (changed, removed, added) if rows.height), ())
    said = ", ".join(f"{name} {value}" for name, value in zip(key, first, strict=False) if name != CONTENT)
    return (table, *counts, added.height, removed.height, changed.height, said)


def _sum(rows: pl.DataFrame) -> tuple[int, ...]:
    """What rows have in common with the same ones in any order. In halves, of which a sum has room in 64 bits."""
    halves = [(pl.col(CONTENT) // 2**32).sum().alias("high"), (pl.col(CONTENT) % 2**32).sum().alias("low")]
    return (rows.height, *rows.select(halves).row(0))


def _columns(snap: "Snapshot", table: str) -> list[str]:
    return [name for name in snap.lake.columns[table] if name != BATCH]


def _rows(snap: "Snapshot", table: str, files: list[delta.File]) -> pl.LazyFrame:
    """The rows of some files of a table: key and content."""
    if not files:
        return _content(snap, table, snap.frame(table, _columns(snap, table)).clear())
    folder, schema = snap.root.url_of(f"lake/{table}"), pl.scan_delta(snap.table(table)).collect_schema()
    urls = [upsert.File(f"{folder}/{file.rel}", file.values) for file in files]
    rows = upsert.scan(urls, schema, snap.root.storage_options)
    return _content(snap, table, rows.with_columns(snap.otherwise(table)))


def _content(snap: "Snapshot", table: str, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Of rows the key, and what stands for all the rest."""
    return rows.select(*snap.lake.keys[table], pl.struct(_columns(snap, table)).hash().alias(CONTENT))
