"""Kernels that are there before they are asked for: asking the fork server (forkserver.py), and keeping one.

Nothing here fails a run: whoever gets no kernel starts a cold one.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from etl.kernels import in_kernel, sources
from etl.kernels.children import Deaths, signal_group, start
from etl.storage import PROJECT

log = logging.getLogger(__name__)
ANSWER_S = 2  # a fork server answers in a millisecond; one that takes longer is no help
HUNG = 6  # times, one after the other, at which one has not answered: it is started again
THREADS = "threads"  # in `server_folder`: which modules start threads, as JSON
IMPORTED = "imported"  # in `server_folder`: the own files that kernels have imported, as JSON
FOLLOW_S = 60  # a kernel that was forked but now may still be coming up
END_S = 12  # the black box gives what has to be killed ten
# A variable that Python or a library reads when it starts or is imported: what was preloaded has read the server's.
READ_AT_START = (
    *("PYTHON", "LD_", "LC_", "LANG", "HOME", "IPYTHON", "JUPYTER_CONFIG_", "MALLOC_", "JE_", "ARROW_", "POLARS_"),
    *("OMP_", "GOMP_", "OPENBLAS_", "MKL_", "NUMEXPR_", "RAYON_", "TOKIO_", "MPL", "MATPLOTLIB", "DASK_", "BOKEH_"),
    *("NUMBA_", "XGBOOST_", "GLIBC_", "SSL_"),
)


class NotOurFolder(RuntimeError):
    """The folder for the socket is not ours alone."""


def server_folder(project: Path = PROJECT) -> Path:
    """The folder of this user's fork server for a project's folder; ETL_KERNELS names that of this process's own."""
    whose = hashlib.sha256(f"{project} {sys.prefix}".encode()).hexdigest()[:12]
    if given := os.environ.get("ETL_KERNELS"):
        return Path(given if project == PROJECT else f"{given}-{whose}")
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"  # of a socket: under 108 characters
    return Path(f"{base}/etl-notebooks-{os.getuid()}-{whose}")


def checked_server_folder(project: Path = PROJECT) -> Path:
    """`server_folder`, if nobody else may enter it. Raises NotOurFolder, FileNotFoundError before the first server."""
    folder = server_folder(project)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise NotOurFolder(f"{folder} is not a folder of this user alone")
    return folder


def packages(project: Path = PROJECT) -> str:
    """Changes when the lock's content or the installed packages do; the same in two releases with one lock."""
    lock = str(project / "requirements.lock")
    return repr([_sha256(lock, sources.mark(lock)), sources.mark(sysconfig.get_path("purelib"))])


@functools.lru_cache(8)
def _sha256(path: str, mark: sources.Mark) -> str | None:
    """Of a file's content; None without one. `mark`: by which the cache knows it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if mark else None


def read_at_start(env: dict[str, str]) -> dict[str, str]:
    """Those of the variables that have to be the fork server's own."""
    return {name: value for name, value in env.items() if name.startswith(READ_AT_START)}


class Forked:
    """A forked kernel that is ours, with what of subprocess.Popen its users need.

    `lifeline` leads to its black box and `commands` to the kernel itself; when this process ends, so do both.
    """

    stdin = stdout = stderr = None

    def __init__(self, folder: Path, lifeline: socket.socket, commands: socket.socket):
        self.folder, self.lifeline = folder, lifeline
        self.returncode: int | None = None
        self._commands, self._said = commands, b""

    @property
    def pid(self) -> int | None:
        """Of the kernel, also the id of its process group; None when it is gone."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return None

    async def begin(self, env: dict[str, str], cwd: str, journal: Path | None, memory_mb: float | None) -> bool:
        """Have it serve a run; whether it is ready for the first cell. When it is not, nothing of it is left."""
        loop = asyncio.get_running_loop()
        self._commands.setblocking(False)
        try:
            self.lifeline.sendall(run_line(journal, memory_mb))
            await loop.sock_sendall(self._commands, json.dumps({"env": env, "cwd": cwd}).encode() + b"\n")
            said = await asyncio.wait_for(loop.sock_recv(self._commands, 1), FOLLOW_S)
            if said == in_kernel.BEGINS:
                return True
            if said == in_kernel.STALE:
                log.info("a cold kernel: code has changed since the forked one imported it")
            else:
                _warn_once("kernels start cold: a forked kernel ended before its run began")
        except (OSError, TimeoutError) as error:
            _warn_once(f"kernels start cold: a forked kernel did not begin: {error!r}")
        except BaseException:
            self.close()
            raise
        finally:
            self._commands.close()
        self.close()
        return False

    def poll(self) -> int | None:
        """None while it runs; then its status, as in subprocess."""
        while self.returncode is None:
            try:
                said = self.lifeline.recv(64, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # reset: as an end without a word
                said = b""
            self._said += said
            if not said or self._said.endswith(b"\n"):
                # without a word: the black box was killed, and the kernel with it
                self.returncode = int(self._said) if self._said.endswith(b"\n") else -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + timeout if timeout is not None else math.inf
        while (status := self.poll()) is None:
            left_s = until - time.monotonic()
            if timeout is not None and left_s <= 0:
                raise subprocess.TimeoutExpired("kernel", timeout)
            select.select([self.lifeline], [], [], left_s if timeout is not None else None)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None and (pid := self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it and everything it started, and remove its folder."""
        with contextlib.suppress(OSError):
            self.lifeline.shutdown(socket.SHUT_WR)  # its black box sees the end, and tells the status
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(END_S)
        self.lifeline.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_line(journal: Path | None, memory_mb: float | None) -> bytes:
    """What a black box is told first; see watcher.py."""
    run = {"runner": os.getpid(), "journal": journal and str(journal), "memory_mb": memory_mb}
    return json.dumps(run).encode() + b"\n"


