"""One `up` a root. Whoever comes second is told who is at work, since when, and where its pages are.

On this machine the operating system holds the lease (flock on the folder of the services) and frees it however its
holder ends. Under a root in an object store there are numbered documents, services/up/<n>.json: whoever creates the
next number holds the lease, and renews its document. One that nobody has renewed for DEAD_S, by the watch of whoever
asks, was left behind; one whose process was on this machine is known to be at once.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from etl.leases import machine, started
from etl.storage import LocalRoot, Root

log = logging.getLogger(__name__)
PLACE, NUMBERED = "services/up", re.compile(r"\d{9}\.json")
RENEW_S = 5
DEAD_S = 25  # without a renewal; with the start of a new `up` less than 45 s
LOOK_S = 1  # between two looks whether a document is renewed


class Held(RuntimeError):
    """Another `up` is at work; the message says which."""


class Lease:
    """Held from `take` to `release`. `lost` says who has it, when another has taken it over."""

    def __init__(self, folder: Path, root: Root, pages: dict[str, str], on_lost: Callable[[], None]):
        """`folder`: of the services on this machine; `pages`: name -> URL; `on_lost` is called in a thread."""
        self._folder, self._root, self._on_lost = folder, root, on_lost
        self._told = {
            **{"root": root.url, "pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "pages": pages},
            **{"machine": machine(), "started": started(os.getpid()), "token": uuid.uuid4().hex},
        }
        self._file: IO[str] | None = None
        self._number, self._end = 0, threading.Event()
        self.lost: str | None = None
        self.after_death = False  # whether the last one here did not give it back

    def take(self) -> None:
        """Raises Held, or OSError when the root cannot be reached."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = open(self._folder / "up.json", "a+")  # noqa: SIM115  # open as long as the lease is held
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Held(_sentence(_holder(self._folder / "up.json"))) from None
            if not isinstance(self._root, LocalRoot):
                self._take_number()
        except BaseException:
            file.close()
            raise
        self._file = file
        self.after_death = os.fstat(file.fileno()).st_size > 0
        file.truncate(0)
        file.write(json.dumps(self._told))
        file.flush()

    def release(self) -> None:
        """Let go of it. A root that is down lets the document die."""
        self._end.set()
        if self._number and not self.lost:
            with contextlib.suppress(Exception):
                self._root.write(self._place(), json.dumps({**self._told, "ended": True}).encode())
        if self._file:
            self._file.truncate(0)
            self._file.close()

    def _place(self) -> str:
        return f"{PLACE}/{self._number:09d}.json"

    def _take_number(self) -> None:
        seen, since = b"", time.monotonic()
        while True:
            newest = max(self._numbers(), default=0)
            said = self._read(newest)
            if said != seen:
                if seen:  # renewed, or a new holder
                    raise Held(_sentence(json.loads(said)))
                seen, since = said, time.monotonic()
            if not said or _has_ended(json.loads(said)) or time.monotonic() - since > DEAD_S:
                self._number = newest + 1
                if self._root.create(self._place(), json.dumps(self._told).encode()):
                    break
                seen = b""  # somebody else was quicker
            elif _is_alive(json.loads(said)):
                raise Held(_sentence(json.loads(said)))
            else:
                time.sleep(LOOK_S)
        for number in self._numbers():
            if number < self._number:
                self._root.remove(f"{PLACE}/{number:09d}.json")
        threading.Thread(target=self._renewing, name="lease", daemon=True).start()

    def _numbers(self) -> list[int]:
        return [int(name[:9]) for name in self._root.names(PLACE) if NUMBERED.fullmatch(name)]

    def _read(self, number: int) -> bytes:
        try:
            return self._root.read(f"{PLACE}/{number:09d}.json")
        except FileNotFoundError:
            return b""

    def _renewing(self) -> None:
        count = 0
        while not self._end.wait(RENEW_S):
            try:
                newest = max(self._numbers(), default=0)
                if newest > self._number:
                    self.lost = _sentence(json.loads(self._read(newest)))
                    self._on_lost()
                    return
                count += 1
                self._root.write(self._place(), json.dumps({**self._told, "renewed": count}).encode())
            except Exception as error:  # the root is down: if it is for others too, nobody takes the lease
                log.warning("the lease of %s cannot be renewed now: %s", self._root.url, error)


def pages(folder: Path) -> dict[str, str]:
    """Where the pages of the `up` are that holds the lease in `folder`, name -> URL; none when nobody does."""
    try:
        told = json.loads((folder / "up.json").read_text())
        return dict(told["pages"]) if _is_alive(told) else {}
    except (OSError, ValueError, KeyError):
        return {}


def _has_ended(told: dict[str, Any]) -> bool:
    gone = told["machine"] == machine() and started(told["pid"]) != told["started"]
    return gone or bool(told.get("ended"))


def _is_alive(told: dict[str, Any]) -> bool:
    return bool(told["machine"] == machine() and started(told["pid"]) == told["started"])


def _holder(path: Path) -> dict[str, Any]:
    """What is written in the file that another process has locked: it does so at once."""
    for _ in range(50):
        with contextlib.suppress(ValueError):
            return dict(json.loads(path.read_text()))
        time.sleep(0.1)
    return {}


def _sentence(told: dict[str, Any]) -> str:
    if not told:
        return "another `up` is starting here"
    pages = ", ".join(f"{name} {url}" for name, url in told["pages"].items())
    return (
        f"`up` is at work on {told['root']} already: process {told['pid']} on {told['host']}, since {told['since']}; "
        f"its pages: {pages}"
    )


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
