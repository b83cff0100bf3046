"""The index of runs: the Delta table lake/runs, one row a run, appended when the run has ended and never removed.

A row does not know whether its report is still there: the report's folder does, and `kept` is read from it.
"""

import contextlib
import datetime
import io
import json
import logging
import random
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from etl.storage import Root, no_panic

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.runs.record import RunRecord

log = logging.getLogger(__name__)
TABLE = "lake/runs"
INDEXED = ("run_id", "stage", "state", "started_at", "ended_at")
PROPERTIES = {  # 4,400 runs a day, each a commit; opening the table takes longer with every commit kept
    "delta.checkpointInterval": "20",
    "delta.logRetentionDuration": "interval 2 hours",
    "delta.deletedFileRetentionDuration": "interval 24 hours",
    "delta.dataSkippingStatsColumns": ",".join(INDEXED),
}
TRIES = 20
JSON_COLUMNS = (
    *("error", "parameters", "origins", "metrics", "checks", "versions_read", "versions_written"),
    *("provenance", "cells", "receipt"),
)
TIME_COLUMNS = ("scheduled_for", "started_at", "ended_at")
COMPLETE = "run.json"  # of a report's files the last to come and the first to go
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
    """Add the row of a RunRecord. Several processes may append at once, also the first time.

    Raises deltalake's CommitFailedError when other writers win twenty times in a row.
    """
    from deltalake import CommitProperties
    from deltalake.exceptions import CommitFailedError, DeltaError
    from deltalake.transaction import AddAction

    who = CommitProperties(custom_metadata={"run_id": record.run_id, "stage": record.stage})
    row, path, buffer = frame([record]), f"run-{uuid.uuid4()}.parquet", io.BytesIO()
    row.write_parquet(buffer)
    # not by write_deltalake, which panics when there is one of []^| in the table's path
    root.write(f"{TABLE}/{path}", buffer.getvalue())
    added = AddAction(path, len(buffer.getvalue()), {}, time.time_ns() // 1_000_000, True, _statistics(row))
    for attempt in range(TRIES):
        try:
            with no_panic():
                table = _open_for(root, row, who)
                table.create_write_transaction([added], "append", table.schema(), commit_properties=who)
            return
        except (CommitFailedError, DeltaError):
            if attempt == TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.05 * (attempt + 1)))


def _open_for(root: Root, row: Any, who: Any) -> "DeltaTable":
    """The table, made when there is none; one of an older release gains the newer columns."""
    import polars as pl
    from deltalake import DeltaTable, Schema
    from deltalake.exceptions import TableNotFoundError

    wanted = Schema.from_arrow(row.to_arrow(compat_level=pl.CompatLevel.oldest()).schema)
    try:
        table = root.table(TABLE)
    except TableNotFoundError:
        made = {"mode": "ignore", "configuration": PROPERTIES, "commit_properties": who}
        DeltaTable.create(root.url_of(TABLE), wanted, storage_options=root.storage_options, **made)
        table = root.table(TABLE)
    columns = {field.name for field in table.schema().fields}
    if newer := [field for field in wanted.fields if field.name not in columns]:
        table.alter.add_columns(newer, commit_properties=who)
        table = root.table(TABLE)
    return table


def _statistics(row: Any) -> str:
    """What the Delta log says of a file that holds one row, as JSON."""
    values = row.row(0, named=True)
    indexed = {name: values[name] for name in INDEXED}
    for name in TIME_COLUMNS:
        if name in indexed:
            indexed[name] = indexed[name].isoformat(timespec="microseconds").replace("+00:00", "Z")
    nulls = dict.fromkeys(INDEXED, 0)
    return json.dumps({"numRecords": 1, "minValues": indexed, "maxValues": indexed, "nullCount": nulls})


def list(
    root: Root,
    stage: str | None = None,
    state: str | Sequence[str] | None = None,
    since: datetime.datetime | str | None = None,
    until: datetime.datetime | str | None = None,
    limit: int = 50,
) -> list[dict]:
    """The last runs that started at `since` or later and before `until` (ISO text or times; UTC unless they say).

    `state`: one, or any of several.
    Newest first: run_id, stage, state, reason, times, seconds, attempt, report, and `kept`: whether it is there.
    """
    return _newest(root, LISTED, limit, stage, state, since, until)


def find_last(root: Root, stage: str, state: str = "ok", before: datetime.datetime | str | None = None) -> dict | None:
    """The last run of a stage in a state that started before a time: as in `list`, and its parameters, provenance."""
    found = _newest(root, (*LISTED, "parameters", "provenance"), 1, stage, state, None, before)
    return found[0] if found else None


def last_ok(record: "RunRecord") -> dict | None:
    """The record of the stage's last run that was ok before this one; None, too, when the index cannot be read."""
    try:
        root = Root.at(record.root)
        last = find_last(root, record.stage, before=record.started_at)
        return last and get(root, last["run_id"])
    except Exception:  # a report without it is still a report
        log.debug("no last run of %s", record.stage, exc_info=True)
        return None


def indexed(root: Root, run_id: str) -> bool:
    """Whether the run has its row."""
    import polars as pl

    return not scan(root).filter(pl.col("run_id") == run_id).select("run_id").head(1).collect().is_empty()


def get(root: Root, run_id: str) -> dict:
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
        table = root.table(TABLE)
    except TableNotFoundError:
        return pl.LazyFrame(schema=schema())
    return pl.scan_delta(table, storage_options=root.storage_options or None)


def _newest(
    root: Root, columns: tuple, limit: int, stage: str | None, state: Any, since: Any, until: Any
) -> Sequence[dict]:
    import polars as pl

    index, started = scan(root), pl.col("started_at")
    if stage is not None:
        index = index.filter(stage=stage)
    if state is not None:
        index = index.filter(pl.col("state").is_in([state] if isinstance(state, str) else state))
    if since is not None:
        index = index.filter(started >= _moment(since))
    if until is not None:
        index = index.filter(started < _moment(until))
    newest = index.select(columns).sort("started_at", "run_id", descending=True).head(limit)
    rows = [_as_record(row) for row in newest.collect().to_dicts()]
    with ThreadPoolExecutor(16) as pool:  # in an object store each is a request
        there = pool.map(lambda row: root.exists(f"{row['report']}/{COMPLETE}"), rows)
        return [row | {"kept": kept} for row, kept in zip(rows, there, strict=True)]


def _read(root: Root, report: str) -> dict:
    return json.loads(root.read(f"{report}/{COMPLETE}")) | {"kept": True}


def _moment(time: datetime.datetime | str) -> datetime.datetime:
    moment = datetime.datetime.fromisoformat(time) if isinstance(time, str) else time
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _as_record(row: dict) -> dict:
    """A row with its JSON read and its times as in run.json."""
    for name, value in row.items():
        if name in JSON_COLUMNS and value is not None:
            row[name] = json.loads(value)
        elif name in TIME_COLUMNS:
            row[name] = value.isoformat(timespec="milliseconds")
    return row
