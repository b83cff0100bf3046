"""What was committed survives the loss of power, and a log that did not is put right before anything is read from it.

delta-rs does not sync what it writes to a local disk: after a power cut the last commit may be empty (then its rows
vanish without a word) or torn (then the table does not open). So before a batch is published its commits and their
data are synced, and each commit is kept a second time (`etl.lake.kept`). A run begins by comparing the two.
"""

import io
import json
from collections.abc import Iterator

import polars as pl

from etl.lake import documents, kept, ledger
from etl.lake import snapshot as lake
from etl.lake.documents import Damaged
from etl.storage import Root

LAST = "_last_checkpoint"
KEPT_VERSIONS = 10_080  # a week of a batch a minute: what `whence` can still tell when the log no longer does
REBUILD = "`orchestrate.py rebuild` makes the lake again from the archive"


def seal(place: Root, table: str, *, after: int, until: int) -> None:
    """Sync the commits above version `after` up to `until` with all they name, and keep each a second time."""
    log = f"lake/{table}/_delta_log"
    for version in range(after + 1, until + 1):
        commit = f"{log}/{version:020d}.json"
        try:
            data = place.read(commit)
        except FileNotFoundError:  # a table that a lake of an earlier layout had cleaned up
            continue
        if place.may_tear:
            place.sync([f"lake/{table}/{path}" for path, _ in _added(data)] + [commit])
        place.write(kept.place_of(table, f"{version:020d}", data), data)
        checkpoint = f"{log}/{version:020d}.checkpoint.parquet"
        if (version + 1) % lake.CHECKPOINT_INTERVAL == 0 and place.exists(checkpoint):
            place.sync([checkpoint])
            place.write(kept.place_of(table, f"{version:020d}.checkpoint", place.read(checkpoint)), b"")
    place.sync([log, f"lake/{table}"])


def repair(root: str, run_id: str = "repair") -> list[str]:
    """Look at the pointer, the newest manifest and the end of every table's log, and put right what is not whole.

    Returns what was repaired, a sentence each. Raises Damaged for what cannot be. On an object store, where nothing
    tears, nothing is looked at.
    """
    place = Root.at(root)
    if not place.may_tear or not place.exists("lake"):
        return []
    with lake.writing(place, run_id):
        return list(_repair(place))


def _repair(place: Root) -> Iterator[str]:
    if documents.heal(place, lake.PUBLISHED):
        yield f"{lake.PUBLISHED} was damaged: written again from its copy"
    published = lake.read_published(place)
    number = published["batch"] if published else 0
    for batch in (number, number + 1):
        yield from _repair_manifest(place, batch, published)
    for table in lake.COLUMNS:
        if place.exists(f"lake/{table}/_delta_log"):
            yield from _repair_log(place, table, published["tables"].get(table, -1) if published else -1, number)


def _repair_manifest(place: Root, number: int, published: dict | None) -> Iterator[str]:
    rel = ledger.manifest(number)
    try:
        if documents.heal(place, rel):
            yield f"{rel} was damaged: written again from its copy"
    except Damaged:
        begun = any(
            lake.last_batch(place, table) >= number
            for table in lake.COLUMNS
            if place.exists(f"lake/{table}/_delta_log")
        )
        if begun or (published and published["batch"] >= number):
            raise
        for name in (rel, documents.copy_of(rel)):
            place.remove(name)
        yield f"{rel} was damaged before anything was committed: removed, its files still wait"


