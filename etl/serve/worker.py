"""A Prefect worker that runs flows in its own process: all the heavy work is in the notebook's kernel.

Prefect's `serve` and its process worker start a Python process a flow run, which costs 2.5 CPU seconds at a cadence of
30 seconds. Here a flow run is a thread.
"""

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from prefect import Flow, flow_engine
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Crashed
from prefect.workers import base
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

log = logging.getLogger(__name__)
# A flow here is never suspended: no thread, event loop and websocket for each run, which wait for a server that hangs.
flow_engine.observe_flow_run_suspension = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment,attr-defined]
# It prints tracebacks of a server that is away; whoever runs `up` is told in a sentence what that means.
base.critical_service_loop = partial(base.critical_service_loop, printer=log.info)  # type: ignore[attr-defined]
POOL = "in-place"
CANCEL_S = 1  # between two looks at what somebody cancelled
AHEAD_S = 2  # runs are known before they are due; more than between two looks, which PREFECT_WORKER_QUERY_SECONDS says
AT_ONCE = 16  # flow runs; a stage has one at a time, see `admit`
SCHEDULED = "scheduled"  # the tag of flow runs that the timetable begins, and not the worker by itself


class Turn:
    """A run of a stage at its time. Who comes first runs it, with Prefect or without; others get what came of it."""

    def __init__(self, time: datetime | None = None):
        self.time = time  # scheduled
        self.cancel = threading.Event()
        self.begun: Future[None] = Future()
        self.result: Future[Any] = Future()
        self._lock = threading.Lock()

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, or gave when another was first. Raises what it raised."""
        with self._lock:
            is_first = not self.begun.done()
            if is_first:
                self.begun.set_result(None)
        if is_first:
            try:
                self.result.set_result(work())
            except BaseException as error:
                self.result.set_exception(error)
        return self.result.result()


class InPlaceWorker(BaseWorker[BaseJobConfiguration, BaseVariables, BaseWorkerResult]):
    """Runs the flow runs of `flows` (deployment id -> flow) in threads of this process.

    `turns` holds one for each flow run that is under way; a flow finds its own by `current_turn`. `admit` is awaited
    before one that somebody asked for, and says why it may not begin, "" when it may; then `leave` is called at its
    end.
    """

    type = POOL
    job_configuration = BaseJobConfiguration
    _description = "Runs notebook flows in the worker's own process."

    def __init__(
        self,
        flows: dict[UUID, Flow[..., Any]],
        admit: Callable[[str, Turn], Awaitable[str]] | None = None,
        leave: Callable[[Turn], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(prefetch_seconds=AHEAD_S, **kwargs)
        self.flows, self._admit, self._leave = flows, admit, leave
        self.turns: dict[UUID, Turn] = {}
        self._begun_by_us: dict[UUID, Turn] = {}
        self._heeding: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="flow")

    async def run(
        self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None
    ) -> BaseWorkerResult:
        """Run the flow to its end, whatever that is: its own state is reported by Prefect's engine."""
        identifier = f"in-place/{flow_run.id}"
        if task_status:
            task_status.started(identifier)
        assert flow_run.deployment_id is not None, "one of ours"
        mine = self._begun_by_us.pop(flow_run.id, None)
        turn = self.turns[flow_run.id] = mine or Turn()
        if self._heeding is None or self._heeding.done():
            self._heeding = asyncio.create_task(self._heed_cancels())
        if self._admit and not mine:
            try:
                if refused := await self._admit(self.flows[flow_run.deployment_id].name, turn):
                    await self.client.set_flow_run_state(flow_run.id, Cancelled(message=refused), force=True)
                    raise _Refused
            except BaseException as error:
                del self.turns[flow_run.id]
                if isinstance(error, _Refused):
                    return BaseWorkerResult(identifier=identifier, status_code=0)
                raise
        context = contextvars.copy_context()
        future = self._threads.submit(context.run, self._run_flow, flow_run, turn)
        await asyncio.wait({asyncio.wrap_future(future)})  # when that is cancelled, the run goes on
        if untold := future.exception():  # Prefect's engine could not tell the server its state
            await self._propose_crashed_state(flow_run, f"its end could not be told: {untold}")
            raise untold
        return BaseWorkerResult(identifier=identifier, status_code=0)

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        """Those of our deployments that somebody asked for: others have theirs in a pool of this name, too."""
        every = await super()._get_scheduled_flow_runs()
        ours = (due for due in every if due.flow_run.deployment_id in self.flows)
        return [due for due in ours if SCHEDULED not in due.flow_run.tags]

    async def begin(self, flow_run: FlowRun, turn: Turn) -> bool:
        """Begin it as if it had been asked for; whether it is on its way. That it cannot be is a warning."""
        self._begun_by_us[flow_run.id] = turn
        self._submitting_flow_run_ids.add(flow_run.id)
        await self._submit_run(flow_run)
        return self._begun_by_us.pop(flow_run.id, None) is None

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

    def _run_flow(self, flow_run: FlowRun, turn: Turn) -> None:
        assert flow_run.deployment_id is not None, "one of ours"
        _turn.set(turn)
        try:
            # a sync flow sleeps about a second at its end to join the heartbeat's thread
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                run_flow(self.flows[flow_run.deployment_id], flow_run=flow_run, return_type="state")
        except (KeyboardInterrupt, SystemExit) as error:  # the flow's own, which Prefect has recorded as a crash
            log.error("flow run %s ended with %r", flow_run.name, error)
        finally:
            del self.turns[flow_run.id]  # not before: the run goes on while the worker is begun again
            if self._leave:
                self._leave(turn)

    async def _heed_cancels(self) -> None:
        """Cancel what somebody cancels on Prefect's page or by its API; Prefect's worker heeds it before a run only."""
        while True:
            await asyncio.sleep(CANCEL_S)
            if self.turns:
                try:
                    await self._cancel_those_cancelled()
                except Exception as error:  # the server is away, or not well: the next look tells
                    log.debug("nobody knows what was cancelled: %s", error)

    async def _cancel_those_cancelled(self) -> None:
        cancelling = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
        ours = FlowRunFilter(id=FlowRunFilterId(any_=list(self.turns)), state=cancelling)
        flow_runs = await self.client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.ID_DESC, limit=AT_ONCE)
        for flow_run in flow_runs:
            if turn := self.turns.get(flow_run.id):
                turn.cancel.set()

    def cancel_all(self) -> None:
        """Cancel every run that is under way, and heed no more."""
        if self._heeding:
            self._heeding.cancel()
        for turn in list(self.turns.values()):
            turn.cancel.set()


