"""Many runs by one command: `run` over times and values, and `repair`. Each once, however often it is begun again."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from etl.cli.common import (
    AsJson,
    Env,
    RootOption,
    announce_new,
    close_lost_runs,
    err,
    existing_root,
    get_run,
    load,
    moment,
    out,
    print_json,
    refuse,
    say,
    services_folder,
)
from etl.cli.printing import counted, print_slice
from etl.leases import LeaseHeld
from etl.params import Stage
from etl.storage import PROJECT, Root

if TYPE_CHECKING:
    from etl.runs.record import RunRecord
    from etl.runs.slices import Slice

Parallel = Annotated[int, typer.Option("--parallel", min=1, max=64, help="So many at a time.")]


def repair(
    run_id: Annotated[str | None, typer.Argument(help="A run's id, or the beginning of it.")] = None,
    env: Env = "local",
    root: RootOption = None,
    since: Annotated[str | None, typer.Option(help="All that started at this time or later, ISO 8601.")] = None,
    parallel: Parallel = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run again what failed and is not ok by now, with its parameters and time; then what depended on it.

    That is what of the stages after it was due from then until its stage was ok again.
    """
    from etl.runs import index, slices

    if (run_id is None) == (since is None):
        raise typer.BadParameter("name a run, or a time with --since")
    asked = existing_root(env, root)
    close_lost_runs()
    project = load(env, root=asked.url)
    runs = [get_run(run_id, env, root)] if run_id else index.told(asked, state=slices.BAD, since=moment(since))
    groups, refused = slices.to_repair(project, PROJECT, runs)
    for why in refused:
        err.print(f"[bold red]cannot be run again[/]  {escape(why)}", highlight=False, soft_wrap=True)
    if dry_run:
        chosen = [slice for group in groups for slice in group]
        if as_json:
            print_json([{"stage": slice.stage.name, "repeats": slice.parent} for slice in chosen])
        for slice in [] if as_json else chosen:
            say(f"{slice}  repeats {slice.parent}")
    elif not any(groups):
        say("[]" if as_json else "nothing is left to repair")
    else:
        run_slices("repair", asked, groups, parallel, as_json)
    if refused:
        raise typer.Exit(1)


def backfill(
    name: str,
    env: str,
    root: str | None,
    p: Sequence[str],
    at: str | None,
    between: tuple[str | None, str | None, str | None],
    each: Sequence[str],
    and_after: bool,
    ok_since: str | None,
    parallel: int,
    as_json: bool,
) -> None:
    """A stage, or all, at each time `between` two, every so often, with each combination of values; `and_after`: then
    what follows it."""
    from etl.runs import slices

    begin, end, every = between
    if (end or every) and not begin:
        raise typer.BadParameter("--to-time and --every go with --from-time")
    if at and begin:
        raise typer.BadParameter("--at is one time, --from-time many")
    project = load(env, root=root, overrides=p, stage=None if and_after or name == "all" else name)
    stages = list(project.stages.values())
    if name != "all":
        if name not in project.stages:
            load(env, stage=name)  # which says so
        stages = stages[list(project.stages).index(name) :] if and_after else [project.stages[name]]
    close_lost_runs()
    since, until = moment(begin or at).replace(microsecond=0), moment(end)
    try:
        chosen = slices.values(stages[0].name, each)
        scheduled = {stage.name: slices.times(stage, since, until, every) if begin else [since] for stage in stages}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    first = {stages[0].name: [_with_values(stages, env, p, given) for given in chosen]}
    groups = [
        [
            slices.Slice(variant, project.environment, time, given)
            for time in scheduled[stage.name]
            for variant, given in first.get(stage.name, [(stage, "")])
        ]
        for stage in stages
    ]
    if not any(groups):
        raise typer.BadParameter(f"nothing is due from {since.isoformat()} to before {until.isoformat()}")
    if each and not (begin or at) and not as_json:
        say(f"when it is killed, the same with --at {since.isoformat()} does what is left")
    asked, only_left = Root.at(project.environment.root), bool(begin or each)
    counts_since = moment(ok_since) if ok_since else None
    announce_new(asked.url, err if as_json else out)
    run_slices(
        *("backfill", asked, slices.linked(groups), parallel, as_json),
        left=lambda group: slices.not_ok(asked, group, counts_since) if only_left else list(group),
    )


def _with_values(
    stages: Sequence[Stage], env: str, p: Sequence[str], given: Sequence[tuple[str, str]]
) -> tuple[Stage, str]:
    """(the first stage with one combination of values, what is said of that)."""
    name, overrides = stages[0].name, [*p, *(override for override, _ in given)]
    loaded = load(env, overrides=overrides, stage=name if len(stages) == 1 else None)
    return loaded.stages[name], " ".join(said for _, said in given)


def run_slices(
    what: str,
    root: Root,
    groups: Sequence[Sequence["Slice"]],
    parallel: int,
    as_json: bool,
    left: Callable[[Sequence["Slice"]], list["Slice"]] = list,
) -> None:
    """Run them, a line each; one flow of runs when Prefect is at work. `left`: of a group what is not ok yet."""
    from etl.runs import dispatch, slices

    names = [group[0].stage.name for group in groups if group]
    run_now = partial(dispatch.run_stage, page_later=True)
    with_prefect = prefect_answers(root.url)
    if with_prefect:
        from etl.serve import flows

        run_now = partial(flows.run_recorded, run_now)

    def work(slice: "Slice", cancel: threading.Event) -> "RunRecord":
        return run_now(
            slice.stage, slice.environment, scheduled_for=slice.scheduled_for, parent=slice.parent, cancel=cancel
        )

    try:
        with slices.held(root, names):
            wanted = [left(group) for group in groups]
            total, asked = sum(map(len, wanted)), sum(map(len, groups))
            if not as_json and total < asked:
                say(f"{asked - total} of {asked} are ok already")

            ended: list[Slice] = []

            def run_all() -> list["RunRecord"]:
                records: list[RunRecord] = []
                with counted(what, total, quiet=as_json) as advance:
                    for slice, record in slices.run(wanted, work, parallel):
                        ended.append(slice)
                        records.extend([record] if record else [])
                        if not as_json:
                            print_slice(f"{len(ended)}/{total}", str(slice), record)
                        advance()
                return records

            title = f"{what} {', '.join(names)}"
            tags = ["etl", root.url, *(f"{name}: many" for name in names)]
            records = flows.run_as_one(title, tags, run_all) if with_prefect and total else run_all()
    except LeaseHeld as error:
        refuse(f"a backfill or repair of {', '.join(names)} is under way: {error}")
    bad, left_out = sum(not record.ok for record in records), total - len(ended)
    if as_json:
        print_json([asdict(record) for record in records])
    elif total:
        parts = {"ok": len(records) - bad, "not ok": bad, "not needed": len(ended) - len(records), "not run": left_out}
        say(", ".join(f"{count} {part}" for part, count in parts.items() if count or part == "ok"))
    if bad or left_out:
        raise typer.Exit(1)


def prefect_answers(root: str) -> bool:
    """Whether runs can be recorded in Prefect: PREFECT_API_URL is set, or `up` is at work on the root, here."""
    from etl.serve import lease, services

    if "PREFECT_API_URL" not in os.environ:
        page = lease.pages(services_folder(Root.at(root).url)).get(services.PREFECT)
        if not page or not services.answers(f"{page}/api/ready", timeout_s=0.5):
            return False
        os.environ["PREFECT_API_URL"] = f"{page}/api"
    return True
