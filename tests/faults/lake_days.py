"""Days of a lake on a clock of their own: what somebody may still read stays for a day, and nothing else does."""

import itertools
import os
import random
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
from faults.lake_world import NotHeld, World, stage

from etl.lake import Snapshot, compaction
from etl.storage import Root
from pipeline import Lake

EVERY_H = 3  # between two compactions
KEEP_H = 24
CHECKED = 6  # snapshots a compaction that are read again, the oldest first
SUMS = "select count(*), sum(hash(columns(*)))"


@dataclass
class Reader:
    """Somebody who opened a snapshot. `left_at_h`: when another one was published; None while it is the newest."""

    snapshot: Snapshot
    saw: dict[str, tuple]
    left_at_h: int | None = None


def superseded(n: int, seed: int) -> str:
    """n days of batches, compactions and killed runs; every reader of the last day reads what it read then.

    Raises NotHeld when one does not, and when a file is left that nothing has needed for a day.
    """
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder:
        world = World(Path(folder), seed)
        place, began = Root.at(world.root), datetime.now(UTC)
        readers: list[Reader] = []
        needed: dict[str, int] = {}  # file -> the last hour at which it was
        removed = most = 0
        for hour in range(0, 24 * n + 1, EVERY_H):
            for _ in range(pick.randint(1, 4)):
                world.land(1, small_tables=True)
                stage("preprocess", world.root)
                _open(world.root, readers, hour)
            needed |= dict.fromkeys(_leave(place, pick, began + timedelta(hours=hour)), hour)
            needed |= dict.fromkeys(_named_by(place, readers), hour)
            done = Lake(world.root).compact(
                target_mb=64,
                min_small_files=2,
                vacuum_hours=KEEP_H,
                run_id=f"compact-{hour}",
                now=began + timedelta(hours=hour),
            )
            if failed := done.drop_nulls("failed")["failed"].to_list():
                raise NotHeld(f"hour {hour}: {failed}")
            _open(world.root, readers, hour)
            removed += done["removed"].sum()
            readers = [reader for reader in readers if reader.left_at_h is None or hour - reader.left_at_h < KEEP_H]
            for reader in [readers[0], *pick.sample(readers, min(CHECKED, len(readers)))]:
                if (sees := _read(reader.snapshot)) != reader.saw:
                    raise NotHeld(f"hour {hour}: a reader of the last day sees {sees}, and saw {reader.saw}")
            needed |= dict.fromkeys(_named_by(place, readers), hour)
            left = _left(place)
            if old := sorted(f"{name}, {hour - needed[name]} h" for name in left if hour - needed[name] >= KEEP_H):
                raise NotHeld(
                    f"hour {hour}: {len(old)} of {len(left)} files are left of which nobody had need: {old[:3]}"
                )
            most = max(most, len(left))
            _age(place)
        world.verify()
        return (
            f"{n} days: {len(needed)} files, at most {most} at once, {removed} removed, {world.next_tick} ticks exact"
        )


def _open(root: str, readers: list[Reader], hour: int) -> None:
    """A reader of what is published now; whoever had read the one before is on an old one from now on."""
    if readers:
        readers[-1].left_at_h = hour
    snapshot = Lake(root).snapshot()
    readers.append(Reader(snapshot, _read(snapshot)))


def _read(snapshot: Snapshot) -> dict[str, tuple]:
    """What DuckDB reads in the very files."""
    with duckdb.connect() as db:
        return {t: db.sql(f"{SUMS} from read_parquet({snapshot.files(t)})").fetchone() for t in ("orders", "lineitem")}


def _leave(place: Root, pick: random.Random, now: datetime) -> list[str]:
    """What runs that were killed now have left; their names."""
    names = {f"lake/orders/batch-{pick.randrange(10**8):08d}-x.zstd.parquet", f"lake/orders/.{pick.random()}.part"}
    names |= {f"lake/part/compacted-{pick.random()}.snappy.parquet", f"lake/lineitem/_delta_log/.{pick.random()}.part"}
    for name in names:
        place.write(name, b"x")
        os.utime(f"{place.url}/{name}", (int(now.timestamp()),) * 2)
    return sorted(names)


def _named_by(place: Root, readers: list[Reader]) -> set[str]:
    """The files of what is published now, and of the newest versions."""
    newest = readers[-1].snapshot
    published = itertools.chain.from_iterable(newest.files(table) for table in newest.versions)
    ahead = itertools.chain.from_iterable(
        Lake(place).table(table).file_uris() for table in compaction.tables(Lake(place.url))
    )
    return {os.path.relpath(url, place.url) for url in (*published, *ahead)}


def _left(place: Root) -> list[str]:
    """Every data file that is there, and what is half written."""
    tables = [
        path
        for table in compaction.tables(Lake(place.url))
        for path in Path(place.url, "lake", table).glob("*.parquet")
    ]
    return [os.path.relpath(path, place.url) for path in (*tables, *Path(place.url).rglob(".*.part"))]


def _age(place: Root) -> None:
    """The log becomes older by as long as it is until the next compaction: its cleanup goes by files' own times."""
    for path in Path(place.url, "lake").glob("*/_delta_log/*"):
        if not path.name.endswith(".part"):
            then = path.stat().st_mtime - EVERY_H * 3600
            os.utime(path, (then, then))
