"""Runs that are due, begun through Prefect while its server is well, and without it when it does not answer.

The timetable says what is due; here a flow run is made for it on Prefect's server, ahead, so that its page shows what
comes, and is begun by the worker when it is due. A server that is away, stopped or has lost its database delays a run
by PATIENCE_S at most: then it runs without, and has its record and report as any other.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from etl.params import Stage
from etl.serve.timetable import MOST, NotRun, Timetable
from etl.serve.worker import AT_ONCE, SCHEDULED, InPlaceWorker, Turn

log = logging.getLogger(__name__)
PATIENCE_S = 5  # with Prefect's server, when a run is due
START_S = 30  # in which nobody wonders that it does not answer yet
FREE_S = 0.2  # between two looks whether a stage is free, for a run that somebody asked for
_Asked = tuple[FlowRun | None, bool]


class ScheduledRuns:
    """Begins what a timetable says, and knows what of each stage is under way.

    `run(stage, turn)` runs one to its end and `leave(stage, not_run)` says what does not run, both in a thread. `ids`:
    the stages' deployments, as far as Prefect knows them.
    """

    def __init__(
        self,
        client: PrefectClient,
        run: Callable[[Stage, Turn], Any],
        leave: Callable[[Stage, NotRun], Any],
        state_of: Callable[[Any], State[Any]],
        tell: Callable[[str], None],
    ):
        self.client = client
        self.ids: dict[str, UUID] = {}
        self.worker: InPlaceWorker | None = None
        self._run, self._leave, self._state_of, self._tell = run, leave, state_of, tell
        self.timetable = Timetable(self._begin, self._leave_soon, self.busy, tell)
        self.under_way: dict[str, Turn] = {}
        self.paused: set[str] = set()  # stages, by Prefect's page
        self._stages: dict[str, Stage] = {}
        self._ahead: dict[str, tuple[datetime, FlowRun]] = {}
        self._untold: list[tuple[UUID, State[Any]]] = []
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="scheduled")
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_away = False
        self._has_warned = False  # that it is
        self._own = uuid4().hex  # in the keys of its flow runs: one asked for twice is made once
        self._warns_from = monotonic() + START_S

    def busy(self, name: str) -> str:
        """Why the stage cannot begin a run now; "" when it can."""
        if turn := self.under_way.get(name):
            since = f"{turn.time:%H:%M:%S}" if turn.time else "before"
            return f"the run of {since} was under way (overlap: {self._stages[name].overlap})"
        return "it was paused in Prefect" if name in self.paused else ""

    def follow(self, stages: dict[str, Stage]) -> None:
        """Remember how the stages want to overlap; the timetable follows their schedules."""
        self._stages = self._stages | stages

    async def admit(self, name: str, turn: Turn) -> str:
        """Have a run that somebody asked for wait for its turn, or say why it may not begin."""
        while name in self.under_way and not turn.cancel.is_set():
            if self._stages[name].overlap == "skip":
                return self.busy(name)
            await asyncio.sleep(FREE_S)
        if turn.cancel.is_set():
            return "cancelled while it waited"
        self.under_way[name] = turn
        return ""

    def leave(self, turn: Turn) -> None:
        """A run that was admitted has ended."""
        for name, other in list(self.under_way.items()):
            if other is turn and not turn.time:
                del self.under_way[name]

    def cancel_all(self) -> None:
        for turn in list(self.under_way.values()):
            turn.cancel.set()

    async def announce(self) -> None:
        """Have Prefect's page show the next run of each stage, and how runs ended that began without it."""
        for flow_run_id, state in self._untold[:AT_ONCE]:  # more of them later: what comes is announced meanwhile
            with contextlib.suppress(ObjectNotFound):
                await self.client.set_flow_run_state(flow_run_id, state, force=True)
            self._untold = self._untold[1:]
            self._answered()
        coming = self.timetable.coming()
        for name, (time, flow_run) in list(self._ahead.items()):
            if coming.get(name) != time and name in self._ahead:
                del self._ahead[name]
                with contextlib.suppress(ObjectNotFound):
                    await self.client.delete_flow_run(flow_run.id)
        for name, time in coming.items():
            if name not in self._ahead and name in self.ids:
                flow_run = await self._made(name, time)
                if self.timetable.coming().get(name) == time:
                    self._ahead[name] = time, flow_run
                else:  # it has come meanwhile
                    await self.client.delete_flow_run(flow_run.id)
        self._answered()

    def _answered(self) -> None:
        """As soon as it does, and not when it knows all that it missed: meanwhile runs hardly wait for it."""
        self._is_away, self._warns_from = False, 0
        if self._has_warned:
            self._has_warned = False
            self._tell("Prefect's server answers again")

    def forget(self) -> None:
        """Prefect has another database: what was announced is not in it."""
        self._ahead.clear()
        self._untold.clear()
        self.ids.clear()

    def _begin(self, stage: Stage, time: datetime) -> None:
        turn = self.under_way[stage.name] = Turn(time)
        made_for, flow_run = self._ahead.get(stage.name, (None, None))
        if made_for == time:
            del self._ahead[stage.name]
        task = asyncio.ensure_future(self._through(stage, turn, flow_run if made_for == time else None))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _made(self, name: str, time: datetime) -> FlowRun:
        """The flow run of that time; the same one when it is there, for an answer may have been lost."""
        about: dict[str, Any] = {"state": Scheduled(scheduled_time=time), "tags": [SCHEDULED]}
        key = f"{self._own} {time.isoformat()}"
        return await self.client.create_flow_run_from_deployment(self.ids[name], **about, idempotency_key=key)

    async def _through(self, stage: Stage, turn: Turn, flow_run: FlowRun | None) -> None:
        """The run through Prefect, or without it; to its end."""
        assert turn.time
        loop, begun = asyncio.get_running_loop(), asyncio.wrap_future(turn.begun)
        patience_s = 1 if self._is_away else PATIENCE_S
        until, asked = loop.time() + patience_s, None
        try:
            while not self._is_linked(stage.name) and loop.time() < until:
                await asyncio.sleep(FREE_S)
            if self._is_linked(stage.name):
                asked = asyncio.ensure_future(self._ask(stage.name, turn, flow_run))
                either: set[asyncio.Future[Any]] = {asked, begun}
                await asyncio.wait(either, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if asked.done() and asked.result()[1]:
                    await asyncio.wait({begun}, timeout=max(until - loop.time(), 1))
            if not begun.done() and flow_run and (why := await self._is_over(flow_run)):
                self._leave_soon(stage, NotRun(turn.time, turn.time, 1, why))
                return
            is_without = not begun.done()
            if is_without:
                if not self._has_warned and monotonic() >= self._warns_from:
                    log.warning("Prefect's server does not answer: runs go on without it")
                    self._has_warned = True
                self._is_away = True
                self._threads.submit(self._without, stage, turn)
            flow_run = await self._shown(stage.name, turn, asked, flow_run)
            if is_without and flow_run and not turn.result.exception():
                self._untold = [*self._untold, (flow_run.id, self._state_of(turn.result.result()))][-MOST:]
        finally:
            if self.under_way.get(stage.name) is turn:
                del self.under_way[stage.name]

    async def _shown(
        self, name: str, turn: Turn, asked: asyncio.Future[_Asked] | None, flow_run: FlowRun | None
    ) -> FlowRun | None:
        """The flow run of a run that has ended by now. Under way, Prefect shows it as soon as its server can."""
        loop, result, ask_from = asyncio.get_running_loop(), asyncio.wrap_future(turn.result), 0.0
        while not result.done():
            if asked and asked.done() and not asked.result()[1]:
                flow_run, asked, ask_from = asked.result()[0], None, loop.time() + PATIENCE_S
            is_time = loop.time() >= ask_from and not (ask_from and self._is_away)
            if not asked and is_time and self._is_linked(name):
                asked = asyncio.ensure_future(self._ask(name, turn, None if ask_from else flow_run))
            either: set[asyncio.Future[Any]] = {result, asked} if asked and not asked.done() else {result}
            await asyncio.wait(either, timeout=None if asked else FREE_S, return_when=asyncio.FIRST_COMPLETED)
        result.exception()  # asyncio would say that nobody has looked
        return asked.result()[0] if asked and asked.done() else flow_run

    def _is_linked(self, name: str) -> bool:
        """Whether Prefect knows the stage, and the worker is at work."""
        return name in self.ids and self.worker is not None and self.worker.is_setup

    def _without(self, stage: Stage, turn: Turn) -> None:
        try:
            self._run(stage, turn)
        except BaseException:  # nobody else would see it
            log.exception("a run of %s was ended by an error", stage.name)

    async def _ask(self, name: str, turn: Turn, flow_run: FlowRun | None) -> _Asked:
        """The flow run, None when the server does not want to know of it; and whether it is on its way."""
        is_on_its_way = False
        try:
            assert turn.time and self.worker
            flow_run = flow_run or await self._made(name, turn.time)
            is_on_its_way = await self.worker.begin(flow_run, turn)
        except Exception as error:
            log.info("no flow run of %s: %s: %s", name, type(error).__name__, error)
        return flow_run, is_on_its_way

    async def _is_over(self, flow_run: FlowRun) -> str:
        """Why a flow run that did not begin will not; "" when that is not known, or not so."""
        try:
            told = await asyncio.wait_for(self.client.read_flow_run(flow_run.id), 1)
        except Exception:  # the server is away, or knows nothing of it any more
            return ""
        if told.state and (told.state.is_cancelled() or told.state.is_cancelling()):
            return "it was cancelled in Prefect"
        return ""

    def _leave_soon(self, stage: Stage, not_run: NotRun) -> None:
        log.info("%s: %s", stage.name, not_run)
        self._threads.submit(self._leave, stage, not_run)
