"""The lake again from its archive: the same files in the same batches through the same code, then swapped in.

The archive keeps so many days (`archive_days` of compact), so a lake is made again whole only as long as none of its
days is gone: one that is not whole is refused, and nothing is touched.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from etl.lake import commit, ingest, landing, ledger, quarantine, snapshot, sorting, switch
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from etl.lake.lake import Lake

NO_LIMIT = 1 << 40
UNREADABLE = (Exception, pl.exceptions.PanicException)  # whatever a library says of what is damaged


class NotWhole(RuntimeError):
    """The archive does not have all that is in the lake."""


class RowsWouldGo(RuntimeError):
    """Rows that are in the lake would not be in the one that was made again."""


@dataclass(frozen=True)
class Part:
    """A batch as it was. `files`: path below landing -> where it is now, and how many bytes of it count, None for all.
    `date`: of its archive. `at`: its time, ISO 8601."""

    date: str
    at: str
    files: dict[str, tuple[str, int | None]]


def rebuild(lake: "Lake", run_id: str = "rebuild", accept_quarantine: bool = False) -> pl.DataFrame:
    """Make the lake again and put it in the place of the present one, which stays as `lake-before-<time>`.

    Killed before the swap it has changed nothing; killed after it, the next writer does what is left.

    Returns one row a table: table, rows, rows_before, equal (null where the present one cannot be read). Files in
    landing wait meanwhile. Files of which no line fits by now go to `refused/` too; they stay in the archive. Raises
    NotWhole, leases.LeaseHeld, and unless `accept_quarantine` RowsWouldGo when rows that are in the present one would
    be set apart; nothing is changed then.
    """
    root = lake.root
    with root.lease(commit.WRITER, run_id) as lease:
        mark, pointer = root.mark(snapshot.POINTER), None
        with contextlib.suppress(Damaged):
            pointer = snapshot.read_pointer(root)
        if pointer:
            lease.rise(pointer.get("fence", 0))
            if "under" in pointer:
                switch.finish(root, pointer, lease)
                mark = root.mark(snapshot.POINTER)
        scratch = switch.scratch(lake, lease)
        parts = _parts(lake)
        for part in parts:
            _again(lake, scratch, part, run_id)
        if not snapshot.published(scratch):
            root.remove_tree(switch.folder_of(lease))
            raise NotWhole("no line of the archive's files fits, or there are none: nothing was changed")
        if not accept_quarantine and (gone := list(_gone(lake, scratch))):
            root.remove_tree(switch.folder_of(lease))
            raise RowsWouldGo(f"{'; '.join(gone)}. Nothing was changed")
        compared = _compare(lake, scratch)
        now = datetime.now(UTC)
        least = max([_published_batch(root), *(manifest["batch"] for manifest in _manifests(root))])
        _archive(lake, parts, f"{now:%Y-%m-%d}")
        switch.begin(lake, scratch, lease, mark, least, f"lake-before-{now:%Y%m%dT%H%M%S.%f}")
        pointer = snapshot.read_pointer(root)
        if pointer and "under" in pointer:  # else another one took over and has done it
            switch.finish(root, pointer, lease)
    return compared


def _parts(lake: "Lake") -> list[Part]:
    """The batches, from the ledger; what is not in it comes last. Raises NotWhole."""
    archived, now = _archived(lake), datetime.now(UTC)
    parts: dict[int, Part] = {}
    lost: list[str] = []
    used: set[str] = set()
    rows = _ledger(lake)
    for file in rows:
        path, size = file["path"], file["bytes"]
        if quarantine.is_retried(path):  # its lines are those of another file, which is read again
            used.add(path)
            continue
        rels = archived.get(path, [])
        match = next((rel for rel in rels if _sha256(lake.root, rel, size) == file["sha256"]), None)
        if match is None:
            lost.append(path)
            continue
        at = file["at"].isoformat(timespec="seconds")
        part = parts.setdefault(file["batch"], Part(at[:10], at, {}))
        part.files[_landing_path(match)] = match, size
        used.add(path)
    if lost := [*lost, *_lost_unnamed(lake, archived, rows)]:
        raise NotWhole(
            f"the archive lacks {len(lost)} files that are in the lake, {min(lost)} among them: its days are kept for "
            f"a time only (archive_days of {lake.compacted_by}). Put them back into archive/<date>/ where they were, "
            "and try again. Nothing was changed"
        )
    rest: dict[str, tuple[str, int | None]] = {
        _landing_path(rels[-1]): (rels[-1], None) for path, rels in archived.items() if path not in used
    }
    ordered = [parts[number] for number in sorted(parts)]
    if rest or not ordered:
        ordered.append(Part(f"{now:%Y-%m-%d}", now.isoformat(timespec="seconds"), rest))
    return ordered


def _ledger(lake: "Lake") -> list[dict[str, Any]]:
    """The files of the lake, by batch: those of the table that can be read, and those of manifests."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    now = datetime.now(UTC)
    for document in _manifests(lake.root):
        at = datetime.fromisoformat(ledger.time_of(document, now)).astimezone(UTC)
        for file in document["files"]:
            path = ledger.shown(file["path"])
            rows[document["batch"], path] = file | {"path": path, "batch": document["batch"], "at": at}
    with contextlib.suppress(*UNREADABLE):
        pointer = snapshot.read_pointer(lake.root)
        if pointer and "files" in pointer["tables"]:
            rows |= {(row["batch"], row["path"]): row for row in ledger.published(lake, pointer).iter_rows(named=True)}
    return [rows[key] for key in sorted(rows)]


