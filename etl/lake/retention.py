"""What of the lake goes, and when: by what was seen, never by what is claimed, and at most a day's worth in a run.

A clock that jumps ahead makes a week of what is a minute old. So the times of runs are remembered (`lake/clock.json`):
what lies between two runs that are days apart is no time that passed, as far as anybody saw, and makes nothing older.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote

from etl import delta
from etl.lake import snapshot
from etl.storage import Damaged, Root, crash_point

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake

VACUUM_HOURS = 24  # at least: a reader may still be on a version this old
ARCHIVE_DAYS, REFUSED_DAYS = 7, 90
ASIDE_DAYS = 30  # of a lake that a rebuild or restore moved aside
WRITTEN = ("lake", "landing", "archive", "refused", "results", "models", "reports")  # where killed runs leave `.part`
SCRATCH = re.compile(r"rebuilding(-\d+)?|restoring")  # a rebuild or restore that was killed leaves it
ASIDE = re.compile(r"\w+-before-(\d{8}T\d{6}\.\d{6})")
CLOCK, NOW = "lake/clock.json", "lake/now"
SLACK = timedelta(minutes=5)  # between two machines' clocks
GAP = timedelta(days=2)  # without a run: the clock may have been moved
DAY = timedelta(days=1)
PAUSES = 100  # that are remembered


@dataclass(frozen=True)
class Clock:
    """The time by which things are old. `problem`: why nothing is removed now. `pauses`: from, to; in them no run came,
    so nobody knows whether time passed or the clock was moved."""

    now: datetime
    problem: str | None
    pauses: tuple[tuple[datetime, datetime], ...] = ()

    def age(self, moment: datetime) -> timedelta:
        """How long ago, of time that was seen to pass."""
        unseen = (min(end, self.now) - max(begin, moment) for begin, end in self.pauses)
        return self.now - moment - sum((max(span, timedelta(0)) for span in unseen), timedelta(0))


def clock(root: Root, now: datetime | None, hours: int) -> Clock:
    """The machine's clock, or `now`, as far as it can be believed; in an object store no later than the store's own.

    It has a problem when it is before what is published, or was not steady for `hours`: after a jump, or a pause that
    looks the same.
    """
    if now is None:
        now = datetime.now(UTC)
        if not root.may_tear:
            root.write(NOW, b"")
            entry = root.entry(NOW)
            now = min(now, entry.modified + SLACK) if entry and entry.modified else now
    published = snapshot.read_pointer(root)
    newest = datetime.fromisoformat(published["published_at"]) if published else now
    last, since, pauses = _remembered(root) or (now, now, [])
    jumped = now < last - SLACK or now > last + GAP
    if jumped:
        since = now
        pauses = [*pauses, (last, now)][-PAUSES:] if now > last else pauses
    spans = [[begin.isoformat(), end.isoformat()] for begin, end in pauses]
    told = {"steady_since": since.isoformat(), "seen": now.isoformat(), "pauses": spans}
    root.write(CLOCK, json.dumps(told).encode())
    problem = None
    if now < newest - SLACK:
        problem = f"the clock says {now:%Y-%m-%d %H:%M}, before the newest snapshot, of {newest:%Y-%m-%d %H:%M}"
    elif jumped:
        problem = f"the clock went from {last:%Y-%m-%d %H:%M} to {now:%Y-%m-%d %H:%M} between two runs"
    elif now - since < timedelta(hours=hours):
        problem = f"the clock is known to be steady only since {since:%Y-%m-%d %H:%M}"
    return Clock(now, problem, tuple(pauses))


def _remembered(root: Root) -> tuple[datetime, datetime, list[tuple[datetime, datetime]]] | None:
    """When the last run came, since when the clock is steady, the pauses; None where nothing is known."""
    try:
        seen = root.read_json(CLOCK)
        if seen is None:
            return None
        pauses = [(datetime.fromisoformat(begin), datetime.fromisoformat(end)) for begin, end in seen.get("pauses", ())]
        return datetime.fromisoformat(seen["seen"]), datetime.fromisoformat(seen["steady_since"]), pauses
    except (Damaged, KeyError, TypeError, ValueError):
        return None


def sweep(
    lake: "Lake",
    table: str,
    newest: "DeltaTable",
    published: int | None,
    began: set[str],
    hours: int,
    clock: Clock,
) -> int:
    """Remove the Parquet files that neither the newest version nor a published one has needed for `hours`; how many.

    Since when is kept in `lake/unneeded/<table>.json`, as each sweep sees it. The log cannot tell: checkpoints forget
    what was removed, nobody ever wrote down what a killed run left, and a removal that is old may still be published.
    Nor can a file's own time, which is when it was written. So a file that is about to be committed has a day as well.
    `began`: the files that were published when the run began; what it superseded was needed until now.
    """
    root = lake.root
    files = delta.data_names(root, f"lake/{table}")
    needed = names_of(newest)
    if published not in (None, newest.version()):
        needed |= names_of(lake.table(table, published))
    memory = f"lake/unneeded/{table}.json"
    before = _unneeded(root, memory)
    since = {
        name: clock.now if name in began else min(before.get(name, clock.now), clock.now) for name in files - needed
    }
    old = set() if clock.problem else _days_worth(since, timedelta(hours=hours), clock)
    old = {name for name in old if not ((entry := root.entry(f"lake/{table}/{name}")) and entry.problem)}  # no file
    root.remove_all(f"lake/{table}/{name}" for name in sorted(old))
    crash_point(f"swept: {table}")
    left = {name: seen for name, seen in since.items() if name not in old}
    if left != before:
        by_time: dict[str, list[str]] = {}
        for name in sorted(left):
            by_time.setdefault(left[name].isoformat(), []).append(name)
        root.write(memory, json.dumps({"since": by_time}).encode())
    if not clock.problem and published in (None, newest.version()):  # readers open the published one by its log
        newest.cleanup_metadata()  # what the log's retention allows; a checkpoint alone was not seen to do it
    return len(old)


def _days_worth(since: Mapping[str, datetime], kept: timedelta, clock: Clock) -> set[str]:
    """What is older than `kept`, of a day after the oldest of it."""
    old = {name: seen for name, seen in since.items() if clock.age(seen) >= kept}
    until = min(old.values(), default=clock.now) + DAY
    return {name for name, seen in old.items() if seen < until}


def names_of(handle: "DeltaTable") -> set[str]:
    """The paths of a version's files below the table's folder, as the log has them and as they are on the disk."""
    names = delta.sizes(handle).keys()
    return names | {unquote(name) for name in names}


def _unneeded(root: Root, memory: str) -> dict[str, datetime]:
    """Name -> since when; nothing is known when it is damaged, and everything has another day."""
    try:
        by_time = (root.read_json(memory) or {"since": {}})["since"]
        return {name: datetime.fromisoformat(time) for time, names in by_time.items() for name in names}
    except (Damaged, KeyError, TypeError, ValueError, AttributeError):
        return {}


def remove_unfinished(root: Root, hours: int, clock: Clock) -> None:
    """Remove what runs that were killed left half written, once nothing was written to it for `hours`."""
    if not clock.problem:
        for folder in WRITTEN:
            root.remove_unfinished(folder, before=clock.now - timedelta(hours=hours))


def prune(
    lake: "Lake", *, archive_days: int = ARCHIVE_DAYS, refused_days: int = REFUSED_DAYS, now: datetime | None = None
) -> list[str]:
    """Remove the oldest day of `archive/` and of `refused/` that nothing was put into for so many days, the oldest lake
    that was moved aside for as long as ASIDE_DAYS, and what a killed rebuild or restore left. Returns their paths.

    What is removed cannot be made again, so it is one of each in a run, nothing while the clock looks wrong, and by
    when files really came: a day's name may be one that somebody asked for. With 0 days nothing goes.
    """
    root, seen = lake.root, clock(lake.root, now, VACUUM_HOURS)
    if seen.problem:
        return []
    gone = [*_oldest_day(root, "archive", archive_days, seen), *_oldest_day(root, "refused", refused_days, seen)]
    gone += [*_oldest_aside(root, seen), *_left_over(root, seen)]
    for folder in gone:
        root.remove_tree(folder)
    return gone


def _oldest_day(root: Root, folder: str, days: int, seen: Clock) -> Iterator[str]:
    """The first day's folder that nothing was put into for `days`. What is no day is left alone."""
    oldest = (seen.now - days * DAY).date()
    for name in root.names(folder) if days else ():
        newest = None if _is_recent(name, oldest, seen.now.date()) else root.newest(f"{folder}/{name}")
        if newest and newest.date() < oldest and seen.age(newest) > days * DAY:
            yield f"{folder}/{name}"
            return


def _is_recent(day: str, oldest: date, today: date) -> bool:
    """Whether a folder's name says that there is no need to look into it; one that is no day is left alone."""
    try:
        return oldest <= date.fromisoformat(day) <= today
    except ValueError:
        return True


def _oldest_aside(root: Root, seen: Clock) -> Iterator[str]:
    """The first folder that was moved aside long ago: its name says when, unless something was put into it since."""
    for name in root.names(""):
        if match := ASIDE.fullmatch(name):
            moved = datetime.strptime(match[1], "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC)
            newest = root.newest(name)
            if newest and seen.age(max(moved, newest)) > ASIDE_DAYS * DAY:
                yield name
                return


def _left_over(root: Root, seen: Clock) -> Iterator[str]:
    for name in filter(SCRATCH.fullmatch, root.names("")):
        newest = root.newest(name)
        if newest and seen.age(newest) > DAY:
            yield name
