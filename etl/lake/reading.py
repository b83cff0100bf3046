"""Files of a batch are read, and become typed rows or reasons: by threads of this process, or by workers elsewhere.

Both call `open_file` and `look`. A worker writes its rows at once, as Parquet files that no commit names yet, and tells
what it has written: so a worker that is lost, or does the same a second time, has added nothing to any table.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import polars as pl

from etl.figures import utc
from etl.lake import formats, landing, parse
from etl.lake.commit import Encoded, encode_rows, stored
from etl.lake.landing import File
from etl.lake.table import RESCUED, Table
from etl.storage import Root, Unreadable, crash_point

GROUP_BYTES = 16_000_000  # in memory, of files that are parsed at once
PART_BYTES = 256_000_000  # in memory, of rows that a worker writes into one file
GONE, CHANGED = "is gone from landing", "changed since"  # begin why a file of an unfinished batch is refused


@dataclass(frozen=True)
class Reading:
    """What is asked of a batch's files. `tables`: as the batch takes their rows, see `rules`. `expected`: path ->
    sha256, as the manifest of an unfinished batch has it. `most`: the share of a file's lines that may not fit."""

    root: Root
    number: int
    tables: Mapping[str, Table]
    expected: Mapping[str, str]
    most: float

    def refuses(self, bad: int, lines: int) -> bool:
        """Whether of a file too few lines fit."""
        allowed = max(1, self.most * lines) if self.most else 0
        return bad >= lines or bad > allowed


class Opened(NamedTuple):
    """A file as it was read: its bytes, and what is in it, or why it is refused."""

    file: File
    sha256: str
    bytes: int
    content: formats.Content | None
    why: str | None


class Looked(NamedTuple):
    """Files of one table, parsed: `rows` of all of them together; `lines` and `bad` of each."""

    table: str
    files: list[tuple[File, str, int]]  # with sha256 and bytes
    rows: pl.DataFrame
    lines: list[int]
    bad: list[pl.DataFrame]
    refused: list[tuple[File, str]]
    unfit: list[tuple[str, str, int, int, str]]  # as `ingest.UNFIT`: of those refused

    def of(self, taken: set[File]) -> "Looked":
        """What is of these files."""
        kept = [number for number, (file, *_) in enumerate(self.files) if file in taken]
        names = {file.name for file in taken}
        return Looked(
            self.table,
            [self.files[n] for n in kept],
            _of_files(self.rows, [n - bad.height for n, bad in zip(self.lines, self.bad, strict=True)], kept),
            [self.lines[n] for n in kept],
            [self.bad[n] for n in kept],
            [(file, why) for file, why in self.refused if file in taken],
            [row for row in self.unfit if row[1] in names],
        )


@dataclass
class Written:
    """Rows of a table that are in Parquet files, which no commit names yet. `newest`: their newest time."""

    files: list[Encoded] = field(default_factory=list)
    rows: int = 0
    rescued: int = 0
    newest: datetime | None = None

    def add(self, other: "Written") -> None:
        self.files, self.rows = self.files + other.files, self.rows + other.rows
        self.rescued += other.rescued
        self.newest = max(filter(None, (self.newest, other.newest)), default=None)


class Group(NamedTuple):
    """What a worker says of some files of a table. `contents`: the sha256 of each that could be opened."""

    looked: list[Looked]
    written: Written
    contents: dict[str, str]


class Stretch(NamedTuple):
    """What a worker says of a stretch of a large file. `lines`: all; `counted`: as of `Looked.lines`."""

    first: int
    last: int
    digest: str
    lines: int
    counted: int
    bad: pl.DataFrame
    written: Written


def rules(table: Table, at: str) -> Table:
    """A table as a batch of the time `at` (ISO 8601) takes its rows: none is further ahead of it than its slack."""
    moment = utc(at)
    return table.until(moment + min(table.slack, parse.LAST - moment))


def open_file(reading: Reading, file: File) -> Opened:
    """Read one file."""
    expected = reading.expected
    try:
        data, sha256 = _read(reading.root, file, expected.get(file.path))
        if expected.get(file.path, sha256) != sha256:
            raise Unreadable(f"{CHANGED} batch {reading.number} was written down")
        content = formats.opened(data, reading.tables[file.table].named)
    except Unreadable as error:
        why = str(error)
        if file.path in expected and not why.startswith((GONE, CHANGED)):
            why = f"{CHANGED} batch {reading.number} was written down: {why}"
        return Opened(file, "", 0, None, why)
    return Opened(file, sha256, len(data), content, None)


def _read(root: Root, file: File, expected: str | None) -> tuple[bytes, str]:
    """A file's bytes and their sha256. `expected`: what that was when the batch was written down."""
    with contextlib.suppress(FileNotFoundError):
        data = root.read_at_most(file.landing, file.bytes)
        return data, hashlib.sha256(data).hexdigest()
    for date in reversed(root.names("archive")):  # a replay after some of its files were archived
        for rel in landing.in_archive(root, file, date):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, Unreadable):
                data = root.read_at_most(rel, file.bytes)
                sha256 = hashlib.sha256(data).hexdigest()
                if expected in (sha256, None):
                    return data, sha256
    raise Unreadable(f"{GONE}, and not in the archive")


def groups(opened: Iterable[Opened]) -> Iterator[list[Opened]]:
    """Files of the same table, a few megabytes together: what is parsed at once, so that a small file costs little. A
    large one is alone."""
    of_table: dict[str, list[Opened]] = {}
    sizes: dict[str, int] = {}
    for file in opened:
        table, size = file.file.table, file.content.size if file.content else 0
        if table in of_table and sizes[table] + size > GROUP_BYTES:
            yield of_table.pop(table)
        sizes[table] = size + (sizes[table] if table in of_table else 0)
        of_table.setdefault(table, []).append(file)
    yield from of_table.values()


