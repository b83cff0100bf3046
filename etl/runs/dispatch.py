"""Where a run's work is done: in a kernel on this machine, or on another (`elsewhere`).

A run is asked for by stage and time; here it becomes a `RunRequest`, which is plain data, so the same engine executes
it on either side.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import resource_tracker
from typing import Any
from urllib.parse import urlsplit

from etl.params import Environment, Stage
from etl.params.cell import BadNotebook, read_notebook
from etl.runs import index, provenance
from etl.runs.endings import one_line
from etl.runs.engine import execute
from etl.runs.record import RunRecord, RunRequest
from etl.runs.releases import Release
from etl.storage import Root

log = logging.getLogger(__name__)
RETRIED = ("failed", "timed_out", "killed")  # a failed check is no accident: the same data fails it again
FIRST_DELAY_S = 5  # before the first retry; doubled before each further one
# A worker that is about to be ended has a traceback of the scheduler that has gone before it.
QUIET = "import logging; logging.getLogger('distributed.worker').addFilter(lambda said: 'heartbeat' not in said.msg)"
ANSWER_S = 5  # of a Dask scheduler, to a connection


def run_stage(
    stage: Stage,
    environment: Environment,
    *,
    scheduled_for: datetime | None = None,
    on_begin: Callable[[str], None] | None = None,
    on_cell: Callable[[int, int, str], None] | None = None,
    cancel: threading.Event | None = None,
    parent: str | None = None,
    page_later: bool = False,
    refused: str = "",
    refused_as: str = "failed",
    release: Release | None = None,
) -> RunRecord:
    """Run a stage to its end, retries included; the record is that of the last attempt. Every attempt has a report,
    also one for which no machine or no cluster is to be had.

    `on_begin` is called with the id of each attempt before it runs.
    `scheduled_for` is now when None; `parent` is the run that this one repeats; `page_later` as in
    engine.execute, for a run on this machine. `refused` says why it cannot begin: then it fails with that reason,
    or is cancelled when that is `refused_as`.
    `release`: the one whose folder the stage was loaded from, so that its code runs; None: this process's own code.
    Never raises for what the notebook does, or is.
    """
    scheduled_for = (scheduled_for or datetime.now(UTC)).astimezone(UTC)
    cancel = cancel or threading.Event()
    for attempt in range(1, stage.retries + 2):
        opened = contextlib.ExitStack()
        address: str | None = None
        variables: dict[str, str] = {}
        problem = refused
        wanted = stage.dask if "dask" in stage.supplied and not refused else None
        try:
            if stage.machine is None and wanted and "address" in wanted:
                _require_answer(wanted["address"])
            address, variables = opened.enter_context(cluster(wanted))
        except Exception as error:  # the run's report tells it
            problem = f"no Dask cluster: {type(error).__name__}: {error}"
        try:
            request = make_request(stage, environment, scheduled_for, attempt, address, parent, release)
            is_hopeless = bool(refused or request.refused)  # the same file is no notebook in five seconds, either
            request = replace(request, variables=variables, refused=problem or request.refused)
            request = replace(request, refused_as=refused_as if refused else "failed")
            if on_begin:
                on_begin(request.run_id)
            record = _dispatch(request, stage, on_cell, cancel, page_later)
        finally:
            try:
                opened.close()
            except Exception as error:  # the run is what it was
                log.warning("the Dask cluster of %s could not be closed: %s", stage.name, one_line(error))
        if is_hopeless or record.state not in RETRIED or attempt > stage.retries:
            return record
        delay_s = FIRST_DELAY_S * 2 ** (attempt - 1)
        log.warning("%s attempt %d: %s; again in %d s", stage.name, attempt, record.state, delay_s)
        if cancel.wait(delay_s):
            return record
    raise AssertionError("unreachable: the last attempt returns")


def make_request(
    stage: Stage,
    environment: Environment,
    scheduled_for: datetime,
    attempt: int,
    dask_address: str | None,
    parent: str | None = None,
    release: Release | None = None,
) -> RunRequest:
    """What the engine needs for one attempt, as plain data: the notebook travels as JSON, not as a path.

    A file that is no notebook makes a request that says why it cannot begin.
    """
    notebook, refused = _notebook(stage)
    project = stage.notebook_path.parent.parent if release else None
    moment = scheduled_for.isoformat(timespec="seconds")
    root = Root.at(environment.root).url
    run_id = f"{stage.name}-{scheduled_for:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    supplied = {
        "root": root,
        "run_id": run_id,
        "scheduled_for": moment,
        "dask": dask_address,
    }
    given = {name: value for name, value in supplied.items() if name in stage.supplied}
    return RunRequest(
        stage=stage.name,
        run_id=run_id,
        root=root,
        notebook=notebook,
        parameters=given | stage.values,
        origins=dict.fromkeys(given, "supplied") | stage.origins,
        scheduled_for=moment,
        deadline_s=stage.deadline_s,
        attempt=attempt,
        parent=parent,
        provenance=provenance.of(notebook, project, release.committed if release else None),
        secrets=list(stage.secrets),
        memory_mb=stage.memory_mb,
        refused=refused,
        release=release.id if release else None,
        project=str(project) if project else None,
    )


def _notebook(stage: Stage) -> tuple[dict[str, Any], str]:
    """(the stage's notebook, ""), or (one with its title alone, why the file is none)."""
    import nbformat

    try:
        return nbformat.v4.reads(read_notebook(stage.notebook_path)[0]), ""  # without telling the terminal what is odd
    except BadNotebook as error:
        problem = str(error)
    except Exception as error:  # whatever nbformat makes of the rest of it
        problem = f"not a notebook: {type(error).__name__}: {error}"
    empty = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {stage.name}")])
    return empty, f"notebooks/{stage.notebook_path.name}: {problem}"


@contextlib.contextmanager
def cluster(block: dict[str, Any] | None) -> Iterator[tuple[str | None, dict[str, str]]]:
    """Open the cluster that an env file's `dask` block asks for.

    The address of its scheduler, None without a block, and the variables that a process needs to speak to it.
    `{n_workers: N}`: processes on this machine, gone with the block. `{address: URL}`: one that is there already, whose
    certificates, if it has any, are in Dask's own variables. `{coiled: {...}}`: machines, with the arguments of
    coiled.Cluster; gone with the block, too, but for those with an `idle_timeout`, which the next run finds again.
    """
    if not block:
        yield None, {}
    elif "address" in block:
        yield block["address"], {}
    elif "coiled" in block:
        import coiled

        with coiled.Cluster(**_kept(block["coiled"])) as machines:
            yield machines.scheduler_address, _certificates(machines.security)
    else:
        import dask.config
        from distributed import LocalCluster

        logging.getLogger("distributed.shuffle._scheduler_plugin").setLevel(logging.ERROR)  # it warns of every shuffle
        workers = block["n_workers"]
        # addresses default to every interface; 1 thread: the engines underneath have threads of their own
        with _no_interrupt():
            processes = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                preload=[QUIET, *dask.config.get("distributed.worker.preload")],
            )
        with processes:
            yield processes.scheduler_address, {}


