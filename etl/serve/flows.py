"""The stages as Prefect flows on their schedules.

One flow and one deployment a stage. What is due, and what overlaps, is the timetable's (timetable.py): a server that is
away, a clock that is set and a slot that leaks hold nothing back. Retries are our own loop inside a run.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "1")  # 10 by default: too coarse for every 30 seconds
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")  # a run's words are in its report
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")  # without an API: an error, not a new server
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import Flow, flow, get_client
from prefect import tags as tag
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.sorting import DeploymentSort, FlowRunSort
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from etl import params
from etl.kernels.children import Deaths
from etl.params import Environment, Project, Stage
from etl.runs import dispatch
from etl.runs.record import RunRecord
from etl.runs.releases import Tree
from etl.serve import services
from etl.serve.released import Trees, Unreadable
from etl.serve.scheduled import ScheduledRuns
from etl.serve.timetable import Kept, NotRun
from etl.serve.worker import POOL, InPlaceWorker, Turn, current_turn, reconcile
from etl.storage import PROJECT, Root

log = logging.getLogger(__name__)
OURS = "etl"  # a tag of every deployment
WATCH_S = 1  # between two looks at the children
ILL_S = 45  # with errors of its own only, until Prefect's server is started again
KEEP_S = 60  # at most, until it is written down how far the schedules are
LOOK_S = 3  # between two looks at what is released
FIRST_S = 60  # at most, from the first run of one stage to that of the next


def stage_flow(
    stage: Stage,
    environment: Environment,
    api_url: str | None = None,
    on_record: Callable[[RunRecord], None] = lambda _: None,
    trees: Trees | None = None,
) -> Flow[..., Any]:
    """The flow of a stage. Its one parameter holds values for the notebook's, in place of those in the YAML.

    Each run takes the stage from what `trees` gives when it begins; without, `stage` of the working tree.
    """

    def name() -> str:
        return f"{stage.name} {_scheduled_time():%H:%M:%S}"

    @flow(
        name=stage.name,
        flow_run_name=name,
        description=f"notebooks/{stage.name}.ipynb",
        validate_parameters=False,
        persist_result=False,
        result_storage=Path("unused"),  # else every run asks the server for one, twice
    )
    def run(parameters: dict[str, Any] | None = None) -> State[Any]:
        turn = current_turn()
        record = turn.run(lambda: run_once(stage, environment, on_record, trees, turn, parameters))
        _tell(record, f"{api_url}/reports/{record.run_id}" if api_url else None)
        return state_of(record)

    return run


def run_once(
    stage: Stage,
    environment: Environment,
    on_record: Callable[[RunRecord], None],
    trees: Trees | None,
    turn: Turn,
    parameters: dict[str, Any] | None = None,
    not_run: NotRun | None = None,
) -> RunRecord:
    """One run of a stage, of what `trees` gives now, to its end; of `not_run` the record alone."""
    chosen, refused, tree = stage, "", Tree(PROJECT, Project(environment, {stage.name: stage}))
    try:
        if trees:
            tree = trees()
        if stage.name not in tree.project.stages:
            raise Unreadable(f"{stage.name} is no stage of the release any more")
        chosen = tree.project.stages[stage.name]
        if parameters:
            chosen = _with_values(chosen, tree, parameters)
    except params.ParamsError as error:
        refused = "; ".join(map(str, error.problems))
    except Unreadable as error:
        refused = str(error)
    record = dispatch.run_stage(
        chosen,
        tree.project.environment,
        scheduled_for=turn.time or _scheduled_time(),
        cancel=turn.cancel,
        page_later=True,
        refused=str(not_run) if not_run else refused,
        refused_as="cancelled" if not_run else "failed",
        release=tree.release,
    )
    on_record(record)
    return record


def _tell(record: RunRecord, link: str | None = None) -> None:
    """Have the page of the flow run say what came of it, in an artifact that leads to the report."""
    link = link or Root.at(record.root).url_of(f"{record.report}/report.html")
    told = f"{record.run_id}: {record.state}{f': {record.reason}' if record.reason else ''}"
    try:
        text, key = f"{record.run_id}: {record.state}", f"report-{record.stage}".replace("_", "-").lower()
        create_link_artifact(link, link_text=text, description=told, key=key)
    except Exception as error:  # the server is away, or not well: what the run is does not depend on that
        log.warning("Prefect has no link to the report of %s: %s", record.run_id, error)


def state_of(record: RunRecord) -> State[Any]:
    """A run's state as Prefect says it. Nothing but ok and noop is Completed."""
    message = f"{record.run_id}: {record.reason or record.state}"
    match record.state:
        case "ok":
            return Completed(message=message)
        case "noop":
            return Completed(name="Noop", message=message)
        case "cancelled":
            return Cancelled(message=message)
        case "killed":
            return Crashed(name="Killed", message=message)
        case other:
            return Failed(
                name={"check_failed": "CheckFailed", "timed_out": "TimedOut"}.get(other, "Failed"), message=message
            )


