"""Flows run by our worker, on a real server, and who else may ask that server for anything."""

import asyncio
import contextlib
import gc
import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import pytest
from faults.workers import EXPECTED, ended, failing, prefect_server
from prefect import Flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.client.schemas.sorting import DeploymentSort, FlowRunSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running
from support import WEBSOCKET, asked

from etl import params
from etl.serve import flows, scheduled
from etl.serve.scheduled import ScheduledRuns
from etl.serve.worker import AT_ONCE, POOL, SCHEDULED, InPlaceWorker, current_turn
from etl.storage import Root

ELSEWHERE = "http://evil.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("prefect")) as variables:
        yield variables


def test_every_flow_ends_in_the_state_that_it_has_with_prefects_own_worker(server, tmp_path):
    """That Prefect's process worker gives the same is provoked by `make faults`: it takes a minute of CPU.

    Here the server fails now and then: runs are begun, and cancelled, all the same.
    """
    with failing(server, b"POST /api/flow_runs/filter", b"GET /api/deployments/[0-9a-f]{8}-", times=2) as way:
        [ours] = ended(way, tmp_path, "in-place")
    assert ours == EXPECTED


def test_no_page_of_the_web_can_use_prefects_server(server):
    port = int(server["PREFECT_API_URL"].split(":")[2].split("/")[0])
    own, its_name = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:5200"):  # the last by a tunnel
        assert asked(port, "/api/health", host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example"):  # by a name that leads here
        status, _, body = asked(port, "/api/health", host=host)
        assert status == 403 and b"is no name of this server" in body

    asks = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    for origin, expected in ((own, own), (its_name, its_name), (ELSEWHERE, None), ("null", None)):
        status, headers, _ = asked(port, "/api/flows/filter", "OPTIONS", origin=origin, **asks)
        assert headers.get("access-control-allow-origin") == expected and (status == 200) == (expected is not None)
    # what a browser sends without asking first
    planted = asked(port, "/api/flows/", "POST", json.dumps({"name": "planted"}), origin=ELSEWHERE)
    assert planted[0] == 403
    status, _, body = asked(port, "/api/flows/filter", "POST", "{}", origin=own, content_type="application/json")
    assert status == 200 and "planted" not in body.decode()
    # CORS does not hold for these
    for origin, expected in ((own, 101), (ELSEWHERE, 403)):
        headers = {name.replace("-", "_"): value for name, value in WEBSOCKET.items()}
        assert asked(port, "/api/events/out", origin=origin, **headers)[0] == expected

    page = asked(port, "/dashboard", accept="text/html")
    assert page[0] in (200, 307) and asked(port, "/ui-settings")[0] == 200


def test_a_server_that_answers_again_is_not_away_until_it_knows_all_that_it_missed(server):
    told = []

    async def announced() -> None:
        with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}):
            async with get_client() as client:
                runs = ScheduledRuns(client, print, print, print, lambda text: told.append((text, len(runs._untold))))
                runs._has_warned, runs._untold = True, [(uuid4(), Completed())] * (AT_ONCE + 1)
                await runs.announce()
                told.append(("", len(runs._untold)))

    asyncio.run(announced())
    assert told == [("Prefect's server answers again", AT_ONCE), ("", 1)]


def test_deployments_of_earlier_versions_are_removed_unless_they_may_be_of_another_root(server, project):
    environment = params.load(project, "local").environment
    every = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=10)), active=True)

    async def removed() -> list[set[str]]:
        left = []
        with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}):
            async with get_client() as client:
                with contextlib.suppress(ObjectAlreadyExists):
                    await client.create_work_pool(WorkPoolCreate(name=POOL, type=POOL))
                for name, tags in [("oldest", ["etl", "local"]), ("older", ["etl", Root.at(environment.root).url])]:
                    flow = await client.create_flow_from_name(name)
                    made = {"work_pool_name": POOL, "tags": tags, "concurrency_limit": 1, "schedules": [every]}
                    await client.create_deployment(flow, name, **made)
                for shared in (True, False):
                    assert await flows._deployments(client, environment, POOL, shared) == {}
                    told = await client.read_deployments(sort=DeploymentSort.NAME_ASC, limit=200)
                    left.append({deployment.name for deployment in told} & {"oldest", "older"})
        return left

    assert asyncio.run(removed()) == [{"oldest"}, set()]


def test_a_run_that_begins_while_stages_are_deployed_is_not_taken_for_one_that_was_left(server, project, monkeypatch):
    """It was closed as if its process were gone; where one run came after the other, that did not end."""
    whole, made, told = flows._apply, [], []

    async def applied_and_begun(*about):
        deployment_id = await whole(*about)
        made.append((await client.create_flow_run_from_deployment(deployment_id, state=Running())).id)
        return deployment_id

    async def states() -> set[str]:
        return {(await client.read_flow_run(run_id)).state.name for run_id in made}

    async def looked() -> list[set[str]]:
        nonlocal client
        seen = []
        with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}):
            async with get_client() as client:
                for _ in range(2):  # by one process, then by the next
                    runs = ScheduledRuns(client, print, print, print, print)
                    link = flows._Link(client, runs, {}, flows.stage_flow, False, told.append)
                    link.wanted = params.load(project, "local")
                    await link.look()
                    seen.append(await states())
                    monkeypatch.setattr(flows, "_apply", whole)
        return seen

    client = None
    monkeypatch.setattr(flows, "_apply", applied_and_begun)
    assert asyncio.run(looked()) == [{"Running"}, {"Crashed"}]
    stages = len(params.load(project, "local").stages)
    deployed = f"{stages} deployments"
    assert told == [deployed, f"closed {stages} runs that an earlier process left, and 0 that were missed", deployed]


