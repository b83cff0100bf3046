"""The stages as Prefect flows on their schedules.

One flow and one deployment a stage. Overlap is Prefect's concurrency limit of 1 a deployment; retries are our own loop
inside a run, because a flow's retries and a deployment's limit do not go together (Prefect #22885).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml

os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "1")  # 10 by default: too coarse for a tick of 30 seconds
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")  # without an API: an error, not a new server
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import Flow, flow, get_client
from prefect.artifacts import create_link_artifact
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectAlreadyExists
from prefect.runtime import flow_run as this_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from etl import params
from etl.params import Environment, Project, Stage
from etl.runs import dispatch
from etl.runs.engine import RunRecord
from etl.serve import services
from etl.serve.worker import POOL, InPlaceWorker, cancel_event, reconcile
from etl.storage import PROJECT, Root

log = logging.getLogger(__name__)
WATCH_S = 1  # between two looks at the children


def stage_flow(
    stage: Stage,
    environment: Environment,
    api_url: str | None = None,
    on_record: Callable[[RunRecord], None] = lambda _: None,
) -> Flow:
    """The flow of a stage. Its one parameter holds values for the notebook's, in place of those in the YAML."""

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
    def run(parameters: dict[str, Any] | None = None) -> State:
        given = [
            f"{stage.name}.{key}={yaml.safe_dump(value, default_flow_style=True)}"
            for key, value in (parameters or {}).items()
        ]
        chosen = _with_values(stage, environment, given) if given else stage
        record = dispatch.run_stage(
            chosen, environment, scheduled_for=_scheduled_time(), cancel=cancel_event(), page_later=True
        )
        link = f"{api_url}/reports/{record.run_id}" if api_url else Root.at(record.root).url_of(record.report)
        create_link_artifact(
            link, link_text=f"{record.run_id}: {record.state}", key=f"report-{stage.name}".replace("_", "-")
        )
        on_record(record)
        return state_of(record)

    return run


def state_of(record: RunRecord) -> State:
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
    stage: Stage,
    environment: Environment,
    scheduled_for: datetime,
    on_cell: Callable | None = None,
    parent: str | None = None,
) -> RunRecord:
    """One run now, recorded in Prefect as a flow run without a deployment."""
    asked = {"scheduled_for": scheduled_for, "on_cell": on_cell, "parent": parent, "page_later": True}
    records: list[RunRecord] = []

    @flow(name=stage.name, flow_run_name=f"{stage.name} {scheduled_for:%H:%M:%S} by hand", validate_parameters=False)
    def run() -> State:
        records.append(dispatch.run_stage(stage, environment, **asked))
        return state_of(records[0])

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        try:
            run(return_state=True)
        except (httpx.HTTPError, RuntimeError) as error:
            if not records:  # it never began: the server went away after it had answered
                log.warning("not recorded in Prefect: %s", error)
                return dispatch.run_stage(stage, environment, **asked)
            log.warning("the end of %s is not recorded in Prefect: %s", records[0].run_id, error)
    return records[0]


async def serve(
    project: Project,
    api_url: str,
    children: list[services.Service],
    on_record: Callable[[RunRecord], None],
    on_status: Callable[[str], None],
) -> None:
    """Deploy every stage, run each once, then follow the schedules until cancelled. Children that die are restarted."""
    async with get_client() as client:
        flows = await deploy(project, api_url, on_record)
        lost, overdue = await reconcile(client, list(flows))
        if lost or overdue:
            on_status(f"closed {lost} runs that an earlier process left, and {overdue} that were missed")
        worker = InPlaceWorker(flows, work_pool_name=POOL, name="here")
        task = asyncio.create_task(worker.start(printer=log.info))
        try:
            on_status(f"{len(flows)} deployments; one pass over all stages first")
            await _watching(first_pass(client, flows), task, children)
            for deployment_id in flows:
                await client.update_deployment(deployment_id, DeploymentUpdate(paused=False))
            on_status("schedules are on; Ctrl-C ends everything")
            await _watching(asyncio.Event().wait(), task, children)
        finally:
            worker.cancel_all()
            for _ in range(50):  # 5 s for kernels to end, reports to be written and states to be told
                if not worker.cancels:
                    break
                await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def deploy(project: Project, api_url: str | None, on_record: Callable = lambda _: None) -> dict:
    """One deployment a stage in the pool, its schedule paused: deployment id -> flow, in the project's order."""
    async with get_client() as client:
        with contextlib.suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=POOL, type=POOL))
    flows = {}
    for stage in project.stages.values():
        stage_run = stage_flow(stage, project.environment, api_url, on_record)
        deployment = await stage_run.to_deployment(
            stage.name,
            schedule=schedule_of(stage),
            paused=True,
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1,
                collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
                if stage.overlap == "skip"
                else ConcurrencyLimitStrategy.ENQUEUE,
            ),
            tags=["etl", project.environment.name],
            work_pool_name=POOL,
        )
        flows[await deployment.apply(work_pool_name=POOL)] = stage_run
    return flows


def schedule_of(stage: Stage) -> IntervalSchedule | CronSchedule:
    """The stage's schedule, aligned to the UTC clock."""
    if stage.cron:
        return CronSchedule(cron=stage.cron, timezone="UTC")
    return IntervalSchedule(interval=timedelta(seconds=stage.every_s), anchor_date=params.EPOCH, timezone="UTC")


async def first_pass(client, flows: dict) -> None:
    """Each deployment once, one after the other, so that nothing waits an hour for its first run."""
    for deployment_id in flows:
        flow_run = await client.create_flow_run_from_deployment(deployment_id)
        while not (flow_run.state and flow_run.state.is_final()):
            await asyncio.sleep(0.5)
            flow_run = await client.read_flow_run(flow_run.id)


async def _watching(work, worker: asyncio.Task, children: list[services.Service]) -> None:
    """Wait for `work` while the worker and the children live; one that cannot be kept alive is an error."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task, worker}, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                raise RuntimeError(f"the worker ended: {worker.exception()}")
            for child in children:
                child.ensure()
        await task
    finally:
        task.cancel()


def _scheduled_time() -> datetime:
    return this_run.scheduled_start_time or datetime.now(UTC)


def _with_values(stage: Stage, environment: Environment, given: list[str]) -> Stage:
    """The stage with values from a Prefect run's own parameters; they are checked as those of the command line are."""
    changed = params.load(PROJECT, environment.name, given, stage=stage.name).stages[stage.name]
    origins = {name: where.replace("command line", "Prefect") for name, where in changed.origins.items()}
    return replace(changed, origins=origins)
