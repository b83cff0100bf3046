"""The commands about the data: `doctor`, `whence`, `promote`, `rebuild`, `backup`, `restore`, `quarantine`."""

import contextlib
import importlib
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from etl.cli.common import (
    RUN_ALL,
    AsJson,
    Env,
    RootOption,
    Timetable,
    asked_root,
    existing_root,
    moment,
    out,
    print_json,
    refuse,
    refusing,
    root_at,
    roots_with_runs,
    say,
    services_folder,
    what_is_missing,
)
from etl.cli.ports import with_ports
from etl.cli.printing import styled
from etl.leases import LeaseHeld
from etl.storage import Root

if TYPE_CHECKING:
    from etl.findings import Finding
    from etl.lake import Lake
    from etl.lake.backup import Point

refused = typer.Typer(no_args_is_help=True, help="The lines and files that did not fit.")
FileName = Annotated[str, typer.Argument(help="A file's name, as `quarantine list` has it.")]


def register(app: typer.Typer, timetable: Timetable) -> None:
    app.command()(whence)
    app.command()(with_ports(doctor, timetable.ports))
    app.command()(promote)
    app.command("rebuild")(rebuild_lake)
    app.command("backup")(make_backup)
    app.command("restore")(restore_root)


def whence(
    version: Annotated[str, typer.Argument(metavar="TABLE[@VERSION]", help="The newest version when none is given.")],
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """The run that wrote a version of a table of the lake, and its report."""
    from etl.reports import page
    from etl.runs import index, provenance

    table, _, number = version.partition("@")
    if number and not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is not a version; as in {table}@12")
    asked = existing_root(env, root)
    with refusing(LookupError):
        origin = provenance.whence(asked, table, int(number) if number else None)
    origin |= {"state": None, "report": None}
    if origin["run_id"]:
        with contextlib.suppress(KeyError):  # a run in JupyterLab is in no index
            record = index.get(asked, origin["run_id"])
            report = page.url_of(asked, record) if record["kept"] else None
            origin |= {"state": record["state"], "report": report}
    if as_json:
        print_json(origin)
        return
    who = f"{origin['run_id']}  {styled(origin['state'] or 'not in the index')}" if origin["run_id"] else "by no run"
    what = origin["operation"] or "as the index of runs has it"
    told = f"{table}@{origin['version']}  {what}  {origin['at']}  {who}"
    out.print(told, highlight=False, soft_wrap=True)
    if origin["state"]:
        say(origin["report"] or "its report was swept")


def doctor(
    context: typer.Context, env: Env = "local", root: RootOption = None, as_json: AsJson = False, **ports: int
) -> None:
    """What is wrong with lake, index, models, answers, packages and ports, and what to do. Changes nothing.

    Exit status 1 when something is.
    """
    from etl.findings import Finding
    from etl.serve import machine

    timetable: Timetable = context.obj
    asked = asked_root(env, root)
    services = timetable.services(asked.url, ports, services_folder(asked.url))
    missing = what_is_missing(asked)
    remedy = "; ".join([*roots_with_runs(asked), RUN_ALL]) if missing else None
    findings = [Finding(f"root {asked.url}", missing, remedy)]
    findings += [] if missing else _data(asked, timetable)
    findings += [Finding(what, why, "make setup" if why else None) for what, why in machine.packages()]
    taken = "see its owner with ss -ltnp"
    findings += [Finding(what, why, taken if why else None) for what, why in machine.ports(services)]
    wrong = [finding for finding in findings if finding.problem]
    if as_json:
        print_json({"ok": not wrong, "findings": [asdict(finding) for finding in findings]})
    elif wrong:
        table = Table("what", "wrong", "what to do", title_justify="left")
        table.title = f"{len(wrong)} of {len(findings)} are wrong"
        for finding in wrong:
            table.add_row(*(escape(text or "") for text in (finding.what, finding.problem, finding.remedy)))
        out.print(table)
    else:
        names = ", ".join(finding.what for finding in findings)
        out.print(f"[green]ok[/]  {len(findings)} looked at: {escape(names)}")
    if wrong:
        raise typer.Exit(1)


def _data(root: Root, timetable: Timetable) -> "list[Finding]":
    """What is wrong with what is stored under a root: the lake, the index, the model, the answers."""
    from etl.findings import Finding, sentence
    from etl.questions import results
    from etl.runs import index

    lake = timetable.lake_at(root).examine()
    try:
        model = importlib.import_module(timetable.model).examine(root) if timetable.model else []
    except Exception as error:  # the project's own code
        what = f"{timetable.model} cannot be used: {sentence(error)}"
        remedy = "make it go with the tables that are declared; without a model, give Timetable none in orchestrate.py"
        model = [Finding("the model", what, remedy)]
    return [*lake, *index.examine(root), *model, *results.examine(root)]


def rebuild_lake(
    context: typer.Context,
    env: Env = "local",
    root: RootOption = None,
    accept_quarantine: Annotated[
        bool,
        typer.Option("--accept-quarantine", help="Also when rows of the present lake would not fit any more."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The lake again from its archive, swapped in whole; the one before stays beside it. End `up` first.

    Refused when the archive no longer has every file that is in the lake: it keeps `archive_days` of compact. Refused
    too when rows that are in the lake would go to quarantine, which `--accept-quarantine` allows.
    """
    from etl.lake.rebuild import NotWhole, RowsWouldGo
    from etl.runs import index

    asked = existing_root(env, root)
    timetable: Timetable = context.obj
    index.move_from_lake(asked)  # of an older release: it would be swapped out with the lake
    run_id = f"rebuild-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    try:
        tables = timetable.lake_at(asked).rebuild(run_id, accept_quarantine=accept_quarantine)
    except RowsWouldGo as error:
        refuse(f"{error}. `rebuild --accept-quarantine` goes on all the same")
    except (NotWhole, LeaseHeld) as error:
        refuse(str(error))
    if as_json:
        print_json(tables.to_dicts())
        return
    title = escape(f"{asked.url}/lake was made again")
    table = Table("table", "rows", "rows before", "", title=title, title_justify="left")
    for name, rows, before, equal in tables.iter_rows():
        verdict = {True: "[green]equal", False: "[yellow]differs", None: "was not readable"}[equal]
        table.add_row(name, f"{rows:,}", "" if before is None else f"{before:,}", verdict)
    out.print(table)


def promote(
    context: typer.Context,
    table: Annotated[str, typer.Argument(metavar="TABLE")],
    field: Annotated[str, typer.Argument(metavar="FIELD", help="As it is in _rescued; one in an object as user.id.")],
    as_type: Annotated[
        str | None,
        typer.Option("--as", metavar="TYPE", help="As in a declaration: INT, TEXT, decimal(9,2), pl.Float64."),
    ] = None,
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a field that no column took its column, in the rows of before as well, out of `_rescued`.

    Declare the column first; until then this says the line to add, and ends with status 1. A value that does not fit
    stays in `_rescued`. Asked for twice it does nothing the second time.
    """
    from etl.lake import promotion
    from etl.lake.schemas import SchemasDiffer

    lake = _lake(context, env, root)
    if table not in lake.tables:
        raise typer.BadParameter(f"{table!r} is no table: one of {', '.join(lake.tables)}")
    try:
        dtype = promotion.type_named(as_type) if as_type else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    column = promotion.column_for(lake.tables[table], field)
    if column and dtype is not None and lake.tables[table].types[column] != dtype:
        raise typer.BadParameter(f"{table}.{column} is declared as {lake.tables[table].types[column]}, not {as_type}")
    with refusing(LookupError, ValueError, SchemasDiffer, LeaseHeld, promotion.NotFinished):
        if column is None:
            proposal = lake.propose(table, field, dtype)
            fit = "all of them fit" if not proposal.left else f"{proposal.left:,} would not fit, and stay in _rescued"
            refuse(
                f"{table} has no column for {field}, which {proposal.rows:,} rows have: {fit}. Declare it, then ask "
                f"again:\n    {proposal.line}"
            )
        done = lake.promote(table, field, f"promote-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    if as_json:
        print_json(asdict(done))
        return
    say(f"{table}@{done.version}: {done.rows:,} rows have their {field} in {done.column} now")
    for reason, rows in done.why.items():
        say(f"{rows:,} as before in _rescued: {reason}")


def _lake(context: typer.Context, env: str, root: str | None) -> "Lake":
    """The project's lake under the root that was asked for."""
    timetable: Timetable = context.obj
    return timetable.lake_at(existing_root(env, root))


BackupUrl = Annotated[str, typer.Argument(metavar="URL", help="A folder, or s3://bucket/prefix.")]


def make_backup(
    context: typer.Context,
    url: BackupUrl,
    env: Env = "local",
    root: RootOption = None,
    archive: Annotated[bool, typer.Option("--archive", help="The ingested files as well, for `rebuild`.")] = False,
    reports: Annotated[bool, typer.Option("--reports/--no-reports", help="The reports of runs.")] = True,
    keep: Annotated[int, typer.Option(min=0, help="Points that stay; 0: all of them.")] = 30,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files of the point, not the new ones alone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy what is published to another place, as a new point in time, while everything runs.

    Only what the backup lacks is written, and what is written is read again. `restore` brings a point back.
    """
    from etl.lake.snapshot import NothingPublished
    from etl.storage import Damaged

    lake, target = _lake(context, env, root), root_at(url)
    try:
        made = lake.backup(target, archive=archive, reports=reports, keep=keep, verify=verify)
    except LeaseHeld as error:
        refuse(f"another backup is under way: {error}")
    except (NothingPublished, Damaged, ValueError, LookupError, OSError) as error:
        refuse(str(error))
    point, megabytes = made.point, made.bytes / 1e6
    if as_json:
        print_json(_about(point) | {"written": made.written, "written_bytes": made.bytes, "removed": made.removed})
        return
    rows = sum(content.rows for content in point.tables.values())
    say(f"{point.name}  batch {point.batch}, {rows:,} rows, {len(point.files):,} files, {point.bytes / 1e6:,.1f} MB")
    removed = f"; {made.removed} older points went" if made.removed else ""
    say(f"{made.written:,} files were written, {megabytes:,.1f} MB, and read again{removed}")


def restore_root(
    context: typer.Context,
    url: BackupUrl,
    env: Env = "local",
    root: RootOption = None,
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="The last point of then or before; the newest without.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where there is a lake: it is moved aside, and stays there.")
    ] = False,
    points: Annotated[bool, typer.Option("--list", help="Name the points of the backup, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """A root again from its backup, after which all stages go on. End `up` first."""
    from etl.lake import backup
    from etl.storage import Damaged

    timetable: Timetable = context.obj
    asked, source = asked_root(env, root), root_at(url)
    before = moment(as_of) if as_of else None
    try:
        if points:
            rows = [_about(point) for point in backup.points(source)]
            _print_points(rows, as_json)
            return
        point, moved = timetable.lake_at(asked).restore(
            source, as_of=before, force=force, run_id=f"restore-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        )
    except backup.NotEmpty as error:
        refuse(f"{error}: nothing was changed. `restore --force` moves it aside; or name an empty root with --root")
    except (backup.NoBackup, Damaged, LeaseHeld, ValueError) as error:
        refuse(f"{error}: nothing was changed")
    if as_json:
        print_json(_about(point) | {"root": asked.url, "moved": moved})
        return
    say(f"{asked.url} is as it was at {point.at:%Y-%m-%d %H:%M:%S} UTC: batch {point.batch}")
    for folder in moved:
        say(f"what was there is in {folder}")


def _about(point: "Point") -> dict[str, object]:
    tables = {table: {"version": c.version, "rows": c.rows} for table, c in point.tables.items()}
    about = {"point": point.name, "at": point.at.isoformat(), "batch": point.batch, "as_of": point.as_of}
    return {**about, "files": len(point.files), "bytes": point.bytes, "tables": tables}


def _print_points(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = Table("point", "at", "batch", "files", "MB")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("point", "at", "batch", "files")), f"{int(str(row['bytes'])) / 1e6:.1f}"
        )
    out.print(table if rows else "there is no point")


@refused.command("list")
def list_refused(context: typer.Context, env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """What did not fit: files with refused lines, and files that were refused whole, the newest first."""
    rows = _lake(context, env, root).refused()
    if as_json:
        print_json(rows)
        return
    table = Table()
    table.add_column("file", overflow="fold")  # whole: `show` and `retry` take it
    for column in ("batch or day", "lines", "why"):
        table.add_column(column)
    for row in rows:
        table.add_row(escape(row["file"]), str(row["when"]), str(row["lines"] or "all of it"), escape(row["why"]))
    out.print(table if rows else "nothing was refused")


@refused.command("show")
def show_refused(
    context: typer.Context,
    file: FileName,
    env: Env = "local",
    root: RootOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Only the lines, byte for byte as they came.")] = False,
    as_json: AsJson = False,
) -> None:
    """The refused lines of a file with their reasons, or why it was refused whole."""
    with refusing(LookupError):
        whole, found = _lake(context, env, root).find_refused(file)
    lines = found.to_dicts()
    if raw:
        _write_raw(lines)
        return
    if as_json:
        print_json({"file": whole, "lines": lines})
        return
    for row in whole:
        say(f"{row['path']} {row['why']}")
    for line in lines:
        say(f"{file}:{line['line']}: {line['reason']}", style="bold")
        say(line["raw"])


def _write_raw(lines: list[dict[str, Any]]) -> None:
    """The lines' bytes on stdout; those that are not kept whole are refused after the others."""
    from etl.lake.parse import as_it_came

    came = [as_it_came(line["raw"], line["reason"]) for line in lines]
    sys.stdout.buffer.write(b"".join(raw + b"\n" for raw in came if raw is not None))
    sys.stdout.flush()
    if lost := [line["line"] for line, raw in zip(lines, came, strict=True) if raw is None]:
        refuse(f"{len(lost)} of its lines are not kept as they came, line {lost[0]} among them")


@refused.command("retry")
def retry_refused(context: typer.Context, file: FileName, env: Env = "local", root: RootOption = None) -> None:
    """Put a refused file, or those of its refused lines that fit by now, into landing again."""
    with refusing(LookupError, FileExistsError):
        made = _lake(context, env, root).retry(file)
    say(f"waits for the next run of preprocess: {', '.join(made)}")
