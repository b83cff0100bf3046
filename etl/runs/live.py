"""What a run on another machine and its home say to each other: all of it files under the root, nothing else.

    live/<run_id>/request.json          by home: what to run; names of secrets, no value
    live/<run_id>/claim.json            by the machine, only where it is absent: a run id runs once
    live/<run_id>/part-000001.jsonl     by the machine: what its journal has since the part before; that it lives
    cancel/<run_id>                     by home: the run has to end

Home has the only record: it copies the parts into a journal of its own as they come, so who follows a run, and who
finishes one whose process died, finds it where those of this machine are. What one side does not hear of the other is
counted by its own clock.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from etl.runs.endings import one_line
from etl.storage import Root

log = logging.getLogger(__name__)
SILENCE_S = 60.0  # a machine of which nothing was heard for so long is lost
BEATS, LOOKS = 12, 30  # in that time: a part every 5 s at least, and a look for what the other side says every 2 s
FORGOTTEN = timedelta(days=1)  # what nobody finished
TRIES = 5  # at the last part


def folder(run_id: str) -> str:
    return f"live/{run_id}"


def _part(run_id: str, number: int) -> str:
    return f"{folder(run_id)}/part-{number:06d}.jsonl"


def ask(root: Root, request: dict[str, Any]) -> None:
    """By home, before anything else: what is to run. The values of `variables` never get there."""
    told = {name: value for name, value in request.items() if name != "variables"}
    root.write(f"{folder(request['run_id'])}/request.json", json.dumps(told, default=str).encode())


def asked(root: Root, run_id: str) -> dict[str, Any] | None:
    """The request; None when home did not ask for it, or no longer waits."""
    return root.read_json(f"{folder(run_id)}/request.json")


def claim(root: Root, run_id: str) -> bool:
    """By the machine: whether the run is this process's. Of many that ask, once and again, it is for one.

    A second process may have read the request, and claim the run when home has just forgotten it, the first claim with
    it: then the request is gone, for that goes first.
    """
    who = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    if not root.create(f"{folder(run_id)}/claim.json", json.dumps(who).encode()):
        return False
    if asked(root, run_id) is not None:
        return True
    root.remove(f"{folder(run_id)}/claim.json")
    return False


def claimed(root: Root, run_id: str) -> dict[str, Any] | None:
    """host and pid of who runs it; None until somebody does."""
    return root.read_json(f"{folder(run_id)}/claim.json")


def cancel(root: Root, run_id: str, why: str) -> None:
    """By home: the run has to end. Also a machine that was thought lost sees it, should it come back."""
    root.write(f"cancel/{run_id}", why.encode())


def is_cancelled(root: Root, run_id: str) -> bool:
    return root.exists(f"cancel/{run_id}")


def forget(root: Root, run_id: str, is_over: bool) -> None:
    """By home, when the record is written. Unless it `is_over` there, the word to end stays for who comes back."""
    root.remove(f"{folder(run_id)}/request.json")  # before the claim: see there
    root.remove_tree(folder(run_id))
    if is_over:
        root.remove(f"cancel/{run_id}")


def sweep(root: Root, now: datetime | None = None) -> int:
    """Remove what nobody finished in FORGOTTEN: how many runs and words to end."""
    newest: dict[str, datetime] = {}
    for top in ("live", "cancel"):
        for rel, entry in root.tree(top):
            path = f"{top}/{rel.split('/', 1)[0]}"
            newest[path] = max(filter(None, [entry.modified, newest.get(path)]))
    old = [path for path, modified in newest.items() if modified < (now or datetime.now(UTC)) - FORGOTTEN]
    for path in old:
        root.remove_tree(path) if path.startswith("live/") else root.remove(path)
    return len(old)


def lines(root: Root, run_id: str, number: int) -> list[bytes] | None:
    """The journal's lines in a part; None while there is no such part."""
    try:
        return root.read(_part(run_id, number)).splitlines(keepends=True)
    except FileNotFoundError:
        return None


def rest(root: Root, run_id: str, number: int) -> Iterator[bytes]:
    """All lines from a part on."""
    while (told := lines(root, run_id, number)) is not None:
        yield from told
        number += 1


class Told(threading.Event):
    """Whether the run has to end: home said so, or home has not been reached for so long that it gave the run up."""

    def __init__(self, silence_s: float):
        super().__init__()
        self.silence_s, self.heard = silence_s, time.monotonic()

    def is_set(self) -> bool:
        return super().is_set() or time.monotonic() - self.heard > self.silence_s


class Sender:
    """By the machine: sends a journal as it grows, and looks whether the run has to end; in a thread of its own."""

    def __init__(self, root: Root, run_id: str, journal: Path, silence_s: float):
        self.root, self.run_id, self.journal = root, run_id, journal
        self.told = Told(silence_s)
        self._number, self._sent = 1, 0  # of the part to be sent next, bytes in those before
        self._part: bytes | None = None  # once tried a part stays as it is: it may have arrived
        self._beat_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name=f"live {run_id}", daemon=True)

    @contextlib.contextmanager
    def sending(self) -> Iterator[Told]:
        """For the length of the block; what was written until its end is sent before it returns."""
        self._thread.start()
        try:
            yield self.told
        finally:
            self._over.set()
            self._thread.join()
            self._send_the_end()

    def _go_on(self) -> None:
        while True:
            try:
                self._look()
            except Exception as error:  # the next look may get through
                log.warning("run %s cannot be told of under %s: %s", self.run_id, self.root.url, one_line(error))
            if self._over.wait(self.told.silence_s / LOOKS):
                return

    def _look(self) -> None:
        if is_cancelled(self.root, self.run_id):
            self.told.set()
        self._send(is_due=time.monotonic() >= self._beat_at)
        self.told.heard = time.monotonic()

    def _send(self, is_due: bool) -> None:
        if self._part is None:
            self._part = self._new()
        if self._part or is_due:
            self.root.write(_part(self.run_id, self._number), self._part)
            self._number, self._sent, self._part = self._number + 1, self._sent + len(self._part), None
            self._beat_at = time.monotonic() + self.told.silence_s / BEATS
        else:
            self._part = None

    def _new(self) -> bytes:
        """The whole lines that were not sent yet."""
        with contextlib.suppress(FileNotFoundError), self.journal.open("rb") as file:
            file.seek(self._sent)
            data = file.read()
            return data[: data.rfind(b"\n") + 1]
        return b""

    def _send_the_end(self) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                while self._part is not None or self._new():
                    self._send(is_due=True)
                return
            except Exception as error:
                log.warning("the end of run %s cannot be told: %s", self.run_id, one_line(error))
                time.sleep(self.told.silence_s / LOOKS * attempt)
