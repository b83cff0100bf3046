"""The command line: `python orchestrate.py` and `etl` are the same. The commands are here, a group a file.

Each is a thin layer over a function that a notebook could call: it reads options, prints what came of it, and ends with
exit status 0 only on success, 1 for what failed, 2 for what was asked wrongly.
"""

import importlib.metadata
import sys
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from etl import interpreter
from etl.cli import (
    checking,
    debugging,
    deploying,
    digest,
    health,
    lake,
    models,
    new,
    releases,
    running,
    runs,
    trying,
    up,
)
from etl.cli.common import Timetable, refuse
from etl.storage import Unreachable

__all__ = ["Timetable", "main", "make"]


class _Commands(typer.core.TyperGroup):
    def invoke(self, context: Any) -> Any:
        """As any group; a root that cannot be reached is a sentence, whichever command it was for."""
        try:
            return super().invoke(context)
        except Unreachable as error:
            refuse(str(error), status=2)


def make(timetable: Timetable, help_text: str) -> typer.Typer:
    """The command line of a project."""
    how: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    app = typer.Typer(cls=_Commands, help=help_text, **how)

    @app.callback()
    def start(
        context: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
        ] = False,
    ) -> None:
        context.obj = timetable
        context.call_on_close(_finish_reports)

    up.register(app, timetable)
    deploying.register(app)
    running.register(app)
    checking.register(app)
    health.register(app)
    digest.register(app)
    releases.register(app)
    trying.register(app)
    debugging.register(app)
    runs.register(app)
    app.add_typer(new.app, name="new")
    app.add_typer(runs.app, name="runs")
    app.add_typer(models.app, name="models")
    lake.register(app, timetable)
    app.add_typer(lake.refused, name="quarantine")
    return app


def main(app: typer.Typer) -> NoReturn:
    """Be the command line's process: run the command that `sys.argv` names, and end with its exit status."""
    try:
        app()
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
    if isinstance(status, str):
        print(status, file=sys.stderr)
    interpreter.leave(status if isinstance(status, int) else bool(status))


def _finish_reports() -> None:
    """Wait for pages made in the background: while the interpreter ends Polars reads nothing of earlier runs."""
    if delivery := sys.modules.get("etl.runs.delivery"):
        delivery.settle()


def _print_version(asked: bool) -> None:
    if asked:
        print(f"etl {importlib.metadata.version('etl-notebooks')}")
        raise typer.Exit
