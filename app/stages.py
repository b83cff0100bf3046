"""The stages of the pipeline, as their runs and schedules tell: for the strip of the overview, and what runs next."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from app.poller import View
from etl.serve import health

BARS = 50  # runs of a stage, the newest
MISSED = health.MISSED  # runs, and what they bring is older than it should be


@dataclass(frozen=True)
class Line:
    """A stage. `runs`: its last ones, in the order in which they ended; `under_way`: those at work here."""

    name: str
    runs: Sequence[Mapping[str, Any]]
    under_way: Sequence[Mapping[str, Any]]
    last_ok: datetime | None
    following: datetime | None  # its next run; None, too, while nobody is there to start it

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The last run; one that did not begin, as another was under way, only where there is no other."""
        began = [run for run in self.runs if run["seconds"] or run["state"] != "cancelled"]
        return next(reversed(began or self.runs), None)

    @property
    def state(self) -> str:
        """Of its last run, or running, or "no run yet"."""
        return "running" if self.under_way else self.last["state"] if self.last else "no run yet"

    @property
    def usual_s(self) -> float | None:
        """The median of the runs that did something and went well."""
        taken = [run["seconds"] for run in self.runs if run["state"] == "ok"]
        return statistics.median(taken) if taken else None


def lines(view: View) -> list[Line]:
    """The stages in pipeline order; those of earlier releases that still have runs come last."""
    names = dict.fromkeys([*view.seen.stages, *(run["stage"] for run in [*view.seen.runs, *view.under_way])])
    following = dict(next_runs(view, each=1))
    made = []
    for name in names:
        runs = [run for run in view.seen.runs if run["stage"] == name][-BARS:]
        at_work = [run for run in view.under_way if run["stage"] == name]
        made.append(Line(name, runs, at_work, view.seen.last_ok.get(name), following.get(name)))
    return made


def next_runs(view: View, each: int = 5) -> list[tuple[str, datetime]]:
    """(stage, time) of the next runs, at most `each` of a stage, the soonest first; none where no `up` is at work."""
    if view.seen.beat is None or view.seen.beat.get("ended_at") or health.is_dead(view.at, view.seen):
        return []
    times = [(name, at) for name, stage in view.seen.stages.items() for at in _times(stage, view.at, each)]
    return sorted(times, key=lambda item: item[1])


def budget(view: View, stage: str) -> timedelta | None:
    """How old what a stage brings may be; None where it has no schedule."""
    declared = view.seen.stages.get(stage)
    if declared is None:
        return None
    if declared.fresh_within_s:
        return timedelta(seconds=declared.fresh_within_s)
    times = _times(declared, view.at, 2)
    return MISSED * (times[1] - times[0]) if len(times) == 2 else None


def _times(stage: Any, after: datetime, count: int) -> list[datetime]:
    times: list[datetime] = []
    while len(times) < count and (at := stage.next_run(times[-1] if times else after)):
        times.append(at)
    return times
