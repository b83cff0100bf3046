"""The lake again from its archive: the same files in the same batches through the same code, then swapped in.

The archive keeps so many days (`archive_days` of compact), so a lake is made again whole only as long as none of its
days is gone: one that is not whole is refused, and nothing is touched.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from etl.lake import compaction, documents, ingest, ledger
from etl.lake import snapshot as lake
from etl.lake.landing import NAME
from etl.storage import Root
from pipeline.tables import TABLES

SCRATCH = "rebuilding"
NO_LIMIT = 1 << 40


class NotWhole(RuntimeError):
    """The archive does not have all that is in the lake."""


@dataclass(frozen=True)
class Part:
    """A batch as it was: places of its files, by name. `date`: of its archive."""

    date: str
    places: dict[str, str]


def rebuild(root: str, run_id: str = "rebuild") -> pl.DataFrame:
    """Make the lake again and put it in the place of the present one, which stays as `lake-before-<time>`.

    Returns one row a table: table, rows, rows_before, equal (null where the present one cannot be read). Files in
    landing wait meanwhile, and the index of runs moves over as it is. Raises NotWhole, etl.storage.LeaseHeld.
    """
    place = Root.at(root)
    scratch = Root.at(place.url_of(SCRATCH))
    with lake.writing(place, run_id):
        place.remove_tree(SCRATCH)
        for part in _parts(place):
            _again(place, scratch, part, run_id)
        compared = _compare(place, scratch)
        before = f"lake-before-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        if place.list(f"lake/{compaction.INDEX}"):
            place.move_tree(f"lake/{compaction.INDEX}", f"{SCRATCH}/lake/{compaction.INDEX}")
        place.move_tree("lake", before)
        place.move_tree(f"{SCRATCH}/lake", "lake")
        place.remove_tree(SCRATCH)
    return compared


def _parts(place: Root) -> list[Part]:
    """The batches, from their manifests; what none of them names comes last. Raises NotWhole."""
    there = _archived(place)
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
        parts.append(Part(manifest["date"], found))
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
        parts.append(Part(max(place.list("archive"), default=f"{datetime.now(UTC):%Y-%m-%d}"), rest))
    return parts


def _manifests(place: Root):
    """Those that can be read, in order of their numbers."""
    names = (re.fullmatch(r"(\d{8})\.json", name) for name in place.list("lake/batches"))
    for number in sorted(int(match[1]) for match in names if match):
        try:
            yield ledger.read(place, number)
        except documents.Damaged:  # its files are found by their names
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
    try:
        return (lake.read_published(place) or {"batch": 0})["batch"]
    except documents.Damaged:
        return max((manifest["batch"] for manifest in _manifests(place)), default=0)


def _readable(place: Root, number: int) -> dict | None:
    try:
        return ledger.read(place, number)
    except documents.Damaged:
        return None


def _sha256(place: Root, rel: str) -> str:
    return hashlib.sha256(place.read(rel)).hexdigest()


def _again(place: Root, scratch: Root, part: Part, run_id: str) -> None:
    """Land the files of one batch in the scratch root, and ingest them."""
    for name, rel in part.places.items():
        scratch.write(f"landing/{NAME.fullmatch(name)['table']}/{name}", place.read(rel))
    limits = {"max_files": max(len(part.places), 1), "max_bytes": NO_LIMIT, "max_bad_share": 1.0, "for_s": float("inf")}
    ingest.drain(scratch.url, **limits, scheduled_for=part.date, run_id=run_id)
    scratch.remove_tree("archive")


def _compare(place: Root, scratch: Root) -> pl.DataFrame:
    """Each table as it was made again, beside the one that is published."""
    from deltalake.exceptions import DeltaError

    rows = []
    for table in lake.COLUMNS if lake.is_published(scratch.url) else ():
        new = _content(scratch, table)
        try:
            old = _content(place, table)
        except (DeltaError, OSError, ValueError, LookupError, pl.exceptions.PolarsError):  # the reason to make it again
            old = None
        rows.append((table, new[0], old and old[0], old and old == new))
    schema = {"table": pl.String, "rows": pl.Int64, "rows_before": pl.Int64, "equal": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _content(place: Root, table: str) -> tuple[int, int]:
    """Rows, and a checksum of them in any order."""
    frame = lake.snapshot(place.url).frame(table, list(lake.COLUMNS[table])).collect()
    return frame.height, compaction.checksum(frame)
