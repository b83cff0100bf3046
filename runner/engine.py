"""One notebook run as a job whose state is true: a Papermill engine, and `execute` around it.

Papermill's own bookkeeping calls every cell completed after the kernel was killed, and `sys.exit(0)` a
success (papermill #125, #501). Here a state comes from what happened to the kernel, and a cell that never
ran says so.
"""

import asyncio
import datetime
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runner.notebook import CHECK_MIME, RECORD_MIME, CheckFailed, Stop
from storage import PROJECT, Root

# 1.5 s of import in every process that imports jsonschema, which does without it
sys.modules.setdefault("rfc3987_syntax", None)

log = logging.getLogger(__name__)
ENGINE = "etl-notebooks"
INTERRUPT_S = 2  # from SIGINT to SIGTERM, for a cell to show where it was
TAIL_LINES = 12
# what the run's state makes of the cell it ended in
CELL_STATE = {"noop": "ok", "check_failed": "failed", "cancelled": "killed"}
PAPERMILL_STATUS = {"ok": "completed", "never_ran": "pending"}  # otherwise failed


@dataclass(frozen=True)
class RunRequest:
    """What to run. `parameters` holds JSON values and dates, those the runner supplies among them."""

    stage: str
    run_id: str
    root: str  # absolute URL
    notebook: dict  # in nbformat's form
    parameters: dict[str, Any]
    origins: dict[str, str]  # where each parameter's value was written
    scheduled_for: str  # ISO, UTC
    deadline_s: float  # wall clock of the whole run, the kernel's start included
    attempt: int = 1
    host_note: str | None = None  # what kind of machine this is


@dataclass
class RunRecord:
    """What happened. Times are ISO in UTC; `report` is a folder relative to the root."""

    stage: str
    run_id: str
    root: str
    scheduled_for: str
    attempt: int
    parameters: dict[str, Any]
    origins: dict[str, str]
    report: str
    host: str
    started_at: str
    ended_at: str = ""
    seconds: float = 0.0
    state: str = "ok"  # ok noop check_failed failed timed_out killed cancelled
    reason: str = ""  # one line: why it is not ok
    error: dict | None = None  # ename, evalue, cell (index in the report), heading, traceback_tail
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: list[dict] = field(default_factory=list)  # name, ok, detail
    versions_read: dict[str, int] = field(default_factory=dict)
    versions_written: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.state in ("ok", "noop")


