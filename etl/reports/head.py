"""What the head of a report says: how the run ended, when, what it read, wrote and cost, and what is new since it was
last ok."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from html import escape, unescape
from typing import TYPE_CHECKING, Any

from etl.figures import change, figure, moment, shortened, span, words
from etl.params.cell import DEFAULT, SUPPLIED, declared_in

if TYPE_CHECKING:
    from etl.runs.record import RunRecord

PHRASES = {  # of the other states the reason says it all
    "ok": "Done",
    "noop": "Nothing to do",
    "failed": "It failed",
    "timed_out": "It was stopped",
}
SAID = 300  # characters of a reason; the card and the traceback have more
RAN_S = 0.5  # a run that began so much later than it was due has waited
FROM = 6  # headings, that a report has a list of its contents
HEADING = re.compile(r"<(h[123])>(.*?)</\1>", re.S)
MARK = "<!-- contents -->"


@dataclass(frozen=True)
class Before:
    """What came before a run of its stage. `last_ok`: the record of the last run that was ok; `previous`: of the last
    of any state run_id and report; `usual_s`: the median of the last ok ones. None where there is none, or it is not
    known."""

    last_ok: dict[str, Any] | None = None
    previous: dict[str, Any] | None = None
    usual_s: float | None = None


@dataclass(frozen=True)
class Parameter:
    """A row of the table. `value` and `was` (where it was another in the last ok run) as they are shown."""

    name: str
    value: str
    meaning: str
    origin: str
    was: str = ""


@dataclass(frozen=True)
class Head:
    """All that the template shows above the notebook."""

    outcome: str
    times: list[tuple[str, str]]
    receipt: list[tuple[str, str]]
    figures: list[tuple[str, str, str]]  # name, value, what has become of it
    parameters: list[Parameter]
    identity: list[tuple[str, str]]
    checks: list[dict[str, Any]]  # those that failed first
    failed: int
    links: list[tuple[str, str]] = field(default_factory=list)  # words, address beside this page


def of(record: "RunRecord | Any", nb: Any, before: Before) -> Head:
    """The head of a run's report."""
    checks = sorted(record.checks, key=lambda check: bool(check["ok"]))
    return Head(
        outcome=_outcome(record, before),
        times=[*_times(record, before)],
        receipt=[*_receipt(record)],
        figures=[*_figures(record, before)],
        parameters=_parameters(record, nb, before),
        identity=[*_identity(record)],
        checks=checks,
        failed=sum(not check["ok"] for check in checks),
        links=[*_links(before)],
    )


def _outcome(record: Any, before: Before) -> str:
    """One sentence: what came of it, and how long that took."""
    told = shortened(record.reason, SAID)
    if record.state == "ok":
        wrote = len(record.versions_written)
        rows = record.metrics.get("rows")
        parts = [f"{figure(rows)} row{'s' * (rows != 1)}" if type(rows) is int else ""]
        parts += [f"{len(record.checks)} checks passed" if len(record.checks) > 1 else ""]
        parts += [f"{wrote} table{'s' * (wrote != 1)} written" if wrote else ""]
        told = told or ", ".join(filter(None, parts))
    usual = f", usually {span(before.usual_s)}" if before.usual_s is not None else ""
    ran = f"{span(record.seconds)}{usual}"
    said = ": ".join(filter(None, [PHRASES.get(record.state), told])) or record.state.replace("_", " ")
    return f"{said[:1].upper()}{said[1:]} ({ran})."


def _times(record: Any, before: Before) -> Iterator[tuple[str, str]]:
    due, began = (datetime.fromisoformat(text) for text in (record.scheduled_for, record.started_at))
    yield "Due", moment(record.scheduled_for)
    if (waited_s := (began - due).total_seconds()) >= RAN_S:
        yield "Waited", span(waited_s)
    usual = f", usually {span(before.usual_s)}" if before.usual_s is not None else ""
    yield "Ran", f"{span(record.seconds)}{usual}"
    if (deadline_s := getattr(record, "deadline_s", None)) and deadline_s != float("inf"):
        yield "Deadline", span(deadline_s)
    if record.attempt > 1:
        yield "Attempt", str(record.attempt)


