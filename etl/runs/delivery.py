"""Reports on their way into the root: of runs that have ended, and of those whose process died, by their journals.

A report is the executed notebook and the record, then the row in the index and the page that people read. What cannot
be written because the root is down waits in the spool, and is delivered by the next run or the next start.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from etl import secrets
from etl.figures import utc
from etl.kernels import launch
from etl.reports import page
from etl.runs import index, journal, live, outputs
from etl.runs.endings import one_line
from etl.runs.record import Progress, RunRecord, RunRequest, now
from etl.storage import LocalRoot, Root, Unreachable, no_panic

log = logging.getLogger(__name__)
OF_HOME = 2  # events that home writes into the journal of a run elsewhere before its machine's: start, machine
UNWANTED = "remove the folder when it is not wanted any more"


def finish(progress: Progress) -> None:
    """After a run's end: complete its record, and make its notebook the report."""
    record = progress.record
    progress.finish(None if record.ok else index.last_ok(record))


def hand_in(progress: Progress, written: journal.Journal, later: bool) -> None:
    """Write report, row and page of a run of this process; where they cannot be written, keep them in the spool.

    `later`: row and page follow in the background.
    """
    record, nb = progress.record, progress.nb
    with _kept_aside_on_error(record, nb, written):
        root = Root.at(record.root)
        _save(root, record, nb, written.folder)
        work = functools.partial(_complete, root, progress, written)
        _in_background(work) if later else work()


def _complete(root: Root, progress: Progress, written: journal.Journal) -> None:
    with _kept_aside_on_error(progress.record, progress.nb, written):
        _add_row_and_page(root, progress, written.folder)
        deliver(root)
    written.close()  # until now nobody else may finish it


@contextlib.contextmanager
def _kept_aside_on_error(record: RunRecord, nb: Any, written: journal.Journal) -> Iterator[None]:
    try:
        with no_panic():
            yield
    except Exception as error:  # the work is done or it is not: a root that is down changes nothing of that
        text = "the report of run %s could not be written to %s; it waits in %s and is delivered later: %s"
        log.warning(text, record.run_id, record.root, written.folder, one_line(error))
        with contextlib.suppress(OSError):  # where people can read it until then
            page.write(LocalRoot(os.path.abspath(written.folder)), record, nb, folder=".")
        written.close()


def _save(root: Root, record: RunRecord, nb: Any, folder: Path) -> None:
    """Put the executed notebook, its side files and the record into the root."""
    for side in sorted(folder.glob("cell-*")):
        root.put(f"{record.report}/{side.name}", side)
    page.save(root, record, nb)


def _add_row_and_page(root: Root, progress: Progress, folder: Path, again: bool = False) -> None:
    """After `_save`: the row in the index and the page beside the notebook; then remove the spool's folder.

    `again`: somebody may have written the row before.
    """
    record = progress.record
    if not (again and index.indexed(root, record.run_id)):
        index.append(root, record)
    before = index.before(root, vars(record))
    if before.last_ok:
        before = replace(before, last_ok=progress.as_shown(before.last_ok))
    page.write_page(root, record, progress.nb, before=before)
    shutil.rmtree(folder, ignore_errors=True)


_background = ThreadPoolExecutor(1, thread_name_prefix="reports")  # Python waits for it when it ends
_under_way: set[Future[None]] = set()


def _in_background(work: Callable[[], None]) -> None:
    """Have `work` done, one after the other; what it raises is logged."""
    future = _background.submit(work)
    _under_way.add(future)
    future.add_done_callback(_done)


def _done(future: Future[None]) -> None:
    _under_way.discard(future)
    if error := future.exception():
        log.error("a report was not finished; the next start does it: %s", one_line(error))


def settle(within_s: float | None = None) -> None:
    """Wait until nothing is done in the background. What is not done in time is done at the next start."""
    wait(list(_under_way), timeout=within_s)


def deliver(root: Root) -> list[str]:
    """Hand in the reports of ended runs that could not be written to this root then; their run_ids."""
    delivered, waiting = [], _Waiting()
    for folder in journal.folders():
        with waiting.noted(folder), journal.locked(folder) as is_free:
            if is_free and _has_ended(folder) and _root_of(folder) == root.url:
                waiting.require_reached(root.url)
                _hand_in_from_journal(folder, root)
                delivered.append(folder.name)
    waiting.warn()
    return delivered


