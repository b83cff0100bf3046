"""A project that predicts nothing has the API and the dashboard all the same."""

import json
import subprocess
import sys

from support import environment

LOOKS = """
import json, sys
from fastapi.testclient import TestClient
from streamlit.testing.v1 import AppTest
from app import api

client = TestClient(api.app)
shown = AppTest.from_string("from app.views import overview; overview.page()", default_timeout=60).run()
print(json.dumps({
    "predict": [(answer := client.post("/predict", json=[{}])).status_code, answer.json()],
    "model": [(answer := client.get("/model")).status_code, answer.json()],
    "ready": client.get("/ready").json(),
    "results": client.get("/results/q01").status_code,
    "paths": [*client.get("/openapi.json").json()["paths"]],
    "exceptions": [str(error) for error in shown.exception] + [warning.value for warning in shown.warning],
    "figures": " ".join(element.proto.body for element in shown.get("html")),
}))
"""


def test_a_project_without_a_model_is_served(filled, project):
    (project / "pipeline" / "model.py").unlink()
    variables = environment(project) | {"ETL_ROOT": filled, "ETL_PROJECT": str(project)}
    command = [sys.executable, "-c", LOOKS]
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    sentence = {
        "detail": "this project has no model, so there is nothing to predict: pipeline/model.py would declare one"
    }
    assert told["predict"] == told["model"] == [404, sentence]
    assert told["ready"]["ready"] and told["ready"]["missing"] == [] and told["results"] == 200
    assert "/v1/results" in told["paths"]
    assert not {"/v1/predict", "/v1/model", "/v1/models"} & {*told["paths"]}
    assert told["exceptions"] == []
    assert all(name in told["figures"] for name in ("Orders", "Line items", "Refused rows"))