def execute(
    request: RunRequest,
    on_cell: Callable[[int, int, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> RunRecord:
    """Run the notebook, then write its report and its row in the index of runs.

    Whatever the notebook does ends in the record's state and raises nothing. `on_cell(done, total, heading)`
    is called before each code cell and at the end; setting `cancel` ends the run, and so does Ctrl-C. Fit for
    several threads at once; the calling thread must have no running event loop.
    """
    from runner import report, runs

    run = _Run(request, on_cell, cancel or threading.Event())
    run.execute()
    record, root = run.record, Root.at(request.root)
    try:
        report.write(root, record, run.nb)
        runs.append(root, record)
    except Exception:  # the work is done or it is not: a place for reports that is down does not change that
        log.exception("the report of run %s could not be written to %s", record.run_id, request.root)
    reason = f" ({record.reason})" if record.reason else ""
    level = logging.INFO if record.ok else logging.ERROR
    log.log(level, "run %s %s in %.1f s%s", record.run_id, record.state, record.seconds, reason)
    return record


class _Ended(Exception):
    """The notebook ended before its last cell; keeps Papermill from adding its own reading of that."""


class ExitAsked(Exception):
    """A cell called exit() or quit(), which IPython reports as a success."""


@functools.cache
def _register_engine() -> None:
    from papermill.engines import Engine, papermill_engines

    class TrueStates(Engine):
        """Instead of Papermill's NotebookExecutionManager, whose states lie."""

        @classmethod
        def execute_notebook(cls, nb, kernel_name, run, **_):
            run.nb = nb
            asyncio.run(run.drive(kernel_name))
            if run.record.state != "ok":
                raise _Ended(run.record.reason)
            return nb

    papermill_engines.register(ENGINE, TrueStates)
    logging.getLogger("papermill").setLevel(logging.WARNING)


class _Run:
    """One notebook on one kernel, from start to its true end."""

    def __init__(self, request: RunRequest, on_cell: Callable | None, cancel: threading.Event):
        import nbformat

        self.request, self.on_cell, self.cancel = request, on_cell, cancel
        self.began = time.monotonic()
        self.record = RunRecord(
            stage=request.stage,
            run_id=request.run_id,
            root=request.root,
            scheduled_for=request.scheduled_for,
            attempt=request.attempt,
            parameters=request.parameters,
            origins=request.origins,
            report=f"reports/{request.stage}/{request.scheduled_for[:10]}/{request.run_id}",
            host=socket.gethostname() + (f" ({request.host_note})" if request.host_note else ""),
            started_at=_now(),
        )
        self.nb = nbformat.from_dict(request.notebook)
        self.kernel: Any = None
        self.at = -1  # index of the cell that is running or ran last; before the first, the kernel starts
        self.ending: str | None = None  # timed_out or cancelled, when we end it

    def execute(self) -> None:
        """Run it through Papermill; complete the record and the notebook's metadata."""
        import papermill

        _register_engine()
        self._prepare()
        try:
            papermill.execute_notebook(
                self.nb,
                None,
                engine_name=ENGINE,
                kernel_name=self.nb.metadata.get("kernelspec", {}).get("name", "python3"),
                progress_bar=False,
                run=self,
            )
        except _Ended:
            pass
        except Exception as error:  # not the notebook's doing, but this run is over
            log.exception("run %s ended by an error of the runner", self.request.run_id)
            self.record.state, self.record.reason = "failed", _one_line(error)
        self._complete()

    def _prepare(self) -> None:
        """Put the injected cell after the parameters cell, and mark every cell as one that never ran."""
        import nbformat

        from runner import params

        cells = [cell for cell in self.nb.cells if not _tagged(cell, "injected-parameters")]
        place = next((i + 1 for i, cell in enumerate(cells) if _tagged(cell, "parameters")), 0)
        source = params.injected_cell_source(self.request.parameters, declared=self.request.parameters)
        cells.insert(place, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))
        self.nb.cells, self.headings, heading = cells, [], "the first cell"
        for cell in cells:
            cell.metadata["runner"] = {"state": "never_ran", "seconds": None}
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            elif found := re.search(r"^#+ +(.+)", cell.source, re.M):
                heading = found[1].strip()
            self.headings.append(heading)

    async def drive(self, kernel_name: str) -> None:
        """Run the cells on a kernel of their own; end both at the deadline, or when cancelled."""
        cells = asyncio.create_task(self._run_cells(kernel_name))
        deadline = self.began + self.request.deadline_s
        try:
            while not cells.done() and self.ending is None:
                await asyncio.wait({cells}, timeout=min(0.1, max(0, deadline - time.monotonic())))
                if self.cancel.is_set():
                    self.ending = "cancelled"
                elif time.monotonic() >= deadline:
                    self.ending = "timed_out"
        except asyncio.CancelledError:  # Ctrl-C in the main thread
            self.ending = "cancelled"
        if cells.done():
            self.ending = None  # it ended by itself before we could
        else:
            # whatever the cell makes of the interrupt: even one that catches it has not run to its end
            self._mark_cell(self.ending)
            if self.kernel:
                self.kernel.signal(signal.SIGINT)
            await asyncio.wait({cells}, timeout=INTERRUPT_S)
        answers = cells.done()
        if not answers:
            cells.cancel()
            await asyncio.wait({cells})
        try:
            self._judge(None if cells.cancelled() else cells.exception())
        finally:
            if self.kernel:
                await self.kernel.close(polite=answers)

    async def _run_cells(self, kernel_name: str) -> None:
        """Run cell after cell. Raises what ends the run early."""
        from nbclient import NotebookClient

        from runner import kernels

        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path}
        folder = PROJECT / "notebooks"  # a cloud machine gets the code without it
        self.kernel = await kernels.start(kernel_name, cwd=folder if folder.is_dir() else PROJECT, env=env)
        await self.kernel.ready()
        client = NotebookClient(
            self.nb,
            km=self.kernel.manager,
            timeout=None,
            coalesce_streams=True,
            iopub_timeout=60,  # for outputs that are still on their way when their cell has ended
            raise_on_iopub_timeout=True,
            on_cell_executed=_refuse_exit,
        )
        client.kc = self.kernel.client
        total, done = sum(cell.cell_type == "code" for cell in self.nb.cells), 0
        for index, cell in enumerate(self.nb.cells):
            if self.ending:
                return
            if self.on_cell and cell.cell_type == "code":
                self.on_cell(done, total, self.headings[index])
            self.at, begun, state = index, time.monotonic(), cell.metadata.runner
            state["state"] = "running"
            try:
                await client.async_execute_cell(cell, index)
            finally:
                state["seconds"] = round(time.monotonic() - begun, 3)
            if state["state"] == "running":
                state["state"] = "ok"
            done += cell.cell_type == "code"
        if self.on_cell:
            self.on_cell(done, total, "")

    def _mark_cell(self, state: str) -> None:
        """The cell that is running ends with the run, in `state`."""
        if self.at >= 0 and self.nb.cells[self.at].metadata.runner["state"] == "running":
            self.nb.cells[self.at].metadata.runner["state"] = CELL_STATE.get(state, state)

    def _judge(self, ended_by: BaseException | None) -> None:
        """Decide the run's one state, the reason and the error to show, from how it ended."""
        from nbclient.exceptions import CellExecutionError, DeadKernelError

        record, error = self.record, self._shown_error()
        where = f"in {self.headings[self.at]!r}" if self.at >= 0 else "while the kernel started"
        log_tail = self.kernel.log_tail() if self.kernel else ""
        if self.ending == "timed_out":
            record.state = "timed_out"
            record.reason = f"deadline of {self.request.deadline_s:g} s passed {where}"
        elif self.ending == "cancelled":
            record.state, record.reason = "cancelled", f"cancelled {where}"
        elif ended_by is None:
            return
        elif isinstance(ended_by, CellExecutionError):
            record.state, record.reason = "failed", _one_line(ended_by.evalue, ended_by.ename)
            for state, kind in (("noop", Stop), ("check_failed", CheckFailed)):
                # ours, and not one of the same name: only these show one line for a traceback
                if error and error["traceback"] == kind(ended_by.evalue)._render_traceback_():
                    record.state, record.reason = state, " ".join(ended_by.evalue.split())[:300]
        elif isinstance(ended_by, DeadKernelError):
            record.state = "killed"
            record.reason = f"the kernel {_how_it_ended(self.kernel.exit_status)} {where}"
            error = {"ename": "DeadKernel", "evalue": record.reason, "traceback": [log_tail]}
        else:
            record.state, record.reason = "failed", _one_line(ended_by)
            if self.at < 0:
                record.reason = f"the kernel did not start: {record.reason}"
            error = {"ename": type(ended_by).__name__, "evalue": str(ended_by), "traceback": [log_tail]}
        self._mark_cell(record.state)
        if not record.ok and error:
            lines = _plain_text("\n".join(error["traceback"])).splitlines()
            record.error = {
                "ename": error["ename"],
                "evalue": error["evalue"],
                "cell": self.at + 1 if self.at >= 0 else None,  # the card comes first
                "heading": self.headings[self.at] if self.at >= 0 else None,
                "traceback_tail": "\n".join(lines[-TAIL_LINES:]),
            }

    def _shown_error(self) -> dict | None:
        """The error that the last cell shows; after an interrupt, the line that was blocked."""
        outputs = self.nb.cells[self.at].get("outputs", []) if self.at >= 0 else []
        return next((output for output in reversed(outputs) if output.output_type == "error"), None)

    def _complete(self) -> None:
        """Collect what the notebook recorded; write the run's end into the notebook."""
        from runner import report

        record, nb = self.record, self.nb
        record.ended_at, record.seconds = _now(), round(time.monotonic() - self.began, 3)
        for cell in nb.cells:
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                for kept in ("metrics", "versions_read", "versions_written"):
                    getattr(record, kept).update(data.get(RECORD_MIME, {}).get(kept, {}))
                record.checks += data.get(CHECK_MIME, {}).get("checks", [])
            state, seconds = cell.metadata.runner["state"], cell.metadata.runner["seconds"]
            status = PAPERMILL_STATUS.get(state, "failed")
            bad = status == "failed"
            cell.metadata["papermill"] = {"status": status, "duration": seconds, "exception": bad}
        nb.metadata["papermill"] = {
            "parameters": json.loads(json.dumps(record.parameters, default=str)),
            "start_time": record.started_at,
            "end_time": record.ended_at,
            "duration": record.seconds,
            "exception": not record.ok,
        }
        nb.metadata["runner"] = {"run_id": record.run_id, "state": record.state, "reason": record.reason}
        if not record.ok:
            nb.cells.insert(0, report.card(record))


def _refuse_exit(execute_reply: dict, **_: Any) -> None:
    if any(payload.get("source") == "ask_exit" for payload in execute_reply["content"].get("payload", [])):
        raise ExitAsked("a cell called exit(); to end a run early use runner.notebook.stop(reason)")


def _tagged(cell: dict, tag: str) -> bool:
    return tag in cell.get("metadata", {}).get("tags", [])


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def _one_line(error: object, name: str | None = None) -> str:
    """As in `ValueError: the first line of its message`, at most 300 characters."""
    lines = _plain_text(str(error)).strip().splitlines() or [""]
    return f"{name or type(error).__name__}: {lines[0]}"[:300].removesuffix(": ")


def _plain_text(text: str) -> str:
    """Without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
