"""`up`: everything that runs for good."""

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape

from etl.cli.common import (
    Env,
    RootOption,
    Timetable,
    announce_new,
    close_lost_runs,
    err,
    load,
    out,
    refuse,
    services_folder,
)
from etl.cli.ports import with_ports
from etl.cli.printing import print_record
from etl.storage import Root

if TYPE_CHECKING:
    from etl.runs.record import RunRecord


def register(app: typer.Typer, timetable: Timetable) -> None:
    app.command()(with_ports(up, timetable.ports))


def up(context: typer.Context, env: Env = "local", root: RootOption = None, **ports: int) -> None:
    """Everything: Prefect's server unless PREFECT_API_URL is set, the schedules, API and dashboard. Ctrl-C ends all."""
    from etl.kernels import client
    from etl.runs import delivery
    from etl.serve import lease, services

    timetable: Timetable = context.obj
    project = load(env, root=root)
    _log_to_terminal()
    announce_new(project.environment.root, out)
    logs = services_folder(project.environment.root)
    children: list[Any] = list(timetable.services(project.environment.root, ports, logs))
    api_url = timetable.report_url(ports)
    if "PREFECT_API_URL" in os.environ:
        del children[0]
    else:
        os.environ["PREFECT_HOME"] = str(logs / "prefect")
        os.environ["PREFECT_API_URL"] = f"{children[0].page}/api"
    pages = {child.name: child.page for child in children}
    held = lease.Lease(logs, Root.at(project.environment.root), pages, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        held.take()
    except lease.Held as error:
        refuse(str(error))
    except Exception as error:  # what an object store raises is no OSError
        refuse(f"`up` cannot begin, as {project.environment.root} cannot be written: {error}")
    close_lost_runs()
    delivery.deliver(Root.at(project.environment.root))
    # explicitly: a shell that starts it in the background has it ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    status = 1
    try:
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
        if project.environment.ready_kernels:
            children.append(client.Keeper(project.environment.ready_kernels, logs / "kernels.log"))
            children[-1].start()
        from etl.runs import retention
        from etl.serve import flows

        retention.sweep_regularly(Root.at(project.environment.root), project.environment.retention)

        def on_record(record: "RunRecord") -> None:
            print_record(record, report=f"{api_url}/reports/{record.run_id}")

        asyncio.run(flows.serve(project, api_url, children, on_record=on_record, on_status=_print_status))
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
    services.stop(children)
    delivery.settle(5)
    held.release()
    out.print("nothing is left running")
    sys.stdout.flush()
    # a thread that still wants to tell the server something would hold the process, as the server is gone
    os._exit(status)


def _print_status(text: str) -> None:
    out.print(text, highlight=False)


def _log_to_terminal() -> None:
    """The one logging configuration: warnings of every library, in one form."""
    handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(name)s: %(message)s")
