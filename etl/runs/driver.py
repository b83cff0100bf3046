"""One notebook on one kernel, from its start to its true end: cell after cell, until the deadline or a signal."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etl import secrets
from etl.kernels import client as kernel_client
from etl.kernels import launch
from etl.reports import cards, page
from etl.runs import endings, outputs
from etl.runs.endings import Death, Ending, one_line
from etl.runs.journal import Journal, spool
from etl.runs.record import CELL_STATE, Progress, RunRequest

log = logging.getLogger(__name__)
INTERRUPT_S = 2  # from SIGINT to SIGTERM, for a cell to show where it was
FLUSH_S = 0.5  # until a follower sees what was printed
BEAT_S = 5  # between two versions of a growing report
BEAT_SHARE = 0.15  # of its size may have been written before: with this version and the last, less than 2.2 times it
POLL_S = 0.1  # between two looks whether it has to end

SKIPPED = "skip-execution"  # tag of a cell that is not to run

OnCell = Callable[[int, int, str], None]


class NotebookRun:
    """A notebook that is run once; `progress` tells how far it came.

    `nb` has its parameters already. `write` takes a growing notebook, as bytes, and may raise. `signals` is filled with
    the numbers of signals that end the run.
    """

    def __init__(
        self,
        request: RunRequest,
        nb: Any,
        journal: Journal,
        write: Callable[[bytes], None],
        cwd: Path,
        on_cell: OnCell | None = None,
        cancel: threading.Event | None = None,
        signals: list[int] | None = None,
        is_capped: bool = True,
    ):
        self.request, self.journal, self.write, self.cwd, self.on_cell = request, journal, write, cwd, on_cell
        self.cancel, self.signals = cancel or threading.Event(), signals if signals is not None else []
        self.began = time.monotonic()
        redactor = secrets.for_request(request)
        mark_never_run(nb, request.run_id)
        self.progress = Progress(request, nb, redactor)
        self.shown = outputs.Outputs(redactor, journal, is_capped)
        self._ending = Ending()
        self._told_to_end: str | None = None  # timed_out, cancelled or killed, when this process ends it
        self._kernel: launch.Kernel | None = None
        self._client: Any = None
        self._death = Death()
        self._cell_s = 0.0  # of the cell that ended last
        self._beat_at, self._flush_at, self._written = self.began + BEAT_S, self.began, 0
        self._beating: asyncio.Future[None] | None = None  # the write of a growing notebook that is under way
        asked = {name: value for name, value in vars(request).items() if name not in ("notebook", "variables")}
        self.progress.take(journal.begin(redactor.notebook(nb), redactor.request(asked)))

    @property
    def nb(self) -> Any:
        return self.progress.nb

    def tell(self, kind: str, **fields: Any) -> None:
        """An event, to the journal and to the record."""
        self.progress.take(self.journal.event(kind, **fields))

    def refuse(self, reason: str, traceback: str = "") -> None:
        """It cannot run, or no longer: the runner's own error, with its traceback, or the schedule's."""
        shown = {"ename": "RunnerError", "evalue": reason, "traceback": [traceback]} if traceback else None
        self._ending = endings.complete(Ending(self.request.refused_as, reason, shown), self.progress, ("", None))

    def end(self) -> None:
        """Say how it ended; the last event."""
        for event in self.journal.events("sample", "kernel_end"):  # the watcher's
            self.progress.take(event)
        if self.nb.metadata.get("widgets"):
            self.tell("widgets", state=self.progress.redactor.notebook(self.nb).metadata.widgets)
        seconds = round(time.monotonic() - self.began, 3)
        self.tell("end", seconds=seconds, **vars(self._ending))

    async def drive(self, kernel_name: str) -> None:
        """Run the cells on a kernel of their own; end both at the deadline, or when cancelled."""
        cells = asyncio.create_task(self._run_cells(kernel_name))
        await self._wait(cells)
        if not cells.done():
            await self._interrupt(cells)
        answers = cells.done()
        if not answers:
            cells.cancel()
            await asyncio.wait({cells})
        try:
            self._judge(None if cells.cancelled() else cells.exception())
        finally:
            if self._kernel:
                await self._kernel.close(polite=answers)

    async def _wait(self, cells: asyncio.Task[None]) -> None:
        """Until the cells are done or have to end."""
        deadline = self.began + self.request.deadline_s
        try:
            while not cells.done() and self._told_to_end is None:
                await asyncio.wait({cells}, timeout=min(POLL_S, max(0, deadline - time.monotonic())))
                self._keep_up()
                if self.signals:
                    self._told_to_end = "killed"
                elif self.cancel.is_set():
                    self._told_to_end = "cancelled"
                elif time.monotonic() >= deadline:
                    self._told_to_end = "timed_out"
        except asyncio.CancelledError:  # Ctrl-C in the main thread
            self._told_to_end = "cancelled"
        if cells.done():
            self._told_to_end = None  # it ended by itself before we could

    async def _interrupt(self, cells: asyncio.Task[None]) -> None:
        """Let the cell show where it is, then interrupt it: even one that catches that has not run to its end."""
        self.tell("ending", state=self._told_to_end)
        if self._kernel:
            if self.progress.at >= 0:
                self._show_stacks(await self._kernel.stacks())
            self._kernel.signal(signal.SIGINT)
        await asyncio.wait({cells}, timeout=INTERRUPT_S)

    def _keep_up(self) -> None:
        """Let followers see what was shown; now and then write the growing notebook, if there is anything new in it."""
        now = time.monotonic()
        if now >= self._flush_at:
            self._flush_at = now + FLUSH_S
            self.journal.flush()
        if now < self._beat_at or self._written > BEAT_SHARE * self.journal.size:
            return
        self._beat_at = now + BEAT_S
        if self._beating and not self._beating.done():
            return
        data = page.notebook(self.progress.redactor.notebook(self.nb))
        if self._written <= BEAT_SHARE * len(data):
            self._written += len(data)
            self._beating = asyncio.get_running_loop().run_in_executor(None, self._beat, data)

    def _beat(self, data: bytes) -> None:
        try:
            self.write(data)
        except Exception as error:  # at the end it is tried again
            log.warning("the report of run %s cannot be written now: %s", self.request.run_id, one_line(error))

    def _show_stacks(self, written: str) -> None:
        """Put the lines at which the kernel's threads were into the report, of what faulthandler has written."""
        from nbformat.v4 import new_output

        text, frame = cards.stacks(written, self.nb.cells, self.progress.project)
        self._death.stacks = (text := self.progress.redactor.text(text)), frame
        cell = self.progress.cell()
        if text and cell and "outputs" in cell:
            self.shown.show(cell.outputs, new_output("display_data", data={"text/plain": text}))

    async def _run_cells(self, kernel_name: str) -> None:
        """Run cell after cell. Raises what ends the run early."""
        client = await self._start_kernel(kernel_name)
        code = [index for index, cell in enumerate(self.nb.cells) if cell.cell_type == "code"]
        for done, index in enumerate(code):
            if self._told_to_end:
                return
            if self.on_cell:
                self.on_cell(done, len(code), self.progress.headings[index])
            await self._run_cell(client, index)
        if self.on_cell:
            self.on_cell(len(code), len(code), "")

    async def _start_kernel(self, name: str) -> Any:
        """nbclient's client of a kernel that is ready for the first cell."""
        project = self.progress.project
        env = {**os.environ, **self.request.variables, **kernel_client.variables(project)}
        if self.request.project:
            env["ETL_SPOOL"] = str(spool())  # by default it is in the folder of the code
        kernel = await launch.start(
            name,
            self._announce,
            self.cwd,
            env,
            journal=self.journal.path,
            memory_mb=self.request.memory_mb,
            project=project,
        )
        self._kernel = kernel
        await kernel.ready()
        client = outputs.client_class()(
            self.nb,
            km=kernel.manager,
            timeout=None,
            iopub_timeout=60,  # for outputs that are still on their way when their cell has ended
            raise_on_iopub_timeout=True,
            on_cell_executed=endings.refuse_false_success,
        )
        client.kc, client.shown, client.redactor = kernel.client, self.shown, self.progress.redactor
        self._client = client
        return client

    async def _run_cell(self, client: Any, index: int) -> None:
        """Run a code cell. How one ends that raises, its run's end tells."""
        cell, begun = self.nb.cells[index], time.monotonic()
        if SKIPPED in (cell.metadata.get("tags") or []):
            self.tell("cell_end", index=index, state="skipped", seconds=None)
            return
        self.shown.start(index)
        self.tell("cell_start", index=index, heading=self.progress.headings[index])
        if self._kernel:
            self._kernel.tell(index)
        try:
            await client.async_execute_cell(cell, index)
        finally:
            self._cell_s = round(time.monotonic() - begun, 3)
            self.shown.finish(cell.outputs)
            client.show_widgets()
        state = cell.metadata.runner["state"]  # no longer running when it was told to end
        self.tell("cell_end", index=index, state="ok" if state == "running" else state, seconds=self._cell_s)

    def _announce(self, folder: Path) -> None:
        """Before the kernel in `folder` exists, so that it is found however early this process dies."""
        self.tell("kernel", folder=str(folder))

    def _judge(self, error: BaseException | None) -> None:
        """Decide how it ended, and tell the end of the cell it ended in."""
        progress = self.progress
        if self._told_to_end:
            ending = endings.asked_for(self._told_to_end, progress, self.request.deadline_s, self.signals)
        else:
            self._look_at_kernel(error)
            ending = endings.by_itself(error, progress, self._death, self.journal.events("kernel_end", "sample"))
        self._ending = endings.complete(ending, progress, self._death.stacks)
        cell = progress.cell()
        if cell and cell.metadata.runner["seconds"] is None:
            state = cell.metadata.runner["state"]
            state = CELL_STATE.get(self._ending.state, self._ending.state) if state == "running" else state
            self.tell("cell_end", index=progress.at, state=state, seconds=self._cell_s)

    def _look_at_kernel(self, error: BaseException | None) -> None:
        """What it left: its last words, and where it crashed."""
        from nbclient.exceptions import DeadKernelError

        if self._kernel:
            self._death.exit_status = self._kernel.exit_status
            self._death.log_tail = self.progress.redactor.text(self._kernel.log_tail())
            if isinstance(error, DeadKernelError) and (crash := self._kernel.crash()):
                self._death.crash = crash
                self._show_stacks(crash)


def mark_never_run(nb: Any, run_id: str) -> None:
    nb.metadata["runner"] = {"run_id": run_id, "state": "running"}
    nb.metadata.pop("widgets", None)  # of a run before
    for cell in nb.cells:
        cell.metadata["runner"] = {"state": "never_ran", "seconds": None}
        if cell.metadata.get("tags", ()) is None:  # as other tools write it
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process at once, if this is the main thread and nobody else does."""
    got: list[int] = []
    numbers: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda number, _: got.append(number))
    try:
        yield got
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def raise_again(signals: list[int]) -> None:
    """What was collected, now that it does again what it did before."""
    for number in signals:
        signal.raise_signal(number)
