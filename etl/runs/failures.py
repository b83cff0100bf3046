"""Failures that say the same, as one: "14th time, first at ..."."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from etl.runs import index
from etl.runs.record import STATES
from etl.storage import Root

BAD = tuple(state for state in STATES if state not in ("ok", "noop", "cancelled"))
# what is another one each time: ids, hashes, addresses, numbers
VARIES = re.compile(r"[\w-]+-\d{8}T\d{6}-[0-9a-f]{6}|\b0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d[\d.,:]*")


@dataclass(frozen=True)
class Group:
    """Runs of a stage that ended alike. `reason`: the last one's, as it was said; times in UTC."""

    stage: str
    state: str
    reason: str
    count: int
    first_at: datetime
    last_at: datetime
    run_id: str  # the last


def fingerprint(reason: str | None) -> str:
    """A reason without what is another one each time."""
    return VARIES.sub("…", reason or "")


def groups(runs: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The runs that did not go well, grouped by how they ended; the group that came up last comes first.

    `runs` in the order in which they started, with run_id, stage, state, reason and started_at.
    """
    made: dict[tuple[str, str, str], Group] = {}
    for run in runs:
        if run["state"] in BAD:
            known, at = (run["stage"], run["state"], fingerprint(run["reason"])), run["started_at"]
            before = made.get(known)
            count, first = (before.count + 1, before.first_at) if before else (1, at)
            made[known] = Group(run["stage"], run["state"], run["reason"] or "", count, first, at, run["run_id"])
    return sorted(made.values(), key=lambda group: group.last_at, reverse=True)


def of_root(root: Root, stage: str | None = None) -> list[Group]:
    """All that ever failed under a root, of a stage or of all."""
    columns = ["run_id", "stage", "state", "reason", "started_at"]
    bad = index.scan(root).filter(pl.col("state").is_in(BAD)).select(columns)
    bad = bad.filter(stage=stage) if stage else bad
    return groups(bad.sort("started_at", "run_id").collect().to_dicts())


def ordinal(number: int) -> str:
    """As in "14th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"
