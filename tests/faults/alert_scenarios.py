"""Incidents, seeded one after the other, with two who look: each is told once, and its end once, in time.

The clock of what happens is the scenario's own; root, index, leases and the receiver are real. The function takes how
many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
from receiver import receiver

from etl import params
from etl.leases import LeaseHeld
from etl.params.alerts import Alerts, line
from etl.runs import index
from etl.runs.record import RunRecord
from etl.serve import alerts, health, heartbeat
from etl.storage import PROJECT, Root
from pipeline import Lake, queries

BEGAN = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SLOT_S, STEP_S, SOON_S = 600, 10, 60  # of an incident; between two looks; until it is told
FIGURE = "revenue_per_minute.revenue < 1000"
CHANGES = {f.name: f for f in queries.questions()}[line(FIGURE).question]


class Killed(BaseException):
    """Who looks dies."""


class World:
    """A root where everything runs on time, but for what a slot of the incident at hand says."""

    def __init__(self, root: Root):
        self.root, self.now, self.count = root, BEGAN, 0
        self.stages = params.load(PROJECT).stages
        self.next = {name: stage.next_run(BEGAN) for name, stage in self.stages.items()}
        self.states: dict[str, list[str]] = {}  # of the next runs of a stage; ok after them
        self.quiet_until: dict[str, datetime] = {}  # stages that do not run, and "up"
        self.expected: list[tuple[str, str, datetime, datetime]] = []  # what, of which incident, not before, not after
        self.due: list[tuple[datetime, Callable[[], None]]] = []
        for name in self.stages:
            self.run(name, BEGAN)
        self.answer(2000)
        root.write("lake/published.json", b"{}")
        self.pointer(True)

    def run(self, stage: str, at: datetime, state: str = "ok") -> None:
        self.count += 1
        run_id, text = f"{stage}-{at:%Y%m%dT%H%M%S}-{self.count:06x}", at.isoformat()
        reason = "" if state == "ok" else "planted"
        record = RunRecord(stage, run_id, self.root.url, text, 1, {}, {}, f"reports/{run_id}", "here", text)
        record.state, record.reason, record.seconds, record.ended_at = state, reason, 1.0, text
        index.append(self.root, record)

    def answer(self, revenue: float) -> None:
        self.count += 1
        name, run_id = CHANGES.name, f"query-{self.now:%Y%m%dT%H%M%S}-{self.count:06x}"
        file, buffer = f"results/{name}/{run_id}.parquet", io.BytesIO()
        pl.DataFrame({"revenue": [revenue]}).write_parquet(buffer)
        self.root.write(file, buffer.getvalue())
        self.root.write(
            f"results/{name}/current.json", json.dumps({"file": file, "run_id": run_id, "batch": 1}).encode()
        )

    def pointer(self, whole: bool) -> None:
        told = {"batch": 1, "as_of": BEGAN.isoformat(), "tables": {}, "run_id": "x", "published_at": BEGAN.isoformat()}
        self.root.write("lake/published.json", json.dumps(told).encode() if whole else b"{")

    def step(self) -> None:
        """STEP_S later."""
        self.now += timedelta(seconds=STEP_S)
        for at, happens in [event for event in self.due if event[0] <= self.now]:
            self.due.remove((at, happens))
            happens()
        for name, at in self.next.items():
            while self.next[name] <= self.now:
                at = self.next[name]
                if at >= max(self.quiet_until.get(name, at), self.quiet_until.get("up", at)):
                    self.run(name, at, self.states.get(name) and self.states[name].pop(0) or "ok")
                self.next[name] = self.stages[name].next_run(at)
        if self.now >= self.quiet_until.get("up", self.now):
            since = self.quiet_until.get("up", BEGAN)
            beat = {"at": self.now.isoformat(), "since": since.isoformat(), "expected_since": BEGAN.isoformat()}
            beat |= {"pid": 1, "host": "here", "env": "local", "reports_url": "http://127.0.0.1:8000"}
            self.root.write(heartbeat.PLACE, json.dumps(beat).encode())

    # --- incidents: what happens from now on, and what is to be told of it ---

    def _expect(self, key: str, opened_s: float, ended_s: float, soon_s: float = SOON_S) -> None:
        for what, after_s in (("opened", opened_s), ("ended", ended_s)):
            at = self.now + timedelta(seconds=after_s)
            self.expected.append((what, key, at, at + timedelta(seconds=soon_s)))

    def _in(self, after_s: float, happens: Callable[[], None]) -> None:
        self.due.append((self.now + timedelta(seconds=after_s), happens))

    def fails(self, rng: random.Random) -> None:
        runs = rng.randint(1, 3)
        self.states["preprocess"] = [rng.choice(["failed", "killed", "check_failed", "timed_out"]) for _ in range(runs)]
        self._expect("failed stage preprocess", 60, 60 * (runs + 1))

    def flickers(self, rng: random.Random) -> None:
        """Failed and run again by hand before anybody looked."""
        self.states["generate"] = ["failed"]
        self._in(30, lambda: self.run("generate", self.now - timedelta(seconds=1)))
        self._expect("failed stage generate", 30, 30)

    def flaps(self, rng: random.Random) -> None:
        """Every other run: an incident, then one that is told to come and go until it has held for two turns."""
        self.states["generate"] = ["failed", "ok"] * 3
        self._expect("failed stage generate", 30, 60)
        self._expect("failed stage generate", 90, 240)  # fails at 90 and 150, is ok from 180 on

    def is_late(self, rng: random.Random) -> None:
        self.quiet_until["preprocess"] = self.now + timedelta(seconds=270)
        self._expect("late stage preprocess", 180, 300)

    def up_dies(self, rng: random.Random) -> None:
        self.quiet_until["up"] = self.now + timedelta(seconds=160)
        self._expect("up up", 30, 160)
        self._expect("late stage generate", 30, 180)  # within twice its interval
        self._expect("late stage preprocess", 60, 180)

    def figure(self, rng: random.Random) -> None:
        self._in(40, lambda: self.answer(rng.uniform(0, 999)))
        self._in(200, lambda: self.answer(rng.uniform(1000, 9999)))
        self._expect(f"figure {FIGURE}", 40, 200)

    def damage(self, rng: random.Random) -> None:
        self._in(40, lambda: self.pointer(False))
        self._in(200, lambda: self.pointer(True))
        self._expect("damaged the published snapshot", 40, 200)


KINDS = (World.fails, World.flickers, World.is_late, World.up_dies, World.figure, World.flaps, World.damage)


def incidents(n: int, seed: int) -> str:
    """At least `n` incidents; two look at once, of whom one dies now and then, as does the receiver."""
    rng, kills, refused = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder, receiver() as received, ThreadPoolExecutor(2) as pool:
        world, told, last = World(Root.at(folder)), [], {"refused": False}
        wanted = Alerts(to=[received.url], figures=[FIGURE])

        def takes(post: dict) -> bool:
            nonlocal refused
            last["refused"] = not last["refused"] and rng.random() < 0.3
            refused += last["refused"]
            return not last["refused"]

        received.takes = takes
        lookers = []
        for _ in range(2):
            clock = lambda: world.now.timestamp()  # noqa: E731
            reader = health.Reader(world.root, Lake(world.root), [CHANGES], clock=clock)
            reader._lines = lambda: [line(FIGURE)]
            lookers.append((reader, alerts.Sender(wanted, clock)))

        def look(looker: int, dies: bool) -> None:
            nonlocal kills
            reader, send = lookers[looker]

            def sends(message: alerts.Message, name: str) -> None:
                if dies:
                    raise Killed
                send(message, name)
                told.append((message, world.now))

            try:
                alerts.look(world.root, wanted, reader.seen, world.now, sends, str(looker))
            except Killed:
                kills += 1
            except LeaseHeld:
                pass

        kinds = iter(KINDS * n)
        while len(world.expected) < 2 * n or world.due:
            next(kinds)(world, rng)
            for _ in range(SLOT_S // STEP_S):
                world.step()
                both = rng.random() < 0.7
                dies = rng.random() < 0.4
                list(pool.map(look, *zip(*[(0, dies), (1, False)][: 1 + both], strict=True)))
        _compare(world.expected, [(m.what, f"{m.finding['kind']} {m.finding['about']}", at) for m, at in told])
        ids = [message.id for message, _ in told]
        assert len(set(ids)) == len(ids) == len(received.posts)
        with contextlib.suppress(StopIteration):
            assert not json.loads(Path(folder, alerts.STATE).read_text())["outbox"]
    half = len(told) // 2
    return f"{half} + {half} messages, none missing, none twice; {kills} lookers died, {refused} posts refused"


def _compare(expected: list[tuple], told: list[tuple]) -> None:
    """Each that is expected has its message in time, and no other is there."""
    left = list(told)
    for what, key, after, before in expected:
        match = next((m for m in left if m[:2] == (what, key) and after <= m[2] <= before), None)
        assert match, f"not told between {after:%H:%M:%S} and {before:%H:%M:%S}: {what} {key}; left: {_shown(left)}"
        left.remove(match)
    assert not left, f"told without a reason: {_shown(left)}"


def _shown(told: list[tuple]) -> str:
    return "; ".join(f"{what} {key} {at:%H:%M:%S}" for what, key, at in told)
