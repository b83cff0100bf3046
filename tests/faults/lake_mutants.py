"""The campaign itself under test: with a safeguard taken out it has to fail. One that does not notice is of no use."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

from etl.storage import PROJECT

DOUBLING = "1.6.6"  # of deltalake: lets two overlapping compactions both commit


def _no_transaction_check() -> None:
    from etl.lake import commit

    head = commit.head
    commit.head = lambda lake, table, after: (head(lake, table, after)[0], 0)


def _published_early() -> None:
    from etl.lake import commit
    from etl.lake.snapshot import read_pointer, swap_pointer

    append = commit.append

    def early(lake, table, rows, *, batch, **about):
        if table == "lineitem":
            pointer = read_pointer(lake.root)
            as_of = pointer["as_of"] if pointer else "1970-01-01T00:00:00+00:00"
            versions = {name: lake.table(name).version() for name in lake.columns}
            swap_pointer(lake.root, pointer, batch=batch, as_of=as_of, versions=versions, run_id=about["run_id"])
        return append(lake, table, rows, batch=batch, **about)

    commit.append = early


def _no_lease() -> None:
    from etl.leases import Lease
    from etl.storage import LocalRoot

    class Nobody(Lease):
        def require(self) -> None:
            """It is held by all."""

        def _say(self, *_: object) -> None:
            """Nobody is told."""

    LocalRoot.lease = lambda self, rel, holder, wait_s=30: contextlib.nullcontext(Nobody("", holder, {}))


def _quick_leases(clock_s: float = 0) -> None:
    """Leases that are taken over within a second, on a machine whose clock is wrong."""
    import time

    from etl import leases
    from etl.lake import compaction, ingest

    leases.RENEW_S, leases.DEAD_S, leases.LOOK_S = 0.2, 1.0, 0.05
    now, clock = time.time, datetime.now
    time.time = lambda: now() + clock_s

    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None):
            return clock(tz) + timedelta(seconds=clock_s)

        fromisoformat = datetime.fromisoformat

    for module in (compaction, ingest):
        module.datetime = Wrong


def _librarys_compaction() -> None:
    """delta-rs's own, of what is there now, with some time between its plan and its commit, and nothing compared."""
    from deltalake.exceptions import CommitFailedError

    from etl.lake import compaction

    def compact_table(lake, table, *_: object):
        handle = lake.table(table)
        time.sleep(0.3)
        with contextlib.suppress(CommitFailedError):
            handle.optimize.compact()
        return {}

    compaction._compact_table = compact_table


def _librarys_compaction_without_lease() -> None:
    _no_lease()
    _librarys_compaction()


def _nothing_synced() -> None:
    os.fsync = lambda descriptor: None


def _no_folder_synced() -> None:
    from etl import storage

    storage.sync = lambda path: None


def _no_sync_of_what_others_left() -> None:
    from etl.storage import LocalRoot

    LocalRoot.sync = lambda self, rels: None


def _librarys_checkpoint() -> None:
    """Where the log is, and synced after it has its name."""
    from etl import delta

    def checkpoint(root, table, version):
        root.table(table, version).create_checkpoint()
        root.sync(f"{delta.log_of(table)}/{name}" for name in (f"{version:020d}.checkpoint.parquet", delta.LAST, ""))

    delta._checkpoint = checkpoint


def _librarys_append_to_the_index() -> None:
    """Its newest commit and that one's file are synced when it has returned."""
    from deltalake import write_deltalake

    from etl import delta
    from etl.runs import index

    def append(root, record):
        write_deltalake(root.url_of(index.TABLE), index.frame([record]), mode="append")
        newest = delta.newest_version(root, index.TABLE)
        delta.sync(root, index.TABLE, newest - 1, newest)

    index.append = append


def _instead(name: str, make) -> None:
    """A function of the engine by another one, which is made of it. `name`: module.function, below etl."""
    import importlib

    path, _, function = name.rpartition(".")
    module = importlib.import_module(f"etl.{path}")
    setattr(module, function, make(getattr(module, function)))


def _nothing_is_known() -> None:
    from etl.lake.ledger import Known

    Known.find = lambda self, digests: {}


def _shorter(ranges):
    """Of the rows that a compaction writes one is missing."""
    return lambda *about: (frame.head(-1) if number == 0 else frame for number, frame in enumerate(ranges(*about)))


def _first_of_a_key(newest):
    return lambda rows, table, without=(): rows.unique(
        [name for name in table.key if name not in without], keep="first", maintain_order=True
    )


def _pointer_stays(catch_up):
    from etl.lake.snapshot import read_pointer

    return lambda lake, run_id: read_pointer(lake.root)


def _no_news(news):
    from etl.questions.portions import News

    return lambda snapshot, question, before: News([], 0)


