"""examples/clicks, another project on the same engine: from the files in landing to API and dashboard.

What is in its lake is held against DuckDB's own reading of the same files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from faults import toy

from etl.kernels import client
from etl.storage import PROJECT

CLICKS = PROJECT / "examples" / "clicks"
BEGUN, LATER = "2026-03-01T12:02:10+00:00", "2026-03-01T12:09:10+00:00"
SMALL = ("-p", "generate.sessions=3", "-p", "generate.history_hours=24", "-p", "compact.min_small_files=2")


def python(*arguments: str, **variables: str) -> str:
    """What Python printed, with the example as the working folder; a failure fails the test."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "ETL_", "PYTHONPATH"))
    }
    kept["ETL_SPOOL"] = os.environ["ETL_SPOOL"]
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=CLICKS, env=kept | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(kernels: str, root: Path, stage: str, at: str, *options: str) -> list[dict]:
    """The records of `etl run`."""
    asked = ("run", stage, "--root", str(root), "--at", at, "--json", *options)
    return json.loads(python("-m", "etl", *asked, ETL_KERNELS=kernels))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Iterator[str]:
    """The folder of the example's fork server: kernels that have imported what draws."""
    folder = tmp_path_factory.mktemp("k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ETL_KERNELS", str(folder / "k"))
        server, keeper = client.server_folder(CLICKS), client.Keeper(1, folder / "log", CLICKS)
        keeper.start()
        toy.until((server / "socket").exists, 240, "the fork server answers")
    yield str(server)
    keeper.end()


@pytest.fixture(scope="module")
def passes(tmp_path_factory, kernels) -> tuple[Path, Path, list[dict]]:
    """Two passes with late and repeated files: the root, all files that ever were in landing, the records."""
    folder = tmp_path_factory.mktemp("clicks")
    root, given = folder / "root", folder / "given"
    records = run(kernels, root, "generate", BEGUN, *SMALL[:4])
    shutil.copytree(root / "landing", given)
    records += run(kernels, root, "preprocess", BEGUN)
    records += run(kernels, root, "generate", LATER, *SMALL[:4])
    shutil.copytree(root / "landing", given, dirs_exist_ok=True)
    repeated = sorted(given.glob("events/2026/02/28/*.gz"))[:3]
    for file in repeated:
        again = root / "landing" / file.relative_to(given)
        again.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, again.with_name(f".{again.name}"))
        again.with_name(f".{again.name}").rename(again)
    return root, given, records + run(kernels, root, "all", LATER, *SMALL)


def events(given: Path) -> str:
    """The events as DuckDB reads them from the gzip files."""
    paths = [str(path) for path in sorted(given.glob("events/**/*.json.gz"))]
    return f"""(
        SELECT id, session.id AS session, "user".id AS user_id, kind, page.path AS page, price::DECIMAL(9, 2) AS price,
            "at"::TIMESTAMPTZ AS moment, coalesce(session.device, 'unknown') AS device
        FROM read_json({paths}, columns={{
            id: 'VARCHAR', session: 'STRUCT(id VARCHAR, device VARCHAR)', "user": 'STRUCT(id BIGINT)', kind: 'VARCHAR',
            page: 'STRUCT(path VARCHAR)', price: 'VARCHAR', "at": 'VARCHAR'}}))"""


def asked(sql: str) -> list[tuple]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.sql(sql).fetchall()


LAKE = """
import json, sys
from pipeline import Lake, queries
snapshot = Lake(sys.argv[1]).snapshot()
events, users = (snapshot.frame(name).collect() for name in ("events", "users"))
told = {
    "events": [events.height, events["at"].max(), events["session"].n_unique(), events["user_id"].count(),
               events["price"].sum()],
    "users": [users.height, users["user_id"].n_unique()],
    "quarantine": snapshot.row_count("quarantine"),
    "answers": {q.name: queries.current(snapshot.root, q.name)[1].rows() for q in queries.questions()},
}
print(json.dumps(told, default=lambda value: value.isoformat() if hasattr(value, "isoformat") else str(value)))
"""


@pytest.fixture(scope="module")
def lake(passes) -> dict:
    """What the example's own code reads from its lake."""
    return json.loads(python("-c", LAKE, str(passes[0])))


