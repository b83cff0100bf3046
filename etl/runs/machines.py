"""Machines for runs elsewhere: a host that is reached by SSH, or one that Coiled provisions.

Each is begun for a run and given back after it. What they run is `python -m etl.runs.elsewhere ROOT RUN_ID`, with the
values of secrets on its standard input. Coiled is imported only when one of its machines is asked for.
"""

import contextlib
import hashlib
import http.client
import inspect
import json
import logging
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Protocol

from etl import secrets
from etl.kernels.children import die_with_parent
from etl.params.stages import Stage, seconds
from etl.params.yaml import nearest
from etl.runs import live
from etl.runs.endings import one_line
from etl.runs.record import RunRequest
from etl.storage import LocalRoot, Root, Unreachable

log = logging.getLogger(__name__)
BOOT_S = 600.0  # until a machine has begun its run
CONNECT_S = 10  # with a host, and with Coiled's service
OURS = ("silence", "boot", "dollars_an_hour", "secrets")
OF_SSH = ("ssh", "project", "python", "options")
TAKEN = ("name", "local", "n_workers", "threads_per_worker", "shutdown_on_close")  # of coiled.function, by us


@dataclass(frozen=True)
class Block:
    """The `machine` block of an env file. `arguments` are those of whose machine it is.

    `secrets` are the names of those that the machine needs besides those of the stage.
    """

    stage: str
    arguments: dict[str, Any]
    silence_s: float = live.SILENCE_S
    boot_s: float = BOOT_S
    dollars_an_hour: float | None = None
    secrets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the stage and all that was asked for: what is asked otherwise is another machine."""
        asked = json.dumps(self.arguments, sort_keys=True, default=str)
        return f"etl-{self.stage}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def read(stage: str, machine: dict[str, Any]) -> Block:
    """Raises ValueError: a sentence."""
    arguments = {name: value for name, value in machine.items() if name not in OURS}
    durations = {}
    for name in {"silence", "boot"} & machine.keys():
        try:
            durations[f"{name}_s"] = seconds(machine[name])
        except ValueError:
            raise ValueError(f'machine: {name}: expected a duration such as "60 seconds"') from None
    dollars, names = machine.get("dollars_an_hour"), machine.get("secrets", [])
    if dollars is not None and (type(dollars) not in (int, float) or dollars < 0):
        raise ValueError("machine: dollars_an_hour: expected a number from 0")
    if not isinstance(names, list) or not all(isinstance(name, str) and secrets.NAME.fullmatch(name) for name in names):
        raise ValueError("machine: secrets: expected the names of secrets, such as [AWS_SECRET_ACCESS_KEY]")
    if {*OF_SSH} & arguments.keys():
        _of_ssh(arguments)
    return Block(stage, arguments, dollars_an_hour=dollars, secrets=tuple(names), **durations)


def _of_ssh(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in OF_SSH:
            raise ValueError(f"machine: unknown key {name!r}{nearest(name, [*OF_SSH, *OURS])}")
        is_right = isinstance(value, list) if name == "options" else isinstance(value, str) and value
        if not is_right or (name == "ssh" and value.startswith("-")):
            raise ValueError(f"machine: {name}: expected {'a list' if name == 'options' else 'text'}, got {value!r}")
    if "ssh" not in arguments:
        raise ValueError("machine: ssh is missing: the host that the rest is about")
    if "project" not in arguments:
        raise ValueError("machine: project is missing: the folder of this project on that host")


def problems(block: Block, root: Root) -> list[str]:
    """What keeps a machine from being had or of use, as far as can be known without one: a sentence each."""
    missing = []
    for name in block.secrets:
        try:
            secrets.read(name)
        except (LookupError, ValueError, OSError) as error:
            missing.append(str(error))
    if "ssh" in block.arguments:
        return missing
    if isinstance(root, LocalRoot):
        return [f"the root {root.url} is on this machine, and the run on another; use an s3:// root"]
    return missing or _of_coiled(block.arguments)


def _of_coiled(arguments: dict[str, Any]) -> list[str]:
    with contextlib.suppress(ImportError):
        import coiled

        known = [name for name in inspect.signature(coiled.function).parameters if name not in TAKEN]
        for name in arguments:
            if name not in known:
                return [f"machine: unknown key {name!r}{nearest(name, [*known, *OURS])}"]
    return coiled_problems()


def coiled_problems() -> list[str]:
    """Why Coiled's service cannot be asked for anything: a sentence, or none."""
    try:
        import coiled  # noqa: F401
        import dask.config
    except ImportError:
        return ["the package coiled is not installed"]
    server, token = dask.config.get("coiled.server"), dask.config.get("coiled.token")
    if not token:
        return ["Coiled's token is not set: run `coiled login`, or set DASK_COILED__TOKEN"]
    if not str(token).isprintable():  # what a header does not take is told with its value
        return ["Coiled's token holds a line break or another control character"]
    try:
        asked = urllib.request.Request(f"{server}/api/v2/user/me", headers={"Authorization": f"ApiToken {token}"})
        urllib.request.urlopen(asked, timeout=CONNECT_S).close()
    except urllib.error.HTTPError as error:
        refused = "does not take the token" if error.code in (401, 403) else f"answered {error.code}"
        return [f"Coiled's service at {server} {refused}"]
    except (OSError, ValueError, http.client.HTTPException) as error:
        return [f"Coiled's service at {server} cannot be reached: {one_line(getattr(error, 'reason', error))}"]
    return []


