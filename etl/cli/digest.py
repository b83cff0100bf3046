"""`digest`: a day of runs on a page, on a terminal or as HTML for mail."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from etl.cli.common import AsJson, Env, RootOption, existing_root, out, print_json, say
from etl.storage import Root


def register(app: typer.Typer) -> None:
    app.command()(digest)


def digest(
    env: Env = "local",
    root: RootOption = None,
    day: Annotated[str | None, typer.Option(help="As 2026-01-31, in UTC; today when none is given.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page for mail.")] = None,
    as_json: AsJson = False,
) -> None:
    """A day in a page: how long the stages took, what failed and how often, what was out of the ordinary."""
    from etl.runs import digest as digests

    try:
        asked = date.fromisoformat(day) if day else None
    except ValueError:
        raise typer.BadParameter(f"{day!r} is not a day such as 2026-01-31") from None
    where = existing_root(env, root)
    told = digests.of_day(where, asked)
    if html:
        link = _links(where)
        html.write_text(digests.as_html(told, f"Runs of {where.url}", link), "utf-8")
    if as_json:
        print_json(digests.as_json(told))
        return
    out.print(f"[bold]{told.day:%-d %B %Y}[/] (UTC): {told.sentence}", highlight=False)
    if told.stages:
        table = Table("stage", *(["runs", "failed", "p50 s", "p99 s", "rows"]), "seconds, by the hour")
        for stage in told.stages:
            times = ["–" if value is None else f"{value:,.1f}" for value in (stage.p50_s, stage.p99_s)]
            rows = "–" if stage.rows is None else f"{stage.rows:,}"
            bad = f"[red]{stage.bad:,}[/]" if stage.bad else "0"
            hours = [_larger(stage.spark_s[at : at + 2]) for at in range(0, len(stage.spark_s), 2)]
            table.add_row(escape(stage.stage), f"{stage.runs:,}", bad, *times, rows, digests.spark(hours))
        out.print(table)
    for failure in told.failures:
        often = f"{failure.count:,} times" if failure.count > 1 else "once"
        reason = escape(failure.reason or digests.NO_REASON)
        told_at = f"{often}, last at {failure.last_at:%H:%M}"
        out.print(f"[red]{escape(failure.stage)}[/] {told_at}: {reason}", highlight=False)
        say(f"    {failure.run_id}", "dim")
    for run in told.outliers:
        text = f"{run.seconds:,.1f} s, usually {run.usual_s:,.1f}"
        out.print(f"[yellow]{escape(run.stage)}[/] at {run.started_at:%H:%M} took {text}", highlight=False)
        say(f"    {run.run_id}", "dim")
    if html:
        say(f"written to {html}")


def _larger(pair: list[float | None]) -> float | None:
    return max((value for value in pair if value is not None), default=None)


def _links(root: Root) -> Callable[[str], str | None]:
    """Where reports are: what `up` last served them as, else nothing."""
    from etl.serve import heartbeat

    url = (heartbeat.read(root) or {}).get("reports_url")
    return lambda run_id: f"{url}/reports/{run_id}" if url else None
