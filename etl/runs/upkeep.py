"""The files of the index of runs: many small ones become one, and what nothing needs any more is removed.

Runs go on appending meanwhile. delta-rs's own compaction is not used: it syncs nothing, and when the loss of power
tears its commit, the index does not open, with all that was appended since.
"""

import datetime
import io
import uuid
from collections.abc import Mapping, Sequence

from etl import delta
from etl.runs.index import INDEXED, TABLE, move_from_lake
from etl.storage import Damaged, Root, crash_point

KEPT_HOURS = 24  # from when a file is not needed any more, or was left by somebody who was killed
SEEN_HOURS = 6
FEW = 8  # files that are left as they are
LARGE = 16_000_000  # bytes of a file that is left as it is


def tidy(root: Root) -> None:
    """Remove what nothing needs, and make one file of the small ones; safe to kill, to repeat and to run twice at once.

    Raises Damaged, and what a library raises for a file that cannot be read: then the index stays as it was.
    """
    move_from_lake(root)
    if delta.newest_version(root, TABLE) is not None:
        remove_unneeded(root)
        compact(root)


def compact(root: Root) -> None:
    """Make one file of the small ones, its rows in the order in which the runs started."""
    import polars as pl

    sizes = delta.sizes(root.table(TABLE))
    small = worth_it(sizes)
    if not small:
        return
    parts = root.each(lambda name: pl.read_parquet(io.BytesIO(root.read(f"{TABLE}/{name}"))), small)
    # an older release's files lack the newer columns
    rows = pl.concat(parts, how="diagonal").sort("started_at", "run_id")
    path = f"compacted-{uuid.uuid4()}.parquet"
    added = delta.put(root, TABLE, path, rows, changes=False, columns=INDEXED)
    if not pl.read_parquet(io.BytesIO(root.read(f"{TABLE}/{path}"))).equals(rows):
        raise Damaged(f"{TABLE}/{path} does not have the rows that were written: the index stays as it was")
    crash_point("index compacted, not swapped")
    info = delta.commit_info("OPTIMIZE", {"operationParameters": {"predicate": "[]"}, "stage": "sweep"})
    gone = [delta.remove(name, sizes[name]) for name in small]
    lines = [info, *gone, added]
    while {*small} <= delta.sizes(table := root.table(TABLE)).keys():
        if delta.commit(root, TABLE, table.version() + 1, lines):
            return
    root.remove(f"{TABLE}/{path}")  # another compaction was there before


def worth_it(sizes: Mapping[str, int]) -> list[str]:
    """The files to make one of: the smallest, as long as one has no more bytes than all before it; none when they are
    few. So rows are written again only as often as the index doubles, and 2^n rows are in about n files."""
    ordered = sorted((size, path) for path, size in sizes.items() if size < LARGE)
    count = total = 0
    for number, (size, _) in enumerate(ordered, 1):
        count = number if size <= total else count
        total += size
    return [path for _, path in ordered[:count]] if count > FEW else []


def remove_unneeded(root: Root) -> None:
    """Remove the files that the newest version has not named for a day, and what killed processes left, a day old.

    By the machine's clock and by the store's, whichever is behind, and at most a day's worth at a time. Between two
    files no more than SEEN_HOURS are believed to have passed: the clock may have been moved. A file that the newest
    version names stays, whatever they say.
    """
    # listed before the version is opened, so that what is committed meanwhile is not among them
    parquet = [entry for entry in root.entries(TABLE) if entry.name.endswith(".parquet")]
    modified = {entry.name: entry.modified for entry in parquet if entry.modified}
    table = root.table(TABLE)
    if not modified:
        return
    kept = datetime.timedelta(hours=KEPT_HOURS)
    now = min(max(modified.values()), datetime.datetime.now(datetime.UTC))
    before = _seen_ago(sorted(modified.values()), now, kept)
    # full: a checkpoint forgets what was removed long ago, and nobody wrote down what a killed process left
    unneeded = table.vacuum(retention_hours=KEPT_HOURS, dry_run=True, enforce_retention_duration=False, full=True)
    old = {name for name in {*unneeded} - delta.sizes(table).keys() if name in modified and modified[name] < before}
    until = min((modified[name] for name in old), default=now) + datetime.timedelta(days=1)
    root.remove_all(f"{TABLE}/{name}" for name in sorted(old) if modified[name] < until)
    root.remove_unfinished(TABLE, before=before)


def _seen_ago(
    times: Sequence[datetime.datetime], now: datetime.datetime, span: datetime.timedelta
) -> datetime.datetime:
    """The time that was `span` ago, of time that was seen to pass. `times`: when something was written, in order."""
    later = now
    for earlier in reversed([time for time in times if time < now]):
        passed = min(later - earlier, datetime.timedelta(hours=SEEN_HOURS))
        if passed >= span:
            return later - span
        span, later = span - passed, earlier
    return later - span
