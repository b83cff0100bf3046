"""Flows that end in every way, run by Prefect's process worker and by ours; see tests/etl/serve/test_worker.py."""

import time
from pathlib import Path

from prefect import flow, get_run_logger, runtime
from prefect.states import Cancelled, Failed

from etl.serve.worker import current_turn


@flow
def completes(marks: str) -> None:
    get_run_logger().info("seen in Prefect's logs")


@flow
def fails(marks: str) -> None:
    raise ValueError("planted")


@flow
def says_failed(marks: str):
    return Failed(name="CheckFailed", message="two rows")


@flow(retries=1, retry_delay_seconds=0)
def is_retried(marks: str) -> None:
    if runtime.flow_run.run_count == 1:
        raise ValueError("planted")


@flow
def crashes(marks: str) -> None:
    raise SystemExit(3)


@flow
def waits(marks: str):
    """Until it is cancelled: by its event in our worker, by a signal where it has a process of its own."""
    Path(marks, str(runtime.flow_run.id)).touch()
    current_turn().cancel.wait(60)
    return Cancelled(message="heeded")


@flow
def is_long(marks: str) -> None:
    Path(marks, "long").touch()
    until = time.monotonic() + 60
    while not Path(marks, "refused").exists() and time.monotonic() < until:
        time.sleep(0.1)
