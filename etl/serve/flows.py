"""The stages as Prefect flows on their schedules.

One flow and one deployment a stage. Overlap is Prefect's concurrency limit of 1 a deployment; retries are our own loop
inside a run, because a flow's retries and a deployment's limit do not go together (Prefect #22885).
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "1")  # 10 by default: too coarse for every 30 seconds
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")  # without an API: an error, not a new server
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import Flow, flow, get_client
from prefect import tags as tag
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
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
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State, StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
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
from etl.serve.worker import POOL, InPlaceWorker, cancel_event, reconcile
from etl.storage import PROJECT, Root

log = logging.getLogger(__name__)
WATCH_S = 1  # between two looks at the children
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
            scheduled_for=_scheduled_time(),
            cancel=cancel_event(),
            page_later=True,
            refused=refused,
            release=tree.release,
        )
        link = f"{api_url}/reports/{record.run_id}" if api_url else Root.at(record.root).url_of(record.report)
        on_record(record)
        try:
            create_link_artifact(
                link, link_text=f"{record.run_id}: {record.state}", key=f"report-{stage.name}".replace("_", "-")
            )
        except httpx.HTTPError as error:  # the server is away: what the run is does not depend on that
            log.warning("Prefect has no link to the report of %s: %s", record.run_id, error)
        return state_of(record)

    return run


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
    run_now = partial(run, stage, environment, scheduled_for=scheduled_for, **more)
    records: list[RunRecord] = []

    @flow(
        name=stage.name,
        flow_run_name=f"{stage.name} {scheduled_for:%Y-%m-%d %H:%M:%S} by hand",
        validate_parameters=False,
    )
    def by_hand() -> State[Any]:
        records.append(run_now())
        return state_of(records[0])

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        try:
            by_hand(return_state=True)
        except (httpx.HTTPError, RuntimeError) as error:
            if not records:  # it never began: the server went away after it had answered
                log.warning("not recorded in Prefect: %s", error)
                return run_now()
            log.warning("the end of %s is not recorded in Prefect: %s", records[0].run_id, error)
    return records[0]


def run_as_one(name: str, tags: list[str], work: Callable[[], list[RunRecord]]) -> list[RunRecord]:
    """What `work` gives, whose runs are recorded in Prefect as one flow of runs.

    One of the same tags that is still running there is closed: its process was killed.
    """
    begun: list[list[RunRecord]] = []

    @flow(name=name.split()[0], flow_run_name=name, validate_parameters=False)
    def runs() -> State[Any]:
        begun.append([])
        begun[0] += work()
        bad = [record for record in begun[0] if not record.ok]
        message = f"{len(begun[0])} runs, {len(bad)} not ok"
        return Failed(message=message) if bad else Completed(message=message)

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), tag(*tags):
        try:
            _close_killed(tags)
            runs(return_state=True)
        except (httpx.HTTPError, RuntimeError) as error:
            if not begun:
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
    api_url: str,
    children: list[services.Service],
    on_record: Callable[[RunRecord], None],
    on_status: Callable[[str], None],
    trees: Trees | None = None,
    on_tree: Callable[[Tree], Awaitable[None]] | None = None,
) -> None:
    """Deploy every stage, run each once, and follow the schedules until cancelled. Children that die are restarted.

    `trees`: what the runs run, asked again and again; the working tree when None. `on_tree` is awaited with
    what it gave, every LOOK_S seconds, before schedules follow a new one.
    """
    async with get_client() as client:
        flows = await deploy(project, api_url, on_record, trees)
        lost, overdue = await reconcile(client, list(flows))
        if lost or overdue:
            on_status(f"closed {lost} runs that an earlier process left, and {overdue} that were missed")
        worker = InPlaceWorker(flows, work_pool_name=POOL, name="here")
        task = asyncio.create_task(_working(worker))
        following = asyncio.create_task(_following(project, flows, trees, on_tree, api_url, on_record))
        try:
            on_status(f"{len(flows)} deployments; each stage runs once, then on its schedule")
            await _watching(begin(client, flows), task, children)
            on_status("schedules are on; Ctrl-C ends everything")
            await _watching(asyncio.Event().wait(), task, children)
        finally:
            worker.cancel_all()
            for _ in range(50):  # 5 s for kernels to end, reports to be written and states to be told
                if not worker.cancels:
                    break
                await asyncio.sleep(0.1)
            task.cancel()
            following.cancel()
            await asyncio.gather(task, following, return_exceptions=True)


async def _following(
    deployed: Project,
    flows: dict[UUID, Flow[..., Any]],
    trees: Trees | None,
    on_tree: Callable[[Tree], Awaitable[None]] | None,
    api_url: str | None,
    on_record: Callable[[RunRecord], None],
) -> None:
    """Have schedules be those of the current release. What goes wrong is a warning, and tried again."""
    warned, flow_of = "", partial(stage_flow, api_url=api_url, on_record=on_record, trees=trees)
    while trees:
        try:
            tree = await asyncio.to_thread(trees)
            if on_tree:
                await on_tree(tree)
            if _schedules(tree.project) != _schedules(deployed):
                deployed = await _deploy_again(deployed, tree.project, flows, flow_of)
            warned = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != warned:
                log.warning("the release is not followed: %s", text)
            warned = text
        await asyncio.sleep(LOOK_S)


def _schedules(project: Project) -> dict[str, tuple[Any, ...]]:
    """What a deployment is made from, by stage."""
    return {name: (stage.every_s, stage.cron, stage.overlap) for name, stage in project.stages.items()}


async def _deploy_again(
    before: Project, after: Project, flows: dict[UUID, Flow[..., Any]], flow_of: Callable[..., Flow[..., Any]]
) -> Project:
    """Deploy the stages that are new or have another schedule, which is on at once; remove those that are gone.

    Runs that are under way go on.
    """
    now, then = _schedules(after), _schedules(before)
    for name, stage in after.stages.items():
        if now[name] != then.get(name):
            stage_run = flow_of(stage, after.environment)
            flows[await _apply(stage_run, stage, after.environment, paused=False)] = stage_run
    async with get_client() as client:
        for deployment_id, stage_run in list(flows.items()):
            if stage_run.name not in after.stages:
                with contextlib.suppress(ObjectNotFound):
                    await client.delete_deployment(deployment_id)  # with the runs that wait
                del flows[deployment_id]
    return after


async def _working(worker: InPlaceWorker) -> None:
    """Have the worker look for runs, whatever its server does. RuntimeError when it fails by itself again and again."""
    deaths = Deaths()
    while True:
        why, is_servers = "it ended", False
        try:
            await worker.start(printer=log.info)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            # Prefect's loops give up on a server that does not answer for a minute, or that refuses once
            is_servers = isinstance(error, httpx.HTTPError) or "exceeded error threshold" in str(error)
        if deaths.add() > services.MOST and not is_servers:
            raise RuntimeError(f"the worker ended {services.MOST + 1} times within an hour: {why}")
        log.warning("the worker looks for runs again in %.0f s: %s", deaths.wait_s, why)
        await asyncio.sleep(deaths.wait_s)


async def deploy(
    project: Project,
    api_url: str | None,
    on_record: Callable[[RunRecord], None] = lambda _: None,
    trees: Trees | None = None,
) -> dict[UUID, Flow[..., Any]]:
    """One deployment a stage in the pool, its schedule paused: deployment id -> flow, in the project's order."""
    async with get_client() as client:
        with contextlib.suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=POOL, type=POOL))
    flows = {}
    for stage in project.stages.values():
        stage_run = stage_flow(stage, project.environment, api_url, on_record, trees)
        flows[await _apply(stage_run, stage, project.environment, paused=True)] = stage_run
    async with get_client() as client:
        await _remove_others(client, list(flows), _ours(project.environment))
    return flows


