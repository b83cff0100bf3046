"""The short way to a prediction gives what the long way gives, and takes nothing that the long way does not take."""

import asyncio
import json
import math
import random
import time

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient
from published import publish_model
from pydantic import ValidationError

from app import api, predictions
from app.front import Pace
from etl.models import rows
from etl.models.rows import Decoder
from etl.storage import Root
from pipeline import Lake, model

EXAMPLE = dict(model.CARD.example)
ODD = [
    *(None, True, False, "", "0.04", "x", [], {}, 0, -1, 7, 10**30, -(10**30), 0.1 + 0.2, 1e-400, 1e15, 1e308),
    *(0.04, 0.041, 21168.23, 21168.234, 9999999999999.99, 99999999999999.99, 17.0, 17.5, -0.0, "1996-03-13"),
    *("1996-3-13", "1996-02-30", "0000-01-01", "9999-12-31", "1996-03-13T00:00:00", " 1996-03-13", "TRUCK", "truck"),
    *("DELIVER IN PERSON", "17", "\u0661\u0667", "1_0", math.nan, math.inf),
]


@pytest.fixture
def asked(root):
    for cached in (api.settings, api.served_model):
        cached.cache_clear()
    yield root
    for cached in (api.settings, api.served_model):
        cached.cache_clear()


