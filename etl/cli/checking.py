"""`check` and `plan`: what would run, without starting a kernel."""

import contextlib
import importlib
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import table as rich_table
from rich.markup import escape

from etl import params, secrets
from etl.cli.common import (
    AsJson,
    Env,
    Overrides,
    RootOption,
    Timetable,
    err,
    load,
    out,
    print_json,
    print_problems,
    say,
)
from etl.findings import sentence
from etl.storage import PROJECT, BadRoot, root_url

if TYPE_CHECKING:
    from etl.lake.table import Table
    from etl.questions.question import Question


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
    """Parameters, notebooks, env files and the domain's own code, without a kernel. Exit status 2 on a problem."""
    timetable: Timetable = context.obj
    problems, stages = problems_of(env, p, timetable, root)
    notes = _notes(env, p)
    if root is not None:
        try:
            root_url(root)
        except BadRoot as error:
            problems.append(params.Problem("--root", None, str(error)))
    if as_json:
        told = {"problems": [str(problem) for problem in problems], "notes": notes}
        print_json({"ok": not problems, "stages": list(stages), **told})
    elif problems:
        print_problems(problems)
    else:
        out.print(f"[green]ok[/]  {len(stages)} stages: {', '.join(stages)}")
    for note in notes if not as_json else ():
        err.print(f"[yellow]note[/]   {escape(note)}", highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(2)


def problems_of(
    env: str, overrides: Sequence[str], timetable: Timetable, root: str | None = None
) -> tuple[list[params.Problem], list[str]]:
    """(what is wrong in the working tree, the stages from the shortest cadence on); of every env file without `env`."""
    problems, stages = params.without_yaml(PROJECT), {}
    for name in [env] if env else params.environments(PROJECT):
        try:
            project = params.load(PROJECT, name, overrides)
        except params.ParamsError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        else:
            stages = project.stages
            problems += _of_machines(project, (root if env else None) or project.environment.root)
            problems += _of_alerts(project.environment, timetable)
            problems += _of_home(project)
    problems += params.breaches(PROJECT, list(stages) or None, timetable.domain)
    return [*problems, *_of_domain(timetable)], list(stages)


def _of_home(project: params.Project) -> Iterator[params.Problem]:
    """A `deploy` block that asks for the home machine wrongly."""
    if project.environment.deploy:
        from etl.serve import deployed

        try:
            deployed.read(project)
        except ValueError as error:
            yield params.Problem(f"params/env/{project.environment.name}.yml", None, str(error))


def _of_machines(project: params.Project, root: str) -> Iterator[params.Problem]:
    """Machines that are asked for wrongly, and the stages that are to run on one which cannot reach the root."""
    path, away, wrong = f"params/env/{project.environment.name}.yml", [], defaultdict[str, list[str]](list)
    for name, stage in project.stages.items():
        if stage.machine is None:
            continue
        from etl.runs import machines

        try:
            away += [name] if "ssh" not in machines.read(name, stage.machine).arguments else []
        except ValueError as error:
            wrong[str(error)].append(name)
        for why in machines.dask_problems(stage):
            wrong[why].append(name)
    for why, names in wrong.items():  # a block for all stages is one mistake
        yield params.Problem(path, None, f"{', '.join(names)}: {why}")
    if away and "://" not in root:
        why = f"the root {root} is on this machine, and {', '.join(away)} on another; use an s3:// root"
        yield params.Problem(path, None, why)


def _notes(env: str, overrides: Sequence[str]) -> list[str]:
    """What would fail a run here, and may be right elsewhere: secrets that are not to be had."""
    notes = []
    for name in [env] if env else params.environments(PROJECT):
        with contextlib.suppress(params.ParamsError):  # `problems_of` says so
            for stage in params.load(PROJECT, name, overrides).stages.values():
                notes += [f"{stage.name}: {why}" for why in (secrets.missing(stage) if stage.machine is None else ())]
    return list(dict.fromkeys(notes))


def _of_alerts(environment: params.Environment, timetable: Timetable) -> Iterator[params.Problem]:
    """Who cannot be told, and which figures no question has."""
    if environment.alerts is None:
        return
    from etl.params.alerts import line
    from etl.serve import alerts

    path = f"params/env/{environment.name}.yml"
    yield from (params.Problem(path, None, f"alerts: {problem}") for problem in alerts.problems(environment.alerts))
    if environment.alerts.figures:
        with contextlib.suppress(Exception, SystemExit):  # what cannot be imported is said as such
            names = {question.name for question in timetable.questions()}
            for asked in map(line, environment.alerts.figures):
                if asked.question not in names:
                    what = f"alerts: there is no question {asked.question}{params.nearest(asked.question, names)}"
                    yield params.Problem(path, None, what)


def _of_domain(timetable: Timetable) -> Iterator[params.Problem]:
    """What of the domain's code cannot be imported, which tables' rules cannot be asked, and which tables and columns
    its questions read that are not declared: of each part the first."""
    modules = [f"{timetable.domain}.queries", *filter(None, [timetable.model])]
    try:
        for table in timetable.tables().values():
            _ = table.rules
    except (Exception, SystemExit) as error:  # the project's own code: whatever it does
        yield _problem(error)
        return
    for module in modules:
        try:
            imported = importlib.import_module(module)
            if hasattr(imported, "questions"):
                yield from _of_questions(imported.questions(), timetable.tables())
        except (Exception, SystemExit) as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                yield _problem(error)


def _of_questions(questions: Iterable["Question"], tables: Mapping[str, "Table"]) -> Iterator[params.Problem]:
    """What the questions read that is not declared."""
    for question in questions:
        path = os.path.relpath(sys.modules[question.answer.__module__].__file__ or question.name, PROJECT)
        for name, columns in question.tables.items():
            if name not in tables:
                yield params.Problem(path, None, f"reads the table {name}, which is not declared")
            elif unknown := [column for column in columns if column not in tables[name].stored]:
                yield params.Problem(path, None, f"reads {name}.{unknown[0]}, which is not declared")


def _problem(error: BaseException) -> params.Problem:
    """An error of the project's code, with the last of its lines that led there."""
    if isinstance(error, SyntaxError) and error.filename:
        where, line = error.filename, error.lineno
    else:
        own = [f for f in traceback.extract_tb(error.__traceback__) if _is_own(f.filename)]
        where, line = (own[-1].filename, own[-1].lineno) if own else (str(PROJECT), None)
    path = os.path.relpath(where, PROJECT)
    said = error.msg if isinstance(error, SyntaxError) else sentence(error)
    return params.Problem(path, line, f"cannot be imported: {said}")


def _is_own(filename: str) -> bool:
    """Whether a file is the project's, and not the engine's or a package's."""
    path = Path(filename)
    engine = Path(__file__).parents[1]
    return path.is_relative_to(PROJECT) and not path.is_relative_to(engine) and "site-packages" not in path.parts


def plan(env: Env = "local", p: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Every stage's next run, and where each parameter's value comes from."""
    project, now = load(env, overrides=p), datetime.now(UTC)
    if as_json:
        print_json([_plan_of(stage, now) for stage in project.stages.values()])
        return
    say(f"environment {env}: root {project.environment.root}")
    for stage in project.stages.values():
        planned = _plan_of(stage, now)
        due = planned["next_run"]
        soon = due and due - now < timedelta(days=1)
        coming = f"next {due:{'%H:%M:%S' if soon else '%Y-%m-%d %H:%M:%S'}} UTC" if due else "no next run"
        table = rich_table.Table(title=f"{stage.name}   {planned['when']}   {coming}", title_justify="left")
        for column in ("parameter", "value", "comes from", "meaning"):
            table.add_column(column, overflow="fold")
        for name, value in stage.values.items():
            table.add_row(name, escape(str(value)), stage.origins[name], stage.help.get(name, ""))
        out.print(table)


def _plan_of(stage: params.Stage, now: datetime) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "when": stage.when,
        "next_run": stage.next_run(now),
        "missed": stage.missed,
        "overlap": stage.overlap,
        "deadline_s": stage.deadline_s,
        "retries": stage.retries,
        "parameters": stage.values,
        "origins": stage.origins,
    }
