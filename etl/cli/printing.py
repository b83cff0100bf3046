"""How runs, records and differences look on a terminal."""

import collections
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from etl.cli.common import err, out
from etl.params import Stage
from etl.storage import Root

if TYPE_CHECKING:
    from etl.runs.record import RunRecord

INDENT = 10  # of what is said of a bad run, below its time
STYLES = {
    "ok": "green",
    "noop": "dim",
    "check_failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
}  # the other states: bold red


def styled(state: str) -> str:
    """A state in its colour, padded as it came."""
    return f"[{STYLES.get(state.strip(), 'bold red')}]{state}[/]"


def print_record(record: "RunRecord", report: str | None = None) -> None:
    """One line: stage, state, seconds, rows, report. Of a bad run the reason, the cell and the report below it."""
    rows = record.metrics.get("rows")
    report = escape(report or report_of(record))
    line = (
        f"[dim]{datetime.now():%H:%M:%S}[/]  {record.stage:11} {styled(f'{record.state:12}')} {record.seconds:5.1f} s"
    )
    if record.ok:
        what = f"{rows:,} rows" if isinstance(rows, int) else record.reason
        out.print(f"{line}  {escape(f'{what:24}')}  [dim]{report}[/]", highlight=False, soft_wrap=True)
        return
    out.print(line, highlight=False)
    for text in (record.reason, *where_it_failed(record)):
        out.print(Padding(escape(text), (0, 0, 0, INDENT)), highlight=False)
    out.print(f"{' ' * INDENT}[dim]{report}[/]", highlight=False, soft_wrap=True)  # whole, to be copied


def print_slice(number: str, slice: str, record: "RunRecord | None") -> None:
    """One line: how many have ended of how many, the slice, state, seconds. Of a bad run reason and report below it."""
    console = err if err.is_terminal and out.is_terminal else out  # above the bar, which is there
    if record is None:
        console.print(f"[dim]{number:>7}  {escape(slice)}  not needed: nothing new came before it[/]", soft_wrap=True)
        return
    line = f"[dim]{number:>7}[/]  {escape(slice)}  {styled(record.state)}  {record.seconds:.1f} s"
    console.print(f"{line}  {escape(record.reason) if record.ok else ''}".rstrip(), highlight=False, soft_wrap=True)
    if not record.ok:
        for text in (record.reason, *where_it_failed(record)):
            console.print(Padding(escape(text), (0, 0, 0, INDENT)), highlight=False)
        console.print(f"{' ' * INDENT}[dim]{escape(report_of(record))}[/]", highlight=False, soft_wrap=True)


def where_it_failed(record: "RunRecord") -> list[str]:
    """Where a run went wrong: its cell with the heading, the line, the code in it."""
    error = record.error or {}
    if not error.get("cell"):
        return []
    frame = error.get("frame") or {}
    where = frame.get("where", "")
    if not where.startswith(f"cell {error['cell']},"):
        where = ", ".join(filter(None, [f"cell {error['cell']}", where]))
    return [f"in {error['heading']!r}, {where}", *([f"    {frame['code']}"] if frame.get("code") else [])]


def report_of(record: "RunRecord") -> str:
    """Its report's page: a URL, or the path, relative to the working folder where that is shorter."""
    report = Root.at(record.root).url_of(f"{record.report}/report.html")
    return report if "://" in report else min(report, os.path.relpath(report), key=len)


class Minutes:
    """What `up` says of its runs: those that ended in a minute on one line, one that went wrong at once and in full."""

    def __init__(self, url_of: Callable[[str], str]):
        """`url_of`: where the report of a run_id is."""
        self._url_of = url_of
        self._lock = threading.Lock()
        self._records: list[RunRecord] = []

    def __call__(self, record: "RunRecord") -> None:
        with self._lock:
            if not record.ok:
                print_record(record, self._url_of(record.run_id))
            self._records.append(record)
            if len(self._records) == 1:
                timer = threading.Timer(60 - time.time() % 60, self.tell)
                timer.daemon = True
                timer.start()

    def tell(self) -> None:
        """Say what has ended since the last line, where something has."""
        with self._lock:
            records, self._records = self._records, []
            if records:
                line = Table.grid(padding=(0, 2, 0, 0))
                line.add_row(f"[dim]{datetime.now():%H:%M:%S}[/]", summed_up(records))
                out.print(line, highlight=False)


def summed_up(records: "Sequence[RunRecord]") -> str:
    """As in "generate 2 ok, 12,000 rows · query failed": how the runs of each stage ended."""
    parts = []
    for stage in dict.fromkeys(record.stage for record in records):
        own = [record for record in records if record.stage == stage]
        counts = collections.Counter(record.state for record in own)
        states = [f"{f'{n} ' if len(own) > 1 else ''}{styled(state)}" for state, n in counts.items()]
        rows = [record.metrics.get("rows") for record in own if record.state == "ok"]
        total = sum(count for count in rows if isinstance(count, int))
        parts.append(f"{escape(stage)} {' '.join(states)}{f', {total:,} rows' if total else ''}")
    return " [dim]·[/] ".join(parts)


def print_differences(differences: Sequence[Any], title: str) -> None:
    out.print(f"[italic]{escape(title)}", highlight=False)  # above the table: inside it is as narrow as the table
    table = Table("", "")
    for column in ("before", "after"):
        table.add_column(column, overflow="fold")
    for difference in differences:
        values = [
            v if isinstance(v, str) else json.dumps(v, default=str) for v in (difference.before, difference.after)
        ]
        if difference.name.endswith(("sha256", "git_commit")):
            values = [value[:12] for value in values]
        table.add_row(difference.part, *map(escape, (difference.name, *values)))
    out.print(table)


def print_fields(fields: Mapping[str, Any]) -> None:
    """What is recorded under each name, a row each; what is empty is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in (None, "", {}, []):
            table.add_row(name, escape(readable(value)))
    out.print(table)


def readable(value: object) -> str:
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


def text_of(output: dict[str, Any]) -> str:
    """A cell's output as a terminal shows it."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}\n"
    if any(kind.startswith("image/") for kind in output["data"]):
        return "[a picture]\n"
    return "".join(output["data"].get("text/plain", "")) + "\n"


class Shown:
    """A run on the terminal: its id, and a bar of its cells that goes with its end. Call it before each cell."""

    def __init__(self, stage: Stage, quiet: bool):
        """`quiet`: no bar, and the id beside what is for programs."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._out = err if quiet else out
        self._bar = Progress(
            TextColumn("{task.fields[stage]:11}"),
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=err,
            transient=True,
            disable=quiet or not err.is_terminal,
        )
        self._task = self._bar.add_task("starting", stage=stage.name, total=None)

    def begin(self, run_id: str) -> None:
        """Print the id of the run, or of its next attempt."""
        self._bar.stop()  # while there is a bar, what is for a pipe goes to the terminal
        self._out.print(run_id, highlight=False, markup=False, soft_wrap=True)
        self._bar.start()

    def __call__(self, done: int, total: int, heading: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=heading)


@contextmanager
def progress(stage: Stage, quiet: bool) -> Iterator[Shown]:
    """A run on the terminal for the length of the block."""
    shown = Shown(stage, quiet)
    with shown._bar:
        yield shown


@contextmanager
def counted(what: str, total: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """A progress bar of many runs; what to call when one of them has ended."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    hidden = quiet or not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=hidden, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
