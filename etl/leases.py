"""Who may write: one holder at a time, each with a number that is higher than all before it, its fence.

On this machine the operating system holds a lease (flock) and frees it the moment its holder dies, and not before: one
that is stopped keeps it, and whoever waits is told which process that is and what ends it. In an object store
it is a document that its holder writes again every RENEW_S seconds. Two machines' clocks are never held against each
other: whoever waits looks whether the document changes, by the watch of its own process, and takes the lease over when
it has not for DEAD_S. Taking, renewing and letting go are conditional on what was there, so that of two who take it
over at once one succeeds, and a holder that was taken over finds that out by its next renewal.

A holder that was stopped and goes on later does not know at once that it was taken over. `require` says it: it goes by
a watch that runs while the process, or the machine, does not, and a lease that was renewed less than DEAD_S ago cannot
have been taken over, whatever the clocks say, as long as all watches run about equally fast. Between `require` and what
is done next a holder may be stopped again. So what is done next has to be harmless by itself when it comes too late:
conditional on what the holder has read before.
"""

import abc
import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etl.storage import Root

log = logging.getLogger(__name__)
RENEW_S = 5.0
DEAD_S = 25.0  # without a renewal
LOOK_S = 0.5  # between two looks whether it is free


class LeaseHeld(RuntimeError):
    """Somebody else holds the lease and did not let go of it in time. `document`: the lease's, where it is known."""

    document: Mapping[str, Any] = {}


class LeaseLost(LeaseHeld):
    """The lease was taken over, since it was not renewed in time; what was published meanwhile is another's."""


class Lease(abc.ABC):
    """A lease that is held. `fence`: its number. `about`: what the holder leaves for the next one, and what it got.
    `after_death`: whether the one before did not let go of it."""

    def __init__(self, url: str, holder: str, before: dict[str, Any]):
        self.after_death = bool(before.get("holder"))
        self._url, self._holder, self._token, self._beat = url, holder, os.urandom(16).hex(), 0
        self.fence, self.about = int(before.get("fence", 0)) + 1, dict(before.get("about", {}))
        self._who = {"pid": os.getpid(), "started": started(os.getpid()), "machine": machine()}
        self._who |= {"host": socket.gethostname(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}

    @abc.abstractmethod
    def require(self) -> None:
        """Raises LeaseLost unless the lease is held now."""

    def rise(self, fence: int) -> None:
        """Have a number above `fence`, which was given out by a lease that somebody removed."""
        if self.fence <= fence:
            self.fence = fence + 1
            self._say(self._holder)

    def tell(self, **about: Any) -> None:
        """Have this in the document, too, for whoever asks who holds it."""
        self.about |= about
        self._say(self._holder)

    @abc.abstractmethod
    def _say(self, holder: str | None) -> None:
        """Write the document. `holder`: None to let go of it."""

    def _document(self, holder: str | None) -> bytes:
        self._beat += 1
        said = {"holder": holder, "fence": self.fence, "beat": self._beat, "token": self._token, "about": self.about}
        return json.dumps(said | self._who).encode()


def machine() -> str:
    """Where process ids mean the same: this start of this machine, in this container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def started(pid: int) -> int | None:
    """When the process started, counted since the machine did; None when there is none. With the pid it names one."""
    values = _status(pid)
    return None if values[0] in "ZX" else int(values[19])


def _status(pid: int) -> list[str]:
    """The values of /proc/<pid>/stat from the third on: its state, X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]


def is_alive(document: Mapping[str, Any]) -> bool:
    """Whether who wrote a document is a process of this machine, at work or stopped."""
    pid = document.get("pid")
    return bool(pid and document.get("machine") == machine() and started(pid) == document.get("started"))


def is_gone(document: Mapping[str, Any]) -> bool:
    """Whether who wrote a document was a process of this machine, and is no more: nobody has to wait for it."""
    return bool(document.get("machine") == machine()) and not is_alive(document)


def who(document: dict[str, Any]) -> str:
    """Who holds a lease by its document, since when; of a process that is stopped also what ends that."""
    holder, pid = document.get("holder") or "another process", document.get("pid")
    if not pid:
        return str(holder)
    told = f"{holder} (process {pid} on {document.get('host')}, since {document.get('since')})"
    return f"{told}: {ends}" if (ends := stopped(document)) else told


def stopped(document: dict[str, Any]) -> str:
    """What to do about a holder that is a process of this machine and stopped; empty where it is none."""
    if not document.get("holder") or not is_alive(document) or _status(pid := document["pid"])[0] not in "Tt":
        return ""
    return f"it is stopped: `kill -CONT {pid}` lets it go on, `kill -9 {pid}` ends it, and the next run does its work"


class FileLease(Lease):
    """Held by flock on a file, which has the document."""

    def __init__(self, path: str, holder: str, file: IO[bytes]):
        self._file = file
        super().__init__(path, holder, _read(file))
        self._say(holder)

    def require(self) -> None:
        if not os.fstat(self._file.fileno()).st_nlink:
            raise LeaseLost(f"{self._url} was removed while {self._holder} held it")

    def _say(self, holder: str | None) -> None:
        said = self._document(holder)
        os.pwrite(self._file.fileno(), said, 0)
        os.ftruncate(self._file.fileno(), len(said))

    def release(self) -> None:
        """Leave the document to the next one; the lock goes with the file's closing."""
        self._say(None)


