"""The processes beside the worker: Prefect's server, the API, the dashboard. Started, watched, ended together."""

import contextlib
import http.client
import importlib.util
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from etl.kernels import client
from etl.kernels.children import Deaths, signal_group, start
from etl.serve.prefect_server import HOST
from etl.storage import PROJECT

log = logging.getLogger(__name__)
READY_S = 300  # until an essential one answers, on busy cores; 15 s on idle ones
PREFECT = "Prefect server"
PORTS = {"prefect": 4200, "api": 8000, "dashboard": 8501}  # all on 127.0.0.1
LOOK_S = 10  # between two looks whether a service answers
HUNG = 6  # looks one after the other, at which one that had answered does not: it is started again
BEAT_S = 120  # at most between two beats of a service without a page
API_HOST = "ETL_API_HOST"  # a variable: where the API listens; beyond this machine it wants a token
BEAT = "ETL_BEAT"  # a variable: the file that a service without a page touches
LOG_BYTES = 16_000_000  # of a service's log, and as many of the one before
WAL_WRITE = "120"  # the byte of <database>-shm that who writes has locked, SQLite's WAL_WRITE_LOCK
END_S = 15  # until the children of an `up` that was killed have ended

# What Prefect's server needs to be quiet, private and honest here; a variable that is set already wins.
SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # otherwise a process without an API boots a server of its own
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    # in memory, the default, a slot held when the server dies is never freed
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # about 4,400 runs a day: keep two weeks of them
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": "1209600",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",  # watches for lost workers; ours is watched by `up`
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",  # no flow here pauses
    # loops that mostly find nothing; a run here that is late is late by less than any of them
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "60",  # 5 by default
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "60",  # 20
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "30",  # 15; a dead server's slot is free so much later
    "PREFECT_LOGGING_LEVEL": "WARNING",
}


class PortTaken(RuntimeError):
    """Somebody listens on the port already."""


class Health:
    """Looks now and then, in a thread of its own, whether a service is well, and counts how often not since it was.
    What another start would not help does not count: `why` says that.

    Looks and not seconds: while this process was stopped, or the machine slept, nobody looked.
    """

    def __init__(self, why: str = "") -> None:
        self.why = why
        self._count, self._looked = 0, time.monotonic()
        self._look: threading.Thread | None = None
        self._has_answered = False

    def failed(self, is_well: Callable[[], bool], why_ill: Callable[[], str]) -> int:
        """How often, one after the other; 0 for one that was not well yet."""
        if time.monotonic() - self._looked >= LOOK_S and not (self._look and self._look.is_alive()):
            self._looked = time.monotonic()
            self._look = threading.Thread(target=self._see, args=(is_well, why_ill), name="health", daemon=True)
            self._look.start()
        return self._count

    def _see(self, is_well: Callable[[], bool], why_ill: Callable[[], str]) -> None:
        self.why = why_ill()
        if is_well():
            self._count, self._has_answered = 0, True
        elif self._has_answered and not self.why:
            self._count += 1


