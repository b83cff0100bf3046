"""The service on a real port: odd requests, floods of them, and models that change under load.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import published
import schemathesis
import xgboost
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from support import environment, free_port

from etl.models import registry
from etl.serve import web
from etl.storage import PROJECT
from pipeline import model

EXAMPLE = dict(model.CARD.example) | {"l_extendedprice": 21168.23}
FULL = 100  # hundredths of a flood, from which on this holds:
QUICK_MS = 20
KNOWN = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
PROBE = """
import http.client, select, sys, time

def waited():  # ms for a core: this process and the one that answers
    return sum(int(open(f"/proc/{each}/schedstat").read().split()[1]) for each in ("self", sys.argv[3])) / 1e6

took = []
while not select.select([sys.stdin], [], [], 0.02)[0]:
    before, began = waited(), time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("GET", sys.argv[2])
    assert connection.getresponse().status == 200
    connection.close()
    took.append((1000 * (time.perf_counter() - began), before))
    took[-1] = took[-1][0], took[-1][0] - waited() + before
for each in took:
    print(*each)
"""
FLOOR = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
while True:
    client, _ = listening.accept()
    client.recv(4096)
    client.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\nconnection: close\\r\\n\\r\\nok")
    client.close()
"""


@contextlib.contextmanager
def running(root: Path, files: int = 1024) -> Iterator[tuple[int, psutil.Process]]:
    """The service as `up` starts it, which may have so many files open: its port, its process."""
    port = free_port()
    command = [sys.executable, "-m", "etl.serve.web", "app.api:app", "--port", str(port)]
    with (root.parent / "service.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment(PROJECT) | {"ETL_ROOT": str(root)},
            stderr=log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, "the service did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


_filled = tempfile.TemporaryDirectory()  # as long as this process is there


@contextlib.contextmanager
def filled() -> Iterator[Path]:
    """A root of its own in which everything is published."""
    made = Path(_filled.name) / "root"
    if not made.exists():
        published.fill(str(made))
        published.add_run(str(made), published.QUERY_RUN)
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(made, Path(folder) / "root"))


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None and "Content_Length" not in headers:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    told = answer.status, answer.read()
    connection.close()
    return told


def generated(n: int, seed: int) -> str:
    """`n` requests that the service's description allows or just does not: each answer is one that it names."""
    with filled() as root, running(root) as (port, _):
        url = f"http://127.0.0.1:{port}"
        described = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in described.get_all_operations()]
        statuses: Counter[int] = Counter()
        for number, operation in enumerate(operations):
            for mode in GenerationMode:
                each = n // len(operations) // 2

                @hypothesis.seed(seed + number)
                @hypothesis.settings(
                    max_examples=max(1, each),
                    deadline=None,
                    database=None,
                    suppress_health_check=list(hypothesis.HealthCheck),
                    phases=[hypothesis.Phase.generate],
                )
                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                def tried(case):
                    answer = case.call(base_url=url, timeout=120, allow_redirects=False)
                    statuses[answer.status_code] += 1
                    case.validate_response(answer, checks=KNOWN)

                with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing that it does not allow
                    tried()
        log = (root.parent / "service.log").read_text()
    assert "Traceback" not in log, log[-2000:]
    told = ", ".join(f"{count:,} × {status}" for status, count in sorted(statuses.items()))
    return f"{sum(statuses.values()):,} requests to {len(operations)} operations: {told}"


def rows(**changed) -> bytes:
    return json.dumps([EXAMPLE | changed]).encode()


