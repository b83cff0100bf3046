"""Whether what is under a root is healthy: asked by the dashboard, the API, `status` and alerts.

`Reader` reads, cheaply: the index of runs once and only when it has grown, no table, of the files of the lake their
sizes. `findings` judges, and is a function of the time and of what was read alone.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from etl import delta, params
from etl.figures import span
from etl.findings import damages, may_be_damage, sentence
from etl.leases import is_gone
from etl.params.alerts import Line, line
from etl.runs import index, releases
from etl.serve import heartbeat
from etl.storage import PROJECT, Root

if TYPE_CHECKING:
    from etl.lake import Lake
    from etl.questions.question import Question

EACH = 200  # runs of a stage, the newest, that are looked at
MISSED = 3  # times of its schedule without an ok run, and a stage is late; 1 when nobody is there to run it
SILENT_S = 3.5 * heartbeat.BEAT_S  # without a beat, and `up` is dead
GROWS = timedelta(hours=1)  # in which a run that refused lines is news
SLOW_RUNS = 3  # in a row that are slower than P95 of at least USUAL before them
USUAL, P95 = 20, 95
SLOWLY_S = 20  # between two looks at what changes seldom or costs more
LAST_RUNS = "see whether `up` is at work, and its last runs: `python orchestrate.py runs list`"
START_UP = "start `python orchestrate.py up`"
START = "start it: `python orchestrate.py up`"
DOCTOR = "see what `python orchestrate.py doctor` says"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be (`bad`), that is worth a look (`warning`), or that is to be known (`note`).

    `kind` is one of failed, late, up, damaged, stale, quarantine, figure, slow. `about`: as in "stage x", "table x".
    """

    kind: str
    level: Literal["bad", "warning", "note"]
    about: str
    sentence: str
    since: datetime | None = None
    link: str | None = None
    remedy: str | None = None
    cadence_s: float = 60  # how often it could change

    @property
    def key(self) -> str:
        """What an incident is known by."""
        return f"{self.kind} {self.about}"


@dataclass(frozen=True)
class Answered:
    """A question's current answer: when its run ended, of which stage, from which batch."""

    question: str
    at: datetime
    stage: str
    batch: int


@dataclass(frozen=True)
class Seen:
    """What was read of a root. `runs`: the last of every stage, in the order in which they ended (`index.tails`)."""

    stages: Mapping[str, params.Stage] = field(default_factory=dict)
    runs: Sequence[Mapping[str, Any]] = ()
    last_ok: Mapping[str, datetime] = field(default_factory=dict)  # of a stage: ok or noop
    written: Mapping[str, datetime] = field(default_factory=dict)  # a table: by an ok run
    beat: Mapping[str, Any] | None = None  # of `up`
    is_gone: bool = False  # its process
    tables: Mapping[str, timedelta] = field(default_factory=dict)  # those that declare fresh_within
    questions: Mapping[str, timedelta | None] = field(default_factory=dict)  # fresh_within
    answers: Sequence[Answered] = ()
    batch: int = 0  # that is published
    quarantined: int = 0  # rows
    lines: Sequence[tuple[Line, float | None]] = ()  # and the value of each figure
    damaged: Sequence[Finding] = ()
    root_url: str = ""

    def link(self, run: Mapping[str, Any], now: datetime) -> str:
        """Where its report is: its page while `up` serves it, else the file."""
        if self.beat and self.beat.get("reports_url") and not self.beat.get("ended_at") and not is_dead(now, self):
            return f"{self.beat['reports_url']}/reports/{run['run_id']}"
        return f"{self.root_url}/{run['report']}/report.html"


# --- what is wrong ---


def findings(now: datetime, seen: Seen) -> list[Finding]:
    """What is not as it should be at `now` (UTC): first that `up` was ended, which explains others, then the worst."""
    told = [*_up(now, seen), *seen.damaged, *of_runs(now, seen), *_late(now, seen), *_figures(seen)]
    told += [*_tables(now, seen), *_questions(now, seen), *_quarantine(now, seen)]
    order = ["bad", "warning", "note"]
    return sorted(told, key=lambda finding: (finding.remedy != START, order.index(finding.level)))


def is_healthy(told: Iterable[Finding]) -> bool:
    """Whether nothing is bad."""
    return all(finding.level != "bad" for finding in told)