@dataclass
class Service:
    """One child process. `health_url` answers 200 once it works; `page` is what people open. One without a page touches
    the file `beat`, whose path the variable BEAT gives it.

    Without one that is `essential` `up` does not begin. Later any may die as often as it will: it is started again, at
    once, or later when it does so again and again. `mend` is called before each start, and says what it did, or "".
    `why_ill` is asked with its process now and then, and says what keeps it from its work that another start would not
    help, a semicolon and what to do, or ""; `ill` is what it said last.
    """

    name: str
    command: list[str]
    port: int
    health_url: str
    page: str
    environment: dict[str, str] = field(default_factory=dict)
    log_path: Path = Path(os.devnull)
    essential: bool = False
    mend: Callable[[], str] = str
    why_ill: Callable[[int], str] = lambda pid: ""
    beat: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    deaths: Deaths = field(default_factory=Deaths)
    health: Health = field(default_factory=Health)
    ill: str = ""
    ill_since: datetime = datetime.min.replace(tzinfo=UTC)

    @property
    def variables(self) -> dict[str, str]:
        """Its own variables, and where the project's modules are: only `etl` is installed."""
        beat = {BEAT: str(self.beat)} if self.beat else {}
        return {"PYTHONPATH": client.python_path()} | beat | self.environment

    def is_well(self) -> bool:
        """Whether it answers, or beats."""
        if self.beat is None:
            return not self.health_url or answers(self.health_url, timeout_s=LOOK_S)
        try:
            return abs(time.time() - self.beat.stat().st_mtime) < BEAT_S
        except OSError:
            return False

    def start(self) -> None:
        """Start it in a group of its own: Ctrl-C reaches `up` alone, which ends its children in order."""
        if mended := self.mend():
            log.warning("%s: %s", self.name, mended)
        self.health = Health(self.why_ill(0))
        self._tell_why()
        # in PROJECT: Python looks there first for modules, before PYTHONPATH
        self.process = start(self.command, self.variables, PROJECT, self.log_path)

    def wait_ready(self) -> None:
        """Until it answers. Raises RuntimeError with the end of its log when it dies or does not."""
        deadline = time.monotonic() + (READY_S if self.essential else READY_S / 5)
        assert self.process is not None, "it was started"
        while not answers(self.health_url):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{self.name} did not start; the end of {self.log_path}:\n{tail}")
            time.sleep(0.2)

    def ensure(self) -> None:
        """Start it again when it has died, or hangs, if it is time, and keep its log short. Never raises."""
        shorten(self.log_path)
        if self.process and self.process.poll() is None:
            failed = self.health.failed(self.is_well, partial(self.why_ill, self.process.pid))
            self._tell_why()
            if failed < HUNG:
                return
            self._died(f"did not answer for {HUNG * LOOK_S} s" if self.health_url else "hangs")
        elif self.process:
            self._died(f"ended with status {self.process.returncode}")
        if self.process:
            self.signal(signal.SIGKILL)  # with what it left of its group
            self.process.wait()
            self.process = None
        if self.deaths.wait_s == 0:
            try:
                self.start()
            except OSError as error:  # no process, no memory, no room for its log
                self._died(f"could not be started: {error}")

    def _tell_why(self) -> None:
        if self.health.why and not self.ill:
            self.ill_since = datetime.now(UTC)
        if self.health.why not in ("", self.ill):
            log.warning("%s: %s", self.name, self.health.why)
        self.ill = self.health.why

    def _died(self, how: str) -> None:
        count = self.deaths.add()
        is_news = count == 1 or self.essential and not self.ill  # a series is one warning
        told = logging.WARNING if is_news else logging.INFO
        again = f", {count} times within an hour" if count > 1 else ""
        log.log(told, "%s %s%s; starting it again, see %s", self.name, how, again, self.log_path)

    def signal(self, number: int) -> None:
        """To the whole group, so that its own children hear it too."""
        signal_group(self.process, number)


def ill(children: Iterable[Any]) -> list[dict[str, str]]:
    """Of what `up` keeps alive each service that is ill: its name, why, and since when."""
    services = [child for child in children if isinstance(child, Service) and child.ill]
    return [{"name": one.name, "why": one.ill, "since": one.ill_since.isoformat()} for one in services]


def shorten(log_path: Path, most: int = LOG_BYTES) -> None:
    """Move what is in a log aside once it is long, in the place of what was moved before; whoever writes to it goes on.

    What comes between the copy and the cut is lost.
    """
    with contextlib.suppress(OSError):  # none yet, or no room: the next time
        if log_path.is_file() and log_path.stat().st_size > most:
            shutil.copyfile(log_path, log_path.with_name(f"{log_path.name}.before"))
            os.truncate(log_path, 0)


