"""One notebook run as a job whose state is true: a Papermill engine, and `execute` around it.

Papermill's own bookkeeping calls every cell completed after the kernel was killed, and `sys.exit(0)` a
success (papermill #125, #501). Here a state comes from what happened to the kernel, and a cell that never
ran says so.
"""

import asyncio
import contextlib
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etl import secrets as hidden
from etl.notebook import CHECK_MIME, RECORD_MIME, CheckFailed, Stop
from etl.reports import cards
from etl.runs import journal, outputs
from etl.storage import PROJECT, Root, no_panic

# 1.5 s of import in every process that imports jsonschema, which does without it
sys.modules.setdefault("rfc3987_syntax", None)

log = logging.getLogger(__name__)
ENGINE = "etl-notebooks"
INTERRUPT_S = 2  # from SIGINT to SIGTERM, for a cell to show where it was
FLUSH_S = 0.5  # until a follower sees what was printed
BEAT_S = 5  # between two versions of a growing report
BEAT_SHARE = 0.15  # of its size may have been written before: with this version and the last, less than 2.2 times it
NEAR = 0.9  # of the memory there is: then a SIGKILL out of nowhere was for memory
TAIL_LINES = 12
# what the run's state makes of the cell it ended in
CELL_STATE = {"noop": "ok", "check_failed": "failed", "cancelled": "killed"}
RECEIPT = ("cpu_s", "peak_memory_mb", "bytes_read", "bytes_written")
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
    parent: str | None = None  # run_id of the run that this one repeats
    provenance: dict[str, Any] = field(default_factory=dict)  # of code and machine, as the record keeps it
    secrets: list[str] = field(default_factory=list)  # names whose values may never be written
    memory_mb: int | None = None  # of the kernel's whole process tree; above it the run is killed
    variables: dict[str, str] = field(default_factory=dict)  # of the kernel, besides this process's; never written
    refused: str = ""  # why it cannot begin


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
    parent: str | None = None  # run_id of the run that this one repeats
    deadline_s: float | None = None
    memory_mb: int | None = None  # it might take
    provenance: dict[str, Any] = field(default_factory=dict)
    cells: list[dict] = field(default_factory=list)  # code cells: heading, state, seconds
    receipt: dict[str, float | None] = field(default_factory=dict)  # what it cost: wall_s, cpu_s, peak_memory_mb, ...

    @property
    def ok(self) -> bool:
        return self.state in ("ok", "noop")