def reconcile() -> list[str]:
    """Close every run whose process died with it: kernels and sockets gone, true state, report, row; their run_ids."""
    closed, waiting = [], _Waiting()
    for folder in journal.folders():
        with waiting.noted(folder), journal.locked(folder) as is_free:
            if not is_free:
                continue
            if _is_empty(folder):  # it died before it began
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for kernel in journal.read(folder / journal.JOURNAL, "kernel"):
                launch.end_all_of(kernel["folder"])
            root = Root.at(_root_of(folder))
            waiting.require_reached(root.url)
            is_elsewhere = _take_what_came(folder)
            had_ended = _has_ended(folder)
            _hand_in_from_journal(folder, root)
            if is_elsewhere:
                live.forget(root, folder.name, is_over=had_ended)
            if not had_ended:
                closed.append(folder.name)
    waiting.warn()
    return closed


def _take_what_came(folder: Path) -> bool:
    """Of a run elsewhere whose home died: what its machine told since then. If it still runs, it has to end.

    Whether it is one.
    """
    if not any(journal.read(folder / journal.JOURNAL, "machine")):
        return False
    if _has_ended(folder):
        return True
    root, run_id = Root.at(_root_of(folder)), folder.name
    has = len(list(journal.read(folder / journal.JOURNAL))) - OF_HOME
    with (folder / journal.JOURNAL).open("ab") as file:
        file.writelines(list(live.rest(root, run_id, 1))[max(has, 0) :])
    if not _has_ended(folder):
        live.cancel(root, run_id, "its home is gone")
    return True


class _Waiting:
    """Folders of the spool with which something goes wrong: the others, and the run that looks, go on."""

    def __init__(self) -> None:
        self._by_reason: dict[str, list[Path]] = {}
        self._unreachable: dict[str, Unreachable] = {}

    def require_reached(self, root: str) -> None:
        """Raises Unreachable when this root was not reached before: to ask once more takes ten seconds."""
        if root in self._unreachable:
            raise self._unreachable[root]

    @contextlib.contextmanager
    def noted(self, folder: Path) -> Iterator[None]:
        try:
            with no_panic():
                yield
        except Exception as error:
            why = " ".join(
                (str(error) if isinstance(error, Unreachable) else f"{type(error).__name__}: {error}").split()
            )
            self._by_reason.setdefault(why, []).append(folder)
            if isinstance(error, Unreachable):
                self._unreachable[_root_of(folder)] = error

    def warn(self) -> None:
        """A line for each reason: a root that is gone has many runs."""
        for why, (first, *others) in self._by_reason.items():
            more = f" and {len(others)} more beside it" if others else ""
            log.warning("the report of run %s still waits in %s%s: %s", first.name, first, more, why)


def _is_empty(folder: Path) -> bool:
    """Whether not even the first line of the journal was written, or not all of it reached the disk: nothing ran."""
    path = folder / journal.JOURNAL
    with path.open("rb") as file:
        is_torn = not file.readline().endswith(b"\n")
        return is_torn or (not file.readline() and not any(journal.read(path)))


def _root_of(folder: Path) -> str:
    """The root of the run that left a folder in the spool. Raises ValueError when its journal does not say."""
    start = next(journal.read(folder / journal.JOURNAL, "start"), None)
    if not start or not isinstance(start.get("request"), dict) or "root" not in start["request"]:
        raise ValueError(f"its journal does not say what ran; {UNWANTED}")
    return str(start["request"]["root"])


def _has_ended(folder: Path) -> bool:
    return any(journal.read(folder / journal.JOURNAL, "end"))


def _hand_in_from_journal(folder: Path, root: Root) -> None:
    """Hand in the report of a run whose process is gone, as the journal tells it."""
    # it was removed, or its disk is: do not make it again
    if not (root.has_bucket() if "://" in root.url else root.is_there()):
        raise FileNotFoundError(f"its root {root.url} is gone; {UNWANTED}")
    progress = from_journal(folder)
    _save(root, progress.record, progress.nb, folder)
    _add_row_and_page(root, progress, folder, again=True)