FAR = ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00%2B23:59", "0001-01-01T00:00:00", "9999-12-31T23:59:59.999999")
JSON = {"Content_Type": "application/json"}
RUN = published.QUERY_RUN
BOUNDARIES: list[tuple] = [  # method, path, body, headers
    *(("GET", f"/v1/runs?{name}={moment}") for name in ("since", "until") for moment in FAR),
    *(("GET", f"/v1/reports/query/as-of/{moment}") for moment in (*FAR, "now", "2026-02-30", "%00", "1e400")),
    *(("GET", f"/v1/results/q01?limit={limit}") for limit in ("9" * 23, "9" * 5000, "0", "-1", "1_0", "%D9%A1", "1e3")),
    *(("GET", f"/v1/runs?stage={stage}") for stage in ("a" * 101, "%00", "query%0a", "..", "%F0%9F%92%A9")),
    *(("GET", f"/v1/reports/{run}") for run in (RUN + "%00", "..%2f..", "x" * 9000, f"{RUN}/notebook/", "%ff")),
    *(("GET", "/v1/runs", None, {"Host": host}) for host in ("", "evil.example", "localhost:x", "[::1", "a" * 9000)),
    *(("GET", path) for path in ("/runs/", "/v1", "/v1/", "//", "/%2e%2e/", "/health/", "/v1/model?x=" + "y" * 50_000)),
    *((method, "/v1/runs") for method in ("POST", "DELETE", "OPTIONS", "HEAD", "TRACE")),
    *(
        ("POST", "/v1/predict", rows(l_quantity=amount), JSON)
        for amount in ("1_0", " 17 ", "\u0661\u0667", "1E+99999999", "9" * 5000, 10**400, 1e308, "0x1", "", -0.0)
    ),
    *(
        ("POST", "/v1/predict", rows(l_shipdate=day, l_commitdate=other), JSON)
        for day, other in (("9999-12-31", "0001-01-01"), ("0001-01-01", "9999-12-31"), ("10000-01-01", "1996-03-13"))
    ),
    ("POST", "/v1/predict?explain=true", rows(l_shipdate="0001-01-01", l_commitdate="9999-12-31"), JSON),
    ("POST", "/v1/predict?explain=maybe", rows(), JSON),
    ("POST", "/v1/predict", b"\xff\xfe[", JSON),
    ("POST", "/v1/predict", b"[" * 100_000, JSON),
    ("POST", "/v1/predict", b'[{"l_tax":' + b"9" * 100_000 + b"}]", JSON),
    ("POST", "/v1/predict", b"[" + b"{}," * 300_000 + b"{}]", JSON),
    ("POST", "/v1/predict", b"x" * 1_000_001, JSON),
    ("POST", "/v1/predict", b"1", JSON | {"Content_Length": "99999999999999999999999"}),
    ("POST", "/v1/predict", b"1", {"Content_Type": "application/json; charset=\xe9"}),
    ("GET", "/v1/results/q01", b"[]", JSON),
    ("GET", "/metrics", None, {"X_Request_Id": "a b", "Authorization": "Basic ="}),
]


def boundaries(n: int, seed: int) -> str:
    """Requests at the ends of what may be asked, by hand: each answer is described, and says in JSON what is wrong."""
    statuses: Counter[int] = Counter()
    with filled() as root, running(root) as (port, _):
        described = json.loads(ask(port, "GET", "/openapi.json")[1])["paths"]
        for method, path, *rest in BOUNDARIES[:n]:
            body, headers = (*rest, None, {})[:2] if len(rest) < 2 else rest
            status, answer = ask(port, method, path, body, **(headers or {}))
            statuses[status] += 1
            asked = f"{method} {path[:100]} {(body or b'')[:100]!r}: {status} {answer[:200]!r}"
            allowed = _described(described, method, path.partition("?")[0])
            assert str(status) in allowed, f"{asked}, not among {allowed}"
            if status >= 400 and method != "HEAD":
                assert list(json.loads(answer)) == ["detail"], asked
        log = (root.parent / "service.log").read_text()
    assert "Traceback" not in log, log[-2000:]
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    return f"{len(BOUNDARIES[:n])} requests: {told}"


def _described(paths: dict, method: str, path: str) -> set[str]:
    """The statuses that the description names for a request; for what it does not know, those of whatever is absent."""
    for known, methods in paths.items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", known), path):
            return {*methods[method.lower()]["responses"]} if method.lower() in methods else {"400", "405"}
    return {"400", "404", "405"}


