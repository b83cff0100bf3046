"""The journal of a run: what happens, as it happens, on this machine's disk, until its report is where it belongs.

    spool/<run_id>/journal.jsonl        one event a line, appended by the runner and by the watcher of its kernel
    spool/<run_id>/notebook.ipynb       what was about to run
    spool/<run_id>/cell-07-output.txt   what does not fit into the report; moves beside it
    spool/<run_id>/report.ipynb ...     only while the root's place for reports is down

A run is under way as long as its process holds the lock on the journal, which the operating system frees however the
process ends. Then the journal says how far it came.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etl.leases import started
from etl.runs.record import now
from etl.storage import PROJECT, make_folder, sync

log = logging.getLogger(__name__)
POLL_S = 0.2  # of a follower
JOURNAL, NOTEBOOK = "journal.jsonl", "notebook.ipynb"
RUNNING = ("running", "")  # state and reason until a run ends


def spool() -> Path:
    """The folder of all journals of this machine."""
    return Path(os.environ.get("ETL_SPOOL") or PROJECT / "outputs" / "spool")


class Journal:
    """Written by one run, into a folder of its own. A disk that refuses is a warning, once; the run goes on without."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.size = folder, folder / JOURNAL, 0
        self._pending: dict[tuple[int, int], tuple[list[Any], list[str]]] = {}
        self._file: int | None = None
        self._is_kept = True
        try:
            make_folder(str(self.folder))
            begun = self.folder / ".journal"  # gets its name when it is locked, or others would find it free
            self._file = os.open(begun, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.replace(begun, self.path)
        except OSError as error:
            self._refused(error)

    def begin(self, nb: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Write down what is about to run, redacted already; the first event, on the disk before anything runs."""
        try:
            if self._is_kept:
                begun = self.folder / ".notebook"  # gets its name when it is whole, for who reads along
                begun.write_text(json.dumps(nb, default=str))
                os.replace(begun, self.folder / NOTEBOOK)
        except OSError as error:
            self._refused(error)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": started(os.getpid())}
        start = self.event("start", request=request, **who)
        self._sync()
        return start

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event, what was shown before it first. Its fields are redacted already."""
        self.flush()
        event = {"event": kind, "t": now(), **fields}
        self._write(event)
        return event

    def output(self, index: int, at: int, outs: list[Any], text: str | None = None) -> None:
        """`outs[at]` of the cell at `index` is new; of a stream, only `text` is. Written with the next `flush`."""
        pieces = self._pending.setdefault((index, at), (outs, []))[1]
        if text is not None:
            pieces.append(text)

    def cleared(self, index: int) -> None:
        """The cell shows nothing any more."""
        self._pending = {key: shown for key, shown in self._pending.items() if key[0] != index}
        self.event("clear", index=index)

    def flush(self) -> None:
        """Write what has been shown since the last time."""
        pending, self._pending = self._pending, {}
        for (index, at), (outs, pieces) in pending.items():
            out = {**outs[at], "text": "".join(pieces)} if pieces else outs[at]
            self._write({"event": "output", "t": now(), "index": index, "at": at, "output": out})

    def _write(self, event: dict[str, Any]) -> None:
        self.append((json.dumps(event, default=str) + "\n").encode())

    def append(self, line: bytes) -> None:
        """A line as it is, also one of the same run's journal elsewhere."""
        if not self._is_kept or self._file is None:
            return
        try:
            while line:
                written = os.write(self._file, line)  # not all of it when the disk is full; then the rest is refused
                self.size, line = self.size + written, line[written:]
        except OSError as error:
            self._refused(error)

    def _sync(self) -> None:
        """Put what is written on the disk, and its name."""
        try:
            if self._is_kept and self._file is not None:
                os.fdatasync(self._file)
                sync(str(self.folder))
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        """From now on nothing is written; the file stays ours, or others would take the run for a dead one."""
        log.warning("no journal can be kept in %s: %s", self.folder, error)
        self._is_kept = False

    def side_file(self, name: str, binary: bool = False) -> "SideFile":
        """A file beside the journal, to be written to."""
        return SideFile(self.folder / name, binary)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Those of these kinds so far, also what the watcher wrote."""
        with contextlib.suppress(OSError):
            return list(read(self.path, *kinds))
        return []

    def close(self) -> None:
        """Let go of it; whoever finds it then delivers what it says."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class SideFile:
    """A file in the spool, written as it comes. A disk that refuses is a warning, once."""

    def __init__(self, path: Path, binary: bool):
        self._path = path
        self._file: IO[Any] | None = None
        try:
            self._file = path.open("wb") if binary else path.open("w", errors="replace")
        except OSError as error:
            self._refused(error)

    def write(self, data: str | bytes) -> None:
        """More of it."""
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                self._refused(error)

    def close(self) -> int:
        """Its size in bytes, 0 when not all of it could be kept."""
        if self._file is not None:
            try:
                self._file.close()
                return self._path.stat().st_size
            except OSError as error:
                self._refused(error)
        return 0

    def remove(self) -> None:
        """Take it away again."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _refused(self, error: OSError) -> None:
        log.warning("%s cannot be kept: %s", self._path, error)
        self._file = None


def read(path: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """The events of a journal, of these kinds when any are named. Raises OSError."""
    marks = tuple(f'{{"event": "{kind}"'.encode() for kind in kinds) or b"{"
    with path.open("rb") as file:
        for line in file:
            if line.startswith(marks) and (event := event_of(line)):
                yield event


def event_of(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None in one that was never finished: its process died, or the disk was full."""
    with contextlib.suppress(ValueError):
        event = json.loads(line) if line.endswith(b"\n") else None
        return event if isinstance(event, dict) and "event" in event else None
    return None


def folders() -> list[Path]:
    """The folders of the spool that hold a journal, oldest first: of runs under way, and of those not delivered."""
    dated = []
    with contextlib.suppress(OSError):
        for folder in spool().iterdir():
            with contextlib.suppress(OSError):  # delivered a moment ago
                if stat.S_ISREG((folder / JOURNAL).stat().st_mode):
                    dated.append((folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(dated)]


@contextlib.contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody holds the journal; if so it is ours for the length of the block. Who only asks takes LOCK_SH."""
    try:
        file = os.open(folder / JOURNAL, os.O_RDONLY)
    except FileNotFoundError:  # delivered a moment ago
        yield False
        return
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        is_free = (folder / JOURNAL).exists()
    except BlockingIOError:
        is_free = False
    try:
        yield is_free
    finally:
        os.close(file)


def live() -> list[dict[str, Any]]:
    """The runs under way on this machine, as in `runs`."""
    return [run for run in runs() if run["state"] == "running"]


def runs() -> list[dict[str, Any]]:
    """The runs of this machine that have no report yet: run_id, stage, root, scheduled_for, attempt, started_at, state,
    reason, ended_at, cell, heading, rss_mb, cpu_s.

    The state is running while its process is there, killed when that died without a word, else the one it ended in.
    """
    told = []
    for folder in folders():
        with contextlib.suppress(OSError, KeyError, TypeError):  # another user's, or another release's
            if run := _told(folder):
                told.append(run)
    return told


def _told(folder: Path) -> dict[str, Any]:
    """What a run has come to; empty when it has not begun."""
    with locked(folder, fcntl.LOCK_SH) as is_free:  # asked before reading: what it wrote last is read now
        state, reason = ("killed", "its process is gone; the next `run` or `up` closes it") if is_free else RUNNING
    run: dict[str, Any] = {}
    event: dict[str, Any] = {}
    for event in read(folder / JOURNAL, "start", "cell_start", "sample", "end"):
        if event["event"] == "start":
            run = {name: event["request"][name] for name in ("run_id", "stage", "root", "scheduled_for", "attempt")}
            run |= {"started_at": event["t"], "state": state, "reason": reason, "ended_at": None}
            run |= {"cell": None, "heading": "", "rss_mb": None, "cpu_s": None}
        elif event["event"] == "cell_start":
            run |= {"cell": event["index"], "heading": event["heading"]}
        elif event["event"] == "sample":
            run |= {name: event[name] for name in ("rss_mb", "cpu_s")}
        else:  # only its report is being written, or waits for its root
            end = event.get("record", event)
            run |= {"state": end["state"], "reason": end["reason"], "ended_at": event["t"]}
    if "root" not in run:
        return {}
    return run | {"ended_at": event["t"]} if run["state"] == "killed" else run


def follow(run_id: str) -> Iterator[dict[str, Any]]:
    """The events of a run on this machine as they happen, until its end. A run whose process dies ends, too.

    Raises KeyError when there is no journal of such a run, or no longer.
    """
    named = [folder for folder in folders() if folder.name.startswith(run_id)]
    folder = next((folder for folder in named if folder.name == run_id), named[0] if len(named) == 1 else None)
    try:
        file = (folder / JOURNAL).open("rb") if folder else None
    except OSError:  # delivered a moment ago, or another user's
        file = None
    if folder is None or file is None:
        raise KeyError(run_id)
    with file:
        yield from _follow(folder, file)


def _follow(folder: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    begun = b""
    while True:
        with locked(folder, fcntl.LOCK_SH) as is_free:  # asked before reading: what it wrote last is read now
            is_dead = is_free or not folder.exists()
        for line in file:
            begun += line
            if not begun.endswith(b"\n"):
                continue
            event, begun = event_of(begun), b""
            if event:
                yield event
                if event["event"] == "end":
                    return
        if is_dead:
            yield {"event": "end", "t": now(), "state": "killed", "reason": "the runner is gone"}
            return
        time.sleep(POLL_S)
