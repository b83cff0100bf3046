"""The journal of a run: what happens, as it happens, on this machine's disk, until its report is where it belongs.

    spool/<run_id>/journal.jsonl        one event a line, appended by the runner and by the black box of its kernel
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
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etl.storage import PROJECT, LocalRoot, Root, no_panic

log = logging.getLogger(__name__)
POLL_S = 0.2  # of a follower
UNWANTED = "remove the folder when it is not wanted any more"


def spool() -> Path:
    """The folder of all journals of this machine."""
    return Path(os.environ.get("ETL_SPOOL") or PROJECT / "outputs" / "spool")


class Journal:
    """Written by one run. A disk that refuses is a warning, once, and no more journal; the run goes on."""

    def __init__(self, request: Any, nb: Any, redactor: Any):
        self.folder, self.size = spool() / request.run_id, 0
        self.path = self.folder / "journal.jsonl"
        self._pending: dict[tuple[int, int], tuple[list, list[str]]] = {}
        self._file: int | None = None
        self._is_kept = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = self.folder / ".journal"  # gets its name when it is locked, or others would find it free
            self._file = os.open(begun, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.replace(begun, self.path)
            (self.folder / "notebook.ipynb").write_text(json.dumps(redactor.notebook(nb), default=str))
        except OSError as error:
            self._refused(error)
        asked = {name: value for name, value in vars(request).items() if name not in ("notebook", "variables")}
        self.event("start", request=redactor.request(asked), pid=os.getpid(), pid_started=_started(os.getpid()))

    def event(self, event: str, **fields: Any) -> None:
        """Append one event, what was shown before it first. Its fields are redacted already."""
        self.flush()
        self._write({"event": event, "t": _now(), **fields})

    def output(self, index: int, at: int, outs: list, text: str | None = None) -> None:
        """`outs[at]` of the cell at `index` is new; of a stream, only `text` is. Written with the next `flush`."""
        pieces = self._pending.setdefault((index, at), (outs, []))[1]
        if text is not None:
            pieces.append(text)

    def cleared(self, index: int) -> None:
        """The cell shows nothing any more."""
        self._pending = {place: shown for place, shown in self._pending.items() if place[0] != index}
        self.event("clear", index=index)

    def flush(self) -> None:
        """Write what has been shown since the last time."""
        pending, self._pending = self._pending, {}
        for (index, at), (outs, pieces) in pending.items():
            out = {**outs[at], "text": "".join(pieces)} if pieces else outs[at]
            self._write({"event": "output", "t": _now(), "index": index, "at": at, "output": out})

    def _write(self, event: dict) -> None:
        if not self._is_kept:
            return
        line = (json.dumps(event, default=str) + "\n").encode()
        try:
            while line:
                written = os.write(self._file, line)  # not all of it when the disk is full; then the rest is refused
                self.size, line = self.size + written, line[written:]
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        """From now on nothing is written; the file stays ours, or others would take the run for a dead one."""
        log.warning("no journal can be kept in %s: %s", self.folder, error)
        self._is_kept = False

    def side_file(self, name: str, binary: bool = False) -> "SideFile":
        return SideFile(self.folder / name, binary)

    def events(self, *kinds: str) -> list[dict]:
        """Those of these kinds so far, the black box's among them."""
        with contextlib.suppress(OSError):
            return list(_read(self.path, kinds))
        return []

    def close(self) -> None:
        """Let go of it; whoever finds it then delivers what it says."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class SideFile:
    """A file in the spool, written as it comes. A disk that refuses is a warning, once."""

    def __init__(self, path: Path, binary: bool):
        self._path, self._file = path, None
        try:
            self._file = path.open("wb") if binary else path.open("w", errors="replace")
        except OSError as error:
            self._refused(error)

    def write(self, data: str | bytes) -> None:
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
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _refused(self, error: OSError) -> None:
        log.warning("%s cannot be kept: %s", self._path, error)
        self._file = None


def save(root: Root, record: Any, nb: Any, folder: Path) -> None:
    """Put the executed notebook, its side files and the record into the root."""
    from etl.reports import page

    for side in sorted(folder.glob("cell-*")):
        root.put(f"{record.report}/{side.name}", side)
    page.save(root, record, nb)


def finish(root: Root, record: Any, nb: Any, folder: Path, again: bool = False) -> None:
    """After `save`: put the row into the index and the page beside the notebook, and remove the spool's folder."""
    from etl.reports import page
    from etl.runs import index as run_index

    if not (again and run_index.indexed(root, record.run_id)):
        run_index.append(root, record)
    page.write_page(root, record, nb)
    shutil.rmtree(folder, ignore_errors=True)


