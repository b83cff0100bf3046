"""The API on a real server, over roots that the pipeline made."""

import base64
import contextlib
import csv
import http.client
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import nbformat
import polars as pl
import pytest
from published import QUERY_RUN, TRAIN_RUN, publish_model

from app import front
from app.api import BODY_LIMIT, Apart, Readiness, Row, _root_at, app, settings
from app.settings import Settings
from etl.reports import pdf
from etl.serve import web
from etl.storage import PROJECT, Root
from pipeline import Lake, model, queries

ITEM = Row.model_config["json_schema_extra"]["example"]


@pytest.fixture(scope="session")
def url():
    """Where the API answers. It reads the root that ETL_ROOT names at the first request of a test."""
    server = web.Server(web.config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def _settings():
    """Each test has its own; a service reads them once."""
    settings.cache_clear()


@pytest.fixture
def api(url):
    with httpx2.Client(base_url=url, timeout=30) as client:
        yield client


def detail(response: httpx2.Response) -> str:
    """The sentence of an error."""
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    assert isinstance(response.json()["detail"], str)
    return response.json()["detail"]


class TestBeforeTheFirstRun:
    def test_it_is_up_but_not_ready_and_says_what_is_missing(self, api, empty):
        assert api.get("/health").json() == {"status": "up"}
        stages = api.get("/health/stages").json()
        assert stages["healthy"] and "no `up` was ever at work here" in stages["sentence"]
        ready = api.get("/ready")
        assert ready.status_code == 503
        said = ready.json()
        assert said["ready"] is False and said["batch"] is None
        assert "nothing is published" in said["detail"] and "run all stages" in said["detail"]
        for question in queries.questions():
            assert any(line.startswith(question.name) for line in said["missing"])
        assert any("run train" in line for line in said["missing"])

    def test_nothing_is_an_error_that_is_only_absent(self, api, empty):
        assert api.get("/runs").json() == []
        assert [(q["title"], q["current"]) for q in api.get("/results").json()] == [
            (q.title, None) for q in queries.questions()
        ]

    @pytest.mark.parametrize(
        ("method", "path", "status", "sentence"),
        [
            ("GET", "/model", 404, "no model is published"),
            ("POST", "/predict", 503, "no model is published"),
            ("GET", "/results/q05", 404, "q05 has no answer yet: run query"),
            ("GET", f"/reports/{QUERY_RUN}", 404, "there is no run"),
        ],
    )
    def test_what_is_missing_is_named(self, api, empty, method, path, status, sentence):
        response = api.request(method, path, json=[ITEM] if method == "POST" else None)
        assert response.status_code == status
        assert sentence in detail(response)

    def test_asking_leaves_no_trace(self, api, empty):
        for path in ("/ready", "/model", "/results", "/results/q05", "/runs", f"/reports/{QUERY_RUN}"):
            api.get(path)
        assert not Path(empty).exists()


def test_ready_gives_the_snapshot_and_its_age(api, root):
    ready, snapshot = api.get("/ready"), Lake(root).snapshot()
    assert ready.status_code == 200
    assert ready.json()["batch"] == snapshot.batch == 1
    assert datetime.fromisoformat(ready.json()["as_of"]) == snapshot.as_of
    assert ready.json()["lag_s"] > 0
    assert ready.json()["missing"] == []


def test_the_door_answers_what_the_service_would(api, root, monkeypatch):
    """Once somebody has asked, and to whom the service would: the rest it does not know."""
    apart, readiness = Apart(), Readiness(_root_at(settings().root))
    assert apart.answers() == {}
    monkeypatch.setattr("app.api.readiness", readiness)
    monkeypatch.setattr(apart, "known", front.Known(settings()))
    [health] = apart.answers().values()
    assert json.loads(health["body"]) == api.get("/health").json() and "detail" in json.loads(health["silent"])
    expected = api.get("/ready").json()
    ready = apart.answers()["/ready"]
    said = json.loads(ready["body"])
    assert ready["status"] == 200 and said == expected | {"lag_s": said["lag_s"]}
    assert json.loads(ready["silent"])["ready"] is False
    assert {*health["names"]} == {*ready["names"]} == front.LOOPBACK and {*ready["clients"]} == front.HERE
    monkeypatch.setenv("ETL_API_TOKEN", "t0ken")
    monkeypatch.setenv("ETL_API_HOSTS", "etl.internal")
    monkeypatch.setattr(apart, "known", front.Known(Settings()))
    ready = apart.answers()["/ready"]
    assert ready["authorization"] == "Bearer t0ken" and "clients" not in ready and "etl.internal" in ready["names"]
    monkeypatch.setenv("ETL_API_RATE", "5")
    monkeypatch.setattr(apart, "known", front.Known(Settings()))
    assert [*apart.answers()] == ["/health"]
    readiness.close()


def test_the_health_of_the_stages_is_what_status_says(api, root):
    said = api.get("/health/stages").json()
    assert said["healthy"] is False
    assert said["sentence"] == "Not healthy: train: failed: ValueError: no such column"
    kinds = [(finding["level"], finding["kind"], finding["about"]) for finding in said["findings"]]
    assert kinds[0] == ("bad", "failed", "stage train")


def test_a_damaged_snapshot_is_not_ready(api, root):
    Path(root, "lake/published.json").write_text('{"batch": 1')
    ready = api.get("/ready")
    assert ready.status_code == 503
    assert "lake/published.json is damaged" in ready.json()["detail"]


def test_the_settings_are_read_once(api, root, monkeypatch):
    assert api.get("/ready").json()["ready"]
    monkeypatch.setenv("ETL_ROOT", f"{root}-other")
    assert api.get("/ready").json()["ready"]


def send(url: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    """A request of its own connection, path and headers as they are."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    connection.request(method, path, body, {"content-type": "application/json"} | headers)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


@pytest.mark.parametrize("path", ["/health", "/ready", "/runs", "/predict"])
def test_nothing_waits_behind_large_predictions(url, root, path):
    """They had all of the 40 threads that the service has for everything: `/health` waited for 29 seconds."""
    large, done = json.dumps([ITEM] * 1000), []
    with ThreadPoolExecutor(80) as pool:
        for _ in range(80):
            pool.submit(lambda: done.append(send(url, "POST", "/predict", large)))
        while not done:
            time.sleep(0.01)
        if path == "/predict":
            status, _ = send(url, "POST", path, json.dumps([ITEM]))
        else:
            status, _ = send(url, "GET", path)
        meanwhile = len(done)
    assert status == 200
    assert meanwhile < 40
    assert {status for status, _ in done} == {200}


class TestHost:
    """A page anywhere can have its own name lead to 127.0.0.1 once it is loaded, and then reads what is served here."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8000"])
    def test_this_machine_is_known(self, url, empty, host):
        assert send(url, "GET", "/runs", Host=host)[0] == 200

    @pytest.mark.parametrize(
        "host",
        [
            *(
                "evil.example",
                "evil.example:8000",
                "127.0.0.1.evil.example",
                "localhost.evil.example",
                "evil@localhost",
            ),
            *("", "[::1", "[::2]", "127.0.0.1:x", "localhost, evil.example", "evil.example/localhost", "0.0.0.0"),
        ],
    )
    def test_another_name_is_refused(self, url, empty, host):
        for path in ("/runs", "/health", "/docs", "/nothing"):
            status, body = send(url, "GET", path, Host=host)
            assert status == 400
            assert "ETL_API_HOSTS" in json.loads(body)["detail"]

    def test_two_names_are_refused(self, url, empty):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.putrequest("GET", "/runs", skip_host=True)
        for host in ("localhost", "evil.example"):
            connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status == 400
        connection.close()

    def test_the_settings_name_others(self, url, empty, monkeypatch):
        monkeypatch.setenv("ETL_API_HOSTS", "etl.internal, 10.0.0.7,[fe80::1]")
        monkeypatch.setenv("ETL_API_URL", "https://ETL.example.com:8443/api")
        monkeypatch.setenv("ETL_API_TOKEN", "t0ken")
        token = {"Authorization": "Bearer t0ken"}
        for host in ("etl.internal", "10.0.0.7:8000", "[fe80::1]:8000", "etl.example.com", "localhost"):
            assert send(url, "GET", "/runs", Host=host, **token)[0] == 200
        assert send(url, "GET", "/runs", Host="evil.example", **token)[0] == 400