class _Refused(Exception):
    """A run that somebody asked for may not begin."""


_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("turn", default=None)


def current_turn() -> Turn:
    """That of the flow run this is called in; a fresh one outside of a worker."""
    return _turn.get() or Turn()


async def reconcile(client: PrefectClient, deployment_ids: list[UUID]) -> tuple[int, int]:
    """Close what an earlier process left: (runs that were under way, runs that are overdue).

    The first are Crashed, as nobody runs them any more. The second are Cancelled: otherwise Prefect would run every
    missed one, oldest first (Prefect #15886). Those that a timetable or Prefect's scheduler made are removed, with
    those of the time to come: the timetable knows them.
    """
    ours = DeploymentFilter(id=DeploymentFilterId(any_=deployment_ids))
    under_way = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    )
    waiting = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    past = datetime.now(UTC) - timedelta(seconds=1)

    async def chosen(runs: FlowRunFilter, offset: int = 0) -> list[FlowRun]:
        return await client.read_flow_runs(
            flow_run_filter=runs, deployment_filter=ours, sort=FlowRunSort.ID_DESC, limit=200, offset=offset
        )

    lost = overdue = kept = 0
    while runs := await chosen(FlowRunFilter(state=under_way)):
        for run in runs:
            await client.set_flow_run_state(run.id, Crashed(message="the process that ran it is gone"), force=True)
        lost += len(runs)
    while runs := await chosen(waiting, kept):
        for run in runs:
            is_past = run.expected_start_time and run.expected_start_time < past
            overdue += bool(is_past)
            if run.auto_scheduled or SCHEDULED in run.tags:
                await client.delete_flow_run(run.id)
            elif is_past:
                await client.set_flow_run_state(run.id, Cancelled(message="missed while nothing ran"), force=True)
            else:
                kept += 1
    return lost, overdue