class Machine(Protocol):
    """One for one run. `facts`: what the record says of it."""

    name: str
    facts: dict[str, Any]

    def begin(self) -> None:
        """Have it run the request; returns when it has, or when it is known to be on its way. Raises why it cannot."""

    def release(self, is_sound: bool) -> None:
        """It is not needed any more; one that is not sound has to end whatever it does. Also while `begin` waits."""


def of(block: Block, request: RunRequest) -> Machine:
    """The machine for a request, not begun yet."""
    handed = [*request.secrets, *block.secrets]
    variables = {name: secrets.read(name) for name in handed} | request.variables
    return Ssh(block, request, variables) if "ssh" in block.arguments else Coiled(block, request, variables)


class Ssh:
    """A host that has the project and its packages already."""

    def __init__(self, block: Block, request: RunRequest, variables: dict[str, str]):
        asked = block.arguments
        self.name, self.request, self._variables = block.name, request, variables
        self.facts = {"name": self.name, "type": "ssh", "host": asked["ssh"], "spot": False}
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", *map(str, asked.get("options", []))]
        self._ssh = ["ssh", *options, asked["ssh"]]
        words = [asked.get("python", ".venv/bin/python"), "-m", "etl.runs.elsewhere", request.root, request.run_id]
        self._command = f"cd {shlex.quote(asked['project'])} && exec {shlex.join(words)}"
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                [*self._ssh, self._command],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for home
            )
            self._process.communicate((json.dumps(self._variables) + "\n").encode())
            if self._process.returncode > 0:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines() or [
                    f"status {self._process.returncode}"
                ]
                raise OSError(lines[-1])

    def release(self, is_sound: bool) -> None:
        if not is_sound and (who := live.claimed(Root.at(self.request.root), self.request.run_id)):
            kill = [*self._ssh, f"kill -KILL {int(who['pid'])}"]
            done = subprocess.run(kill, capture_output=True, timeout=2 * CONNECT_S, stdin=subprocess.DEVNULL)
            if done.returncode and b"No such process" not in done.stderr:
                log.warning("%s may still run: %s", self.request.run_id, done.stderr.decode(errors="replace").strip())
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CONNECT_S if is_sound else 0)
            self._process.terminate()


def begin_there(root: str, run_id: str, variables: dict[str, str]) -> int:
    """On a machine of Coiled's: the run, in a process of its own. Its exit status."""
    command = [sys.executable, "-m", "etl.runs.elsewhere", root, run_id]
    told = (json.dumps(variables) + "\n").encode()
    return subprocess.run(command, input=told, preexec_fn=die_with_parent).returncode