class TestToken:
    def test_other_machines_are_not_answered_without_one(self, url, empty, monkeypatch):
        monkeypatch.setenv("ETL_API_HOSTS", "etl.internal")
        for more in ({"Host": "etl.internal"}, {"X-Forwarded-For": "10.0.0.7"}):
            status, body = send(url, "GET", "/runs", **more)
            assert status == 403 and "ETL_API_TOKEN" in json.loads(body)["detail"]
            assert send(url, "GET", "/health", **more)[0] == 200

    def test_whoever_asks_sends_it(self, url, root, monkeypatch):
        monkeypatch.setenv("ETL_API_TOKEN", "t0ken")
        password = base64.b64encode(b"me:t0ken").decode()
        for said in ("Bearer t0ken", "bearer  t0ken", f"Basic {password}"):
            assert send(url, "GET", "/v1/runs", Authorization=said)[0] == 200
        for said in ("", "Bearer", "Bearer t0ke", "Bearer t0kenn", "t0ken", "Basic !", "Basic t0ken", "Digest t0ken"):
            for path in ("/v1/runs", "/docs", "/metrics", "/nothing", "/"):
                assert send(url, "GET", path, Authorization=said)[0] == 401
            assert send(url, "POST", "/v1/predict", json.dumps([ITEM]), Authorization=said)[0] == 401
        assert send(url, "GET", "/health")[0] == 200