def stop(services: list[Service], grace_s: float = 3) -> None:
    """End all of them, at once and then for good; none is left when this returns."""
    for service in services:
        service.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for service in services:
        if service.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(max(deadline - time.monotonic(), 0))
        service.signal(signal.SIGKILL)  # the rest of the group too
        if service.process:
            service.process.wait()


def answers(url: str, timeout_s: float = 2) -> bool:
    """Whether a GET of `url` gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            status: int = response.status
            return status == 200
    except (OSError, http.client.HTTPException):  # nobody, or somebody who speaks something else
        return False


def ensure_free(port: int, name: str, within_s: float = 0) -> None:
    """Raises PortTaken, with what to do, when somebody still listens on the port after `within_s` seconds."""
    until = time.monotonic() + within_s
    while not _is_free(port):
        if time.monotonic() >= until:
            option = name.lower().split()[0]
            raise PortTaken(
                f"port {port}, for the {name}, is taken: end what listens there, or choose another with --{option}-port"
            )
        time.sleep(0.2)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a port in TIME_WAIT is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def usual(root_url: str, ports: Mapping[str, int], logs: Path) -> list[Service]:
    """What `up` keeps alive unless a project says otherwise: Prefect's server, and `app`, which shows any project.

    `logs`: the folder of the services' logs. Raises ModuleNotFoundError when Python's path does not lead to `app`.
    """
    return [
        prefect_server(ports["prefect"], logs / "prefect", logs),
        api("app.api:app", root_url, ports, logs),
        dashboard("app.web", root_url, ports, logs),
    ]


def prefect_server(port: int, home: Path, logs: Path) -> Service:
    """Prefect's own server on SQLite, its database under `home`."""
    # its pages, by either name; "*" by default, so that any page of the web could start flows and read what they did
    own = ",".join(f"http://{name}:{port}" for name in (HOST, "localhost"))
    environment = {"PREFECT_HOME": str(home)} | SERVER_ENVIRONMENT | {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own}
    if "?" in str(home):
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url(home)
    return Service(
        PREFECT,
        [sys.executable, "-m", "etl.serve.prefect_server", "--port", str(port)],
        port,
        f"http://{HOST}:{port}/api/ready",  # /api/health is 200 a moment before a POST works
        f"http://{HOST}:{port}",
        {k: v for k, v in environment.items() if k == "PREFECT_HOME" or k not in os.environ},
        logs / "prefect.log",
        essential=True,
        mend=lambda: set_aside_damaged(home / "prefect.db"),
        why_ill=lambda pid: who_locks(home / "prefect.db", pid),
    )


def set_aside_damaged(database: Path) -> str:
    """Give a database of Prefect's that is damaged another name, so that its server makes a new one; says so, or "".

    What ran is in the index of runs; what Prefect alone knew (its history, automations, variables) is in the old file.
    """
    if not database.exists():
        return ""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=1)) as opened:
            [told] = opened.execute("PRAGMA quick_check(1)").fetchone()
        if told == "ok":
            return ""
    except sqlite3.OperationalError as error:  # locked, or no file of ours to read: that is no damage
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR):
            return ""
        told = str(error)
    except sqlite3.DatabaseError as error:
        told = str(error)
    aside = database.with_name(f"{database.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{database}{suffix}", f"{aside}{suffix}")
    short = " ".join(str(told).split())[:200]
    return (
        f"its database {database} is damaged ({short}); it is {aside.name} now, and Prefect begins with a new one. "
        "Runs, reports and schedules are not in it and go on; automations and variables that were made on its page are "
        "to be made again"
    )


def who_locks(database: Path, own: int = 0) -> str:
    """Which process of this machine, other than `own`, has kept a database of SQLite's from being written for a second,
    and what to do; "" when none has."""
    holders = _holders(database) - {own}
    if not holders:
        return ""
    url = f"file:{quote(str(database))}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(url, uri=True, timeout=1, isolation_level=None)) as opened:
            opened.execute("BEGIN IMMEDIATE")
        return ""
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return ""
    told = ", ".join(_named(pid) for pid in sorted(holders & _holders(database)))
    what = f"its database {database} is locked by {told}, and runs go on by the timetable of `up`, without Prefect"
    return f"{what}; end that process, or what it does there" if told else ""