def execute(
    request: RunRequest,
    on_cell: Callable[[int, int, str], None] | None = None,
    cancel: threading.Event | None = None,
    page_later: bool = False,
) -> RunRecord:
    """Run the notebook, then write its report and its row in the index of runs.

    With `page_later` it returns when the executed notebook and the record are saved; the row and the page follow in the
    background, and if this process dies before, at the next start. `journal.settle` waits for them.

    Whatever the notebook does ends in the record's state and raises nothing. `on_cell(done, total, heading)`
    is called before each code cell and at the end; setting `cancel` ends the run, and so does Ctrl-C. SIGTERM in the
    main thread ends it as killed, and this process when its report is written. A root that is down is a warning: the
    report waits in the spool. Fit for several threads at once; the calling thread must have no running event loop.
    """
    with _signals() as got:
        run = _Run(request, on_cell, cancel or threading.Event(), got)
        try:
            run.execute()
        except BaseException:
            run.journal.close()
            raise
        run.hand_in(page_later)
        record = run.record
        reason = f" ({record.reason})" if record.reason else ""
        level = logging.INFO if record.ok else logging.ERROR
        log.log(level, "run %s %s in %.1f s%s", record.run_id, record.state, record.seconds, reason)
    for number in got:  # the handler is the old one again
        signal.raise_signal(number)
    return record


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process at once, if this is the main thread and nobody else does."""
    got: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, lambda number, _: got.append(number))
    try:
        yield got
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


class _Ended(Exception):
    """The notebook has ended; keeps Papermill from adding its own reading of that."""


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
            raise _Ended

    papermill_engines.register(ENGINE, TrueStates)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("traitlets").setLevel(logging.INFO)  # at DEBUG nbclient logs every message, secrets and all


class _Run:
    """One notebook on one kernel, from start to its true end."""

    def __init__(self, request: RunRequest, on_cell: Callable | None, cancel: threading.Event, got: list[int]):
        import nbformat

        self.request, self.on_cell, self.cancel, self.got = request, on_cell, cancel, got
        self.redactor = hidden.for_request(request)
        self.began = time.monotonic()
        self.record = _new_record(request)
        self.nb = nbformat.from_dict(request.notebook)
        self.kernel: Any = None
        self.at = -1  # index of the cell that is running or ran last; before the first, the kernel starts
        self.ending: str | None = None  # timed_out, cancelled or killed, when we end it
        self.stacks: tuple[str, dict | None] = ("", None)  # where it was then
        self.beat_at, self.flush_at, self.written = self.began + BEAT_S, self.began, 0
        self.beating: Any = None  # the write of a growing report that is under way
        self._prepare()
        with contextlib.suppress(OSError):  # who delivers a dead run's report makes no root that is gone again
            Root.at(request.root).make()
        self.journal = journal.Journal(request, self.nb, self.redactor)
        self.shown = outputs.Outputs(self.redactor, self.journal)

    def execute(self) -> None:
        """Run it through Papermill; complete the record and the notebook's metadata."""
        _register_engine()
        if refused := [self.request.refused] if self.request.refused else hidden.missing(self.request):
            reason = self._said(" ".join("; ".join(refused).split()))[:300]
            self.record.state, self.record.reason = "failed", reason
        else:
            self._execute()
        self._complete()

    def _execute(self) -> None:
        import papermill

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
            self.record.state, self.record.reason = "failed", _one_line(self._said(str(error)), type(error).__name__)

    def hand_in(self, page_later: bool) -> None:
        """Write report, row and page; when their place is down, keep them in the spool and say so."""
        with self._handing_in():
            root = Root.at(self.record.root)
            journal.save(root, self.record, self.nb, self.journal.folder)
            journal.later(functools.partial(self._finish, root)) if page_later else self._finish(root)

    def _finish(self, root: Root) -> None:
        with self._handing_in():
            journal.finish(root, self.record, self.nb, self.journal.folder)
            journal.deliver(root)
        self.journal.close()  # until now nobody else may finish it

    @contextlib.contextmanager
    def _handing_in(self) -> Iterator[None]:
        record, folder = self.record, self.journal.folder
        try:
            with no_panic():
                yield
        except Exception as error:  # the work is done or it is not: a place for reports that is down changes nothing
            text = "the report of run %s could not be written to %s; it waits in %s and is delivered later: %s"
            log.warning(text, record.run_id, record.root, folder, _one_line(error))
            journal.keep_aside(record, self.nb, folder)
            self.journal.close()

    def _prepare(self) -> None:
        """Put the injected cell after the parameters cell, and mark every cell as one that never ran."""
        import nbformat

        from etl import params

        cells = [cell for cell in self.nb.cells if not _tagged(cell, "injected-parameters")]
        place = next((i + 1 for i, cell in enumerate(cells) if _tagged(cell, "parameters")), 0)
        source = params.injected_cell_source(self.request.parameters, declared=self.request.parameters)
        cells.insert(place, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))
        self.nb.metadata["runner"] = {"run_id": self.request.run_id, "state": "running"}
        self.nb.cells, self.headings, heading = cells, [], "the first cell"
        for cell in cells:
            cell.metadata["runner"] = {"state": "never_ran", "seconds": None}
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            heading = self.redactor.text(_heading(cell) or "") or heading
            self.headings.append(heading)

    async def drive(self, kernel_name: str) -> None:
        """Run the cells on a kernel of their own; end both at the deadline, or when cancelled."""
        cells = asyncio.create_task(self._run_cells(kernel_name))
        deadline = self.began + self.request.deadline_s
        try:
            while not cells.done() and self.ending is None:
                await asyncio.wait({cells}, timeout=min(0.1, max(0, deadline - time.monotonic())))
                self._keep_up()
                if self.got:
                    self.ending = "killed"
                elif self.cancel.is_set():
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
            self.journal.event("ending", state=self.ending)
            if self.kernel:
                await self._show_stacks()
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

    def _keep_up(self) -> None:
        """Let followers see what was shown; now and then write the growing report, if there is anything new in it."""
        from etl.reports import page

        now = time.monotonic()
        if now >= self.flush_at:
            self.flush_at = now + FLUSH_S
            self.journal.flush()
        if now < self.beat_at or self.written > BEAT_SHARE * self.journal.size:
            return
        self.beat_at = now + BEAT_S
        if self.beating and not self.beating.done():
            return
        data = page.notebook(self.redactor.notebook(self.nb))
        if self.written <= BEAT_SHARE * len(data):
            self.written += len(data)
            self.beating = asyncio.get_running_loop().run_in_executor(None, self._beat, data)

    def _beat(self, data: bytes) -> None:
        try:
            Root.at(self.request.root).write(f"{self.record.report}/report.ipynb", data)
        except Exception as error:  # at the end it is tried again
            log.warning("the report of run %s cannot be written now: %s", self.request.run_id, _one_line(error))

    async def _show_stacks(self) -> None:
        """Put the lines at which the kernel's threads are into the report, before they are interrupted."""
        if self.at >= 0:
            self._show_stacks_of(await self.kernel.stacks())

    def _show_stacks_of(self, written: str) -> None:
        """Of what faulthandler has written."""
        from nbformat.v4 import new_output

        text, frame = cards.stacks(written, self.nb.cells)
        self.stacks = (text := self._said(text)), frame
        if text and self.at >= 0 and "outputs" in (cell := self.nb.cells[self.at]):
            self.shown.show(cell.outputs, new_output("display_data", data={"text/plain": text}))

    async def _run_cells(self, kernel_name: str) -> None:
        """Run cell after cell. Raises what ends the run early."""
        from etl.kernels import client as kernel_client
        from etl.kernels import launch

        env = {**os.environ, **self.request.variables, "PYTHONPATH": kernel_client.python_path()}
        notebooks = PROJECT / "notebooks"  # a cloud machine gets the code without it
        cwd = notebooks if notebooks.is_dir() else PROJECT
        box = {"journal": self.journal.path, "memory_mb": self.request.memory_mb}
        self.kernel = await launch.start(kernel_name, self._announce, cwd=cwd, env=env, **box)
        await self.kernel.ready()
        client = outputs.client_class()(
            self.nb,
            km=self.kernel.manager,
            timeout=None,
            iopub_timeout=60,  # for outputs that are still on their way when their cell has ended
            raise_on_iopub_timeout=True,
            on_cell_executed=_refuse_false_success,
        )
        client.kc, client.shown, client.redactor = self.kernel.client, self.shown, self.redactor
        total, done = sum(cell.cell_type == "code" for cell in self.nb.cells), 0
        for index, cell in enumerate(self.nb.cells):
            if self.ending:
                return
            if self.on_cell and cell.cell_type == "code":
                self.on_cell(done, total, self.headings[index])
            self.at, begun, state = index, time.monotonic(), cell.metadata.runner
            state["state"] = "running"
            if cell.cell_type == "code":
                self.shown.start(index)
                self.journal.event("cell_start", index=index, heading=self.headings[index])
                self.kernel.tell(index)
            try:
                await client.async_execute_cell(cell, index)
            finally:
                state["seconds"] = round(time.monotonic() - begun, 3)
                self.shown.finish(cell.get("outputs", []))
            if state["state"] == "running":
                state["state"] = "ok"
            if cell.cell_type == "code":
                done += 1
                self.journal.event("cell_end", index=index, state=state["state"], seconds=state["seconds"])
        if self.on_cell:
            self.on_cell(done, total, "")

    def _announce(self, folder: Path) -> None:
        """Before the kernel in `folder` exists, so that it is found however early this process dies."""
        self.journal.event("kernel", folder=str(folder))

    def _mark_cell(self, state: str) -> None:
        """The cell that is running ends with the run, in `state`."""
        if self.at >= 0 and self.nb.cells[self.at].metadata.runner["state"] == "running":
            self.nb.cells[self.at].metadata.runner["state"] = CELL_STATE.get(state, state)

    def _judge(self, ended_by: BaseException | None) -> None:
        """Decide the run's one state, the reason and the error to show, from how it ended."""
        from nbclient.exceptions import CellExecutionError, DeadKernelError

        record, error = self.record, self._shown_error()
        where = f"in {self.headings[self.at]!r}" if self.at >= 0 else "while the kernel started"
        log_tail = self._said(self.kernel.log_tail()) if self.kernel else ""
        if self.ending == "timed_out":
            record.state = "timed_out"
            record.reason = f"deadline of {self.request.deadline_s:g} s passed {where}"
        elif self.ending == "cancelled":
            record.state, record.reason = "cancelled", f"cancelled {where}"
        elif self.ending == "killed":
            record.state, record.reason = "killed", f"the runner got {signal.Signals(self.got[0]).name} {where}"
        elif ended_by is None:
            return
        elif isinstance(ended_by, CellExecutionError):
            evalue = self._said(ended_by.evalue)
            record.state, record.reason = "failed", _one_line(evalue, self._said(ended_by.ename))
            for state, kind in (("noop", Stop), ("check_failed", CheckFailed)):
                # ours, and not one of the same name: only these show one line for a traceback
                if error and error["traceback"] == self.redactor.tree(kind(ended_by.evalue)._render_traceback_()):
                    record.state, record.reason = state, " ".join(evalue.split())[:300]
        elif isinstance(ended_by, DeadKernelError):
            record.state = "killed"
            record.reason = f"the kernel {_how_it_ended(self.kernel.exit_status)} {where}"
            record.reason += _for_memory(self.journal.events("kernel_end", "sample"), self.request.memory_mb)
            if crash := self.kernel.crash():
                self._show_stacks_of(crash)
            last_words = self.stacks[0] or self._said(crash) or log_tail
            error = {"ename": "DeadKernel", "evalue": record.reason, "traceback": [last_words]}
        else:
            evalue = self._said(str(ended_by))
            record.state, record.reason = "failed", _one_line(evalue, type(ended_by).__name__)
            if self.at < 0:
                record.reason = f"the kernel did not start: {record.reason}"
            error = {"ename": type(ended_by).__name__, "evalue": evalue, "traceback": [log_tail]}
        self._mark_cell(record.state)
        if not record.ok and self.stacks[0] and not error:
            error = {"ename": "Stuck", "evalue": record.reason, "traceback": [self.stacks[0]]}
        if not record.ok and error:
            text = _plain_text("\n".join(error["traceback"]))
            frame = self.stacks[1] or cards.own_frame(text, self.nb.cells)
            record.error = {
                "ename": error["ename"],
                "evalue": error["evalue"],
                "cell": self.at + 1 if self.at >= 0 else None,  # the card comes first
                "heading": self.headings[self.at] if self.at >= 0 else None,
                "frame": frame and frame | {"code": self._said(frame["code"])},
                "traceback_tail": "\n".join(text.splitlines()[-TAIL_LINES:]),
            }

    def _said(self, text: str) -> str:
        """What the notebook's code said, as it may be written. Not after a cut: half a secret is not found."""
        return self.redactor.text(text)

    def _shown_error(self) -> dict | None:
        """The error that the last cell shows; after an interrupt, the line that was blocked."""
        outputs = self.nb.cells[self.at].get("outputs", []) if self.at >= 0 else []
        return next((output for output in reversed(outputs) if output.output_type == "error"), None)

    def _complete(self) -> None:
        """Bring record and notebook to their end, and say so in the journal."""
        record = self.record
        record.ended_at, record.seconds = _now(), round(time.monotonic() - self.began, 3)
        if self.at >= 0 and record.state != "ok" and self.nb.cells[self.at].cell_type == "code":
            self.journal.event("cell_end", index=self.at, **self.nb.cells[self.at].metadata.runner)
        self.nb, record.parameters = self.redactor.notebook(self.nb), self.redactor.parameters(record.parameters)
        _finish(record, self.nb, self.journal.events("sample", "ending", "kernel_end"), self.redactor)
        self.journal.event("end", state=record.state, reason=record.reason, record=asdict(record))


