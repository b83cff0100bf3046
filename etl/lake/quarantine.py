"""What did not fit: the lines in the table `quarantine`, and the files in `refused/`. To look at, and to try again."""

import json
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from etl.lake import ingest, landing, snapshot
from etl.lake.landing import WHY
from etl.lake.parse import NOT_UTF8, RAW_CHARS, as_file, fits
from etl.lake.table import QUARANTINE

if TYPE_CHECKING:
    from etl.lake.lake import Lake


def refused_files(lake: "Lake") -> list[dict[str, Any]]:
    """The files that were refused whole: table, file, why, bytes, run_id, date, path; the newest day first."""
    root, refused = lake.root, []
    for date in reversed(root.names("refused")):
        for table in root.names(f"refused/{date}"):
            names = root.names(f"refused/{date}/{table}")
            for name in names:
                if name.endswith(WHY) and name.removesuffix(WHY) in names:
                    why = json.loads(root.read(f"refused/{date}/{table}/{name}"))
                    refused.append(why | {"date": date, "path": f"refused/{date}/{table}/{name.removesuffix(WHY)}"})
    return refused


def refused_lines(lake: "Lake", file: str | None = None) -> pl.DataFrame:
    """The refused lines, of one file or of all: batch, table, file, line, reason, raw."""
    published = snapshot.published(lake)
    if published is None:
        return pl.DataFrame(schema=QUARANTINE)
    lines = published.frame("quarantine")
    return lines.filter(pl.col("file") == file if file else True).sort("batch", "file", "line").collect()


def overview(lake: "Lake") -> list[dict[str, Any]]:
    """One line a file, the newest first: file, when (its batch, or the day it was refused), lines (null: all), why."""
    lines = refused_lines(lake).group_by("batch", "file").agg(pl.len().alias("lines"), pl.first("reason").alias("why"))
    by_line = lines.sort("batch", "file", descending=True).rename({"batch": "when"}).to_dicts()
    whole = [{"file": f["file"], "when": f["date"], "lines": None, "why": f["why"]} for f in refused_files(lake)]
    return [*whole, *by_line]


def retry(lake: "Lake", file: str) -> list[str]:
    """Put what was refused of a file into landing again; returns the paths, to be ingested by the next run.

    A file that was refused whole comes back under its own name. Of one whose lines were refused, those that fit by now
    come in a file of their own, whose name follows from batch and file: asked for twice, they are ingested once, and
    lines that fit only later need a file of yours. A line that quarantine does not have as it came, since it was not
    UTF-8 or too long, is not tried. The rows of quarantine stay, as what happened.
    Raises LookupError when there is nothing to try, FileExistsError when it waits already.
    """
    whole = next((refused for refused in refused_files(lake) if refused["file"] == file), None)
    return [_land_whole(lake, whole)] if whole else _land_lines(lake, file)


def _land_whole(lake: "Lake", refused: dict[str, Any]) -> str:
    target = f"landing/{refused['table']}/{refused['file']}"
    if lake.root.entry(target):
        raise FileExistsError(f"{target} is there already")
    lake.root.move(refused["path"], target)
    lake.root.remove(refused["path"] + WHY)
    return target


def _land_lines(lake: "Lake", file: str) -> list[str]:
    lines = refused_lines(lake, file)
    if lines.is_empty():
        raise LookupError(f"nothing of {file} was refused; `quarantine list` names what was")
    made, others, now = [], 0, datetime.now(UTC).isoformat()
    for (batch, table), group in lines.group_by("batch", "table", maintain_order=True):
        whole = group.filter(
            pl.col("raw").str.len_bytes() < RAW_CHARS, ~pl.col("reason").str.starts_with(NOT_UTF8)
        )  # what is not here as it was would be ingested as something else
        others += group.height - whole.height
        rules = ingest.rules(lake.tables[str(table)], now)
        fit = [raw for raw in whole["raw"] if fits(raw, rules)]
        target = f"landing/{table}/{landing.name_of(str(table), _sequence_of(batch, file))}"
        if fit and lake.root.create(target, as_file(fit, rules)):
            made.append(target)
    if not made:
        why = f"nothing of {file} fits: `quarantine show {file}` tells why"
        changed = f"{others} lines are not kept as they came (not UTF-8, or longer than {RAW_CHARS:,} characters)"
        raise LookupError(f"{why}; {changed}: put them right in a file of your own" if others else why)
    return made


def _sequence_of(batch: object, file: str) -> int:
    """One that no stream comes to in a lifetime."""
    return 90_000_000 + zlib.crc32(f"{batch} {file}".encode()) % 10_000_000