class Coiled:
    """A machine of coiled.function with these arguments: one VM, found by its name while `keepalive` lasts."""

    _in_use: set[str] = set()  # names, by this process: two runs at once have a machine each
    _lock = threading.Lock()

    def __init__(self, block: Block, request: RunRequest, variables: dict[str, str]):
        self.request, self._variables = request, variables
        with self._lock:
            numbered = (f"{block.name}-{number}" if number > 1 else block.name for number in range(1, 1000))
            self.name = next(name for name in numbered if name not in self._in_use)
            self._in_use.add(self.name)
        self._arguments = dict(block.arguments)
        self._keepalive = self._arguments.get("keepalive")
        self.facts = {
            "name": self.name,
            "type": self._arguments.get("vm_type"),
            "region": self._arguments.get("region"),
            "spot": False,  # the first VM of a function is on-demand, whatever is asked
        }
        self._function: Any = None
        self._is_released = False

    def begin(self) -> None:
        extra = dict(self._arguments.pop("extra_kwargs", None) or {})
        # Dask runs what was lost a second time unless it may fail never; the configuration has the token in it
        extra["environ"] = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"} | dict(extra.get("environ") or {})
        extra = {"send_dask_config": False} | extra
        asked_for = {"name": self.name, "n_workers": 1, "extra_kwargs": extra} | self._arguments
        try:
            function = self._booted(asked_for)
        except Exception as error:
            if type(error).__name__ != "ClientConnectionError":  # aiohttp's, by which Coiled's client speaks
                raise
            # another run of this process has just closed Coiled's client, and with it the connections of all; what
            # was asked for by then is found by its name
            function = self._booted(asked_for)
        with self._lock:
            self._function = function
            is_late = self._is_released
        if is_late:
            function.cluster.shutdown()
            return
        asked = (self.request.root, self.request.run_id, self._variables)
        status = function.submit(*asked, pure=False, retries=0).result()
        if status not in (0, 3):  # 3: another process has it
            raise OSError(f"the process on the machine ended with status {status}")

    def _booted(self, asked_for: dict[str, Any]) -> Any:
        import coiled

        function = coiled.function(**asked_for)(begin_there)
        _ = function.cluster  # boots it
        return function

    def release(self, is_sound: bool) -> None:
        with self._lock:
            self._is_released, function = True, self._function
        try:
            if function is None:
                import coiled

                with contextlib.suppress(coiled.errors.DoesNotExist):
                    coiled.delete_cluster(self.name)
                return
            cluster = function.cluster
            if is_sound and self._keepalive:
                cluster.shutdown_on_close = False  # it ends itself, that long after its last client
            function.client.close()
            cluster.close() if is_sound and self._keepalive else cluster.shutdown()
        finally:
            with self._lock:
                self._in_use.discard(self.name)


def stage_problems(stage: Stage, root: str) -> list[str]:
    """What is wrong with a stage's machine and the way to the root, before anything is asked for: a sentence each."""
    if stage.machine is None:
        return []
    try:
        block, there = read(stage.name, stage.machine), Root.at(root)
        return dask_problems(stage) or problems(block, there) or root_problems(there)
    except ValueError as error:
        return [str(error)]


def dask_problems(stage: Stage) -> list[str]:
    """Why a stage's machine would not come to its cluster: a sentence, or none."""
    if stage.machine is not None and "dask" in stage.supplied and "n_workers" in (stage.dask or {}):
        return ["dask: n_workers are processes of this machine, and the run is on another; use an address, or null"]
    return []


def root_problems(root: Root) -> list[str]:
    """Why the way to a root is none: a sentence, or none."""
    try:
        if not root.names("live") and not root.has_bucket():
            return [f"the root {root.url} cannot be read: there is no such bucket"]
    except Unreachable as error:
        return [f"the root {error}"]
    except Exception as error:
        return [f"the root {root.url} cannot be read: {re.sub(r'[.]$', '', one_line(error))}"]
    return []
