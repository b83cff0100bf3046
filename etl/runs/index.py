"""The index of runs: the Delta table runs, one row a run, appended when the run has ended and never removed.

A row does not know whether its report is still there: the report's folder does, and `kept` is read from it.
"""

import contextlib
import datetime
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from etl import delta, findings
from etl.figures import utc
from etl.reports.head import Before
from etl.storage import Root

if TYPE_CHECKING:
    from etl.runs.record import RunRecord

log = logging.getLogger(__name__)
TABLE = "runs"
OLDER = "lake/runs"  # where releases until November 2026 had it
INDEXED = ("run_id", "stage", "state", "started_at", "ended_at")
PROPERTIES = delta.PROPERTIES | {  # 4,400 runs a day, each a commit; with every one kept the table opens more slowly
    "delta.logRetentionDuration": "interval 2 hours",
    "delta.dataSkippingStatsColumns": ",".join(INDEXED),
}
JSON_COLUMNS = (
    *("error", "parameters", "origins", "metrics", "checks", "versions_read", "versions_written"),
    *("provenance", "cells", "receipt"),
)
TIME_COLUMNS = ("scheduled_for", "started_at", "ended_at")
COMPLETE = "run.json"  # of a report's files the last to come and the first to go
BEFORE, USUAL = 100, 20  # runs that are looked through for what was before one, and for what it takes usually
NEAR = 50  # runs that are looked through for one whose report is kept
LISTED = ("run_id", "stage", "state", "reason", *TIME_COLUMNS, "seconds", "attempt", "report")


def schema() -> dict[str, Any]:
    """Column names and Polars types; JSON columns hold text."""
    import polars as pl

    moment = pl.Datetime("us", "UTC")
    return {
        "run_id": pl.String,
        "stage": pl.String,
        "state": pl.String,
        "reason": pl.String,
        "error": pl.String,
        "scheduled_for": moment,
        "started_at": moment,
        "ended_at": moment,
        "seconds": pl.Float64,
        "attempt": pl.Int64,
        "parameters": pl.String,
        "origins": pl.String,
        "metrics": pl.String,
        "versions_read": pl.String,
        "versions_written": pl.String,
        "checks": pl.String,
        "report": pl.String,
        "host": pl.String,
        "parent": pl.String,
        "release": pl.String,
        "provenance": pl.String,
        "cells": pl.String,
        "receipt": pl.String,
    }


def frame(records: Iterable["RunRecord"]) -> Any:
    """The rows of RunRecords, as a Polars frame of `schema`."""
    import polars as pl

    rows = []
    for record in records:
        row = {name: getattr(record, name) for name in schema()}
        row |= {name: json.dumps(row[name], default=str) for name in JSON_COLUMNS if row[name] is not None}
        row |= {name: datetime.datetime.fromisoformat(row[name]) for name in TIME_COLUMNS}
        rows.append(row)
    return pl.DataFrame(rows, schema=schema(), orient="row")


def append(root: Root, record: "RunRecord") -> None:
    """Add the row of a RunRecord; on the disk when this returns. Several processes may append at once, also the first
    time."""
    move_from_lake(root)
    about = {"run_id": record.run_id, "stage": record.stage}
    added = delta.put(root, TABLE, f"{uuid.uuid4()}.parquet", frame([record]), changes=True, columns=INDEXED)
    version = _with_all_columns(root, about) + 1
    lines = [delta.commit_info("WRITE", {"operationParameters": {"mode": "Append"}, **about}), added]
    while not delta.commit(root, TABLE, version, lines):
        version += 1
    if (version + 1) % delta.CHECKPOINT_INTERVAL == 0:
        root.table(TABLE).cleanup_metadata()


_moved: set[str] = set()  # roots of which this process has seen that nothing is to be moved
_up_to_date: set[str] = set()  # roots whose index this process has seen with all columns


def move_from_lake(root: Root) -> None:
    """Bring the index of an older release to where it is now. Safe to race, and to kill: the next call ends it.

    It has been moved once its newest commit is here, which comes last.
    """
    if root.url in _moved:
        return
    if root.names(delta.log_of(OLDER)):
        with root.lease("services/index.lease", f"process {os.getpid()}", wait_s=120):
            newest, here = _newest_name(root, OLDER), _newest_name(root, TABLE)
            if newest > here:
                root.move_tree(OLDER, TABLE, last=f"_delta_log/{newest}")
            elif newest == here and _is_copy(root, newest):  # whoever moved it died before the old one was gone
                root.remove_tree(OLDER)
    _moved.add(root.url)