@contextlib.contextmanager
def of_file(path: str, holder: str, wait_s: float) -> Iterator[FileLease]:
    """Hold the lease whose file is at `path`. Raises LeaseHeld."""
    deadline = time.monotonic() + wait_s
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", closefd=True) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _held(path, _read(file)) from None
            else:
                if os.fstat(file.fileno()).st_nlink:  # else it was removed before it was locked
                    lease = FileLease(path, holder, file)
                    try:
                        yield lease
                    finally:
                        lease.release()
                    return
        time.sleep(0.05)


def _held(url: str, document: dict[str, Any]) -> LeaseHeld:
    error = LeaseHeld(f"{url} is held by {who(document)}")
    error.document = document
    return error


def _read(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    return _parsed(file.read())


def _parsed(data: bytes) -> dict[str, Any]:
    """The document; empty where it is none, as after a loss of power."""
    with contextlib.suppress(ValueError):
        document = json.loads(data)
        if isinstance(document, dict):
            return document
    return {}


class StoreLease(Lease):
    """Held by renewing the document in an object store. `on_lost` is called, in a thread, once it is seen that another
    one has taken it over."""

    def __init__(self, root: "Root", rel: str, holder: str, before: dict[str, Any]):
        super().__init__(root.url_of(rel), holder, before)
        self.on_lost: Callable[[], None] = lambda: None
        self._root, self._rel, self._mark, self._renewed = root, rel, "", 0.0
        self._lock, self._ended, self._lost = threading.Lock(), threading.Event(), False

    def take(self, mark: str | None) -> bool:
        """Write the document in the place of the one with this mark, None for none; whether that succeeded."""
        began = _watch()
        taken = self._root.replace(self._rel, self._document(self._holder), mark)
        if taken is None:
            return False
        self._mark, self._renewed = taken, began
        threading.Thread(target=self._renewing, name=f"lease {self._rel}", daemon=True).start()
        return True

    def require(self) -> None:
        with self._lock:
            if not self._lost and _watch() - self._renewed > 2 * RENEW_S:
                self._renew(self._holder)
            if self._lost:
                raise LeaseLost(f"{self._url} was taken over: {self._holder} did not renew it for {DEAD_S:.0f} s")

    def release(self) -> None:
        """Let go of it. Not removed: a removal whose answer was lost is asked for again, and would free the next
        holder's lease."""
        self._ended.set()
        with self._lock:
            if not self._lost:
                self._renew(None)

    def _say(self, holder: str | None) -> None:
        with self._lock:
            self._renew(holder)

    def _renew(self, holder: str | None) -> None:
        """Write the document again. The lock is held."""
        began = _watch()
        renewed = self._root.replace(self._rel, self._document(holder), self._mark)
        if renewed is None:
            self._lost = True
        else:
            self._mark, self._renewed = renewed, began

    def _renewing(self) -> None:
        while not self._lost and not self._ended.wait(RENEW_S):
            with self._lock:
                if self._lost or self._ended.is_set():
                    break
                try:
                    self._renew(self._holder)
                except Exception as error:  # if the store is down for others too, nobody takes the lease
                    log.warning("%s cannot be renewed now: %s", self._url, error)
        if self._lost:
            self.on_lost()


@contextlib.contextmanager
def in_store(root: "Root", rel: str, holder: str, wait_s: float) -> Iterator[StoreLease]:
    """Hold the lease whose document is at `rel`. Raises LeaseHeld.

    It is not given up at the end of `wait_s` before the holder was seen to be alive: a holder that died is taken over
    DEAD_S after it is looked at for the first time, or after its last renewal since; at once, if it was a process of
    this machine.
    """
    lease = _taken(root, rel, holder, wait_s)
    try:
        yield lease
    finally:
        lease.release()


def _taken(root: "Root", rel: str, holder: str, wait_s: float) -> StoreLease:
    deadline = time.monotonic() + wait_s
    (document, seen), since, alive = _looked(root, rel), time.monotonic(), False
    while True:
        now, alive = time.monotonic(), alive or (is_alive(document) and not stopped(document))
        if not document.get("holder") or is_gone(document) or now - since > DEAD_S:
            lease = StoreLease(root, rel, holder, document)
            if lease.take(seen):
                return lease
        elif now > deadline and alive and now - since < 2 * RENEW_S:
            raise _held(root.url_of(rel), document)
        time.sleep(LOOK_S)
        document, mark = _looked(root, rel)
        if mark != seen:
            seen, since, alive = mark, time.monotonic(), mark is not None


def _looked(root: "Root", rel: str) -> tuple[dict[str, Any], str | None]:
    """The document, and the mark that it has; empty and None where there is none."""
    try:
        data, mark = root.read_marked(rel)
    except FileNotFoundError:
        return {}, None
    return _parsed(data), mark


def _watch() -> float:
    """Seconds, also those in which this process or this machine was stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
