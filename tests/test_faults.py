"""The fault campaign with small numbers: the same functions that `make faults` calls with full ones."""

import pytest
from faults.__main__ import SCENARIOS

# in their own files: test_deaths, test_secrets, test_replay, test_end_to_end, test_fence; with a server: test_up,
# test_worker, test_releases (which moves between runs); by function calls: test_rebuild, test_foreign,
# test_lost_replies (answers of an object store), test_model (epochs)
ELSEWHERE = {
    "deaths",
    "floods",
    "hangs",
    "canary",
    "replays",
    "whence",
    "scale",
    "pieces",
    "cancelled",
    "interrupted",
    "frozen",
    "killed services",
    "database",
    "older deployments",
    "two",
    "drafts",
    "workers",
    "up",
    "stopped",
    "releases",
    "rebuilds",
    "storms",
    "foreign",
    "pointers",
    "pairs",
    "machines",  # in test_dispatch
    "hosts",  # with `make faults` alone
    "lost replies",
    "epochs",
}


@pytest.mark.parametrize(
    ("scenario", "few"),
    [pytest.param(s[1], s[3], id=s[0].replace(" ", "-")) for s in SCENARIOS if s[0] not in ELSEWHERE],
)
def test_what_is_promised_holds(scenario, few):
    found = scenario(few, seed=1)
    if found.startswith("not provoked"):
        pytest.skip(found)
    assert found
