"""A writer that is stopped for longer than its lease lasts, at one of its steps, and goes on when others wrote."""

import json

import pytest
from test_foreign import ASK, Shop, again, ids, problems

from etl import leases
from etl.lake import compaction, ingest, landing
from etl.lake import snapshot as snapshots
from etl.leases import LeaseLost
from etl.storage import Root

STEPS = {
    "before the commit: item": ingest,
    "before the archive: item": landing,
    "before the compaction is published": compaction,
}


def land(root: Root, number: int) -> None:
    rows = [{"id": 2 * number + n, "name": f"n{number}", "at": "2026-03-01T11:00:00Z"} for n in range(2)]
    root.write(f"landing/item/{number}.json", "\n".join(map(json.dumps, rows)).encode())


@pytest.fixture
def overtaken(s3_root, quick, monkeypatch):
    """Has others come in when a writer comes to a step: nobody renews its lease any more until they are done."""

    def arrange(step: str, others) -> list[str]:
        come: list[str] = []

        def stop(name: str) -> None:
            if name == step and not come:
                come.append(name)
                renew = leases.StoreLease._renewing
                others()
                leases.StoreLease._renewing = renew

        monkeypatch.setattr(STEPS[step], "crash_point", stop)
        monkeypatch.setattr(leases.StoreLease, "_renewing", lambda self: None)  # as of a process that is stopped
        return come

    return arrange


@pytest.mark.parametrize("step", STEPS)
def test_a_writer_that_was_taken_over_costs_no_row(s3_root, overtaken, step):
    root, pointers = Root.at(s3_root), []
    for number in range(2):
        land(root, number)
        again(Shop(s3_root))
    land(root, 2)

    def others() -> None:
        again(Shop(s3_root))
        land(root, 3)
        again(Shop(s3_root))
        Shop(s3_root).compact(**ASK)
        land(root, 4)
        pointers.append(snapshots.read_pointer(root))

    come = overtaken(step, others)
    if STEPS[step] is compaction:
        with pytest.raises(LeaseLost):
            Shop(s3_root).compact(**ASK)
    else:
        again(Shop(s3_root))
    assert come
    again(Shop(s3_root))
    now = snapshots.read_pointer(root)
    assert ids(Shop(s3_root)) == [*range(10)]
    assert now["batch"] > pointers[0]["batch"] and now["fence"] > pointers[0]["fence"]
    assert problems(Shop(s3_root)) == [] and root.files("landing") == []
