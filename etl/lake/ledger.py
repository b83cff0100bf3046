"""The manifests: which files make a batch, written down before anything is committed (`lake/batches/<n>.json`)."""

from datetime import datetime
from typing import Any, TypeAlias

from etl.storage import Root

Ingested: TypeAlias = dict[str, list[list[int]]]  # table -> ranges of the sequences of its files


def manifest(number: int) -> str:
    """The path of a batch's manifest."""
    return f"lake/batches/{number:08d}.json"


def done(number: int) -> str:
    """The path of the mark that nothing of a batch is left to do."""
    return f"lake/batches/{number:08d}.done"


def read(root: Root, number: int) -> dict[str, Any] | None:
    """A manifest: batch, run_id, date (of the archive), at (the batch's time), files (name, table, bytes, sha256),
    declared (what stands for the declaration of the tables), ingested. Raises storage.Damaged."""
    return root.read_json(manifest(number))


def time_of(manifest: dict[str, Any], now: datetime) -> str:
    """A batch's time, ISO 8601. Where an earlier release wrote it down: `now`, or its day's end if that is later."""
    at = manifest.get("at")
    return at or max(now.isoformat(timespec="seconds"), f"{manifest['date']}T23:59:59+00:00")


def ingested_until(root: Root, number: int) -> Ingested:
    """What is in the lake once batch `number` is."""
    last = read(root, number)
    return last["ingested"] if last else {}


def sha256_of(root: Root, newest: int, name: str) -> tuple[int, str] | tuple[None, None]:
    """The batch that ingested the file `name`, and its sha256 then: the newest manifest first."""
    for number in range(newest, 0, -1):
        for file in (read(root, number) or {"files": []})["files"]:
            if file["name"] == name:
                return number, file["sha256"]
    return None, None


def contains(ranges: list[list[int]], sequence: int) -> bool:
    return any(low <= sequence <= high for low, high in ranges)


def with_sequence(ranges: list[list[int]], sequence: int) -> list[list[int]]:
    """The ranges of whole numbers with one more in them, merged: [[0, 4]] and 5 give [[0, 5]]."""
    merged: list[list[int]] = []
    for low, high in sorted([*ranges, [sequence, sequence]]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = [merged[-1][0], max(merged[-1][1], high)]
        else:
            merged.append([low, high])
    return merged