def _new_record(request: RunRequest) -> RunRecord:
    return RunRecord(
        stage=request.stage,
        run_id=request.run_id,
        root=request.root,
        scheduled_for=request.scheduled_for,
        attempt=request.attempt,
        parameters=request.parameters,
        origins=request.origins,
        parent=request.parent,
        deadline_s=request.deadline_s,
        memory_mb=request.memory_mb,
        provenance=request.provenance,
        report=f"reports/{request.stage}/{request.scheduled_for[:10]}/{request.run_id}",
        host=socket.gethostname(),
        started_at=_now(),
    )


def _finish(record: RunRecord, nb: Any, events: list[dict], redactor: hidden.Redactor) -> None:
    """Collect what the notebook recorded and what the run cost; write the run's end into the notebook."""
    heading = "the first cell"
    for cell in nb.cells:
        _collect(record, cell)
        state, seconds = cell.metadata.runner["state"], cell.metadata.runner["seconds"]
        status = PAPERMILL_STATUS.get(state, "failed")
        cell.metadata["papermill"] = {"status": status, "duration": seconds, "exception": status == "failed"}
        heading = _heading(cell) or heading
        if cell.cell_type == "code":
            record.cells.append({"heading": heading, "state": state, "seconds": seconds})
    nb.metadata["papermill"] = {
        "parameters": json.loads(json.dumps(record.parameters, default=str)),
        "start_time": record.started_at,
        "end_time": record.ended_at,
        "duration": record.seconds,
        "exception": not record.ok,
    }
    nb.metadata["runner"] = {"run_id": record.run_id, "state": record.state, "reason": record.reason}
    record.receipt = {"wall_s": record.seconds}
    for used in [event for event in events if event["event"] == "kernel_end"][-1:]:
        record.receipt |= {name: used[name] for name in RECEIPT}
    rows = record.metrics.get("rows")
    if isinstance(rows, int | float) and record.seconds:
        record.receipt["rows_per_s"] = round(rows / record.seconds, 1)
    if not record.ok:
        last_ok = _last_ok(record)
        if last_ok:  # with what may be a secret by now
            last_ok["parameters"] = redactor.parameters(last_ok.get("parameters") or {})
        nb.cells.insert(0, cards.card(record, last_ok))
    ending = next((event["t"] for event in events if event["event"] == "ending"), None)
    samples = [event for event in events if event["event"] == "sample" and (not ending or event["t"] <= ending)]
    if record.state in cards.ENDED and samples:
        nb.cells.append(cards.last_minute(record, samples))
    nb.cells.append(cards.receipt(record))


