"""`up`, for real: Prefect's server, its schedules, the API and the dashboard, and what is left when it ends."""

import contextlib
import html
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from receiver import receiver
from support import WEBSOCKET, asked, environment, free_port, orchestrate, write_stage

from etl.runs import index, releases
from etl.storage import PROJECT, Root

sys.path.insert(0, str(PROJECT / "benchmarks"))
import footprint  # noqa: E402

ELSEWHERE = "http://evil.example"


def get(url: str, body: dict | None = None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read()


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, from /proc."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that run; a zombie does not."""
    running = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                running.append(pid)
    return running


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def eventually(condition, timeout_s: float, what: str, up: "Up | None" = None):
    """Its first true value. These are limits for a hang, not measurements."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        if up and up.process.poll() is not None:
            break
        time.sleep(0.3)
    pytest.fail(f"{what}: not within {timeout_s} s" + (f"\n{up.log.read_text()}" if up else ""))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def run_since(root: Path, since: str, stage: str, **conditions) -> dict | None:
    """The first run of a stage that began after a time and is as the conditions say; None before there is one."""
    place = Root.at(str(root))
    runs = [index.get(place, row["run_id"]) for row in index.newest(place, stage=stage, since=since)]
    return next((run for run in reversed(runs) if all(run[key] == value for key, value in conditions.items())), None)


def _message(flow_run: dict) -> str:
    """The run's message, "" before its end."""
    return flow_run["state"]["message"] or "" if flow_run["state_type"] == "FAILED" else ""


class Up:
    """One `orchestrate.py up` on ports of its own."""

    def __init__(self, project: Path, root: Path, *more: str, **variables: str):
        self.prefect, self.api, self.dashboard = ports = [free_port() for _ in range(3)]
        options = zip(("--prefect-port", "--api-port", "--dashboard-port"), map(str, ports), strict=True)
        self.log = project / f"up-{self.prefect}.log"
        asked_for = ["up", "--root", str(root), *more, *(x for pair in options for x in pair)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "orchestrate.py", *asked_for],
                cwd=project,
                env=environment(project) | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def flow_runs(self, deployment: str, **conditions) -> list[dict]:
        """The deployment's runs that ended, by Prefect's own account."""
        body = {"deployments": {"name": {"any_": [deployment]}}, "limit": 200}
        runs = json.loads(get(f"http://127.0.0.1:{self.prefect}/api/flow_runs/filter", body))
        return [run for run in runs if all(run[key] == value for key, value in conditions.items())]

    def end(self, number: int) -> None:
        """Signal it; nothing of it may be left, nor a port that it opened."""
        family = descendants(self.process.pid)
        assert len(family) >= 3
        os.kill(self.process.pid, number)
        self.process.wait(30)
        eventually(lambda: not alive(family), 10, f"processes left: {alive(family)}")
        for port in (self.prefect, self.api, self.dashboard):
            with pytest.raises(OSError):
                get(f"http://127.0.0.1:{port}/")


@pytest.fixture
def small(project) -> Path:
    """A project of three stages: one that works, one that breaks, and one that does not end."""
    for path in [*project.glob("notebooks/*.ipynb"), *project.glob("params/*.yml"), *project.glob("params/env/*.yml")]:
        path.unlink()
    (project / "params/env/local.yml").write_text("root: outputs\nmachine: null\ndask: null\n")
    write_stage(project, "works", 'check("true", True)\nrecord(rows=1)')
    write_stage(project, "breaks", "import time; time.sleep(0.5)\nraise ValueError('planted')")
    write_stage(project, "lasts", "import time; time.sleep(10_000)")
    (project / "params/lasts.yml").write_text("every: 1 hour\ndeadline: 50 minutes\n")
    return project


def api_of(up: Up, path: str, body: dict | None = None):
    """What Prefect's API answers; on busy cores its database is locked now and then."""
    return json.loads(eventually(lambda: get(f"http://127.0.0.1:{up.prefect}/api{path}", body), 60, path, up))


def ask_for_what_is_not_there(up: Up) -> str:
    """The id of a flow run of `works` with a parameter that it does not have."""
    deployment = api_of(up, "/deployments/name/works/works")
    body = {"parameters": {"parameters": {"rows_shwon": 1}}}
    return api_of(up, f"/deployments/{deployment['id']}/create_flow_run", body)["id"]


@pytest.fixture
def told(small):
    """Who is told what is not well."""
    with receiver() as received:
        with (small / "params/env/local.yml").open("a") as file:
            file.write(f"alerts:\n  to: ['{received.url}']\n")
        yield received


def test_schedules_fire_states_are_true_and_nothing_is_left(small, tmp_path, told):
    root = tmp_path / "root"
    up = Up(small, root, "--live")
    try:

        def scheduled(deployment: str, **conditions) -> list[dict]:
            return [run for run in up.flow_runs(deployment, **conditions) if "scheduled" in run["tags"]]

        completed = eventually(lambda: scheduled("works", state_name="Completed"), 300, "a scheduled run Completed", up)
        begun, due = (datetime.fromisoformat(completed[0][time]) for time in ("start_time", "expected_start_time"))
        assert begun >= due  # Prefect's engine lets runs begin up to half a second early
        failed = eventually(lambda: scheduled("breaks", state_type="FAILED"), 60, "a scheduled Failed")
        assert "planted" in failed[0]["state"]["message"]
        assert not up.flow_runs("breaks", state_type="COMPLETED")
        assert not up.flow_runs("works", state_type="FAILED")
        # each runs at once, and one that does not end holds back no other
        assert eventually(lambda: up.flow_runs("lasts", state_type="RUNNING"), 60, "the run that lasts")
        artifacts = json.loads(get(f"http://127.0.0.1:{up.prefect}/api/artifacts/filter", {}))
        run_id = failed[0]["state"]["message"].split(":")[0]
        assert any(f"/reports/{run_id}" in artifact["data"] for artifact in artifacts)
        assert any("planted" in (artifact["description"] or "") for artifact in artifacts)
        assert b"planted" in get(f"http://127.0.0.1:{up.api}/reports/{run_id}")
        assert json.loads(get(f"http://127.0.0.1:{up.api}/health"))
        assert b"<!DOCTYPE html>" in get(f"http://127.0.0.1:{up.dashboard}/").replace(b"doctype", b"DOCTYPE")
        eventually(lambda: "failed: stage breaks" in told.titles, 60, "an alert", up)
        health = json.loads(get(f"http://127.0.0.1:{up.api}/health/stages"))
        assert any(finding["sentence"].startswith("breaks: failed") for finding in health["findings"]), health
        found = footprint.measured(up.process.pid, 1, Root.at(str(root)))
        assert {"Prefect server", "API", "dashboard", "worker"} <= set(found["memory_mb"]), found
        assert 300 < found["peak_mb"] < 2000, found

        # no page of the web gets at it
        assert asked(up.prefect, "/api/health", host="evil.example")[0] == 403
        assert asked(up.api, "/runs", host="evil.example")[0] == 400
        assert asked(up.api, "/runs", host=f"localhost:{up.api}")[0] == 200
        own = f"http://127.0.0.1:{up.dashboard}"
        for origin, expected in ((own, True), (ELSEWHERE, False)):
            headers = {name.replace("-", "_"): value for name, value in WEBSOCKET.items()}
            assert (asked(up.dashboard, "/_stcore/stream", origin=origin, **headers)[0] == 101) == expected

        # a second one is told who is there, and changes nothing
        second = Up(small, root)
        assert second.process.wait(120) == 1
        said = " ".join(second.log.read_text().split())
        assert f"`up` is at work on {root} already: process {up.process.pid} on" in said and own in said, said
        assert up.flow_runs("lasts", state_type="RUNNING") and not up.flow_runs("works", state_type="CRASHED")

        # a backfill is one flow of runs; that of one which was killed is closed
        tags = {"tags": ["etl", str(root), "works: many"]}
        flow = api_of(up, "/flows/", {"name": "backfill"})
        running = {"state": {"type": "RUNNING"}, "flow_id": flow["id"], "name": "killed", **tags}
        api_of(up, "/flow_runs/", running)
        between = ("--from-time", "2026-03-01", "--to-time", "2026-03-03", "--every", "1 day", "--parallel", "2")
        server = {"PREFECT_API_URL": f"http://127.0.0.1:{up.prefect}/api"}
        done = orchestrate(small, "run", "works", "--root", str(root), *between, env=server)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 ok", done
        of_it = api_of(up, "/flow_runs/filter", {"flow_runs": {"tags": {"all_": tags["tags"]}}})
        shown = {(run["name"], run["state_type"], bool(run["parent_task_run_id"])) for run in of_it}
        assert shown == {
            ("killed", "CRASHED", False),
            ("backfill works", "COMPLETED", False),
            ("works 2026-03-01 00:00:00 by hand", "COMPLETED", True),
            ("works 2026-03-02 00:00:00 by hand", "COMPLETED", True),
        }

        # what cannot be run is a failed run with a reason and a report
        tried = [ask_for_what_is_not_there(up)]

        def wrong() -> list[dict]:
            run = api_of(up, f"/flow_runs/{tried[-1]}")
            if run["state_type"] == "CANCELLED":  # its stage was at work already: once more
                tried.append(ask_for_what_is_not_there(up))
            return [run]

        (small / "notebooks/breaks.ipynb").write_text("<<<<<<< HEAD\n")
        for look, why in (
            (wrong, "unknown parameter 'rows_shwon'"),
            (lambda: up.flow_runs("breaks"), "notebooks/breaks.ipynb: line 1 is a marker of git"),
        ):

            def refused_run(look=look, why=why):
                return next((message for run in look() if why in (message := _message(run))), None)

            run_id = eventually(refused_run, 90, why, up).split(":")[0]
            page = html.unescape(get(f"http://127.0.0.1:{up.api}/reports/{run_id}").decode())
            assert why in page

        assert "live: the working tree runs" in up.log.read_text()

        # killed outright, its children go too, and the next start closes what was left open
        write_stage(small, "breaks", "import time; time.sleep(0.5)\nraise ValueError('planted')")
        flow = api_of(up, "/flows/", {"name": "theirs"})
        api_of(up, "/deployments/", {"name": "theirs", "flow_id": flow["id"], "tags": ["etl"]})
        running = {"state_type": "RUNNING"}
        eventually(
            lambda: up.flow_runs("works", **running) or up.flow_runs("breaks", **running), 120, "a run under way"
        )
        up.end(signal.SIGKILL)
        # whoever reads the root knows, and a watcher of its own tells it
        watch = ("watch", "--once", "--root", str(root))
        late = lambda: not orchestrate(small, *watch).returncode and "late: stage works" in told.titles  # noqa: E731
        eventually(late, 60, "what is late is told")
        assert told.titles.count("up: up") == told.titles.count("failed: stage breaks") == 1
    finally:
        up.process.kill()
    for path in (small / "notebooks/lasts.ipynb", small / "params/lasts.yml"):
        path.unlink()
    up = Up(small, root)
    try:
        eventually(lambda: b" deployments" in up.log.read_bytes(), 180, "the deployments after a restart", up)
        assert "closed" in up.log.read_text()
        crashed = [run for name in ("works", "breaks") for run in up.flow_runs(name, state_type="CRASHED")]
        assert crashed and "is gone" in crashed[0]["state"]["message"]
        # of a stage that is no more nothing waits on the server; what others have there is theirs
        names = {deployment["name"] for deployment in api_of(up, "/deployments/filter", {})}
        assert names == {"works", "breaks", "theirs"}
        ended = {"flows": {"name": {"any_": ["lasts"]}}, "limit": 200}
        assert {run["state_type"] for run in api_of(up, "/flow_runs/filter", ended)} <= {"CRASHED", "CANCELLED"}

        # it runs a release: edits wait for the next, which brings notebooks, schedules and stages together
        [first] = releases.newest(Root.at(str(root)))
        assert f"release {first.id} of " in up.log.read_text()
        write_stage(small, "works", 'check("true", True)\nrecord(edited=1)', yml="retries: 1\n")
        path = small / "params/works.yml"
        path.write_text(path.read_text().replace("every: 5", "every: 3"))
        (small / "notebooks/breaks.ipynb").unlink()
        (small / "params/breaks.yml").unlink()
        write_stage(small, "comes", 'check("true", True)\nrecord(rows=2)')
        eventually(lambda: b"differs from the release: 6 files" in up.log.read_bytes(), 60, "the edits are told", up)
        since = now()
        eventually(lambda: run_since(root, since, "works", state="ok"), 60, "a run after the edit", up)
        assert run_since(root, since, "works", state="ok")["release"] == first.id
        assert "edited" not in run_since(root, since, "works", state="ok")["metrics"]
        command = ("release", "--root", str(root), "--runs", "0")
        refused = orchestrate(small, *command)
        assert refused.returncode == 1 and "accept it with --accept breaks\n" in refused.stderr, refused
        moved = orchestrate(small, *command, "--accept", "breaks", "-m", "edited", "--json")
        second, since = json.loads(moved.stdout)["release"], now()
        eventually(
            lambda: run_since(root, since, "comes", release=second, state="ok"), 90, "a run of the new stage", up
        )
        edited = eventually(
            lambda: run_since(root, since, "works", release=second, state="ok"), 60, "a run of the edited one", up
        )
        assert edited["metrics"] == {"edited": 1}
        gone = lambda: {d["name"] for d in api_of(up, "/deployments/filter", {})} == {"works", "comes", "theirs"}  # noqa: E731
        eventually(gone, 60, "the stage that is gone has no deployment", up)
        eventually(
            lambda: api_of(up, "/deployments/name/works/works")["description"].startswith("every 3 s"),
            60,
            "its cadence",
        )
        coming = [run for run in up.flow_runs("comes", state_type="SCHEDULED") if "scheduled" in run["tags"]]
        assert len(coming) <= 1, coming  # the next one, for Prefect's page

        # Prefect's server is gone, database and all: runs go on, and it is there again
        [server] = [pid for pid in descendants(up.process.pid) if "prefect_server" in command_of(pid)]
        (root / "services/prefect/prefect.db").write_bytes(b"damaged" * 1000)
        os.kill(server, signal.SIGKILL)
        since = now()
        eventually(lambda: run_since(root, since, "works", release=second, state="ok"), 60, "a run without Prefect", up)
        eventually(lambda: b"is damaged" in up.log.read_bytes(), 60, "the damage is told", up)
        eventually(lambda: up.flow_runs("works", state_name="Completed"), 120, "a run in the new database", up)
        up.end(signal.SIGTERM)  # its handler does what Ctrl-C does
        assert up.process.returncode == 0, up.log.read_text()[-2000:]
    finally:
        up.process.kill()


def test_a_taken_port_is_a_clear_error(small, tmp_path):
    port = free_port()
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        done = subprocess.run(
            [sys.executable, "orchestrate.py", "up", "--root", str(tmp_path / "r"), "--api-port", str(port)],
            cwd=small,
            env=environment(small) | {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"port {port}, for the API, is taken" in done.stderr
