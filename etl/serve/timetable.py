"""What is due: the schedules of the stages on the machine's clock, and what becomes of a time at which nothing ran.

No Prefect, no threads, no clock of its own: `look` is called about once a second with the time, and says by two
functions which run begins and which do not. So a machine that slept, a process that was stopped and a clock that was
set are all the same here: times between two looks.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from etl.params import Stage

LATE_S = 10  # a run that begins later than this was missed, as looks are a second apart
BACK_S = 10  # a clock that is set back by less is waited for: no time comes twice
MOST = 1000  # times of a stage that are made up for, or counted, at once
MISSED = "nothing ran at that time"


@dataclass
class NotRun:
    """Scheduled times of a stage, one after the other, at which it does not run, and why."""

    first: datetime
    last: datetime
    count: int
    why: str

    def __str__(self) -> str:
        last = f"{self.last:%H:%M:%S}" if self.first.date() == self.last.date() else f"{self.last:%Y-%m-%d %H:%M:%S}"
        most = "at least " if self.count >= MOST else ""
        what = "the run" if self.count == 1 else f"{most}{self.count} runs"
        times = f"of {self.first:%Y-%m-%d %H:%M:%S}" + (f" to {last}" if self.count > 1 else "")
        return f"{what} {times} UTC did not begin: {self.why}"


@dataclass
class Past:
    """How far a process came with a stage: what was due until `seen` began, waits, or is said not to run."""

    seen: datetime
    waiting: list[datetime]


@dataclass
class _Course:
    """How far a stage is; `missed` is what an earlier process left, None when the stage never had a run."""

    stage: Stage
    seen: datetime
    missed: list[datetime] | None = None
    has_begun: bool = False  # a run, by this process
    waiting: deque[datetime] = field(default_factory=deque)
    not_run: NotRun | None = None

    def __post_init__(self) -> None:
        self.see(self.seen)

    def see(self, now: datetime) -> None:
        """What was due until `now` is seen to."""
        self.seen = now
        self.coming = self.stage.next_run(now)


class Timetable:
    """`begin(stage, time)` begins a run, `leave(stage, not_run)` says what does not; both return at once.

    `busy(name)` says why a stage cannot begin another run now, "" when it can.
    """

    def __init__(
        self,
        begin: Callable[[Stage, datetime], None],
        leave: Callable[[Stage, NotRun], None],
        busy: Callable[[str], str],
        tell: Callable[[str], None],
    ):
        self._begin, self._leave, self._busy, self._tell = begin, leave, busy, tell
        self._courses: dict[str, _Course] = {}
        self._looked: datetime | None = None

    def follow(self, stages: Iterable[Stage], now: datetime, known: Mapping[str, Past]) -> None:
        """From now on these. `known`: how far an earlier process came; see `make_up`."""
        stages = list(stages)
        for name in self._courses.keys() - {stage.name for stage in stages}:
            self._close(self._courses.pop(name))
        for stage in stages:
            if course := self._courses.get(stage.name):
                course.stage = stage
                course.see(course.seen)
            else:
                course = self._courses[stage.name] = _Course(stage, now)
                if past := known.get(stage.name):
                    course.missed = past.waiting + stage.due(past.seen, now, MOST)
                    if past.seen > now + timedelta(seconds=BACK_S):
                        self._tell(f"the clock was set back by {_seconds(past.seen - now)}: {stage.name} goes on by it")

    def look(self, now: datetime) -> None:
        """Begin what is due."""
        if self._looked and now < self._looked - timedelta(seconds=BACK_S):
            self._tell(f"the clock was set back by {_seconds(self._looked - now)}: schedules go on by it")
            for course in self._courses.values():
                self._note(course, course.waiting, "it waited when the clock was set back")
                self._close(course)
                course.waiting.clear()
                course.see(now)
        elif self._looked and now > self._looked + timedelta(seconds=LATE_S):
            self._tell(f"nobody looked at the schedules for {_seconds(now - self._looked)}: this machine or `up` slept")
        self._looked = now
        for course in self._courses.values():
            self._see_to_due(course, now)
            self._begin_waiting(course)

    def coming(self) -> dict[str, datetime]:
        """When each stage that has one has its next run."""
        return {name: course.coming for name, course in self._courses.items() if course.coming}

    def make_up(self, name: str, now: datetime) -> None:
        """See to what a stage missed before this process began; one that never ran begins its first run.

        Of `missed: skip` none begins before its time. When a run has begun meanwhile, that is the one of `once`.
        """
        course = self._courses.get(name)
        if course is None or not course.stage.enabled:
            return
        missed, course.missed = course.missed, []
        if missed is None:
            self._see_to_due(course, now)  # a time that has come and was not looked at yet is its first run
            is_over = course.stage.next_run(now) is None
            has_first = course.has_begun or course.waiting
            if course.stage.missed != "skip" and not has_first and not is_over:
                self._want(course, [now])
        else:
            self._take(course, missed, now, begun=course.has_begun)
        self._begin_waiting(course)

    def past(self) -> dict[str, Past]:
        """How far each stage is, for the next process; a first run that is still to come is one for it, too."""
        return {
            name: Past(course.seen, [*(course.missed or ()), *course.waiting])
            for name, course in self._courses.items()
            if course.missed is not None or course.has_begun
        }

    def end(self) -> None:
        """Say of what did not run that it did not."""
        for course in self._courses.values():
            self._close(course)

    def _see_to_due(self, course: _Course, now: datetime) -> None:
        if course.coming and course.coming <= now:
            due = course.stage.due(course.seen, now, MOST)
            course.see(now)
            self._take(course, due, now)
        elif now > course.seen:
            course.seen = now

    def _take(self, course: _Course, times: list[datetime], now: datetime, begun: bool = False) -> None:
        """Begin, have wait or leave what was due, by the stage's `missed`."""
        if not times:
            return
        kept = times[-1:]
        match course.stage.missed:
            case "all":
                kept = times
            case "once" if begun:
                kept = []
            case "skip" if now - times[-1] > timedelta(seconds=LATE_S):
                kept = []
        left = times[: len(times) - len(kept)]
        if left:
            self._note(course, left, f"{MISSED} (missed: {course.stage.missed})")
        self._want(course, kept)

    def _want(self, course: _Course, times: list[datetime]) -> None:
        for number, time in enumerate(times):
            why = self._busy(course.stage.name)
            can_wait = course.stage.overlap == "queue" or len(times) > 1 or course.waiting
            if number == 0 and not course.waiting and not why:
                self._start(course, time)
            elif can_wait and len(course.waiting) < MOST:
                self._close(course)
                course.waiting.append(time)
            else:
                self._note(course, [time], f"{MOST} runs wait already" if can_wait else why)

    def _begin_waiting(self, course: _Course) -> None:
        if not self._busy(course.stage.name):
            self._close(course)
            if course.waiting:
                self._start(course, course.waiting.popleft())

    def _start(self, course: _Course, time: datetime) -> None:
        self._close(course)
        course.has_begun = True
        self._begin(course.stage, time)

    def _note(self, course: _Course, times: Iterable[datetime], why: str) -> None:
        for time in times:
            told = course.not_run
            if told and told.why == why and course.stage.next_run(told.last) == time:
                told.last, told.count = time, told.count + 1
            else:
                self._close(course)
                course.not_run = NotRun(time, time, 1, why)

    def _close(self, course: _Course) -> None:
        not_run, course.not_run = course.not_run, None
        if not_run:
            self._leave(course.stage, not_run)


class Kept:
    """A file with how far each stage is; what cannot be read says nothing."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Past]:
        moment = datetime.fromisoformat
        try:
            kept = json.loads(self.path.read_text()).items()
            return {name: Past(moment(told["seen"]), [*map(moment, told["waiting"])]) for name, told in kept}
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            return {}

    def write(self, past: Mapping[str, Past]) -> None:
        """Raises OSError."""
        told = {
            name: {"seen": p.seen.isoformat(), "waiting": [t.isoformat() for t in p.waiting]}
            for name, p in past.items()
        }
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(told))
        os.replace(part, self.path)


def _seconds(passed: timedelta) -> str:
    return str(timedelta(seconds=round(passed.total_seconds())))