def _newest_name(root: Root, table: str) -> str:
    """The last name in a table's log, of the newest version; empty when there is none."""
    return max((name for name in root.names(delta.log_of(table)) if delta.NUMBERED.match(name)), default="")


def _is_copy(root: Root, name: str) -> bool:
    """Whether a file of the older log is in the one here, byte for byte."""
    old, new = (f"{delta.log_of(table)}/{name}" for table in (OLDER, TABLE))
    return root.exists(new) and root.read(old) == root.read(new)


def _is_to_be_moved(root: Root) -> bool:
    return root.url not in _moved and _newest_name(root, OLDER) > _newest_name(root, TABLE)


def _readable(root: Root) -> str:
    """Where the table can be read: in a root that may not be written to perhaps where an older release had it."""
    try:
        move_from_lake(root)
    except OSError:
        if not _is_to_be_moved(root):
            raise
        return OLDER
    return TABLE


def is_there(root: Root) -> bool:
    """Whether the root has an index, be it of an older release. Changes nothing."""
    return any(root.names(delta.log_of(table)) for table in (TABLE, OLDER))


def examine(root: Root) -> list[findings.Finding]:
    """Whether the index can be read, all of it, and what to do when it cannot. Changes nothing."""
    return findings.inspect("the index of runs", lambda: _problems(root))


def _problems(root: Root) -> Iterator[tuple[str, str]]:
    table = OLDER if _is_to_be_moved(root) else TABLE
    for problem in findings.damages(root, table):
        yield problem, f"restore it, or remove {table}: rows are lost, reports stay"
    if table == TABLE and root.names(delta.log_of(OLDER)):
        problem = f"{OLDER} is there as well: its rows are in no list"
        yield problem, f"end what still runs of an older release, and remove {OLDER}"


def _with_all_columns(root: Root, about: dict[str, Any]) -> int:
    """Make the table, or give one of an older release the newer columns; the newest version."""
    version = delta.newest_version(root, TABLE)
    if version is None:
        delta.create_table(root, TABLE, schema(), keys=(), properties=PROPERTIES, about=about)
        version = 0
    elif root.url not in _up_to_date:
        table = root.table(TABLE)
        fields = json.loads(table.schema().to_json())["fields"]
        known = {field["name"] for field in fields}
        newer = [delta.field(name, dtype, nullable=True) for name, dtype in schema().items() if name not in known]
        what = delta.meta_data("runs", fields + newer, PROPERTIES, table_id=str(table.metadata().id))
        lines = [delta.commit_info("ADD COLUMNS", about), what]
        if newer and delta.commit(root, TABLE, table.version() + 1, lines):
            version = table.version() + 1
    _up_to_date.add(root.url)
    return version


def newest(
    root: Root,
    stage: str | None = None,
    state: str | Sequence[str] | None = None,
    since: datetime.datetime | str | None = None,
    until: datetime.datetime | str | None = None,
    limit: int = 50,
    search: str = "",
) -> list[dict[str, Any]]:
    """The last runs that started at `since` or later and before `until` (ISO text or times; UTC unless they say).

    `state`: one, or any of several. `search`: what stands in the run's id, its state or its reason.
    Newest first: run_id, stage, state, reason, times, seconds, attempt, report, and `kept`: whether it is there.
    """
    runs = _matching(root, stage, state, since, until, search).select(LISTED).head(limit)
    return _kept(root, [_as_record(row) for row in runs.collect().to_dicts()])


def beside(root: Root, record: dict[str, Any], after: bool) -> dict[str, Any] | None:
    """The next run of the same stage whose report is kept, or the one before, as in `newest`; None without one."""
    import polars as pl

    began = utc(record["started_at"])
    runs = _matching(root, record["stage"], None, began if after else None, None if after else began)
    runs = runs.filter(pl.col("run_id") != record["run_id"]).select(LISTED)
    rows = (runs.reverse() if after else runs).head(NEAR).collect().to_dicts()
    return next((run for run in _kept(root, [_as_record(row) for row in rows]) if run["kept"]), None)


def by_day(root: Root, since: datetime.date) -> list[dict[str, Any]]:
    """stage, day, how many runs began then (UTC), and how many of them ended neither ok nor noop."""
    import polars as pl

    day, good = pl.col("started_at").dt.date().alias("day"), pl.col("state").is_in(["ok", "noop"])
    runs = scan(root).select("stage", day, good.not_().alias("bad")).filter(pl.col("day") >= since)
    return list(runs.group_by("stage", "day").agg(pl.len().alias("runs"), pl.col("bad").sum()).collect().to_dicts())


