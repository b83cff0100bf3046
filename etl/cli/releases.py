"""`release`, `releases` and `rollback`: which code `up` runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from etl import params
from etl.cli import checking
from etl.cli.common import (
    AsJson,
    Env,
    RootOption,
    Timetable,
    announce_new,
    asked_root,
    err,
    out,
    print_json,
    print_problems,
    refuse,
    refusing,
    say,
)
from etl.cli.printing import print_differences, progress
from etl.storage import PROJECT, Damaged, Root

app = typer.Typer(no_args_is_help=True, help="The releases of a root: what `up` ran, runs and may run again.")
ReleaseId = Annotated[str, typer.Argument(help="A release's id, or the beginning of it.")]


def register(commands: typer.Typer) -> None:
    commands.command()(release)
    commands.command()(rollback)
    commands.add_typer(app, name="releases")


def release(
    context: typer.Context,
    message: Annotated[str, typer.Option("-m", help="What is new, in a sentence.")] = "",
    runs: Annotated[int, typer.Option(min=0, help="How many ok runs of each changed stage are replayed.")] = 1,
    accept: Annotated[list[str], typer.Option(help="A stage that may differ; more than one is fine.")] = [],  # noqa: B006
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """Have `up` run what the working tree is now, if it passes `check`, and what then differs is accepted."""
    from etl.runs import gate, releases

    timetable: Timetable = context.obj
    asked = asked_root(env, root)
    problems, stages = checking.problems_of("", (), timetable)
    if problems:
        print_problems(problems)
        raise typer.Exit(2)
    with _readable():
        made = releases.moves(asked)
    at = made[-1].id if made else None
    in_use = _in_use(asked, at, env)
    if unknown := sorted(set(accept) - set(stages) - set(in_use.project.stages if in_use else ())):
        raise typer.BadParameter(f"there is no stage {', '.join(unknown)}")
    announce_new(asked.url, err if as_json else out)
    with _readable():
        frozen = releases.freeze(PROJECT, asked, message)
        candidate = releases.load(asked, frozen.id, env)
    if frozen.id == at:
        if as_json:
            print_json({"release": at, "released": False, "refused": [], "packages": [], "changes": [], "stages": []})
        else:
            say(f"release {at} is what the working tree is: nothing to do")
        return
    changes = releases.diff(asked, in_use.release if in_use else None, frozen)
    packages = gate.packages(in_use, candidate)
    if not as_json:
        what = f"beside {at}" if at else "the first of this root"
        say(f"release {frozen.id}, {what}: {_summary(changes, bool(at))}")
        if packages:
            print_differences(packages, "the lock has other packages, for every stage")
    verdicts = gate.look(asked, in_use, candidate, runs, partial(progress, quiet=as_json), _bench(asked, timetable))
    refused = [verdict.stage for verdict in verdicts if verdict.differences and verdict.stage not in accept]
    if not refused:
        with refusing(RuntimeError):
            releases.move(asked, frozen.id, "release", message, after=at)
        releases.prune(asked)
    elif frozen.id not in {move.id for move in made}:
        releases.discard(asked, frozen.id)
    if as_json:
        told: dict[str, Any] = {"release": frozen.id, "released": not refused, "refused": refused}
        told["packages"] = [asdict(difference) for difference in packages]
        print_json(told | {"changes": [change.path for change in changes], "stages": [asdict(v) for v in verdicts]})
    else:
        for verdict in verdicts:
            _print_verdict(verdict, verdict.stage in accept)
        if not refused:
            out.print(f"[green]released[/]  `up` runs {frozen.id} from each stage's next run on")
    if refused:
        options = " ".join(f"--accept {stage}" for stage in refused)
        refuse(f"not released, as {', '.join(refused)} would differ: mend it, or accept it with {options}")


def _bench(root: Root, timetable: Timetable) -> Any:
    """Roots in which stages that write tables are compared."""
    from etl.lake import branch
    from etl.runs import gate

    def rows(one: Root, other: Root) -> dict[str, tuple[str, str]]:
        lake = timetable.lake_at(root)
        lines = branch.differences(lake.at(one).published(), lake.at(other).published())
        return {
            line["table"]: (
                f"{line['before']:,} rows",
                f"{line['after']:,}: {line['added']:,} added, {line['removed']:,} removed, {line['changed']:,} changed"
                + f", first {line['first']}" * bool(line["first"]),
            )
            for line in lines.iter_rows(named=True)
            if line["table"] in lake.tables and (line["added"] or line["removed"] or line["changed"])
        }

    return gate.Bench(
        again=lambda batch, folder: branch.again(timetable.lake_at(root), batch, folder),
        branch=lambda folder: timetable.lake_at(root).branch(folder),
        rows=rows,
    )


def _in_use(root: Root, at: str | None, env: str) -> Any:
    """The tree of the release in use; None when there is none that can be read."""
    from etl.runs import releases

    if at is None:
        return None
    try:
        return releases.load(root, at, env)
    except (releases.NoRelease, Damaged, params.ParamsError) as error:
        err.print(f"[yellow]release {at}, which is in use, is not compared: {escape(str(error))}", highlight=False)
        return None


def _readable(*errors: type[Exception]) -> AbstractContextManager[None]:
    """What cannot be read of releases is refused, and these errors."""
    from etl.runs import releases

    return refusing(releases.NoRelease, Damaged, *errors)


def _summary(changes: Sequence[Any], is_compared: bool) -> str:
    """As in `2 files differ: notebooks/query.ipynb, params/query.yml`."""
    if not is_compared:
        return f"{len(changes)} files"
    paths = [change.path for change in changes]
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return f"{len(paths)} file{'s differ' if len(paths) != 1 else ' differs'}: {', '.join(paths[:8])}{more}"


def _print_verdict(verdict: Any, is_accepted: bool) -> None:
    count = len(verdict.differences)
    if count:
        what = f"[{'yellow' if is_accepted else 'bold red'}]{count} difference{'s' * (count > 1)}[/]"
        what += ", accepted" if is_accepted else ""
    else:
        what = "[green]as before[/]" if verdict.replayed else "[yellow]not replayed[/]"
    runs = f": {', '.join(verdict.replayed)} replayed" if verdict.replayed else ""
    out.print(f"{verdict.stage:11} {what}{runs}", highlight=False)
    for reason in verdict.unseen:
        out.print(f"            [dim]{escape(reason)}[/]", highlight=False)
    if verdict.differences:
        print_differences(verdict.differences, f"what {verdict.stage} would do otherwise")
    if verdict.settings:
        print_differences(verdict.settings, f"what else is set for {verdict.stage}")


@app.command("list")
def list_releases(env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """The releases that are kept, newest first; the current one is marked."""
    from etl.runs import releases

    asked = asked_root(env, root)
    with _readable():
        moves, rows = releases.moves(asked), releases.newest(asked)
    at = moves[-1].id if moves else None
    last = {move.id: move.at for move in moves}
    if as_json:
        told = [asdict(row) | {"files": len(row.files), "moved_at": last.get(row.id)} for row in rows]
        print_json([row | {"current": row["id"] == at} for row in told])
        return
    if not rows:
        say(f"nothing is released under {asked.url}: `release` does so, and the first `up`")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "release", "in use since", "git", "files"):
        table.add_column(column, no_wrap=True)
    table.add_column("message", overflow="fold")
    for row in rows:
        commit = f"{(row.git_commit or '')[:8]}{f' + {len(row.dirty)}' if row.dirty else ''}"
        since = last.get(row.id, "")[:19].replace("T", " ")
        table.add_row("*" if row.id == at else "", row.id, since, commit, str(len(row.files)), escape(row.message))
    out.print(table)


@app.command("show")
def show_release(release_id: ReleaseId, env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """What a release was made from, its files, and when it was in use."""
    from etl.runs import releases

    asked = asked_root(env, root)
    with _readable():
        chosen = releases.find(asked, release_id)
        moves = [asdict(move) for move in releases.moves(asked) if move.id == chosen.id]
    if as_json:
        print_json(asdict(chosen) | {"moves": moves})
        return
    for name, value in asdict(chosen).items():
        if name not in ("files", "dirty"):
            say(f"{name:11} {value}")
    for move in moves:
        say(f"{move['how']:11} {move['at']}  {move['message']}")
    for path, sha256 in chosen.files.items():
        say(f"{sha256[:12]}  {path}{'  not as committed' if path in chosen.dirty else ''}")


@app.command("diff")
def diff_releases(
    a: Annotated[str | None, typer.Argument(help="A release; the current one when absent.")] = None,
    b: Annotated[str | None, typer.Argument(help="Another; the working tree when absent.")] = None,
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """What differs between two releases, or between one and the working tree, file by file."""
    from etl.runs import releases

    asked = asked_root(env, root)
    with _readable():
        before = releases.find(asked, a or releases.current(asked))
        changes = releases.diff(asked, before, releases.find(asked, b) if b else PROJECT)
    if as_json:
        print_json([asdict(change) for change in changes])
        return
    for change in changes:
        say(f"{change.kind} {change.path}", style="bold")
        say(change.diff or "only what is not shown differs: metadata, or bytes")
    if not changes:
        say("nothing differs")


def rollback(
    release_id: Annotated[str | None, typer.Argument(help="A release; the one before when absent.")] = None,
    env: Env = "local",
    root: RootOption = None,
) -> None:
    """Have `up` run an earlier release again, whole, from each stage's next run on."""
    from etl.runs import releases

    asked = asked_root(env, root)
    with _readable(RuntimeError):
        chosen = releases.roll_back(asked, release_id)
    out.print(f"[green]rolled back[/]  `up` runs {chosen.id} from each stage's next run on", highlight=False)
