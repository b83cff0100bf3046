"""What a look at stored things finds wrong, and what to do about it: as `doctor` says it, whatever they are."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from etl import delta
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from deltalake import DeltaTable

COMMIT = re.compile(r"(\d{20})\.json")
CHECKPOINT = re.compile(r"\d{20}\.checkpoint\.parquet")
HAS = {"CREATE TABLE": "metaData", "WRITE": "add", "OPTIMIZE": "add"}  # operation -> a line that it cannot be without


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `problem`: what is wrong with it, and `remedy` what to do; None when nothing is."""

    what: str
    problem: str | None = None
    remedy: str | None = None


def inspect(what: str, problems_of: Callable[[], Iterable[tuple[str, str]]]) -> list[Finding]:
    """What `problems_of` says of one thing, a problem and its remedy each: also when it cannot be looked at."""
    problems: list[tuple[str, str]] = []
    try:
        problems.extend(problems_of())
    except BaseException as error:
        if not may_be_damage(error):
            raise
        problems.append(
            (f"it cannot be looked at: {sentence(error)}", "see what else is wrong, and put that right first")
        )
    return [Finding(what, *problem) for problem in problems] or [Finding(what)]


def may_be_damage(error: BaseException) -> bool:
    """Whether a damaged file may have raised it: any error may, and so may a panic of a library in Rust, which is none.

    What ends a process, or the drawing of a page, may not.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def sentence(error: BaseException) -> str:
    """An error on one line, its type first."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


def damages(root: Root, table: str, version: int | None = None, quickly: bool = False) -> Iterator[str]:
    """What of a Delta table is not what was written: its log, each file of it; each data file of a version, the newest
    when it is None, by its size and by reading it. `quickly`: what opening it and the sizes say."""
    log = delta.log_of(table)
    for name in () if quickly else root.names(log):
        if problem := _reading(partial(_read_log, root, table, name)):
            yield problem if log in problem else f"{log}/{name} is damaged: {problem}"
    if delta.newest_version(root, table) is None:
        return
    files: list[tuple[str, int, int]] = []
    if problem := _reading(lambda: files.extend(_files(root.table(table, version)))):
        yield f"it does not open: {problem}"
    folders = {path.rpartition("/")[0] for path, *_ in files}
    sizes = {
        f"{folder}/{entry.name}".lstrip("/"): entry.bytes
        for folder in folders
        for entry in root.entries(f"{table}/{folder}".rstrip("/"))
    }
    for path, size, rows in files:
        rel = f"{table}/{path}"
        if sizes.get(path) != size:
            yield f"{rel} has {sizes.get(path, 'no')} bytes, not {size}: its rows are lost"
        elif not quickly and (problem := _reading(partial(_read_rows, root, rel, rows))):
            yield f"{rel} cannot be read: {problem}: its rows are lost"


def _reading(read: Callable[[], None]) -> str | None:
    """What is said by what cannot be read; None when it can."""
    try:
        read()
    except BaseException as error:
        if not may_be_damage(error):
            raise
        return str(error) if isinstance(error, Damaged) else sentence(error)
    return None


def _read_log(root: Root, table: str, name: str) -> None:
    """Raises Damaged, and whatever a library raises for what is none."""
    rel = f"{delta.log_of(table)}/{name}"
    if match := COMMIT.fullmatch(name):
        lines = delta.actions(root, table, int(match[1]))
        wanted = {HAS.get(line["commitInfo"].get("operation")) for line in lines if "commitInfo" in line} - {None}
        if not lines or not wanted <= {kind for line in lines for kind in line}:
            raise Damaged(f"{rel} is empty or cut off")
    elif CHECKPOINT.fullmatch(name):
        _rows_of(root, rel)
    elif name == delta.LAST:
        root.read_json(rel)


def _read_rows(root: Root, rel: str, rows: int) -> None:
    """Raises Damaged when a data file has not so many rows, and whatever pyarrow raises for what is none."""
    if (read := _rows_of(root, rel)) != rows:
        raise Damaged(f"it has {read} rows, not {rows}")


def _rows_of(root: Root, rel: str) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_table(io.BytesIO(root.read(rel))).num_rows)


def _files(handle: "DeltaTable") -> Iterator[tuple[str, int, int]]:
    """path, bytes, rows of each file of a table."""
    return ((file.rel, file.bytes, file.rows) for file in delta.files(handle))
