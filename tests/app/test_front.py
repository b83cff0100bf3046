"""The log of the service: whole, and not a write a request."""

import asyncio
import json

from app import front

SCOPE = {"path": "/predict", "method": "POST", "query_string": b"", "client": ("127.0.0.1", 1)}


def test_lines_of_the_log_are_written_together_and_none_is_left_at_the_end(monkeypatch):
    writes = []
    monkeypatch.setattr(front, "_write", writes.append)
    log = front.Log()

    async def asked():
        for number in range(150):
            log.add(SCOPE, f"id-{number}", 200, 0.001, 10)

    asyncio.run(asked())
    assert len(writes) == 0  # each of them wakes another thread
    log.end()
    (written,) = writes
    assert [json.loads(line)["id"] for line in written.splitlines()] == [f"id-{number}" for number in range(150)]


def test_what_a_loop_that_has_ended_left_is_written(monkeypatch):
    writes, times = [], [1000.0]
    monkeypatch.setattr(front, "_write", writes.append)
    monkeypatch.setattr(front.time, "time", lambda: times[0])
    log = front.Log()

    async def asked():
        log.add(SCOPE, "id", 200, 0.001, 10)

    asyncio.run(asked())
    times[0] += 60
    asyncio.run(asked())
    log.end()
    assert len(writes[0].splitlines()) == 2
