"""What did not fit: the lines in the table `quarantine`, and the files in `refused/`. To look at, and to try again."""

import json
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from etl.lake import reading, snapshot
from etl.lake.landing import RETRIED, WHY
from etl.lake.parse import RAW_CHARS, as_file, as_it_came, fits
from etl.lake.table import QUARANTINE
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from etl.lake.lake import Lake

TRIED = "lake/tried_again.json"  # batch and file -> the lines that were put into landing again


def refused_files(lake: "Lake") -> list[dict[str, Any]]:
    """The files that were refused whole: table (None for none), file, landing (where it was), why, bytes, run_id, date,
    path; the newest day first."""
    root, refused = lake.root, []
    for date in reversed(root.names("refused")):
        rels = [f"refused/{date}/{path}" for path, _ in root.tree(f"refused/{date}")]  # links to folders, too
        there = {*rels}
        for rel in rels:
            if rel.endswith(WHY) and (path := rel.removesuffix(WHY)) in there and (why := _why(root, rel)):
                why.setdefault("landing", f"landing/{why['table']}/{why['file']}")  # as it was until November 2026
                refused.append(why | {"date": date, "path": path})
    return refused


def _why(root: Root, rel: str) -> dict[str, Any] | None:
    """What is beside a refused file; None where it is somebody else's."""
    try:
        why = root.read_json(rel)
    except (OSError, Damaged):
        return None
    return why if why and {"table", "file", "why"} <= why.keys() else None


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


def find(lake: "Lake", name: str) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """What was refused of the file that is called so, or has a path that ends so: whole, and its lines.

    Raises LookupError when there is no such file, or several.
    """
    whole, lines = refused_files(lake), refused_lines(lake)
    names = {*(row["file"] for row in whole), *lines["file"]}
    named = [name] if name in names else sorted(other for other in names if other.endswith(f"/{name}"))
    if not named:
        raise LookupError(f"nothing of {name} was refused; `quarantine list` names what was")
    if len(named) > 1:
        raise LookupError(f"{name} is one of {', '.join(named)}: write its path")
    return [row for row in whole if row["file"] == named[0]], lines.filter(file=named[0])


def retry(lake: "Lake", file: str) -> list[str]:
    """Put what was refused of a file, as `find` finds it, into landing again; returns the paths, to be ingested by the
    next run.

    A file that was refused whole comes back where it was. Of one whose lines were refused, those that fit by now come
    in a file of their own, each once: those that fit only later come when it is asked again. A line that quarantine
    does not have as it came, since it was too long, is not tried. The rows of quarantine stay, as what
    happened.
    Raises LookupError when there is nothing to try, FileExistsError when it waits already.
    """
    whole, lines = find(lake, file)
    return [_land_whole(lake, whole[0])] if whole else _land_lines(lake, file, lines)


def _land_whole(lake: "Lake", refused: dict[str, Any]) -> str:
    target = str(refused["landing"])
    if lake.root.entry(target):
        raise FileExistsError(f"{target} is there already")
    lake.root.move(refused["path"], target)
    lake.root.remove(refused["path"] + WHY)
    return target


def _land_lines(lake: "Lake", name: str, lines: pl.DataFrame) -> list[str]:
    made, others, again, now = [], 0, 0, datetime.now(UTC).isoformat()
    tried = lake.root.read_json(TRIED) or {}
    for (batch, table, file), group in lines.group_by("batch", "table", "file", maintain_order=True):
        before = tried.setdefault(f"{batch} {file}", [])
        came = {n: as_it_came(raw, reason) for n, raw, reason in group.select("line", "raw", "reason").iter_rows()}
        # what is not here as it was would be ingested as something else
        others += sum(raw is None for raw in came.values())
        again += len(before)
        rules = reading.rules(lake.tables[str(table)], now)
        fit = [(n, raw) for n, raw in came.items() if raw is not None and n not in before and fits(raw, rules)]
        if not fit:
            continue
        content = as_file([raw for _, raw in fit], rules)
        called = f"{zlib.crc32(f'{batch} {file}'.encode()):08x}-{batch}-{zlib.crc32(content):08x}.json"
        target = f"landing/{RETRIED}/{table}/{called}"
        lake.root.create(
            target, content
        )  # the same lines have the same name, if a run of this died before the next line
        before += [n for n, _ in fit]
        lake.root.write(TRIED, json.dumps(tried).encode())
        made.append(target)
    if not made:
        why = f"nothing of {name} fits: `quarantine show {name}` tells why"
        changed = (
            f"{others} of its lines are not kept as they came (longer than {RAW_CHARS:,} bytes, or of an older release)"
        )
        why = f"{again} of its lines were put into landing before, and {why}" if again else why
        raise LookupError(f"{why}; {changed}: put them right in a file of your own" if others else why)
    return made


def is_retried(path: str) -> bool:
    """Whether a path below landing/ is one of lines that are tried again."""
    return path.startswith(f"{RETRIED}/") and path.endswith(".json")
