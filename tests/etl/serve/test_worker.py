"""Flows run by our worker, on a real server."""

import pytest
from faults.workers import EXPECTED, ended, prefect_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("prefect")) as variables:
        yield variables


def test_every_flow_ends_in_the_state_that_it_has_with_prefects_own_worker(server, tmp_path):
    """That Prefect's process worker gives the same is provoked by `make faults`: it takes a minute of CPU."""
    [ours] = ended(server, tmp_path, "in-place")
    assert ours == EXPECTED
