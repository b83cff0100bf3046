"""The same on an object store: everything goes over the S3 protocol to a server on loopback."""

from drawing import broken, said, whole
from fastapi.testclient import TestClient
from support import SMALL, orchestrate, s3_variables

from etl.storage import PROJECT
from pipeline import Lake


def test_one_pass_on_s3_and_the_api_and_dashboard_read_it(s3_root, s3_server, monkeypatch):
    done = orchestrate(PROJECT, "run", "all", "--env", "dev", "--root", s3_root, *SMALL, env=s3_variables(s3_server))
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("generate", "preprocess", "compact", "query", "train"):
        assert any(line.split()[1:3] == [stage, "ok"] for line in done.stdout.splitlines()), done.stdout
    assert f"{s3_root}/reports/train/" in done.stdout.replace("\n", "")
    snapshot = Lake(s3_root).snapshot()
    assert snapshot.frame("orders").collect().height == 3 * 375  # three slices of 15,000 orders in 40

    monkeypatch.setenv("ETL_ROOT", s3_root)
    from app.api import app  # reads its settings when it is imported

    client = TestClient(app)
    assert client.get("/ready").json()["batch"] == 1
    assert client.get("/results/q01").status_code == 200
    run = client.get("/runs").json()[0]
    assert client.get(f"/reports/{run['run_id']}").status_code == 200

    page = whole()
    assert "the newest file" in said(page) and not broken(page)
