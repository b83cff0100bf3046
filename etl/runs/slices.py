"""Many runs, each once: a stage at many times or with many values, what failed, and what depended on that.

A slice is a stage, a scheduled time and parameters, and is in the state of the last of its runs in the index. So what
was killed goes on where it stood: what is ok by then is not run again. A scheduled time is a claim, here as anywhere.
"""

import bisect
import contextlib
import contextvars
import functools
import itertools
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from etl import params, secrets
from etl.figures import utc
from etl.params import Environment, Project, Stage
from etl.params.cell import SUPPLIED
from etl.params.stages import seconds
from etl.runs import index, replay
from etl.runs.driver import collected_signals, raise_again
from etl.runs.record import RunRecord, RunRequest
from etl.storage import Root

BAD = ("failed", "check_failed", "timed_out", "killed")  # what was cancelled was meant to be
GOOD = ("ok", "noop")
POLL_S = 0.2  # between two looks whether a signal came


@dataclass(frozen=True)
class Slice:
    """A run that is wanted once. `scheduled_for` is in UTC, in whole seconds; `given` is what else sets it apart.

    `parent`: the run that it repeats. `after`: keys of those that have to come off before; `if_new`: and one of them
    has to do more than nothing.
    """

    stage: Stage
    environment: Environment
    scheduled_for: datetime
    given: str = ""
    parent: str | None = None
    after: frozenset[str] = frozenset()
    if_new: bool = False

    @functools.cached_property
    def key(self) -> str:
        """What makes it the same slice as that of a run."""
        stage = self.stage
        asked = RunRequest(stage.name, "", self.environment.root, {}, stage.values, {}, "", 0, secrets=[*stage.secrets])
        return _key(stage.name, self.scheduled_for, secrets.for_request(asked).parameters(stage.values))

    def __str__(self) -> str:
        when = f"{self.scheduled_for:%Y-%m-%d %H:%M:%S}".removesuffix(":00")
        return f"{self.stage.name} {when} {self.given}".strip()


def _key(stage: str, scheduled_for: datetime, parameters: dict[str, Any]) -> str:
    own = {name: value for name, value in parameters.items() if name not in SUPPLIED}
    return json.dumps([stage, scheduled_for.isoformat(timespec="seconds"), own], sort_keys=True, default=str)


def key_of(row: dict[str, Any]) -> str:
    """The slice of a run, which is a row of the index or its record."""
    return _key(row["stage"], utc(row["scheduled_for"]), row["parameters"])


# --- which ---