def run_recorded(
    run: Callable[..., RunRecord], stage: Stage, environment: Environment, *, scheduled_for: datetime, **more: Any
) -> RunRecord:
    """One run now by `run`, which is dispatch.run_stage, recorded in Prefect as a flow run without a deployment."""

    def work() -> list[RunRecord]:
        return [run(stage, environment, scheduled_for=scheduled_for, **more)]

    def state(records: list[RunRecord]) -> State[Any]:
        _tell(records[0])
        return state_of(records[0])

    return _recorded(stage.name, f"{stage.name} {scheduled_for:%Y-%m-%d %H:%M:%S} by hand", work, state)[0]


def run_as_one(name: str, tags: list[str], work: Callable[[], list[RunRecord]]) -> list[RunRecord]:
    """What `work` gives, whose runs are recorded in Prefect as one flow of runs.

    One of the same tags that is still running there is closed: its process was killed.
    """

    def state(records: list[RunRecord]) -> State[Any]:
        bad = [record for record in records if not record.ok]
        message = f"{len(records)} runs, {len(bad)} not ok"
        return Failed(message=message) if bad else Completed(message=message)

    return _recorded(name.split()[0], name, work, state, tags)


def _recorded(
    flow_name: str,
    name: str,
    work: Callable[[], list[RunRecord]],
    state: Callable[[list[RunRecord]], State[Any]],
    tags: Sequence[str] = (),
) -> list[RunRecord]:
    """What `work` gives, recorded in Prefect as a flow run without a deployment, unless its server goes away."""
    begun: list[list[RunRecord]] = []

    @flow(name=flow_name, flow_run_name=name, validate_parameters=False)
    def by_hand() -> State[Any]:
        begun.append([])
        begun[0] += work()
        return state(begun[0])

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), tag(*tags):
        try:
            if tags:
                _close_killed([*tags])
            by_hand(return_state=True)
        except (httpx.HTTPError, RuntimeError) as error:
            if not begun:  # it never began: the server went away after it had answered
                log.warning("not recorded in Prefect: %s", error)
                return work()
            log.warning("the end of %s is not recorded in Prefect: %s", name, error)
    return begun[0]


def _close_killed(tags: list[str]) -> None:
    """Of the flow runs with all of these tags none is under way."""
    under_way = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    chosen = FlowRunFilter(state=under_way, tags=FlowRunFilterTags(all_=tags))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.ID_DESC, limit=200):
            client.set_flow_run_state(run.id, Crashed(message="the process that ran it is gone"), force=True)


