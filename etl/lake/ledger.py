"""Which files are in the lake, by their paths and contents: the manifests, the table `files`, and an index of both.

`lake/batches/<n>.json` is a batch as it was written down before anything was committed. The table `files` has a row for
each file of the batches that were committed; their manifests go with a later compaction. To tell a new file from one
that is known costs a binary search, however many there are: `lake/known/` has the digests of all paths and contents,
sorted, each with its batch, up to some batch, and a manifest names it and has those since. A digest that is found is a
reason to look into the table, in the rows of that batch, never the answer. The index says nothing that the table does
not, so it is made again where it is missing.
"""

import contextlib
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from etl import delta
from etl.lake import snapshot
from etl.lake.table import LEDGER
from etl.storage import Damaged, Root, crash_point

if TYPE_CHECKING:
    import numpy as np

    from etl.lake.lake import Lake

BATCHES, INDEXES = "lake/batches", "lake/known"
RECENT = 1000  # digests that a manifest has, at most: then they go into the index
WHOLE = 100_000  # digests: an index of fewer is read as a whole
RECORD_BYTES = 12  # of an index: all digests, 8 bytes each, then their batches, 4 each
NUMBERED = re.compile(r"(\d{8})\.(json|done)")
INDEX = re.compile(r"\d{8}-([0-9a-f]{8})\.index")


def manifest(number: int) -> str:
    """The path of a batch's manifest."""
    return f"{BATCHES}/{number:08d}.json"


def done(number: int) -> str:
    """The path of the mark that nothing of a batch is left to do."""
    return f"{BATCHES}/{number:08d}.done"


def read(root: Root, number: int) -> dict[str, Any] | None:
    """A manifest: batch, run_id, date (of the archive), at (the batch's time), files (path, table, bytes, sha256),
    declared (what stands for the declaration of the tables), known (what was before it). Raises storage.Damaged."""
    document = root.read_json(manifest(number))
    if document:  # until November 2026 a file had a name in the folder of its table
        for file in document["files"]:
            file.setdefault("path", f"{file['table']}/{file.get('name')}")
    return document


def there(root: Root, number: int) -> set[str]:
    """Which of the manifests of a batch and the next one, and of the mark that the first is done, there are."""
    return root.which([manifest(number), done(number), manifest(number + 1)])


def time_of(manifest: dict[str, Any], now: datetime) -> str:
    """A batch's time, ISO 8601. Where an earlier release wrote it down: `now`, or its day's end if that is later."""
    at = manifest.get("at")
    return at or max(now.isoformat(timespec="seconds"), f"{manifest['date']}T23:59:59+00:00")