def _holders(database: Path) -> set[int]:
    """The processes that have locked a database of SQLite's for writing, as Linux knows them."""
    inodes = dict[str, str]()
    for suffix in ("", "-shm"):
        with contextlib.suppress(OSError):
            inodes[str(os.stat(f"{database}{suffix}").st_ino)] = suffix
    holders = set[int]()
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            *_, access, pid, file, first, _ = line.split()
            of = inodes.get(file.rpartition(":")[2])
            if access == "WRITE" and "->" not in line and of is not None and (of == "" or first == WAL_WRITE):
                holders.add(int(pid))
    return holders


def _named(pid: int) -> str:
    """A process, with the beginning of its command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").split()
    except OSError:  # it is gone
        return f"process {pid}"
    command = " ".join(words)
    return f"process {pid} ({command[:60]}{' …' if len(command) > 60 else ''})"


def api(application: str, root_url: str, ports: Mapping[str, int], logs: Path) -> Service:
    """An ASGI application, as `app.api:app`, on the port `api`; it answers `/health`, and ETL_ROOT tells it the root.

    Raises ModuleNotFoundError when there is no such module.
    """
    return Service(
        "API",
        [
            *(sys.executable, "-m", "etl.serve.web", application),
            *("--host", os.environ.get(API_HOST) or HOST, "--port", str(ports["api"])),
        ],
        ports["api"],
        health_url=f"{api_url(ports)}/health",
        page=f"{api_url(ports)}/docs",
        environment={
            "ETL_ROOT": root_url,
            "PYTHONPATH": _path_with(application.split(".")[0]),
            "ETL_DASHBOARD_URL": os.environ.get("ETL_DASHBOARD_URL") or f"http://{HOST}:{ports['dashboard']}",
        },
        log_path=logs / "api.log",
    )


def api_url(ports: Mapping[str, int]) -> str:
    """Where the API answers; reports are served under it."""
    return f"http://{HOST}:{ports['api']}"


def dashboard(module: str, root_url: str, ports: Mapping[str, int], logs: Path) -> Service:
    """A Streamlit page or application, as `app.web`, on the port `dashboard`; ETL_ROOT tells it the root.

    Raises ModuleNotFoundError when there is no such module.
    """
    package, _, name = module.rpartition(".")
    page = f"http://{HOST}:{ports['dashboard']}"
    return Service(
        "dashboard",
        [
            *(sys.executable, "-m", "streamlit", "run", str(_folder_of(package) / f"{name}.py")),
            *("--server.address", HOST, "--server.port", str(ports["dashboard"]), "--server.headless", "true"),
            *("--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none"),
            *("--server.enableCORS", "true", "--server.enableXsrfProtection", "true"),  # whatever ~/.streamlit says
        ],
        ports["dashboard"],
        health_url=f"{page}/_stcore/health",
        page=page,
        environment={
            "ETL_ROOT": root_url,
            "ETL_API_URL": api_url(ports),
            "PYTHONPATH": _path_with(package),
        },
        log_path=logs / "dashboard.log",
    )


def _path_with(package: str) -> str:
    """PYTHONPATH of a child that imports a package: the project first, and last where the package is."""
    return os.pathsep.join(dict.fromkeys([*client.python_path().split(os.pathsep), str(_folder_of(package).parent)]))


def _folder_of(package: str) -> Path:
    """The folder of a package that this process can import. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"there is no package {package} on Python's path")
    return Path(spec.submodule_search_locations[0])


def database_url(home: Path) -> str:
    """Where Prefect's own URL leads, `sqlite+aiosqlite:///{home}/prefect.db`, also when there is a ? in the path."""
    return f"sqlite+aiosqlite:///file:{quote(str(home))}/prefect.db?uri=true"