def floods(n: int, seed: int) -> str:
    """Hundredths of what a few thousand hostile connections do at once, at a low priority, as they stand for clients
    elsewhere; what `/health` and `/ready` take meanwhile, memory, threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    one, thousand = (_post(json.dumps([EXAMPLE] * count).encode()) for count in (1, 1000))
    odd = _post(json.dumps([{name: [] for name in EXAMPLE}] * 1000).encode())
    declared = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000000\r\n\r\n"
    attacks: dict[str, tuple[int, bytes, Callable[[socket.socket], object] | None]] = {
        "half open": (11 * n, b"GET /v1/runs HTTP/1.1\r\nHost: local", None),
        "slow bodies": (n, declared.replace(b"500000000", b"500000"), lambda s: s.send(b" ")),
        "500 MB declared": (max(1, n // 2), declared, lambda s: s.send(b" " * 200_000)),
        "1 row": (10 * n, one, None),
        "1,000 rows": (2 * n, thousand, None),
        "1,000 odd rows": (max(1, n // 2), odd, None),
        "reports and runs": (n, b"GET /v1/runs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", None),
    }
    told = []
    try:
        with filled() as root, running(root) as (port, process), Probes(port, process) as probes:
            for _, request, _ in attacks.values():  # what any use leaves behind: libraries that are loaded by the first
                if request.endswith((b"]", b"\r\n\r\n")) and request != declared:
                    _attack(port, 4, request, None)
            assert ask(port, "GET", "/ready")[0] == 200  # the door knows what to answer once somebody has asked
            time.sleep(2)
            told.append(f"alone: {probes.beside(lambda: time.sleep(2))}")
            before, threads = process.memory_info().rss / 1e6, process.num_threads()
            for name, (count, request, more) in attacks.items():
                found: dict = {}
                took = probes.beside(lambda: found.update(_elsewhere(_attack, port, count, request, more)))  # noqa: B023
                assert found["left"] == 0, f"{name}: {found['left']} connections were not ended"
                assert set(found["statuses"]) <= {"200", "408", "413", "422", "503", ""}, (name, found["statuses"])
                held = process.memory_info().rss / 1e6
                ended = f"over in {found['s']:.1f} s, {found['statuses']}"
                told.append(f"{count} × {name}: {ended}, {held:.0f} MB; {took}")
            time.sleep(5)
            after, left = process.memory_info().rss / 1e6, process.num_threads()
            told.append(f"{before:.0f} MB before, {after:.0f} MB after, {threads} threads before, {left} after")
            for path in ("/v1/runs", "/metrics", "/health/stages", "/v1/model"):  # whichever threads these need
                assert ask(port, "GET", path)[0] == 200, path
            assert ask(port, "POST", "/v1/predict?explain=true", rows(), **JSON)[0] == 200
            log = (root.parent / "service.log").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Traceback" not in log and '"path":"/health"' in log, log[-2000:]
    said = "\n    ".join([*told, f"load {os.getloadavg()[0]:.1f}"])
    assert after < before + 50, said
    assert n < FULL or probes.slowest < QUICK_MS, said
    return said


def _elsewhere(work: Callable[..., dict], *given: object) -> dict:
    """What `work` gives, done by a thread that everything else goes before."""

    def low() -> dict:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        return work(*given)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(low).result()


def _post(body: bytes) -> bytes:
    head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Probes:
    """Requests that other processes send beside a flood, every 20 ms, each on a connection of its own: to the door of a
    service, and to a process that does nothing but answer, which shows what this machine takes for that at best."""

    def __init__(self, port: int, process: psutil.Process):
        [door] = process.children()
        own, self.slowest = free_port(), 0.0  # ms, of the service's, besides waiting for a core
        self.floor = subprocess.Popen([sys.executable, "-I", "-S", "-c", FLOOR, str(own)])
        self.asked = {"/health": (port, door.pid), "/ready": (port, door.pid), "a bare answer": (own, self.floor.pid)}

    def beside(self, work: Callable[[], object]) -> str:
        """How long they took, and at most without what they waited for a core."""
        probes = {}
        for name, asked in self.asked.items():
            path = name if name[0] == "/" else "/"
            command = [sys.executable, "-I", "-S", "-c", PROBE, str(asked[0]), path, str(asked[1])]
            probes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(0.5)
        work()
        told = []
        for name, probe in probes.items():
            out, _ = probe.communicate("\n")
            assert probe.returncode == 0, f"{name} was not answered"
            took, own = zip(*(map(float, line.split()) for line in out.splitlines()), strict=True)
            p50, p99 = (sorted(took)[int(len(took) * share)] for share in (0.5, 0.99))
            said = f"p50 {p50:.1f}, p99 {p99:.1f}, {max(took):.1f} ms at most"
            told.append(f"{name} {said}, {max(own):.1f} besides waiting for a core")
            if name[0] == "/":
                self.slowest = max(self.slowest, *own)
        return "; ".join(told)

    def __enter__(self) -> "Probes":
        return self

    def __exit__(self, *_: object) -> None:
        self.floor.kill()
        self.floor.wait()


def _attack(port: int, count: int, request: bytes, more: Callable[[socket.socket], object] | None) -> dict:
    """`count` connections that each send a request and then `more` ten times a second, until the server ends them."""
    began, selector, left, statuses = time.monotonic(), selectors.DefaultSelector(), {}, Counter()
    for _ in range(count):
        each = socket.create_connection(("127.0.0.1", port), timeout=60)
        each.setblocking(False)
        left[each] = [request, b""]  # to be sent, the beginning of the answer
        selector.register(each, selectors.EVENT_READ | selectors.EVENT_WRITE)
    next_more = time.monotonic()
    while left and time.monotonic() < began + 60:
        for key, events in selector.select(0.05):
            each = key.fileobj
            try:
                if events & selectors.EVENT_WRITE:
                    left[each][0] = left[each][0][each.send(left[each][0]) :]
                    if not left[each][0]:
                        selector.modify(each, selectors.EVENT_READ)
                if events & selectors.EVENT_READ:
                    part = each.recv(1 << 16)
                    left[each][1] = (left[each][1] + part)[:12]
                    if not part:
                        raise ConnectionResetError
            except BlockingIOError:
                continue
            except OSError:
                statuses[left.pop(each)[1][9:12].decode()] += 1
                selector.unregister(each)
                each.close()
        if more and time.monotonic() >= next_more:
            next_more = time.monotonic() + 0.1
            for each in left:
                with contextlib.suppress(OSError):
                    more(each)
    for each in left:
        each.close()
    return {"s": time.monotonic() - began, "left": len(left), "statuses": dict(statuses)}


PUBLISH = """
import json, sys
import xgboost
from etl.models import registry
from etl.storage import Root
from pipeline import model
for line in sys.stdin:
    path, run_id = json.loads(line)
    booster = xgboost.Booster({"nthread": 1}, model_file=path)
    metrics = {"late_share": 0.5, "gap": 0.0, "log_loss": 0.6, "rows": 1}
    registry.publish(Root.at(sys.argv[1]), booster, metrics, json.loads(sys.argv[2]), run_id, model.SPEC)
    print("published", flush=True)
