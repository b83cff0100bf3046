"""Flows, schedules and the command line. What a stage does is in its notebook, when in its YAML.

up      everything: Prefect's server, the schedules, the API and the dashboard
run     one run now, of one stage or of all, or again with what an earlier run had
replay  a run again on the same data, in a root of its own: does the same come out?
check   parameters, notebooks and env files, without starting a kernel
plan    every stage's next run, and where each parameter's value comes from
runs    the index of runs
whence  which run wrote a version of a table
doctor  what is wrong with the data, the packages and the ports, and what to do
rebuild     the lake again, from the archive
quarantine  what did not fit: list, show, try again
"""

# ruff: noqa: E402 -- first of all the interpreter that has the packages
from runner import interpreter

if __name__ == "__main__":
    interpreter.ensure_packages()

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from runner import params
from storage import PROJECT, BadRoot, LeaseHeld, Root, root_url

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
runs_app = typer.Typer(no_args_is_help=True, help="The index of runs.")
app.add_typer(runs_app, name="runs")
quarantine_app = typer.Typer(no_args_is_help=True, help="The lines and files that did not fit.")
app.add_typer(quarantine_app, name="quarantine")
out, err = Console(emoji=False), Console(stderr=True, emoji=False)
if not out.is_terminal:
    out.width = 200  # a log file has no width to keep to
State = Literal["ok", "noop", "check_failed", "failed", "timed_out", "killed", "cancelled"]
INDENT = 10  # of what is said of a bad run, below its time
RUN_ALL = "`python orchestrate.py run all` makes one pass of all stages"
STYLES = {"ok": "green", "noop": "dim", "check_failed": "red", "cancelled": "yellow"}  # the other states: bold red