def shown(path: str) -> str:
    """A path as text: bytes of a name that are no UTF-8 as \\xNN."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def of_path(path: str) -> str:
    """What stands for a path: 16 hexadecimal digits."""
    return _digest(shown(path))


def of_content(table: str, sha256: str) -> str:
    """What stands for a content of a table: 16 hexadecimal digits."""
    return _digest(f"{table}\n{sha256}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Known:
    """The digests of all files up to a batch. `index`: the path of the index, None for none; `recent`: digest -> batch
    of what is not in it; `count`: of the digests in the index."""

    root: Root
    index: str | None = None
    recent: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def find(self, digests: Sequence[str]) -> dict[str, int]:
        """Digest -> the newest batch with it, of those that are known."""
        return self._indexed(digests) | {digest: self.recent[digest] for digest in digests if digest in self.recent}

    def _indexed(self, digests: Sequence[str]) -> dict[str, int]:
        if self.index is None or not digests:
            return {}
        import numpy as np

        wanted = np.array([int(digest, 16) for digest in digests], np.uint64)
        if not self.root.may_tear and self.count > WHOLE and len(digests) * _window(self.count) * 2 < self.count:
            every = self.root.each(self._looked_up, wanted.tolist())
            return {digest: batch for digest, batch in zip(digests, every, strict=True) if batch is not None}
        known, batches = _records(self.root, self.index)
        at = np.searchsorted(known, wanted, side="right") - 1  # the newest of the same
        found = (at >= 0) & (known[at] == wanted)
        return {digests[n]: int(batches[at[n]]) for n in np.flatnonzero(found).tolist()}

    def _looked_up(self, digest: int) -> int | None:
        """The newest batch with a digest, from the part of the index where it would be: digests are spread evenly."""
        import numpy as np

        assert self.index, "who asks has seen one"
        guess, width = digest * self.count >> 64, _window(self.count)
        while True:
            start, stop = max(guess - width, 0), min(guess + width, self.count)
            known = np.frombuffer(self.root.read_part(self.index, start * 8, stop * 8), np.uint64)
            at = int(np.searchsorted(known, np.uint64(digest), side="right")) - 1
            if (at >= 0 or not start) and (at + 1 < len(known) or stop == self.count):
                break
            width *= 4
        if at < 0 or known[at] != digest:
            return None
        where = self.count * 8 + (start + at) * 4
        return int.from_bytes(self.root.read_part(self.index, where, where + 4), "little")

    def all(self) -> set[str]:
        """All digests."""
        indexed = _records(self.root, self.index)[0].tolist() if self.index else ()
        return {f"{digest:016x}" for digest in indexed} | self.recent.keys()

    def with_files(self, number: int, files: Iterable[dict[str, Any]]) -> "Known":
        """With the files of batch `number`, as a manifest has them."""
        return replace(self, recent=self.recent | dict.fromkeys(digests_of(files), number))

    def folded(self, number: int) -> "Known":
        """The same, with the recent ones in an index where they are many. `number`: of the batch that asks."""
        if len(self.recent) <= RECENT:
            return self
        import numpy as np

        known = np.array([int(digest, 16) for digest in self.recent], np.uint64)
        batches = np.array([*self.recent.values()], np.uint32)
        if self.index:
            indexed = _records(self.root, self.index)
            known, batches = np.concatenate([indexed[0], known]), np.concatenate([indexed[1], batches])
        order = np.lexsort((batches, known))
        data = known[order].tobytes() + batches[order].tobytes()
        index = f"{INDEXES}/{number:08d}-{zlib.crc32(data):08x}.index"
        self.root.write(index, data)
        crash_point("what is known is folded")
        return Known(self.root, index, count=len(order))


def _window(count: int) -> int:
    """How far from where it is expected a digest is at most, but for one in a thousand million; of so many digests."""
    return 3 * math.isqrt(count) + 64  # six standard deviations of a place in line


def digests_of(files: Iterable[dict[str, Any]]) -> list[str]:
    """What stands for these files, as a manifest or the table `files` has them: of each its path and content."""
    return [digest for f in files for digest in (of_path(f["path"]), of_content(f["table"], f["sha256"]))]


def _records(root: Root, index: str) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """The digests of an index, sorted, and the batch of each. Raises Damaged, FileNotFoundError."""
    import numpy as np

    data = root.map(index)
    count = len(data) // RECORD_BYTES
    if len(data) % RECORD_BYTES or not count:
        raise Damaged(f"{index} is cut off")
    return np.frombuffer(data, np.uint64, count), np.frombuffer(data, np.uint32, count, offset=count * 8)


def count_of(root: Root, index: str) -> int:
    """How many digests an index has. Raises Damaged, FileNotFoundError where it is not there as a whole."""
    size = root.size(index)
    if size % RECORD_BYTES or not size:
        raise Damaged(f"{index} is cut off")
    return size // RECORD_BYTES


def known(lake: "Lake", pointer: dict[str, Any] | None, last: dict[str, Any] | None) -> Known:
    """What is in the lake with the batch that is published. `last`: its manifest. Raises storage.Damaged."""
    if pointer is None:
        return Known(lake.root)
    if last and "known" in last:
        try:
            index = last["known"]["index"]
            before = Known(lake.root, index, last["known"]["recent"], count_of(lake.root, index) if index else 0)
            return before.with_files(pointer["batch"], last["files"])
        except (Damaged, FileNotFoundError):
            pass
    recent: dict[str, int] = {}
    for row in sorted(published(lake, pointer).iter_rows(named=True), key=lambda row: row["batch"]):
        recent |= dict.fromkeys(digests_of([row]), row["batch"])
    return Known(lake.root, None, recent)


def published(lake: "Lake", pointer: dict[str, Any], batches: Iterable[int] | None = None) -> pl.DataFrame:
    """The ledger of a published snapshot: all of it, or the rows of some batches, of whose files alone it is read."""
    handle = lake.table("files", pointer["tables"]["files"])
    if batches is None:
        return snapshot.of_pointer(lake, pointer).frame("files").collect()
    wanted = {*batches}
    files = [path for path, low, high in delta.bounds(handle, "batch") if any(low <= batch <= high for batch in wanted)]
    parts = [_rows_of(lake, path, wanted) for path in files]
    return pl.concat([pl.DataFrame(schema=LEDGER), *parts]).filter(pl.col("batch").is_in(wanted))


def _rows_of(lake: "Lake", path: str, batches: set[int]) -> pl.DataFrame:
    """The rows of a ledger's file that may be of these batches: of its row groups those whose bounds hold one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(lake.root.map(f"lake/files/{path}")))
    at = file.schema_arrow.get_field_index("batch")
    bounds = [file.metadata.row_group(n).column(at).statistics for n in range(file.num_row_groups)]
    groups = [n for n, it in enumerate(bounds) if it is None or any(it.min <= batch <= it.max for batch in batches)]
    return pl.DataFrame(file.read_row_groups(groups, columns=[*LEDGER])).cast(pl.Schema(LEDGER))