def _repair_log(place: Root, table: str, published: int, batch: int) -> Iterator[str]:
    """The log of one table, from its newest checkpoint on. `published`: the version readers open."""
    log = f"lake/{table}/_delta_log"
    names = [name for name in place.list(log) if name[:20].isdigit()]
    commits = {int(name[:20]) for name in names if name[20:] == ".json"}
    checkpoints = [int(name[:20]) for name in names if name[20:] == ".checkpoint.parquet"]
    base = 0
    for version in reversed(checkpoints):
        if _checkpoint_is_whole(place, table, version):
            base = version
            break
        place.remove(_checkpoint(log, version))
        place.remove(f"{log}/{LAST}")
        yield f"{table}: checkpoint {version} was damaged: removed, the commits before it say the same"
    if not _hint_is_right(place, log, checkpoints):
        place.remove(f"{log}/{LAST}")
        yield f"{table}: {LAST} was damaged: removed, the log says the same"
    newest = max([*commits, published])
    for version in range(base, newest + 1):
        commit = f"{log}/{version:020d}.json"
        data = place.read(commit) if version in commits else None
        if data is None and version == base and checkpoints:  # cleaned up: the checkpoint says it all
            continue
        if data is not None and kept.has(place, table, f"{version:020d}", data):
            continue
        if (copy := kept.copy_of(place, table, f"{version:020d}")) is not None:
            place.write(commit, copy)
            yield f"{table}: commit {version} was {'damaged' if data else 'empty or gone'}: written again from its copy"
        elif data is not None and _is_whole(place, table, data, batch + 1):
            continue
        elif version > published:
            _cut_off(place, log, range(version, newest + 1))
            yield f"{table}: commit {version}, of a batch not published yet, was torn: removed, to be made again"
            return
        else:
            raise Damaged(f"{table}: commit {version} is damaged, and so is its copy: {REBUILD}")


def _cut_off(place: Root, log: str, versions: range) -> None:
    for version in reversed(versions):  # so that the log has no hole at any moment
        place.remove(_checkpoint(log, version))
        place.remove(f"{log}/{version:020d}.json")
    place.remove(f"{log}/{LAST}")


def _checkpoint_is_whole(place: Root, table: str, version: int) -> bool:
    data, what = place.read(_checkpoint(f"lake/{table}/_delta_log", version)), f"{version:020d}.checkpoint"
    if kept.has(place, table, what, data):
        return True
    if kept.sha256s(place, table, what):
        return False
    try:  # of a batch that was not sealed yet
        return pl.read_parquet(io.BytesIO(data)).height > 0
    except (pl.exceptions.PolarsError, OSError):
        return False


def _hint_is_right(place: Root, log: str, checkpoints: list[int]) -> bool:
    try:
        hint = json.loads(place.read(f"{log}/{LAST}"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return (
        isinstance(hint, dict)
        and hint.get("version") in checkpoints
        and place.exists(_checkpoint(log, hint["version"]))
    )


def _checkpoint(log: str, version: int) -> str:
    return f"{log}/{version:020d}.checkpoint.parquet"


def _is_whole(place: Root, table: str, data: bytes, newest_batch: int) -> bool:
    """Whether a commit that was not kept yet can be believed: it parses, and all that it names is there."""
    try:
        actions = [json.loads(line) for line in data.splitlines()]
        sizes = {entry.name: entry.bytes for entry in place.entries(f"lake/{table}")}
        there = all(sizes.get(path) == size for path, size in _added(data))
        batch_fits = all(a["txn"]["version"] <= newest_batch for a in actions if "txn" in a)
    except (ValueError, KeyError, TypeError):
        return False
    return bool(actions) and there and batch_fits


def _added(data: bytes) -> list[tuple[str, int]]:
    """The files that a commit adds, with their sizes."""
    actions = (json.loads(line) for line in data.splitlines())
    return [(action["add"]["path"], action["add"]["size"]) for action in actions if "add" in action]


def forget(place: Root, table: str) -> None:
    """Remove what is kept of the oldest versions, beyond a week's."""
    names = place.list(f"lake/kept_log/{table}")
    newest = max((int(name[:20]) for name in names), default=0)
    for name in names:
        if int(name[:20]) < newest - KEPT_VERSIONS:
            place.remove(f"lake/kept_log/{table}/{name}")