def _require_answer(address: str) -> None:
    """Raises OSError when nobody listens there, at once: Dask's own client asks for half a minute."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if parts.scheme in ("tcp", "ws") and parts.port:  # a scheduler with TLS would warn of one that says nothing
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_S).close()
        except OSError as error:
            raise OSError(f"nobody answers at {address}: {error}") from None


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started meanwhile is not interrupted: a terminal's Ctrl-C goes to all of its processes, and Dask's tell
    it with a traceback each. This thread hears of it afterwards."""
    resource_tracker.ensure_running()  # which lets SIGINT through again in the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kept(arguments: dict[str, Any]) -> dict[str, Any]:
    """What coiled.Cluster is asked for. A cluster is found by its name, whatever machines it has: so that it is called
    by them."""
    if "idle_timeout" not in arguments:
        return arguments
    machines = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    return {"name": f"etl-{machines}", "shutdown_on_close": False} | arguments


def _certificates(security: Any) -> dict[str, str]:
    """Coiled's certificate of one cluster, in Dask's configuration: it proves both sides, and signs itself."""
    tls = "DASK_DISTRIBUTED__COMM__TLS__"
    certificate, key = security.tls_scheduler_cert, security.tls_scheduler_key
    return {f"{tls}CA_FILE": certificate, f"{tls}CLIENT__CERT": certificate, f"{tls}CLIENT__KEY": key}


def _dispatch(
    request: RunRequest,
    stage: Stage,
    on_cell: Callable[[int, int, str], None] | None,
    cancel: threading.Event,
    page_later: bool,
) -> RunRecord:
    """Here, or where the stage asks for."""
    machine = None if request.refused else stage.machine
    if machine is not None and is_large_enough(stage, request.root):
        from etl.runs import elsewhere, machines

        try:
            return elsewhere.run(request, machines.read(stage.name, machine), on_cell, cancel, page_later)
        except ValueError as error:
            request = replace(request, refused=f"no machine: {error}")
    return execute(request, on_cell=on_cell, cancel=cancel, page_later=page_later)


def is_large_enough(stage: Stage, root: str) -> bool:
    """Whether the stage's last ok run had more rows than `machine_above` says; without that, or when nobody knows
    the root yet, whether it says nothing."""
    if stage.machine_above_rows is None:
        return True
    try:
        last = index.find_last(Root.at(root), stage.name)
        rows = index.get(Root.at(root), last["run_id"])["metrics"].get("rows") if last else None
    except Exception as error:  # the run itself says what is wrong with the root
        log.warning("nobody knows how large the last run of %s was: %s", stage.name, one_line(error))
        return False
    return isinstance(rows, int | float) and rows > stage.machine_above_rows
