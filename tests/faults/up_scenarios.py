"""`up` and what may befall it: its processes stopped and killed, Prefect's database locked, damaged and deleted.

Whatever happens, what ran when is what the YAML says, or a record says why not. Each function takes how many and a
seed, says in figures what held, and raises AssertionError otherwise.
"""

import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from faults import toy
from faults.workers import prefect_server
from receiver import receiver
from support import copy_project, orchestrate, write_stage
from test_up import Up, get

from etl.runs import index, releases
from etl.serve import health
from etl.serve.timetable import LATE_S
from etl.storage import Root

EVERY_S = 10
STAGES = {"every": ("all", "queue"), "last": ("once", "skip"), "none": ("skip", "skip")}  # missed, overlap
BEGUN_S = 20  # after it was due a run has begun, also on busy cores and without Prefect
ROLES = {  # a process of `up` -> what is in its command
    "Prefect server": "etl.serve.prefect_server",
    "API": "etl.serve.web",
    "dashboard": "streamlit",
    "alerts": "watch",
    "fork server": "etl.kernels.forkserver",
}


class World:
    """`up` on a toy project of three stages, and what its root says of them."""

    def __init__(self, folder: Path, up: Up, root: Path):
        self.folder, self.up, self.root = folder, up, root

    def children(self) -> dict[str, psutil.Process]:
        """Of what `up` keeps alive."""
        children = {}
        for process in psutil.Process(self.up.process.pid).children():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                children |= {name: process for name, word in ROLES.items() if word in words}
        return children

    def kernel(self) -> psutil.Process:
        """That of a run that is under way."""
        mark = self.folder / "kernel"
        mark.unlink(missing_ok=True)
        return psutil.Process(int(toy.until(lambda: mark.exists() and mark.read_text(), 60, "a kernel at work")))

    def rows(self, stage: str) -> list[dict]:
        return index.newest(Root.at(str(self.root)), stage=stage, limit=10_000)

    def log(self) -> str:
        return " ".join(self.up.log.read_text().split())

    def status(self) -> str:
        """What `status` and the dashboard say of `up`."""
        told = health.findings(datetime.now(UTC), health.Reader(Root.at(str(self.root))).seen())
        return "; ".join(finding.sentence for finding in told if finding.kind == "up")

    def goes_on(self, within_s: float = 240) -> None:
        """Until each stage has a run of a time to come."""
        since = datetime.now().astimezone()
        for stage in STAGES:
            toy.until(lambda stage=stage: max(times(self.rows(stage))[0]) > since, within_s, f"a run of {stage}")


def project(folder: Path, alerts_to: str = "") -> Path:
    """A project of the three stages; a kernel at work writes its number into the file `kernel` beside it."""
    made = toy.project(folder / "project")
    alerts = f"alerts:\n  to: ['{alerts_to}']\n" if alerts_to else ""
    (made / "params/env/local.yml").write_text(f"root: outputs\n{alerts}")
    for stage, (missed, overlap) in STAGES.items():
        at_work = f"pathlib.Path({str(folder / 'kernel')!r}).write_text(str(os.getpid())); time.sleep(0.3)"
        write_stage(made, stage, f"import os, pathlib, time; {at_work}", 'check("true", True)')
        yml = f"every: {EVERY_S} seconds\ndeadline: 30 seconds\nmissed: {missed}\noverlap: {overlap}\n"
        (made / f"params/{stage}.yml").write_text(yml)
    return made


@contextlib.contextmanager
def world(root: Path | None = None) -> Iterator[World]:
    """`up` at work on that project, which ends well; `root` may hold what an earlier one left."""
    with tempfile.TemporaryDirectory() as name, receiver() as received:
        folder, root = Path(name), root or Path(name) / "root"
        up = Up(project(folder, received.url), root, "--live")
        made = World(folder, up, root)
        try:
            toy.until(lambda: all(times(made.rows(stage))[0] for stage in STAGES), 300, "the first runs")
            yield made
            assert up.process.poll() is None, "up has ended"
            up.end(signal.SIGINT)
            assert up.process.returncode == 0
            assert "Traceback" not in up.log.read_text()
        except BaseException:
            print(re.sub(r"\n.* (ok|noop)  .*", "", up.log.read_text())[-12000:])
            raise
        finally:
            _kill(up)


