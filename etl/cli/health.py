"""`status` and `watch`: whether a root is healthy, said once, all the time, or to whoever is to be told."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from etl.cli.common import (
    AsJson,
    Env,
    RootOption,
    Timetable,
    asked_root,
    err,
    existing_root,
    out,
    print_json,
    refuse,
)

if TYPE_CHECKING:
    from etl.questions.question import Question
    from etl.serve.health import Finding, Reader

LOOK_S = 5  # between two looks of `status --watch`
STYLES = {"bad": "bold red", "warning": "yellow", "note": "dim"}


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(watch)


def status(
    context: typer.Context,
    env: Env = "local",
    root: RootOption = None,
    watching: Annotated[bool, typer.Option("--watch", help="Look again every 5 seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Whether all is well: what failed last, is late or damaged, and what to do. Exit status 1 when it is not."""
    from etl.serve import health

    reader = _reader(context.obj, env, root)
    while True:
        told = health.findings(datetime.now(UTC), reader.seen())
        if as_json:
            print_json(health.as_json(told))
        else:
            if watching and out.is_terminal:
                out.clear()
            _print(told, health.is_healthy(told))
        if not watching:
            raise typer.Exit(0 if health.is_healthy(told) else 1)
        sys.stdout.flush()
        try:
            time.sleep(LOOK_S)
        except KeyboardInterrupt:
            raise typer.Exit(0 if health.is_healthy(told) else 1) from None


def _print(told: "Sequence[Finding]", healthy: bool) -> None:
    count = sum(finding.level == "bad" for finding in told)
    head = "[green]healthy[/]" if healthy else f"[bold red]not healthy[/]: {count} finding{'s' * (count != 1)}"
    out.print(f"[dim]{datetime.now(UTC):%H:%M:%S} UTC[/]  {head}", highlight=False)
    for finding in told:
        out.print(f"[{STYLES[finding.level]}]{finding.kind:10}[/] {escape(finding.about)}", highlight=False)
        for text in (finding.sentence, finding.remedy, finding.link):
            if text:
                what = f"[dim]{escape(text)}[/]" if text is finding.link else escape(text)
                out.print(Padding(what, (0, 0, 0, 4)), highlight=False, soft_wrap=text is finding.link)


def watch(
    context: typer.Context,
    env: Env = "local",
    root: RootOption = None,
    once: Annotated[bool, typer.Option("--once", help="One look, as for cron.")] = False,
) -> None:
    """Tell whom the env file's `alerts` name what is not well, and when it is again. Beside `up`, or on its own."""
    from etl.leases import LeaseHeld
    from etl.serve import alerts

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    who = f"{socket.gethostname()} {os.getpid()} {time.time()}"
    reader, wanted, send, warned = _reader(context.obj, env, root, may_be_empty=True), None, None, ""
    while True:
        _beat()
        try:
            if reader.project is None:
                reader.seen()
            asked = reader.project.environment.alerts if reader.project else wanted
            if (send is None or asked != wanted) and reader.project:
                if asked is None or not alerts.receivers(asked):
                    refuse(f"nobody is to be told: params/env/{env}.yml has no `alerts:` with `to` or `command`", 2)
                send, wanted = alerts.Sender(asked), asked
                print(f"{len(alerts.receivers(asked))} receivers are told; looking every {alerts.LOOK_S} s", flush=True)
            if wanted and send:
                alerts.look(reader.root, wanted, reader.seen, datetime.now(UTC), send, who)
            warned = ""
        except LeaseHeld:
            pass  # another one looks right now
        except ValueError as error:  # a receiver that is none
            refuse(str(error), 2)
        except Exception as error:  # the root is down
            if str(error) != warned:
                logging.warning("looking again: %s: %s", type(error).__name__, error)
            warned = str(error)
            if once:
                raise typer.Exit(1) from None
        if once:
            return
        try:
            time.sleep(alerts.LOOK_S)
        except KeyboardInterrupt:
            return


def _beat() -> None:
    """Tell `up`, if it has started this process, that it goes round."""
    from etl.serve.services import BEAT

    if BEAT in os.environ:
        with contextlib.suppress(OSError):  # no room
            Path(os.environ[BEAT]).touch()


def _reader(timetable: Timetable, env: str, root: str | None, may_be_empty: bool = False) -> "Reader":
    """Of a root, with the project's lake and questions; a project without them, or with broken ones, is looked at all
    the same."""
    from etl.findings import sentence
    from etl.serve import health

    asked = asked_root(env, root) if may_be_empty else existing_root(env, root)
    lake, questions = None, list["Question"]()
    try:
        lake, questions = timetable.lake_at(asked), [*timetable.questions()]
    except Exception as error:  # the project's own code
        err.print(f"[yellow]its tables and questions are not looked at: {escape(sentence(error))}", highlight=False)
    return health.Reader(asked, lake, questions, env)
