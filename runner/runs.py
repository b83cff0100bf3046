"""The index of runs: the Delta table lake/runs, one row a run, appended when the run has ended."""

import datetime
import json
import random
import re
import time
from typing import Any

from storage import Root

TABLE = "lake/runs"
PROPERTIES = {  # 4,400 runs a day, each a commit
    "delta.checkpointInterval": "20",
    "delta.logRetentionDuration": "interval 7 days",
    "delta.deletedFileRetentionDuration": "interval 24 hours",
}
TRIES = 20
JSON_COLUMNS = ("error", "parameters", "origins", "metrics", "checks", "versions_read", "versions_written")
TIME_COLUMNS = ("scheduled_for", "started_at", "ended_at")
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
    }


def append(root: Root, record: Any) -> None:
    """Add the row of a RunRecord. Several processes may append at once, also the first time.

    Raises deltalake's CommitFailedError when other writers win twenty times in a row.
    """
    import polars as pl
    from deltalake import CommitProperties, write_deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    row = {name: getattr(record, name) for name in schema()}
    row |= {name: json.dumps(row[name], default=str) for name in JSON_COLUMNS if row[name] is not None}
    row |= {name: datetime.datetime.fromisoformat(row[name]) for name in TIME_COLUMNS}
    frame = pl.DataFrame([row], schema=schema())
    who = CommitProperties(custom_metadata={"run_id": record.run_id, "stage": record.stage})
    for attempt in range(TRIES):
        try:
            write_deltalake(
                root.url_of(TABLE),
                frame,
                mode="append",
                configuration=PROPERTIES,
                storage_options=root.storage_options,
                commit_properties=who,
            )
            return
        except (CommitFailedError, DeltaError):
            if attempt == TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.05 * (attempt + 1)))


def list(root: Root, stage: str | None = None, state: str | None = None, limit: int = 50) -> list[dict]:
    """The last runs, newest first: run_id, stage, state, reason, times, seconds, attempt, report."""
    import polars as pl

    frame = _scan(root)
    if frame is None:
        return []
    for column, wanted in (("stage", stage), ("state", state)):
        if wanted is not None:
            frame = frame.filter(pl.col(column) == wanted)
    newest = frame.select(LISTED).sort("started_at", "run_id", descending=True).head(limit)
    return [_as_record(row) for row in newest.collect().to_dicts()]


def get(root: Root, run_id: str) -> dict:
    """All that is known of a run, by its id or the beginning of it.

    Raises KeyError when there is no such run, or several.
    """
    import polars as pl

    whole = re.fullmatch(r"([\w-]+)-(\d{4})(\d\d)(\d\d)T\d{6}-[0-9a-f]{6}", run_id, re.A)
    if whole:  # says where its report is
        stage, year, month, day = whole.groups()
        try:
            return json.loads(root.read(f"reports/{stage}/{year}-{month}-{day}/{run_id}/run.json"))
        except FileNotFoundError:
            pass
    frame, rows = _scan(root), []
    if frame is not None:
        rows = frame.filter(pl.col("run_id").str.starts_with(run_id)).collect().to_dicts()
    rows = [row for row in rows if row["run_id"] == run_id] or rows
    if len(rows) != 1:
        raise KeyError(f"{len(rows)} runs begin with {run_id!r}")
    try:
        return json.loads(root.read(f"{rows[0]['report']}/run.json"))
    except FileNotFoundError:
        return _as_record(rows[0])


def _scan(root: Root) -> Any:
    """A lazy frame over the table, or None before the first run."""
    import polars as pl
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    try:
        table = DeltaTable(root.url_of(TABLE), storage_options=root.storage_options)
    except TableNotFoundError:
        return None
    return pl.scan_delta(table, storage_options=root.storage_options or None)


def _as_record(row: dict) -> dict:
    """A row with its JSON read and its times as in run.json."""
    for name, value in row.items():
        if name in JSON_COLUMNS and value is not None:
            row[name] = json.loads(value)
        elif name in TIME_COLUMNS:
            row[name] = value.isoformat(timespec="milliseconds")
    return row