Env = Annotated[str, typer.Option("--env", help="params/env/<name>.yml")]
RootOption = Annotated[str | None, typer.Option("--root", help="Folder or URL, in place of the env file's root.")]
Overrides = Annotated[list[str], typer.Option("-p", help="name=value, or stage.name=value; more than one is fine.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
RunId = Annotated[str, typer.Argument(help="A run's id, or the beginning of it.")]


@app.command()
def up(
    env: Env = "local",
    root: RootOption = None,
    prefect_port: Annotated[int, typer.Option(help="Prefect's page and API.")] = 4200,
    api_port: Annotated[int, typer.Option(help="The API.")] = 8000,
    dashboard_port: Annotated[int, typer.Option(help="The dashboard.")] = 8501,
):
    """Everything: Prefect's server unless PREFECT_API_URL is set, the schedules, API and dashboard. Ctrl-C ends all."""
    from runner import journal, lease, services, warm

    project = _load(env, root=root)
    _log_to_terminal()
    _announce_new(project.environment.root, out)
    here = _services_folder(project.environment.root)
    api_url = f"http://{services.HOST}:{api_port}"
    children = [
        services.api(api_port, project.environment.root, here),
        services.dashboard(dashboard_port, project.environment.root, api_url, here),
    ]
    if "PREFECT_API_URL" not in os.environ:
        children.insert(0, services.prefect_server(prefect_port, here / "prefect", here))
        os.environ["PREFECT_HOME"] = str(here / "prefect")
        os.environ["PREFECT_API_URL"] = f"http://{services.HOST}:{prefect_port}/api"
    pages = {child.name: child.page for child in children}
    held = lease.Lease(here, Root.at(project.environment.root), pages, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        held.take()
    except lease.Held as error:
        _refuse(str(error))
    except Exception as error:  # what an object store raises is no OSError
        _refuse(f"`up` cannot begin, as {project.environment.root} cannot be written: {error}")
    _reconcile()
    journal.deliver(Root.at(project.environment.root))
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
            children.append(warm.Keeper(project.environment.ready_kernels, here / "kernels.log"))
            children[-1].start()
        from runner import retention, schedule

        retention.sweep_regularly(Root.at(project.environment.root), project.environment.retention)

        def on_record(record) -> None:
            _print_record(record, report=f"{api_url}/reports/{record.run_id}")

        asyncio.run(schedule.serve(project, api_url, children, on_record=on_record, on_status=_print_status))
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
    journal.settle(5)
    held.release()
    out.print("nothing is left running")
    sys.stdout.flush()
    # a thread that still wants to tell the server something would hold the process, as the server is gone
    os._exit(status)


@app.command()
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
):
    """One run now, with a progress bar; prints state and report. Exit status 1 unless every run is ok or noop."""
    parent = None
    if again:
        earlier = _get_run(again, env, root)
        stages, environment, differences = _recorded(earlier, env, root, p, stage)
        scheduled_for, parent = _time(at or earlier["scheduled_for"]), earlier["run_id"]
        if not as_json:
            _print_differences(differences, f"parameters, beside those of {parent} and of today's files")
    elif stage is None:
        raise typer.BadParameter("name a stage, or a run with --from")
    else:
        project = _load(env, root=root, overrides=p, stage=None if stage == "all" else stage)
        stages, environment, scheduled_for = project.stages.values(), project.environment, _time(at)
        _announce_new(environment.root, err if as_json else out)
    _reconcile()
    records = [_run_one(chosen, environment, scheduled_for, quiet=as_json, parent=parent) for chosen in stages]
    if as_json:
        print(json.dumps([asdict(record) for record in records], default=str))
    elif len(records) > 1:
        out.print(_records_table(records))
        for record in records:
            if not record.ok:
                _print_record(record)
    else:
        _print_record(records[0])
    if not all(record.ok for record in records):
        raise typer.Exit(1)


@app.command()
def replay(run_id: RunId, env: Env = "local", root: RootOption = None, as_json: AsJson = False):
    """A run again, on the versions it read, in outputs/replay/<run>: exit status 0 only when the same comes out."""
    from runner import replay as replays

    earlier = _get_run(run_id, env, root)
    (stage,), environment, _ = _recorded(earlier, env, root)
    try:
        with _progress(stage, quiet=as_json) as on_cell:
            found = replays.replay(earlier, stage, environment, on_cell)
    except replays.NotRepeatable as error:
        _refuse(str(error))
    if as_json:
        print(json.dumps(asdict(found) | {"equal": found.equal}, default=str))
    else:
        _print_record(found.record)
        if found.differences:
            _print_differences(found.differences, f"what differs from {found.run_id}")
        if found.changed:
            _print_differences(found.changed, "what changed since")
        compared = ", ".join(f"{count} {part}" for part, count in found.compared.items() if count)
        verdict = "[green]equal[/]" if found.equal else f"[bold red]{len(found.differences)} differences[/]"
        out.print(f"{verdict}: {compared} compared; code {'changed since' if found.changed else 'unchanged'}")
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def whence(
    version: Annotated[str, typer.Argument(metavar="TABLE[@VERSION]", help="The newest version when none is given.")],
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
):
    """The run that wrote a version of a table of the lake, and its report."""
    from runner import provenance, runs
    from runner import report as reports

    table, _, number = version.partition("@")
    if number and not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is not a version; as in orders@12")
    place = _root(env, root)
    try:
        found = provenance.whence(place, table, int(number) if number else None)
    except LookupError as error:
        _refuse(str(error))
    found |= {"state": None, "report": None}
    if found["run_id"]:
        with contextlib.suppress(KeyError):  # a run in JupyterLab is in no index
            record = runs.get(place, found["run_id"])
            report = reports.url_of(place, record) if record["kept"] else None
            found |= {"state": record["state"], "report": report}
    if as_json:
        print(json.dumps(found))
        return
    who = f"{found['run_id']}  {_styled(found['state'] or 'not in the index')}" if found["run_id"] else "by no run"
    told = f"{table}@{found['version']}  {found['operation']}  {found['at']}  {who}"
    out.print(told, highlight=False, soft_wrap=True)
    if found["state"]:
        out.print(found["report"] or "its report was swept", highlight=False, markup=False, soft_wrap=True)


@app.command()
def check(env: Env = "", root: RootOption = None, p: Overrides = [], as_json: AsJson = False):  # noqa: B006
    """Parameters, notebooks and env files, one or all of them, without a kernel. Exit status 2 on a problem."""
    problems, stages = params.without_yaml(PROJECT), {}
    if root is not None:
        try:
            root_url(root)
        except BadRoot as error:
            problems.append(params.Problem("--root", None, str(error)))
    for name in [env] if env else params.environments(PROJECT):
        try:
            stages = params.load(PROJECT, name, p).stages
        except params.ParamsError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if as_json:
        print(json.dumps({"ok": not problems, "stages": list(stages), "problems": [str(x) for x in problems]}))
    elif problems:
        _print_problems(problems)
    else:
        out.print(f"[green]ok[/]  {len(stages)} stages: {', '.join(stages)}")
    if problems:
        raise typer.Exit(2)


@app.command()
def plan(env: Env = "local", p: Overrides = [], as_json: AsJson = False):  # noqa: B006
    """Every stage's next run, and where each parameter's value comes from."""
    project, now = _load(env, overrides=p), datetime.now(UTC)
    if as_json:
        print(json.dumps([_plan_of(stage, now) for stage in project.stages.values()], default=str))
        return
    out.print(f"environment {env}: root {project.environment.root}", highlight=False, markup=False, soft_wrap=True)
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


@runs_app.command("list")
def runs_list(
    env: Env = "local",
    root: RootOption = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    state: Annotated[State | None, typer.Option(help="Only this state.")] = None,
    since: Annotated[str | None, typer.Option(help="Started at this time or later, ISO 8601.")] = None,
    until: Annotated[str | None, typer.Option(help="Started before this time.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    as_json: AsJson = False,
):
    """The last runs, newest first."""
    from runner import runs

    between = {"since": since and _time(since), "until": until and _time(until)}
    place = _root(env, root, may_be_empty=True)
    found = runs.list(place, stage=stage, state=state, limit=limit, **between)
    if as_json:
        print(json.dumps(found, default=str))
        return
    if not found:
        has_runs = _has_runs(place)
        out.print(f"no {'such ' * has_runs}runs under {place.url}", highlight=False, markup=False, soft_wrap=True)
        for hint in [] if has_runs else _with_runs(place):
            out.print(hint, highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state", "seconds"):  # the id is there to be copied
        table.add_column(column, no_wrap=True, justify="right" if column == "seconds" else "left")
    table.add_column("reason", overflow="fold")
    for row in found:
        table.add_row(row["run_id"], _styled(row["state"]), f"{row['seconds']:.1f}", escape(row["reason"] or ""))
    out.print(table)


@runs_app.command("show")
def runs_show(run_id: RunId, env: Env = "local", root: RootOption = None, as_json: AsJson = False):
    """All that is recorded of one run."""
    record = _get_run(run_id, env, root)
    if as_json:
        print(json.dumps(record, default=str))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in record.items():
        if value not in (None, "", {}, []):
            table.add_row(name, escape(_readable(value)))
    out.print(table)


@runs_app.command("tail")
def runs_tail(run_id: RunId, env: Env = "local", root: RootOption = None):
    """What a run prints, as it comes; of one that has ended, all of it. Exit status 1 unless it ends ok or noop."""
    from runner import journal

    state, heading, place = None, None, _at(root or _environment(env).root)
    try:
        for event in journal.follow(run_id, place):
            if event["event"] == "cell_start":
                if event["heading"] != heading:
                    heading = event["heading"]
                    out.print(f"[bold cyan]── {escape(heading or '')}", highlight=False)
            elif event["event"] == "output":
                print(_text_of(event["output"]), end="", flush=True)
            elif event["event"] == "end":
                state = event["state"]
                out.print(f"{_styled(state)}  {escape(event.get('reason') or '')}", highlight=False)
    except KeyError:
        _refuse(f"there is no run {run_id} under {place.url}; `runs list` names them")
    except FileNotFoundError:
        _refuse(f"the report of {run_id} was swept; `runs show` has its row")
    if state not in ("ok", "noop"):
        raise typer.Exit(1)


@runs_app.command("diff")
def runs_diff(a: RunId, b: RunId, env: Env = "local", root: RootOption = None, as_json: AsJson = False):
    """What differs between two runs: parameters, code, inputs, seconds, metrics, and how they ended."""
    from runner import replay as replays

    differences = replays.diff(*(_get_run(run_id, env, root) for run_id in (a, b)))
    if as_json:
        print(json.dumps([asdict(one) for one in differences], default=str))
    elif differences:
        _print_differences(differences, f"{a} and {b}")
    else:
        out.print("nothing that is recorded differs")


@runs_app.command("sweep")
def runs_sweep(
    env: Env = "local",
    root: RootOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
):
    """Remove the reports that tell nothing new, by the env file's `retention`; every run's row stays."""
    from runner import retention

    counts = retention.sweep(_root(env, root), _environment(env).retention, dry_run=dry_run)
    print(json.dumps(counts)) if as_json else out.print(", ".join(f"{n:,} {what}" for what, n in counts.items()))


@runs_app.command("open")
def runs_open(run_id: RunId, env: Env = "local", root: RootOption = None):
    """Open a run's report in the browser."""
    import webbrowser

    from runner import report as reports

    place, record = _root(env, root), _get_run(run_id, env, root)
    if not record["kept"]:
        _refuse(f"the report of {record['run_id']} was swept; `runs show` has its row")
    page = f"{record['report']}/{reports.PAGE}"
    if not place.exists(page):  # an old one: a sweep removed it
        place.write(page, reports.page_of(place, record))
    url = place.url_of(page)
    out.print(url, highlight=False, markup=False, soft_wrap=True)
    webbrowser.open(url if "://" in url else Path(url).as_uri())


@app.command()
def doctor(
    env: Env = "local",
    root: RootOption = None,
    prefect_port: Annotated[int, typer.Option(help="As of up.")] = 4200,
    api_port: Annotated[int, typer.Option(help="As of up.")] = 8000,
    dashboard_port: Annotated[int, typer.Option(help="As of up.")] = 8501,
    as_json: AsJson = False,
):
    """What is wrong with lake, index, models, answers, packages and ports, and what to do. Changes nothing.

    Exit status 1 when something is.
    """
    from pipeline import doctor as data
    from runner import health, services

    place = _at(root or _environment(env).root)
    here = _services_folder(place.url)
    api_url = f"http://{services.HOST}:{api_port}"
    children = [
        services.prefect_server(prefect_port, here / "prefect", here),
        services.api(api_port, place.url, here),
        services.dashboard(dashboard_port, place.url, api_url, here),
    ]
    missing = _what_is_missing(place)
    found = [data.Finding(f"root {place.url}", missing, "; ".join([*_with_runs(place), RUN_ALL]) if missing else None)]
    found += [] if missing else data.examine(place.url)
    found += [data.Finding(what, why, "make setup" if why else None) for what, why in health.packages()]
    found += [
        data.Finding(what, why, "see its owner with ss -ltnp" if why else None) for what, why in health.ports(children)
    ]
    wrong = [one for one in found if one.problem]
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(one) for one in found]}))
    else:
        table = Table(
            "what", "wrong", "what to do", title=f"{len(wrong)} of {len(found)} are wrong", title_justify="left"
        )
        for one in wrong:
            table.add_row(*map(escape, (one.what, one.problem, one.remedy)))
        out.print(
            table if wrong else f"[green]ok[/]  {len(found)} looked at: {escape(', '.join(one.what for one in found))}"
        )
    if wrong:
        raise typer.Exit(1)


@app.command()
def rebuild(
    env: Env = "local",
    root: RootOption = None,
    accept_quarantine: Annotated[
        bool,
        typer.Option("--accept-quarantine", help="Also when rows of the present lake would not fit any more."),
    ] = False,
    as_json: AsJson = False,
):
    """The lake again from its archive, swapped in whole; the one before stays beside it. End `up` first.

    Refused when the archive no longer has every file that is in the lake: it keeps `archive_days` of compact. Refused
    too when rows that are in the lake would go to quarantine, which `--accept-quarantine` allows.
    """
    from pipeline import rebuild as again

    place = _root(env, root)
    try:
        run_id = f"rebuild-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        tables = again.rebuild(place.url, run_id, accept_quarantine=accept_quarantine)
    except again.RowsWouldGo as error:
        _refuse(f"{error}. `rebuild --accept-quarantine` goes on all the same")
    except (again.NotWhole, LeaseHeld) as error:
        _refuse(str(error))
    if as_json:
        print(json.dumps(tables.to_dicts()))
        return
    table = Table(
        "table", "rows", "rows before", "", title=escape(f"{place.url}/lake was made again"), title_justify="left"
    )
    for name, rows, before, equal in tables.iter_rows():
        verdict = {True: "[green]equal", False: "[yellow]differs", None: "was not readable"}[equal]
        table.add_row(name, f"{rows:,}", "" if before is None else f"{before:,}", verdict)
    out.print(table)


@quarantine_app.command("list")
def quarantine_list(env: Env = "local", root: RootOption = None, as_json: AsJson = False):
    """What did not fit: files with refused lines, and files that were refused whole, the newest first."""
    from pipeline import quarantine

    place = _root(env, root)
    found = quarantine.overview(place.url)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("file", "batch or day", "lines", "why")
    for row in found:
        table.add_row(row["file"], str(row["when"]), str(row["lines"] or "all of it"), escape(row["why"]))
    out.print(table if found else "nothing was refused")


@quarantine_app.command("show")
def quarantine_show(
    file: Annotated[str, typer.Argument(help="A file's name, such as orders-00000012.json.")],
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
):
    """The refused lines of a file with their reasons, or why it was refused whole."""
    from pipeline import quarantine

    place = _root(env, root)
    whole = [one for one in quarantine.refused_files(place.url) if one["file"] == file]
    lines = quarantine.refused_lines(place.url, file).to_dicts()
    if not whole and not lines:
        _refuse(f"nothing of {file} was refused; `quarantine list` names what was")
    if as_json:
        print(json.dumps({"file": whole, "lines": lines}))
        return
    for one in whole:
        out.print(f"{one['place']} {one['why']}", highlight=False, markup=False, soft_wrap=True)
    for line in lines:
        out.print(
            f"{file}:{line['line']}: {line['reason']}", highlight=False, markup=False, soft_wrap=True, style="bold"
        )
        out.print(line["raw"], highlight=False, markup=False, soft_wrap=True)


@quarantine_app.command("retry")
def quarantine_retry(
    file: Annotated[str, typer.Argument(help="A file's name, such as orders-00000012.json.")],
    env: Env = "local",
    root: RootOption = None,
):
    """Put a refused file, or those of its refused lines that fit by now, into landing again."""
    from pipeline import quarantine

    try:
        made = quarantine.retry(_root(env, root).url, file)
    except (LookupError, FileExistsError) as error:
        _refuse(str(error.args[0]))
    told = f"waits for the next run of preprocess: {', '.join(made)}"
    out.print(told, highlight=False, markup=False, soft_wrap=True)


def _load(env: str, *, root: str | None = None, overrides: list[str] = (), stage: str | None = None) -> params.Project:
    """The stages as they would run; a wrong file is printed with everything that is wrong, exit status 2."""
    try:
        project = params.load(PROJECT, env, overrides, stage=stage)
    except params.ParamsError as error:
        _print_problems(error.problems)
        raise typer.Exit(2) from None
    url = _at(root or project.environment.root).url
    return replace(project, environment=replace(project.environment, root=url))


def _environment(env: str) -> params.Environment:
    """The environment alone, for what starts no stage; a wrong file is printed, exit status 2."""
    try:
        return params.environment(PROJECT, env)
    except params.ParamsError as error:
        _print_problems(error.problems)
        raise typer.Exit(2) from None


def _recorded(run: dict, env: str, root: str | None, overrides: list[str] = (), stage: str | None = None) -> tuple:
    """([the stage with a run's parameters], the environment, how those differ); a refusal is printed, exit status 2."""
    from runner import replay as replays

    if stage not in (None, run["stage"]):
        raise typer.BadParameter(f"{run['run_id']} is a run of {run['stage']}, not of {stage}")
    try:
        chosen, environment, differences = replays.recorded(PROJECT, env, run, overrides)
    except params.ParamsError as error:
        _print_problems(error.problems)
        raise typer.Exit(2) from None
    except replays.NotRepeatable as error:
        _refuse(str(error), status=2)
    return [chosen], replace(environment, root=_at(root or environment.root).url), differences


def _reconcile() -> None:
    """Close the runs that a process which is gone left running."""
    from runner import journal

    for run_id in journal.reconcile():
        err.print(f"closed {run_id}, which an earlier process left running", highlight=False)


def _root(env: str, root: str | None, may_be_empty: bool = False) -> Root:
    """The root that a command reads. One that is not there, or where nothing is yet, is refused with exit status 1."""
    place = _at(root or _environment(env).root)
    missing = _what_is_missing(place)
    if missing and not (may_be_empty and place.is_there()):
        _refuse("\n".join([f"root {place.url}: {missing}", *_with_runs(place), RUN_ALL]))
    return place


def _at(url: str) -> Root:
    """The root at `url`; what is none is refused, with exit status 2."""
    try:
        return Root.at(url)
    except BadRoot as error:
        _refuse(str(error), status=2)


def _announce_new(url: str, console: Console) -> None:
    """Say that a root is not there yet: it may be mistyped. An object store that is down is met later."""
    with contextlib.suppress(OSError):
        if not Root.at(url).is_there():
            console.print(f"new root {url}", highlight=False, markup=False, soft_wrap=True)


def _what_is_missing(place: Root) -> str | None:
    """Why there is nothing that could be examined under a root; None when there is something."""
    if {"landing", "lake", "reports"} & {*place.list("")}:
        return None
    return "no stage has run there yet" if place.is_there() else "it is not there"


def _has_runs(place: Root) -> bool:
    return bool(place.list("lake/runs/_delta_log"))


def _with_runs(place: Root) -> list[str]:
    """The other roots on this machine that env files name and that have runs: a sentence each."""
    hints = {}
    for name in params.environments(PROJECT):
        with contextlib.suppress(params.ParamsError):
            other = root_url(params.environment(PROJECT, name).root)
            if "://" not in other and other != place.url and _has_runs(Root.at(other)):
                hints.setdefault(other, f"{other} has runs: python orchestrate.py runs list --env {name}")
    return list(hints.values())


def _services_folder(root: str):
    """Where logs and Prefect's database are: beside the data when that is on this machine."""
    if "://" not in root:
        return Path(root) / "services"
    return PROJECT / "outputs" / "services" / re.sub(r"[^\w.-]+", "-", root)  # one each, as they share nothing


def _time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-01-31T12:00:00+00:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _run_one(
    stage: params.Stage, environment: params.Environment, scheduled_for: datetime, quiet: bool, parent: str | None
):
    """One run with a progress bar; recorded in Prefect when a server answers."""
    with _progress(stage, quiet) as on_cell:
        if _prefect_answers():
            from runner import schedule

            return schedule.run_recorded(stage, environment, scheduled_for, on_cell, parent)
        from runner import compute

        asked = {"scheduled_for": scheduled_for, "on_cell": on_cell, "parent": parent, "page_later": True}
        return compute.run_stage(stage, environment, **asked)


@contextlib.contextmanager
def _progress(stage: params.Stage, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar of a run's cells; what to call before each of them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[stage]:11}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    ) as bar:
        task = bar.add_task("starting", stage=stage.name, total=None)

        def on_cell(done: int, total: int, heading: str) -> None:
            bar.update(task, completed=done, total=total, description=heading)

        yield on_cell


def _prefect_answers() -> bool:
    """Whether runs can be recorded in Prefect: PREFECT_API_URL is set, or `up` is at work on this machine."""
    from runner import services

    if "PREFECT_API_URL" not in os.environ:
        local = f"http://{services.HOST}:4200/api"
        if not services.answers(f"{local}/ready", timeout_s=0.5):
            return False
        os.environ["PREFECT_API_URL"] = local
    return True


def _get_run(run_id: str, env: str, root: str | None) -> dict:
    from runner import runs

    try:
        return runs.get(place := _root(env, root), run_id)
    except KeyError:
        _refuse(f"there is no run {run_id} under {place.url}; `runs list` names them")


def _plan_of(stage: params.Stage, now: datetime) -> dict:
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


def _print_problems(problems: list) -> None:
    for problem in problems:
        err.print(f"[bold red]wrong[/]  {escape(str(problem))}", highlight=False, soft_wrap=True)


def _refuse(why: str, status: int = 1) -> NoReturn:
    err.print(f"[bold red]{escape(why)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)


def _print_differences(differences: list, title: str) -> None:
    out.print(f"[italic]{escape(title)}", highlight=False)  # above the table: inside it is as narrow as the table
    table = Table("", "")
    for column in ("before", "after"):
        table.add_column(column, overflow="fold")
    for one in differences:
        values = (v if isinstance(v, str) else json.dumps(v, default=str) for v in (one.before, one.after))
        if one.name.endswith(("sha256", "git_commit")):
            values = (value[:12] for value in values)
        table.add_row(one.part, *map(escape, (one.name, *values)))
    out.print(table)


def _readable(value: object) -> str:
    """What is recorded under one name, each item of a list or dict on a line of its own."""
    if isinstance(value, dict):
        return "\n".join(f"{name}  {_flat(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "\n".join(
            "  ".join(map(_flat, item.values())) if isinstance(item, dict) else _flat(item) for item in value
        )
    return _flat(value)


def _flat(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _text_of(output: dict) -> str:
    """A cell's output as a terminal shows it."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}\n"
    if any(kind.startswith("image/") for kind in output["data"]):
        return "[a picture]\n"
    return "".join(output["data"].get("text/plain", "")) + "\n"


def _styled(state: str) -> str:
    return f"[{STYLES.get(state, 'bold red')}]{state}[/]"


def _print_status(text: str) -> None:
    out.print(text, highlight=False)


def _print_record(record, report: str | None = None) -> None:
    """One line: stage, state, seconds, rows, report. Of a bad run the reason, the place and the report below it."""
    rows = record.metrics.get("rows")
    report = escape(report or _report_of(record))
    line = (
        f"[dim]{datetime.now():%H:%M:%S}[/]  {record.stage:11} {_styled(f'{record.state:12}')} {record.seconds:5.1f} s"
    )
    if record.ok:
        what = f"{rows:,} rows" if isinstance(rows, int) else record.reason
        out.print(f"{line}  {escape(f'{what:24}')}  [dim]{report}[/]", highlight=False, soft_wrap=True)
        return
    out.print(line, highlight=False)
    for text in (record.reason, *_place_of(record)):
        out.print(Padding(escape(text), (0, 0, 0, INDENT)), highlight=False)
    out.print(f"{' ' * INDENT}[dim]{report}[/]", highlight=False, soft_wrap=True)  # whole, to be copied


def _place_of(record) -> list[str]:
    """Where a run went wrong: its cell with the heading, the line, the code in it."""
    error = record.error or {}
    if not error.get("cell"):
        return []
    frame = error.get("frame") or {}
    where = frame.get("where", "")
    if not where.startswith(f"cell {error['cell']},"):
        where = ", ".join(filter(None, [f"cell {error['cell']}", where]))
    return [f"in {error['heading']!r}, {where}", *([f"    {frame['code']}"] if frame.get("code") else [])]


def _report_of(record) -> str:
    """Its report's page: a URL, or the path, relative to the working folder where that is shorter."""
    report = Root.at(record.root).url_of(f"{record.report}/report.html")
    return report if "://" in report else min(report, os.path.relpath(report), key=len)


def _records_table(records: list) -> Table:
    table = Table("stage", "state", title="One pass of all stages", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("report", overflow="fold")
    for record in records:
        rows = record.metrics.get("rows") if record.ok else None
        what = f"{rows:,}" if isinstance(rows, int) else escape(record.reason) if record.ok else ""
        table.add_row(record.stage, _styled(record.state), f"{record.seconds:.1f}", what, escape(_report_of(record)))
    return table


def _log_to_terminal() -> None:
    """The one logging configuration: warnings of every library, in one form."""
    handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(app())
