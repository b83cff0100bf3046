"""Six things that go wrong under a root, each seeded by a function: nothing runs, no `up` is at work."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from etl.runs import index
from etl.runs.record import RunRecord
from etl.serve import heartbeat
from etl.storage import Root

STAGES = ("generate", "preprocess", "compact", "query", "score", "train")


def record(url: str, run_id: str, started: datetime, seconds: float, **more) -> RunRecord:
    """Of a run that was due when it began."""
    stage = run_id.split("-")[0]
    return RunRecord(
        stage=stage,
        run_id=run_id,
        root=url,
        scheduled_for=started.isoformat(),
        attempt=1,
        parameters={},
        origins={},
        report=f"reports/{stage}/{started:%Y-%m-%d}/{run_id}",
        host="here",
        started_at=started.isoformat(),
        ended_at=(started + timedelta(seconds=seconds)).isoformat(),
        seconds=seconds,
        **more,
    )


def ended(
    url: str, stage: str, state: str = "ok", reason: str = "", *, ago_s: float = 5, tables: dict | None = None
) -> str:
    """A run that ended so long ago has its row; returns its id."""
    at = datetime.now(UTC) - timedelta(seconds=ago_s)
    run_id = f"{stage}-{at:%Y%m%dT%H%M%S}-{at.microsecond:06x}"
    about = {"state": state, "reason": reason, "versions_written": tables or {}}
    index.append(Root.at(url), record(url, run_id, at - timedelta(seconds=2), 2.0, **about))
    return run_id


def beat(url: str, ago_s: float = -3600) -> None:
    """The heartbeat of an `up` on another machine, at work for a day; by default for an hour to come."""
    now = datetime.now(UTC)
    since = (now - timedelta(days=1)).isoformat()
    told = {"pid": 7, "started": 1, "machine": "another", "host": "home", "since": since, "expected_since": since}
    told |= {"at": (now - timedelta(seconds=ago_s)).isoformat(), "release": None, "env": "local", "pages": {}}
    Root.at(url).write(heartbeat.PLACE, json.dumps(told).encode())


def healthy(url: str) -> None:
    """Every stage has just run well, and `up` is at work."""
    beat(url)
    for stage in STAGES:
        ended(url, stage)


def dead_generate(url: str) -> None:
    """The first stage ran well 53 minutes ago and never since; to be called before there are later runs of it."""
    ended(url, "generate", ago_s=53 * 60)


def dead_up(url: str) -> None:
    """`up` was last heard of 20 minutes ago."""
    beat(url, ago_s=20 * 60)


def failed_train(url: str) -> None:
    ended(url, "train", "failed", "ValueError: no such column: `l_shipdate`", ago_s=1)


def growing_quarantine(url: str) -> None:
    ended(url, "preprocess", tables={"quarantine": 1}, ago_s=1)


def stale_answers(url: str) -> None:
    """The answers are of days ago, and batches behind."""
    for pointer in Path(url).glob("results/*/current.json"):
        pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"batch": 0}))


def damaged_table(url: str, table: str) -> None:
    """A file of a table has lost its end."""
    damaged = next(Path(url).glob(f"lake/{table}/*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