async def serve(
    project: Project,
    api_url: str | None,
    children: list[services.Service],
    on_record: Callable[[RunRecord], None],
    on_status: Callable[[str], None],
    trees: Trees | None = None,
    on_tree: Callable[[Tree], Awaitable[None]] | None = None,
    kept: Path | None = None,
    shared: bool = False,
) -> None:
    """Follow the schedules until cancelled; a stage that never ran does at once. Children that die are restarted.

    `trees`: what the runs run, asked again and again; the working tree when None. `on_tree` is awaited with what it
    gave, every LOOK_S seconds. `kept`: a file that remembers between two calls how far each stage is. `shared`:
    whether others have deployments on Prefect's server, too.
    """
    async with get_client() as client:
        environment, file = project.environment, Kept(kept) if kept else None
        runs = ScheduledRuns(
            client,
            lambda stage, turn: turn.run(lambda: run_once(stage, environment, on_record, trees, turn)),
            lambda stage, left: run_once(stage, environment, on_record, trees, Turn(left.last), not_run=left),
            state_of,
            on_status,
        )
        flows: dict[UUID, Flow[..., Any]] = {}
        worker = InPlaceWorker(flows, runs.admit, runs.leave, work_pool_name=pool_of(environment, shared), name="here")
        runs.follow(project.stages)
        runs.timetable.follow(project.stages.values(), _now(), file.read() if file else {})
        flow_of = partial(stage_flow, api_url=api_url, on_record=on_record, trees=trees)
        link = _Link(client, runs, flows, flow_of, shared, on_status)
        following = [
            asyncio.create_task(_following(project, runs, link, trees, on_tree)),
            asyncio.create_task(_announcing(runs, link, children)),
            asyncio.create_task(_working(worker, runs, link)),
            asyncio.create_task(_first_runs(runs, list(project.stages))),
        ]
        try:
            on_status(f"schedules of {len(project.stages)} stages are on; Ctrl-C ends everything")
            await _watching(runs, children, file)
        finally:
            runs.timetable.end()
            _keep(runs, file)
            worker.cancel_all()
            runs.cancel_all()
            for _ in range(50):  # 5 s for kernels to end, reports to be written and states to be told
                if not worker.turns and not runs.under_way:
                    break
                await asyncio.sleep(0.1)
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


async def _first_runs(runs: ScheduledRuns, names: list[str]) -> None:
    """What was missed before, and the first run of what never ran, from one stage to the next: it may read what that
    wrote. Schedules do not wait for it."""
    for name in names:
        runs.timetable.make_up(name, _now())
        until = time.monotonic() + FIRST_S
        while name in runs.under_way and time.monotonic() < until:
            await asyncio.sleep(0.2)


async def _watching(runs: ScheduledRuns, children: list[services.Service], file: Kept | None) -> None:
    """Look at the schedules when something is due, once a second at least, and at the children."""
    looked, kept, told = 0.0, 0.0, ""
    while True:
        now = _now()
        runs.timetable.look(now)
        if time.monotonic() - looked >= WATCH_S:
            looked = time.monotonic()
            for child in children:
                child.ensure()
        if (begun := str(runs.timetable.coming())) != told or time.monotonic() - kept > KEEP_S:
            told, kept = begun, time.monotonic()
            _keep(runs, file)
        coming = min(runs.timetable.coming().values(), default=now + timedelta(days=1))
        await asyncio.sleep(min(WATCH_S, max((coming - _now()).total_seconds(), 0.001)))


def _keep(runs: ScheduledRuns, file: Kept | None) -> None:
    if file:
        try:
            file.write(runs.timetable.past())
        except OSError as error:
            log.warning("how far the schedules are cannot be written down now: %s", error)


async def _following(
    project: Project,
    runs: ScheduledRuns,
    link: "_Link",
    trees: Trees | None,
    on_tree: Callable[[Tree], Awaitable[None]] | None,
) -> None:
    """Have schedules be those of the current release. What goes wrong is a warning, and tried again."""
    warned = ""
    link.wanted = followed = project
    while True:
        try:
            if trees:
                tree = await asyncio.to_thread(trees)
                if on_tree:
                    await on_tree(tree)
                if _schedules(tree.project) != _schedules(followed):
                    link.wanted = followed = tree.project
                    runs.follow(followed.stages)
                    runs.timetable.follow(followed.stages.values(), _now(), {})
                    for name in followed.stages:
                        runs.timetable.make_up(name, _now())
            warned = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != warned:
                log.warning("the release is not followed: %s", text)
            warned = text
        await asyncio.sleep(LOOK_S)