def test_every_stage_of_both_passes_is_ok(passes):
    _, _, records = passes
    states = [(record["stage"], record["state"]) for record in records]
    assert states[:4] == [("generate", "ok"), ("preprocess", "ok"), ("generate", "ok"), ("generate", "noop")]
    assert {state for _, state in states[4:]} == {"ok"}, states


def test_the_lake_has_each_event_of_the_files_once(passes, lake):
    _, given, records = passes
    assert lake["quarantine"] == 0
    counts = "count(*), count(DISTINCT id), max(moment), count(DISTINCT session), count(user_id), sum(price)"
    total, distinct, newest, sessions, users, price = asked(f"SELECT {counts} FROM {events(given)}")[0]
    assert total == distinct > 10_000
    assert lake["events"] == [total, newest.isoformat(), sessions, users, str(price)]
    second = next(record for record in records[4:] if record["stage"] == "preprocess")
    late = asked(f"SELECT count(*) FROM {events(given)} WHERE moment < '2026-02-28'")[0][0]
    assert late > 0, "some events came two days late"
    assert 0 < second["metrics"]["rows"] < 1000, "the repeated files brought nothing"


def test_users_have_a_row_for_each_change(passes, lake):
    rows = f"read_csv('{passes[1]}/users/*.csv')"
    assert lake["users"] == list(asked(f"SELECT count(*), count(DISTINCT user_id) FROM {rows}")[0])
    assert lake["users"][0] > lake["users"][1] == 1440


def test_the_answers_are_those_of_duckdb(passes, lake):
    _, given, _ = passes
    sessions = f"""(SELECT min(moment)::DATE::VARCHAR AS day,
         bool_or(kind = 'cart')::INT AS cart, bool_or(kind = 'purchase')::INT AS bought
        FROM {events(given)} GROUP BY session)"""
    by_day = f"SELECT day, count(*), sum(cart), sum(bought) FROM {sessions} GROUP BY 1 ORDER BY 1"
    assert [[day[:10], *counts] for day, *counts in lake["answers"]["funnel_by_day"]] == plain(asked(by_day))
    recent = f"(SELECT * FROM {events(given)} WHERE moment > '{lake['events'][1]}'::TIMESTAMPTZ - INTERVAL 24 HOURS)"
    pages = f"""SELECT page, count(*), count(DISTINCT session) FROM {recent} WHERE kind = 'view'
        GROUP BY 1 ORDER BY 2 DESC, 1"""
    assert lake["answers"]["top_pages"] == plain(asked(pages))
    newest = f"""(SELECT user_id, arg_max(country, updated_at) AS country, arg_max(plan, updated_at) AS plan
        FROM read_csv('{given}/users/*.csv') GROUP BY user_id)"""
    active = f"""SELECT country, plan, count(DISTINCT user_id) FROM {recent} JOIN {newest} USING (user_id)
        GROUP BY 1, 2 ORDER BY 1, 2"""
    assert lake["answers"]["active_users"] == plain(asked(active))


def plain(rows: list[tuple]) -> list[list]:
    return [list(row) for row in rows]


def test_what_comes_with_a_minute_is_always_the_same_bytes(passes, tmp_path, kernels):
    run(kernels, tmp_path / "twin", "generate", BEGUN, *SMALL[:4])
    run(kernels, tmp_path / "twin", "generate", LATER, *SMALL[:4])
    made, twin = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*-*")}
        for folder in (passes[1], tmp_path / "twin" / "landing")
    )
    assert made == twin and len(made) > 60


READERS = """
import json, os, re, sys
os.environ["ETL_ROOT"], sample = sys.argv[1], json.loads(sys.argv[2])
import importlib.util
from fastapi.testclient import TestClient
from streamlit.testing.v1 import AppTest
from app.api import app

api = TestClient(app, raise_server_exceptions=False)
page = AppTest.from_file(importlib.util.find_spec("app.dashboard").origin, default_timeout=60).run()
told = {
    "ready": api.get("/ready").json(),
    "results": {q["question"]: api.get("/results/" + q["question"]).json() for q in api.get("/results").json()},
    "model": api.get("/model").json(),
    "predictions": api.post("/predict", json=sample).json(),
    "refused": [api.post("/predict", json=[sample[0] | wrong]).json() for wrong in ({"phone": 2}, {"l_tax": 1})],
    "documented": api.get("/openapi.json").text,
    "exceptions": [element.message for element in page.exception],
    "warnings": [element.value for element in page.warning],
    "titles": [element.value for element in page.title],
    "told": re.sub("<[^>]+>", " ", " ".join(element.proto.body for element in page.get("html"))),
}
for name in ("questions", "lake", "model", "digest"):
    drawn = AppTest.from_string(f"from app.views import {name}; {name}.page()", default_timeout=60).run()
    told[f"page of {name}"] = {
        "problems": [element.value for element in [*drawn.exception, *drawn.warning, *drawn.error]],
        "said": " ".join(part.value for part in [*drawn.title, *drawn.header, *drawn.caption, *drawn.markdown]),
        "fields": [field.label for field in drawn.text_input],
        "tables": [element.value.to_csv(index=False) for element in drawn.dataframe],
    }
print(json.dumps(told))
"""
SESSIONS = [{"views": 8, "pages": 4, "known": 1, "phone": 0}, {"views": 1, "pages": 1, "known": 0, "phone": 1}]


