"""The API's pages for people: what there is, and the reports by stage and day. Plain HTML, without a script."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from html import escape
from typing import Any
from urllib.parse import urlencode

from etl.figures import moment, span
from etl.reports.page import style

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
}
DAYS = 7  # of the overview
FORMS = ("csv", "parquet", "json")
STYLE = """header, main { max-width: 72rem; } h1 { margin: 0; font-size: 22px; } h2:first-child { margin-top: 0; }
form { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: 1rem; }
input, select, button { font: inherit; padding: .3rem .6rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--quiet); border-radius: 6px; }
input { flex: 1 1 14rem; min-width: 0; } td { min-width: 3.5rem; } .bad { color: var(--bad); font-weight: 600; }
main table { width: 100%; } td.reason { overflow-wrap: anywhere; min-width: 12rem; } td.time { white-space: nowrap; }
section { overflow-x: auto; } section + section { margin-top: 2rem; } .badge { white-space: nowrap; }
::placeholder { color: var(--quiet); opacity: 1; }"""


def home(title: str, questions: Iterable[tuple[str, str]], requests: Iterable[tuple[str, str, str]], links: str) -> str:
    """`questions`: name and title; `requests`: method, path, what it is; `links`: HTML."""
    answers = "".join(
        f"<tr><td><a href='results/{escape(name)}'>{escape(name)}</a><td>{escape(said)}<td class=time>"
        + " · ".join(f"<a href='results/{escape(name)}.{form}'>{form}</a>" for form in FORMS)
        for name, said in questions
    )
    lines = "".join(
        f"<tr><td>{method}<td>{_link(path) if method == 'GET' and '{' not in path else escape(path)}<td>{escape(said)}"
        for method, path, said in requests
    )
    body = f"<section><h2>Answers</h2><table>{answers}</table></section>" if answers else ""
    body += f"<section><h2>All requests</h2><table>{lines}</table></section>"
    return _page(title, f"<p>{links}</p>{_form({})}", body)


def reports(
    title: str,
    days: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    asked: Mapping[str, str],
    today: date,
) -> str:
    """`days`: stage, day, runs, bad of the last DAYS; `runs`: those that fit what was `asked`, the newest first."""
    stages = sorted({row["stage"] for row in days} | ({asked["stage"]} if asked.get("stage") else set()))
    said = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
    heading = f"Runs: {escape(said)}" if said else "The last runs"
    lines = "".join(map(_run, runs))
    found = f"<table><tbody>{lines}</table>" if runs else "<p>None fits.</p>"
    body = f"{_overview(days, stages, today)}<section><h2>{heading}</h2>{found}</section>"
    back = '<p><a href="/">What else there is</a></p>'
    return _page(f"{title}: reports", back + _form(asked, stages), body)


def _overview(days: Sequence[Mapping[str, Any]], stages: Sequence[str], today: date) -> str:
    """A line a stage, a column a day, today first."""
    if not days:
        return ""
    shown = [today - timedelta(days=back) for back in range(DAYS)]
    counts = {(row["stage"], row["day"]): row for row in days}
    head = "".join(f"<th>{day:%a %d %b}" for day in shown)
    lines = []
    for stage in stages:
        cells = []
        for day in shown:
            row = counts.get((stage, day))
            bad = f", <span class=bad>{row['bad']:,} not ok</span>" if row and row["bad"] else ""
            link = escape(urlencode({"stage": stage, "day": f"{day}"}))
            cells.append(f'<td><a href="reports?{link}">{row["runs"]:,}</a>{bad}' if row else "<td>–")
        name = escape(stage)
        led = f'<a href="reports/{name}/latest">latest</a> · <a href="reports/{name}/latest-ok">last ok</a>'
        lines.append(f"<tr><th>{name}<td class=time>{led}{''.join(cells)}")
    table = f"<table><thead><tr><th>Stage<th>Report{head}</thead><tbody>{''.join(lines)}</table>"
    return f"<section><h2>By stage and day</h2>{table}</section>"


def _run(run: Mapping[str, Any]) -> str:
    run_id, state = escape(run["run_id"]), escape(run["state"])
    began, plain = moment(run["started_at"]), "swept"
    if run["kept"]:
        began = f'<a href="reports/{run_id}">{began}</a>'
        plain = f'<a href="reports/{run_id}?code=no">without code</a>'
    return (
        f"<tr class='{state}'><td class=time>{began}<td>{escape(run['stage'])}"
        f"<td><span class=badge>{state.replace('_', ' ')}</span><td class=time>{span(run['seconds'])}"
        f"<td class=reason>{escape(run['reason'] or '')}<td class=time>{plain}"
    )


def _form(asked: Mapping[str, str], stages: Sequence[str] = ()) -> str:
    chosen = asked.get("stage", "")
    options = "".join(f"<option{' selected' * (name == chosen)}>{escape(name)}</option>" for name in stages)
    select = f'<select name="stage" aria-label="Stage"><option value="">every stage</option>{options}</select>'
    day = escape(asked.get("day", ""))
    inputs = f'<input type="date" name="day" value="{day}" aria-label="Day">' if stages else ""
    search = escape(asked.get("search", ""))
    return (
        f'<form action="reports">{select if stages else ""}{inputs}<input type="search" name="search" value="{search}" '
        'placeholder="a run, a state, words of a reason" aria-label="Search"><button>Search reports</button></form>'
    )


def _link(path: str) -> str:
    return f'<a href="{escape(path[1:] or "/")}">{escape(path)}</a>'


def _page(title: str, head: str, body: str) -> str:
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{view}<title>{escape(title)}</title>'
        f"<style>{style()}{STYLE}</style><body><header><h1>{escape(title)}</h1>{head}</header><main>{body}</main>"
    )