def _collect(record: RunRecord, cell: Any) -> None:
    """What the cell recorded and checked. Anybody can show outputs of these kinds: others than ours do not count."""
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        recorded, checked = data.get(RECORD_MIME), data.get(CHECK_MIME)
        for kept in ("metrics", "versions_read", "versions_written"):
            if isinstance(recorded, dict) and isinstance(found := recorded.get(kept), dict):
                getattr(record, kept).update(found)
        if isinstance(checked, dict) and isinstance(found := checked.get("checks"), list):
            record.checks += [one for one in found if isinstance(one, dict) and {"name", "ok", "detail"} <= one.keys()]


def _last_ok(record: RunRecord) -> dict | None:
    """The stage's last run that was ok; None, too, when the index cannot be read."""
    from etl.runs import index as run_index

    try:
        root = Root.at(record.root)
        found = run_index.find_last(root, record.stage, before=record.started_at)
        return found and run_index.get(root, found["run_id"])
    except Exception:  # a card without it is still a card
        log.debug("no last run of %s", record.stage, exc_info=True)
        return None


def from_journal(path: Path) -> tuple[RunRecord, Any]:
    """The record and the notebook of a run whose process is gone, as far as its journal tells."""
    import nbformat

    events = journal.read(path)
    start = events[0]
    request = RunRequest(notebook={}, **start["request"])
    try:
        nb = nbformat.read(path.with_name("notebook.ipynb"), as_version=4)
    except (OSError, ValueError):  # of a power cut: what is known of its cells has no place
        nb, events = nbformat.v4.new_notebook(), [event for event in events if "index" not in event]
    record, at, end = _new_record(request), -1, None
    record.started_at = start["t"]
    for event in events:
        kind, index = event["event"], event.get("index")
        if kind == "cell_start":
            for cell in nb.cells[max(at, 0) : index]:  # texts
                if cell.cell_type != "code":
                    cell.metadata.runner["state"] = "ok"
            at = index
            nb.cells[at].metadata.runner["state"] = "running"
        elif kind == "output":
            outputs.apply(nb.cells[index].outputs, event)
        elif kind == "clear":
            nb.cells[index].outputs = []
        elif kind == "cell_end":
            nb.cells[index].metadata.runner |= {"state": event["state"], "seconds": event["seconds"]}
        elif kind == "end":
            end = event["record"]
    if end:
        record = RunRecord(**end)
        record.cells, record.checks = [], []  # collected again
    else:
        where = f"in {_heading_of(nb, at)!r}" if at >= 0 else "while the kernel started"
        record.state, record.reason, record.ended_at = "killed", f"the runner was killed {where}", events[-1]["t"]
        moments = [datetime.datetime.fromisoformat(event["t"]) for event in (start, events[-1])]
        record.seconds = round((moments[1] - moments[0]).total_seconds(), 3)
        if at >= 0:
            tail = outputs.text_tail(nb.cells[at], at, path.parent)
            record.error = {"ename": "RunnerKilled", "evalue": record.reason, "cell": at + 1}
            record.error |= {"heading": _heading_of(nb, at), "frame": None, "traceback_tail": tail}
        for cell in nb.cells:
            if cell.metadata.runner["state"] == "running":
                cell.metadata.runner["state"] = "killed"
    _finish(record, nb, events, hidden.for_request(request))
    return record, nb