def _lost_unnamed(lake: "Lake", archived: dict[str, list[str]], rows: list[dict[str, Any]]) -> list[str]:
    """What is in the lake by its index, where the ledger, of which `rows` can be read, is damaged, and nowhere else."""
    known: set[str] = set()
    for document in _manifests(lake.root):
        with contextlib.suppress(*UNREADABLE):
            before = ledger.Known(lake.root, document["known"]["index"], document["known"]["recent"])
            known = before.with_files(document["batch"], document["files"]).all()
    lost = known - {*ledger.digests_of(rows)}
    for path, rels in archived.items() if lost else ():
        table = landing.table_of(lake, path)
        lost -= {ledger.of_path(path), *(ledger.of_content(str(table), _sha256(lake.root, rel)) for rel in rels)}
    return ["one whose name is not known"] * len(lost)


def _manifests(root: Root) -> Iterator[dict[str, Any]]:
    """Those that can be read, in order of their numbers."""
    names = (re.fullmatch(r"(\d{8})\.json", name) for name in root.names(ledger.BATCHES))
    for number in sorted(int(match[1]) for match in names if match):
        if manifest := _readable(root, number):  # the files of others are found by their paths
            yield manifest


def _archived(lake: "Lake") -> dict[str, list[str]]:
    """Path as text -> where it is in the archive, the oldest day first, or in landing, of a batch that was not archived
    yet."""
    root = lake.root
    rels: dict[str, list[str]] = {}
    for date in root.names("archive"):
        for below, entry in root.tree(f"archive/{date}"):
            path = _landing_path(rel := f"archive/{date}/{below}")
            if landing.table_of(lake, path) and not entry.problem:
                rels.setdefault(ledger.shown(path), []).append(rel)
    published = _published_batch(root)
    for number in (published, published + 1):
        for file in (_readable(root, number) or {"files": []})["files"]:
            if root.entry(f"landing/{file['path']}"):
                rels.setdefault(ledger.shown(file["path"]), []).append(f"landing/{file['path']}")
    return rels


def _landing_path(rel: str) -> str:
    """The path below landing/ of a file that is in the archive or in landing."""
    return landing.path_of(rel) if rel.startswith("archive/") else rel.partition("/")[2]


def _published_batch(root: Root) -> int:
    """The newest batch that may have been published."""
    with contextlib.suppress(Damaged):
        if pointer := snapshot.read_pointer(root):
            return int(pointer["batch"])
    return max((manifest["batch"] for manifest in _manifests(root)), default=0)


def _readable(root: Root, number: int) -> dict[str, Any] | None:
    try:
        return ledger.read(root, number)
    except Damaged:
        return None