def _lasts(begun: list[str], end: threading.Event) -> None:
    begun.append("without")
    end.wait(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # now and then Prefect leaves a socket
def test_a_run_that_began_without_the_server_is_under_way_there_once_it_answers(server, project, monkeypatch):
    monkeypatch.setattr(scheduled, "PATIENCE_S", 0.2)
    monkeypatch.setattr(logging.getLogger(scheduled.__name__), "disabled", True)
    begun, end = [], threading.Event()

    def flow_of(stage, environment):
        return Flow(lambda parameters=None: current_turn().run(lambda: begun.append("through")), name=stage.name)

    async def went() -> None:
        with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}):
            async with get_client() as client:
                loaded = params.load(project, "local", stage="generate")
                work = partial(_lasts, begun, end)
                runs = ScheduledRuns(client, lambda _, turn: turn.run(work), print, lambda _: Completed(), print)
                runs.follow(loaded.stages)
                runs._begin(loaded.stages["generate"], datetime.now(UTC))
                while not begun:
                    await asyncio.sleep(0.05)
                deployed = {}
                link = flows._Link(client, runs, deployed, flow_of, False, print)
                link.wanted = loaded
                await link.look()

                async def states() -> set[str]:
                    every = await client.read_flow_runs(sort=FlowRunSort.ID_DESC, limit=200)
                    return {run.state.name for run in every if SCHEDULED in run.tags}

                async def until(expected: set[str]) -> None:
                    for _ in range(600):
                        if await states() == expected:
                            return
                        await asyncio.sleep(0.1)
                    pytest.fail(f"{await states()}, not {expected}")

                async with InPlaceWorker(deployed, work_pool_name=POOL, name="here") as runs.worker:
                    await until({"Running"})
                    end.set()
                    await until({"Completed"})
                while runs.worker.turns or runs.under_way:
                    await asyncio.sleep(0.05)

    asyncio.run(went())
    assert begun == ["without"]
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # now and then Prefect leaves a socket
@pytest.mark.parametrize(
    "failed", [b"POST /api/deployments/[^/]*/create_flow_run", b"GET /api/deployments/[0-9a-f]{8}-"]
)
def test_a_run_that_began_while_the_server_was_away_is_under_way_there_once_it_answers(
    server, project, monkeypatch, failed
):
    """It was told to it at its end only, and nobody could cancel it."""
    monkeypatch.setattr(scheduled, "PATIENCE_S", 0.2)
    for name in (scheduled.__name__, "etl.serve.worker"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    begun, end = [], threading.Event()

    def flow_of(stage, environment):
        return Flow(lambda parameters=None: current_turn().run(lambda: begun.append("through")), name=stage.name)

    async def states(client, time) -> list[str]:
        every = await client.read_flow_runs(sort=FlowRunSort.ID_DESC, limit=200)
        return [run.state.name for run in every if SCHEDULED in run.tags and run.expected_start_time == time]

    async def went(way) -> None:
        with temporary_settings({PREFECT_API_URL: way["PREFECT_API_URL"]}):
            async with get_client() as client:
                loaded, deployed, time = params.load(project, "local", stage="generate"), {}, datetime.now(UTC)
                work = partial(_lasts, begun, end)
                runs = ScheduledRuns(client, lambda _, turn: turn.run(work), print, lambda _: Completed(), print)
                runs.follow(loaded.stages)
                link = flows._Link(client, runs, deployed, flow_of, False, print)
                link.wanted = loaded
                await link.look()
                async with InPlaceWorker(deployed, work_pool_name=POOL, name="here") as runs.worker:
                    runs._begin(loaded.stages["generate"], time)
                    while not begun:
                        await asyncio.sleep(0.05)
                    assert runs._is_away
                    await asyncio.sleep(0.5)  # nobody asks while it is away
                    assert "Running" not in await states(client, time)
                    await runs.announce()
                    for expected in (["Running"], ["Completed"]):
                        for _ in range(600):
                            if await states(client, time) == expected:
                                break
                            await asyncio.sleep(0.1)
                        else:
                            pytest.fail(f"{await states(client, time)}, not {expected}")
                        end.set()
                while runs.worker.turns or runs.under_way:
                    await asyncio.sleep(0.05)

    with failing(server, failed, times=1) as way:
        asyncio.run(went(way))
    assert begun == ["without"]
    gc.collect()
