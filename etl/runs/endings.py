"""How a run ended: its one state, the reason in a line, and the error to show, from what happened to the kernel."""

import re
import signal
from dataclasses import dataclass
from typing import Any

from etl.figures import shortened
from etl.notebook import CheckFailed, Stop
from etl.reports import cards
from etl.runs.record import Progress

NEAR = 0.9  # of the memory there is: then a SIGKILL out of nowhere was for memory
REASON_CHARS = 2000  # of a reason that is kept
TAIL_LINES = 12


@dataclass
class Ending:
    """A state of record.STATES and its reason; `error` as the record keeps it."""

    state: str = "ok"
    reason: str = ""
    error: dict[str, Any] | None = None


@dataclass
class Death:
    """What is known of a kernel that has ended, or did not start: what it wrote besides cell outputs, why it crashed.

    `stacks` is where its threads were at the end, and the main thread's innermost frame of the user's own.
    """

    exit_status: int | None = None
    log_tail: str = ""
    crash: str = ""
    stacks: tuple[str, dict[str, Any] | None] = ("", None)


class ExitAsked(Exception):
    """A cell called exit() or quit(), which IPython reports as a success."""


def asked_for(state: str, progress: Progress, deadline_s: float, signals: list[int]) -> Ending:
    """Of a run that was ended from outside: timed_out, cancelled or killed."""
    reason = {
        "timed_out": f"deadline of {deadline_s:g} s passed {progress.where}",
        "cancelled": f"cancelled {progress.where}",
        "killed": f"the runner got {signal.Signals(signals[0]).name} {progress.where}" if signals else "",
    }
    return Ending(state, reason[state], shown_error(progress))


def by_itself(error: BaseException | None, progress: Progress, death: Death, events: list[dict[str, Any]]) -> Ending:
    """Of a run whose cells came to their end, or raised. `events` are the watcher's."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    if error is None:
        return Ending()
    redactor = progress.redactor
    if isinstance(error, CellExecutionError):
        return _of_cell(error, progress)
    if isinstance(error, DeadKernelError):
        reason = f"the kernel {_how_it_ended(death.exit_status)} {progress.where}"
        reason += for_memory(events, progress.record.memory_mb)
        last_words = death.stacks[0] or redactor.text(death.crash) or death.log_tail
        return Ending("killed", reason, {"ename": "DeadKernel", "evalue": reason, "traceback": [last_words]})
    evalue = redactor.text(str(error))
    reason = one_line(evalue, type(error).__name__)
    if progress.at < 0:
        reason = f"the kernel did not start: {reason}"
    return Ending("failed", reason, {"ename": type(error).__name__, "evalue": evalue, "traceback": [death.log_tail]})


def _of_cell(raised: Any, progress: Progress) -> Ending:
    """`raised` is nbclient's CellExecutionError."""
    redactor, shown = progress.redactor, shown_error(progress)
    evalue = redactor.text(raised.evalue)
    for state, kind in (("noop", Stop), ("check_failed", CheckFailed)):
        # ours, and not one of the same name: only these show one line for a traceback
        if shown and shown["traceback"] == redactor.tree(kind(raised.evalue)._render_traceback_()):
            return Ending(state, shortened(" ".join(evalue.split()), REASON_CHARS), shown)
    return Ending("failed", one_line(evalue, redactor.text(raised.ename)), shown)


def complete(ending: Ending, progress: Progress, stacks: tuple[str, dict[str, Any] | None]) -> Ending:
    """With the error as the record keeps it: none of a run that is ok, else the user's own frame and the last lines."""
    error = ending.error
    if ending.state in ("ok", "noop"):
        return Ending(ending.state, ending.reason)
    if stacks[0] and not error:
        error = {"ename": "Stuck", "evalue": ending.reason, "traceback": [stacks[0]]}
    if not error:
        return ending
    text = plain_text("\n".join(error["traceback"]))
    restored = progress.redactor.restored
    frame = stacks[1] or cards.own_frame(text, progress.nb.cells, progress.project, restored)
    frame = frame and frame | {"code": progress.redactor.text(frame["code"])}
    tail = "\n".join(text.splitlines()[-TAIL_LINES:])
    return Ending(ending.state, ending.reason, progress.error(error["ename"], error["evalue"], frame, tail))


def shown_error(progress: Progress) -> Any:
    """The error that the last cell shows; after an interrupt, the line that was blocked. None when it shows none."""
    cell = progress.cell()
    outs = cell.get("outputs", []) if cell else []
    return next((out for out in reversed(outs) if out.output_type == "error"), None)


def refuse_false_success(cell: Any, execute_reply: dict[str, Any], **_: Any) -> None:
    """IPython calls exit() a success, and a cell that shows an error, as `%run` of a script that fails does."""
    from nbclient.exceptions import CellExecutionError

    if any(payload.get("source") == "ask_exit" for payload in execute_reply["content"].get("payload", [])):
        raise ExitAsked("a cell called exit(); to end a run early use etl.notebook.stop(reason)")
    error = next((out for out in cell.outputs if out.output_type == "error"), None)
    if error and "raises-exception" not in (cell.metadata.get("tags") or []):
        raise CellExecutionError.from_cell_and_msg(cell, error)


def for_memory(events: list[dict[str, Any]], memory_mb: float | None) -> str:
    """What the watcher knows of a death for want of memory: ", 7.7 of 8.0 GB at the time"."""
    ends = [event for event in events if event["event"] == "kernel_end"]
    last = next((event for event in reversed(events) if event["event"] == "sample"), None)
    if not ends or not last or ends[-1]["status"] != -signal.SIGKILL:
        return ""
    if ends[-1]["cause"] == "memory":
        return f": it had taken {last['rss_mb']:,} MB, and may take {memory_mb:,}"
    if ends[-1]["oom_kills"] or last["rss_mb"] > NEAR * last["limit_mb"]:
        return f": memory ran out, {cards.of(last['rss_mb'], last['limit_mb'])} at the time"
    return ""


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def one_line(error: object, name: str | None = None) -> str:
    """As in `ValueError: the first line of its message`, at most REASON_CHARS characters; with the second line where
    the first announces it."""
    first, *more = plain_text(str(error)).strip().splitlines() or [""]
    told = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
    return shortened(f"{name or type(error).__name__}: {told}".removesuffix(": "), REASON_CHARS)


def plain_text(text: str) -> str:
    """Without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
