"""Flows run by our worker, on a real server, and who else may ask that server for anything."""

import json

import pytest
from faults.workers import EXPECTED, ended, failing, prefect_server
from support import WEBSOCKET, asked

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
