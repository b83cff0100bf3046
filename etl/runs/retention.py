"""Which reports stay: those that tell something the others do not. The row in the index always stays.

Kept of a stage's runs: those that were neither ok nor noop, of many in a day the first and the newest, the first ok one
after one, the slowest ok one of each day, the first ok one of each hour for a day and of each day after that, and
everything that ended within the hour.
A run that loses its report by these rules can never be wanted again, so sweeps need no memory: each reads the index,
looks at what is there and removes the rest. One that is killed is finished by the next. Of a report run.json goes
first, and a folder without it is no report: neither `runs` nor a reader takes a half removed one for whole.
A kept report is the notebook and the record; its page goes after some days and is made again when somebody asks for it.
"""

import datetime
import logging
import re
import threading
from typing import Any

from etl.params.retention import Rules
from etl.reports import page as report_page
from etl.runs import index as run_index
from etl.runs import live, tries, upkeep
from etl.storage import LOST_AND_FOUND, Root, no_panic

log = logging.getLogger(__name__)
PLACE, DAY = "reports", re.compile(r"\d{4}-\d\d-\d\d")
SEEN_H = 6  # hours, between two runs, that are believed to have passed
EVERY_S = 1800  # between two sweeps of `sweep_regularly`


def wanted(index: Any, rules: Rules, now: datetime.datetime) -> Any:
    """The rows of `index` whose reports are kept; a frame of run_id, stage, state, ended_at, seconds (and more).

    Runs count in the order they ended, which is the order their rows come in: a later row never makes a report wanted
    that an earlier sweep removed.
    """
    import polars as pl

    hours, ended, age = datetime.timedelta(hours=1), pl.col("ended_at"), pl.col("age")
    index = seen(index, now)
    fresh = age < rules.all_hours * hours
    worked = index.filter(pl.col("state") != "noop").sort("ended_at", "run_id")
    ok = pl.col("state") == "ok"
    worked = worked.with_columns(recovered=ok & (pl.col("state").shift(1).over("stage") != "ok").fill_null(False))
    good = worked.filter(ok).with_columns(
        hourly=_first_of("1h") & (age < rules.hourly_days * 24 * hours),
        daily=_first_of("1d") & rules.daily,
        # of equals the first
        slowest=(pl.int_range(pl.len()) == pl.col("seconds").arg_max()).over("stage", ended.dt.date()) & rules.slowest,
    )
    kept = [
        index.filter(fresh).select("run_id"),
        worked.filter(~ok).filter(_told_by(rules.bad_a_day)).select("run_id"),
        good.filter(pl.any_horizontal("recovered", "hourly", "daily", "slowest")).select("run_id"),
    ]
    rows = index.join(pl.concat(kept).unique(), on="run_id", how="semi")
    return rows if rules.days is None else rows.filter(age < rules.days * 24 * hours)


def seen(index: Any, now: datetime.datetime) -> Any:
    """The rows with their `age`: how long ago they ended, of time that was seen to pass.

    Between two runs that are further apart than SEEN_H nobody knows whether the clock was moved; no more of it counts.
    """
    import polars as pl

    most = pl.lit(datetime.timedelta(hours=SEEN_H))
    known = index.select(pl.col("ended_at").filter(pl.col("ended_at") <= now).unique().sort())
    passed = pl.min_horizontal(pl.col("ended_at").shift(-1, fill_value=now) - pl.col("ended_at"), most)
    known = known.with_columns(age=passed.cum_sum(reverse=True))
    of_none = pl.col("age").fill_null(datetime.timedelta(0))  # it ended after `now`
    return index.join(known, on="ended_at", how="left", maintain_order="left").with_columns(of_none)