def times(stage: Stage, since: datetime, until: datetime, every: str | None) -> list[datetime]:
    """From `since` to before `until`: every so often ("1 day"), or as the stage is scheduled. Raises ValueError."""
    since = since.astimezone(UTC).replace(microsecond=0)
    if every:
        try:
            step = timedelta(seconds=seconds(every))
        except ValueError:
            raise ValueError(f'{every!r} is no duration such as "1 day" or "6 hours"') from None
        return [since + n * step for n in range(max(0, -((since - until) // step)))]
    scheduled, due = [], stage.next_run(since - timedelta(seconds=1))
    while due and due < until:
        scheduled.append(due)
        due = stage.next_run(due)
    return scheduled


def values(stage: str, each: Iterable[str]) -> list[list[tuple[str, str]]]:
    """For each combination of values the overrides that give it, each beside what is said of it: name=v1,v2 -> two.

    A comma inside brackets or quotes parts nothing. Raises ValueError for what is no such list.
    """
    choices = []
    for text in each:
        name, equals, listed = text.partition("=")
        node = None
        with contextlib.suppress(yaml.YAMLError):
            node = yaml.compose(f"[{listed}]", Loader=yaml.SafeLoader)
        if not (equals and name and isinstance(node, yaml.SequenceNode) and node.value):
            raise ValueError(f"{text!r} is not name=value,value")
        parts = [f"[{listed}]"[item.start_mark.index : item.end_mark.index] for item in node.value]
        choices.append([(f"{name if '.' in name else f'{stage}.{name}'}={part}", f"{name}={part}") for part in parts])
    return [list(chosen) for chosen in itertools.product(*choices)]


def linked(groups: Sequence[Sequence[Slice]]) -> list[list[Slice]]:
    """The same, each group after those before it: each slice after those that it may read from.

    What comes at a time is read by what is due from then until the next such time, at least by the first.
    """
    made = []
    for number, group in enumerate(groups):
        after: list[set[str]] = [set() for _ in group]
        due = [slice.scheduled_for for slice in group]
        for before in groups[:number]:
            moments = [*sorted({slice.scheduled_for for slice in before}), datetime.max.replace(tzinfo=UTC)]
            for one in before:
                for at in _readers(due, one.scheduled_for, moments[bisect.bisect(moments, one.scheduled_for)]):
                    after[at].add(one.key)
        made.append([replace(slice, after=frozenset(keys)) for slice, keys in zip(group, after, strict=True)])
    return made


def _readers(due: Sequence[Any], begin: Any, end: Any, key: Callable[[Any], Any] | None = None) -> range:
    """Where of what is due in that order that is which is due from `begin` to before `end`, at least what is first."""
    first = bisect.bisect_left(due, begin, key=key)
    if first == len(due):
        return range(0)
    at_once = bisect.bisect(due, key(due[first]) if key else due[first], key=key)
    return range(first, max(bisect.bisect_left(due, end, key=key), at_once))


def not_ok(root: Root, wanted: Sequence[Slice], since: datetime | None = None) -> list[Slice]:
    """Those of which the last run is not ok, or there is none, each once. `since`: of the runs from then on."""
    wanted = list({slice.key: slice for slice in wanted}.values())
    if not wanted:
        return []
    between = min(slice.scheduled_for for slice in wanted), max(slice.scheduled_for for slice in wanted)
    told = index.told(root, {slice.stage.name for slice in wanted}, since=since, scheduled=between)
    states = {key_of(row): row["state"] for row in told}
    return [slice for slice in wanted if states.get(slice.key) not in GOOD]


def to_repair(project: Project, folder: Path, runs: Sequence[dict[str, Any]]) -> tuple[list[list[Slice]], list[str]]:
    """(for each stage, in the project's order, what is to be run again; what cannot be, and why).

    `runs`: bad ones, of the project in `folder`. Each whose slice is not ok by now; and what depended on it: what of
    the stages after it was due from then until its own stage was ok again, at least the first of each, and has not run
    since it was mended.
    """
    root, order = Root.at(project.environment.root), list(project.stages)
    earliest = min((utc(run["scheduled_for"]) for run in runs), default=None)
    rows = index.told(root, order, scheduled=(earliest, None)) if earliest else []
    last: dict[str, dict[str, Any]] = {}
    bad: dict[str, list[str]] = {}  # run_ids of each slice
    for row in rows:
        last[key := key_of(row)] = row
        bad.setdefault(key, []).extend([row["run_id"]] if row["state"] in BAD else [])
    repeats = {row["parent"]: row for row in rows if row["state"] in GOOD}  # with other parameters, perhaps
    of_stage: dict[str, list[tuple[str, str]]] = {name: [] for name in order}
    for key, row in last.items():
        if row["state"] != "cancelled":
            of_stage[row["stage"]].append((row["scheduled_for"], key))
    due = {name: sorted(slices) for name, slices in of_stage.items()}
    failed: set[str] = set()
    needs: dict[str, set[str]] = {}  # of what depends: the slices that have to come off before
    mended: set[str] = set()  # of what depends: that of which one came off already, with something new
    for key in {key_of(run) for run in runs} & last.keys():
        row = last[key]
        by = next((repeats[run_id] for run_id in bad[key] if run_id in repeats), None)
        if by is None and row["state"] in GOOD or by and by["state"] == "noop":
            continue  # by itself, as by a retry; or nothing is new
        if by is None:
            failed.add(key)
        for other in _dependents(row, due, last):
            if by is None:
                needs.setdefault(other, set()).add(key)
            elif last[other]["started_at"] < by["started_at"]:
                mended.add(other)
    groups, refused, chosen = [], [], dict[str, Slice]()
    for name in order:
        keys = [key for key in failed | needs.keys() | mended if last[key]["stage"] == name]
        for key in sorted(keys, key=lambda key: (last[key]["scheduled_for"], key)):
            before = needs.get(key, set()) if key not in failed else set()
            if before <= chosen.keys():
                try:
                    again = _again(project, folder, last[key])
                except (params.ParamsError, replay.NotRepeatable) as error:
                    refused.append(" ".join(str(error).split()))
                else:
                    after = frozenset(chosen[one].key for one in before)
                    chosen[key] = replace(again, after=after, if_new=bool(after) and key not in mended)
        groups.append([chosen[key] for key in chosen if last[key]["stage"] == name])
    gone = sorted({run["stage"] for run in runs} - set(order))
    return groups, [*refused, *(f"{name} is no stage any more" for name in gone)]


def _dependents(
    row: dict[str, Any], due: dict[str, list[tuple[str, str]]], last: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Of the stages after that of `row`, the slices that were due from its time to the next of its own that is ok."""
    begin, order = row["scheduled_for"], list(due)
    later = due[row["stage"]][bisect.bisect(due[row["stage"]], begin, key=itemgetter(0)) :]
    end = next((time for time, key in later if last[key]["state"] in GOOD), "9999")
    for name in order[order.index(row["stage"]) + 1 :]:
        for at in _readers(due[name], begin, end, key=itemgetter(0)):
            yield due[name][at][1]


def _again(project: Project, folder: Path, row: dict[str, Any]) -> Slice:
    stage, _, _ = replay.recorded(folder, project.environment.name, row)
    return Slice(stage, project.environment, utc(row["scheduled_for"]), parent=row["run_id"])


# --- running them ---


@contextlib.contextmanager
def held(root: Root, stages: Iterable[str]) -> Iterator[None]:
    """Nobody else runs slices of these stages under the root meanwhile. Raises LeaseHeld when somebody does."""
    with contextlib.ExitStack() as stack:
        for stage in sorted(set(stages)):
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            stack.enter_context(root.lease(f"leases/slices/{stage}", holder, wait_s=0))
        yield


def run(
    groups: Iterable[Sequence[Slice]], work: Callable[[Slice, threading.Event], RunRecord], at_once: int = 1
) -> Iterator[tuple[Slice, RunRecord | None]]:
    """Each slice beside its run's record, as they end; one group after the other, `at_once` of a group at a time.

    `work` runs one in a thread, until the event is set. What comes after a bad run is left out; beside what is not
    needed, as nothing new came before it, is None. Ctrl-C and SIGTERM end what is under way and begin no more.
    """
    cancel = threading.Event()
    bad: set[str] = set()
    idle: set[str] = set()
    with (
        ThreadPoolExecutor(at_once, thread_name_prefix="slice") as pool,
        _set_by_interrupt(cancel),
        collected_signals() as signals,
    ):
        for group in groups:
            waiting, under_way = list(group)[::-1], dict[Future[RunRecord], Slice]()
            while under_way or waiting and not cancel.is_set():
                while waiting and len(under_way) < at_once and not cancel.is_set():
                    slice = waiting.pop()
                    if slice.after & bad:
                        bad.add(slice.key)
                    elif slice.if_new and slice.after <= idle:
                        idle.add(slice.key)
                        yield slice, None
                    else:
                        call = contextvars.copy_context().run  # of Prefect's flow, when there is one
                        under_way[pool.submit(call, work, slice, cancel)] = slice
                done, _ = wait(under_way, timeout=POLL_S, return_when=FIRST_COMPLETED)
                if signals:
                    cancel.set()
                for future in done:
                    slice, record = under_way.pop(future), future.result()
                    if record.state != "ok":
                        (idle if record.ok else bad).add(slice.key)
                    yield slice, record
    raise_again(signals)


@contextlib.contextmanager
def _set_by_interrupt(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the event, where it would interrupt; in any case it is set at the end, to end what was begun."""
    before = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        yield
    finally:
        cancel.set()
        if is_ours:
            signal.signal(signal.SIGINT, before)
