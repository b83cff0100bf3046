"""The lake again from its archive: the same files in the same batches through the same code, then swapped in.

The archive keeps so many days (`archive_days` of compact), so a lake is made again whole only as long as none of its
days is gone: one that is not whole is refused, and nothing is touched.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from etl.lake import compaction, ingest, ledger, quarantine
from etl.lake import snapshot as lake
from etl.lake.landing import NAME
from etl.storage import Damaged, Root
from pipeline.tables import TABLES

SCRATCH = "rebuilding"
NO_LIMIT = 1 << 40
UNREADABLE = (Exception, pl.exceptions.PanicException)  # whatever a library says of what is damaged


class NotWhole(RuntimeError):
    """The archive does not have all that is in the lake."""


class RowsWouldGo(RuntimeError):
    """Rows that are in the lake would not be in the one that was made again."""


@dataclass(frozen=True)
class Part:
    """A batch as it was: places of its files, by name. `date`: of its archive. `at`: its time, ISO 8601."""

    date: str
    at: str
    places: dict[str, str]


def rebuild(root: str, run_id: str = "rebuild", accept_quarantine: bool = False) -> pl.DataFrame:
    """Make the lake again and put it in the place of the present one, which stays as `lake-before-<time>`.

    Returns one row a table: table, rows, rows_before, equal (null where the present one cannot be read). Files in
    landing wait meanwhile. Files of which no line fits by now go to `refused/` too; they stay in the archive. Raises
    NotWhole, storage.LeaseHeld, and unless `accept_quarantine` RowsWouldGo when rows that are in the present one would
    be set apart; nothing is changed then.
    """
    place = Root.at(root)
    scratch = Root.at(place.url_of(SCRATCH))
    with lake.writing(place, run_id):
        place.remove_tree(SCRATCH)
        for part in _parts(place):
            _again(place, scratch, part, run_id)
        if not lake.is_published(scratch.url):
            place.remove_tree(SCRATCH)
            raise NotWhole("no line of the archive's files fits, or there are none: nothing was changed")
        if not accept_quarantine and (gone := list(_gone(place, scratch))):
            place.remove_tree(SCRATCH)
            raise RowsWouldGo(f"{'; '.join(gone)}. Nothing was changed")
        compared = _compare(place, scratch)
        before = f"lake-before-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        place.move_tree("lake", before)
        place.move_tree(f"{SCRATCH}/lake", "lake")
        for rel in place.files(f"{SCRATCH}/refused"):
            place.move(rel, rel.removeprefix(f"{SCRATCH}/"))
        place.remove_tree(SCRATCH)
    return compared


def _parts(place: Root) -> list[Part]:
    """The batches, from their manifests; what none of them names comes last. Raises NotWhole."""
    there, now = _archived(place), datetime.now(UTC)
    manifests = list(_manifests(place))
    parts, lost, used = [], [], set()
    for manifest in manifests:
        found = {}
        for file in manifest["files"]:
            match = next((rel for rel in there.get(file["name"], []) if _sha256(place, rel) == file["sha256"]), None)
            if match is None:
                lost.append(file["name"])
            else:
                found[file["name"]] = match
        used |= found.keys()
        parts.append(Part(manifest["date"], ledger.time_of(manifest, now), found))
    known = {file["name"] for manifest in manifests for file in manifest["files"]}
    for table, ranges in (manifests[-1]["ingested"] if manifests else {}).items():
        names = (f"{table}-{tick:08d}.json" for low, high in ranges for tick in range(low, high + 1))
        lost += [name for name in names if name not in known and name not in there]
    if lost:
        raise NotWhole(
            f"the archive lacks {len(lost)} files that are in the lake, {min(lost)} among them: its days are kept for "
            f"a time only (archive_days of compact). Put them back into archive/<date>/<table>/ and try again. "
            "Nothing was changed"
        )
    rest = {name: rels[-1] for name, rels in there.items() if name not in used}
    if rest or not parts:
        parts.append(Part(f"{now:%Y-%m-%d}", now.isoformat(timespec="seconds"), rest))
    return parts


def _manifests(place: Root):
    """Those that can be read, in order of their numbers."""
    names = (re.fullmatch(r"(\d{8})\.json", name) for name in place.list("lake/batches"))
    for number in sorted(int(match[1]) for match in names if match):
        try:
            yield ledger.read(place, number)
        except Damaged:  # its files are found by their names
            continue


def _archived(place: Root) -> dict[str, list[str]]:
    """Name -> its places in the archive, the oldest day first, or in landing, of a batch that was not archived yet."""
    found: dict[str, list[str]] = {}
    folders = [f"archive/{date}" for date in place.list("archive")]
    for folder in folders:
        for table in TABLES:
            for name in place.list(f"{folder}/{table}"):
                if NAME.fullmatch(name):
                    found.setdefault(name, []).append(f"{folder}/{table}/{name}")
    published = _published_batch(place)
    for number in (published, published + 1):
        for file in (_readable(place, number) or {"files": []})["files"]:
            rel = f"landing/{file['table']}/{file['name']}"
            if place.entry(rel):
                found.setdefault(file["name"], []).append(rel)
    return found


def _published_batch(place: Root) -> int:
    """The newest batch that may have been published."""
    with contextlib.suppress(Damaged):
        if published := lake.read_published(place):
            return published["batch"]
    return max((manifest["batch"] for manifest in _manifests(place)), default=0)


def _readable(place: Root, number: int) -> dict | None:
    try:
        return ledger.read(place, number)
    except Damaged:
        return None


def _sha256(place: Root, rel: str) -> str:
    return hashlib.sha256(place.read(rel)).hexdigest()


def _again(place: Root, scratch: Root, part: Part, run_id: str) -> None:
    """Land the files of one batch in the scratch root, and ingest them."""
    for name, rel in part.places.items():
        scratch.write(f"landing/{NAME.fullmatch(name)['table']}/{name}", place.read(rel))
    limits = {"max_files": max(len(part.places), 1), "max_bytes": NO_LIMIT, "max_bad_share": 1.0, "for_s": float("inf")}
    day = datetime.fromisoformat(part.date).replace(tzinfo=UTC)
    ingest.drain(scratch.url, **limits, scheduled_for=part.at, now=day, run_id=run_id)
    scratch.remove_tree("archive")


def _compare(place: Root, scratch: Root) -> pl.DataFrame:
    """Each table as it was made again, beside the one that is published."""
    rows = []
    for table in lake.COLUMNS:
        new = _content(scratch, table)
        try:
            old = _content(place, table)
        except UNREADABLE:  # the reason to make it again
            old = None
        rows.append((table, new[0], old and old[0], old and old == new))
    schema = {"table": pl.String, "rows": pl.Int64, "rows_before": pl.Int64, "equal": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _gone(place: Root, scratch: Root) -> Iterator[str]:
    """A sentence for each table of which rows would go: those whose keys are not there again."""
    for table in TABLES:
        before, after = (_keys(one, table) for one in (place, scratch))
        if before is None:
            continue
        lost = before.height if after is None else before.join(after, on=before.columns, how="anti").height
        if lost:
            why = "; ".join(_set_apart(scratch, table)) or "its lines are not there again"
            yield f"{lost:,} of {before.height:,} rows of {table} would go: {why}"


def _keys(place: Root, table: str) -> pl.DataFrame | None:
    """The keys of a table's rows; None where it is not there or cannot be read."""
    try:
        return lake.snapshot(place.url).frame(table, list(lake.KEYS[table])).collect()
    except UNREADABLE:
        return None


def _set_apart(scratch: Root, table: str) -> list[str]:
    """Why lines and files of a table are not in the lake that was made again; the most frequent reason of each."""
    found = []
    lines = lake.snapshot(scratch.url).frame("quarantine").filter(pl.col("table") == table).collect()
    if lines.height:
        found.append(f"{lines.height:,} lines to quarantine, as {_most(lines['reason'].to_list())}")
    files = [one["why"] for one in quarantine.refused_files(scratch.url) if one["table"] == table]
    return [*found, f"{len(files):,} files to refused/, as {_most(files)}"] if files else found


def _most(reasons: list[str]) -> str:
    return Counter(reasons).most_common(1)[0][0]


def _content(place: Root, table: str) -> tuple[int, int]:
    """Rows, and a checksum of them in any order."""
    frame = lake.snapshot(place.url).frame(table, list(lake.COLUMNS[table])).collect()
    return frame.height, compaction.checksum(frame)