def _told_by(most: int) -> Any:
    """Of a stage's bad runs of a day the first and the newest, `most` in all, and the first in each state."""
    import polars as pl

    day = pl.col("ended_at").dt.date()
    number, count = pl.int_range(pl.len()).over("stage", day), pl.len().over("stage", day)
    in_state = pl.struct("stage", day, "state").is_first_distinct()
    return (number < most - most // 2) | (number >= count - most // 2) | in_state


def _first_of(span: str) -> Any:
    import polars as pl

    return pl.struct("stage", pl.col("ended_at").dt.truncate(span)).is_first_distinct()


def sweep(
    root: Root, rules: Rules | None = None, now: datetime.datetime | None = None, dry_run: bool = False
) -> dict[str, int]:
    """Remove the reports that the rules do not keep, and tidy the index's files; safe to kill, to repeat and to run
    twice at once.

    At most the reports of a day go in a sweep, the oldest first.

    Returns counts: runs (rows in the index), kept and removed (reports there), later (removed by sweeps to come),
    missing (wanted, not there: not delivered yet), unknown (folders of no run in the index: a run under way, perhaps;
    left alone) and pages (removed from kept reports).
    """
    now, rules = now or datetime.datetime.now(datetime.UTC), rules or Rules()
    index = run_index.scan(root).select("run_id", "stage", "state", "ended_at", "seconds", "report").collect()
    kept, ends = wanted(index, rules, now), dict(index.select("report", "ended_at").iter_rows())
    known, keep = set(index["report"]), set(kept["report"])
    expected = set(kept.filter(kept["state"] != "noop")["report"])
    # a store lists a thousand files at a time, whatever their folders: as many requests as a few folders would take
    files = None if root.may_tear else root.files(PLACE)
    stored = _on_disk(root) if files is None else {report for rel in files if (report := _report_of(rel))}
    unwanted = stored & known - keep
    until = min((ends[report] for report in unwanted), default=now) + datetime.timedelta(days=1)
    doomed = sorted(report for report in unwanted if ends[report] < until)
    if not dry_run:
        root.remove_trees(doomed, first=run_index.COMPLETE)
    # by when a run ended: its report's day is the one it was scheduled for, which may be any
    old = set(kept.filter(kept["age"] > datetime.timedelta(days=rules.page_days))["report"])
    old_days = sorted({report.rpartition("/")[0] for report in old & stored})
    held = files if files is not None else [name for day in old_days for name in root.files(day)]
    pages = [name for name in held if name.endswith(f"/{report_page.PAGE}") and name.rpartition("/")[0] in old]
    if not dry_run:
        for page in pages:
            root.remove(page)
        upkeep.tidy(root)
        tries.sweep(root)
        live.sweep(root)
    return {
        "runs": len(index),
        "kept": len(stored & keep),
        "removed": len(doomed),
        "later": len(unwanted) - len(doomed),
        "missing": len(expected - stored),
        "unknown": len(stored - known),
        "pages": len(pages),
    }


def _on_disk(root: Root) -> set[str]:
    """The folders of reports, also those that a sweep which was killed has left empty."""
    stages = [stage for stage in root.names(PLACE) if stage != LOST_AND_FOUND]
    days = [
        f"{PLACE}/{stage}/{day}" for stage in stages for day in root.names(f"{PLACE}/{stage}") if DAY.fullmatch(day)
    ]
    return {f"{day}/{run_id}" for day in days for run_id in root.names(day)}


def _report_of(rel: str) -> str | None:
    """The folder of the report that a file is of; None where it is of none."""
    parts = rel.split("/")
    return "/".join(parts[:4]) if len(parts) > 4 and DAY.fullmatch(parts[2]) else None


def sweep_regularly(root: Root, rules: Rules, every_s: float = EVERY_S) -> threading.Event:
    """Sweep now and every `every_s` seconds, in a thread, until the event is set. One that fails is a warning."""

    def sweeping() -> None:
        while not end.is_set():
            try:
                with no_panic():
                    sweep(root, rules)
            except Exception as error:  # the root is down, perhaps: the next sweep does what this one left
                log.warning("the reports under %s could not be swept: %s", root.url, error)
            end.wait(every_s)

    end = threading.Event()
    threading.Thread(target=sweeping, name="sweep", daemon=True).start()
    return end
