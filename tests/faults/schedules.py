"""What is due and what runs, on a clock that is set by hand: three days over the nights when clocks change.

What the YAML says is found here minute by minute, from the time of day alone. Each function takes how many and a seed,
says in figures what held, and raises AssertionError otherwise.
"""

import random
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from params_cases import CELL, LOCAL, notebook

from etl import params
from etl.serve.timetable import LATE_S, MOST, Kept, NotRun, Timetable

HOUR = timedelta(hours=1)
NIGHTS = (datetime(2026, 3, 27, 12, tzinfo=UTC), datetime(2026, 10, 23, 12, tzinfo=UTC))  # Europe, two days later
# name: yml; minutes, hours (None: each), weekday from Monday = 0 or None; zone
CRONS = {
    "nightly": ('cron: "30 2 * * *"', {30}, {2}, None, "Europe/Berlin"),
    "several": ('cron: "0,45 0-4 * * *"', {0, 45}, {0, 1, 2, 3, 4}, None, "Europe/Berlin"),
    "starred": ('cron: "*/20 1,2 * * *"', {0, 20, 40}, {1, 2}, None, "Europe/London"),
    "hourly": ('cron: "15 * * * *"', {15}, None, None, "Europe/Berlin"),
    "sundays": ('cron: "0 3 * * sun"', {0}, {3}, 6, "Europe/Berlin"),
    "plain": ('cron: "30 1 * * *"', {30}, {1}, None, "UTC"),
}
EVERY_S = {"quick": 30, "slow": 1800}
FIXED = {"nightly", "several", "sundays"}  # a time of the day; the others go with the hours that there are


class World:
    """A timetable on a clock, with runs that last; `up` may be started again."""

    def __init__(self, stages: dict[str, params.Stage], now: datetime, rng: random.Random, folder: Path):
        self.stages, self.now, self.rng, self.file = stages, now, rng, Kept(folder / "seen.json")
        self.begun: dict[str, list[tuple[datetime, datetime]]] = {name: [] for name in stages}  # (time, when)
        self.left: dict[str, list[NotRun]] = {name: [] for name in stages}
        self.segments = [[now, now]]  # what the clock went through, forward
        self.told: list[str] = []
        self.begin_up()

    def begin_up(self) -> None:
        self.until: dict[str, datetime] = {}
        self.timetable = Timetable(
            self._begin, lambda stage, left: self.left[stage.name].append(left), self._busy, self.told.append
        )
        self.timetable.follow(self.stages.values(), self.now, self.file.read())
        for name in self.stages:
            self.timetable.make_up(name, self.now)

    def _begin(self, stage: params.Stage, time: datetime) -> None:
        self.begun[stage.name].append((time, self.now))
        lasts = self.rng.choice([1, 1, 1, 1, 45, 100])
        self.until[stage.name] = self.now + timedelta(seconds=lasts)

    def _busy(self, name: str) -> str:
        return "its run was under way" if self.until.get(name, self.now) > self.now else ""

    def passes(self, seconds: float) -> None:
        """Time in which nobody looks; then a look."""
        self.now += timedelta(seconds=seconds)
        self.segments[-1][1] = max(self.segments[-1][1], self.now)
        self.timetable.look(self.now)

    def set_back(self, hours: float) -> None:
        self.now -= hours * HOUR
        self.segments.append([self.now, self.now])
        self.until = dict.fromkeys(self.until, self.now)
        self.timetable.look(self.now)

    def restart(self, down_s: float) -> None:
        """`up` ends, its runs are cut off, and it is started again."""
        self.file.write(self.timetable.past())
        self.timetable.end()
        self.now += timedelta(seconds=down_s)
        self.segments[-1][1] = self.now
        self.begin_up()