def summary(told: Sequence[Finding], most: int = 2) -> str:
    """All of it in one sentence."""
    bad = not is_healthy(told)
    shown = [each.sentence for each in told if not bad or each.level == "bad" or each.remedy == START]
    more = f"; and {len(shown) - most} more" if len(shown) > most else ""
    text = "; ".join(shown[:most]) + more
    if not bad and any(each.level == "warning" for each in told):
        return f"Healthy, but {text}"
    return f"{'Not healthy' if bad else 'Healthy'}: {text or 'nothing failed last, and nothing is late'}"


def of_runs(now: datetime, seen: Seen) -> Iterator[Finding]:
    """What the runs that had ended by `now` say: failed, slow."""
    for name, runs in _by_stage(now, seen).items():
        yield from _failed(name, runs, now, seen)
        yield from _slow(name, runs, now, seen)


def _by_stage(now: datetime, seen: Seen) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each stage that ended by `now`; a run that somebody cancelled says nothing of its stage."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in seen.runs:
        if run["ended_at"] <= now and run["state"] != "cancelled" and (run["stage"] in seen.stages or not seen.stages):
            grouped.setdefault(run["stage"], []).append(run)
    return grouped


def _cadence_s(name: str, now: datetime, seen: Seen) -> float:
    """Seconds between two runs of a stage."""
    times = _times(name, now, seen, count=2)
    return (times[1] - times[0]).total_seconds() if len(times) == 2 else 60


def _times(name: str, after: datetime, seen: Seen, count: int) -> list[datetime]:
    """The next times of a stage's schedule; fewer where it ends."""
    times: list[datetime] = []
    for _ in range(count if name in seen.stages else 0):
        following = seen.stages[name].next_run(times[-1] if times else after)
        if following is None:
            break
        times.append(following)
    return times


def _failed(name: str, runs: list[Mapping[str, Any]], now: datetime, seen: Seen) -> Iterator[Finding]:
    streak: list[Mapping[str, Any]] = []
    for run in reversed(runs):
        if run["state"] in ("ok", "noop"):
            break
        streak.append(run)
    if not streak:
        return
    last, first = streak[0], streak[-1]
    where = f", in {last['heading']}, cell {last['cell']}" if last.get("heading") else ""
    often = f" ({len(streak)} times in a row, since {_at(first['ended_at'], now)})" if len(streak) > 1 else ""
    yield Finding(
        "failed",
        "bad",
        f"stage {name}",
        f"{name}: {last['state'].replace('_', ' ')}{where}: {last['reason'] or 'no reason is known'}{often}",
        first["ended_at"],
        seen.link(last, now),
        f"read the report; `python orchestrate.py run --from {last['run_id']}` runs it again",
        _cadence_s(name, now, seen),
    )


def _slow(name: str, runs: list[Mapping[str, Any]], now: datetime, seen: Seen) -> Iterator[Finding]:
    ok = [run for run in runs if run["state"] == "ok"]
    usual, last = [run["seconds"] for run in ok[:-SLOW_RUNS]], ok[-SLOW_RUNS:]
    if len(usual) < USUAL:
        return
    limit = statistics.quantiles(usual, n=100, method="inclusive")[P95 - 1]
    if all(run["seconds"] > limit for run in last):
        text = f"{name} took {last[-1]['seconds']:,.1f} s: its last {SLOW_RUNS} runs were slower than {P95} % before"
        yield Finding(
            "slow",
            "warning",
            f"stage {name}",
            f"{text} ({limit:,.1f} s)",
            last[0]["ended_at"],
            seen.link(last[-1], now),
            "compare the reports' receipts: rows, CPU, memory",
            _cadence_s(name, now, seen),
        )


def _up(now: datetime, seen: Seen) -> Iterator[Finding]:
    beat = seen.beat
    if beat is None:
        yield Finding("up", "note", "up", "no `up` was ever at work here, so nothing runs on a schedule")
        return
    who = f"process {beat['pid']} on {beat['host']}"
    if beat.get("ended_at"):
        at = datetime.fromisoformat(beat["ended_at"])
        text = f"`up` was ended at {_at(at, now)} ({who}): nothing runs on a schedule"
        yield Finding("up", "warning", "up", text, at, None, START)
    elif is_dead(now, seen):
        at = datetime.fromisoformat(beat["at"])
        text = f"`up` is dead: it was last seen at {_at(at, now)} ({who}), and nothing runs on a schedule"
        yield Finding("up", "bad", "up", text, at, None, f"{START}; its logs are in services/")
    else:
        for ill in beat.get("ill", ()):
            at = datetime.fromisoformat(ill["since"])
            why, _, remedy = ill["why"].rpartition("; ")
            yield Finding("up", "warning", ill["name"], f"{ill['name']}: {why}, since {_at(at, now)}", at, None, remedy)