def _heading(cell: Any) -> str | None:
    found = re.search(r"^#+ +(.+)", cell.source, re.M) if cell.cell_type == "markdown" else None
    return found[1].strip() if found else None


def _heading_of(nb: Any, index: int) -> str:
    return next((h for cell in nb.cells[index::-1] if (h := _heading(cell))), "the first cell")


def _for_memory(events: list[dict], memory_mb: float | None) -> str:
    """What the black box knows of a death for want of memory: ", 7.7 of 8.0 GB at the time"."""
    ends = [event for event in events if event["event"] == "kernel_end"]
    last = next((event for event in reversed(events) if event["event"] == "sample"), None)
    if not ends or not last or ends[-1]["status"] != -signal.SIGKILL:
        return ""
    if ends[-1]["cause"] == "memory":
        return f": it had taken {last['rss_mb']:,} MB, and may take {memory_mb:,}"
    if ends[-1]["oom_kills"] or last["rss_mb"] > NEAR * last["limit_mb"]:
        return f": memory ran out, {cards.of(last['rss_mb'], last['limit_mb'])} at the time"
    return ""


def _refuse_false_success(cell: Any, execute_reply: dict, **_: Any) -> None:
    """IPython calls exit() a success, and a cell that shows an error, as `%run` of a script that fails does."""
    from nbclient.exceptions import CellExecutionError

    if any(payload.get("source") == "ask_exit" for payload in execute_reply["content"].get("payload", [])):
        raise ExitAsked("a cell called exit(); to end a run early use etl.notebook.stop(reason)")
    error = next((out for out in cell.outputs if out.output_type == "error"), None)
    if error and not _tagged(cell, "raises-exception"):
        raise CellExecutionError.from_cell_and_msg(cell, error)


def _tagged(cell: dict, tag: str) -> bool:
    return tag in (cell.get("metadata", {}).get("tags") or [])


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
