"""One run of query on a cluster of Coiled's, as `run_stage` makes it; prints what came of it as JSON.

The client is Coiled's own. What answers it is a control plane on loopback, and a Dask cluster with a certificate of its
own stands for the machines: no other host is asked.

    python tests/coiled_machines.py ROOT
"""

import gzip
import json
import os
import sys
import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ASKED = {"name": "questions", "n_workers": 1, "region": "us-east-2", "software": "etl", "show_widget": False}
OF_COILED = ("coiled_set_keepalive", "coiled_update_env_vars", "coiled_unset_env_vars")  # handlers of its scheduler


@dataclass
class ControlPlane:
    """What Coiled's service knows of the one cluster of its one workspace, `here`."""

    certificate: str
    key: str
    port: int
    wanted: dict = field(default_factory=dict)  # what the client asked for
    deleted: bool = False

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        """The status and the JSON for a request."""
        at = "/api/v2/clusters/account/here/"
        match method, path.removeprefix(at):
            case "POST", "":
                self.wanted = body
                return 200, {"id": 1, "existing": False}
            case "DELETE", "id/1":
                self.deleted = True
                return 200, {}
            case _, "id/1":
                return 200, self.cluster()
            case _, name if path.startswith(f"{at}name/"):
                return 404, {"detail": f"no cluster {name}"}
        account = {"slug": "here", "name": "here", "id": 1, "active": True}
        known = {
            "/api/v2/user/me": {"username": "tester", "id": 1},
            "/api/v2/user/me/memberships": [{"account": account, "is_admin": True, "is_default_account": True}],
            "/api/v1/here/backend_options/": {"backend": "vm_aws", "options": {}},
            "/api/v1/vm-types/": {"results": [], "next": None},
        }
        return 200, known.get(path, {})

    def cluster(self) -> dict:
        now = datetime.now(UTC).isoformat()
        ready = {"state": "stopped" if self.deleted else "ready", "reason": "", "updated": now}
        machine = {
            "id": 1,
            "created": now,
            "current_state": ready,
            "public_ip_address": "127.0.0.1",
            "private_ip_address": "127.0.0.1",
            "vm_type": {"name": "m7i.large"},
        }
        node = {"name": "node", "created": now, "current_state": ready | {"state": "started"}, "instance": machine}
        return {
            "id": 1,
            "name": self.wanted.get("name"),
            "created": now,
            "current_state": ready,
            "desired_workers": 1,
            "scheduler": node | {"dashboard_address": "http://127.0.0.1:1"},
            "workers": [node],
            "cluster_options": {"tls_cert": self.certificate, "tls_key": self.key},
            "scheduler_port": self.port,
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


def main(root: str) -> None:
    import dask.config
    from distributed import LocalCluster
    from distributed.security import Security

    from etl import params
    from etl.runs import dispatch
    from etl.storage import PROJECT

    os.environ["DASK_COILED__CLIENT_PUBLIC_IP"] = "127.0.0.1"  # or the client asks another host for it
    security = Security.temporary()
    machines = LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tls://",
        security=security,
        host="127.0.0.1",
        dashboard_address=None,
    )
    for name in OF_COILED:
        machines.scheduler.handlers[name] = lambda **_: None
    port = int(machines.scheduler_address.rpartition(":")[2])
    plane = ControlPlane(security.tls_client_cert, security.tls_client_key, port)
    dask.config.set({"coiled.server": plane.serve(), "coiled.token": "none", "coiled.workspace": "here"})

    project = params.load(PROJECT, "local", ["query.questions=[q01, q05, top_customers]"])
    stage = replace(project.stages["query"], dask={"coiled": ASKED | {"credentials": None}}, retries=0)
    record = dispatch.run_stage(stage, replace(project.environment, root=root))
    told = {name: getattr(record, name) for name in ("run_id", "state", "reason", "parameters", "report")}
    print(json.dumps(told | {"wanted": plane.wanted, "deleted": plane.deleted, "key": plane.key}))
    sys.stdout.flush()
    os._exit(0)  # the client's threads would be waited for


if __name__ == "__main__":
    main(sys.argv[1])