async def _apply(stage_run: Flow[..., Any], stage: Stage, environment: Environment, paused: bool) -> UUID:
    """Make the stage's deployment, or make it anew; its id."""
    deployment = await stage_run.ato_deployment(
        stage.name,
        schedule=schedule_of(stage),  # type: ignore[arg-type]  # it takes those of its client, too
        paused=paused,
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1,
            collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            if stage.overlap == "skip"
            else ConcurrencyLimitStrategy.ENQUEUE,
        ),
        tags=[*_ours(environment), environment.name],
        work_pool_name=POOL,
    )
    return await deployment.aapply(work_pool_name=POOL)


def _ours(environment: Environment) -> list[str]:
    """The tags of every deployment that `up` has made for this root."""
    return ["etl", Root.at(environment.root).url]


async def _remove_others(client: PrefectClient, kept: list[UUID], tags: list[str]) -> None:
    """Remove the deployments of stages that are no more, with their schedules, slots and waiting runs."""
    deployments = await client.read_deployments(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=tags)),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        sort=DeploymentSort.NAME_ASC,
        limit=200,
    )
    gone = [deployment.id for deployment in deployments if deployment.id not in kept]
    if gone:
        await reconcile(client, gone)
    for deployment_id in gone:
        await client.delete_deployment(deployment_id)


