"""`run` and `replay`: one run now, or again."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl import params
from etl.cli.common import (
    AsJson,
    Env,
    Overrides,
    RootOption,
    RunId,
    announce_new,
    close_lost_runs,
    environment,
    err,
    get_run,
    load,
    moment,
    out,
    print_json,
    print_problems,
    refuse,
    root_at,
    services_folder,
)
from etl.cli.printing import print_differences, print_record, progress, records_table
from etl.params import Environment, Stage
from etl.storage import PROJECT, Root

if TYPE_CHECKING:
    from etl.runs.record import RunRecord


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command("replay")(replay_run)


def run(
    stage: Annotated[
        str | None, typer.Argument(help="A stage's name, or all: each once, from the shortest cadence on.")
    ] = None,
    env: Env = "local",
    root: RootOption = None,
    p: Overrides = [],  # noqa: B006
    at: Annotated[str | None, typer.Option(help="The run's own time, ISO 8601; now when absent.")] = None,
    again: Annotated[str | None, typer.Option("--from", help="With this run's parameters and time, then -p.")] = None,
    as_json: AsJson = False,
) -> None:
    """One run now, with a progress bar; prints state and report. Exit status 1 unless every run is ok or noop."""
    parent = None
    stages: Sequence[Stage]
    if again:
        earlier = get_run(again, env, root)
        chosen, environment, differences = _recorded(earlier, env, root, p, stage)
        stages, scheduled_for, parent = [chosen], moment(at or earlier["scheduled_for"]), earlier["run_id"]
        if not as_json:
            print_differences(differences, f"parameters, beside those of {parent} and of today's files")
    elif stage is None:
        raise typer.BadParameter("name a stage, or a run with --from")
    else:
        project = load(env, root=root, overrides=p, stage=None if stage == "all" else stage)
        stages, environment, scheduled_for = list(project.stages.values()), project.environment, moment(at)
        announce_new(environment.root, err if as_json else out)
    close_lost_runs()
    records = [_run_one(stage_, environment, scheduled_for, quiet=as_json, parent=parent) for stage_ in stages]
    if as_json:
        print_json([asdict(record) for record in records])
    elif len(records) > 1:
        out.print(records_table(records))
        for record in records:
            if not record.ok:
                print_record(record)
    else:
        print_record(records[0])
    if not all(record.ok for record in records):
        raise typer.Exit(1)


def replay_run(
    run_id: RunId,
    env: Env = "local",
    root: RootOption = None,
    live: Annotated[bool, typer.Option("--live", help="With the working tree's code, not its release's.")] = False,
    as_json: AsJson = False,
) -> None:
    """A run again, on the versions it read, in outputs/replay/<run>: exit status 0 only when the same comes out.

    With the code of its release while that is kept, else the working tree's.
    """
    from etl.runs import releases, replay

    earlier = get_run(run_id, env, root)
    of_run = None if live else releases.of_run(root_at(root or environment(env).root), earlier)
    stage, chosen, _ = _recorded(earlier, env, root, project=of_run[1] if of_run else PROJECT)
    try:
        with progress(stage, quiet=as_json) as on_cell:
            result = replay.replay(earlier, stage, chosen, on_cell, of_run and of_run[0])
    except replay.NotRepeatable as error:
        refuse(str(error))
    if as_json:
        print_json(asdict(result) | {"equal": result.equal})
    else:
        print_record(result.record)
        if result.differences:
            print_differences(result.differences, f"what differs from {result.run_id}")
        if result.changed:
            print_differences(result.changed, "what changed since")
        compared = ", ".join(f"{count} {part}" for part, count in result.compared.items() if count)
        verdict = "[green]equal[/]" if result.equal else f"[bold red]{len(result.differences)} differences[/]"
        out.print(f"{verdict}: {compared} compared; code {'changed since' if result.changed else 'unchanged'}")
    if not result.equal:
        raise typer.Exit(1)


def _recorded(
    record: dict[str, Any],
    env: str,
    root: str | None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    project: Path = PROJECT,
) -> tuple[Stage, Environment, list[Any]]:
    """(the stage with a run's parameters, the environment, how those differ); a refusal has exit status 2."""
    from etl.runs import replay

    if stage not in (None, record["stage"]):
        raise typer.BadParameter(f"{record['run_id']} is a run of {record['stage']}, not of {stage}")
    try:
        chosen, environment, differences = replay.recorded(project, env, record, overrides)
    except params.ParamsError as error:
        print_problems(error.problems)
        raise typer.Exit(2) from None
    except replay.NotRepeatable as error:
        refuse(str(error), status=2)
    return chosen, replace(environment, root=root_at(root or environment.root).url), differences


def _run_one(
    stage: Stage, environment: Environment, scheduled_for: datetime, quiet: bool, parent: str | None
) -> "RunRecord":
    """One run with a progress bar; recorded in Prefect when a server answers."""
    with progress(stage, quiet) as on_cell:
        if _prefect_answers(environment.root):
            from etl.serve import flows

            return flows.run_recorded(stage, environment, scheduled_for, on_cell, parent)
        from etl.runs import dispatch

        return dispatch.run_stage(
            stage, environment, scheduled_for=scheduled_for, on_cell=on_cell, parent=parent, page_later=True
        )


def _prefect_answers(root: str) -> bool:
    """Whether runs can be recorded in Prefect: PREFECT_API_URL is set, or `up` is at work on the root, here."""
    from etl.serve import lease, services

    if "PREFECT_API_URL" not in os.environ:
        page = lease.pages(services_folder(Root.at(root).url)).get(services.PREFECT)
        if not page or not services.answers(f"{page}/api/ready", timeout_s=0.5):
            return False
        os.environ["PREFECT_API_URL"] = f"{page}/api"
    return True