_background = ThreadPoolExecutor(1, thread_name_prefix="reports")  # Python waits for it when it ends
_under_way: set[Future] = set()


def later(work: Callable[[], None]) -> None:
    """Have `work` done in the background, one after the other; what it raises is logged."""
    future = _background.submit(work)
    _under_way.add(future)
    future.add_done_callback(_done)


def _done(future: Future) -> None:
    _under_way.discard(future)
    if error := future.exception():
        log.error("a report was not finished; the next start does it: %s", error, exc_info=error)


def settle(within_s: float | None = None) -> None:
    """Wait until nothing is done in the background. What is not done in time is done at the next start."""
    wait(list(_under_way), timeout=within_s)


def keep_aside(record: Any, nb: Any, folder: Path) -> None:
    """Write the report into the spool's folder, where people can read it until it is delivered."""
    from etl.reports import page

    with contextlib.suppress(OSError):
        page.write(LocalRoot(os.path.abspath(folder)), record, nb, place=".")


def deliver(root: Root) -> list[str]:
    """Hand in the reports of ended runs that could not be written to this root then; their run_ids."""
    done = []
    for folder in _left():
        with _left_alone(folder), _locked(folder) as free:
            if free and _ended(folder) and _root_of(folder) == root.url:
                _close(folder, root)
                done.append(folder.name)
    return done


def reconcile() -> list[str]:
    """Close every run whose process died with it: kernels and sockets gone, true state, report, row; their run_ids."""
    from etl.kernels import launch

    closed = []
    for folder in _left():
        with _left_alone(folder), _locked(folder) as free:
            if not free:
                continue
            if _is_empty(folder):  # it died before it began
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for kernel in _read(folder / "journal.jsonl", ("kernel",)):
                launch.end_all_of(kernel["folder"])
            ended = _ended(folder)
            _close(folder, Root.at(_root_of(folder)))
            if not ended:
                closed.append(folder.name)
    return closed


@contextlib.contextmanager
def _left_alone(folder: Path) -> Iterator[None]:
    """What goes wrong with one folder of the spool is a warning: the others, and the run that looks, go on."""
    try:
        with no_panic():
            yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("the report of run %s still waits in %s: %s", folder.name, folder, why)


def _is_empty(folder: Path) -> bool:
    """Whether not even the first line of the journal was written."""
    with (folder / "journal.jsonl").open("rb") as file:
        return not file.readline().endswith(b"\n")


def _root_of(folder: Path) -> str:
    """The root of the run that left a folder in the spool. Raises ValueError when its journal does not say."""
    start = next(_read(folder / "journal.jsonl", ("start",)), None)
    if not start or not isinstance(start.get("request"), dict) or "root" not in start["request"]:
        raise ValueError(f"its journal does not say what ran; {UNWANTED}")
    return start["request"]["root"]


def _ended(folder: Path) -> bool:
    return any(_read(folder / "journal.jsonl", ("end",)))


def live() -> list[dict]:
    """The runs under way on this machine: run_id, stage, root, started_at, cell, heading, rss_mb, cpu_s."""
    found = []
    for folder in _left():
        with contextlib.suppress(OSError, KeyError):  # another user's, or another release's
            if run := _live(folder):
                found.append(run)
    return found


def _live(folder: Path) -> dict:
    """What a run that is under way has come to; empty when it is not."""
    with _locked(folder, fcntl.LOCK_SH) as free:
        if free:
            return {}
    run = {}
    for event in _read(folder / "journal.jsonl", ("start", "cell_start", "sample", "end")):
        if event["event"] == "start":
            run = {name: event["request"][name] for name in ("run_id", "stage", "root")}
            run |= {"started_at": event["t"], "cell": None, "heading": "", "rss_mb": None, "cpu_s": None}
        elif event["event"] == "cell_start":
            run |= {"cell": event["index"], "heading": event["heading"]}
        elif event["event"] == "sample":
            run |= {name: event[name] for name in ("rss_mb", "cpu_s")}
        else:
            return {}  # only its report is being written
    return run


