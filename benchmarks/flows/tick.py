"""A flow that says how late it began, for scheduled_run.py: as little as a flow can do."""

import json
import time
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run


@flow
def tick(folder: str) -> None:
    late_s = time.time() - flow_run.scheduled_start_time.timestamp()
    with Path(folder, "ticks.jsonl").open("a") as file:
        file.write(json.dumps(late_s) + "\n")