def _said(name: str, first: datetime, last: datetime) -> list[datetime]:
    """What the YAML says is due in (first, last]."""
    if name in EVERY_S:
        step, epoch = EVERY_S[name], datetime(1970, 1, 1, tzinfo=UTC)
        numbers = range(
            int((first - epoch).total_seconds() // step) + 1, int((last - epoch).total_seconds() // step) + 1
        )
        return [epoch + timedelta(seconds=number * step) for number in numbers]
    _, minutes, hours, weekday, zone = CRONS[name]

    def fits(local: datetime) -> bool:
        return local.minute in minutes and (hours is None or local.hour in hours) and weekday in (None, local.weekday())

    times, minute = [], timedelta(minutes=1)
    moment = first.replace(second=0, microsecond=0) + minute
    while moment <= last:
        local = moment.astimezone(ZoneInfo(zone))
        before = (moment - minute).astimezone(ZoneInfo(zone)).replace(tzinfo=None, fold=0)
        here = local.replace(tzinfo=None, fold=0)
        if name not in FIXED:
            due = fits(local)
        else:  # also what the clock leaves out before this minute, and not what comes again
            skipped = [before + n * minute for n in range(1, max(1, (here - before) // minute))]
            due = (fits(local) and local.fold == 0) or any(map(fits, skipped))
        if due:
            times.append(moment)
        moment += minute
    return times


def _stages(folder: Path, rng: random.Random) -> dict[str, params.Stage]:
    (folder / "params/env").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "params/env/local.yml").write_text(LOCAL)
    schedules = {name: f"{yml}\ntimezone: {zone}" for name, (yml, *_, zone) in CRONS.items()}
    schedules |= {name: f"every: {seconds} seconds" for name, seconds in EVERY_S.items()}
    for name, schedule in schedules.items():
        more = f"missed: {rng.choice(['skip', 'once', 'all'])}\noverlap: {rng.choice(['skip', 'queue'])}"
        (folder / f"params/{name}.yml").write_text(f"{schedule}\ndeadline: 1 minute\n{more}\n")
        (folder / f"notebooks/{name}.ipynb").write_text(notebook(CELL))
    return params.load(folder).stages


def simulated_days(n: int, seed: int) -> str:
    """`n` times 72 hours over a night when clocks change, with sleeps, clocks set back and restarts."""
    counts: Counter[str] = Counter()
    for number in range(n):
        rng, start = random.Random(seed * 1000 + number), NIGHTS[number % 2] + timedelta(seconds=7)
        with tempfile.TemporaryDirectory() as folder:
            world = World(_stages(Path(folder), rng), start, rng, Path(folder))
            while world.now < start + 72 * HOUR:
                event = rng.random()
                if event < 0.0004:
                    world.passes(rng.choice([120, 300, 3600, 7 * 3600]))
                    counts["sleeps"] += 1
                elif event < 0.00044:
                    world.set_back(rng.choice([1, 1, 1, 24]))
                    counts["clocks set back"] += 1
                elif event < 0.0008:
                    world.restart(rng.choice([5, 600, 7200]))
                    counts["restarts"] += 1
                else:
                    world.passes(rng.choice([0.9, 1, 1, 1.1, 5]))
            while any(past.waiting for past in world.timetable.past().values()):
                world.passes(1)
            world.timetable.end()
            for name in world.stages:
                _check(world, name, counts)
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def _times(counted: Counter) -> list[str]:
    return [f"{time:%m-%d %H:%M:%S}" for time in sorted(counted)][:9]


def _check(world: World, name: str, counts: Counter) -> None:
    stage = world.stages[name]
    first_runs = [
        (time, at) for time, at in world.begun[name] if time == at and time not in _said(name, time - HOUR, time)
    ]
    assert len(first_runs) <= (stage.missed != "skip"), f"{name}: {first_runs}"
    begun = [entry for entry in world.begun[name] if entry not in first_runs]
    expected = Counter(time for first, last in world.segments for time in _said(name, first, last))
    seen = Counter(time for time, _ in begun)
    for left in world.left[name]:
        times = _said(name, left.first - timedelta(microseconds=1), left.last)
        assert len(times) == left.count, f"{name}: {left}, which are {len(times)}"
        seen.update(times)
        counts["said not to run"] += left.count
    assert seen == expected, (
        f"{name}, {stage.when}, {stage.missed}, {stage.overlap}: {_times(seen - expected)} were not due, "
        f"{_times(expected - seen)} have neither a run nor a word"
    )
    late = [at - time for time, at in begun if at - time > timedelta(seconds=LATE_S)]
    if stage.missed == "skip" and stage.overlap == "skip":
        assert not late, f"{name}: {late}"
    if stage.missed == "all" and stage.overlap == "queue":
        whys = {left.why for left in world.left[name]}
        assert whys <= {"it waited when the clock was set back", f"{MOST} runs wait already"}, f"{name}: {whys}"
    counts["runs"] += len(begun)
    counts["of them made up for"] += len(late)
