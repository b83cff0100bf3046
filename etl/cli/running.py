"""`run` and `replay`: one run now, or again, or many."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl.cli import many
from etl.cli.common import (
    AsJson,
    Env,
    Overrides,
    RootOption,
    RunId,
    announce_new,
    asked_root,
    close_lost_runs,
    err,
    get_run,
    load,
    moment,
    out,
    print_json,
    refuse,
    refusing,
    root_at,
)
from etl.cli.printing import print_differences, print_record, progress
from etl.params import Environment, Stage
from etl.storage import PROJECT

if TYPE_CHECKING:
    from etl.runs.record import RunRecord


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(many.repair)
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
    begin: Annotated[str | None, typer.Option("--from-time", help="At each time that it is due from here on,")] = None,
    end: Annotated[str | None, typer.Option("--to-time", help="and before this one; now when absent.")] = None,
    every: Annotated[
        str | None, typer.Option(help='Between those times, as "1 day"; by its schedule if absent.')
    ] = None,
    each: Annotated[list[str], typer.Option(help="name=value,value: with each of them; more than one is fine.")] = [],  # noqa: B006
    and_after: Annotated[bool, typer.Option("--and-after", help="Then each stage that follows it.")] = False,
    ok_since: Annotated[str | None, typer.Option(help="Of many: run again what was ok before this time.")] = None,
    parallel: many.Parallel = 1,
    as_json: AsJson = False,
) -> None:
    """One run now, with a progress bar; prints id, state and report. Exit status 1 unless every run is ok or noop.

    Over many times or values: those that are not ok yet, however often it was killed.
    """
    if begin or end or every or each or and_after:
        if again or stage is None:
            raise typer.BadParameter("many runs are those of a stage that is named, without --from")
        between = (begin, end, every)
        many.backfill(stage, env, root, p, at, between, each, and_after, ok_since, parallel, as_json)
        return
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
        named = None if stage == "all" else stage
        project = load(env, root=root, overrides=p, stage=named, may_be_unreadable=True)  # that is a failed run
        stages, environment, scheduled_for = list(project.stages.values()), project.environment, moment(at)
        _refuse_wrong_machines(stages, environment.root)
        announce_new(environment.root, err if as_json else out)
    close_lost_runs()
    records = []
    for stage_ in stages:
        records.append(_run_one(stage_, environment, scheduled_for, quiet=as_json, parent=parent))
        if not as_json:
            print_record(records[-1])
    if as_json:
        print_json([asdict(record) for record in records])
    if not all(record.ok for record in records):
        raise typer.Exit(1)


def _refuse_wrong_machines(stages: Sequence[Stage], root: str) -> None:
    """What can be known of a machine before it is asked for, or made anew, is a refusal."""
    if away := [stage for stage in stages if stage.machine is not None]:
        from etl.runs import machines

        if wrong := [f"{stage.name}: {why}" for stage in away for why in machines.stage_problems(stage, root)]:
            refuse("\n".join(dict.fromkeys(wrong)), status=2)


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
    of_run = None if live else releases.of_run(asked_root(env, root), earlier)
    stage, chosen, _ = _recorded(earlier, env, root, project=of_run[1] if of_run else PROJECT)
    with refusing(replay.NotRepeatable), progress(stage, quiet=as_json) as on_cell:
        result = replay.replay(earlier, stage, chosen, on_cell, of_run and of_run[0])
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
    with refusing(replay.NotRepeatable, status=2):
        chosen, environment, differences = replay.recorded(project, env, record, overrides)
    return chosen, replace(environment, root=root_at(root or environment.root).url), differences


def _run_one(
    stage: Stage, environment: Environment, scheduled_for: datetime, quiet: bool, parent: str | None
) -> "RunRecord":
    """One run with a progress bar; recorded in Prefect when a server answers."""
    with progress(stage, quiet) as shown:
        from etl.runs import dispatch

        run_now = partial(dispatch.run_stage, on_begin=shown.begin, on_cell=shown)
        if many.prefect_answers(environment.root):
            from etl.serve import flows

            run_now = partial(flows.run_recorded, run_now)
        return run_now(stage, environment, scheduled_for=scheduled_for, parent=parent, page_later=True)
