"""What a prediction costs: this project's API, and the usual service for a model beside it.

Both serve the same model of late deliveries, each in one process of its own on loopback, and take turns. The usual one
has an async handler of FastAPI with a pydantic model of a row, makes a NumPy matrix of the rows and has the model
predict in place, as `XGBClassifier.predict` does; it checks nothing else. For bodies of 1, 100 and 1,000 rows: requests
a second with 8 connections that each send the next when the answer is there, and CPU of the service's process a
request. Then ours with requests that come at a fixed rate, whatever is answered: how long the slowest of a hundred
takes, alone and with a busy process on every core. Medians of the rounds are printed and written to
outputs/benchmarks/serving.json.

    python benchmarks/serving.py [--rounds 3] [--seconds 5]
"""

import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from measure import free_port
from rich.console import Console
from rich.table import Table

from etl.models import registry
from etl.storage import PROJECT, Root
from pipeline import model

ROWS = (1, 100, 1000)
RATES = (200, 1000)  # requests of one row a second
CONNECTIONS = 8
OURS = ["etl.serve.web", "app.api:app"]
THEIRS = ["uvicorn", "usual:app", "--no-access-log", "--log-level", "warning"]
USUAL = """
import datetime, os
import numpy as np, xgboost
from fastapi import FastAPI
from pydantic import BaseModel

class Row(BaseModel):
    l_shipdate: datetime.date
    l_commitdate: datetime.date
    l_quantity: float
    l_extendedprice: float
    l_discount: float
    l_tax: float
    l_shipmode: str
    l_shipinstruct: str

MODES, INSTRUCTIONS = {modes!r}, {instructions!r}
booster = xgboost.Booster({{"nthread": 1}}, model_file={path!r})
app = FastAPI()

@app.get("/health")
async def health():
    return {{"status": "up"}}

@app.post("/predict")
async def predict(rows: list[Row]):
    matrix = np.array([[(row.l_commitdate - row.l_shipdate).days, row.l_quantity, row.l_extendedprice / row.l_quantity,
        row.l_discount, row.l_tax, MODES.index(row.l_shipmode), INSTRUCTIONS.index(row.l_shipinstruct)]
        for row in rows], dtype="float32")
    probabilities = booster.inplace_predict(matrix)
    return [{{"probability": float(p), "late": bool(p >= 0.5), "model_id": "usual"}} for p in probabilities]
"""


def published(root: Root) -> Path:
    """A model of 60 trees under the root; the path of its file."""
    import xgboost

    random = np.random.default_rng(1)
    matrix = np.column_stack([random.integers(-90, 120, 20_000), *random.uniform(0, 50, (4, 20_000))])
    matrix = np.column_stack([matrix, random.integers(0, 7, 20_000), random.integers(0, 4, 20_000)]).astype("float32")
    late = random.integers(1, 31, 20_000) > matrix[:, 0]
    data = xgboost.DMatrix(matrix, label=late, feature_names=[*model.FEATURES], nthread=1)
    asked = {"objective": "binary:logistic", "max_depth": 3, "learning_rate": 0.2, "nthread": 1}
    booster = xgboost.train(asked, data, num_boost_round=60)
    metrics = {"late_share": 0.5, "gap": 0.0, "auc": 0.5, "brier": 0.25, "rows": 1, "log_loss": 0.6}
    model_id = registry.publish(root, booster, metrics, rows_of(32), "train-20260301T120000-abcdef", model.SPEC)
    return Path(root.url) / f"models/{model_id}/model.json"


def rows_of(count: int) -> list[dict]:
    """Line items as a client has them, all different."""
    example = dict(model.CARD.example) | {"l_extendedprice": 21168.23}
    return [example | {"l_quantity": 1 + n % 50, "l_shipmode": model.MODES[n % 7]} for n in range(count)]


def request_of(rows: int) -> bytes:
    body = json.dumps(rows_of(rows)).encode()
    head = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def service(command: list[str], folder: Path, env: dict[str, str]):
    """A service on a free port, which ends the command: (port, process). What it logs goes to a file."""
    port = free_port()
    with (folder / f"{port}.log").open("wb") as log:
        command = [sys.executable, "-m", *command, "--port", str(port)]
        process = subprocess.Popen(command, env=os.environ | env, stderr=log)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                with socket.create_connection(("127.0.0.1", port), 1):
                    break
            except OSError:
                time.sleep(0.1)
        yield port, process
    finally:
        process.terminate()
        process.wait()


