"""Coiled, on loopback: its own client, a control plane of ours, and a Dask cluster with a certificate of its own for
the machines of each of its clusters. No other host is asked.

    python tests/coiled_machines.py questions ROOT                one run of query on a cluster, as `run_stage` makes it
    python tests/coiled_machines.py machines ROOT N SEED [NAMES]  runs on machines that are lost, hang, ...

Both print what came of it as JSON.
"""

import contextlib
import gzip
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

ASKED = {"name": "questions", "n_workers": 1, "region": "us-east-2", "software": "etl", "show_widget": False}
os.environ["DASK_COILED__CLIENT_PUBLIC_IP"] = "127.0.0.1"  # or the client asks another host for it
AT = "/api/v2/clusters/account/here/"


class Machines:
    """One cluster of Coiled's: a scheduler with its own handlers, and a worker in a process of its own."""

    def __init__(self, wanted: dict, is_apart: bool):
        from distributed import LocalCluster
        from distributed.security import Security

        self.wanted, self.security, self.keepalive_s = wanted, Security.temporary(), None
        self.dask = LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=is_apart,
            protocol="tls://",
            security=self.security,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        )
        told = ("update_env_vars", "unset_env_vars", "add_keepalive_session", "end_keepalive_session")
        for name in (f"coiled_{of}" for of in told):
            self.dask.scheduler.handlers[name] = lambda **_: None
        self.dask.scheduler.handlers["coiled_set_keepalive"] = self.keep_alive
        self.left_at: float | None = None
        self.is_gone, self.on_end = False, lambda: None

    def keep_alive(self, keepalive: Any = None, **_: Any) -> None:
        from dask.utils import parse_timedelta

        self.keepalive_s = parse_timedelta(keepalive)

    def look(self) -> None:
        """End it when its clients have been gone for `keepalive`, as Coiled's scheduler does."""
        clients = [name for name in self.dask.scheduler.clients if name != "fire-and-forget"]
        self.left_at = None if clients else self.left_at or time.monotonic()
        if self.left_at and self.keepalive_s is not None and time.monotonic() - self.left_at > self.keepalive_s:
            self.end()

    def processes(self) -> list[psutil.Process]:
        """The worker's, and what it has started."""
        pids = [worker.pid for worker in self.dask.workers.values() if getattr(worker, "pid", None)]
        with contextlib.suppress(psutil.NoSuchProcess):
            return [of for pid in pids for of in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
        return []

    def end(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            self.on_end()
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.dask.close(timeout=5)


@dataclass
class ControlPlane:
    """What Coiled's service knows of the clusters of its one workspace, `here`."""

    boot: Callable[[dict], Machines]
    clusters: dict[int, Machines] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)  # by the tag `refused`, of which there are still so many
    ssh: Callable[[int], dict] | None = None  # the host and port, and the key, that lead to a cluster's machine

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        """The status and the JSON for a request."""
        rest = path.removeprefix(AT)
        if (method, rest) == ("POST", ""):
            key = body.get("tags", {}).get("refused")
            if key and self.refusals.get(key, 1):
                self.refusals[key] = self.refusals.get(key, 1) - 1
                return 400, {"detail": "no m7i.large is to be had in us-east-2"}
            number = len(self.clusters) + 1
            self.clusters[number] = self.boot(body)
            return 200, {"id": number, "existing": False}
        if rest.startswith("https-certificate"):
            return 200, {"status": "ready"}
        if rest.startswith("name/"):
            named = [number for number in self.open() if self.clusters[number].wanted["name"] == rest[5:]]
            return (200, {"id": named[-1]}) if named else (404, {"detail": f"no cluster {rest[5:]}"})
        if rest.startswith("id/"):
            number = int(rest.split("/")[1])
            if method == "DELETE":
                threading.Thread(target=self.clusters[number].end).start()
                self.clusters[number].wanted["deleted"] = True
                return 200, {}
            if rest.endswith("/ssh-key") and self.ssh:
                return 200, self.ssh(number)
            told = self.cluster(number)
            return 200, {f"id/{number}": told, f"id/{number}/state": told["current_state"]}.get(rest, {})
        account = {"slug": "here", "name": "here", "id": 1, "active": True}
        known = {
            "/api/v2/user/me": {"username": "tester", "id": 1},
            "/api/v2/user/me/memberships": [{"account": account, "is_admin": True, "is_default_account": True}],
            "/api/v1/here/backend_options/": {"backend": "vm_aws", "options": {}},
            "/api/v1/vm-types/": {"results": [], "next": None},
        }
        return 200, known.get(path, {})

    def open(self) -> list[int]:
        return [number for number, cluster in self.clusters.items() if not cluster.is_gone]

    def look(self) -> None:
        """For ever: who has been left for `keepalive`?"""
        while True:
            for number in self.open():
                with contextlib.suppress(Exception):  # it is ending
                    self.clusters[number].look()
            time.sleep(0.2)

    def cluster(self, number: int) -> dict:
        cluster, now = self.clusters[number], datetime.now(UTC).isoformat()
        ready = {"state": "stopped" if cluster.is_gone else "ready", "reason": "", "updated": now}
        machine = {
            "id": number,
            "created": now,
            "current_state": ready,
            "public_ip_address": "127.0.0.1",
            "private_ip_address": "127.0.0.1",
            "vm_type": {"name": "m7i.large"},
        }
        node = {"name": "node", "created": now, "current_state": ready | {"state": "started"}, "instance": machine}
        return {
            "id": number,
            "name": cluster.wanted.get("name"),
            "created": now,
            "current_state": ready,
            "desired_workers": 1,
            **{"cost_per_hour": 0.05, "total_cost": 0.01, "billable_time": 1.0, "senv_alias": {"name": "etl"}},
            "scheduler": node | {"dashboard_address": "http://127.0.0.1:1"},
            "workers": [node],
            "cluster_options": {
                **{"region_name": cluster.wanted.get("region_name"), "zone_name": None},
                "tls_cert": cluster.security.tls_client_cert,
                "tls_key": cluster.security.tls_client_key,
            },
            "scheduler_port": int(cluster.dask.scheduler_address.rpartition(":")[2]),
            "cluster_infra": {"give_scheduler_public_ip": True, "current_state": ready | {"state": "created"}},
        }

    def serve(self) -> str:
        """From now on in the background; its URL."""
        plane = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                sent = self.rfile.read(int(self.headers.get("content-length") or 0))
                sent = gzip.decompress(sent) if sent[:2] == b"\x1f\x8b" else sent
                status, answer = plane.answer(self.command, self.path.partition("?")[0], json.loads(sent or "{}"))
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"


def begin(is_apart: bool) -> ControlPlane:
    """At work, and what Coiled's client asks."""
    import dask.config

    plane = ControlPlane(lambda wanted: Machines(wanted, is_apart))
    threading.Thread(target=plane.look, daemon=True).start()
    dask.config.set({"coiled.server": plane.serve(), "coiled.token": "none", "coiled.workspace": "here"})
    return plane


def questions(root: str) -> dict:
    from etl import params
    from etl.runs import dispatch
    from etl.storage import PROJECT

    plane = begin(is_apart=False)
    project = params.load(PROJECT, "local", ["query.questions=[q01, q05, top_customers]"])
    stage = replace(project.stages["query"], dask={"coiled": ASKED | {"credentials": None}}, retries=0)
    record = dispatch.run_stage(stage, replace(project.environment, root=root))
    told = {name: getattr(record, name) for name in ("run_id", "state", "reason", "parameters", "report")}
    [cluster] = plane.clusters.values()
    return told | {
        "wanted": cluster.wanted,
        "deleted": "deleted" in cluster.wanted,
        "key": cluster.security.tls_client_key,
    }


BLOCK = {
    "vm_type": "m7i.large",
    "region": "us-east-2",
    "software": "etl",
    "keepalive": "20 seconds",
    "dollars_an_hour": 0.1,
}
WORK = """import pathlib, time, uuid
from etl.storage import Root
Root.at(root).write(f"begun/{run_id}/{uuid.uuid4().hex}", b"")  # each kernel that ran it
for i in range(steps):
    print('at', time.time(), flush=True)
    time.sleep(0.1)"""
ROWS = 'Root.at(root).create(f"rows/{scheduled_for}", b"1")'
DECLARED = 'scheduled_for: str = "2026-01-01T00:00:00+00:00"  # its time\nsteps: int = 1  # tenths of a second\n'
LONG = 30_000
AT_ONCE = 2  # lanes, each with one run at a time: a machine is two processes here, and there are two cores


class Campaign:
    """A stage whose runs meet a fault each, on machines of a control plane."""

    def __init__(self, root: str, folder: Path, seed: int):
        from faults import toy
        from support import busy_s, write_stage

        from etl import params

        self.plane, self.seed, self.root = begin(is_apart=True), seed, root
        project = toy.project(folder / "project")
        write_stage(project, "work", WORK, ROWS, parameters=DECLARED)
        self.project = params.load(project, "local")
        self.minutes = iter(range(60 * 24 * 28))
        self.silence_s, self.deadline_s = busy_s(6), busy_s(20)


class Run:
    """One, its last attempt's `record`; the fault meets the first, once home has seen it print."""

    def __init__(self, campaign: Campaign, tags: dict[str, str]):
        self.campaign, self.tags, self.minute = campaign, tags, next(campaign.minutes)
        self.rng, self.cancel = random.Random(campaign.seed * 10_000 + self.minute), threading.Event()
        self.ids: list[str] = []
        self.lags_s: list[float] = []  # from a line's print to when home has it
        self.met_at, self.over = 0.0, threading.Event()

    def to_its_end(self, fault=None, steps=1, retries=0, is_due=False, silence=None, **machine) -> "Run":
        from etl.runs import dispatch

        extra = {"show_widget": False, "credentials": None, "tags": self.tags}
        deadline_s = self.campaign.deadline_s if is_due else 3600.0
        silence = silence or f"{max(60, 2 * deadline_s) if is_due else self.campaign.silence_s} seconds"
        block = BLOCK | {"silence": silence, "extra_kwargs": extra} | machine
        stage = self.campaign.project.stages["work"]
        values = stage.values | {"steps": steps}
        stage = replace(stage, machine=block, retries=retries, values=values, deadline_s=deadline_s)
        at = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(minutes=self.minute)
        watching = threading.Thread(target=self.watch, args=(fault,))
        watching.start()
        began, environment = time.monotonic(), replace(self.campaign.project.environment, root=self.campaign.root)
        self.record = dispatch.run_stage(
            stage, environment, scheduled_for=at, on_begin=self.ids.append, cancel=self.cancel
        )
        ended = time.monotonic()
        self.over.set()
        watching.join()
        self.took_s, self.after_s = ended - began, ended - self.met_at if self.met_at else 0.0
        # since home heard of it first: what the deadline counts
        self.ran_s = self.took_s - (self.record.machine or {}).get("boot_s", self.took_s)
        return self

    def watch(self, fault: Callable[["Run"], Any] | None) -> None:
        from etl.runs import journal

        seen, meets_at = 0, None
        while not self.over.wait(0.05):
            path = journal.spool() / self.ids[0] / "journal.jsonl" if self.ids else Path("none")
            outputs = [event["output"] for event in journal.read(path, "output")] if path.exists() else []
            printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
            for text in printed[seen:]:
                self.lags_s.append(time.time() - float(text.split("\n")[-2].removeprefix("at ")))
            seen = len(printed)
            meets_at = meets_at or (printed and time.monotonic() + self.rng.uniform(0, 1))
            if fault and meets_at and time.monotonic() > meets_at and not self.met_at:
                self.met_at = time.monotonic()
                fault(self)

    def pid(self) -> int:
        from etl.runs import live
        from etl.storage import Root

        return live.claimed(Root.at(self.campaign.root), self.ids[0])["pid"]

    def machines(self) -> Machines:
        from etl.runs import journal

        events = journal.read(journal.spool() / self.ids[0] / "journal.jsonl", "machine")
        name = next(event["machine"]["name"] for event in events)
        clusters = [self.campaign.plane.clusters[number] for number in self.campaign.plane.open()]
        return next(cluster for cluster in clusters if cluster.wanted["name"] == name)

    def lose(self) -> None:
        self.machines().end()

    def lose_worker(self) -> None:
        for process in self.machines().processes()[:1]:
            process.kill()

    def hang(self) -> None:
        os.kill(self.pid(), signal.SIGSTOP)

    def kernels(self) -> dict[str, int]:
        from etl.storage import Root

        return {run_id: Root.at(self.campaign.root).files(f"begun/{run_id}").__len__() for run_id in self.ids}

    def told(self) -> dict:
        machine = self.record.machine or {}
        return {
            "state": self.record.state,
            "reason": self.record.reason,
            "attempts": len(self.ids),
            "kernels": max(self.kernels().values()),
            "machine": {key: machine.get(key) for key in ("name", "type", "region", "spot")},
            "after_s": round(self.after_s, 1),
            "over_s": round(self.ran_s - self.campaign.deadline_s, 1),
            "lag_s": round(max(self.lags_s, default=0), 1),
        }


FAULTS: dict[str, Callable[[Run, int], Run]] = {
    "again": lambda run, _: run.to_its_end(),  # on the lane's machine, which is kept
    "changed": lambda run, k: run.to_its_end(vm_type=f"m7i.{k + 2}xlarge"),
    "lost": lambda run, _: run.to_its_end(Run.lose, LONG),
    "worker": lambda run, _: run.to_its_end(Run.lose_worker, LONG),
    "hung": lambda run, _: run.to_its_end(Run.hang, LONG),
    "overdue": lambda run, _: run.to_its_end(Run.hang, LONG, is_due=True),
    "cancelled": lambda run, _: run.to_its_end(lambda run: run.cancel.set(), LONG, silence="60 seconds"),
    "refused": lambda run, _: run.to_its_end(),
    "retried": lambda run, _: run.to_its_end(retries=1),
}


def machines(root: str, n: str, seed: str, only: str = "") -> dict:
    """Each fault `n` times, several at once: what each came to, and what is left over."""
    from etl.storage import Root

    names = only.split(",") if only else [*FAULTS]
    with tempfile.TemporaryDirectory() as folder:
        campaign, told = Campaign(root, Path(folder), int(seed)), {name: [] for name in names}

        def lane(number: int) -> None:
            """Its machine is kept from one run to the next, unless that had to have one of its own."""
            for k in range(number, int(n), AT_ONCE):
                for name in names:
                    tags = {"lane": str(number)} if name in ("again", "cancelled") else {"run": f"{name} {k}"}
                    if name in ("refused", "retried"):
                        tags["refused"] = f"{name} {k}"
                    ended = FAULTS[name](Run(campaign, tags), k).told()
                    told[name].append(ended)
                    print(name, ended, file=sys.stderr, flush=True)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lane, range(AT_ONCE)))
        until = time.monotonic() + 120
        while campaign.plane.open() and time.monotonic() < until:
            time.sleep(0.2)
        return {
            "ended": told,
            "open": len(campaign.plane.open()),
            "asked": len(campaign.plane.clusters),
            "left": Root.at(root).files("live"),
            "rows": len(Root.at(root).files("rows")),
        }


if __name__ == "__main__":
    print(json.dumps({"questions": questions, "machines": machines}[sys.argv[1]](*sys.argv[2:]), default=str))
    sys.stdout.flush()
    os._exit(0)  # the client's threads would be waited for
