"""What a question makes of all rows, from what it made of those before and of the new ones.

A question with a `portion` is answered from what that makes of the rows of one table that only grows. It is kept beside
the answers, with the version of the table up to which rows are counted in it; the next time only the files are read
that came since. It is made of all rows again where it cannot be told what came: the question, its parameters or the
project's code are others, another table of the question changed, rows were taken away, a column changed, or the log
does not go back so far.
"""

import functools
import hashlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl import delta
from etl.lake.snapshot import Snapshot
from etl.storage import Root

if TYPE_CHECKING:
    from etl.questions.question import Question

log = logging.getLogger(__name__)
MERGES = ("sum", "min", "max")  # how the values of a column become one


class Portion(NamedTuple):
    """What a question made of the rows of a snapshot. `versions`: table -> its version; `counted`: how many rows of the
    table that grows."""

    frame: pl.DataFrame
    versions: dict[str, int]
    counted: int


class News(NamedTuple):
    """The files that came since, as the log adds them, and how many rows they have."""

    files: list[delta.Action]
    rows: int


def path_of(question: str) -> str:
    """Where a question's portion is kept."""
    return f"results/{question}/portion/all.parquet"


def kept(root: Root, question: "Question", parameters: dict[str, Any]) -> Portion | None:
    """What is kept of the question, if it is asked with the same parameters by the same code."""
    try:
        data = root.read(path_of(question.name))
        about = pl.read_parquet_metadata(data)
        if about["made_by"] != made_by(question, parameters):
            return None
        return Portion(pl.read_parquet(data), json.loads(about["versions"]), int(about["counted"]))
    except FileNotFoundError:
        return None
    except (Exception, pl.exceptions.PanicException) as error:  # damaged; the next takes its place
        log.warning("what is kept of %s cannot be read, it is made again: %r", question.name, error)
        return None


def keep(root: Root, question: "Question", parameters: dict[str, Any], portion: Portion) -> None:
    """Keep it for the next time."""
    about = {"made_by": made_by(question, parameters), "versions": json.dumps(portion.versions)}
    buffer = io.BytesIO()
    portion.frame.write_parquet(buffer, metadata=about | {"counted": str(portion.counted)})
    root.write(path_of(question.name), buffer.getvalue())


def news(snapshot: Snapshot, question: "Question", before: Portion) -> News | None:
    """What came since; None when it cannot be told, or when to read everything costs no more."""
    if snapshot.lake.upserts(question.grows) or not question.tables.keys() <= before.versions.keys():
        return None
    if any(snapshot.added(table, before.versions[table]) != [] for table in question.tables if table != question.grows):
        return None
    files = snapshot.added(question.grows, before.versions[question.grows])
    if files is None or not all("numRecords" in file.get("stats", "") for file in files):
        return None
    rows, every = sum(json.loads(file["stats"])["numRecords"] for file in files), snapshot.row_count(question.grows)
    if before.counted + rows != every or rows > every / 2:
        return None
    return News(files, rows)


def merged(question: "Question", frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Portions of different rows as one: whole numbers in 64 bits, as a sum of them may need."""
    frame = pl.concat(frame.with_columns(pl.selectors.integer().cast(pl.Int64)) for frame in frames)
    values = [getattr(pl.col(name), how)() for name, how in question.merges.items()]
    groups = [name for name in frame.columns if name not in question.merges]
    return (frame.group_by(groups).agg(values) if groups else frame.select(values)).select(frames[0].columns)


def made_by(question: "Question", parameters: dict[str, Any]) -> str:
    """What stands for the question, its parameters and the code that answers it."""
    asked = json.dumps([question.name, question.parameters | parameters, pl.__version__], default=str, sort_keys=True)
    return hashlib.sha256(asked.encode() + _code(question.portion.__module__.partition(".")[0])).hexdigest()


@functools.cache
def _code(package: str) -> bytes:
    """What stands for the source of this package and of the one that the question is of."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(sys.modules[package].__file__ or "").parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.digest()