def schedule_of(stage: Stage) -> IntervalSchedule | CronSchedule:
    """The stage's schedule, aligned to the UTC clock."""
    if stage.cron:
        return CronSchedule(cron=stage.cron, timezone="UTC")
    assert stage.every_s is not None, "where there is no cron"
    return IntervalSchedule(interval=timedelta(seconds=stage.every_s), anchor_date=params.EPOCH, timezone="UTC")


async def begin(client: PrefectClient, flows: dict[UUID, Flow[..., Any]], wait_s: float = FIRST_S) -> None:
    """Each deployment once, one after the other, so that nothing waits an hour for its first run; then its schedule.

    The next one waits for the end of that run, as it may read what it writes, but no longer than `wait_s`.
    """
    for deployment_id, of_stage in list(flows.items()):  # a release may bring others
        until = time.monotonic() + wait_s
        flow_run = await _patiently(partial(client.create_flow_run_from_deployment, deployment_id), of_stage.name)
        while flow_run and not (flow_run.state and flow_run.state.is_final()) and time.monotonic() < until:
            await asyncio.sleep(0.5)
            flow_run = await _patiently(partial(client.read_flow_run, flow_run.id), of_stage.name)
        unpaused = partial(client.update_deployment, deployment_id, DeploymentUpdate(paused=False))
        await _patiently(unpaused, of_stage.name)


async def _patiently(ask: Callable[[], Awaitable[Any]], stage: str) -> Any:
    """What the server answers, asked again while it is away or not well; None, and a warning, when it refuses."""
    while True:
        try:
            return await ask()
        except (httpx.HTTPError, ObjectNotFound) as error:
            response = getattr(error, "response", None)
            if isinstance(error, ObjectNotFound) or response is not None and response.status_code < 500:
                log.warning("the schedule of %s may not be on: %s", stage, error)
                return None
            await asyncio.sleep(WATCH_S)


async def _watching(
    work: Coroutine[Any, Any, object], worker: asyncio.Task[None], children: list[services.Service]
) -> None:
    """Wait for `work` while the worker and the children live; an essential one that does not is an error."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task, worker}, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                await worker
            for child in children:
                child.ensure()
        await task
    finally:
        task.cancel()


def _scheduled_time() -> datetime:
    return this_run.scheduled_start_time or datetime.now(UTC)


def _with_values(stage: Stage, tree: Tree, values: dict[str, Any]) -> Stage:
    """The stage with values from a Prefect run's own parameters; they are checked as those of the YAML are."""
    env = tree.project.environment.name
    loaded = params.load(tree.folder, env, stage=stage.name, values=values, values_from="Prefect")
    return loaded.stages[stage.name]
