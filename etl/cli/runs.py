"""`runs`: the index of runs, their output, their reports."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.padding import Padding

from etl.cli.common import (
    AsJson,
    Env,
    RootOption,
    RunId,
    asked_root,
    environment,
    existing_root,
    get_run,
    has_runs,
    moment,
    out,
    print_json,
    refuse,
    refusing,
    roots_with_runs,
    say,
)
from etl.cli.printing import print_differences, print_fields, styled, text_of

REASON_LINES, REASON_WIDTH = 2, 20  # of a reason in the list: about, and at least
app = typer.Typer(no_args_is_help=True, help="The index of runs.")


def register(top: typer.Typer) -> None:
    top.command()(report)


State = Literal["running", "ok", "noop", "check_failed", "failed", "timed_out", "killed", "cancelled"]


@app.command("list")
def list_runs(
    env: Env = "local",
    root: RootOption = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    state: Annotated[State | None, typer.Option(help="Only this state.")] = None,
    since: Annotated[str | None, typer.Option(help="Started at this time or later, ISO 8601.")] = None,
    until: Annotated[str | None, typer.Option(help="Started before this time.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    sort: Annotated[
        str | None, typer.Option(metavar="METRIC", help="By what ended runs recorded, lowest first; -METRIC: highest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The last runs, newest first, with those under way on this machine; a long reason is whole in `runs show`."""
    from etl.runs import delivery, index

    asked = existing_root(env, root, may_be_empty=True)
    between = {"since": since and moment(since), "until": until and moment(until)}
    rows: Sequence[dict[str, Any]]
    metric = sort and sort.removeprefix("-")
    if metric:
        rows = index.ranked(asked, metric, highest=sort != metric, stage=stage, state=state, limit=limit, **between)
        if not rows and has_runs(asked):
            refuse(f"no such run under {asked.url} has recorded a number as {metric}; `runs show` has the names", 2)
    else:
        rows = delivery.newest(asked, stage=stage, state=state, limit=limit, **between)
    if as_json:
        print_json(rows)
        return
    if not rows:
        has_others = has_runs(asked)
        say(f"no {'such ' * has_others}runs under {asked.url}")
        for hint in [] if has_others else roots_with_runs(asked):
            say(hint)
        return
    _print_runs(rows, metric)


def _print_runs(rows: Sequence[dict[str, Any]], metric: str | None) -> None:
    """A line each, and below it the reason; the id is the last, whole, to be copied."""
    from etl.figures import shortened, span, utc

    stages = max(5, *(len(row["stage"]) for row in rows))
    values = [f"{row['value']:.6g}" if metric else "" for row in rows]
    width = max(map(len, (metric or "", *values)))
    head = f"{'stage':{stages}}  {'state':12}  {'age':>7}  {'took':>7}  {f'{metric:>{width}}  ' if metric else ''}run"
    out.print(f"[bold]{escape(head)}", highlight=False, soft_wrap=True)
    now = datetime.now(UTC)
    for row, value in zip(rows, values, strict=True):
        ended = utc(row["ended_at"] or row["started_at"])  # of one that is under way, when it began
        age = span(max((now - ended).total_seconds(), 0))
        state = styled(row["state"].ljust(12))
        line = f"{row['stage']:{stages}}  {state}  {age:>7}  {span(row['seconds']):>7}  "
        line += f"{value:>{width}}  " if metric else ""
        out.print(f"{line}[dim]{row['run_id']}[/]", highlight=False, soft_wrap=True)
        if row["reason"]:
            room = max(out.width - stages - 2, REASON_WIDTH)
            reason = escape(shortened(row["reason"], REASON_LINES * room))
            out.print(Padding(reason, (0, 0, 0, stages + 2)), highlight=False)


