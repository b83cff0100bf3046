"""A batch read by the workers of a Dask cluster: which of them reads what, and what becomes of their answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from etl.clusters import submit
from etl.lake import formats, parse, reading
from etl.lake.landing import File
from etl.lake.reading import Group, Looked, Reading, Stretch, Written
from etl.storage import Root

if TYPE_CHECKING:
    import distributed

TASK_BYTES = 64_000_000  # of files that a worker reads at once; a file of more than twice that is cut
PEEKED = 64


class Unseen(RuntimeError):
    """Workers that do not see the root."""


def read(
    client: "distributed.Client",
    asked: Reading,
    files: Sequence[File],
    same_content: Callable[[File, str], str | None],
) -> tuple[list[Looked], dict[str, Written]]:
    """What is in the files, without their rows, and by table what these were written into.

    `same_content`: why a file with this sha256 is refused as a copy of another one; asked in the order of the files.
    """
    cut = [file for file in files if file.bytes > 2 * TASK_BYTES and _has_lines(asked.root, file)]
    whole = list(_groups(file for file in files if file not in {*cut}))
    answers = [(group, submit(client, reading.read_group, asked, group, {})) for group in whole]
    stretches = {
        file: [
            submit(client, reading.read_stretch, asked, file, start, min(start + TASK_BYTES, file.bytes))
            for start in range(0, file.bytes, TASK_BYTES)
        ]
        for file in cut
    }
    joined = _joined(client, asked, stretches)
    odd = [file for file in cut if file not in joined]  # what is wrong with it is told of all of it
    answers += [([file], submit(client, reading.read_group, asked, [file], {})) for file in odd]
    done: list[tuple[list[File], Group]] = [(group, future.result()) for group, future in answers]
    done += [([file], group) for file, group in joined.items()]
    contents = {path: sha256 for _, group in done for path, sha256 in group.contents.items()}
    copies = {
        file.path: why
        for file in files
        if file.path in contents and (why := same_content(file, contents[file.path])) is not None
    }
    with_copies = [group for group, _ in done if any(file.path in copies for file in group)]
    done = [(group, answer) for group, answer in done if group not in with_copies]
    again = [(group, submit(client, reading.read_group, asked, group, copies)) for group in with_copies]
    done += [(group, future.result()) for group, future in again]
    looks = [looked for _, group in done for looked in group.looked]
    _require_seen(
        asked.root, [file for looked in looks for file, why in looked.refused if why.startswith(reading.GONE)]
    )
    written: dict[str, Written] = {}
    for (first, *_), group in done:
        if any(looked.files for looked in group.looked):
            written.setdefault(first.table, Written()).add(group.written)
    return looks, written


def _has_lines(root: Root, file: File) -> bool:
    """Whether it begins as lines of JSON do, which is what can be cut."""
    try:
        data = root.read_part(file.landing, 0, PEEKED)
    except OSError:
        return False
    return bool(formats.OBJECT.match(data.removeprefix(formats.MARK)))


def _groups(files: Iterable[File]) -> Iterable[list[File]]:
    """Files of one table each, in their order, about so much that a worker has something to do."""
    groups: dict[str, list[File]] = {}
    for file in files:
        group = groups.setdefault(file.table, [])
        if group and sum(each.bytes for each in group) + file.bytes > TASK_BYTES:
            yield groups.pop(file.table)
        groups.setdefault(file.table, []).append(file)
    yield from groups.values()


def _joined(
    client: "distributed.Client", asked: Reading, stretches: "dict[File, list[distributed.Future[Any]]]"
) -> dict[File, Group]:
    """Of files that were read in stretches, what is in the whole; without those that changed meanwhile, are gone, or
    are no lines after all."""
    parts = {file: read for file, futures in stretches.items() if (read := _read(file, futures))}
    hashed = {
        file: submit(client, reading.digests, asked.root, file, [(part.first, part.last) for part in read])
        for file, read in parts.items()
    }
    made = {}
    for file, future in hashed.items():
        try:
            sha256, digests = future.result()
        except FileNotFoundError:
            continue
        if digests == [part.digest for part in parts[file]] and asked.expected.get(file.path, sha256) == sha256:
            made[file] = _whole(asked, file, sha256, parts[file])
    return made


def _read(file: File, futures: "list[distributed.Future[Any]]") -> list[Stretch]:
    """Its stretches one after the other; none where they do not make the file."""
    try:
        parts: list[Stretch] = [future.result() for future in futures]
    except FileNotFoundError:
        return []
    ends = [0, *(part.last for part in parts)]
    fit = [part.first for part in parts] == ends[:-1] and ends[-1] == file.bytes
    is_odd = any(part.bad.height and part.bad["line"][0] == parse.WHOLE for part in parts)
    return parts if fit and not is_odd else []


def _whole(asked: Reading, file: File, sha256: str, parts: list[Stretch]) -> Group:
    """A file by its stretches."""
    lines, before, bad, written = sum(part.counted for part in parts), 0, [], Written()
    for part in parts:
        bad.append(part.bad.with_columns(pl.col("line") + before))
        before += part.lines
        written.add(part.written)
    refused, rows = pl.concat(bad), pl.DataFrame(schema=asked.tables[file.table].parsed)
    if asked.refuses(refused.height, lines):
        why = parse.why_whole(refused, lines)
        unfit = reading.too_few(file, refused, lines, why)
        looked = Looked(file.table, [], rows, [], [], [(file, why)], unfit)
        return Group([looked], Written(), {file.path: sha256})
    looked = Looked(file.table, [(file, sha256, file.bytes)], rows, [lines], [refused], [], [])
    return Group([looked], written, {file.path: sha256})


def _require_seen(root: Root, gone: list[File]) -> None:
    """Raises Unseen where a file is not there for a worker, and is there."""
    for file in gone:
        if root.exists(file.landing):
            raise Unseen(
                f"the workers of the Dask cluster do not see {root.url_of(file.landing)}: they need the same root, on "
                f"an object store or a folder that all machines have. Nothing was taken"
            )