def bodies(count: int, seed: int) -> list[bytes]:
    """Bodies of one or two rows, most of them odd in one stored or two."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        given = [dict(EXAMPLE) for _ in range(rng.randint(1, 2))]
        for row in given:
            row["l_extendedprice"] = rng.choice([21168.23, "21168.23", 900, 0.01])
            for _ in range(rng.choice([0, 1, 1, 2])):
                row[rng.choice([*EXAMPLE, "l_other"])] = rng.choice(ODD)
            if rng.random() < 0.05:
                row.pop(rng.choice([*row]))
        text = json.dumps(given)
        if rng.random() < 0.1:
            text = text.replace("0.04", rng.choice(["4e-2", "0.040", "0.04000000000000000001", "04", "0.04, "]), 1)
        if rng.random() < 0.05:
            text = text.replace('{"', '{"l_tax": 0.01, "', 1)
        made.append(text.encode(rng.choice(["utf-8"] * 20 + ["utf-16"])))
    return made


def test_what_the_short_way_takes_the_long_way_takes_as_the_same():
    decoder, taken = Decoder(model.CARD.row, api.ITEM_LIMIT), 0
    for body in bodies(4000, seed=5):
        columns = decoder.decode(body)
        if columns is None:
            continue
        try:
            long = rows.of_rows([dict(row) for row in api.ROWS.validate_python(json.loads(body))], decoder.row)
        except (ValidationError, ValueError) as error:
            pytest.fail(f"{body!r}: {error}")
        for name, values in columns.items():
            assert np.array_equal(values, long[name], equal_nan=True), (name, body)
        taken += 1
    assert 300 < taken < 3000


def test_plain_rows_take_the_short_way():
    decoder = Decoder(model.CARD.row, api.ITEM_LIMIT)
    assert decoder.decode(json.dumps([EXAMPLE | {"l_extendedprice": 21168.23}] * 1000).encode()) is not None
    assert decoder.decode(json.dumps([EXAMPLE | {"l_extendedprice": 21168.23}] * 1001).encode()) is None
    assert decoder.decode(b"[]") is None


def test_features_of_json_and_of_the_table_are_the_same_to_the_last_bit(filled):
    table = Lake(filled).snapshot().frame("lineitem", model.SHIPPED).collect()
    assert table.height > 5000
    dates, money = pl.selectors.date(), pl.selectors.decimal()
    sent = table.with_columns(dates.cast(pl.String), money.cast(pl.Float64)).to_dicts()
    decoder, expected = Decoder(model.CARD.row, len(sent)), model.SPEC.matrix(table)
    columns = decoder.decode(json.dumps(sent).encode())
    assert rows.matrix(columns, model.FEATURES).tobytes() == expected.tobytes()
    assert model.SPEC.matrix(sent).tobytes() == expected.tobytes()


def test_both_ways_answer_alike(asked):
    plain = [EXAMPLE | {"l_extendedprice": 21168.23, "l_quantity": n} for n in range(1, 40)]
    long = TestClient(api.app).post("/predict", json=plain)
    with TestClient(api.app) as client:
        assert api.watched is not None
        short = client.post("/predict", json=plain)
        told = client.post("/predict", json=[EXAMPLE | {"l_shipmode": "CAMEL"}])
        exact = client.post("/predict", json=[EXAMPLE])  # a price as a text
        body = json.dumps(plain).encode()
        straight, *others = straight_to(*[body] * 100)
        assert others.count(None) > 70  # the loop looks who else asks before it answers these
        assert straight_to(json.dumps([EXAMPLE]).encode()) == straight_to(body, host=b"evil.example") == [None]
    assert api.watched is None
    assert short.json() == long.json() == json.loads(straight[1])
    assert b"x-request-id: " in straight[0]
    assert [len(answer.json()) for answer in (short, exact)] == [39, 1]
    assert short.headers["content-type"] == long.headers["content-type"] == "application/json"
    assert told.status_code == 422 and "l_shipmode" in told.json()["detail"]


def straight_to(*bodies, host=b"localhost"):
    """In one round of the loop: what the server has answered before the application sees a request."""
    scope = {"type": "http", "path": "/predict", "raw_path": b"/predict", "method": "POST", "query_string": b""}
    headers = {b"host": host, b"content-type": b"application/json"}

    async def asked():
        straight = api.app.state.straight.answer
        return [straight(scope | {"client": ("127.0.0.1", 1)}, headers, body) for body in bodies]

    return asyncio.run(asked())


@pytest.mark.parametrize("path, kind", [("/predict", b"text/plain"), ("/other", b"application/json")])
def test_what_is_not_for_it_is_handed_on_unread(path, kind):
    assert asked_of_the_layer([b"x"], path, kind) == [b"x"]


@pytest.mark.parametrize("body", [b"[]", b"", b"[" * 60])
def test_what_it_has_read_is_handed_on_as_it_came(body):
    assert asked_of_the_layer([body]) == [body]


def asked_of_the_layer(parts, path="/predict", kind=b"application/json"):
    """What the application gets of a body in these parts."""
    got = []

    async def application(scope, receive, send):
        while True:
            message = await receive()
            got.append(message["body"])
            if not message["more_body"]:
                return

    waiting = iter([{"type": "http.request", "body": p, "more_body": n < len(parts)} for n, p in enumerate(parts, 1)])

    async def receive():
        return next(waiting)

    layer = predictions.ShortWay(application, predictions.Plain(model.CARD, lambda: None, 10), predictions.Turns())
    scope = {"type": "http", "path": path, "method": "POST", "query_string": b"", "headers": [(b"content-type", kind)]}
    asyncio.run(layer(scope, receive, None))
    return got


def test_those_who_wait_go_on_as_they_came_a_few_each_time_the_loop_comes_round():
    seen = []

    async def wait(pace, number, weight, rounds):
        await pace.come(weight)
        seen.append((number, rounds[0]))

    async def run():
        pace, rounds = Pace(3), [0]
        waiting = [asyncio.create_task(wait(pace, *each, rounds)) for each in enumerate([1, 1, 1, 1, 9, 1, 1])]
        waiting[5].cancel()
        while not all(each.done() for each in waiting):
            rounds[0] += 1
            await asyncio.sleep(0)

    asyncio.run(run())
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4, 6]
    at = dict(seen)
    assert at[0] == at[2] < at[3] == at[4] < at[6]  # what is too much for a round goes with what is left of it


def test_the_watch_takes_up_what_is_published_and_keeps_what_serves(root, monkeypatch):
    monkeypatch.setattr(predictions, "LOOK_S", 0.02)
    stored = Root.at(root)
    served = predictions.ServedModel(stored, model.SPEC)
    with served.watched():
        first = served.model.model_id
        second = publish_model(root, max_trees=3)
        until(lambda: served.model.model_id == second)
        assert first != second and served.current()[1] is None
        pointer = stored.read("models/aliases.json")
        stored.write("models/aliases.json", b"{")
        until(lambda: served.current()[1])
        assert served.current()[0].model_id == second
        stored.write("models/aliases.json", pointer)
        until(lambda: served.current()[1] is None)
    assert not served.is_watched


def until(holds) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