APPLY = {
    "what nothing needs goes at once": lambda: _instead(
        "lake.retention._days_worth", lambda _: lambda since, *_: {*since}
    ),
    "what nothing needs stays": lambda: _instead("lake.retention._days_worth", lambda _: lambda *_: set()),
    "no file is known": _nothing_is_known,
    "the first row of a key counts": lambda: _instead("lake.upsert.newest", _first_of_a_key),
    "a compaction leaves out a row": lambda: _instead("lake.sorting.ranges", _shorter),
    "a pointer of before stays": lambda: _instead("lake.commit.catch_up", _pointer_stays),
    "logs that are made again begin with 0": lambda: _instead("delta.renumber", lambda _: lambda *_: None),
    "bad lines are dropped": lambda: _instead(
        "lake.ingest._for_quarantine", lambda apart: lambda bad, *about: apart(bad.head(0), *about)
    ),
    "a backup leaves out a commit": lambda: _instead("lake.backup._log", lambda log: lambda *about: log(*about)[:-1]),
    "what came since is not asked": lambda: _instead("questions.portions.news", _no_news),
    "lines are plain, whatever is in them": lambda: _instead("lake.parse._nothing_odd", lambda _: lambda *_: True),
    "columns of Parquet are what they are called": lambda: _instead("lake.parse._alike", lambda _: lambda *_: True),
    "quick leases": _quick_leases,
    "quick leases, clock ahead": functools.partial(_quick_leases, 600),
    "quick leases, clock behind": functools.partial(_quick_leases, -600),
    "nothing synced": _nothing_synced,
    "no folder synced": _no_folder_synced,
    "no sync of what others left": _no_sync_of_what_others_left,
    "the library's checkpoint": _librarys_checkpoint,
    "the library's append to the index": _librarys_append_to_the_index,
    "no transaction check": _no_transaction_check,
    "published early": _published_early,
    "no lease": _no_lease,
    "the library's compaction": _librarys_compaction,
    "the library's compaction without lease": _librarys_compaction_without_lease,
}
# what is taken out; on which deltalake (None: the pinned one); what has to fail. The first is tried by `make test`.
KILLED_BY = [
    ("lines are plain, whatever is in them", None, "lake_malformed.both_ways", 20_000),
    ("no transaction check", None, "lake_crashes.at_commits", 40),
    ("nothing synced", None, "power_cuts.of('ticks')", 40),
    ("no folder synced", None, "power_cuts.of('first')", 40),
    ("no sync of what others left", None, "power_cuts.of('killed')", 400),
    ("the library's checkpoint", None, "power_cuts.of('ticks')", 400),
    ("the library's append to the index", None, "power_cuts.of('report')", 400),
    ("published early", None, "lake_crashes.at_commits", 40),
    ("the library's compaction without lease", DOUBLING, "lake_crashes.overlapping", 6),
    ("what nothing needs goes at once", None, "lake_days.superseded", 2),
    ("what nothing needs stays", None, "lake_days.superseded", 3),
    ("no file is known", None, "lake_model.interleaved", 20),
    ("the first row of a key counts", None, "lake_model.interleaved", 20),
    ("a compaction leaves out a row", None, "lake_crashes.at_every_point_of_compact", 2),
    ("a pointer of before stays", None, "lake_fence.pointers", 3),
    ("logs that are made again begin with 0", None, "lake_fence.rebuilds_killed", 4),
    ("bad lines are dropped", None, "lake_crashes.at_every_point", 4),
    ("a backup leaves out a commit", None, "lake_backups.backups", 3),
    ("what came since is not asked", None, "lake_cadence.cadence", 242),
    ("columns of Parquet are what they are called", None, "lake_files.any_file", 3_000),
]
NAMED = re.compile(r"[\w.]+: ")  # the line of an error: its message may go on for more
OURS = ("AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "TypeError")  # of a mutant


def mutants(n: int, seed: int) -> str:
    """The first n safeguards taken out, one by one; raises when the campaign does not notice."""
    told = []
    with tempfile.TemporaryDirectory(prefix="deltalake-") as other:
        for what, version, scenario, numbers in KILLED_BY[:n]:
            if version and not _install(version, other):
                told.append(f"not tried: deltalake {version} could not be had")
                continue
            done = _campaign(scenario, numbers, seed, what, other if version else None)
            if done.returncode == 0:
                raise AssertionError(
                    f"with {what} on deltalake {version or 'as pinned'} {scenario} passed: {done.stdout}"
                )
            last = next(filter(NAMED.match, reversed(done.stderr.splitlines())), done.stderr[-160:])
            if last.startswith(OURS):
                raise AssertionError(f"with {what} {scenario} ended by something else: {done.stderr[-600:]}")
            told.append(f"{what}{f' on {version}' * bool(version)}: {last[:160]}")
    return "; ".join(told)


def _campaign(scenario: str, n: int, seed: int, mutant: str, packages: str | None) -> subprocess.CompletedProcess:
    paths = [*filter(None, [packages]), str(PROJECT / "tests"), str(PROJECT)]
    module, _, call = scenario.partition(".")
    function, _, given = call.partition("(")
    about = [*filter(None, [given.rstrip(")")])]
    code = f"""
if __name__ == "__main__":
    import inspect, os
    from faults import lake_mutants, {module}
    function = {module}.{function}({", ".join(about)}) if {bool(about)} else {module}.{function}
    if "mutant" in inspect.signature(function).parameters:
        print(function({n}, {seed}, {mutant!r}))
    else:
        os.environ["ETL_FAULTS_MUTANT"] = {mutant!r}
        lake_mutants.APPLY[{mutant!r}]()
        print(function({n}, {seed}))
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def _install(version: str, folder: str) -> bool:
    if Path(folder, "deltalake").exists():
        return True
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        folder,
        f"deltalake=={version}",
    ]
    return subprocess.run(command, capture_output=True).returncode == 0
