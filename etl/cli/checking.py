"""`check` and `plan`: what would run, without starting a kernel."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from etl import params
from etl.cli.common import AsJson, Env, Overrides, RootOption, Timetable, load, out, print_json, print_problems, say
from etl.storage import PROJECT, BadRoot, root_url


def register(app: typer.Typer) -> None:
    app.command()(check)
    app.command()(plan)


def check(
    context: typer.Context,
    env: Env = "",
    root: RootOption = None,
    p: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Parameters, notebooks and env files, one or all of them, without a kernel. Exit status 2 on a problem."""
    timetable: Timetable = context.obj
    problems, stages = problems_of(env, p, timetable.domain)
    if root is not None:
        try:
            root_url(root)
        except BadRoot as error:
            problems.append(params.Problem("--root", None, str(error)))
    if as_json:
        print_json({"ok": not problems, "stages": list(stages), "problems": [str(problem) for problem in problems]})
    elif problems:
        print_problems(problems)
    else:
        out.print(f"[green]ok[/]  {len(stages)} stages: {', '.join(stages)}")
    if problems:
        raise typer.Exit(2)


def problems_of(env: str, overrides: Sequence[str], domain: str) -> tuple[list[params.Problem], list[str]]:
    """(what is wrong in the working tree, the stages from the shortest cadence on); of every env file without `env`."""
    problems, stages = params.without_yaml(PROJECT), {}
    for name in [env] if env else params.environments(PROJECT):
        try:
            stages = params.load(PROJECT, name, overrides).stages
        except params.ParamsError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return problems + params.breaches(PROJECT, list(stages) or None, domain), list(stages)


def plan(env: Env = "local", p: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Every stage's next run, and where each parameter's value comes from."""
    project, now = load(env, overrides=p), datetime.now(UTC)
    if as_json:
        print_json([_plan_of(stage, now) for stage in project.stages.values()])
        return
    say(f"environment {env}: root {project.environment.root}")
    for stage in project.stages.values():
        planned = _plan_of(stage, now)
        table = Table(
            title=f"{stage.name}   {planned['when']}   next {planned['next_run']:%H:%M:%S} UTC", title_justify="left"
        )
        for column in ("parameter", "value", "comes from", "meaning"):
            table.add_column(column, overflow="fold")
        for name, value in stage.values.items():
            table.add_row(name, escape(str(value)), stage.origins[name], stage.help.get(name, ""))
        out.print(table)


def _plan_of(stage: params.Stage, now: datetime) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "when": stage.cron or f"every {stage.every_s:g} s",
        "next_run": stage.next_run(now),
        "overlap": stage.overlap,
        "deadline_s": stage.deadline_s,
        "retries": stage.retries,
        "parameters": stage.values,
        "origins": stage.origins,
    }