def is_dead(now: datetime, seen: Seen) -> bool:
    """Whether an `up` that did not end is not at work."""
    if seen.beat is None or seen.beat.get("ended_at"):
        return False
    return seen.is_gone or (now - datetime.fromisoformat(seen.beat["at"])).total_seconds() > SILENT_S


def _is_nobody_there(stage: str, now: datetime, seen: Seen) -> bool:
    """Whether no `up` is at work, or one that has taken over from a dead one and has not yet run the stage well."""
    if seen.beat is None or seen.beat.get("ended_at") or is_dead(now, seen):
        return True
    since = datetime.fromisoformat(seen.beat["since"])
    return seen.beat["expected_since"] != seen.beat["since"] and seen.last_ok.get(stage, since) < since


def _late(now: datetime, seen: Seen) -> Iterator[Finding]:
    """Stages without an ok or noop run within fresh_within, or as many times of their schedule as count.

    One that runs and fails is not late by its schedule, only failed.
    """
    runs = _by_stage(now, seen)
    for name, stage in seen.stages.items():
        last, beat = seen.last_ok.get(name), seen.beat
        expected = datetime.fromisoformat(beat["expected_since"]) if beat else None
        due, since, limit = None, now, ""
        if stage.fresh_within_s and (last or expected):
            due = (last or expected or now) + timedelta(seconds=stage.fresh_within_s)
            limit, since = f"within {span(stage.fresh_within_s)}", due
        elif beat and expected:
            missed = 1 if _is_nobody_there(name, now, seen) else MISSED
            times = _times(name, max(last or expected, expected), seen, missed)
            if times and last is None:  # the first run brings what there is
                times[-1] += timedelta(seconds=stage.deadline_s)
            if len(times) == missed and not (missed == MISSED and _is_tried(name, runs, now, seen)):
                due, limit, since = times[-1], f"at {_at(times[0], now)}", times[0]
        if due and now > due:
            was = f"none since {_at(last, now)}" if last else "none yet"
            yield Finding(
                "late",
                "bad",
                f"stage {name}",
                f"{name} is {span((now - since).total_seconds())} late: an ok run was due {limit}, {was}",
                since,
                seen.link(tried[-1], now) if (tried := runs.get(name)) else None,
                START_UP if beat and (beat.get("ended_at") or is_dead(now, seen)) else LAST_RUNS,
                _cadence_s(name, now, seen),
            )


def _is_tried(name: str, runs: Mapping[str, list[Mapping[str, Any]]], now: datetime, seen: Seen) -> bool:
    """Whether the last run of a stage failed, and not long ago."""
    if name not in runs or runs[name][-1]["state"] in ("ok", "noop"):
        return False
    times = _times(name, runs[name][-1]["ended_at"], seen, MISSED)
    return bool(times) and now <= times[-1]


def _tables(now: datetime, seen: Seen) -> Iterator[Finding]:
    for table, within in seen.tables.items():
        at = seen.written.get(table)
        if at and now > at + within:
            text = f"table {table} is late: no ok run wrote it within {span(within.total_seconds())}"
            due = at + within
            yield Finding("late", "bad", f"table {table}", f"{text}, the last at {_at(at, now)}", due, None, _INGEST)


_INGEST = "see whether files come, and the last runs of the stage that ingests them"


def _questions(now: datetime, seen: Seen) -> Iterator[Finding]:
    """Those whose answer is older than they allow; and all others at once that a later run left behind."""
    left = []
    for answer in seen.answers:
        within = seen.questions.get(answer.question)
        if within and now > answer.at + within:
            text = f"question {answer.question} is late: no ok run answered it within {span(within.total_seconds())}"
            text += f", the last at {_at(answer.at, now)}"
            remedy = f"see the last runs of {answer.stage}"
            yield Finding("late", "bad", f"question {answer.question}", text, answer.at + within, None, remedy)
        elif not within and answer.batch < seen.batch:
            times = _times(answer.stage, answer.at, seen, MISSED)
            if len(times) == MISSED and now > times[-1]:
                left.append(answer)
    if left:
        oldest = min(left, key=lambda answer: answer.at)
        count = f"{len(left)} answers are" if len(left) > 1 else "1 answer is"
        behind = seen.batch - oldest.batch
        ago = f"{behind:,} batch{'es' * (behind > 1)} ago"
        text = f"{count} stale: {oldest.question} is of {_at(oldest.at, now)}, {ago}"
        remedy = f"`python orchestrate.py run {oldest.stage}`"
        yield Finding("stale", "warning", "answers", text, oldest.at, None, remedy)