def _sha256(root: Root, rel: str, size: int | None = None) -> str:
    """Of a file's first `size` bytes, of all where None."""
    return hashlib.sha256(root.read(rel)[:size]).hexdigest()


def _again(lake: "Lake", scratch: "Lake", part: Part, run_id: str) -> None:
    """Land the files of one batch in the scratch root, and ingest them."""
    for path, (rel, size) in part.files.items():
        scratch.root.write(f"landing/{path}", lake.root.read(rel)[:size])
    day = datetime.fromisoformat(part.date).replace(tzinfo=UTC)
    ingest.drain(
        scratch,
        max_files=max(len(part.files), 1),
        max_bytes=NO_LIMIT,
        max_bad_share=1.0,
        for_s=float("inf"),
        scheduled_for=part.at,
        now=day,
        run_id=run_id,
        again=True,
    )
    scratch.root.remove_tree("archive")


def _archive(lake: "Lake", parts: list[Part], date: str) -> None:
    """Copy to the archive, into the day `date`, what a batch left unfinished has in landing: once switched it is one
    that was ingested."""
    for part in parts:
        for path, (rel, size) in part.files.items():
            if rel.startswith("landing/"):
                file = replace(landing.of(lake, path, size or 0), again=True)
                lake.root.write(landing.free(lake.root, file, date), lake.root.read(rel)[:size])


def _compare(lake: "Lake", scratch: "Lake") -> pl.DataFrame:
    """Each table as it was made again, beside the one that is published."""
    rows: list[tuple[str, int, int | None, bool | None]] = []
    for table in lake.columns:
        new = _content(scratch, table)
        try:
            old = _content(lake, table)
            rows.append((table, new[0], old[0], old == new))
        except UNREADABLE:  # the reason to make it again
            rows.append((table, new[0], None, None))
    schema = {"table": pl.String, "rows": pl.Int64, "rows_before": pl.Int64, "equal": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _gone(lake: "Lake", scratch: "Lake") -> Iterator[str]:
    """A sentence for each table of which rows would go: those whose keys are not there again, and where a table has no
    key, as many as are missing."""
    for table in lake.tables:
        before, after = _keys(lake, table), _keys(scratch, table)
        if before is None:
            continue
        if after is None:
            lost = before.height
        elif keys := lake.keys[table]:
            lost = before.join(after, on=keys, how="anti").height
        else:
            lost = max(before.height - after.height, 0)
        if lost:
            why = "; ".join(_set_apart(lake, scratch, table)) or "its lines are not there again"
            yield f"{lost:,} of {before.height:,} rows of {table} would go: {why}"


def _keys(lake: "Lake", table: str) -> pl.DataFrame | None:
    """The keys of a table's rows; None where it is not there or cannot be read."""
    try:
        return snapshot.snapshot(lake).frame(table, list(lake.keys[table])).collect()
    except UNREADABLE:
        return None


def _set_apart(lake: "Lake", scratch: "Lake", table: str) -> list[str]:
    """Why lines and files of a table are not in the lake that was made again, and were in the present one; the most
    frequent reason of each."""
    reasons = []
    lines = quarantine.refused_lines(scratch).filter(pl.col("table") == table)
    with contextlib.suppress(*UNREADABLE):
        lines = lines.join(quarantine.refused_lines(lake), on=["table", "file", "line"], how="anti")
    if lines.height:
        reasons.append(f"{lines.height:,} lines to quarantine, as {_most(lines['reason'].to_list())}")
    files = [file["why"] for file in quarantine.refused_files(scratch) if file["table"] == table]
    return [*reasons, f"{len(files):,} files to refused/, as {_most(files)}"] if files else reasons


def _most(reasons: list[str]) -> str:
    return Counter(reasons).most_common(1)[0][0]


def _content(lake: "Lake", table: str) -> tuple[int, int]:
    """Rows, and a checksum of them in any order."""
    frame = snapshot.snapshot(lake).frame(table, list(lake.columns[table])).collect()
    return frame.height, sorting.checksum(frame)