def of_batch(number: int, at: str, files: Sequence[dict[str, Any]], counts: pl.DataFrame) -> pl.DataFrame:
    """The rows of a batch's `files`, as its manifest has them. `counts`: path, good, bad of those that were read."""
    counted = {path: (good, bad) for path, good, bad in counts.select("file", "good", "bad").iter_rows()}
    moment = datetime.fromisoformat(at).astimezone(UTC)
    rows = [
        (
            number,
            shown(f["path"]),
            f["table"],
            f["bytes"],
            f["sha256"],
            *counted.get(shown(f["path"]), (None, None)),
            moment,
        )
        for f in files
    ]
    return pl.DataFrame(rows, schema=LEDGER, orient="row")


def prune(root: Root, batch: int) -> int:
    """Remove the manifests of batches before the published one, whose files are in the table; returns how many files
    went. Indexes that no manifest names go too."""
    numbers = {name: int(match[1]) for name in root.names(BATCHES) if (match := NUMBERED.fullmatch(name))}
    old = [f"{BATCHES}/{name}" for name, number in numbers.items() if number < batch]
    with contextlib.suppress(Damaged):  # nobody knows what it names, then
        left = [number for name, number in numbers.items() if number >= batch and name.endswith(".json")]
        named = {(read(root, number) or {}).get("known", {}).get("index") for number in left}
        indexes = [name for name in root.names(INDEXES) if INDEX.fullmatch(name)]
        old += [rel for name in indexes if (rel := f"{INDEXES}/{name}") not in named]
    root.remove_all(sorted(old))
    return len(old)


def damages(root: Root) -> Iterable[str]:
    """What of the manifests and indexes is not what was written."""
    for match in filter(None, map(NUMBERED.fullmatch, root.names(BATCHES))):
        try:
            if match[2] == "json":
                read(root, int(match[1]))
        except Damaged as error:
            yield str(error)
    for match in filter(None, map(INDEX.fullmatch, root.names(INDEXES))):
        if f"{zlib.crc32(root.read(f'{INDEXES}/{match[0]}')):08x}" != match[1]:
            yield f"{INDEXES}/{match[0]} is damaged"


def adopt(lake: "Lake", pointer: dict[str, Any]) -> pl.DataFrame:
    """The ledger of a lake that an earlier release made, which had manifests alone. Raises Damaged when one is gone."""
    rows = []
    for number in range(1, pointer["batch"] + 1):
        document = read(lake.root, number)
        if document is None:
            raise Damaged(f"{manifest(number)} is gone: see `orchestrate.py rebuild`")
        at = time_of(document, datetime.now(UTC))
        rows.append(
            of_batch(
                number,
                at,
                document["files"],
                pl.DataFrame(schema={"file": pl.String, "good": pl.Int64, "bad": pl.Int64}),
            )
        )
    return pl.concat([pl.DataFrame(schema=LEDGER), *rows])


def written(document: dict[str, Any]) -> bytes:
    """A manifest as it is stored."""
    return json.dumps(document, indent=1).encode()