def take(env: dict[str, str], project: Path = PROJECT) -> Forked | None:
    """A kernel for a run of a project's folder with these variables; None without a fork server that can help."""
    asked = {"packages": packages(project), "variables": read_at_start(env)}
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(ANSWER_S)
            server.connect(str(checked_server_folder(project) / "socket"))
            _, uid, _ = struct.unpack("3i", server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.getuid():
                raise NotOurFolder(f"the fork server belongs to user {uid}")
            server.sendall(json.dumps(asked).encode() + b"\n")
            answer, fds, _, _ = socket.recv_fds(server, 65536, 2)
        _silent.pop(project, None)
    except (FileNotFoundError, ConnectionRefusedError):  # nobody keeps one
        return None
    except (OSError, NotOurFolder) as error:
        if isinstance(error, TimeoutError):
            _silent[project] = _silent.get(project, 0) + 1
        _warn_once(f"kernels start cold: {error}")
        return None
    if len(fds) != 2:
        log.info("a cold kernel: %s", json.loads(answer)["refused"] if answer else "the fork server ended")
        return None
    lifeline, commands = (socket.socket(fileno=fd) for fd in fds)
    return Forked(Path(json.loads(answer)["folder"]), lifeline, commands)


_silent: dict[Path, int] = {}  # a project's folder -> how often its fork server has not answered this process, in a row


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


class Keeper:
    """Keeps a fork server of a project's folder, with `ready` waiting kernels, for as long as this process lives.

    One that dies is started again, at once or, when it dies again and again, later; each such series is one warning.
    """

    name = "fork server"

    def __init__(self, ready: int, log_path: Path, project: Path = PROJECT):
        self.ready, self.log_path, self.project = ready, log_path, project
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths = Deaths()
        self._ended: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, in a group of its own; it answers a few seconds later."""
        command = [sys.executable, "-m", "etl.kernels.forkserver", "--ready", str(self.ready)]
        env = variables(self.project) | {"ETL_KERNELS": str(server_folder(self.project))}
        self.process = start(command, env, self.project, self.log_path)

    def ensure(self) -> None:
        """Start it again when it has ended, or hangs. Never raises."""
        if self.process and _silent.get(self.project, 0) >= HUNG:
            log.warning("the fork server did not answer %s times", _silent.pop(self.project))
            self.signal(signal.SIGKILL)
            self.process.wait()
        if self.process is None or self.process.poll() is None:
            return
        if self.process is not self._ended:
            self._ended = self.process
            # 0: it gave way to one with newer code
            if self.process.returncode != 0 and self.deaths.add() == 1:
                log.warning("the fork server ended with status %s, see %s", self.process.returncode, self.log_path)
        if self.deaths.wait_s == 0:
            try:
                self.start()
            except OSError as error:
                self.deaths.add()
                log.info("the fork server could not be started: %s", error)

    def signal(self, number: int) -> None:
        """To the server alone: kernels that serve a run are not in its group."""
        signal_group(self.process, number)

    def end(self) -> None:
        """End the server and the kernels that wait; those that serve a run go on."""
        self.signal(signal.SIGTERM)
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def take_over(self, other: "Keeper") -> None:
        """End another one's server for good, and know from it what it has found out about packages."""
        mine, its = server_folder(self.project), server_folder(other.project)
        with contextlib.suppress(OSError):
            mine.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(its / THREADS, mine / THREADS)
        other.end()
        shutil.rmtree(its, ignore_errors=True)


def variables(project: Path) -> dict[str, str]:
    """Those of a kernel, and of a fork server, that say where its code is. A release of the project is one itself."""
    own = {} if project == PROJECT else {"ETL_PROJECT": str(project)}
    return own | {"PYTHONPATH": python_path(project=project)}


def python_path(env: Mapping[str, str] = os.environ, project: Path = PROJECT) -> str:
    """PYTHONPATH of every kernel: the folder of its code first, then what is in `env`, but no other code of ours."""
    given = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != PROJECT]
    return os.pathsep.join(dict.fromkeys([str(project), *given]))