def _kill(up: Up) -> None:
    """With what of it is stopped."""
    if up.process.poll() is None:
        for process in [psutil.Process(up.process.pid), *toy.family(up.process.pid)]:
            with contextlib.suppress(psutil.Error):
                process.resume()
    up.process.kill()
    up.process.wait()


def times(rows: list[dict]) -> tuple[list[datetime], list[tuple[datetime, int]], list[timedelta]]:
    """The scheduled times at which a run began, (first, how many) of those that are said not to, and how late runs
    began."""
    ran, left, late = [], [], []
    for row in rows:
        told = re.match(r"(?:the run|(\d+) runs) of (\S+ \S+)", row["reason"] or "")
        due = datetime.fromisoformat(str(row["scheduled_for"]))
        if row["state"] == "cancelled" and told:
            left.append((datetime.fromisoformat(f"{told[2]}+00:00"), int(told[1] or 1)))
        elif due.microsecond == 0 and due.second % EVERY_S == 0:  # the first one was at no scheduled time
            ran.append(due)
            late.append(datetime.fromisoformat(str(row["started_at"])) - due)
    return ran, left, late


def checked(rows: dict[str, list[dict]], what: str) -> str:
    """What ran when is what the YAML says, or a record says why not; each time once. In figures."""
    told = []
    for stage, (missed, _) in STAGES.items():
        ran, left, late = times(rows[stage])
        step = timedelta(seconds=EVERY_S)
        said = [first + step * number for first, count in left for number in range(count)]
        seen = Counter(ran + said)
        twice = sorted(time for time, count in seen.items() if count > 1)
        assert not twice, f"{what}: {stage}: {len(twice)} times twice: {twice[:9]}"
        first, last = min(ran), max(ran)
        missing = [due for n in range((last - first) // step) if (due := first + step * n) not in seen]
        assert not missing, f"{what}: {stage}: {len(missing)} have neither a run nor a word: {missing[:9]}"
        reasons = Counter(row["reason"].partition(": ")[2] for row in rows[stage] if row["state"] == "cancelled")
        if missed == "all":
            assert not reasons, f"{what}: {stage} did not run: {reasons}"
        slowest = max((delay for delay in late), default=timedelta())
        if missed == "skip":
            assert slowest < timedelta(seconds=LATE_S + BEGUN_S), f"{what}: {stage} ran {slowest} late"
        states = Counter(row["state"] for row in rows[stage])
        bad = {state: count for state, count in states.items() if state not in ("ok", "cancelled", "running")}
        told.append(f"{stage}: {len(ran)} ran, {len(said)} said not to{f', {bad}' if bad else ''}")
    return "; ".join(told)


def frozen(n: int, seed: int) -> str:
    """Each process of `up` stopped for `n` seconds (a dozen more or less), one at a time, and continued."""
    rng, restarted = random.Random(seed), []
    with world() as here:
        for name in ["up", "kernel", "its watcher", *ROLES]:
            match name:
                case "up":
                    victim = psutil.Process(here.up.process.pid)
                case "kernel":
                    victim = here.kernel()
                case "its watcher":
                    victim = here.kernel().parent()
                case _:
                    victim = here.children()[name]
            victim.suspend()
            time.sleep(n + rng.uniform(0, 12))
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.resume()
            if name in ROLES and here.children().get(name) != victim:
                restarted.append(name)
            here.goes_on()
        rows = {stage: here.rows(stage) for stage in STAGES}
    return f"restarted: {', '.join(restarted) or 'none'}; {checked(rows, 'frozen')}"


def killed_services(n: int, seed: int) -> str:
    """Each of what `up` keeps alive killed `n` times, each time when it is there again."""
    rng, counts = random.Random(seed), Counter()
    with world() as here:
        began, killed = time.monotonic(), set()
        while any(counts[name] < n for name in ROLES):
            assert here.up.process.poll() is None, "up has ended"
            assert time.monotonic() - began < 120 * n + 120, f"not started again: {counts}"
            for name, process in here.children().items():
                if counts[name] < n and process.pid not in killed:
                    killed.add(process.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                        counts[name] += 1
            time.sleep(rng.uniform(0.5, 1.5))
        here.goes_on()
        toy.until(lambda: set(here.children()) == set(ROLES), 120, "all of them at work")
        toy.until(lambda: _answers(here), 120, "all pages")
        rows = {stage: here.rows(stage) for stage in STAGES}
        warned = Counter(re.findall(r"WARNING +(?:[\w.]+: )?(\w[\w ]+?) ended with", here.log()))
    return f"{dict(counts)} in {time.monotonic() - began:.0f} s, warned of {dict(warned)}; {checked(rows, 'killed')}"


def asked(url: str, body: dict | None = None):
    """What Prefect's API answers; on busy cores it takes its time, and its database is locked now and then."""

    def answer() -> bytes | None:
        try:
            return get(url, body)
        except OSError:
            return None

    return json.loads(toy.until(answer, 240, url))


def _answers(here: World) -> bool:
    for port in (here.up.prefect, here.up.api, here.up.dashboard):
        try:
            get(f"http://127.0.0.1:{port}/")
        except OSError:
            return False
    return True


def database(n: int, seed: int) -> str:
    """Prefect's database locked by another for `n` seconds, damaged, and deleted, while `up` is at work."""
    rng = random.Random(seed)
    with world() as here:
        path = here.root / "services/prefect/prefect.db"
        with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(n)
            here.goes_on()
            why = f"is locked by process {os.getpid()}"
            toy.until(lambda: why in here.log(), 120, "who locks it, on the terminal")
            toy.until(lambda: why in here.status(), 120, "who locks it, by `status`")
            other.execute("ROLLBACK")
        _in_prefect(here)
        toy.until(lambda: why not in here.status(), 120, "nobody locks it, by `status`")
        for how in ("damaged", "deleted"):
            if how == "damaged":
                path.write_bytes(rng.randbytes(path.stat().st_size))
            else:
                for file in path.parent.glob("prefect.db*"):
                    if "damaged" not in file.name:
                        file.unlink()
            here.goes_on()
            _in_prefect(here)
        rows, log = {stage: here.rows(stage) for stage in STAGES}, here.log()
    assert "Prefect's server does not answer: runs go on without it" in log, log
    assert log.count("is locked by process") == 1, log
    assert "is damaged" in log and "Prefect begins with a new one" in log, log
    return checked(rows, "database")


def _in_prefect(here: World) -> None:
    """Until Prefect has a run that began after this was called, with its true state."""
    since = datetime.now().astimezone()

    def is_told() -> bool:
        try:
            runs = here.up.flow_runs("every", state_name="Completed")
        except OSError:
            return False
        return any(datetime.fromisoformat(run["expected_start_time"]) > since for run in runs)

    toy.until(is_told, 240, "a run in Prefect")


def older(n: int, seed: int) -> str:
    """Prefect's database of earlier versions, whose deployments had schedules and limits, and `n` seconds of `up`."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        with prefect_server(root / "services/prefect") as variables:
            there = variables["PREFECT_API_URL"]
            get(f"{there}/work_pools/", {"name": "in-place", "type": "in-place"})
            for stage, tags in [
                ("every", ["etl", "local"]),
                ("last", ["etl", str(root), "local"]),
                ("gone", ["etl", "local"]),
            ]:
                flow = asked(f"{there}/flows/", {"name": stage})["id"]
                body = {
                    "name": stage,
                    "flow_id": flow,
                    "work_pool_name": "in-place",
                    "tags": tags,
                    "concurrency_limit": 1,
                }
                body |= {
                    "schedules": [
                        {"schedule": {"interval": EVERY_S, "anchor_date": "2026-01-01T00:00:00Z"}, "active": True}
                    ]
                }
                body |= {"concurrency_options": {"collision_strategy": "ENQUEUE"}}
                deployment = asked(f"{there}/deployments/", body)["id"]
                get(f"{there}/deployments/{deployment}/schedule", {"min_runs": 5})
                run = asked(f"{there}/deployments/{deployment}/create_flow_run", {})["id"]
                get(f"{there}/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
        with world(root) as here:
            _in_prefect(here)
            time.sleep(n)
            found = _deployments(here.up.prefect)
            assert set(found) == set(STAGES), f"{sorted(found)}"
            limited = [name for name, told in found.items() if told["schedules"] or told["global_concurrency_limit"]]
            assert not limited, f"still with a schedule or a limit: {limited}"
            runs = asked(f"http://127.0.0.1:{here.up.prefect}/api/flow_runs/filter", {"limit": 200})
            theirs = [run["name"] for run in runs if run["auto_scheduled"] or run["state_type"] == "RUNNING"]
            assert len(theirs) <= len(STAGES), theirs
            rows = {stage: here.rows(stage) for stage in STAGES}
    return checked(rows, "older")


def _deployments(port: int) -> dict[str, dict]:
    return {told["name"]: told for told in asked(f"http://127.0.0.1:{port}/api/deployments/filter", {})}


def two(n: int, seed: int) -> str:
    """Two `up` on one server of Prefect's for `n` seconds, then one of them killed and started again, and a third on a
    root that has one."""
    with tempfile.TemporaryDirectory() as name, prefect_server(Path(name) / "prefect") as server:
        there, roots = server["PREFECT_API_URL"], [Path(name) / "a", Path(name) / "b"]
        port = int(there.split(":")[2].split("/")[0])
        for root in roots:
            (root.parent / f"of-{root.name}").mkdir()
        projects = [project(root.parent / f"of-{root.name}") for root in roots]
        ups = [Up(*pair, "--live", PREFECT_API_URL=there) for pair in zip(projects, roots, strict=True)]
        worlds = [World(root.parent, up, root) for root, up in zip(roots, ups, strict=True)]
        try:
            for here in worlds:
                toy.until(lambda here=here: all(times(here.rows(stage))[0] for stage in STAGES), 300, "the first runs")
            time.sleep(n)
            toy.until(lambda: len(_deployments(port)) == 2 * len(STAGES), 120, "their deployments")
            ups[0].process.kill()
            ups[0].process.wait()
            time.sleep(EVERY_S)
            ups[0] = worlds[0].up = Up(projects[0], roots[0], "--live", PREFECT_API_URL=there)
            toy.until(lambda: "6 deployments" in worlds[0].log() or "3 deployments" in worlds[0].log(), 400, "again")
            for here in worlds:
                here.goes_on()
            assert len(_deployments(port)) == 2 * len(STAGES), _deployments(port)
            third = Up(projects[1], roots[1], "--live", PREFECT_API_URL=there)
            assert third.process.wait(120) == 1
            said = " ".join(third.log.read_text().split())
            assert f"`up` is at work on {roots[1]} already: process {ups[1].process.pid} on" in said, said
            runs = asked(f"{there}/flow_runs/filter", {"limit": 200, "sort": "EXPECTED_START_TIME_DESC"})
            mine = {told["id"] for told in _deployments(port).values() if str(roots[1]) in told["tags"]}
            bad = [run["state"] for run in runs if run["deployment_id"] in mine and run["state_type"] == "CRASHED"]
            assert len(mine) == len(STAGES) and not bad, bad
            for up in ups:
                up.end(signal.SIGINT)
            told = [checked({stage: here.rows(stage) for stage in STAGES}, str(here.root)) for here in worlds]
        except BaseException:
            print(*(up.log.read_text()[-3000:] for up in ups), sep="\n\n")
            raise
        finally:
            for up in ups:
                _kill(up)
    return " | ".join(told)


DRAFTS = (
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"check(', '"check( draft of', 1),
    lambda text: text.replace('"from pipeline import', '"record(draft=1)\\n", "from pipeline import', 1),
)


def drafts(n: int, seed: int) -> str:
    """Notebooks saved every 10 s with half an edit while `up --env fast` runs `n` seconds: no run sees one. Then it is
    released whole, and rolled back."""
    rng, end = random.Random(seed), threading.Event()
    with tempfile.TemporaryDirectory() as name:
        root, made = Path(name) / "root", copy_project(Path(name) / "project")
        notebooks = {path: path.read_text() for path in made.glob("notebooks/*.ipynb")}

        def save() -> None:
            while not end.wait(10):
                for path, text in notebooks.items():
                    path.write_text(rng.choice(DRAFTS)(text))

        up = Up(made, root, "--env", "fast")
        try:
            toy.until(lambda: index.newest(Root.at(str(root)), stage="query", state="ok"), 900, "an answer")
            [first] = releases.newest(Root.at(str(root)))
            saver = threading.Thread(target=save)
            saver.start()
            time.sleep(n)
            end.set()
            saver.join()
            seen = _since(root, "2026-01-01")
            assert {run["release"] for run in seen} == {first.id}, Counter(run["release"] for run in seen)
            for path, text in notebooks.items():
                path.write_text(text)
            query = made / "notebooks/query.ipynb"
            told = json.loads(notebooks[query])
            told["cells"][-1:-1] = [{**told["cells"][1], "id": "edited", "source": "record(edited=1)"}]
            query.write_text(json.dumps(told))
            params = made / "params/query.yml"
            params.write_text(re.sub(r"(?m)^retries:.*", "retries: 0", params.read_text()))
            asked = ("--env", "fast", "--root", str(root), "--accept", "query", "--json")
            done = orchestrate(made, "release", *asked, timeout_s=900)
            assert done.returncode == 0, done
            second = json.loads(done.stdout)["release"]
            edited = toy.until(lambda: _of(root, "query", second), 300, "a run of the release")
            assert all(run["metrics"].get("edited") == 1 for run in edited), edited
            done = orchestrate(made, "rollback", "--env", "fast", "--root", str(root))
            assert done.returncode == 0, done
            since = _now()
            back = toy.until(lambda: _of(root, "query", first.id, since), 300, "a run of the one before")
            assert not any("edited" in run["metrics"] for run in back), back
            up.end(signal.SIGINT)
            every = _since(root, "2026-01-01")
        except BaseException:
            print(up.log.read_text()[-3000:])
            raise
        finally:
            end.set()
            _kill(up)
    drafts_seen = [run["run_id"] for run in every if "draft" in run["metrics"]]
    assert not drafts_seen, drafts_seen
    whole = {second: {1}, first.id: {None}}
    for run in every:
        if run["stage"] == "query" and run["state"] == "ok":
            assert {run["metrics"].get("edited")} == whole[run["release"]], run
    bad = Counter(
        f"{run['stage']} {run['state']}: {run['reason']}" for run in every if run["state"] in ("failed", "check_failed")
    )
    assert not bad, bad
    states = Counter(run["state"] for run in every)
    return f"{len(seen)} runs beside {n // 10} half edits, {len(every)} in all: {dict(states)}, none saw one"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _since(root: Path, since: str, **chosen: str) -> list[dict]:
    place = Root.at(str(root))
    return [index.get(place, row["run_id"]) for row in index.newest(place, since=since, limit=10_000, **chosen)]


def _of(root: Path, stage: str, release: str, since: str = "2026-01-01") -> list[dict]:
    return [run for run in _since(root, since, stage=stage) if run["release"] == release and run["state"] == "ok"]
