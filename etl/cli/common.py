"""What the commands share: their options, the project as they were asked to see it, and how they refuse."""

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from etl import params
from etl.figures import utc
from etl.serve.services import PORTS, Service, api_url, usual
from etl.storage import PROJECT, BadRoot, Root, Unreachable, root_url

if TYPE_CHECKING:
    from etl.lake import Lake
    from etl.lake.table import Table
    from etl.questions.question import Question

out, err = Console(emoji=False), Console(stderr=True, emoji=False)
if not out.is_terminal:
    out.width = 200  # a log file has no width to keep to

RUN_ALL = "`python orchestrate.py run all` makes one pass of all stages"
Env = Annotated[str, typer.Option("--env", help="params/env/<name>.yml")]
RootOption = Annotated[str | None, typer.Option("--root", help="Folder or URL, in place of the env file's root.")]
Overrides = Annotated[list[str], typer.Option("-p", help="name=value, or stage.name=value; more than one is fine.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
RunId = Annotated[str, typer.Argument(help="A run's id, or the beginning of it.")]


@dataclass(frozen=True)
class Timetable:
    """What a project hands to its command line.

    `lake`: where the project's own Lake is, as module:name. `model`: the module whose `SPEC` says what a model is and
    whose `examine(root)` what is wrong with the published one; it may have `compare(lake, models)`, which judges them
    on the same rows: a Polars frame of a row a model, `model` its name. Imported by `doctor` and `models` alone.
    `services`: what `up` keeps alive beside the schedules, for a root's URL, the ports by name and the folder of their
    logs; first of them Prefect's server. `report_url`: under which URL reports are served. `ports`: name -> number,
    each an option of `up` and `doctor`.
    """

    lake: str
    model: str | None = None
    services: Callable[[str, Mapping[str, int], Path], Sequence[Service]] = usual
    report_url: Callable[[Mapping[str, int]], str] = api_url
    ports: Mapping[str, int] = field(default_factory=lambda: PORTS)

    @property
    def domain(self) -> str:
        """The project's package, which has its tables and questions."""
        return self.lake.partition(":")[0].partition(".")[0]

    def lake_at(self, root: Root) -> "Lake":
        """The project's lake under a root; imports what it needs."""
        return self._lake_class()(root)

    def tables(self) -> "Mapping[str, Table]":
        """The project's tables, by name; imports what it needs."""
        return self._lake_class().tables

    def questions(self) -> "Sequence[Question]":
        """The project's questions, none where it has no module of them; imports what it needs."""
        name = f"{self.domain}.queries"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            return []
        return list(module.questions()) if hasattr(module, "questions") else []

    def _lake_class(self) -> "type[Lake]":
        module, _, name = self.lake.partition(":")
        lake: type[Lake] = getattr(importlib.import_module(module), name)
        return lake


def load(
    env: str,
    *,
    root: str | None = None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    may_be_unreadable: bool = False,
) -> params.Project:
    """The stages as they would run; a wrong file is printed with everything that is wrong, exit status 2."""
    with refusing():
        project = params.load(PROJECT, env, overrides, stage=stage, may_be_unreadable=may_be_unreadable)
    url = root_at(root or project.environment.root).url
    return replace(project, environment=replace(project.environment, root=url))


def environment(env: str) -> params.Environment:
    """The environment alone, for what starts no stage; a wrong file is printed, exit status 2."""
    try:
        return params.environment(PROJECT, env)
    except params.ParamsError as error:
        refuse_files(error)


def asked_root(env: str, root: str | None) -> Root:
    """The root that a command is about, whether it exists or not: `root`, or the env file's."""
    return root_at(root or environment(env).root)


def existing_root(env: str, root: str | None, may_be_empty: bool = False) -> Root:
    """The root that a command reads. One that does not exist, or where nothing is yet, is refused: exit status 1."""
    asked = asked_root(env, root)
    missing = what_is_missing(asked)
    if missing and not (may_be_empty and asked.is_there()):
        refuse("\n".join([f"root {asked.url}: {missing}", *roots_with_runs(asked), RUN_ALL]))
    return asked


def root_at(url: str) -> Root:
    """The root at `url`; what is none is refused, with exit status 2."""
    try:
        return Root.at(url)
    except BadRoot as error:
        refuse(str(error), status=2)


def announce_new(url: str, console: Console) -> None:
    """Say that a root does not exist yet: it may be mistyped. A bucket that does not exist is refused with exit status
    2, as no run makes one. Raises Unreachable."""
    root = Root.at(url)
    try:
        if root.is_there():
            return
        if not root.has_bucket():
            refuse(f"the root {url} cannot be read: there is no such bucket", status=2)
    except Unreachable:
        raise
    except OSError:
        return
    console.print(f"new root {url}", highlight=False, markup=False, soft_wrap=True)


def what_is_missing(root: Root) -> str | None:
    """Why there is nothing that could be examined under a root; None when there is something."""
    if {"landing", "lake", "reports"} & {*root.names("")}:
        return None
    return "no stage has run there yet" if root.is_there() else "it is not there"


def has_runs(root: Root) -> bool:
    """Whether the root has an index of runs."""
    from etl.runs import index

    return index.is_there(root)


def roots_with_runs(besides: Root) -> list[str]:
    """The other roots on this machine that env files name and that have runs: a sentence each."""
    hints: dict[str, str] = {}
    for name in params.environments(PROJECT):
        with contextlib.suppress(params.ParamsError):
            other = root_url(params.environment(PROJECT, name).root)
            if "://" not in other and other != besides.url and has_runs(Root.at(other)):
                hints.setdefault(other, f"{other} has runs: python orchestrate.py runs list --env {name}")
    return list(hints.values())


def services_folder(root: str) -> Path:
    """Where logs and Prefect's database are: beside the data when that is on this machine."""
    if "://" not in root:
        return Path(root) / "services"
    return PROJECT / "outputs" / "services" / re.sub(r"[^\w.-]+", "-", root)  # one each, as they share nothing


def moment(text: str | None) -> datetime:
    """The time that an option says, UTC unless it says otherwise; now for None. Refused when it is none."""
    if text is None:
        return datetime.now(UTC)
    try:
        return utc(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-01-31T12:00:00+00:00") from None


def get_run(run_id: str, env: str, root: str | None, may_be_under_way: bool = False) -> dict[str, Any]:
    """A run's record; one that is not in the index is refused, unless it `may_be_under_way`."""
    from etl.runs import delivery, index

    asked = existing_root(env, root, may_be_empty=may_be_under_way)
    try:
        return delivery.get(asked, run_id) if may_be_under_way else index.get(asked, run_id)
    except KeyError:
        refuse(f"there is no run {run_id} under {asked.url}; `runs list` names them")


def close_lost_runs() -> None:
    """Close the runs that a process which is gone left running."""
    from etl.runs import delivery

    for run_id in delivery.reconcile():
        err.print(f"closed {run_id}, which an earlier process left running", highlight=False)


def print_problems(problems: Sequence[Any]) -> None:
    for problem in problems:
        err.print(f"[bold red]wrong[/]  {escape(str(problem))}", highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """A line as it is, whole: to be copied, whatever the width of the terminal."""
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, default=str))


@contextlib.contextmanager
def refusing(*errors: type[Exception], status: int = 1) -> Iterator[None]:
    """What the block raises of these is refused, in its own words; files that are wrong are, with exit status 2."""
    try:
        yield
    except params.ParamsError as error:
        refuse_files(error)
    except errors as error:
        refuse(str(error), status)


def refuse_files(error: params.ParamsError) -> NoReturn:
    print_problems(error.problems)
    raise typer.Exit(2) from None


def refuse(why: str, status: int = 1) -> NoReturn:
    err.print(f"[bold red]{escape(why)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)