"""


def _damages(root: Path) -> list[Callable[[], object]]:
    """Ways in which what is published becomes something else."""
    pointer = root / registry.ALIASES

    def instead(make: Callable[[Path], object]) -> Callable[[], object]:
        return lambda: (pointer.unlink(), make(pointer))

    def said(**changed: object) -> Callable[[], object]:
        def damage() -> None:
            named = json.loads(pointer.read_text())
            pointer.write_text(json.dumps(named | {"champion": named["champion"] | changed}))

        return damage

    def of_model(name: str, change: Callable[[bytes], bytes]) -> Callable[[], object]:
        def damage() -> None:
            path = root / "models" / json.loads(pointer.read_text())["champion"]["model_id"] / name
            path.write_bytes(change(path.read_bytes()))
            pointer.write_text(pointer.read_text() + " ")  # or nobody would look

        return damage

    return [
        instead(lambda path: None),
        instead(os.mkfifo),
        instead(Path.mkdir),
        instead(lambda path: path.symlink_to(path.name)),
        instead(lambda path: path.write_bytes(b"[" * 100_000)),
        instead(lambda path: (path.touch(), os.truncate(path, 150_000_000))),
        said(metrics="text"),
        said(model_id="none"),
        said(sha256="0" * 64),
        of_model("model.json", lambda data: data[: len(data) // 2]),
        of_model("model.json", lambda data: data.replace(b"1", b"2", 50)),
        of_model("golden.json", lambda data: re.sub(rb"0\.\d+", b"NaN", data)),
        of_model("golden.json", lambda data: b"{}"),
    ]


def publishes(n: int, seed: int) -> str:
    """`n` models are published or damaged, and the publisher killed, under 200 requests a second."""
    rng = random.Random(seed)
    asked = [EXAMPLE | {"l_quantity": quantity} for quantity in range(1, 41)]
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(name) / "root"
        expected, stored = {}, []
        for at, booster in enumerate(_boosters(rng)):
            raw = bytes(booster.save_raw("json"))
            stored.append(folder / f"{at}.json")
            stored[-1].write_bytes(raw)
            predictions = registry.predict(booster, model.SPEC.matrix(asked)).tolist()
            expected[hashlib.sha256(raw).hexdigest()[:8]] = predictions
        publisher, counts = _Publisher(root, asked[:4]), Counter()
        publisher.publish(stored[0], _run_id(0))
        with running(root) as (port, process):
            until = time.monotonic() + 60
            while ask(port, "GET", "/v1/model")[0] != 200:
                assert time.monotonic() < until
            load = _Load(port, asked)
            load.start()
            threads, rss, is_whole = process.num_threads(), [], True
            for number in range(1, n + 1):
                what = rng.random()
                if what < 0.4 and is_whole:
                    rng.choice(_damages(root))()
                    counts["damaged"], is_whole = counts["damaged"] + 1, False
                else:
                    _make_way(root)
                    kill_after = rng.uniform(0, 0.05) if what > 0.95 else None
                    publisher.publish(rng.choice(stored), _run_id(number), kill_after)
                    counts["killed" if kill_after is not None else "published"] += 1
                    is_whole = kill_after is None
                rss.append(process.memory_info().rss / 1e6)
                time.sleep(rng.uniform(0.1, 1.5))
            _make_way(root)
            last = publisher.publish(stored[0], _run_id(n + 1))
            until = time.monotonic() + 90
            while json.loads(ask(port, "GET", "/v1/model")[1])["run_id"] != last:
                assert time.monotonic() < until, "the last one was not taken up"
                time.sleep(0.2)
            load.stop()
            left = process.num_threads()
            log = (folder / "service.log").read_text()
        publisher.end()
    assert not load.failed, load.failed[:5]
    for (model_id, row), probabilities in load.answers.items():
        assert probabilities == {expected[model_id[-8:]][row]}, (model_id, row, probabilities)
    assert "Traceback" not in log, log[-2000:]
    assert max(rss) <= 300, f"{max(rss):.0f} MB"
    assert left >= threads, f"{threads} threads became {left}"
    ids = {model_id for model_id, _ in load.answers}
    took = sorted(load.took)
    return (
        f"{dict(counts)}; {len(took):,} requests, none failed, by {len(ids)} models, each as it was published; "
        f"p50 {took[len(took) // 2]:.1f}, p99 {took[int(len(took) * 0.99)]:.1f} ms; {max(rss):.0f} MB at most; "
        f"{threads} threads, {left} at the end; load {os.getloadavg()[0]:.1f}"
    )


def _run_id(number: int) -> str:
    return f"train-20260301T{number // 3600:02}{number // 60 % 60:02}{number % 60:02}-{number:06x}"


def _boosters(rng: random.Random) -> Iterator[xgboost.Booster]:
    draw = np.random.default_rng(rng.randrange(2**32))
    matrix = draw.uniform(0, 50, (2000, len(model.FEATURES))).astype("float32")
    for rounds in (3, 10, 30, 60):
        data = xgboost.DMatrix(matrix, draw.random(2000) < 0.5, feature_names=[*model.FEATURES], nthread=1)
        settings = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1}
        yield xgboost.train(settings, data, num_boost_round=rounds)


def _make_way(root: Path) -> None:
    """What stands where the pointer is to be, and is no file, is removed."""
    pointer = root / registry.ALIASES
    if pointer.is_dir() and not pointer.is_symlink():
        shutil.rmtree(pointer)


class _Publisher:
    """A process that publishes models, and may be killed while it does."""

    def __init__(self, root: Path, golden: list[dict]):
        self.command = [sys.executable, "-c", PUBLISH, str(root), json.dumps(golden)]
        self.process: subprocess.Popen | None = None

    def publish(self, path: Path, run_id: str, kill_after: float | None = None) -> str:
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(self.command, cwd=PROJECT, env=environment(PROJECT), text=True, **pipes)
        self.process.stdin.write(json.dumps([str(path), run_id]) + "\n")
        self.process.stdin.flush()
        if kill_after is None:
            assert self.process.stdout.readline() == "published\n"
        else:
            time.sleep(kill_after)
            self.end()
        return run_id

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


class _Load:
    """Two connections that ask a hundred times a second each; what they were told, and how long it took (ms)."""

    def __init__(self, port: int, asked: list[dict]):
        self.port, self.asked, self.ended = port, asked, threading.Event()
        self.answers: dict[tuple[str, int], set[float]] = {}
        self.took: list[float] = []
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._ask, args=(start,)) for start in (0, 20)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, row: int) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            self._ask_over(connection, row)

    def _ask_over(self, connection: http.client.HTTPConnection, row: int) -> None:
        due = time.monotonic()
        while not self.ended.is_set():
            row, due = (row + 1) % len(self.asked), due + 0.01
            time.sleep(max(0, due - time.monotonic()))
            began = time.perf_counter()
            body = json.dumps([self.asked[row]])
            try:
                connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                assert response.status == 200, text
            except Exception as error:
                self.failed.append(repr(error))
                connection.close()
                continue
            self.took.append(1000 * (time.perf_counter() - began))
            [answer] = json.loads(text)
            self.answers.setdefault((answer["model_id"], row), set()).add(answer["probability"])
        connection.close()


assert web.RECEIVE_S < 15  # seconds, in which whatever does not go on is ended
