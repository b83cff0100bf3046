"""What did not fit: the lines in the table `quarantine`, and the files in `refused/`. To look at, and to try again."""

import json
import zlib
from datetime import UTC, datetime
from typing import Any

import polars as pl

from etl.lake import ingest
from etl.lake import snapshot as lake
from etl.lake.landing import WHY
from etl.lake.parse import NOT_UTF8, RAW_CHARS, parse
from etl.storage import Root


def refused_files(root: str) -> list[dict[str, Any]]:
    """The files that were refused whole: table, file, why, bytes, run_id, date, place; the newest day first."""
    place, found = Root.at(root), []
    for date in reversed(place.list("refused")):
        for table in place.list(f"refused/{date}"):
            names = place.list(f"refused/{date}/{table}")
            for name in names:
                if name.endswith(WHY) and name.removesuffix(WHY) in names:
                    why = json.loads(place.read(f"refused/{date}/{table}/{name}"))
                    found.append(why | {"date": date, "place": f"refused/{date}/{table}/{name.removesuffix(WHY)}"})
    return found


def refused_lines(root: str, file: str | None = None) -> pl.DataFrame:
    """The refused lines, of one file or of all: batch, table, file, line, reason, raw."""
    if not lake.is_published(root):
        return pl.DataFrame(schema=lake.QUARANTINE)
    lines = lake.snapshot(root).frame("quarantine")
    return lines.filter(pl.col("file") == file if file else True).sort("batch", "file", "line").collect()


def overview(root: str) -> list[dict[str, Any]]:
    """One line a file, the newest first: file, when (its batch, or the day it was refused), lines (null: all), why."""
    lines = refused_lines(root).group_by("batch", "file").agg(pl.len().alias("lines"), pl.first("reason").alias("why"))
    by_line = lines.sort("batch", "file", descending=True).rename({"batch": "when"}).to_dicts()
    whole = [{"file": f["file"], "when": f["date"], "lines": None, "why": f["why"]} for f in refused_files(root)]
    return [*whole, *by_line]


def retry(root: str, file: str) -> list[str]:
    """Put what was refused of a file into landing again; returns the places, to be ingested by the next run.

    A file that was refused whole comes back under its own name. Of one whose lines were refused, those that fit by now
    come in a file of a tick of its own, which follows from batch and name: asked for twice, they are ingested once, and
    lines that fit only later need a file of yours. The rows of quarantine stay, as what happened.
    Raises LookupError when there is nothing to try, FileExistsError when it waits already.
    """
    place = Root.at(root)
    made = _whole(place, file) if any(one["file"] == file for one in refused_files(root)) else _lines(place, file)
    if not made:
        raise LookupError(f"nothing of {file} fits: `quarantine show {file}` tells why")
    return made


def _whole(place: Root, file: str) -> list[str]:
    newest = next(one for one in refused_files(place.url) if one["file"] == file)
    landing = f"landing/{newest['table']}/{file}"
    if place.entry(landing):
        raise FileExistsError(f"{landing} is there already")
    place.move(newest["place"], landing)
    place.remove(newest["place"] + WHY)
    return [landing]


def _lines(place: Root, file: str) -> list[str]:
    lines = refused_lines(place.url, file)
    if lines.is_empty():
        raise LookupError(f"nothing of {file} was refused; `quarantine list` names what was")
    made, now = [], datetime.now(UTC).isoformat()
    for (batch, table), group in lines.group_by("batch", "table", maintain_order=True):
        whole = group.filter(
            pl.col("raw").str.len_bytes() < RAW_CHARS, ~pl.col("reason").str.starts_with(NOT_UTF8)
        )  # what is not here as it was would be ingested as something else
        fit = [raw for raw in whole["raw"] if parse(raw.encode(), ingest.rules(table, now))[0].height]
        landing = f"landing/{table}/{table}-{_tick_of(batch, file):08d}.json"
        if fit and place.create(landing, "".join(f"{raw}\n" for raw in fit).encode()):
            made.append(landing)
    return made


def _tick_of(batch: int, file: str) -> int:
    """A tick that no stream comes to in a lifetime."""
    return 90_000_000 + zlib.crc32(f"{batch} {file}".encode()) % 10_000_000