def ranked(
    root: Root,
    metric: str,
    *,
    highest: bool = False,
    stage: str | None = None,
    state: str | None = None,
    since: datetime.datetime | str | None = None,
    until: datetime.datetime | str | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """As `newest`, of the runs that recorded a number as this metric, which each has as `value`: the lowest first,
    or the highest; of equal ones the newest."""
    import polars as pl

    runs = _matching(root, stage, state, since, until)
    runs = runs.filter(pl.col("metrics").str.contains(json.dumps(metric), literal=True))
    rows = [_as_record(row) for row in runs.select(*LISTED, "metrics").collect().to_dicts()]
    valued = [row | {"value": value} for row in rows if _is_number(value := row.pop("metrics").get(metric))]
    return _kept(root, sorted(valued, key=lambda row: row["value"], reverse=highest)[:limit])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def told(
    root: Root,
    stages: Iterable[str] | None = None,
    *,
    state: Sequence[str] | None = None,
    since: datetime.datetime | None = None,
    scheduled: tuple[datetime.datetime | None, datetime.datetime | None] = (None, None),
) -> list[dict[str, Any]]:
    """The runs (of these stages, in one of these states) that started at `since` or later and were scheduled between
    two times, both included; in the order they started.

    Each with run_id, stage, state, scheduled_for, started_at, parent and parameters.
    """
    import polars as pl

    index, columns = scan(root), ("run_id", "stage", "state", "scheduled_for", "started_at", "parent", "parameters")
    conditions = [pl.lit(True)]
    conditions += [pl.col("stage").is_in(list(stages))] if stages is not None else []
    conditions += [pl.col("state").is_in(list(state))] if state else []
    conditions += [pl.col("started_at") >= since] if since else []
    conditions += [pl.col("scheduled_for") >= scheduled[0]] if scheduled[0] else []
    conditions += [pl.col("scheduled_for") <= scheduled[1]] if scheduled[1] else []
    rows = index.filter(conditions).select(columns).sort("started_at", "run_id").collect()
    return [_as_record(row) for row in rows.to_dicts()]


def tails(
    root: Root, each: int, tables: Iterable[str] = ()
) -> tuple[list[dict[str, Any]], dict[str, datetime.datetime], dict[str, datetime.datetime]]:
    """By one read: (the last `each` runs of every stage, in the order in which they ended; stage -> when a run of it
    was ok or noop last; table -> when an ok run wrote it last).

    A run as in `newest`, its times as such, without `kept`, with versions_written and of its error heading and cell.
    """
    import polars as pl

    of_error = [pl.col("error").str.json_path_match(f"$.{name}").alias(name) for name in ("heading", "cell")]
    runs = scan(root).select(*LISTED, "versions_written", *of_error).sort("ended_at", "run_id").collect()
    fine = runs.filter(pl.col("state").is_in(["ok", "noop"])).group_by("stage").agg(pl.last("ended_at"))
    writers = runs.filter(pl.col("state") == "ok")
    written = {
        table: writers.filter(pl.col("versions_written").str.json_path_match(f"$['{table}']").is_not_null())["ended_at"]
        for table in tables
    }
    rows = runs.group_by("stage", maintain_order=True).tail(each).sort("ended_at", "run_id").to_dicts()
    rows = [row | {"versions_written": json.loads(row["versions_written"] or "{}")} for row in rows]
    last_written = {table: times[-1] for table, times in written.items() if len(times)}
    return rows, dict(fine.iter_rows()), last_written


def find_last(root: Root, stage: str, before: datetime.datetime | str | None = None) -> dict[str, Any] | None:
    """The last run of a stage that was ok and started before a time: as in `newest`, and its parameters, provenance."""
    last = _matching(root, stage, "ok", None, before).select(*LISTED, "parameters", "provenance").head(1)
    rows = _kept(root, [_as_record(row) for row in last.collect().to_dicts()])
    return rows[0] if rows else None


def before(root: Root, record: dict[str, Any]) -> Before:
    """What came before a run in its stage, by its record; nothing when the index cannot be read."""
    import polars as pl

    try:
        runs = _matching(root, record["stage"], None, None, record["started_at"])
        rows = runs.filter(pl.col("run_id") != record["run_id"]).select("run_id", "state", "seconds", "report")
        last = rows.head(BEFORE).collect().to_dicts()
        ok = [row for row in last if row["state"] == "ok"][:USUAL]
        good = ok[0] if ok else find_last(root, record["stage"], before=record["started_at"])
        usual_s = median(row["seconds"] for row in ok) if ok else None
        return Before(good and get(root, good["run_id"]), last[0] if last else None, usual_s)
    except Exception:  # a report without it is still a report
        log.debug("nothing before %s", record["run_id"], exc_info=True)
        return Before()


def last_ok(record: "RunRecord") -> dict[str, Any] | None:
    """The record of the stage's last run that was ok before this one; None, too, when the index cannot be read."""
    try:
        root = Root.at(record.root)
        last = find_last(root, record.stage, before=record.started_at)
        return last and get(root, last["run_id"])
    except Exception:  # a report without it is still a report
        log.debug("no last run of %s", record.stage, exc_info=True)
        return None


def find_writer(root: Root, table: str, version: int) -> dict[str, Any] | None:
    """The run that recorded that it wrote this version of a table: run_id, stage, ended_at; None when none did."""
    import polars as pl

    wrote = pl.col("versions_written").str.json_path_match(f"$.{table}") == str(version)
    runs = scan(root).filter(wrote).sort("started_at").select("run_id", "stage", "ended_at").head(1).collect()
    return _as_record(runs.row(0, named=True)) if runs.height else None


def indexed(root: Root, run_id: str) -> bool:
    """Whether the run has its row."""
    import polars as pl

    return not scan(root).filter(pl.col("run_id") == run_id).select("run_id").head(1).collect().is_empty()


def get(root: Root, run_id: str) -> dict[str, Any]:
    """All that is known of a run, by its id or the beginning of it; `kept`: whether its report is there.

    Raises KeyError when there is no such run, or several.
    """
    import polars as pl

    whole = re.fullmatch(r"([\w-]+)-(\d{4})(\d\d)(\d\d)T\d{6}-[0-9a-f]{6}", run_id, re.A)
    if whole:  # says where its report is
        stage, year, month, day = whole.groups()
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # swept, or damaged: its row tells
            return _read(root, f"reports/{stage}/{year}-{month}-{day}/{run_id}")
    index = scan(root)
    ids = index.filter(pl.col("run_id").str.starts_with(run_id)).select(pl.col("run_id").unique()).collect()["run_id"]
    if run_id not in ids:
        if len(ids) != 1:
            raise KeyError(f"{len(ids)} runs begin with {run_id!r}")
        run_id = ids[0]
    [row] = index.filter(pl.col("run_id") == run_id).head(1).collect().to_dicts()
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return _read(root, row["report"])
    return _as_record(row) | {"kept": False}


def scan(root: Root) -> Any:
    """A lazy Polars frame over the index, of no rows before the first run."""
    import polars as pl
    from deltalake.exceptions import TableNotFoundError

    try:
        table = root.table(_readable(root))
    except TableNotFoundError:
        return pl.LazyFrame(schema=schema())
    return pl.scan_delta(table, storage_options=root.storage_options or None)


def _matching(root: Root, stage: str | None, state: Any, since: Any, until: Any, search: str = "") -> Any:
    """The runs that are asked for, the newest first, as a lazy frame."""
    import polars as pl

    index, started = scan(root), pl.col("started_at")
    if stage is not None:
        index = index.filter(stage=stage)
    if state is not None:
        index = index.filter(pl.col("state").is_in([state] if isinstance(state, str) else state))
    if since is not None:
        index = index.filter(started >= utc(since))
    if until is not None:
        index = index.filter(started < utc(until))
    if search:
        words = pl.concat_str("run_id", "state", "reason", separator=" ", ignore_nulls=True)
        index = index.filter(words.str.to_lowercase().str.contains(search.lower(), literal=True))
    return index.sort("started_at", "run_id", descending=True)


def _kept(root: Root, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    complete = root.each(lambda row: root.exists(f"{row['report']}/{COMPLETE}"), rows)
    return [row | {"kept": kept} for row, kept in zip(rows, complete, strict=True)]


def _read(root: Root, report: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(root.read(f"{report}/{COMPLETE}"))
    return record | {"kept": True}


def _as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its JSON read and its times as in run.json."""
    for name, value in row.items():
        if name in JSON_COLUMNS and value is not None:
            row[name] = json.loads(value)
        elif name in TIME_COLUMNS:
            row[name] = value.isoformat(timespec="milliseconds")
    return row