def test_a_client_has_a_rate(api, empty, monkeypatch):
    monkeypatch.setenv("ETL_API_RATE", "5")
    answers = [api.get("/runs") for _ in range(30)]
    assert {answer.status_code for answer in answers[:10]} == {200}
    assert answers[-1].status_code == 429 and answers[-1].headers["retry-after"] == "1"
    assert "5 requests a second" in detail(answers[-1])
    assert api.get("/health").status_code == 200


class TestPredict:
    def test_the_answers_are_the_models(self, api, root):
        published = model.load_current(Root.at(root))
        line_items = [ITEM | {"l_commitdate": f"1996-{month}-20"} for month in ("02", "03", "04", "05")]
        answers = api.post("/predict", json=line_items).json()
        numbers = [item | {"l_extendedprice": float(item["l_extendedprice"])} for item in line_items]
        assert [answer["probability"] for answer in answers] == published.predict(numbers)
        assert [answer["late"] for answer in answers] == [True, True, False, False]
        assert {answer["model_id"] for answer in answers} == {published.model_id}

    def test_amounts_may_be_text_and_are_each_their_own(self, api, root):
        amounts = [17, "17", 17.5, "17.5"]
        answers = api.post("/predict", json=[ITEM | {"l_quantity": amount} for amount in amounts]).json()
        probabilities = [answer["probability"] for answer in answers]
        assert probabilities[0] == probabilities[1] and probabilities[2] == probabilities[3]

    @pytest.mark.parametrize("amount", ["17", "17.00", "17." + "0" * 5000, "1.7E+1", "9999999999999.99", "1E+12"])
    def test_however_an_amount_is_written(self, api, root, amount):
        answer = api.post("/predict", json=[ITEM | {"l_extendedprice": amount}, ITEM])
        assert answer.status_code == 200
        same = api.post("/predict", json=[ITEM | {"l_extendedprice": float(amount)}, ITEM])
        assert answer.json() == same.json()

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
    def test_the_body_has_to_say_that_it_is_json(self, api, root, kind):
        """What a page of another site may send without having asked."""
        response = api.post("/predict", content=json.dumps([ITEM]), headers={"content-type": kind})
        assert response.status_code == 422
        assert "body: Input should be application/json" in detail(response)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"l_shipdate": "1996-02-30"}, "body[1].l_shipdate: Input should be a valid date"),
            ({"l_shipdate": 0}, "body[1].l_shipdate: Input should be a day such as"),
            ({"l_commitdate": None}, "body[1].l_commitdate"),
            ({"l_quantity": 0}, "body[1].l_quantity: Input should be greater than or equal to 1, not 0"),
            ({"l_quantity": True}, "body[1].l_quantity: Input should be a number"),
            ({"l_quantity": float("nan")}, "body[1].l_quantity"),
            *(
                ({"l_quantity": text}, "body[1].l_quantity: Input should be a number")
                for text in ("1_0", " 17 ", "17\n", "\u0661\u0667", "\uff11\uff17", "0x11", "+17", ".5", "nan", "")
            ),
            ({"l_extendedprice": "1.234"}, "no more than 2 decimal places"),
            ({"l_extendedprice": 1e300}, "body[1].l_extendedprice"),
            ({"l_discount": 1.01}, "less than or equal to 1, not 1.01"),
            ({"l_tax": -0.01}, "body[1].l_tax"),
            ({"l_shipmode": "truck"}, "'TRUCK'"),
            ({"l_shipinstruct": "\ud800"}, "body[1].l_shipinstruct"),
            ({"l_receiptdate": "1996-03-20"}, "body[1].l_receiptdate: Extra inputs are not permitted"),
        ],
    )
    def test_a_wrong_line_item_is_refused_by_name(self, api, root, change, sentence):
        body = json.dumps([ITEM, ITEM | change])
        response = api.post("/predict", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 422
        assert sentence in detail(response)
        assert "body[0]" not in detail(response)

    @pytest.mark.parametrize(
        ("body", "status"),
        [("[]", 422), ("{}", 422), ("", 422), ("[1", 422), ("[" * 50_000, 400), ("null", 422), ('[{"l_tax": 1}]', 422)],
    )
    def test_another_body_is_refused(self, api, root, body, status):
        response = api.post("/predict", content=body, headers={"content-type": "application/json"})
        assert response.status_code == status
        assert detail(response)

    def test_however_much_is_wrong_only_the_first_is_told(self, api, root):
        wide = ITEM | {f"other{n}": n for n in range(50_000)}
        assert detail(api.post("/predict", json=[wide])).count("Extra inputs") == 5
        sentence = detail(api.post("/predict", json=[ITEM, *([{}] * 999)]))
        assert sentence.endswith("; and more") and sentence.count("body[1]") == 5

    def test_what_each_feature_adds_comes_to_the_prediction(self, api, root):
        rows = [ITEM | {"l_commitdate": f"1996-{month}-20"} for month in ("02", "04")]
        told = api.post("/v1/predict?explain=true", json=rows).json()
        plain = api.post("/v1/predict", json=rows).json()
        assert [row["probability"] for row in told] == [row["probability"] for row in plain]
        for row in told:
            assert [*row["contributions"]] == [*model.FEATURES]
            odds = row["base"] + sum(row["contributions"].values())
            assert 1 / (1 + math.exp(-odds)) == pytest.approx(row["probability"], abs=1e-6)
        assert told[0]["contributions"]["days_to_commit"] > 0 > told[1]["contributions"]["days_to_commit"]

    def test_a_thousand_line_items_and_no_more(self, api, root):
        assert len(api.post("/predict", json=[ITEM] * 1000).json()) == 1000
        response = api.post("/predict", json=[ITEM] * 1001)
        assert response.status_code == 422
        assert "at most 1000" in detail(response)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_the_body_has_a_limit(self, api, root, chunked):
        def post(size: int) -> httpx2.Response:
            body = json.dumps([ITEM]).encode().ljust(size)
            content = (body[i : i + 50_000] for i in range(0, size, 50_000)) if chunked else body
            return api.post("/predict", content=content, headers={"content-type": "application/json"})

        assert post(BODY_LIMIT).status_code == 200
        response = post(BODY_LIMIT + 1)
        assert response.status_code == 413
        assert "larger than 1,000,000 bytes" in detail(response)
        assert response.headers["connection"] == "close"

    def test_what_is_declared_is_not_waited_for(self, url, root):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000000\r\n\r\n[")
            assert client.recv(100_000).startswith(b"HTTP/1.1 413 ")
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 500_000_000:
                    sent += client.send(b" " * 100_000)
            assert sent < 500_000_000


class TestModel:
    def test_it_is_the_published_one(self, api, root):
        published, said = model.load_current(Root.at(root)), api.get("/model").json()
        assert (said["model_id"], said["run_id"]) == (published.model_id, TRAIN_RUN)
        assert said["metrics"] == published.metrics
        assert said["features"] == [*model.FEATURES]

    def test_those_that_are_kept(self, api, root):
        first, second = api.get("/model").json(), publish_model(root, max_trees=3)
        Path(root, f"models/{first['model_id']}/metrics.json").write_text("{")
        (listed,) = api.get("/v1/models").json()
        assert listed == api.get("/v1/model").json() | {"is_current": True, "aliases": ["champion"]}
        assert listed["model_id"] == second
        Path(root, "models/aliases.json").write_text("{")
        assert [each["is_current"] for each in api.get("/v1/models").json()] == [True]

    def test_a_new_one_is_taken_up(self, api, root):
        before = api.get("/model").json()["model_id"]
        after = publish_model(root, max_trees=3)
        assert api.get("/model").json()["model_id"] == after != before

    @pytest.mark.parametrize("damage", ["pointer", "model"])
    def test_the_last_good_one_is_served_while_the_published_one_is_damaged(self, api, root, damage):
        before = api.post("/predict", json=[ITEM]).json()
        after = publish_model(root, max_trees=3)
        broken = Path(root, "models/aliases.json" if damage == "pointer" else f"models/{after}/model.json")
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        assert api.post("/predict", json=[ITEM]).json() == before
        assert any(f"{before[0]['model_id']} still is" in line for line in api.get("/ready").json()["missing"])
        broken.write_bytes(whole)
        assert api.post("/predict", json=[ITEM]).json()[0]["model_id"] == after
        assert api.get("/ready").json()["missing"] == []

    @pytest.mark.parametrize(
        "put",
        [
            os.mkfifo,
            Path.mkdir,
            lambda path: path.symlink_to(path.name),
            lambda path: path.write_bytes(b"[" * 100_000),
            lambda path: path.write_text('{"model_id": null}'),
            lambda path: (path.touch(), os.truncate(path, 150_000_000)),
            lambda path: None,
            lambda path: (path.parent.rename(path.parent.with_name("elsewhere")), path.parent.touch()),
        ],
        ids=["pipe", "folder", "link loop", "nested", "null", "150 MB", "gone", "no folder"],
    )
    def test_whatever_the_pointer_becomes_the_last_good_one_is_served(self, api, root, put):
        before = api.post("/predict", json=[ITEM]).json()
        pointer = Path(root, "models/aliases.json")
        pointer.unlink()
        put(pointer)
        for _ in range(2):
            assert api.post("/predict", json=[ITEM]).json() == before
        assert api.get("/model").json()["model_id"] == before[0]["model_id"]
        (missing,) = api.get("/ready").json()["missing"]
        assert f"{before[0]['model_id']} still is" in missing

    def test_a_damaged_first_one_is_none(self, api, root):
        Path(root, "models/aliases.json").write_text("{}")
        assert "cannot be used" in detail(api.get("/model"))
        assert api.post("/predict", json=[ITEM]).status_code == 503


class TestResults:
    def test_an_answer_is_a_file_that_is_exact(self, api, root):
        rows = api.get("/results/q03").json()["rows"]
        frame = queries.current(Root.at(root), "q03")[1]
        whole = api.get("/results/q03.parquet")
        assert pl.read_parquet(whole.content).equals(frame)
        assert whole.headers["content-disposition"] == 'attachment; filename="q03.parquet"'
        assert api.get("/v1/results/q03.json").json() == rows
        lines = list(csv.DictReader(api.get("/results/q03.csv").text.splitlines()))
        assert [line["revenue"] for line in lines] == [row["revenue"] for row in rows]
        assert "no question" in detail(api.get("/results/q99.csv"))
        assert api.get("/results/q03.xml").status_code == 422

    def test_each_question_has_its_pointer(self, api, root):
        listed = api.get("/results").json()
        assert [info["question"] for info in listed] == [q.name for q in queries.questions()]
        assert {info["current"]["run_id"] for info in listed} == {QUERY_RUN}
        assert {info["current"]["batch"] for info in listed} == {1}

    def test_money_is_exact(self, api, root):
        _, expected = queries.current(Root.at(root), "q01")
        answer = api.get("/results/q01").json()
        assert [column["name"] for column in answer["columns"]] == expected.columns
        assert [row["charge"] for row in answer["rows"]] == [format(value, "f") for value in expected["charge"]]
        assert [row["line_items"] for row in answer["rows"]] == expected["line_items"].to_list()

    def test_times_are_iso(self, api, root):
        _, expected = queries.current(Root.at(root), "revenue_per_minute")
        rows = api.get("/results/revenue_per_minute").json()["rows"]
        assert [datetime.fromisoformat(row["minute"]) for row in rows] == expected["minute"].to_list()

    def test_limit_is_the_first_rows(self, api, root):
        everything = api.get("/results/recommended_suppliers").json()["rows"]
        assert api.get("/results/recommended_suppliers?limit=3").json()["rows"] == everything[:3]
        assert "limit" in detail(api.get("/results/recommended_suppliers?limit=0"))

    @pytest.mark.parametrize("limit", ["9" * 23, "9" * 5000, 2**63, 2**64, "-1", "", "1.5", "nan", "many"])
    def test_a_limit_that_is_none_is_refused(self, api, root, limit):
        response = api.get(f"/results/q01?limit={limit}")
        assert response.status_code == 422
        assert detail(response).startswith("query.limit: ")

    @pytest.mark.parametrize("pointer", ["", "[]", "{}", '{"file": null}', '{"file": "results"}', '{"file": "lake/x"}'])
    def test_a_damaged_pointer_says_so(self, api, root, pointer):
        Path(root, "results/q05/current.json").write_text(pointer)
        assert api.get("/results/q05").status_code in (404, 503)
        assert {info["question"]: info["current"] for info in api.get("/results").json()}["q05"] is None
        assert any(line.startswith("q05 ") for line in api.get("/ready").json()["missing"])

    def test_an_unknown_question_names_the_known_ones(self, api, root):
        response = api.get("/results/q99")
        assert response.status_code == 404
        assert "there is no question 'q99'; there are " in detail(response)

    def test_a_damaged_answer_says_so(self, api, root):
        Path(root, f"results/q05/{QUERY_RUN}.parquet").write_bytes(b"PAR1")
        response = api.get("/results/q05")
        assert response.status_code == 503
        assert "the answer to q05 cannot be read" in detail(response)


class TestRuns:
    def test_newest_first(self, api, root):
        started = [run["started_at"] for run in api.get("/runs").json()]
        assert len(started) == 3 and started == sorted(started, reverse=True)

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            ("stage=query", [QUERY_RUN]),
            ("stage=train", ["train-20261122T110000-ffffff", TRAIN_RUN]),
            ("stage=train&limit=1", ["train-20261122T110000-ffffff"]),
            ("state=failed", ["train-20261122T110000-ffffff"]),
            ("stage=query&state=failed", []),
        ],
    )
    def test_filters(self, api, root, asked, found):
        assert [run["run_id"] for run in api.get(f"/runs?{asked}").json()] == found

    @pytest.mark.parametrize("asked", ["state=good", "limit=0", "limit=1001", "stage=a/b", "stage="])
    def test_wrong_filters_are_refused(self, api, root, asked):
        response = api.get(f"/runs?{asked}")
        assert response.status_code == 422
        assert detail(response).startswith(f"query.{asked.split('=')[0]}: ")

    @pytest.mark.parametrize("name", ["since", "until"])
    @pytest.mark.parametrize(
        "moment",
        [
            *("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00%2B23:59", "0000-01-01", "10000-01-01", "2026-02-30"),
            *("2026-11-22T24:00:00", "2026-11-22T12:00:00%2B24:00", "1e400", "-1e20", "nan", "9" * 23, "", "now"),
        ],
    )
    def test_a_moment_that_is_none_is_refused(self, api, root, name, moment):
        response = api.get(f"/runs?{name}={moment}")
        assert response.status_code == 422
        assert detail(response).startswith(f"query.{name}: Input should be")

    def test_moments_at_the_ends_of_time(self, api, root):
        first, last = "0001-01-01T00:00:00-23:59", "9999-12-31T23:59:59.999999%2B23:59"
        assert len(api.get(f"/runs?since={first}&until={last}").json()) == 3
        assert api.get(f"/runs?since={last}").json() == api.get(f"/runs?until={first}").json() == []

    def test_a_moment_is_utc_unless_it_says(self, api, root):
        for moment in ("2026-11-22T12:02:00", "2026-11-22T12:02:00Z", "2026-11-22T14:02:00%2B02:00"):
            assert len(api.get(f"/runs?since={moment}").json()) == 2


