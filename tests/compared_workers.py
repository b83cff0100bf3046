"""Run the flows of compared_flows.py by one worker, and print how they ended as JSON: {flow: [type, name, run count]}.

python tests/compared_workers.py in-place|process FOLDER
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from etl.serve.worker import InPlaceWorker  # isort: skip  # before Prefect's settings are read

import compared_flows
from prefect import Flow, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.states import Cancelling
from prefect.workers.process import ProcessWorker

HERE = Path(__file__).parent
LIMIT = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
FLOWS = ("completes", "fails", "says_failed", "is_retried", "crashes", "waits", "is_long")


async def main(kind: str, marks: Path) -> None:
    async with get_client() as client:
        ids = await deploy(client, kind, marks)
        if kind == "process":
            worker = ProcessWorker(work_pool_name=kind)
        else:
            flows = {ids[name]: getattr(compared_flows, name) for name in FLOWS}
            lost, theirs = [await another(client, kind, name) for name in ("lost", "theirs")]
            worker = InPlaceWorker({**flows, lost.deployment_id: None}, work_pool_name=kind)  # no flow at all
        working = asyncio.create_task(worker.start(printer=lambda _: None))
        runs = {name: (await client.create_flow_run_from_deployment(ids[name])).id for name in FLOWS}
        await there(marks, "long")
        runs["is_refused"] = (await client.create_flow_run_from_deployment(ids["is_long"])).id
        await ended(client, runs["is_refused"])
        (marks / "refused").touch()
        await there(marks, str(runs["waits"]))
        await client.set_flow_run_state(runs["waits"], Cancelling())
        found = {name: await ended(client, run) for name, run in runs.items()}
        of_one = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[runs["completes"]]))
        while not (
            logs := [log for log in await client.read_logs(of_one, limit=200, offset=0) if "seen" in log.message]
        ):
            await asyncio.sleep(0.2)
        if kind == "in-place":
            assert (await ended(client, lost.id))[0] == "CRASHED", "a run whose end nobody could tell"
            assert (await client.read_flow_run(theirs.id)).state.is_scheduled(), "what others have in the pool"
        found["logs"] = [[log.name, log.message] for log in logs]
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    print(json.dumps(found), flush=True)
    os._exit(0)


async def deploy(client, kind: str, marks: Path) -> dict:
    """A pool of this kind and a deployment of every flow in it: flow -> id."""
    await client.create_work_pool(WorkPoolCreate(name=kind, type=kind))
    ids = {}
    for name in FLOWS:
        flow = await Flow.afrom_source(source=str(HERE), entrypoint=f"compared_flows.py:{name}")
        options = {"parameters": {"marks": str(marks)}, "work_pool_name": kind, "concurrency_limit": LIMIT}
        ids[name] = await (await flow.to_deployment(f"{name} {kind}", **options)).apply(work_pool_name=kind)
    return ids


async def another(client, kind: str, name: str):
    """A run of one more deployment in the pool."""
    flow = await Flow.afrom_source(source=str(HERE), entrypoint="compared_flows.py:completes")
    deployment = await flow.to_deployment(name, work_pool_name=kind, parameters={"marks": "none"})
    return await client.create_flow_run_from_deployment(await deployment.apply(work_pool_name=kind))


async def there(marks: Path, name: str) -> None:
    until = time.monotonic() + 90
    while not (marks / name).exists():
        assert time.monotonic() < until, name
        await asyncio.sleep(0.1)


async def ended(client, run) -> list:
    while not (flow_run := await client.read_flow_run(run)).state.is_final():
        await asyncio.sleep(0.2)
    return [flow_run.state.type.value, flow_run.state.name, flow_run.run_count]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