class Client:
    """Connections that are kept, on which one request after the other goes."""

    def __init__(self, port: int, count: int):
        self.selector = selectors.DefaultSelector()
        self.sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self.left: dict[socket.socket, int] = {}  # bytes of the answer that are still to come; 0: its head is, too
        for each in self.sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(each, selectors.EVENT_READ)

    def send(self, each: socket.socket, request: bytes) -> None:
        self.left[each] = 0
        each.sendall(request)

    def answered(self, wait_s: float) -> list[socket.socket]:
        """The connections whose answer is whole by now."""
        done = []
        for key, _ in self.selector.select(wait_s):
            data = key.fileobj.recv(1 << 20)
            if not self.left[key.fileobj]:
                head, _, body = data.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), data[:300]
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.left[key.fileobj] = length - len(body)
            else:
                self.left[key.fileobj] -= len(data)
            if self.left[key.fileobj] == 0:
                done.append(key.fileobj)
        return done

    def close(self) -> None:
        for each in self.sockets:
            each.close()


def path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def closed_loop(port: int, pid: int, request: bytes, seconds: float) -> dict[str, float]:
    """As many as it takes: requests a second, CPU seconds a request."""
    client, done = Client(port, CONNECTIONS), 0
    for each in client.sockets:
        client.send(each, request)
    warm = time.perf_counter() + 0.5
    while time.perf_counter() < warm:
        for each in client.answered(1):
            client.send(each, request)
    began, spent = time.perf_counter(), cpu_s(pid)
    while time.perf_counter() < began + seconds:
        for each in client.answered(1):
            done += 1
            client.send(each, request)
    took, spent = time.perf_counter() - began, cpu_s(pid) - spent
    client.close()
    return {"per_s": done / took, "cpu_ms": 1000 * spent / done}


def open_loop(port: int, request: bytes, rate: int, seconds: float) -> dict[str, float]:
    """At a rate: milliseconds from when each was due to its answer, the median and the slowest of a hundred."""
    client = Client(port, 64)
    free, due, took = [*client.sockets], {}, []
    began, sent, count = time.perf_counter() + 0.1, 0, int(rate * seconds)
    while len(took) < count:
        now = time.perf_counter()
        while sent < count and free and began + sent / rate <= now:
            each = free.pop()
            due[each] = began + sent / rate
            client.send(each, request)
            sent += 1
        wait_s = began + sent / rate - time.perf_counter() if sent < count and free else 1
        for each in client.answered(max(0, wait_s)):
            took.append(1000 * (time.perf_counter() - due.pop(each)))
            free.append(each)
    client.close()
    took.sort()
    return {"p50_ms": took[len(took) // 2], "p99_ms": took[int(len(took) * 0.99)]}


@contextmanager
def busy_cores():
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main(
    rounds: Annotated[int, typer.Option(help="Of each, in turn.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 5,
) -> None:
    taken: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        folder = Path(name)
        stored = published(Root.at(folder / "root"))
        text = USUAL.format(modes=model.MODES, instructions=model.INSTRUCTIONS, path=str(stored))
        (folder / "usual.py").write_text(text)
        ours, process = stack.enter_context(service(OURS, folder, {"ETL_ROOT": str(folder / "root"), **path(PROJECT)}))
        usual, other = stack.enter_context(service(THEIRS, folder, path(folder)))
        for _ in range(rounds):
            for rows in ROWS:
                for who, port, pid in (("ours", ours, process.pid), ("usual", usual, other.pid)):
                    found = closed_loop(port, pid, request_of(rows), seconds)
                    taken.setdefault(f"{who}, {rows} rows", []).append(found)
            for rate in RATES:
                taken.setdefault(f"ours, {rate} a second", []).append(open_loop(ours, request_of(1), rate, seconds))
            with busy_cores():
                for rate in RATES:
                    found = open_loop(ours, request_of(1), rate, seconds)
                    taken.setdefault(f"ours, {rate} a second, cores busy", []).append(found)
    medians = {
        what: {name: statistics.median(each[name] for each in every) for name in every[0]}
        for what, every in taken.items()
    }
    table = Table("what", "figures")
    for what, figures in medians.items():
        table.add_row(what, ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    for rows in ROWS:
        ratio = medians[f"ours, {rows} rows"]["per_s"] / medians[f"usual, {rows} rows"]["per_s"]
        table.add_row(f"{rows} rows: times as many as the usual", f"{ratio:.2f}")
    Console().print(table)
    target = PROJECT / "outputs" / "benchmarks" / "serving.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"load": os.getloadavg(), "medians": medians, "taken": taken}, indent=1))


if __name__ == "__main__":
    typer.run(main)
