"""The API on a real server, over roots that the pipeline made."""

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import httpx2
import nbformat
import pytest
import uvicorn
from published import QUERY_RUN, TRAIN_RUN, publish_model

from app.api import BODY_LIMIT, LineItem, app
from etl.lake import snapshot as lake
from pipeline import model, queries

ITEM = LineItem.model_config["json_schema_extra"]["example"]


@pytest.fixture(scope="session")
def url():
    """Where the API answers. It reads the root that ETL_ROOT names at the time of the request."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


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
        ready = api.get("/ready")
        assert ready.status_code == 503
        said = ready.json()
        assert said["ready"] is False and said["batch"] is None
        assert "nothing is published" in said["detail"] and "run generate" in said["detail"]
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
    ready, snapshot = api.get("/ready"), lake.snapshot(root)
    assert ready.status_code == 200
    assert ready.json()["batch"] == snapshot.batch == 1
    assert datetime.fromisoformat(ready.json()["as_of"]) == snapshot.as_of
    assert ready.json()["lag_s"] > 0
    assert ready.json()["missing"] == []


def test_a_damaged_snapshot_is_not_ready(api, root):
    for name in ("published.json", "published.copy.json"):
        Path(root, "lake", name).write_text('{"batch": 1')
    ready = api.get("/ready")
    assert ready.status_code == 503
    assert "lake/published.json is damaged" in ready.json()["detail"]


class TestPredict:
    def test_the_answers_are_the_models(self, api, root):
        published = model.load_current(root)
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

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"l_shipdate": "1996-02-30"}, "body[1].l_shipdate: Input should be a valid date"),
            ({"l_shipdate": 0}, "body[1].l_shipdate: Input should be a day such as"),
            ({"l_commitdate": None}, "body[1].l_commitdate"),
            ({"l_quantity": 0}, "body[1].l_quantity: Input should be greater than or equal to 1, not 0"),
            ({"l_quantity": True}, "body[1].l_quantity: Input should be a number"),
            ({"l_quantity": float("nan")}, "body[1].l_quantity"),
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


class TestModel:
    def test_it_is_the_published_one(self, api, root):
        published, said = model.load_current(root), api.get("/model").json()
        assert (said["model_id"], said["run_id"]) == (published.model_id, TRAIN_RUN)
        assert said["metrics"] == published.metrics
        assert said["features"] == model.FEATURES

    def test_a_new_one_is_taken_up(self, api, root):
        before = api.get("/model").json()["model_id"]
        after = publish_model(root, max_trees=3)
        assert api.get("/model").json()["model_id"] == after != before

    @pytest.mark.parametrize("damage", ["pointer", "model"])
    def test_the_last_good_one_is_served_while_the_published_one_is_damaged(self, api, root, damage):
        before = api.post("/predict", json=[ITEM]).json()
        after = publish_model(root, max_trees=3)
        broken = Path(root, "models/current.json" if damage == "pointer" else f"models/{after}/model.json")
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        assert api.post("/predict", json=[ITEM]).json() == before
        assert any(f"{before[0]['model_id']} still is" in line for line in api.get("/ready").json()["missing"])
        broken.write_bytes(whole)
        assert api.post("/predict", json=[ITEM]).json()[0]["model_id"] == after
        assert api.get("/ready").json()["missing"] == []

    def test_a_damaged_first_one_is_none(self, api, root):
        Path(root, "models/current.json").write_text("{}")
        assert "cannot be used" in detail(api.get("/model"))
        assert api.post("/predict", json=[ITEM]).status_code == 503


class TestResults:
    def test_each_question_has_its_pointer(self, api, root):
        listed = api.get("/results").json()
        assert [info["question"] for info in listed] == [q.name for q in queries.questions()]
        assert {info["current"]["run_id"] for info in listed} == {QUERY_RUN}
        assert {info["current"]["batch"] for info in listed} == {1}

    def test_money_is_exact(self, api, root):
        _, expected = queries.current(root, "q01")
        answer = api.get("/results/q01").json()
        assert [column["name"] for column in answer["columns"]] == expected.columns
        assert [row["charge"] for row in answer["rows"]] == [format(value, "f") for value in expected["charge"]]
        assert [row["line_items"] for row in answer["rows"]] == expected["line_items"].to_list()

    def test_times_are_iso(self, api, root):
        _, expected = queries.current(root, "revenue_per_minute")
        rows = api.get("/results/revenue_per_minute").json()["rows"]
        assert [datetime.fromisoformat(row["minute"]) for row in rows] == expected["minute"].to_list()

    def test_limit_is_the_first_rows(self, api, root):
        everything = api.get("/results/recommended_suppliers").json()["rows"]
        assert api.get("/results/recommended_suppliers?limit=3").json()["rows"] == everything[:3]
        assert "limit" in detail(api.get("/results/recommended_suppliers?limit=0"))

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


class TestReports:
    def test_the_page_cannot_do_anything(self, api, root):
        page = api.get(f"/reports/{QUERY_RUN}")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == (
            "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        )
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "What query did" in page.text

    def test_the_notebook_is_a_download(self, api, root):
        download = api.get(f"/reports/{QUERY_RUN}/notebook")
        assert download.headers["content-disposition"] == f'attachment; filename="{QUERY_RUN}.ipynb"'
        assert download.headers["x-content-type-options"] == "nosniff"
        assert nbformat.reads(download.text, as_version=4).cells[0].source == "# What query did"

    def test_a_link_to_another_report_leads_there(self, api, root):
        (page,) = Path(root).glob(f"reports/*/*/{QUERY_RUN}/report.html")
        page.write_text('<a href="../../2026-03-01/query-20260301T120000-abcdef/report.html">the last ok run</a>')
        assert api.get(f"/reports/{QUERY_RUN}").text.startswith('<a href="/reports/query-20260301T120000-abcdef">')

    def test_a_page_that_was_never_written_is_made(self, api, root):
        (page,) = Path(root).glob(f"reports/*/*/{QUERY_RUN}/report.html")
        written = page.read_bytes()
        page.unlink()
        assert api.get(f"/reports/{QUERY_RUN}").content == written and "What query did" in written.decode()

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
    assert set(paths) == {
        *("/health", "/ready", "/model", "/predict", "/results", "/results/{question}", "/runs"),
        *("/reports/{run_id}", "/reports/{run_id}/notebook"),
    }
    for path, operation in ((path, next(iter(methods.values()))) for path, methods in paths.items()):
        assert operation["description"].endswith("."), path
        for status, response in operation["responses"].items():
            if status != "200" and path != "/ready":
                assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}


def test_it_brings_nothing_that_could_start_a_stage():
    code = "import sys, app.api; print(*{'prefect', 'papermill', 'nbclient', 'nbconvert', 'coiled'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