def follow(run_id: str, root: Root | str) -> Iterator[dict]:
    """The events of a run as they happen, until its end; those of an ended run from its report.

    A run whose process dies ends with an `end` event, too. Raises KeyError when there is no such run.
    """
    folders = [folder for folder in _left() if folder.name.startswith(run_id)]
    folder = next((folder for folder in folders if folder.name == run_id), folders[0] if len(folders) == 1 else None)
    try:
        file = (folder / "journal.jsonl").open("rb") if folder else None
    except OSError:  # delivered a moment ago, or another user's
        file = None
    if file is None:
        yield from _replay(run_id, Root.at(root))
        return
    with file:
        begun = b""
        while True:
            with _locked(folder, fcntl.LOCK_SH) as free:  # asked before reading: what it wrote last is read now
                dead = free or not folder.exists()
            for line in file:
                begun += line
                if not begun.endswith(b"\n"):
                    continue
                event, begun = _event(begun), b""
                if event:
                    yield event
                    if event["event"] == "end":
                        return
            if dead:
                yield {"event": "end", "t": _now(), "state": "killed", "reason": "the runner is gone"}
                return
            time.sleep(POLL_S)


def _replay(run_id: str, root: Root) -> Iterator[dict]:
    """The events of an ended run, as far as its report tells them."""
    from etl.runs import index as run_index

    record = run_index.get(root, run_id)
    cells = json.loads(root.read(f"{record['report']}/report.ipynb"))["cells"]
    asked = {name: record[name] for name in ("stage", "run_id", "parameters") if name in record}
    yield {"event": "start", "t": record["started_at"], "request": asked}
    as_run = [cell for cell in cells if "report" not in cell["metadata"].get("runner", {})]
    headings = iter([cell["heading"] for cell in record.get("cells", [])])
    for index, cell in enumerate(as_run):
        ran = cell["metadata"].get("runner", {})
        heading = next(headings, "") if cell["cell_type"] == "code" else ""
        if cell["cell_type"] != "code" or ran.get("state") == "never_ran":
            continue
        yield {"event": "cell_start", "index": index, "heading": heading}
        for at, out in enumerate(cell["outputs"]):
            text = {"text": "".join(out["text"])} if "text" in out else {}
            yield {"event": "output", "index": index, "at": at, "output": out | text}
        yield {"event": "cell_end", "index": index, "state": ran.get("state"), "seconds": ran.get("seconds")}
    yield {"event": "end", "t": record["ended_at"], "state": record["state"], "reason": record["reason"]}


def read(path: Path) -> list[dict]:
    """All events of a journal."""
    return list(_read(path, ()))


def _left() -> list[Path]:
    """The folders of the spool, oldest first: runs under way, and what others left."""
    found = []
    with contextlib.suppress(OSError):
        for folder in spool().iterdir():
            with contextlib.suppress(OSError):  # delivered a moment ago
                if stat.S_ISREG((folder / "journal.jsonl").stat().st_mode):
                    found.append((folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(found)]


@contextlib.contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody holds the journal; if so it is ours for the length of the block. Who only asks takes LOCK_SH."""
    try:
        file = os.open(folder / "journal.jsonl", os.O_RDONLY)
    except FileNotFoundError:  # delivered a moment ago
        yield False
        return
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        free = (folder / "journal.jsonl").exists()
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(file)


def _read(path: Path, kinds: tuple[str, ...]) -> Iterator[dict]:
    """The events of these kinds, of all when there are none named."""
    marks = tuple(f'{{"event": "{kind}"'.encode() for kind in kinds) or b"{"
    with path.open("rb") as file:
        for line in file:
            if line.startswith(marks) and (event := _event(line)):
                yield event


def _event(line: bytes) -> dict | None:
    """The event in a line; None in one that was never finished: its process died, or the disk was full."""
    with contextlib.suppress(ValueError):
        event = json.loads(line) if line.endswith(b"\n") else None
        return event if isinstance(event, dict) and "event" in event else None


def _close(folder: Path, root: Root) -> None:
    """Hand in the report of a run whose process is gone, as the journal tells it."""
    from etl.runs import engine

    if "://" not in root.url and not root.is_there():  # it was removed, or its disk is: do not make it again
        raise FileNotFoundError(f"its root {root.url} is gone; {UNWANTED}")
    record, nb = engine.from_journal(folder / "journal.jsonl")
    save(root, record, nb, folder)
    finish(root, record, nb, folder, again=True)


def _started(pid: int) -> int:
    """When the process started, in ticks since the machine did; with the pid it names a process for good."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