def _quarantine(now: datetime, seen: Seen) -> Iterator[Finding]:
    refusing = [run for run in seen.runs if now - GROWS < run["ended_at"] <= now and "quarantine" in _written(run)]
    if refusing:
        runs = f"{len(refusing)} runs" if len(refusing) > 1 else "a run"
        text = f"quarantine grows: {runs} of the last hour refused lines; it has {seen.quarantined:,} rows"
        since, link = refusing[0]["ended_at"], seen.link(refusing[-1], now)
        yield Finding(
            "quarantine", "warning", "table quarantine", text, since, link, "`python orchestrate.py quarantine list`"
        )


def _written(run: Mapping[str, Any]) -> Mapping[str, Any]:
    written: Mapping[str, Any] = run.get("versions_written") or {}
    return written


_COMPARED = {"<": lambda a, b: a < b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}


def _figures(seen: Seen) -> Iterator[Finding]:
    for asked, value in seen.lines:
        name = f"{asked.question}.{asked.column}"
        if value is not None and _COMPARED[asked.is_over](value, asked.limit):
            about, text = f"{name} {asked.is_over} {asked.limit:g}", f"{name} is {value:,.6g}"
            yield Finding("figure", "bad", about, f"{text}, and {asked.is_over} {asked.limit:,g} is told", None)


# --- words ---


def _at(moment: datetime, now: datetime) -> str:
    """A time, with its day when that is not today's."""
    moment = moment.astimezone(UTC)
    return f"{moment:%H:%M:%S} UTC" if moment.date() == now.astimezone(UTC).date() else f"{moment:%Y-%m-%d %H:%M} UTC"


# --- what is read ---


