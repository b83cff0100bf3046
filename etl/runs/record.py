"""What a run is asked, and what is known of it: the record and the executed notebook, filled in from its events.

A run tells its events as they happen; when its process dies, its journal tells them once more. Both go through
`Progress`, so a run that ended and one that was cut off are finished by the same code.
"""

import json
import re
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etl.notebook import CHECK_MIME, RECORD_MIME, checks_in
from etl.reports import cards
from etl.runs import outputs
from etl.secrets import Redactor
from etl.storage import PROJECT

STATES = ("ok", "noop", "check_failed", "failed", "timed_out", "killed", "cancelled")  # a run ends in one of them
# what the run's state makes of the cell it ended in
CELL_STATE = {"noop": "ok", "check_failed": "failed", "cancelled": "killed"}
PAPERMILL_STATUS = {"ok": "completed", "never_ran": "pending", "skipped": "pending"}  # otherwise failed
RECEIPT = ("cpu_s", "peak_memory_mb", "bytes_read", "bytes_written")


@dataclass(frozen=True)
class RunRequest:
    """What to run. `parameters` holds JSON values and dates, those the runner supplies among them."""

    stage: str
    run_id: str
    root: str  # absolute URL
    notebook: dict[str, Any]  # in nbformat's form
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
    refused_as: str = "failed"  # or cancelled: it was not to begin
    release: str | None = None  # whose code runs; None: the working tree's
    project: str | None = None  # the folder of that code; None: this process's own


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
    state: str = "ok"  # one of STATES
    reason: str = ""  # one line: why it is not ok
    error: dict[str, Any] | None = None  # ename, evalue, cell (index in the report), heading, frame, traceback_tail
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)  # name, ok, detail
    versions_read: dict[str, int] = field(default_factory=dict)
    versions_written: dict[str, int] = field(default_factory=dict)
    parent: str | None = None  # run_id of the run that this one repeats
    release: str | None = None  # whose code ran; None: the working tree's
    deadline_s: float | None = None
    memory_mb: int | None = None  # it might take
    provenance: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)  # code cells: heading, state, seconds
    receipt: dict[str, float | None] = field(default_factory=dict)  # what it cost: wall_s, cpu_s, peak_memory_mb, ...
    machine: dict[str, Any] = field(default_factory=dict)  # of a run elsewhere: name, type, region, spot, boot_s, ...

    @property
    def ok(self) -> bool:
        return self.state in ("ok", "noop")