def _schedules(project: Project) -> dict[str, tuple[Any, ...]]:
    """When each stage runs."""
    return {name: (stage.when, stage.missed, stage.overlap) for name, stage in project.stages.items()}


class _Link:
    """Keeps on Prefect's server what belongs there: the deployments of the stages, and none of those that are gone."""

    def __init__(
        self,
        client: PrefectClient,
        runs: ScheduledRuns,
        flows: dict[UUID, Flow[..., Any]],
        flow_of: Callable[..., Flow[..., Any]],
        shared: bool,
        tell: Callable[[str], None],
    ):
        self.wanted: Project | None = None
        self._client, self._runs, self._flows, self._flow_of = client, runs, flows, flow_of
        self._shared, self._tell = shared, tell
        self._deployed: dict[str, tuple[Any, ...]] = {}
        self._is_reconciled = self._is_told = False

    async def look(self) -> None:
        """Deploy what is not as it is wanted. Raises what a server that is away, or not well, does."""
        project = self.wanted
        if project is None:
            return
        environment, pool = project.environment, pool_of(project.environment, self._shared)
        found = await _deployments(self._client, environment, pool, self._shared)
        if not self._is_reconciled:  # before any run of ours can begin: it would be taken for one that was left
            lost, overdue = await reconcile(self._client, list(found)) if found else (0, 0)
            self._is_reconciled = True
            if lost or overdue:
                self._tell(f"closed {lost} runs that an earlier process left, and {overdue} that were missed")
        if self._flows and not any(id in found for id in self._flows):
            self._tell("Prefect has another database: the stages are deployed again")
            self._deployed.clear()
            self._runs.forget()
        wanted = _schedules(project)
        if any(name not in self._runs.ids for name in wanted):
            with contextlib.suppress(ObjectAlreadyExists):
                await self._client.create_work_pool(WorkPoolCreate(name=pool, type=POOL))
        for name, stage in project.stages.items():
            if self._deployed.get(name) != wanted[name] or self._runs.ids.get(name) not in found:
                flow_of_stage = self._flow_of(stage, environment)
                deployment_id = await _apply(flow_of_stage, stage, environment, self._shared)
                self._flows[deployment_id], self._runs.ids[name] = flow_of_stage, deployment_id
                self._deployed[name] = wanted[name]
                found[deployment_id] = False
        gone = [id for id in found if id not in self._runs.ids.values() or self._flows[id].name not in wanted]
        if gone:
            await reconcile(self._client, gone)
        for deployment_id in gone:
            with contextlib.suppress(ObjectNotFound):
                await self._client.delete_deployment(deployment_id)
        for deployment_id in self._flows.keys() - found.keys() | set(gone):
            flow_of_gone = self._flows.pop(deployment_id, None)
            if flow_of_gone and self._runs.ids.get(flow_of_gone.name) == deployment_id:
                del self._runs.ids[flow_of_gone.name]
                self._deployed.pop(flow_of_gone.name, None)
        if not self._is_told:
            self._tell(f"{len(self._flows)} deployments")
            self._is_told = True
        self._runs.paused = {self._flows[id].name for id, is_paused in found.items() if is_paused and id in self._flows}


async def _announcing(runs: ScheduledRuns, link: _Link, children: list[services.Service]) -> None:
    """Have Prefect know what runs when. While its server is away nothing waits for it.

    One of our own that answers with errors again and again is started again: its database is damaged or gone.
    """
    looked, since = 0.0, None
    while True:
        began = time.monotonic()
        try:
            if began - looked > LOOK_S:
                await link.look()
                looked = time.monotonic()
            await runs.announce()
            since = None
        except Exception as error:  # the server is away, or not well: who begins runs says so
            log.info("Prefect is not told: %s: %s", type(error).__name__, error)
            since = since or began
            if time.monotonic() - since > ILL_S:
                since = None
                _see_to_prefect(children, getattr(error, "response", None))
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(WATCH_S)