def main_of(page):
    """A report without its head, which has what came before it."""
    return page.partition("<main>")[2]


class TestReports:
    def test_the_page_cannot_do_anything(self, api, root):
        page = api.get(f"/reports/{QUERY_RUN}")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == (
            "sandbox allow-downloads; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        )
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "What query did" in page.text

    def test_the_notebook_is_a_download(self, api, root):
        download = api.get(f"/reports/{QUERY_RUN}/notebook")
        assert download.headers["content-disposition"] == f'attachment; filename="{QUERY_RUN}.ipynb"'
        assert download.headers["x-content-type-options"] == "nosniff"
        assert nbformat.reads(download.text, as_version=4).cells[0].source == "# What query did"

    def test_a_pdf_is_a_download_where_there_is_a_browser_that_prints(self, api, root, monkeypatch):
        at = f"/v1/reports/{QUERY_RUN}/pdf"
        if pdf.browser():
            download = api.get(f"{at}?code=no")
            assert download.content.startswith(b"%PDF-") and download.headers["content-type"] == "application/pdf"
            assert download.headers["content-disposition"] == f'attachment; filename="{QUERY_RUN}.pdf"'
            assert f'href="{QUERY_RUN}/pdf?code=no">PDF' in api.get(f"/reports/{QUERY_RUN}?code=no").text
        monkeypatch.setattr(pdf, "BROWSERS", ["no-such-browser"])
        refused = api.get(at)
        assert (refused.status_code, refused.json()) == (
            501,
            {"detail": "a PDF is printed by Chromium, and none is installed: looked for no-such-browser"},
        )
        assert "/pdf" not in api.get(f"/reports/{QUERY_RUN}").text
        assert api.get(at.replace(QUERY_RUN, "query-20200101T000000-aaaaaa")).status_code == 404

    def test_a_link_to_another_report_leads_there(self, api, root):
        (page,) = Path(root).glob(f"reports/*/*/{QUERY_RUN}/report.html")
        page.write_text('<a href="../../2026-03-01/query-20260301T120000-abcdef/report.html">the last ok run</a>')
        assert api.get(f"/reports/{QUERY_RUN}").text.startswith('<a href="query-20260301T120000-abcdef">')

    def test_a_page_that_was_never_written_is_made(self, api, root):
        (page,) = Path(root).glob(f"reports/*/*/{QUERY_RUN}/report.html")
        written = page.read_bytes()
        page.unlink()
        made = api.get(f"/reports/{QUERY_RUN}").text
        assert main_of(made) == main_of(written.decode()) and "What query did" in made

    @pytest.mark.parametrize("version", ["", "/v1"])
    def test_the_bar_leads_where_the_service_knows_the_way(self, api, root, monkeypatch, version):
        at = f"{version}/reports/{TRAIN_RUN}"
        bar = dict(re.findall(r'<a href="([^"]*)">([^<]*)</a>', api.get(at).text.partition("</nav>")[0]))
        led = {text: urljoin(at, address) for address, text in bar.items()}
        assert led["notebook"] == f"{at}/notebook" and led["all reports"] == f"{version}/reports"
        for text, found in (
            ("next →", f"{version}/reports/train-20261122T110000-ffffff"),
            ("← previous", f"{version}/reports?stage=train"),  # there is none
            ("latest", f"{version}/reports/train-20261122T110000-ffffff"),
            ("last ok", at),
        ):
            answer = api.get(led[text])
            assert answer.status_code == 307
            assert urljoin(led[text], answer.headers["location"]) == found

    def test_readers_who_do_not_code_stay_without_code(self, api, root):
        led = api.get("/reports/train/latest-ok?code=no")
        assert led.headers["location"] == f"../{TRAIN_RUN}?code=no"
        page = api.get(f"/reports/{TRAIN_RUN}?code=no").text
        assert "What train did" in page and "1 + 1" not in page and "1 + 1" in api.get(f"/reports/{TRAIN_RUN}").text
        assert 'href="train/latest?code=no"' in page and f'href="{TRAIN_RUN}">with code' in page
        assert api.get(f"/reports/{TRAIN_RUN}?code=maybe").status_code == 422

    def test_reports_are_listed_by_stage_and_day_and_searched(self, api, root):
        page = api.get("/v1/reports").text
        for run_id in (QUERY_RUN, TRAIN_RUN, "train-20261122T110000-ffffff"):
            assert f'href="reports/{run_id}"' in page
        found = re.findall(r'href="reports/([\w-]+)"', api.get("/reports?search=NO+SUCH&stage=&day=").text)
        assert found == ["train-20261122T110000-ffffff"]
        assert re.findall(r'href="reports/([\w-]+)"', api.get("/reports?stage=query&day=2026-11-22").text) == [
            QUERY_RUN
        ]
        page = api.get("/reports?day=2026-11-21&search=%3Cscript%3E").text
        assert "None fits" in page and "<script>" not in page
        for wrong in ("day=2026-02-30", "day=now", "stage=a%20b"):
            assert detail(api.get(f"/reports?{wrong}"))

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            ("query/latest", QUERY_RUN),
            ("train/latest", "train-20261122T110000-ffffff"),
            ("train/latest-ok", TRAIN_RUN),
            ("train/as-of/2026-11-22T12:02:59.999", TRAIN_RUN),
            ("train/as-of/2026-11-22T12:03:00Z", "train-20261122T110000-ffffff"),
            ("train/as-of/9999-12-31T23:59:59.999999", "train-20261122T110000-ffffff"),
            ("train/as-of/2026-11-22T12:01:59", None),
            ("preprocess/latest", None),
        ],
    )
    @pytest.mark.parametrize("version", ["", "/v1"])
    def test_the_last_is_led_to(self, api, root, version, asked, found):
        led = api.get(f"{version}/reports/{asked}", headers={"host": "localhost:1"})
        if found is None:
            assert led.status_code == 404 and "no report is kept" in detail(led)
        else:
            assert led.status_code == 307
            assert urljoin(f"{version}/reports/{asked}", led.headers["location"]) == f"{version}/reports/{found}"

    def test_what_is_no_stage_or_no_time_is_refused(self, api, root):
        for asked in ("a%20b/latest", "query/as-of/9999-12-31T23:59:59-23:59", "query/as-of/now"):
            assert api.get(f"/v1/reports/{asked}").status_code == 422

    def test_a_report_without_its_page_says_so(self, api, root):
        shutil.rmtree(Path(root, "reports/query"))
        assert f"run {QUERY_RUN} left no report.html" in detail(api.get(f"/reports/{QUERY_RUN}"))

    @pytest.mark.parametrize(
        "path",
        [
            "/reports/query-20261122T120000-000000",
            "/reports/query",
            "/reports/..",
            "/reports/../secret.json",
            "/reports/..%2f..%2fsecret.json",
            "/reports/..%5c..%5csecret.json",
            "/reports/%2e%2e%2fsecret.json/notebook",
            f"/reports/..%2f{QUERY_RUN}",
            f"/reports/{QUERY_RUN}%00",
            f"/reports/{QUERY_RUN}%0a",
            f"/reports/{QUERY_RUN}/../../../secret.json",
            "/results/..%2f..%2fsecret",
            "/results/..",
            "/results/q01%2fcurrent.json",
        ],
    )
    def test_no_path_leaves_the_root(self, url, root, path):
        for place in (Path(root).parent, Path(root), Path(root, "reports"), Path(root, "results")):
            (place / "secret.json").write_text('"hunter2"')
        connection = http.client.HTTPConnection(url.removeprefix("http://"))  # sends the path as it is
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        assert response.status == 404
        assert list(json.loads(body)) == ["detail"]
        assert b"hunter2" not in body