def look(reading: Reading, group: list[Opened]) -> Looked:
    """Parse the files of one group. Raises AssertionError when a line is neither a row nor refused."""
    table = group[0].file.table
    refused = [(opened.file, opened.why) for opened in group if opened.why is not None]
    files = [(opened.file, opened.sha256, opened.bytes) for opened in group if opened.content]
    pieces = [opened.content for opened in group if opened.content]
    rows, bad, lines = parse.parse_all(pieces, reading.tables[table])
    if sum(lines) != rows.height + sum(frame.height for frame in bad):
        raise AssertionError(f"{group[0].file.landing} and others: {sum(lines)} lines, but {rows.height} rows fit")
    kept, unfit = [], []
    for number, (file, *_) in enumerate(files):
        if not reading.refuses(bad[number].height, lines[number]):
            kept.append(number)
            continue
        refused.append((file, why := parse.why_whole(bad[number], lines[number])))
        unfit += too_few(file, bad[number], lines[number], why)
    if any(number not in kept and bad[number].height < lines[number] for number in range(len(files))):
        rows = _of_files(rows, [count - frame.height for count, frame in zip(lines, bad, strict=True)], kept)
    counts = [lines[n] for n in kept]
    return Looked(table, [files[n] for n in kept], rows, counts, [bad[n] for n in kept], refused, unfit)


def too_few(file: File, bad: pl.DataFrame, lines: int, why: str) -> list[tuple[str, str, int, int, str]]:
    """A refused file, as in `Looked.unfit`, where it is for its lines."""
    if bad.height and bad["line"][0] != parse.WHOLE:
        return [(file.table, file.name, lines, bad.height, why)]
    return []


def _of_files(rows: pl.DataFrame, heights: list[int], kept: list[int]) -> pl.DataFrame:
    """The rows of some of the files. `heights`: how many each has, in their order."""
    starts = [0, *itertools.accumulate(heights)]
    return pl.concat([rows.head(0), *(rows.slice(starts[number], heights[number]) for number in kept)])


def read_group(reading: Reading, files: Sequence[File], left_out: Mapping[str, str]) -> Group:
    """On a worker: read files of one table and write their rows. `left_out`: path -> why it is refused, unread."""
    contents: dict[str, str] = {}

    def opened() -> Iterator[Opened]:
        for file in files:
            if why := left_out.get(file.path):
                yield Opened(file, "", 0, None, why)
                continue
            yield (each := open_file(reading, file))
            if each.content:
                contents[file.path] = each.sha256

    looked, written, waiting, size = [], Written(), list[pl.DataFrame](), 0
    for group in groups(opened()):
        seen = look(reading, group)
        waiting.append(seen.rows)
        size += int(seen.rows.estimated_size())
        if size > PART_BYTES:
            written.add(write(reading, files[0].table, waiting))
            waiting, size = [], 0
        looked.append(seen._replace(rows=seen.rows.clear()))
    if waiting:
        written.add(write(reading, files[0].table, waiting))
    return Group(looked, written, contents)


def read_stretch(reading: Reading, file: File, start: int, stop: int) -> Stretch:
    """On a worker: read the lines of a file that begin between two of its bytes, and write their rows."""
    first, last = (_line_at(reading.root, file, at) for at in (start, stop))
    data = reading.root.read_part(file.landing, first, last)
    digest = hashlib.sha256(data).hexdigest()
    lines = parse.line_count(data)
    content = formats.Content("lines", data if first else data.removeprefix(formats.MARK))
    rows, (bad,), (counted,) = parse.parse_all([content], reading.tables[file.table])
    if counted != rows.height + bad.height:
        raise AssertionError(f"{file.landing} from byte {first}: {counted} lines, but {rows.height} rows fit")
    return Stretch(first, last, digest, lines, counted, bad, write(reading, file.table, [rows]))


def _line_at(root: Root, file: File, at: int) -> int:
    """Where the first line begins at a byte of a file or after it; its size where none does."""
    if at == 0:
        return 0
    start = at - 1
    while data := root.read_part(file.landing, start, min(file.bytes, start + parse.LINE_BYTES)):
        if (end := data.find(b"\n")) >= 0:
            return start + end + 1
        start += len(data)
    return file.bytes


def digests(root: Root, file: File, stretches: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """On a worker: the sha256 of a file, and of stretches of it that come one after the other."""
    crash_point(f"read, not hashed: {file.table}")
    whole, parts = hashlib.sha256(), []
    for first, last in stretches:
        data = root.read_part(file.landing, first, last)
        whole.update(data)
        parts.append(hashlib.sha256(data).hexdigest())
    return whole.hexdigest(), parts


def write(reading: Reading, name: str, frames: Sequence[pl.DataFrame]) -> Written:
    """Write rows as they were read into files of their table."""
    table, rows = reading.tables[name], pl.concat(frames)
    if rows.is_empty():
        return Written()
    crash_point(f"read, not written: {name}")
    parts = encode_rows(table.with_days(rows), name, table.stored, table.required, table.partitions)
    files = [stored(reading.root, name, part, reading.number) for part in parts]
    crash_point(f"written, not told: {name}")
    newest = rows[table.time].max() if table.time else None
    assert newest is None or isinstance(newest, datetime), "a table's time is one"
    return Written(files, rows.height, rows[RESCUED].count(), newest)
