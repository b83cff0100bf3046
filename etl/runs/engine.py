"""One notebook run as a job whose state is true: a Papermill engine, and `execute` around it.

Papermill's own bookkeeping calls every cell completed after the kernel was killed, and `sys.exit(0)` a
success (papermill #125, #501). Here a state comes from what happened to the kernel, and a cell that never
ran says so.
"""

import asyncio
import contextlib
import functools
import logging
import re
import sys
import threading
import traceback
import uuid
from pathlib import Path
from typing import Any

from etl import params, secrets
from etl.runs import delivery, standalone
from etl.runs.driver import NotebookRun, OnCell, collected_signals, raise_again
from etl.runs.endings import one_line
from etl.runs.journal import Journal, spool
from etl.runs.record import RunRecord, RunRequest
from etl.storage import PROJECT, BadRoot, Root

# 1.5 s of import in every process that imports jsonschema, which does without it
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

log = logging.getLogger(__name__)
ENGINE = "etl"
CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# this interpreter, whatever the kernel was called where the notebook was saved
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def execute(
    request: RunRequest,
    on_cell: OnCell | None = None,
    cancel: threading.Event | None = None,
    page_later: bool = False,
) -> RunRecord:
    """Run the notebook, then write its report and its row in the index of runs.

    With `page_later` it returns when the executed notebook and the record are saved; the row and the page follow in the
    background, and if this process dies before, at the next start. `delivery.settle` waits for them.

    Whatever the notebook does ends in the record's state and raises nothing. `on_cell(done, total, heading)`
    is called before each code cell and at the end; setting `cancel` ends the run, and so does Ctrl-C. SIGTERM in the
    main thread ends it as killed, and this process when its report is written. A root that is down is a warning: the
    report waits in the spool. Fit for several threads at once; the calling thread must have no running event loop.
    """
    with collected_signals() as signals:
        with contextlib.suppress(OSError, BadRoot):  # who delivers a dead run's report makes no root that is gone again
            Root.at(request.root).make()
        journal = Journal(spool() / request.run_id)
        try:
            run = run_notebook(request, journal, on_cell, cancel, signals)
            delivery.finish(run.progress)
        except BaseException:
            journal.close()
            raise
        delivery.hand_in(run.progress, journal, later=page_later)
    log_end(run.progress.record, request)
    raise_again(signals)
    return run.progress.record


def log_end(record: RunRecord, request: RunRequest) -> None:
    """How a run ended, for the log."""
    reason = f" ({record.reason})" if record.reason else ""
    level = logging.INFO if record.ok or request.refused_as == record.state == "cancelled" else logging.ERROR
    log.log(level, "run %s %s in %.1f s%s", record.run_id, record.state, record.seconds, reason)


def run_notebook(
    request: RunRequest,
    journal: Journal,
    on_cell: OnCell | None,
    cancel: threading.Event | None,
    signals: list[int],
    is_shown: bool = True,
) -> NotebookRun:
    """Run the notebook to its end, whatever that is: as `execute`, told to the journal alone.

    `is_shown`: the growing notebook is written into the root now and then.
    """

    def write(data: bytes) -> None:
        if is_shown:
            Root.at(request.root).write(f"{run.progress.record.report}/report.ipynb", data)

    nb = with_parameters(request)
    project = Path(request.project or PROJECT)
    notebooks = project / "notebooks"  # a cloud machine gets the code without it
    cwd = notebooks if notebooks.is_dir() else project
    run = NotebookRun(request, nb, journal, write, cwd, on_cell, cancel, signals)
    _run_through_papermill(run)
    return run


def with_parameters(request: RunRequest) -> Any:
    """The notebook with the injected cell after the parameters cell, and the kernel that it is run by."""
    import nbformat

    nb, values = nbformat.from_dict(request.notebook), request.parameters
    cells = [cell for cell in nb.cells if not _is_tagged(cell, "injected-parameters")]
    after = next((number for number, cell in enumerate(cells, 1) if _is_tagged(cell, "parameters")), 0)
    source = params.injected_cell_source(values, declared=values)
    cells.insert(after, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))
    nb.cells = cells
    _give_ids(nb)
    nb.metadata["kernelspec"] = nbformat.from_dict(KERNEL)
    return nb


def _give_ids(nb: Any) -> None:
    """Make it a notebook of the latest format 4, in which each cell has an id of its own."""
    from nbformat import v4

    nb.nbformat_minor, ids = v4.nbformat_minor, set()
    for cell in nb.cells:
        if not CELL_ID.fullmatch(str(cell.get("id", ""))) or cell.id in ids:
            cell["id"] = uuid.uuid4().hex[:8]
        ids.add(cell.id)


def _is_tagged(cell: Any, tag: str) -> bool:
    return tag in (cell.get("metadata", {}).get("tags") or [])


def _run_through_papermill(run: NotebookRun) -> None:
    """Run it to its end, whatever that is."""
    request = run.request
    if refused := [request.refused] if request.refused else secrets.missing(request):
        run.refuse(run.progress.redactor.text(" ".join("; ".join(refused).split()))[:300])
    else:
        papermill = _papermill()
        try:
            papermill.execute_notebook(
                run.nb,
                None,
                engine_name=ENGINE,
                kernel_name=KERNEL["name"],
                progress_bar=False,
                run=run,
            )
        except _Ended:
            pass
        except Exception as error:  # not the notebook's doing, but this run is over
            told = run.progress.redactor.text("".join(traceback.format_exception(error)))
            run.refuse(one_line(run.progress.redactor.text(str(error)), type(error).__name__), told)
    run.end()


@functools.cache
def _papermill() -> Any:
    """The module, which knows this engine also where the project is not installed."""
    import papermill
    from papermill.engines import papermill_engines

    papermill_engines.register(ENGINE, NotebookEngine)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("traitlets").setLevel(logging.INFO)  # at DEBUG nbclient logs every message, secrets and all
    return papermill


class _Ended(Exception):
    """The notebook has ended; keeps Papermill from adding its own reading of that."""


class NotebookEngine:
    """What Papermill calls, instead of its NotebookExecutionManager, whose states lie."""

    @classmethod
    def execute_notebook(cls, nb: Any, kernel_name: str, run: NotebookRun | None = None, **asked: Any) -> Any:
        """Run `nb`, which is Papermill's copy of the run's own, and raise _Ended; without a `run` see standalone."""
        if run is None:
            return standalone.execute(nb, kernel_name, **asked)
        run.progress.nb = nb
        asyncio.run(run.drive(kernel_name))
        raise _Ended

    @staticmethod
    def nb_kernel_name(nb: Any, name: str | None = None) -> str:
        """The kernel that the notebook asks for, unless the caller does."""
        from papermill.utils import nb_kernel_name

        return str(nb_kernel_name(nb, name))

    @staticmethod
    def nb_language(nb: Any, language: str | None = None) -> str:
        """The language that the notebook is in, unless the caller says."""
        from papermill.utils import nb_language

        return str(nb_language(nb, language))
