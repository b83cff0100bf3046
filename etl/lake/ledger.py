"""The manifests: which files make a batch, written down before anything is committed (`lake/batches/<n>.json`)."""

from datetime import datetime

from etl.storage import Root


def manifest(number: int) -> str:
    """The place of a batch's manifest."""
    return f"lake/batches/{number:08d}.json"


def done(number: int) -> str:
    """The place of the mark that nothing of a batch is left to do."""
    return f"lake/batches/{number:08d}.done"


def read(place: Root, number: int) -> dict | None:
    """A manifest: batch, run_id, date (of the archive), at (the batch's time), files (name, table, tick, bytes,
    sha256), ingested. Raises storage.Damaged."""
    return place.read_json(manifest(number))


def time_of(manifest: dict, now: datetime) -> str:
    """A batch's time, ISO 8601. Where an earlier release wrote it down: `now`, or its day's end if that is later."""
    at = manifest.get("at")
    return at or max(now.isoformat(timespec="seconds"), f"{manifest['date']}T23:59:59+00:00")


def ingested_until(place: Root, number: int) -> dict[str, list[list[int]]]:
    """Table -> ranges of ticks that are in the lake once batch `number` is."""
    last = read(place, number)
    return last["ingested"] if last else {}


def sha256_of(place: Root, newest: int, name: str) -> tuple[int, str] | tuple[None, None]:
    """The batch that ingested the file `name`, and its sha256 then: the newest manifest first."""
    for number in range(newest, 0, -1):
        for file in (read(place, number) or {"files": []})["files"]:
            if file["name"] == name:
                return number, file["sha256"]
    return None, None


def contains(ranges: list[list[int]], tick: int) -> bool:
    return any(low <= tick <= high for low, high in ranges)


def with_tick(ranges: list[list[int]], tick: int) -> list[list[int]]:
    """The ranges of whole numbers with one more in them, merged: [[0, 4]] and 5 give [[0, 5]]."""
    merged: list[list[int]] = []
    for low, high in sorted([*ranges, [tick, tick]]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = [merged[-1][0], max(merged[-1][1], high)]
        else:
            merged.append([low, high])
    return merged
