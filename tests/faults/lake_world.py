"""A lake under test: generated files whose every row is known, stages as processes that may be killed, and a reader.

A tick is a few real TPC-H orders with their line items under keys of its own (tick * 1000 and up), so that a row tells
which file it came from; now and then a line is broken, or has a field more. What must come out is computed by DuckDB
from the lines that were written, not by the code under test.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import duckdb
import polars as pl
from faults import readers

from etl.lake import Snapshot, ingest, workers
from etl.leases import LeaseHeld
from etl.storage import Root
from pipeline import Lake, source
from pipeline.tables import TABLES

AT = "2026-03-01T12:00:10+00:00"
LIMITS = {"max_files": 500, "max_bytes": 50_000_000, "max_bad_share": 0.5, "for_s": 60.0}
ORDERS = 6  # in a tick
DASK, CUT_BYTES = "ETL_FAULTS_DASK", 2_000  # the address of a cluster that does the work, and how large its pieces are
MONEY = {"orders": ["o_totalprice"], "lineitem": ["l_quantity", "l_extendedprice", "l_discount", "l_tax"]}
KEYS = {"orders": "o_orderkey, 0", "lineitem": "l_orderkey, l_linenumber"}

processes = multiprocessing.get_context("forkserver")
# what this module and a stage import: Python 3.11 gives the server no sys.path, so that it cannot find `faults` itself
processes.set_forkserver_preload(
    ["duckdb", "pandas", "pyarrow.parquet", "etl.lake.workers", "pipeline.source", "pipeline.tables"]
)


class NotHeld(AssertionError):
    """Something that is promised does not hold."""


@functools.cache
def real() -> dict[int, dict[str, pl.DataFrame]]:
    """Some real ticks to take rows from."""
    return source.make_ticks(source.Stream(0.01, 40, "2026-03-01T11:00:00+00:00"), range(2))


@functools.cache
def db() -> duckdb.DuckDBPyConnection:
    """The engine that says what must be there."""
    return duckdb.connect()


class World:
    """A root in `folder`, the files that were put into its landing, and what must be in the lake because of them."""

    def __init__(self, folder: Path, seed: int, bad: float = 0.02):
        self.folder, self.root = Path(folder), str(Path(folder) / "root")
        self.random, self.bad, self.next_tick = random.Random(seed), bad, 0
        self.quarantined: set[tuple[str, int]] = set()
        self.landed: dict[str, str] = {}  # file -> sha256
        self.reads = 0
        self.environment: dict[str, str] = {}  # of the stages
        (self.folder / "given").mkdir(parents=True, exist_ok=True)

    def copied(self, folder: Path) -> "World":
        """The same world again, in another folder."""
        shutil.copytree(self.folder, folder)
        copy = World(folder, self.next_tick, self.bad)
        copy.environment = self.environment
        copy.quarantined, copy.landed, copy.next_tick = set(self.quarantined), dict(self.landed), self.next_tick
        return copy

    def land(self, ticks: int = 1, small_tables: bool = False) -> None:
        """Put the files of the next ticks into landing; with the first, a few rows of every other table too."""
        for _ in range(ticks):
            tick, self.next_tick = self.next_tick, self.next_tick + 1
            for table, frame in self._frames(tick, small_tables and tick == 0).items():
                lines = source.to_json_lines(frame).splitlines()
                good = list(lines)
                if table in MONEY and self.random.random() < self.bad * 5:
                    number = self.random.randrange(len(lines))
                    good = lines[:number] + lines[number + 1 :]
                    lines[number] = self.random.choice([b"{oops", lines[number][:-9], lines[number] * 2, b"{}"])
                    blank = self.random.randrange(2)  # lines that are no rows, but count
                    lines[:0] = [b" "] * blank
                    self.quarantined.add((f"{table}/{table}-{tick:08d}.json", number + 1 + blank))
                if table in MONEY and self.random.random() < self.bad * 5:
                    lines = [line if b"key" not in line else line[:-1] + b',"extra":"one"}' for line in lines]
                    good = [line[:-1] + b',"extra":"one"}' for line in good]
                (self.folder / "given" / f"{table}-{tick:08d}.json").write_bytes(b"\n".join(good) + b"\n")
                name, data = source.file_name(table, tick), b"\n".join(lines) + b"\n"
                self.landed[name.rpartition("/")[2]] = hashlib.sha256(data).hexdigest()
                Root.at(self.root).write(name, data)

    def _frames(self, tick: int, small_tables: bool) -> dict[str, pl.DataFrame]:
        made = real()[1]
        orders = made["orders"].slice(tick * ORDERS % (made["orders"].height - ORDERS), ORDERS)
        keys = dict(zip(orders["o_orderkey"], range(tick * 1000 + 1, tick * 1000 + 1 + ORDERS), strict=True))
        lineitem = made["lineitem"].filter(pl.col("l_orderkey").is_in(list(keys)))
        frames = {
            "orders": orders.with_columns(pl.col("o_orderkey").replace_strict(keys)),
            "lineitem": lineitem.with_columns(pl.col("l_orderkey").replace_strict(keys)),
        }
        others = {t: f.head(5) for t, f in real()[0].items() if t not in frames} if small_tables else {}
        return others | frames

    def process(self, stage: str, crash_at: str | None = None, mutant: str | None = None, wait_for: str | None = None):
        """A stage in a process of its own, started; it begins when the file `wait_for` is there."""
        mutant = mutant or os.environ.get("ETL_FAULTS_MUTANT")
        about = (stage, self.root, str(self.folder), crash_at, mutant, wait_for, self.environment)
        child = processes.Process(target=_run, args=about)
        child.start()
        return child

    def run(self, stage: str, crash_at: str | None = None, mutant: str | None = None) -> int:
        """A stage to its end; its exit status, negative for a signal."""
        child = self.process(stage, crash_at, mutant)
        child.join(120)
        if child.exitcode is None:
            child.kill()
            raise NotHeld(f"{stage} hangs")
        return child.exitcode

    def run_well(self, stage: str, mutant: str | None = None) -> None:
        if status := self.run(stage, mutant=mutant):
            raise NotHeld(f"a plain run of {stage} ended with {status}: {self.log()}")

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "log").read_text()[-400:]
        return ""

    @contextlib.contextmanager
    def read_meanwhile(self):
        """A reader that opens the snapshot every 100 ms meanwhile: no error, and never two batches in one."""
        stop, found = self.folder / "stop", self.folder / "found.json"
        stop.unlink(missing_ok=True)
        reader = processes.Process(target=_read, args=(self.root, str(stop), str(found)))
        reader.start()
        try:
            yield
        finally:
            stop.touch()
            reader.join(60)
        seen = json.loads(found.read_text())
        if seen["wrong"]:
            raise NotHeld(f"a reader saw {seen['wrong'][:2]} in {seen['reads']} reads")
        self.reads += seen["reads"]

    def verify(self, everything: bool = True) -> None:
        """Every row once, every sum right to the cent, one batch in all tables. Raises NotHeld."""
        if wrong := mixed(self.root):
            raise NotHeld(wrong)
        if not everything:
            return
        snapshot = Lake(self.root).snapshot()
        for table, key in KEYS.items():
            sums = ", ".join(f"sum({name}::decimal(15,2))" for name in MONEY[table])
            ask = f"select count(*), count(distinct ({key})), {sums} from "
            given = db().sql(f"{ask} read_json('{self.folder}/given/{table}-*.json', format='newline_delimited')")
            there = db().sql(f"{ask} read_parquet({self._files(snapshot, table)})")
            if (want := given.fetchone()) != (found := there.fetchone()):
                raise NotHeld(f"{table}: rows, keys and sums are {found}, not {want}")
            self._require_same_by_others(snapshot, table, found[:1])
        files = self._files(snapshot, "quarantine")
        rows = db().sql(f"select file, line from read_parquet({files})").fetchall() if files else []
        if sorted(rows) != sorted(self.quarantined):
            raise NotHeld(f"quarantine has {len(rows)} rows, not the {len(self.quarantined)} that were broken")
        waiting = [name for table in TABLES for name in Root.at(self.root).names(f"landing/{table}")]
        if waiting:
            raise NotHeld(f"{len(waiting)} files still wait")

    def require_archived(self) -> None:
        """Every file that came is in the archive, once and as it was, and nothing else. Raises NotHeld."""
        root = Root.at(self.root)
        kept = [(rel.rpartition("/")[2], hashlib.sha256(root.read(rel)).hexdigest()) for rel in root.files("archive")]
        if sorted(kept) != sorted(self.landed.items()):
            raise NotHeld(
                f"the archive has {len(kept)} files, not the {len(self.landed)} that came, or not as they were"
            )

    def _require_same_by_others(self, snapshot: Snapshot, table: str, rows: tuple) -> None:
        """Other readers see as many rows, with the same sums of whole hundredths as each other."""
        sums = ", ".join(f"sum(cast({name} * 100 as bigint))" for name in MONEY[table])
        root = snapshot.lake.root
        about = root.url_of(f"lake/{table}"), snapshot.versions[table], f"count(*), {sums}", root.storage_options
        seen = readers.read(*about)
        if {found[0] for found in seen.values()} != {str(rows[0])} or len({*map(tuple, seen.values())}) > 1:
            raise NotHeld(f"{table} has {rows[0]} rows, and others read {seen}")

    def _files(self, snapshot: Snapshot, table: str) -> list[str]:
        """A table's files on this machine: of an object store's lake, copies."""
        urls = snapshot.files(table)
        if "://" not in self.root:
            return urls
        folder = Path(self.folder, "copies", table)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (names := [url.rpartition("/")[2] for url in urls]):
            (folder / name).write_bytes(Root.at(self.root).read(f"lake/{table}/{name}"))
        return [str(folder / name) for name in names]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def mixed(root: str) -> str | None:
    """What is wrong with the published snapshot: rows of another batch than the one it names; None when nothing is."""
    if not Lake(root).published():
        return None
    snapshot = Lake(root).snapshot()
    counted = pl.col("rows").fill_null(1)  # an older version did not count
    files = snapshot.frame("files").filter(counted > 0).collect()
    for table, key in (("orders", "o_orderkey"), ("lineitem", "l_orderkey")):
        ticks = snapshot.frame(table, [key]).collect()[key] // 1000
        want = {snapshot.lake.sequence_of(path) for path in files.filter(table=table)["path"]}
        if (there := set(ticks)) != want:
            return (
                f"batch {snapshot.batch} should have {len(want)} ticks of {table}, and has {len(there)}: {want ^ there}"
            )
    return None


def stage(name: str, root: str) -> None:
    """What the notebook does, without the notebook."""
    dask = os.environ.get(DASK)
    if dask:
        workers.TASK_BYTES = CUT_BYTES
    if name == "preprocess":
        Lake(root).drain(**LIMITS, scheduled_for=AT, run_id=f"preprocess-{os.getpid()}", dask=dask)
    elif name == "compact":
        ask = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24, "run_id": f"compact-{os.getpid()}"}
        failed = Lake(root).compact(**ask, dask=dask).drop_nulls("failed")
        if failed.height:
            raise NotHeld(f"{failed['table'][0]} could not be compacted: {failed['failed'][0]}")
    elif name == "rebuild":
        Lake(root).rebuild(f"rebuild-{os.getpid()}")
    elif name == "backup":
        Lake(root).backup(Root.at(f"{root}-backup"), keep=3)


def _run(
    name: str,
    root: str,
    folder: str,
    crash_at: str | None,
    mutant: str | None,
    wait_for: str | None,
    environment: dict[str, str],
) -> None:
    os.environ |= environment
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if crash_at:
        os.environ["ETL_CRASH_AT"] = crash_at
    if mutant:
        from faults import lake_mutants

        lake_mutants.APPLY[mutant]()
    while wait_for and not os.path.exists(wait_for):
        time.sleep(0.01)
    try:
        stage(name, root)
    except (LeaseHeld, ingest.Overtaken) as error:  # said plainly, and nothing was done
        print(error, file=sys.stderr)
        sys.exit(3)


def _read(root: str, stop: str, found: str) -> None:
    wrong, reads = [], 0
    while not os.path.exists(stop):
        try:
            if problem := mixed(root):
                wrong.append(problem)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
        reads += 1
        time.sleep(0.1)
    Path(found).write_text(json.dumps({"reads": reads, "wrong": wrong}))


def points(world: World, name: str) -> list[str]:
    """The crash points that a run of a stage comes to, each as often as it does."""
    names = world.folder / "points"
    if status := world.run(name, crash_at=f"+{names}"):
        raise NotHeld(f"a plain run of {name} ended with {status}: {world.log()}")
    return names.read_text().splitlines()


def was_killed(status: int) -> bool:
    return status == -signal.SIGKILL