def from_journal(folder: Path) -> Progress:
    """A run whose process is gone, finished as far as its journal in the spool's `folder` tells."""
    import nbformat

    events = list(journal.read(folder / journal.JOURNAL))
    request = RunRequest(notebook={}, **events[0]["request"])
    try:
        nb = nbformat.read(folder / journal.NOTEBOOK, as_version=4)
    except (OSError, ValueError):  # of a power cut: what is known of its cells has no cell
        nb, events = nbformat.v4.new_notebook(), [event for event in events if "index" not in event]
    progress = Progress(request, nb, secrets.for_request(request))
    for event in events:
        progress.take(event)
    if not any(event["event"] == "end" for event in events):
        cell = progress.cell()
        progress.cut_off(outputs.text_tail(cell, progress.at, folder) if cell else "")
    finish(progress)
    return progress


def newest(
    root: Root, stage: str | None = None, state: str | None = None, limit: int = 50, **between: Any
) -> list[dict[str, Any]]:
    """As index.newest, and the runs of this machine that are under way or wait for their report."""
    begun = waiting(root)  # before the index: what is delivered meanwhile is in both
    rows = index.newest(root, stage=stage, state=state, limit=limit, **between)
    indexed = {row["run_id"] for row in rows}
    since, until = (moment and utc(moment) for moment in (between.get("since"), between.get("until")))
    for run in begun:
        began = utc(run["started_at"])
        if (
            run["run_id"] not in indexed
            and stage in (None, run["stage"])
            and state in (None, run["state"])
            and not (since and began < since or until and began >= until)
        ):
            rows.append(run)
    return sorted(rows, key=lambda row: (row["started_at"], row["run_id"]), reverse=True)[:limit]


def waiting(root: Root) -> list[dict[str, Any]]:
    """The runs of this machine that have no row in this root's index yet, as that lists them; not all that ended."""
    listed = []
    for run in journal.runs():
        if run["root"] == root.url:
            began, ended = (utc(run[name] or now()) for name in ("started_at", "ended_at"))
            where = f"in {run['heading']!r}" if run["heading"] and run["state"] == "running" else run["reason"]
            row = {name: run.get(name) for name in index.LISTED} | {"reason": where, "kept": False}
            row["scheduled_for"] = utc(run["scheduled_for"]).isoformat(timespec="milliseconds")
            row["report"] = f"reports/{run['stage']}/{run['scheduled_for'][:10]}/{run['run_id']}"
            listed.append(row | {"seconds": max(0.0, round((ended - began).total_seconds(), 3))})
    return listed


def get(root: Root, run_id: str) -> dict[str, Any]:
    """As index.get; of a run that is under way, what is known by now."""
    try:
        return index.get(root, run_id)
    except KeyError:
        begun = [run for run in waiting(root) if run["run_id"].startswith(run_id)]
        if len(begun) != 1:
            raise
        return begun[0]


def follow(run_id: str, root: Root | str) -> Iterator[dict[str, Any]]:
    """The events of a run as they happen, until its end; those of an ended run from its report.

    Raises KeyError when there is no such run, FileNotFoundError when its report was swept.
    """
    events = journal.follow(run_id)
    try:
        first = next(events)
    except KeyError:
        yield from _told_by_report(run_id, Root.at(root))
        return
    yield first
    yield from events


def _told_by_report(run_id: str, root: Root) -> Iterator[dict[str, Any]]:
    """The events of an ended run, as far as its report tells them."""
    record = index.get(root, run_id)
    cells = json.loads(root.read(f"{record['report']}/report.ipynb"))["cells"]
    asked = {name: record[name] for name in ("stage", "run_id", "parameters") if name in record}
    yield {"event": "start", "t": record["started_at"], "request": asked}
    as_run = [cell for cell in cells if "report" not in cell["metadata"].get("runner", {})]
    headings = iter([cell["heading"] for cell in record.get("cells", [])])
    for number, cell in enumerate(as_run):
        ran = cell["metadata"].get("runner", {})
        heading = next(headings, "") if cell["cell_type"] == "code" else ""
        if cell["cell_type"] != "code" or ran.get("state") in ("never_ran", "skipped"):
            continue
        yield {"event": "cell_start", "index": number, "heading": heading}
        for at, out in enumerate(cell["outputs"]):
            text = {"text": "".join(out["text"])} if "text" in out else {}
            yield {"event": "output", "index": number, "at": at, "output": out | text}
        yield {"event": "cell_end", "index": number, "state": ran.get("state"), "seconds": ran.get("seconds")}
    yield {"event": "end", "t": record["ended_at"], "state": record["state"], "reason": record["reason"]}
