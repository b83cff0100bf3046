"""Runs on other machines: how home begins, follows and ends one, and what the machine does: `python -m
etl.runs.elsewhere ROOT RUN_ID`, with the variables it gets on its standard input as JSON.

Home keeps the time: until the machine begins, until the deadline, and of silence. It has the record, also of a machine
that is lost; see `live` for what the two say to each other.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from etl import interpreter, secrets
from etl.runs import delivery, endings, engine, live, machines, provenance, releases
from etl.runs.driver import OnCell, collected_signals, mark_never_run, raise_again
from etl.runs.endings import one_line
from etl.runs.journal import Journal, event_of, spool
from etl.runs.outputs import text_tail
from etl.runs.record import Progress, RunRecord, RunRequest
from etl.storage import Root

if TYPE_CHECKING:
    from etl.runs.machines import Block, Machine

log = logging.getLogger(__name__)
HELD_S = 8  # after the deadline, or a word to end, until home no longer waits for the machine's own account of it


def run(
    request: RunRequest,
    block: "Block",
    on_cell: OnCell | None = None,
    cancel: threading.Event | None = None,
    page_later: bool = False,
) -> RunRecord:
    """Run a request on a machine as `block` says, to its end: record, report and row are those of a run here.

    Raises nothing for what the machine, the way to it or who provides it does. Setting `cancel`, Ctrl-C and SIGTERM end
    the run as they end one here.
    """
    with collected_signals() as signals:
        written = Journal(spool() / request.run_id)
        try:
            followed = Followed(request, block, written, on_cell, cancel or threading.Event(), signals)
            followed.follow()
            delivery.finish(followed.progress)
        except BaseException:
            written.close()
            raise
        delivery.hand_in(followed.progress, written, later=page_later)
        followed.forget()
    record = followed.progress.record
    engine.log_end(record, request)
    raise_again(signals)
    return record


class Followed:
    """A run elsewhere, as home sees it."""

    def __init__(
        self,
        request: RunRequest,
        block: "Block",
        journal: Journal,
        on_cell: OnCell | None,
        cancel: threading.Event,
        signals: list[int],
    ):
        self.request, self.block, self.journal, self.on_cell = request, block, journal, on_cell
        self.cancel, self.signals = cancel, signals
        self.root = Root.at(request.root)
        nb = engine.with_parameters(request)
        mark_never_run(nb, request.run_id)
        redactor = secrets.for_request(request)
        self.progress = Progress(request, nb, redactor)
        told = {name: value for name, value in vars(request).items() if name not in ("notebook", "variables")}
        self.progress.take(journal.begin(redactor.notebook(nb), redactor.request(told)))
        self._code = [index for index, cell in enumerate(nb.cells) if cell.cell_type == "code"]
        self._asked_at = time.monotonic()
        self._began_at: float | None = None
        self._looked_at, self._silent_s = self._asked_at, 0.0
        self._number = 1  # of the part that comes next
        self._end: dict[str, Any] | None = None
        self._told_to_end: str | None = None  # timed_out, cancelled or killed, by home
        self._held_until = 0.0
        self._is_sound = True  # the machine ended the run itself

    def follow(self) -> None:
        """Until it has ended; then the machine is given back."""
        refused = [self.request.refused] if self.request.refused else secrets.missing(self.request)
        refused = refused or machines.problems(self.block, self.root)
        if refused:
            self._refuse(f"no machine: {refused[0]}" if not self.request.refused else refused[0])
            return
        try:
            live.ask(self.root, asdict(self.request) | {"silence_s": self.block.silence_s})
        except Exception as error:
            self._refuse(f"no machine: the root cannot be written to: {one_line(error)}")
            return
        machine = machines.of(self.block, self.request)
        self.progress.take(self.journal.event("machine", machine=machine.facts))
        begun = _Begun(machine)
        try:
            while self._end is None:
                try:
                    self._look(begun)
                    if self._end is None:
                        self._wait(self.block.silence_s / live.LOOKS)
                except KeyboardInterrupt:
                    if self._told_to_end:  # for the second time: at once
                        self._break_off()
                    self.cancel.set()
        finally:
            facts = self._facts(machine) | _released(machine, begun, self._is_sound, self.block.silence_s)
            self.progress.take(self.journal.event("machine", machine=facts))

    def _wait(self, look_s: float) -> None:
        """Until the next look; one who cancels does not wait for it, and sees the end soon."""
        if self._told_to_end:
            time.sleep(look_s / 4)
        else:
            self.cancel.wait(look_s)

    def forget(self) -> None:
        """Nothing of it stays under live/; for a machine that comes back, the word that it has to end does."""
        try:
            live.forget(self.root, self.request.run_id, self._is_sound)
        except Exception as error:  # the next sweep does it
            log.warning("%s stays under %s: %s", live.folder(self.request.run_id), self.root.url, one_line(error))

    def _look(self, begun: "_Begun") -> None:
        """Take what has come, and end what has to end."""
        now = time.monotonic()
        try:
            has_come = self._take_parts()
        except Exception as error:  # of the root: that is no silence of the machine
            log.warning("run %s cannot be followed: %s", self.request.run_id, one_line(error))
            has_come, self._looked_at = False, now
        if self._end is not None:
            return
        # looks and not seconds: while this process was stopped nobody looked
        self._silent_s = 0.0 if has_come else self._silent_s + min(now - self._looked_at, self.block.silence_s / 4)
        self._looked_at = now
        if self.signals or self.cancel.is_set():
            self._tell_to_end("killed" if self.signals else "cancelled")
        if self._told_to_end:
            if now > self._held_until or (self._began_at is None and not self._is_claimed()):
                self._break_off()
        elif self._began_at is None:
            self._wait_for_begin(begun, now)
        elif self._silent_s > self.block.silence_s:
            reason = f"the machine was lost {self.progress.where}: not a word for {self.block.silence_s:g} s"
            self._end_run("killed", reason)
        elif now > self._began_at + self.request.deadline_s + HELD_S / 4:  # the machine knows its deadline, too
            self._tell_to_end("timed_out")

    def _take_parts(self) -> bool:
        """Whether anything has come."""
        has_come = False
        while self._end is None and (lines := live.lines(self.root, self.request.run_id, self._number)) is not None:
            self._number, has_come = self._number + 1, True
            self._began_at = self._began_at or time.monotonic()
            for line in lines:
                self._take(line)
        return has_come

    def _take(self, line: bytes) -> None:
        if line.startswith(b'{"event": "end"') and self._told_to_end in ("timed_out", "killed"):
            event = json.loads(line)  # it was ended by us, and calls itself cancelled
            if event["state"] == "cancelled":
                ended = endings.asked_for(self._told_to_end, self.progress, self.request.deadline_s, self.signals)
                line = (json.dumps(event | {"state": ended.state, "reason": ended.reason}) + "\n").encode()
        event = event_of(line)
        if event is None:
            return
        self.journal.append(line)
        self.progress.take(event)
        if event["event"] == "cell_start" and self.on_cell:
            self.on_cell(self._code.index(event["index"]), len(self._code), event["heading"])
        elif event["event"] == "end":
            self._end = event
            if self.on_cell and event["state"] == "ok":
                self.on_cell(len(self._code), len(self._code), "")

    def _wait_for_begin(self, begun: "_Begun", now: float) -> None:
        if begun.problem and not self._is_claimed():
            self._is_sound = False
            self._refuse(f"no machine: {begun.problem}")
        elif now > self._asked_at + self.block.boot_s:
            self._is_sound = False
            if self._is_claimed():
                self._end_run("killed", "the machine was lost before it began")
            else:
                live.cancel(self.root, self.request.run_id, "too late")
                self._refuse(f"no machine within {self.block.boot_s:g} s")

    def _is_claimed(self) -> bool:
        try:
            return live.claimed(self.root, self.request.run_id) is not None
        except Exception:  # who knows; time goes on
            return True

    def _tell_to_end(self, state: str) -> None:
        if self._told_to_end:
            return
        self._told_to_end, self._held_until = state, time.monotonic() + HELD_S
        try:
            live.cancel(self.root, self.request.run_id, state)
        except Exception as error:  # then it ends by its own deadline
            log.warning("run %s cannot be told to end: %s", self.request.run_id, one_line(error))

    def _break_off(self) -> None:
        """It was told to end, and has not said that it did."""
        assert self._told_to_end
        ended = endings.asked_for(self._told_to_end, self.progress, self.request.deadline_s, self.signals)
        where = self.progress.where
        if self._began_at is None:
            reason = ended.reason.replace(where, "before a machine had begun it")
        else:
            reason = f"{ended.reason}; the machine did not answer"
        self._end_run(ended.state, reason)

    def _end_run(self, state: str, reason: str) -> None:
        """As home says, since the machine does not."""
        self._is_sound = False
        if not self._told_to_end:
            self._told_to_end = state
            try:
                live.cancel(self.root, self.request.run_id, reason)
            except Exception as error:
                log.warning("run %s cannot be told to end: %s", self.request.run_id, one_line(error))
        cell = self.progress.cell()
        shown = text_tail(cell, self.progress.at, self.journal.folder) if cell else ""
        end = self.progress.broken_off(state, reason, shown)
        self._end = self.journal.event(end.pop("event"), **end)
        self.progress.take(self._end)

    def _refuse(self, reason: str) -> None:
        """It never began."""
        reason = self.progress.redactor.text(" ".join(reason.split()))
        end = {"state": self.request.refused_as, "reason": reason, "error": None, "seconds": 0.0}
        self._end = self.journal.event("end", **end)
        self.progress.take(self._end)

    def _facts(self, machine: "Machine") -> dict[str, Any]:
        boot_s = None if self._began_at is None else round(self._began_at - self._asked_at, 1)
        facts = machine.facts | ({} if boot_s is None else {"boot_s": boot_s})
        if self.block.dollars_an_hour is not None:
            used_s = time.monotonic() - self._asked_at
            facts["dollars"] = round(used_s / 3600 * self.block.dollars_an_hour, 6)
        return facts


class _Begun:
    """The machine as it is asked for, in a thread: it may take minutes. `problem`: why it is not to be had."""

    def __init__(self, machine: "Machine"):
        self.machine, self.problem = machine, ""
        self.thread = threading.Thread(target=self._begin, name=f"machine {machine.name}", daemon=True)
        self.thread.start()

    def _begin(self) -> None:
        try:
            self.machine.begin()
        except Exception as error:
            self.problem = one_line(error)
        except BaseException as error:  # Coiled's client ends the process that it is in
            self.problem = one_line(error)


def _released(machine: "Machine", begun: _Begun, is_sound: bool, within_s: float) -> dict[str, Any]:
    """Give the machine back; one that is not sound is not used again. What goes wrong is in the record, too."""
    told: dict[str, Any] = {}

    def release() -> None:
        try:
            machine.release(is_sound)
        except BaseException as error:
            told["not_released"] = one_line(error)
            log.warning("the machine %s could not be given back: %s", machine.name, one_line(error))

    thread = threading.Thread(target=release, name=f"release {machine.name}", daemon=True)
    thread.start()
    thread.join(within_s)
    return told if not thread.is_alive() else {"not_released": f"it was not given back within {within_s:g} s"}


def there(root_url: str, run_id: str) -> int:
    """On the machine: run what home asks for, once; the exit status is 0 when this process ran it."""
    root = Root.at(root_url)
    asked = live.asked(root, run_id)
    if asked is None:
        print(f"{root.url} asks for no run {run_id}: is it the same root at home?", file=sys.stderr)
        return 2
    if live.is_cancelled(root, run_id) or not live.claim(root, run_id):
        print(f"run {run_id} was begun by another process, or is not wanted any more", file=sys.stderr)
        return 3
    silence_s = asked.pop("silence_s")
    request = RunRequest(**asked)
    problem = ""
    try:
        request = _with_code(request, root)
    except Exception as error:
        problem = f"the code of release {request.release} cannot be had: {one_line(error)}"
    request = replace(request, refused=problem, provenance=request.provenance | provenance.here())
    with collected_signals() as signals:
        journal = Journal(spool() / run_id)
        with live.Sender(root, run_id, journal.path, silence_s).sending() as told:
            ran = engine.run_notebook(request, journal, None, told, signals, is_shown=False)
            for side in sorted(journal.folder.glob("cell-*")):
                root.put(f"{ran.progress.record.report}/{side.name}", side)
            journal.close()
        shutil.rmtree(journal.folder, ignore_errors=True)
    return 0


def _with_code(request: RunRequest, root: Root) -> RunRequest:
    if not request.release:
        return replace(request, project=None)
    return replace(request, project=str(releases.checkout(root, releases.find(root, request.release))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ |= json.loads(sys.stdin.readline() or "{}")
    with tempfile.TemporaryDirectory(prefix="etl-run-") as folder:
        os.environ["ETL_SPOOL"] = folder  # not home's, should it be this machine
        status = there(*sys.argv[1:3])
    interpreter.leave(status)