def test_the_documentation_knows_every_endpoint_and_its_errors(api):
    paths = api.get("/openapi.json").json()["paths"]
    versioned = ("model", "models", "predict", "results", "results/{question}", "runs", "reports/{run_id}")
    assert set(paths) == {
        *("/", "/health", "/health/stages", "/ready", "/metrics", *(f"/v1/{path}" for path in versioned)),
        *(f"/v1/reports/{rest}" for rest in ("{run_id}/notebook", "{stage}/latest", "{stage}/latest-ok")),
        *("/v1/reports/{stage}/as-of/{at}", "/v1/reports", "/v1/results/{question}.{form}"),
        *(f"/v1/reports/{{run_id}}/{rest}" for rest in ("pdf", "previous", "next")),
    }
    page = api.get("/").text
    for path, operation in ((path, next(iter(methods.values()))) for path, methods in paths.items()):
        assert operation["description"].partition("\n")[0].endswith("."), path
        assert path in page
        for status, response in operation["responses"].items():
            if status not in ("200", "307") and (path, status) != ("/ready", "503"):
                assert response["content"] == {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}
                }, path


@pytest.mark.parametrize("path", ["/runs", "/model", "/results", "/results/q01", f"/reports/{QUERY_RUN}"])
def test_paths_without_a_version_are_kept(api, root, path):
    assert api.get(path).content == api.get(f"/v1{path}").content


