"""A Prefect worker that runs flows in its own process: all the heavy work is in the notebook's kernel.

Prefect's `serve` and its process worker start a Python process a flow run, which costs 2.5 CPU seconds at a cadence of
30 seconds. Here a flow run is a thread.
"""

import asyncio
import contextvars
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Crashed
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

log = logging.getLogger(__name__)
POOL = "in-place"
CANCEL_S = 1  # between two looks at what somebody cancelled
AHEAD_S = 2  # runs are known before they are due; more than between two looks, which PREFECT_WORKER_QUERY_SECONDS says
AT_ONCE = 16  # flow runs; a stage is limited to one by its deployment


class InPlaceWorker(BaseWorker[BaseJobConfiguration, BaseVariables, BaseWorkerResult]):
    """Runs the flow runs of `flows` (deployment id -> flow) in threads of this process.

    `cancels` holds an event for each flow run that is under way; setting it cancels the run. A flow finds its own by
    `cancel_event`.
    """

    type = POOL
    job_configuration = BaseJobConfiguration
    _description = "Runs notebook flows in the worker's own process."

    def __init__(self, flows: dict[UUID, Flow[..., Any]], **kwargs: Any):
        super().__init__(prefetch_seconds=AHEAD_S, **kwargs)
        self.flows = flows
        self.cancels: dict[UUID, threading.Event] = {}
        self._heeding: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="flow")

    async def run(
        self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None
    ) -> BaseWorkerResult:
        """Run the flow to its end, whatever that is: its own state is reported by Prefect's engine."""
        identifier = f"in-place/{flow_run.id}"
        if task_status:
            task_status.started(identifier)
        event = self.cancels[flow_run.id] = threading.Event()
        if self._heeding is None or self._heeding.done():
            self._heeding = asyncio.create_task(self._heed_cancels())
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, context.run, self._run_flow, flow_run, event)
        except Exception as error:  # Prefect's engine could not tell the server its state
            await self._propose_crashed_state(flow_run, f"its end could not be told: {error}")
            raise
        return BaseWorkerResult(identifier=identifier, status_code=0)

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        """Those of our deployments: on a server that is shared, others have theirs in a pool of this name, too."""
        return [due for due in await super()._get_scheduled_flow_runs() if due.flow_run.deployment_id in self.flows]

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """As Prefect does it, but when the run is due: it asks once a second, and would be that late or too early."""
        due = flow_run.next_scheduled_start_time or datetime.now(UTC)
        await asyncio.sleep((due - datetime.now(UTC)).total_seconds())
        try:
            await super()._submit_run(flow_run)
        except Exception as error:  # it would end the worker, and every run with it
            log.warning("flow run %s could not be begun; it is tried again: %s", flow_run.name, error)
            self._submitting_flow_run_ids.discard(flow_run.id)

    async def _give_worker_labels_to_flow_run(self, flow_run_id: UUID) -> None:
        """None: there is one worker, and of two runs that begin at once one would find SQLite locked and wait 2 s."""

    def _run_flow(self, flow_run: FlowRun, event: threading.Event) -> None:
        assert flow_run.deployment_id is not None, "one of ours"
        _cancel.set(event)
        try:
            # a sync flow sleeps about a second at its end to join the heartbeat's thread
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                run_flow(self.flows[flow_run.deployment_id], flow_run=flow_run, return_type="state")
        except (KeyboardInterrupt, SystemExit) as error:  # the flow's own, which Prefect has recorded as a crash
            log.error("flow run %s ended with %r", flow_run.name, error)
        finally:
            del self.cancels[flow_run.id]  # not before: the run goes on while the worker is begun again

    async def _heed_cancels(self) -> None:
        """Cancel what somebody cancels on Prefect's page or by its API; Prefect's worker heeds it before a run only."""
        while True:
            await asyncio.sleep(CANCEL_S)
            if self.cancels:
                try:
                    await self._cancel_those_cancelled()
                except Exception as error:  # the server is away, or not well: the next look tells
                    log.debug("nobody knows what was cancelled: %s", error)

    async def _cancel_those_cancelled(self) -> None:
        cancelling = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
        ours = FlowRunFilter(id=FlowRunFilterId(any_=list(self.cancels)), state=cancelling)
        flow_runs = await self.client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.ID_DESC, limit=AT_ONCE)
        for flow_run in flow_runs:
            if event := self.cancels.get(flow_run.id):
                event.set()

    def cancel_all(self) -> None:
        """Cancel every run that is under way, and heed no more."""
        if self._heeding:
            self._heeding.cancel()
        for event in list(self.cancels.values()):
            event.set()


_cancel: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("cancel", default=None)


def cancel_event() -> threading.Event:
    """The event that cancels the flow run this is called in; a fresh one outside of a worker."""
    return _cancel.get() or threading.Event()


async def reconcile(client: PrefectClient, deployment_ids: list[UUID]) -> tuple[int, int]:
    """Close what an earlier process left: (runs that were under way, runs that are overdue).

    The first are Crashed, as nobody runs them any more. The second are Cancelled: otherwise Prefect would run every
    missed one, oldest first (Prefect #15886); the schedule goes on from here instead.
    """
    ours = DeploymentFilter(id=DeploymentFilterId(any_=deployment_ids))
    under_way = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    )
    waiting = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    past = datetime.now(UTC) - timedelta(seconds=1)
    overdue = FlowRunFilterExpectedStartTime(before_=past)  # type: ignore[arg-type]  # pydantic takes any datetime
    closing: list[tuple[FlowRunFilter, State[Any]]] = [
        (FlowRunFilter(state=under_way), Crashed(message="the process that ran it is gone")),
        (FlowRunFilter(state=waiting, expected_start_time=overdue), Cancelled(message="missed while nothing ran")),
    ]
    counts = []
    for chosen, state in closing:
        closed = 0
        while runs := await client.read_flow_runs(
            flow_run_filter=chosen, deployment_filter=ours, sort=FlowRunSort.ID_DESC, limit=200
        ):
            for run in runs:
                await client.set_flow_run_state(run.id, state, force=True)
            closed += len(runs)
        counts.append(closed)
    return counts[0], counts[1]