@app.command("show")
def show_run(run_id: RunId, env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """All that is recorded of one run; of one that is under way, what is known by now."""
    record = get_run(run_id, env, root, may_be_under_way=True)
    if as_json:
        print_json(record)
        return
    print_fields(record)


@app.command("tail")
def tail_run(
    run_id: Annotated[str | None, typer.Argument(help="A run's id, or its beginning; the newest when absent.")] = None,
    env: Env = "local",
    root: RootOption = None,
) -> None:
    """What a run prints, as it comes; of one that has ended, all of it. Exit status 1 unless it ends ok or noop."""
    from etl.runs import delivery

    state, heading, asked = None, None, asked_root(env, root)
    if run_id is None:
        newest = delivery.newest(asked, state="running", limit=1) or delivery.newest(asked, limit=1)
        if not newest:
            refuse("\n".join([f"no runs under {asked.url}", *roots_with_runs(asked)]))
        run_id = newest[0]["run_id"]
        say(run_id)
    try:
        for event in delivery.follow(run_id, asked):
            if event["event"] == "cell_start":
                if event["heading"] != heading:
                    heading = event["heading"]
                    out.print(f"[bold cyan]── {escape(heading or '')}", highlight=False)
            elif event["event"] == "output":
                print(text_of(event["output"]), end="", flush=True)
            elif event["event"] == "end":
                state = event["state"]
                out.print(f"{styled(state)}  {escape(event.get('reason') or '')}", highlight=False)
    except KeyError:
        refuse(f"there is no run {run_id} under {asked.url}; `runs list` names them")
    except FileNotFoundError:
        refuse(f"the report of {run_id} was swept; `runs show` has its row")
    if state not in ("ok", "noop"):
        raise typer.Exit(1)


@app.command("diff")
def diff_runs(a: RunId, b: RunId, env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """What differs between two runs: first in a sentence what may be why, then all: how they ended, what they had."""
    from etl.runs import replay

    before, after = (get_run(run_id, env, root) for run_id in (a, b))
    differences = replay.diff(before, after)
    if as_json:
        print_json([asdict(difference) for difference in differences])
    elif differences:
        out.print(escape(replay.cause(before, after, differences)), highlight=False)
        print_differences(differences, f"{a} and {b}")
    else:
        out.print("nothing that is recorded differs")


@app.command("sweep")
def sweep_reports(
    env: Env = "local",
    root: RootOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the reports that tell nothing new, by the env file's `retention`; every run's row stays."""
    from etl.runs import retention

    counts = retention.sweep(existing_root(env, root), environment(env).retention, dry_run=dry_run)
    if as_json:
        print_json(counts)
    else:
        out.print(", ".join(f"{count:,} {what}" for what, count in counts.items()))


def report(
    run_id: RunId,
    env: Env = "local",
    root: RootOption = None,
    pdf: Annotated[Path | None, typer.Option(metavar="FILE", help="Print it into this PDF; needs Chromium.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Copy its page into this file.")] = None,
    no_code: Annotated[bool, typer.Option("--no-code", help="For readers who do not code.")] = False,
) -> None:
    """A run's report as a file to hand on: a PDF, or a page that needs no other file."""
    from etl.reports import page
    from etl.reports import pdf as printer
    from etl.runs import index

    if not (pdf or html):
        refuse("name a file to write: --pdf FILE or --html FILE; `runs open` shows a report in the browser", 2)
    asked, record = existing_root(env, root), get_run(run_id, env, root)
    try:
        content = page.page_of(asked, record, lambda: index.before(asked, record))
    except FileNotFoundError:
        refuse(f"the report of {record['run_id']} was swept; `runs show` has its row")
    content = page.served(content, [])  # what it led to is not beside it
    if no_code:
        content = page.without_code(content)
    with refusing(printer.NotPrinted, OSError):
        if html:
            html.write_bytes(content)
            say(f"{html}")
        if pdf:
            pdf.write_bytes(printer.printed(content))
            say(f"{pdf}")


@app.command("open")
def open_report(run_id: RunId, env: Env = "local", root: RootOption = None) -> None:
    """Open a run's report in the browser."""
    import webbrowser

    from etl.reports import page

    asked, record = existing_root(env, root), get_run(run_id, env, root)
    if not record["kept"]:
        refuse(f"the report of {record['run_id']} was swept; `runs show` has its row")
    path = f"{record['report']}/{page.PAGE}"
    if not asked.exists(path):  # an old one: a sweep removed it
        asked.write(path, page.page_of(asked, record))
    url = asked.url_of(path)
    say(url)
    webbrowser.open(url if "://" in url else Path(url).as_uri())
