"""`new project`, `new table`, `new question`, `new stage`: what a project of your own begins with."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from etl.cli.common import AsJson, Timetable, out, print_json, refuse, refusing, say
from etl.storage import PROJECT

if TYPE_CHECKING:
    from etl.lake.table import Table

app = typer.Typer(no_args_is_help=True, help="Write a project, a table, a question or a stage to begin with.")
Sample = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE", help="A sample: JSON lines, a JSON array, CSV or Parquet; also gzip, zstd."),
]
Key = Annotated[list[str], typer.Option("--key", metavar="COLUMN", help="Of the key; more than one is fine.")]


@app.command()
def project(
    folder: Annotated[Path, typer.Argument(help="One that is not there yet, or empty.")], as_json: AsJson = False
) -> None:
    """Write a project: preprocess, compact, query, and no table yet. Exit status 2 for what cannot be written."""
    from etl.scaffold import projects
    from etl.scaffold.files import Refused

    with refusing(Refused, status=2):
        paths = projects.add(PROJECT, folder)
    if as_json:
        print_json({"project": str(folder.resolve()), "paths": paths})
        return
    for path in paths:
        say(f"wrote {path}")
    etl = Path(sys.executable).parent / "etl"
    say(f"next: cd {shlex.quote(str(folder))}, then `{etl} new table NAME --from FILE`")
    say(f"then: files into landing/NAME/ of outputs/, `{etl} run all`; `{etl} up` keeps all of it running")


@app.command()
def table(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The table's name, and that of its folder in landing/.")],
    sample: Sample = None,
    files: Annotated[str | None, typer.Option(metavar="GLOB", help="Its files' paths below landing/.")] = None,
    time: Annotated[str | None, typer.Option(metavar="COLUMN", help="When a row came to be.")] = None,
    key: Key = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Declare a table, with the columns and types of a sample file. Exit status 2 for what cannot be declared."""
    from etl.scaffold import tables
    from etl.scaffold.files import Refused

    timetable: Timetable = context.obj
    try:
        data = sample.read_bytes() if sample else None
        path = f"{timetable.domain}/tables.py"
        added = tables.add(PROJECT, name, sample=data, key=tuple(key), time=time, files=files, path=path)
    except OSError as error:
        refuse(f"{sample}: {error.strerror}", status=2)
    except Refused as error:
        refuse(str(error), status=2)
    if as_json:
        told = {"table": added.table.name, "path": added.path, "text": added.text, "rows": added.rows}
        print_json(told | {"fitting": added.fitting, "guesses": added.guesses, "notes": added.notes})
        return
    for heading, lines in tables.summary(added).items():
        out.print(f"[bold]{heading}", highlight=False, soft_wrap=True)
        for line in lines:
            say(f"  {line}")
    where = f"landing/{added.table.files or f'{name}/'}"
    look = "look at what was guessed, " if added.guesses else ""
    say(f"next: {look}put files into {where}, `python orchestrate.py run preprocess`")
    say(f"then: `python orchestrate.py new question NAME --table {name}`")


@app.command()
def question(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The question's name, and that of its file.")],
    table: Annotated[str | None, typer.Option(metavar="TABLE", help="Whose rows it counts; one with a time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a question that counts a table's rows, with a chart. Exit status 2 for what cannot be asked."""
    from etl.scaffold import questions
    from etl.scaffold.files import Refused

    timetable: Timetable = context.obj
    with refusing(Refused, status=2):
        asked = _chosen(timetable, table)
        path = questions.add(PROJECT, name, asked, folder=f"{timetable.domain}/queries")
    if as_json:
        print_json({"question": name, "path": path, "table": asked.name})
        return
    say(f"{path} asks how many rows {asked.name} has")
    say(f"next: `python orchestrate.py run query -p 'questions=[{name}]'`, then make it ask what you want to know")


@app.command()
def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The stage's name: of its notebook, its YAML, its flow.")],
    every: Annotated[str, typer.Option(metavar="DURATION", help='Such as "30 seconds" or "6 hours".')] = "1 hour",
    as_json: AsJson = False,
) -> None:
    """Write a stage: a notebook, its YAML, its line in the README. Exit status 2 for what cannot be one."""
    from etl.scaffold import stages
    from etl.scaffold.files import Refused

    timetable: Timetable = context.obj
    with refusing(Refused, status=2):
        paths = list(stages.add(PROJECT, name, every=every, domain=timetable.domain))
    if as_json:
        print_json({"stage": name, "paths": paths})
        return
    for path in paths:
        say(f"wrote {path}")
    say(f"next: `python orchestrate.py run {name}`; `make lab` opens the notebook")


def _chosen(timetable: Timetable, name: str | None) -> "Table":
    """The table of that name, or the first that has a time. Raises Refused."""
    from etl.scaffold.files import Refused

    tables = timetable.tables()
    if not tables:
        raise Refused("no table is declared yet: `new table` declares one")
    if name is None:
        return next((table for table in tables.values() if table.time), next(iter(tables.values())))
    if name not in tables:
        raise Refused(f"there is no table {name!r}; there are {', '.join(tables)}")
    return tables[name]
