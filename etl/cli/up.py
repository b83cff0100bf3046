"""`up`: everything that runs for good."""

import asyncio
import copy
import logging
import os
import signal
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape

from etl.cli.common import (
    Env,
    RootOption,
    Timetable,
    announce_new,
    asked_root,
    close_lost_runs,
    err,
    load,
    out,
    refuse,
    services_folder,
)
from etl.cli.ports import with_ports
from etl.cli.printing import Minutes
from etl.storage import PROJECT, Root, Unreachable

if TYPE_CHECKING:
    from etl.params import Environment
    from etl.runs.releases import Tree
    from etl.serve.heartbeat import Heart

LOG_BYTES = 16_000_000  # of the log, and as many of the one before


def register(app: typer.Typer, timetable: Timetable) -> None:
    app.command()(with_ports(up, timetable.ports))


def up(
    context: typer.Context,
    env: Env = "local",
    root: RootOption = None,
    live: Annotated[bool, typer.Option("--live", help="Run the working tree, not the release.")] = False,
    **ports: int,
) -> None:
    """Everything: Prefect's server unless PREFECT_API_URL is set, the schedules, API and dashboard. Ctrl-C ends all."""
    from etl.runs import delivery, releases
    from etl.serve import heartbeat, lease, services
    from etl.serve.released import Released, always

    timetable: Timetable = context.obj
    url = asked_root(env, root).url
    try:
        is_new = not live and not releases.moves(Root.at(url))
    except Unreachable as error:
        refuse(f"`up` cannot begin: {error}")
    except Exception as error:
        refuse(f"`up` cannot begin, as {url} cannot be read: {error}")
    project = load(env, root=root, may_be_unreadable=live) if live or is_new else None
    _log_to_terminal()
    announce_new(url, out)
    logs = services_folder(url)
    children: list[Any] = list(timetable.services(url, ports, logs))
    api_url = timetable.report_url(ports)
    shared = "PREFECT_API_URL" in os.environ
    if shared:
        del children[0]
    else:
        os.environ["PREFECT_HOME"] = str(logs / "prefect")
        os.environ["PREFECT_API_URL"] = f"{children[0].page}/api"
    pages = {services.PREFECT: os.environ["PREFECT_API_URL"].removesuffix("/api")}
    pages |= {child.name: child.page for child in children}
    held = lease.Lease(logs, Root.at(url), pages, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        held.take()
    except lease.Held as error:
        refuse(str(error))
    except Unreachable as error:
        refuse(f"`up` cannot begin: {error}")
    except Exception as error:  # what a store other than S3 raises need be no OSError
        refuse(f"`up` cannot begin, as {url} cannot be written: {error}")
    _log_to_file(logs / "up.log")
    close_lost_runs()
    delivery.deliver(Root.at(url))
    # explicitly: a shell that starts it in the background has it ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    minutes: Minutes | None = None
    heart = heartbeat.Heart(Root.at(url), pages, api_url, lambda: services.ill(children))
    status, code = 1, Code(Root.at(url), children, logs, heart)
    try:
        if is_new:
            releases.first(PROJECT, Root.at(url))
        trees = always(releases.Tree(PROJECT, project)) if live and project else Released(Root.at(url), env)
        tree = trees()
        for child in children:
            services.ensure_free(child.port, child.name, within_s=services.END_S if held.after_death else 0)
        for child in children:
            child.start()
        for child in children:
            try:
                child.wait_ready()
                out.print(f"{child.name:15} {child.page}", highlight=False)
            except RuntimeError as error:
                if child.essential:
                    raise
                err.print(f"[bold red]{escape(str(error))}", highlight=False)
        code.begin(tree)
        from etl.serve import flows

        out.print(f"{'reports':15} {api_url}/reports", highlight=False)
        minutes = Minutes(lambda run_id: f"{api_url}/reports/{run_id}")
        asyncio.run(
            flows.serve(
                *(tree.project, api_url, children, minutes, _print_status),
                trees=trees,
                on_tree=code.follow,
                kept=logs / "timetable.json",
                shared=shared,
            )
        )
    except KeyboardInterrupt:
        status = 1 if held.lost else 0
        if held.lost:
            err.print(f"[bold red]the lease is lost: {escape(held.lost)}", highlight=False)
        out.print("ending every child …")
    except (services.PortTaken, RuntimeError) as error:
        err.print(f"[bold red]{escape(str(error))}", highlight=False)
    except Exception:
        err.print_exception()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not held.lost:  # else another tells by now what it runs
        code.end()
    services.stop(children)
    delivery.settle(5)
    held.release()
    if minutes:
        minutes.tell()
    out.print("nothing is left running")
    sys.stdout.flush()
    # a thread that still wants to tell the server something would hold the process, as the server is gone
    os._exit(status)


class Code:
    """What goes with the code that runs: its fork server, and the sweeps by its rules. Says which it is."""

    def __init__(self, root: Root, children: list[Any], logs: Path, heart: "Heart"):
        """`children`: what is kept alive; its fork server, its watcher and its heart are among them."""
        from etl.serve.released import Teller

        self._root, self._children, self._logs, self._heart = root, children, logs, heart
        self._teller = Teller(root, PROJECT, _print_status)
        self._tree: Tree | None = None
        self._swept: threading.Event | None = None

    async def follow(self, tree: "Tree") -> None:
        """Have `tree` be what runs begin with, and tell so. Raises OSError when a root or a disk is down."""
        if tree is not self._tree:
            self.begin(tree)
        await asyncio.to_thread(self._teller.tell, tree)

    def begin(self, tree: "Tree") -> None:
        """Take what `tree` needs in the place of what was. In the main thread: with it its children end."""
        from etl.kernels import client
        from etl.runs import retention

        environment = tree.project.environment
        new = client.Keeper(environment.ready_kernels, self._logs / "kernels.log", tree.folder)
        for keeper in [child for child in self._children if isinstance(child, client.Keeper)]:
            self._children.remove(keeper)
            new.take_over(keeper)
        if new.ready:
            new.start()
            self._children.append(new)
        if self._swept:
            self._swept.set()
        self._swept = retention.sweep_regularly(self._root, environment.retention)
        self._warn_of_the_engine(tree)
        self._have_alerts(environment)
        if self._heart.tree is None:
            self._children.append(self._heart)
        self._tree = self._heart.tree = tree

    def _have_alerts(self, environment: "Environment") -> None:
        """Have a watcher exactly where somebody is to be told; it finds out itself who that is."""
        from etl.serve import services

        asked, name = environment.alerts, "alerts"
        wanted = bool(asked and (asked.to or asked.command))
        watchers = [child for child in self._children if child.name == name]
        if wanted and not watchers:
            command = [sys.executable, str(PROJECT / "orchestrate.py"), "watch", "--env", environment.name]
            command += ["--root", self._root.url]
            watcher = services.Service(name, command, 0, "", "", log_path=self._logs / "alerts.log")
            watcher.beat = self._logs / "alerts.beat"
            watcher.start()
            self._children.append(watcher)
        elif watchers and not wanted:
            services.stop(watchers)
            self._children.remove(watchers[0])

    def _warn_of_the_engine(self, tree: "Tree") -> None:
        """Kernels have a release's engine; this process keeps the one that it began with."""
        if not (self._tree and self._tree.release and tree.release):
            return
        engines = [
            {path: sha256 for path, sha256 in one.release.files.items() if path.startswith("etl/")}
            for one in (self._tree, tree)
            if one.release
        ]
        if engines[0] != engines[1]:
            _print_status("its engine is another: `up` itself takes that when it is started again")

    def end(self) -> None:
        self._teller.end()
        self._heart.end()


def _print_status(text: str) -> None:
    out.print(text, highlight=False)


class OneLine(logging.Formatter):
    """Of an error its type and what it says: its traceback is in a file."""

    def format(self, record: logging.LogRecord) -> str:
        short = copy.copy(record)
        short.exc_info = short.exc_text = short.stack_info = None
        text, error = super().format(short), record.exc_info and record.exc_info[1]
        return f"{text}: {type(error).__name__}: {str(error).partition(chr(10))[0]}" if error else text


def _log_to_terminal() -> None:
    """Warnings of every library, a line each. What Prefect's client says of a server that is away is not among them:
    the schedules say what that means; nor how a run ended, whose card comes next."""
    handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%H:%M:%S")
    handler.setFormatter(OneLine("%(name)s: %(message)s"))
    handler.addFilter(lambda record: record.name.partition(".")[0] not in ("prefect", "websockets"))
    handler.addFilter(lambda record: record.name != "etl.runs.engine")
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _log_to_file(path: Path) -> None:
    """The same with every traceback, and Prefect's client."""
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.namer = lambda name: f"{name.removesuffix('.1')}.before"  # as the services' logs
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