def _receipt(record: Any) -> Iterator[tuple[str, str]]:
    for what, versions in (("Read", record.versions_read), ("Wrote", record.versions_written)):
        if versions:
            yield what, ", ".join(f"{table}@{version}" for table, version in versions.items())
    if given := record.metrics.get("given"):
        yield "Started from", ", ".join(given)
    if cost := ", ".join(costs(record.receipt)):
        yield "Cost", cost


def costs(receipt: dict[str, Any]) -> Iterator[str]:
    """What a run took of the machine, as people read it."""
    told = {
        "cpu_s": "{:,.1f} s of CPU",
        "peak_memory_mb": "{:,.0f} MB at most",
        "bytes_read": "{:,.1f} MB read",
        "bytes_written": "{:,.1f} MB written",
        "rows_per_s": "{:,.0f} rows a second",
        "boot_s": "{:,.0f} s until a machine had begun",
        "dollars": "{:,.4f} dollars",
    }
    for name, text in told.items():
        if value := receipt.get(name):
            said = text.format(value / 1e6 if name.startswith("bytes") else value)
            if re.search("[1-9]", said):
                yield said


def _figures(record: Any, before: Before) -> Iterator[tuple[str, str, str]]:
    then = (before.last_ok or {}).get("metrics") or {}
    for name, value in record.metrics.items():
        if not isinstance(value, dict | list) and (value is not None or then.get(name) is not None):
            yield words(name), figure(value, name), change(then.get(name), value, name)


def _parameters(record: Any, nb: Any, before: Before) -> list[Parameter]:
    """What the notebook was given: first what was otherwise in the last ok run, then what is no default."""
    then = (before.last_ok or {}).get("parameters")
    declared = next((declared_in(cell.source) for cell in nb.cells if _is_parameters(cell)), {})
    rows = []
    for name, value in record.parameters.items():
        if name in SUPPLIED:
            continue
        said = declared.get(name)
        was = ""
        if then is not None and then.get(name) != value and not (said and said.is_secret):
            was = literal(then[name]) if name in then else "not there"
        rows.append(Parameter(name, literal(value), said.help if said else "", record.origins.get(name, ""), was))
    return sorted(rows, key=lambda row: (not row.was, row.origin == DEFAULT))


def _is_parameters(cell: Any) -> bool:
    return cell.cell_type == "code" and "parameters" in (cell.metadata.get("tags") or [])


def _identity(record: Any) -> Iterator[tuple[str, str]]:
    """What is needed to find things again, and seldom read."""
    given = [(name, literal(value)) for name, value in record.parameters.items() if name in SUPPLIED]
    git = (getattr(record, "provenance", None) or {}).get("git_commit")
    known = {
        "Run": record.run_id,
        "Repeats": getattr(record, "parent", None),
        "Release": getattr(record, "release", None),
        "Commit": str(git)[:12] if git else None,
        "Host": record.host,
        "Started": moment(record.started_at),
    }
    yield from ((name, value) for name, value in known.items() if value)
    yield from ((name, value) for name, value in given if name != "run_id")


def _links(before: Before) -> Iterator[tuple[str, str]]:
    """Where a page that is opened as a file can lead to: what was there when it was written."""
    for text, run in (("← previous", before.previous), ("last ok", before.last_ok)):
        if run:
            yield text, f"../../{'/'.join(run['report'].split('/')[2:])}/report.html"
    yield "notebook", "report.ipynb"


def with_contents(page: str) -> str:
    """A page whose headings have names, and a list of them at its top where they are many."""
    above, mark, below = page.partition(MARK)
    listed: list[str] = []

    def named(match: re.Match[str]) -> str:
        level, inside = match.groups()
        text = escape(unescape(re.sub("<[^>]*>", "", inside)))
        listed.append(f'<li class="{level}"><a href="#part-{len(listed) + 1}">{text}</a></li>')
        return f'<{level} id="part-{len(listed)}">{inside}</{level}>'

    below = HEADING.sub(named, below)
    if len(listed) < FROM:
        return above + below
    return f'{above}<nav class="contents"><h2>Contents</h2><ul>{"".join(listed)}</ul></nav>{below}'


def literal(value: Any) -> str:
    """A value as it stands in a table."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