@pytest.mark.parametrize("path", ["/runs/", "/v1/runs/", "//evil.example/..", "/static-offline-docs"])
def test_no_answer_leads_where_the_host_header_says(url, root, path):
    assert send(url, "GET", path, Host="localhost:6666")[0] == 404


class TestWhatIsTold:
    def test_metrics(self, api, root):
        api.get("/v1/results/q99")
        served = api.post("/v1/predict", json=[ITEM]).json()[0]["model_id"]
        text = api.get("/metrics").text
        assert 'etl_api_requests_total{method="GET",route="/results/{question}",status="404"}' in text
        assert f'etl_model_info{{model_id="{served}",run_id="{TRAIN_RUN}"}} 1.0' in text
        figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(figures["etl_lake_lag_seconds"]) > 0 and float(figures["etl_lake_batch"]) == 1
        assert float(figures["etl_model_age_seconds"]) > 0 and float(figures["etl_model_usable"]) == 1
        assert float(figures['etl_api_request_seconds_count{route="/predict"}']) >= 1

    def test_metrics_before_the_first_run(self, api, empty):
        figures = api.get("/metrics").text
        assert "etl_lake_published 0.0" in figures and "etl_model_usable 0.0" in figures

    def test_a_request_has_an_id_and_a_line_in_the_log(self, api, root, logged):
        given = api.get("/v1/runs?limit=0&x=%0a", headers={"x-request-id": "mine-1"})
        own = api.get("/v1/nothing", headers={"x-request-id": "no id\tat all"})
        health = api.get("/health", headers={"x-request-id": "mine-2"})
        assert [given.headers["x-request-id"], health.headers["x-request-id"]] == ["mine-1", "mine-2"]
        told, until = [], time.monotonic() + 30
        ids = ["mine-1", own.headers["x-request-id"], "mine-2"]
        while len(told) < 3 and time.monotonic() < until:
            told = [line for line in map(json.loads, logged) if line["id"] in ids]
            time.sleep(0.05)
        assert [line["id"] for line in told] == ids
        assert [line["status"] for line in told] == [422, 404, 200]
        assert told[0]["path"] == "/v1/runs?limit=0&x=%0a" and told[2]["path"] == "/health"
        assert 'etl_api_requests_total{method="GET",route="/health",status="200"}' in api.get("/metrics").text

    def test_what_fails_is_told_with_the_requests_id(self, api, root, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("hunter2")

        monkeypatch.setattr("etl.runs.index.newest", fail)
        failed = api.get("/v1/runs")
        assert failed.status_code == 500
        assert failed.headers["x-request-id"] in detail(failed) and "hunter2" not in failed.text


def test_what_the_documentation_shows_runs_as_it_stands(url, root, tmp_path):
    text = (PROJECT / "docs" / "api.md").read_text()
    [client] = re.findall(r"```python\n(.*?)```", text, re.S)
    named: dict = {}
    exec(client, named)
    item = ITEM | {"l_extendedprice": "21168.23"}
    one, other = named["predict"]([item, item | {"l_shipmode": "AIR"}], url, token="any")
    assert isinstance(one, named["Prediction"]) and 0 < one.probability < 1 and one.late == (one.probability >= 0.5)
    assert one.model_id == other.model_id == send_json(url, "/v1/model")["model_id"]
    with pytest.raises(Exception, match="422"):
        named["predict"]([item | {"l_shipmode": "CAMEL"}], url)
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    [block] = re.findall(r"```\n(curl .*?)```", text, re.S)
    lines = re.split(r"\n(?=curl )", block.strip().replace("http://127.0.0.1:8000", url))
    said = [subprocess.check_output([*shlex.split(line), "--fail"], cwd=tmp_path) for line in lines]
    assert json.loads(said[0])["ready"] and [run["state"] for run in json.loads(said[1])] == ["ok"]
    assert "<html" in (tmp_path / "report.html").read_text()
    assert json.loads(said[3])[0]["probability"] == one.probability and len(said) == 4


def send_json(url, path):
    return json.loads(send(url, "GET", path)[1])


def test_it_brings_nothing_that_could_start_a_stage():
    code = "import sys, app.api; print(*{'prefect', 'papermill', 'nbclient', 'nbconvert', 'coiled'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
