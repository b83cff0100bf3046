"""Alerts: who is told, what a message says, and a receiver that is not there. The campaign has the incidents."""

import base64
import json
import logging
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
from published import add_run
from receiver import receiver
from support import orchestrate, write_stage
from test_health import NOW, SEEN, ago, run

from etl import params
from etl.params.alerts import Alerts
from etl.serve import alerts
from etl.storage import Root

FAILED = replace(SEEN, runs=[run("train", ago(seconds=9), "failed", reason="no room", heading="Fit", cell=9)])
WRITES = "import os, sys; open(sys.argv[1], 'a').write(os.environ['ALERT_TITLE'] + '\\n' + sys.stdin.read())"


@pytest.fixture
def received():
    with receiver() as opened:
        yield opened


def test_a_message_has_the_cards_first_line_and_the_reports_link(tmp_path, received, monkeypatch):
    monkeypatch.setenv("ALERTS_URL", received.url.replace("json://", "json://user:hunter2@"))
    wanted = Alerts(to=["ALERTS_URL"], command=[sys.executable, "-c", WRITES, str(tmp_path / "told")])
    root, send = Root.at(str(tmp_path / "root")), alerts.Sender(wanted)
    assert alerts.look(root, wanted, lambda fresh: FAILED, NOW, send) == 2
    [post] = received.posts
    assert (post["title"], post["type"]) == ("failed: stage train", "warning")
    lines = post["message"].splitlines()
    assert lines[0] == "train: failed, in Fit, cell 9: no room"
    assert lines[1] == f"http://127.0.0.1:8000/reports/{FAILED.runs[0]['run_id']}"
    assert (tmp_path / "told").read_text() == f"failed: stage train\n{post['message']}"
    assert "hunter2" not in root.read(alerts.STATE).decode()
    assert alerts.look(root, wanted, lambda fresh: FAILED, NOW, send) == 0  # once
    ok = replace(FAILED, runs=[*FAILED.runs, run("train", NOW)])
    assert alerts.look(root, wanted, lambda fresh: ok, NOW, send) == 2
    assert received.titles == ["failed: stage train", "recovered: stage train"]


def test_a_receiver_that_is_down_holds_up_no_other_and_gets_it_later(tmp_path, received, caplog):
    received.takes = lambda post: False
    wanted = Alerts(to=[received.url], command=[sys.executable, "-c", WRITES, str(tmp_path / "told")])
    root, send = Root.at(str(tmp_path / "root")), alerts.Sender(wanted)
    with caplog.at_level(logging.WARNING):
        counts = [alerts.look(root, wanted, lambda fresh: FAILED, NOW, send) for _ in range(3)]
    assert counts == [1, 0, 0] and len([r for r in caplog.records if "tried again" in r.message]) == 1
    received.takes = lambda post: True
    assert alerts.look(root, wanted, lambda fresh: FAILED, NOW, alerts.Sender(wanted)) == 1
    assert received.titles == ["failed: stage train"]
    assert (tmp_path / "told").read_text().count("failed: stage train") == 1
    fails = Alerts(command=["/bin/false"])
    with pytest.raises(RuntimeError, match="status 1"):
        alerts.Sender(fails)(alerts.Message("1", "opened", "t", "b", {}, []), alerts.COMMAND)


def test_only_what_is_asked_for_is_told(tmp_path, received):
    wanted = Alerts(to=[received.url], on=["late", "recovered"])
    root, send = Root.at(str(tmp_path / "root")), alerts.Sender(wanted)
    late = replace(FAILED, last_ok=SEEN.last_ok | {"preprocess": NOW - timedelta(hours=1)})
    assert alerts.look(root, wanted, lambda fresh: late, NOW, send) == 1
    assert received.titles == ["late: stage preprocess"]


def env(project, text: str) -> None:
    (project / "params/env/local.yml").write_text(f"root: outputs\nmachine: null\ndask: null\n{text}")


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("to: [slack://T1/B2/hunter2]", "local.yml:5: to: expected the names of secrets"),
        ("to: ['json://me:hunter2@host/']", "to: expected the names of secrets"),
        ("to: ['json://host/?token=hunter2']", "to: expected the names of secrets"),
        ("figures: [revenue < 3]", "figures: expected a list of lines such as"),
        ("on: [fialed]", "on: expected a list of failed, late"),
        ("tos: [X]", "unknown key 'tos'; did you mean 'to'?"),
        ("command: page", "command: expected a program and its arguments"),
    ],
)
def test_check_names_what_is_wrong_with_alerts_and_shows_no_secret(project, block, problem):
    env(project, f"alerts:\n  {block}\n")
    with pytest.raises(params.ParamsError) as wrong:
        params.load(project)
    assert problem in str(wrong.value) and "hunter2" not in str(wrong.value)


def test_commands_check_and_watch_and_status(project, received, tmp_path):
    env(project, "alerts:\n  to: [MY_URL]\n  figures: [revenue_per_minut.revenue < 3]\n")
    checked = orchestrate(project, "check", "--env", "local", env={"MY_URL": "nowhere"})
    assert checked.returncode == 2
    assert "alerts: MY_URL is no URL that Apprise knows" in checked.stderr
    assert "there is no question revenue_per_minut; did you mean 'revenue_per_minute'?" in checked.stderr
    root = str(tmp_path / "root")
    Root.at(root).write("services/heartbeat.json", json.dumps({**SEEN.beat, "env": "local"}).encode())
    Root.at(root).write("landing/x", b"")
    env(project, f"alerts:\n  to: ['{received.url}']\n")
    write_stage(project, "preprocess", "1")
    assert orchestrate(project, "watch", "--once", "--root", root).returncode == 0
    assert "up: up" in received.titles and "late: stage preprocess" in received.titles
    status = orchestrate(project, "status", "--root", root, "--json")
    document = json.loads(status.stdout)
    assert status.returncode == 1 and not document["healthy"]
    assert document["sentence"].startswith("Not healthy: `up` is dead: it was last seen at 2026-03-01 12:00 UTC")


def test_who_gets_mail_gets_the_report_without_code(tmp_path, received):
    url, run_id = str(tmp_path / "root"), "query-20261122T120000-abc123"
    add_run(url, run_id, "failed", "ValueError: no such column")
    link = f"http://127.0.0.1:8000/reports/{run_id}"
    message = alerts.Message("1", "opened", "failed: stage query", "b", {"link": link, "root": url}, [])
    send = alerts.Sender(Alerts(to=[received.url]))
    send(message, received.url)
    send(replace(message, finding={"link": f"{link[:-1]}4", "root": url}), received.url)  # none is there
    send(replace(message, what="ended"), received.url)
    (attached,), *others = [post["attachments"] for post in received.posts]
    page = base64.b64decode(attached["base64"]).decode()
    assert attached["filename"] == f"{run_id}.html" and "What query did" in page and "1 + 1" not in page
    assert others == [[], []]
