"""A notebook that somebody runs by `papermill --engine etl in.ipynb out.ipynb`: any notebook, of no stage, in no root.

Papermill reads it, puts the parameters in and names the output; the run itself, its states and what is written are
as for a stage. See docs/papermill.md.
"""

import asyncio
import contextlib
import math
import os
import uuid
from pathlib import Path
from typing import Any

from etl import secrets
from etl.params.cell import secret_names
from etl.reports import page
from etl.runs.driver import NotebookRun, collected_signals, raise_again
from etl.runs.journal import Journal
from etl.runs.record import RunRequest, now
from etl.storage import temporary_folder

NOT_SUPPORTED = ("log_output", "stdout_file", "stderr_file")


def execute(
    nb: Any,
    kernel_name: str,
    input_path: str | None = None,
    output_path: str | None = None,
    execution_timeout: float | None = None,
    **asked: Any,
) -> Any:
    """Run `nb` in the working folder and return it, executed. `execution_timeout` is in seconds, for the whole run.

    While it runs it is written to `output_path`, if there is one. A run that is neither ok nor noop is written, and
    then raises PapermillExecutionError; one that cannot begin raises PapermillException and writes nothing.
    """
    from papermill.exceptions import PapermillException
    from papermill.log import logger

    for name in NOT_SUPPORTED:
        if asked.get(name):
            logger.warning(f"--{name.replace('_', '-')} has no effect here: all outputs are in the notebook")
    request = _request(nb, input_path, execution_timeout)
    if problems := secrets.missing(request):
        raise PapermillException("; ".join(problems))
    nb.cells = [cell for cell in nb.cells if "report" not in cell.metadata.get("runner", {})]  # of a run before

    def write(data: bytes) -> None:
        if output_path:
            _write(output_path, data)

    def on_cell(done: int, total: int, heading: str) -> None:
        logger.info(f"{done} of {total} cells are done{heading and f', now: {heading}'}")

    with temporary_folder("papermill-") as folder, collected_signals() as signals:
        journal = Journal(Path(folder, "journal"))
        with contextlib.closing(journal):
            run = NotebookRun(
                request, nb, journal, write, Path.cwd(), on_cell=on_cell, signals=signals, is_capped=False
            )
            asyncio.run(run.drive(kernel_name))
            run.end()
            run.progress.finish(last_ok=None)
    target = output_path or nb.metadata.papermill.get("output_path")
    return _result(run, target, signals)


def _request(nb: Any, input_path: str | None, timeout_s: float | None) -> RunRequest:
    stage = Path(input_path or "notebook").stem
    values = dict(nb.metadata.papermill.get("parameters") or {})
    return RunRequest(
        stage=stage,
        run_id=f"{stage}-{uuid.uuid4().hex[:6]}",
        root="",
        notebook={},
        parameters=values,
        origins={},
        scheduled_for=now(),
        deadline_s=timeout_s or math.inf,
        secrets=secret_names(nb, values),
    )


def _result(run: NotebookRun, target: str | None, signals: list[int]) -> Any:
    """The executed notebook; what went wrong is written and raised, before Papermill reads it in its own way."""
    from papermill.exceptions import PapermillException, PapermillExecutionError

    record, nb = run.progress.record, run.progress.nb
    if record.ok:  # Papermill writes it
        if record.state == "noop":
            _show_stop(nb, record.reason)
        return nb
    if target:
        _write(target, page.notebook(nb))
    raise_again(signals)
    error = record.error
    if not error or error["cell"] is None:
        raise PapermillException(f"{record.state}: {record.reason}")
    cell = nb.cells[error["cell"]]
    lines = [f"{record.state}: {record.reason}", *error["traceback_tail"].splitlines()]
    raise PapermillExecutionError(
        error["cell"], cell.execution_count, cell.source, error["ename"], error["evalue"], lines
    )


def _show_stop(nb: Any, reason: str) -> None:
    """The exception of etl.notebook.stop as a plain line: Papermill takes a shown error for a failure."""
    from nbformat.v4 import new_output

    shown = new_output("display_data", data={"text/plain": f"Stopped: {reason}"})
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.metadata.runner["state"] == "ok":
            cell.outputs = [shown if out.output_type == "error" else out for out in cell.outputs]


def _write(path: str, data: bytes) -> None:
    """A file as a whole, or what Papermill has for other places."""
    if path == "-" or "://" in path:
        from papermill.iorw import papermill_io

        papermill_io.write(data.decode(), path)
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        Path(part).write_bytes(data)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
