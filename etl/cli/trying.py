"""`try`: the working tree's stages on real data, beside production, before they are released."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from etl.cli.common import (
    AsJson,
    Env,
    Overrides,
    RootOption,
    Timetable,
    existing_root,
    load,
    out,
    print_json,
    refusing,
    say,
)
from etl.cli.printing import INDENT, print_differences, print_record, progress
from etl.storage import Damaged

if TYPE_CHECKING:
    import polars as pl

    from etl.runs.tries import Tried


def register(app: typer.Typer) -> None:
    app.command("try")(try_stage)


def try_stage(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="A stage's name, or all: each once, from the shortest cadence on.")],
    env: Env = "local",
    root: RootOption = None,
    p: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """The working tree's stage on a branch of what is published, and what differs; nothing of production moves.

    Exit status 1 unless every run is ok or noop. What it wrote is in <root>/tries/<id> for a day: a root of its own.
    """
    from etl.lake import branch
    from etl.runs import tries

    timetable: Timetable = context.obj
    project = load(env, root=root, overrides=p, stage=None if stage == "all" else stage)
    asked = existing_root(env, root)
    began = time.monotonic()
    lake = timetable.lake_at(asked)
    folder = tries.begin(asked, stage)
    with refusing(Damaged):
        before = lake.branch(folder)
    branched_s = time.monotonic() - began
    tried = []
    for chosen in project.stages.values():
        with progress(chosen, quiet=as_json) as on_cell:
            tried.append(tries.run(asked, folder, chosen, project.environment, on_cell))
        if not as_json:
            _print_tried(tried[-1])
    ran_s, began = sum(one.record.seconds for one in tried), time.monotonic()
    rows = branch.differences(before, lake.at(asked.url_of(folder)).published())
    seconds = {"branch": branched_s, "runs": ran_s, "compare": time.monotonic() - began}
    if as_json:
        told = {"id": folder.partition("/")[2], "root": asked.url_of(folder), "seconds": seconds}
        print_json(told | {"runs": [asdict(one) for one in tried], "tables": rows.to_dicts()})
    else:
        _print_rows(rows)
        say(f"tried in {asked.url_of(folder)}, a root for --root, kept for a day")
        say(f"to branch {branched_s:.1f} s, to run {ran_s:.1f} s, to compare {seconds['compare']:.1f} s", style="dim")
    if not all(one.record.ok for one in tried):
        raise typer.Exit(1)


def _print_tried(tried: "Tried") -> None:
    """The run, and what it made otherwise than production's last; of an answer the first thing that differs."""
    print_record(tried.record)
    if tried.beside is None:
        say(f"{' ' * INDENT}nothing to compare with: no run of it was ok yet", style="dim")
        return
    compared = ", ".join(f"{count} {part}" for part, count in tried.compared.items() if count)
    say(f"{' ' * INDENT}beside {tried.beside['run_id']}, {tried.beside['seconds']:.1f} s: {compared} compared")
    batches = [of.get("batch") for of in (tried.beside["metrics"], tried.record.metrics)]
    if batches[0] != batches[1]:
        say(f"{' ' * INDENT}of other data: batch {batches[0]} then, {batches[1]} now")
    shown: dict[tuple[str, str], Any] = {}
    for difference in tried.differences:
        name = difference.name.partition(":")[0] if difference.part == "results" else difference.name
        shown.setdefault((difference.part, name), difference)
    gone = [key for key, one in shown.items() if key[0] in ("checks", "results") and one.after in (None, "no file")]
    for part in dict.fromkeys(part for part, _ in gone):
        names = [shown.pop(key) and key[1] for key in gone if key[0] == part]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        say(f"{' ' * INDENT}{part} that are not there: {', '.join(names[:4])}{more}")
    if shown:
        print_differences([*shown.values()], f"what {tried.record.stage} makes otherwise")
    elif not gone:
        say(f"{' ' * INDENT}nothing differs")


def _print_rows(rows: "pl.DataFrame") -> None:
    """How the tables differ from what is published."""
    if rows.is_empty():
        say("no table has other rows than are published")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="rows, by key", title_justify="left")
    for column in rows.columns:
        table.add_column(column, justify="left" if column in ("table", "first") else "right", overflow="fold")
    for name, *counts, first in rows.rows():
        table.add_row(name, *(f"{count:,}" for count in counts), escape(first))
    out.print(table)