def _see_to_prefect(children: list[services.Service], response: httpx.Response | None) -> None:
    """Start it again when it answers, with errors; one that does not answer is seen to anyway, one that is ill would be
    no better."""
    for child in children:
        is_answer = response is not None and response.status_code >= 500  # after several times, by Prefect's client
        if child.name == services.PREFECT and child.process and is_answer and not child.ill:
            log.warning("%s answers with errors only: %s", child.name, response)
            child.signal(signal.SIGKILL)


async def _working(worker: InPlaceWorker, runs: ScheduledRuns, link: _Link) -> None:
    """Have the worker look for runs that somebody asks for, whatever its server does; what is due does without."""
    deaths = Deaths()
    while not runs.ids:
        await asyncio.sleep(0.1)
    runs.worker = worker
    while True:
        why = "it ended"
        try:
            await worker.start(printer=log.info)
        except Exception as error:  # Prefect's loops give up on a server that does not answer for a minute, or refuses
            why = f"{type(error).__name__}: {error}"
        deaths.add()
        log.warning("the worker looks for runs again in %.0f s: %s", deaths.wait_s, why)
        await asyncio.sleep(deaths.wait_s)


async def _deployments(client: PrefectClient, environment: Environment, pool: str, shared: bool) -> dict[UUID, bool]:
    """The deployments that `up` has made for this root: id -> whether it is paused.

    Those of before, which had a limit and a schedule of Prefect's, are removed; the oldest do not say which root's.
    """
    tags = _ours(environment) if shared else [OURS]
    deployments = await client.read_deployments(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=tags)),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        sort=DeploymentSort.NAME_ASC,
        limit=200,
    )
    if before := [deployment.id for deployment in deployments if deployment.global_concurrency_limit]:
        await reconcile(client, before)
    for deployment_id in before:
        await client.delete_deployment(deployment_id)
    return {deployment.id: deployment.paused for deployment in deployments if deployment.id not in before}


def pool_of(environment: Environment, shared: bool) -> str:
    """The work pool of this root's `up`; on a server that is shared one of its own."""
    return f"{POOL}-{_mark(environment)}" if shared else POOL


def _mark(environment: Environment) -> str:
    """Of a root: on two machines the same path is not the same root."""
    url = Root.at(environment.root).url
    where = url if "://" in url else f"{socket.gethostname()}:{url}"
    return hashlib.sha256(where.encode()).hexdigest()[:8]


async def _apply(stage_run: Flow[..., Any], stage: Stage, environment: Environment, shared: bool) -> UUID:
    """Make the stage's deployment, or make it anew; its id. It has no schedule of Prefect's: the timetable has it."""
    pool = pool_of(environment, shared)
    deployment = await stage_run.ato_deployment(
        f"{stage.name}-{_mark(environment)}" if shared else stage.name,
        description=f"{stage.when}; missed: {stage.missed}; overlap: {stage.overlap}",
        tags=[*_ours(environment), environment.name],
        work_pool_name=pool,
    )
    return await deployment.aapply(work_pool_name=pool)


def _ours(environment: Environment) -> list[str]:
    """The tags of every deployment that `up` has made for this root."""
    return [OURS, Root.at(environment.root).url]


def _now() -> datetime:
    return datetime.now(UTC)


def _scheduled_time() -> datetime:
    return this_run.scheduled_start_time or datetime.now(UTC)


def _with_values(stage: Stage, tree: Tree, values: dict[str, Any]) -> Stage:
    """The stage with values from a Prefect run's own parameters; they are checked as those of the YAML are."""
    env = tree.project.environment.name
    loaded = params.load(tree.folder, env, stage=stage.name, values=values, values_from="Prefect")
    return loaded.stages[stage.name]
