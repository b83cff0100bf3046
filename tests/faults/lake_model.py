"""A lake beside a model of it: files come, come again, change, vanish, are late; stages run, or die; columns are added.

What must be in the lake is computed by a dozen lines of Python from what was delivered, not by the code under test. A
stage dies by an exception at one of its crash points, which leaves on the disk what SIGKILL would; that a killed
process leaves the same is what `lake_crashes` holds.
"""

import hashlib
import itertools
import json
import random
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

from faults import readers
from faults.lake_world import NotHeld

from etl import delta
from etl import lake as lakes
from etl.lake import commit, compaction, evolution, ingest, landing, ledger
from etl.lake.table import INT, TEXT, Column, Table

START = datetime(2026, 3, 1, tzinfo=UTC)
STEPS = 25
ASKED = {"max_bytes": 10**8, "max_bad_share": 0.5, "for_s": 60.0, "scheduled_for": None}
EVENT = Table("event", {"id": INT, "text": TEXT}, ("id",))
UPSERT = {"mode": "upsert", "order_by": "at", "on_duplicate": "newest"}
CRASHES = (commit, compaction, delta, evolution, ingest, landing, ledger)


class Died(BaseException):
    """A stage died here."""


class World:
    """A root and what must be in its lake. `extra`: whether `event` has its later column. `by`: what its tables are
    partitioned by; each second lake's are."""

    def __init__(self, folder: Path, seed: int):
        self.by = {"event": "text", "user": "id"} if seed % 2 else {"event": (), "user": ()}
        self.pick, self.root, self.extra, self.minute = random.Random(seed), folder, False, 0
        self.waiting: dict[str, bytes] = {}
        self.delivered: dict[tuple[str, str], bytes] = {}  # path, sha256 -> content, of all that there ever was
        self.events: dict[str, bytes] = {}  # path -> content, of what was taken
        self.updates: list[bytes] = []  # contents, in the order in which they were taken
        self.taken: set[tuple[str, bytes]] = set()
        self.owed: set[tuple[str, bytes]] = set()  # files that are new: taken at the end, or refused in words
        self.number = self.clock = 0
        self.done: list[str] = []

    def lake(self) -> lakes.Lake:
        columns = EVENT.columns | ({"extra": Column(INT, nullable=True)} if self.extra else {})

        class Lake(lakes.Lake):
            tables: ClassVar = {
                "event": Table("event", columns, EVENT.key, partition_by=self.by["event"]),
                "user": Table(
                    "user", {"id": INT, "at": INT, "plan": TEXT}, ("id",), partition_by=self.by["user"], **UPSERT
                ),
            }

        return Lake(self.root)

    def deliver(self) -> None:
        """A new file, with a bad line now and then."""
        self.number += 1
        if self.pick.random() < 0.5:
            lines = [{"id": self.number * 10 + n, "text": f"t{n}", "extra": self.number} for n in range(3)]
            self._new(f"event/{self.pick.randrange(3)}/{self.number}.json", self._lines(lines))
        else:
            self._new(self.pick.choice(["user/all.json", f"user/{self.number}.json"]), self._lines(self._users()))

    def _users(self) -> list[dict]:
        late = self.pick.randrange(5)
        self.clock += 1
        return [
            {"id": self.pick.randrange(8), "at": self.clock - late, "plan": f"p{self.number}-{n}"} for n in range(4)
        ]

    def _lines(self, rows: list[dict]) -> bytes:
        bad = b"{oops\n" if self.pick.random() < 0.2 else b""
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode() + bad

    def _new(self, path: str, content: bytes) -> None:
        self._put(path, content)
        self.owed.add((path, content))

    def _put(self, path: str, content: bytes) -> None:
        self.owed.discard((path, self.waiting.get(path, b"")))  # nobody saw it
        self.waiting[path] = content
        self.delivered[path, _sha256(content)] = content
        self.lake().root.write(f"landing/{path}", content)

    def repeat(self) -> None:
        """A file that was taken comes again, as it was."""
        if self.taken:
            self._put(*self.pick.choice(sorted(self.taken)))

    def copy(self) -> None:
        """The content of a file of `event` comes under another path."""
        if self.events:
            self.number += 1
            self._put(f"event/copy/{self.number}.json", self.pick.choice(sorted(self.events.values())))

    def change(self) -> None:
        """A path of `event` that was taken comes with other content."""
        if self.events:
            self.number += 1
            self._put(self.pick.choice(sorted(self.events)), self._lines([{"id": self.number * 10, "text": "changed"}]))

    def vanish(self) -> None:
        """A file that waits is taken back."""
        if self.waiting:
            path = self.pick.choice(sorted(self.waiting))
            self.owed.discard((path, self.waiting.pop(path)))
            self.lake().root.remove(f"landing/{path}")

    def stray(self) -> None:
        """A file that is no table's."""
        self.lake().root.write(f"landing/stray/{self.pick.randrange(3)}", b"?")

    def move(self) -> None:
        """The declaration has a column more."""
        self.extra = True

    def preprocess(self) -> None:
        now = START + timedelta(minutes=self.minute)
        self._run(lambda lake: lake.drain(**ASKED, max_files=self.pick.choice([1, 2, 99]), run_id="p", now=now))

    def compact(self) -> None:
        asked = {"target_mb": self.pick.choice([0.002, 1]), "min_small_files": 2, "vacuum_hours": 24, "run_id": "c"}
        self._run(lambda lake: lake.compact(**asked, now=START + timedelta(minutes=self.minute)))

    def _run(self, stage) -> None:
        dies_at, reached = self.pick.choice([None, self.pick.randrange(30)]), itertools.count()

        def crash_point(name: str) -> None:
            if next(reached) == dies_at:
                raise Died(name)

        before = [module.crash_point for module in CRASHES]
        for module in CRASHES:
            module.crash_point = crash_point
        try:
            stage(self.lake())
        except Died:
            self.done[-1] += " died"
        finally:
            for module, was in zip(CRASHES, before, strict=True):
                module.crash_point = was

    def settle(self) -> None:
        """What was taken of the files that waited, by the ledger: each as it must be."""
        lake = self.lake()
        published = lake.published()
        if published is None:
            return
        rows = published.frame("files").collect().sort("batch")
        there = {path for path, _ in lake.root.tree("landing")}
        known = {(path, _sha256(content)) for path, content in self.taken}
        for file in rows.select("path", "sha256").iter_rows():
            if file not in known:
                if file not in self.delivered:
                    raise NotHeld(f"{file} is in the ledger, and was never delivered so: {self.done[-6:]}")
                self._take(file[0], self.delivered[file])
                known.add(file)
        for path in [path for path in self.waiting if path not in there]:
            del self.waiting[path]

    def _take(self, path: str, content: bytes) -> None:
        if path.startswith("event/"):
            if path in self.events or content in self.events.values():
                raise NotHeld(f"{path} is in the ledger, though its path or content was: {self.done[-6:]}")
            self.events[path] = content
        else:
            self.updates.append(content)
        self.taken.add((path, content))

    def verify(self, last: bool) -> None:
        """The rows are those of the files that the ledger has; at the `last`, every file is somewhere."""
        lake = self.lake()
        if lake.published() is None:
            return
        now = lake.snapshot()
        events = [row for content in self.events.values() for row in _rows(content)]
        wanted = sorted((row["id"], row["text"]) for row in events)
        if (rows := sorted(now.frame("event", ["id", "text"]).collect().rows())) != wanted:
            raise NotHeld(f"event has {len(rows)} rows, not {len(wanted)}: {self.done[-8:]}")
        if last:
            seen = readers.read(f"{self.root}/lake/event", now.versions["event"], "count(*), sum(id)", {})
            if {*map(tuple, seen.values())} != {(str(len(events)), str(sum(row["id"] for row in events) or None))}:
                raise NotHeld(f"event has {len(events)} rows, and others read {seen}: {self.done[-8:]}")
        newest: dict[int, dict] = {}
        for row in (row for content in self.updates for row in _rows(content)):
            if row["id"] not in newest or row["at"] >= newest[row["id"]]["at"]:
                newest[row["id"]] = row
        wanted = sorted((row["id"], row["at"], row["plan"]) for row in newest.values())
        if (rows := sorted(now.frame("user", ["id", "at", "plan"]).collect().rows())) != wanted:
            raise NotHeld(f"user has {set(rows) ^ set(wanted)} beside what it must: {self.done[-8:]}")
        files = now.frame("files").select("path", "sha256", "refused").collect()
        counted = {(path, sha256) for path, sha256, refused in files.iter_rows() if refused is not None}
        bad = {(path, _sha256(content)): content.count(b"{oops") for path, content in self.taken}
        # of a file that vanished while its batch was unfinished nobody can tell any more
        least, most = sum(bad[file] for file in counted), sum(bad.values())
        if not least <= (apart := now.frame("quarantine").collect()).height <= most:
            raise NotHeld(f"quarantine has {apart.height} lines, not {least} to {most}: {self.done[-8:]}")
        if last and (left := [path for path, _ in lake.root.tree("landing") if not path.startswith("stray/")]):
            raise NotHeld(f"{left} still wait: {self.done[-8:]}")
        refused = {one["file"] for one in lake.refused_files()}
        if last and (lost := [path for path, _ in self.owed - self.taken if path not in refused]):
            raise NotHeld(f"{lost} were neither taken nor refused: {self.done[-8:]}")
        if last and (wrong := [one for one in lake.examine() if one.problem and one.what != "landing"]):
            raise NotHeld(f"doctor finds {wrong[0]}: {self.done[-8:]}")

    def step(self) -> None:
        ways = [self.deliver, self.repeat, self.copy, self.change, self.vanish, self.stray, self.move]
        ways += [self.deliver] * 4 + [self.preprocess] * 5 + [self.compact] * 2
        way = self.pick.choice(ways)
        self.done.append(way.__name__)
        self.minute += self.pick.choice([1, 1, 30])
        way()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _rows(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines() if line != b"{oops"]


def interleaved(n: int, seed: int) -> str:
    """n lakes of STEPS steps each; after each stage the lake is what the model says."""
    steps = died = 0
    for number in range(n):
        folder = Path(tempfile.mkdtemp(prefix="lake-"))
        world = World(folder, seed * 10_000 + number)
        try:
            for _ in range(STEPS):
                world.step()
                if world.done[-1].startswith(("preprocess", "compact")):
                    world.settle()
                    world.verify(last=False)
            world.pick = _Calm()
            for stage in (world.preprocess, world.compact, world.preprocess):
                world.done.append(stage.__name__)
                stage()
                world.settle()
            world.verify(last=True)
        except NotHeld as error:
            raise NotHeld(f"seed {seed * 10_000 + number}: {error}") from None
        steps += len(world.done)
        died += sum(step.endswith("died") for step in world.done)
        shutil.rmtree(folder)
    return f"{n} lakes: {steps} steps, {died} stages died"


class _Calm(random.Random):
    """Nothing dies any more."""

    def choice(self, items):
        return items[-1] if isinstance(items[-1], int) and items[0] == 1 else None if None in items else items[-1]