class Progress:
    """A run as its events tell it: `record`, the notebook `nb` with the state of each cell, and the cell it is `at`."""

    def __init__(self, request: RunRequest, nb: Any, redactor: Redactor):
        self.record, self.nb, self.redactor = _new_record(request), nb, redactor
        self.project = Path(request.project or PROJECT)
        self.headings = headings(nb, redactor)
        self.at = -1  # index of the code cell that is running or ran last; before the first, the kernel starts
        self._last_event_at = self.record.started_at
        self._ending_at: str | None = None  # when it was told to end
        self._samples: list[dict[str, Any]] = []
        self._kernel_end: dict[str, Any] = {}

    @property
    def where(self) -> str:
        """As in `in 'Write'`."""
        return f"in {self.headings[self.at]!r}" if self.at >= 0 else "while the kernel started"

    def cell(self) -> Any:
        """The code cell that is running or ran last; None before the first."""
        return self.nb.cells[self.at] if self.at >= 0 else None

    def take(self, event: dict[str, Any]) -> None:
        """Fill in what an event of the journal says; of an unknown kind, nothing. Raises KeyError, IndexError."""
        take = getattr(self, f"_take_{event['event']}", None)
        if take:
            take(event)
        self._last_event_at = event["t"]

    def _take_start(self, event: dict[str, Any]) -> None:
        self.record.started_at = event["t"]
        self.record.host = event.get("host", self.record.host)  # an older release did not say
        self.record.provenance = event["request"].get("provenance", self.record.provenance)

    def _take_machine(self, event: dict[str, Any]) -> None:
        self.record.machine = event["machine"]

    def _take_widgets(self, event: dict[str, Any]) -> None:
        self.nb.metadata["widgets"] = event["state"]

    def _take_cell_start(self, event: dict[str, Any]) -> None:
        self._pass_texts(event["index"])
        self.at = event["index"]
        self.cell().metadata.runner["state"] = "running"

    def _take_output(self, event: dict[str, Any]) -> None:
        outputs.apply(self.nb.cells[event["index"]].outputs, event)

    def _take_clear(self, event: dict[str, Any]) -> None:
        self.nb.cells[event["index"]].outputs = []

    def _take_cell_end(self, event: dict[str, Any]) -> None:
        self.nb.cells[event["index"]].metadata.runner |= {"state": event["state"], "seconds": event["seconds"]}

    def _take_ending(self, event: dict[str, Any]) -> None:
        self._ending_at = event["t"]
        self._end_cell(event["state"])

    def _take_sample(self, event: dict[str, Any]) -> None:
        self._samples.append(event)

    def _take_kernel_end(self, event: dict[str, Any]) -> None:
        self._kernel_end = event

    def _take_end(self, event: dict[str, Any]) -> None:
        end = event.get("record", event)  # an older release kept the whole record in it
        self.record.state, self.record.reason, self.record.error = end["state"], end["reason"], end.get("error")
        self.record.seconds, self.record.ended_at = end["seconds"], end.get("ended_at", event["t"])
        self._end_cell(self.record.state)
        if self.record.state == "ok":
            self._pass_texts(len(self.nb.cells))

    def cut_off(self, shown: str) -> None:
        """The process of the run died without a word after its last event; `shown` is the end of what it printed."""
        self.take(self.broken_off("killed", f"the runner was killed {self.where}", shown))

    def broken_off(self, state: str, reason: str, shown: str) -> dict[str, Any]:
        """The last event of a run that did not tell its end: it ended with the event before."""
        moments = [datetime.fromisoformat(text) for text in (self.record.started_at, self._last_event_at)]
        error = self.error("RunnerKilled", reason, frame=None, traceback_tail=shown) if self.at >= 0 else None
        seconds = round((moments[1] - moments[0]).total_seconds(), 3)
        end = {"state": state, "reason": reason, "error": error, "seconds": seconds}
        return {"event": "end", "t": self._last_event_at, **end}

    def error(self, ename: str, evalue: str, frame: dict[str, Any] | None, traceback_tail: str) -> dict[str, Any]:
        """What the record says of the error that ended the run in the cell it is at."""
        return {
            "ename": ename,
            "evalue": evalue,
            "cell": self.at + 1 if self.at >= 0 else None,  # the card comes first
            "heading": self.headings[self.at] if self.at >= 0 else None,
            "frame": frame,
            "traceback_tail": traceback_tail,
        }

    def _pass_texts(self, until: int) -> None:
        for cell in self.nb.cells[max(self.at, 0) : until]:
            if cell.cell_type != "code":
                cell.metadata.runner["state"] = "ok"

    def _end_cell(self, state: str) -> None:
        """The cell that is running ends with the run, in `state`."""
        cell = self.cell()
        if cell and cell.metadata.runner["state"] == "running":
            cell.metadata.runner["state"] = CELL_STATE.get(state, state)

    def finish(self, last_ok: dict[str, Any] | None) -> None:
        """After the end: collect what the notebook recorded and what the run cost, and make the notebook the report.

        `last_ok` is the record of the stage's last run that was ok, for the card of one that is not.
        """
        self.nb = self.redactor.notebook(self.nb)
        self.record.parameters = self.redactor.parameters(self.record.parameters)
        for cell, heading in zip(self.nb.cells, self.headings, strict=True):
            _collect(self.record, cell)
            self._close_cell(cell, heading)
        self._write_receipt()
        self._write_metadata()
        self._add_cards(last_ok)

    def _close_cell(self, cell: Any, heading: str) -> None:
        state, seconds = cell.metadata.runner["state"], cell.metadata.runner["seconds"]
        status = PAPERMILL_STATUS.get(state, "failed")
        cell.metadata["papermill"] = {"status": status, "duration": seconds, "exception": status == "failed"}
        if cell.cell_type == "code":
            self.record.cells.append({"heading": heading, "state": state, "seconds": seconds})

    def _write_receipt(self) -> None:
        record = self.record
        record.receipt = {"wall_s": record.seconds}
        if self._kernel_end:
            record.receipt |= {name: self._kernel_end[name] for name in RECEIPT}
        record.receipt |= {name: record.machine[name] for name in ("boot_s", "dollars") if name in record.machine}
        rows = record.metrics.get("rows")
        if isinstance(rows, int | float) and record.seconds:
            record.receipt["rows_per_s"] = round(rows / record.seconds, 1)

    def _write_metadata(self) -> None:
        record = self.record
        self.nb.metadata["papermill"] = {
            **self.nb.metadata.get("papermill", {}),
            "parameters": json.loads(json.dumps(record.parameters, default=str)),
            "start_time": record.started_at,
            "end_time": record.ended_at,
            "duration": record.seconds,
            "exception": not record.ok,
        }
        self.nb.metadata["runner"] = {"run_id": record.run_id, "state": record.state, "reason": record.reason}

    def _add_cards(self, last_ok: dict[str, Any] | None) -> None:
        record = self.record
        if not record.ok:
            self.nb.cells.insert(0, cards.card(record, last_ok and self.as_shown(last_ok)))
        samples = [sample for sample in self._samples if not self._ending_at or sample["t"] <= self._ending_at]
        if record.state in cards.ENDED and samples:
            self.nb.cells.append(cards.last_minute(record, samples))
        self.nb.cells.append(cards.receipt(record))

    def as_shown(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """The record of an earlier run, without what is a secret by now."""
        parameters = self.redactor.parameters(earlier.get("parameters") or {})
        return earlier | {"parameters": parameters, "metrics": self.redactor.tree(earlier.get("metrics") or {})}


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
        release=request.release,
        deadline_s=request.deadline_s,
        memory_mb=request.memory_mb,
        provenance=request.provenance,
        report=f"reports/{request.stage}/{request.scheduled_for[:10]}/{request.run_id}",
        host=socket.gethostname(),
        started_at=now(),
    )


def _collect(record: RunRecord, cell: Any) -> None:
    """What the cell recorded and checked. Anybody can show outputs of these kinds: others than ours do not count."""
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        recorded, checked = data.get(RECORD_MIME), data.get(CHECK_MIME)
        for name in ("metrics", "versions_read", "versions_written"):
            if isinstance(recorded, dict) and isinstance(values := recorded.get(name), dict):
                getattr(record, name).update(values)
        record.checks += checks_in(checked)


def headings(nb: Any, redactor: Redactor) -> list[str]:
    """For each cell the heading it stands under."""
    under, heading = [], "the first cell"
    for cell in nb.cells:
        match = re.search(r"^#+ +(.+)", cell.source, re.M) if cell.cell_type == "markdown" else None
        heading = redactor.text(match[1].strip()) if match else heading
        under.append(heading)
    return under


def now() -> str:
    """ISO in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