class Reader:
    """Reads a root again and again. `lake` and `questions`: the project's own, where it has them."""

    def __init__(
        self,
        root: Root,
        lake: "Lake | None" = None,
        questions: "Iterable[Question]" = (),
        env: str = "local",
        clock: Callable[[], float] = time.monotonic,
    ):
        """`env`: of a root where no `up` says its own."""
        self._clock = clock
        self.root, self._lake, self._questions, self._env = root, lake, {q.name: q for q in questions}, env
        self.project: params.Project | None = None
        self._project_of: tuple[str, str] | None = None
        self._version: int | None = None
        self._rows: tuple[Any, ...] = [], {}, {}
        self._slowly_at, self._slow = -math.inf, Seen()
        self._damaged_at: dict[str, datetime] = {}
        self._figures: dict[Line, tuple[str, float | None]] = {}

    def seen(self, fresh: bool = False) -> Seen:
        """What is there now. What cannot be read is among what is damaged. `fresh`: nothing is kept from before."""
        damaged: list[Finding] = []
        beat = self._or(damaged, heartbeat.PLACE, "end `up` and start it again", lambda: heartbeat.read(self.root))
        self._or(damaged, "the index of runs", DOCTOR, self._read_runs)
        runs, last_ok, written = self._rows
        if fresh or self._clock() - self._slowly_at > SLOWLY_S:
            self._slow = self._look_slowly(beat, runs)
            self._slowly_at = self._clock()
        slow = self._slow
        return Seen(
            runs=runs,
            last_ok=last_ok,
            written=written,
            beat=beat,
            is_gone=bool(beat) and is_gone(beat),
            root_url=self.root.url,
            tables=self._fresh_tables(),
            questions={name: question.fresh_within for name, question in self._questions.items()},
            damaged=self._first_seen([*damaged, *slow.damaged]),
            **{name: getattr(slow, name) for name in ("stages", "answers", "batch", "quarantined", "lines")},
        )

    def _first_seen(self, damaged: list[Finding]) -> list[Finding]:
        """Each with when this process saw it first: when it came to be is not known."""
        now = datetime.now(UTC)
        self._damaged_at = {each.key: self._damaged_at.get(each.key, now) for each in damaged}
        return [replace(each, since=self._damaged_at[each.key]) for each in damaged]

    def _fresh_tables(self) -> dict[str, timedelta]:
        tables = self._lake.tables if self._lake else {}
        return {name: table.fresh_within for name, table in tables.items() if table.fresh_within}

    def _or(self, damaged: list[Finding], what: str, remedy: str, read: Any) -> Any:
        """What `read` gives; None, and a finding, when it fails."""
        try:
            return read()
        except BaseException as error:
            if not may_be_damage(error):
                raise
            damaged.append(Finding("damaged", "bad", what, f"{what} cannot be read: {sentence(error)}", remedy=remedy))
            return None

    def _read_runs(self) -> None:
        version = delta.newest_version(self.root, index.TABLE)
        if version is None or version != self._version:
            self._rows = index.tails(self.root, EACH, self._fresh_tables())
            self._version = version

    def _look_slowly(self, beat: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]) -> Seen:
        damaged: list[Finding] = []
        self._or(damaged, "the stages' YAML", "`python orchestrate.py check`", lambda: self._load(beat))
        pointer = self._or(damaged, "the published snapshot", DOCTOR, self._pointer) or {"batch": 0, "tables": {}}
        for table, version in pointer["tables"].items():
            rel = f"lake/{table}"
            look = partial(damages, self.root, rel, version, quickly=True)
            problem = self._or(damaged, f"table {table}", DOCTOR, lambda look=look: next(look(), None))
            if problem:
                damaged.append(Finding("damaged", "bad", f"table {table}", f"table {table}: {problem}", remedy=DOCTOR))
        pointers = self._or(damaged, "the answers", "`python orchestrate.py run query`", self._pointers) or {}
        ended = {run["run_id"]: run["ended_at"] for run in runs}
        return Seen(
            stages=self.project.stages if self.project else {},
            answers=[*_answered(pointers, ended)],
            batch=pointer["batch"],
            quarantined=self._or([], "", "", lambda: self._quarantined(pointer)) or 0,
            lines=[
                (
                    asked,
                    self._or(
                        damaged, f"{asked.question}.{asked.column}", DOCTOR, partial(self._value, asked, pointers)
                    ),
                )
                for asked in self._lines()
            ],
            damaged=damaged,
        )

    def _load(self, beat: Mapping[str, Any] | None) -> None:
        """The stages as `up` runs them, or as they would run."""
        env = beat["env"] if beat else self._env
        if beat and beat.get("release"):
            if self._project_of != (beat["release"], env):
                self.project = releases.load(self.root, beat["release"], env).project
                self._project_of = beat["release"], env
        else:
            self.project = params.load(PROJECT, env)

    def _pointer(self) -> dict[str, Any] | None:
        from etl.lake.snapshot import read_pointer

        return read_pointer(self.root) if self._lake else None

    def _quarantined(self, pointer: Mapping[str, Any]) -> int:
        version = pointer["tables"].get("quarantine")
        return 0 if version is None else delta.file_stats(self.root.table("lake/quarantine", version))[1]

    def _pointers(self) -> dict[str, dict[str, Any]]:
        """Question -> the pointer to its current answer."""
        found = self.root.each(lambda name: self.root.read_json(f"results/{name}/current.json"), self._questions)
        return {name: pointer for name, pointer in zip(self._questions, found, strict=True) if pointer}

    def _lines(self) -> list[Line]:
        alerts = self.project.environment.alerts if self.project else None
        return [line(text) for text in alerts.figures] if alerts else []

    def _value(self, asked: Line, pointers: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The figure of the current answer; read once an answer. None without an answer."""
        from etl.questions import results

        if asked.question not in pointers:
            return None
        run_id = pointers[asked.question]["run_id"]
        if self._figures.get(asked, ("",))[0] != run_id:
            _, frame = results.current(self.root, asked.question)
            self._figures[asked] = run_id, results.figure_of(frame, asked.column)
        return self._figures[asked][1]


def _answered(pointers: Mapping[str, Mapping[str, Any]], ended: Mapping[str, datetime]) -> Iterator[Answered]:
    """Of the answers those whose time is known: by the index, or else by the run's id."""
    for question, pointer in pointers.items():
        stage, _, rest = pointer["run_id"].partition("-")
        at = ended.get(pointer["run_id"])
        if at is None:
            with suppress(ValueError):
                at = datetime.strptime(rest[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        if at:
            yield Answered(question, at, stage, pointer["batch"])


def as_json(told: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    plain = [asdict(finding) | {"since": finding.since and finding.since.isoformat()} for finding in told]
    for line_ in plain:
        del line_["cadence_s"]
    document = {"healthy": is_healthy(told), "sentence": summary(told), "findings": plain}
    return dict(json.loads(json.dumps(document, default=str)))