@pytest.fixture(scope="module")
def shown(passes) -> dict:
    """What the API answers and the dashboard shows: `app` as it is, told of this project by nothing but its domain."""
    path = os.pathsep.join([str(CLICKS), str(PROJECT)])
    return json.loads(python("-c", READERS, str(passes[0]), json.dumps(SESSIONS), PYTHONPATH=path).splitlines()[-1])


def test_the_api_serves_the_answers_and_predicts(shown, lake):
    assert shown["ready"]["ready"] and shown["ready"]["missing"] == []
    answers = {name: [list(row.values()) for row in answer["rows"]] for name, answer in shown["results"].items()}
    assert [row[1:] for row in answers["funnel_by_day"]] == [row[1:] for row in lake["answers"]["funnel_by_day"]]
    assert answers["top_pages"] == lake["answers"]["top_pages"]
    likely, unlikely = shown["predictions"]
    assert likely["probability"] > 0.3 > 0.1 > unlikely["probability"]
    assert not unlikely["buys"] and unlikely["model_id"] == shown["model"]["model_id"]
    assert shown["model"]["features"] == ["views", "pages", "known", "phone"]
    assert shown["model"]["metrics"]["log_loss"] < shown["model"]["metrics"]["guess"]
    assert [sentence["detail"] for sentence in shown["refused"]] == [
        "body[0].phone: Input should be less than or equal to 1, not 2",
        "body[0].l_tax: Extra inputs are not permitted, not 1",
    ]
    assert not re.search("line.?item|order", shown["documented"].replace("in the order", ""), re.IGNORECASE)


def test_the_dashboard_shows_the_domain_that_is_there(shown, lake):
    assert shown["exceptions"] == [] and shown["warnings"] == []
    assert shown["titles"] == ["Clicks, live"]
    told = " ".join(shown["told"].split())
    assert f"Events {lake['events'][0]:,} " in told and f"Changes of users {lake['users'][0]:,} " in told
    assert f"{shown['model']['metrics']['log_loss']:.4f}" in told
    assert all(stage in told for stage in ("generate", "preprocess", "compact", "query", "train"))


def test_the_other_pages_show_it_too(shown, lake):
    pages = {name: shown[f"page of {name}"] for name in ("questions", "lake", "model", "digest")}
    assert {name: page["problems"] for name, page in pages.items()} == dict.fromkeys(pages, [])
    assert "Read from" in pages["questions"]["said"] and "**events**" in pages["questions"]["said"]
    rows = {line.split(",")[0]: line.split(",")[2] for line in pages["lake"]["tables"][0].splitlines()}
    assert rows["events"] == f"{lake['events'][0]}"
    assert "Will a session end in a purchase?" in pages["model"]["said"]
    assert pages["model"]["fields"] == ["views", "pages", "known", "phone"]
    assert not re.search("line.?item|tpc", json.dumps(pages), re.IGNORECASE)


def test_api_and_dashboard_find_this_project_and_the_app():
    code = "import json, orchestrate; from pathlib import Path; from etl.serve.services import PORTS, usual; "
    code += "print(json.dumps([service.variables for service in usual('r', PORTS, Path('logs'))[1:]]))"
    for variables in json.loads(python("-c", code, ETL_PROJECT=str(CLICKS))):
        found = python("-c", "import app, pipeline; print(app.__file__, pipeline.__file__)", **variables).split()
        assert found == [str(PROJECT / "app/__init__.py"), str(CLICKS / "pipeline/__init__.py")]
