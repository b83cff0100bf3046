"""The fork server: one process that has imported what notebooks import, and forks a kernel for each run.

It has one thread, imports and computes nothing, opens no table: so what is forked is sound. Modules that start threads
when they are imported (Polars does) and the project's own are left to each forked kernel, which imports them while it
waits. A kernel and its black box (watcher.py) are forked before they are asked for; whoever asks is handed the two
sockets that lead to them, and from then on they are no business of the server: it may end, and they go on.

    python -m etl.kernels.forkserver --ready N

A kernel whose own code has changed since it was imported is thrown away, and a new one forked. The server itself ends
with status 0 when what it has imported, or what it should import, has changed, so that a new one takes its place.
"""

import argparse
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl.kernels import client, in_kernel, launch, sources, watcher
from etl.kernels import imports as notebooks
from etl.storage import PROJECT

# Read by libraries when they are imported: no threads of BLAS or of Arrow's allocator before a fork, the backend of
# Matplotlib that a kernel sets. A kernel's own variables are those of its run.
FOR_PRELOAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
OF_A_KERNEL = ["ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "matplotlib_inline.backend_inline"]
CHECK_S = 2  # between two looks whether the code has changed
PAUSE_S = 0.3  # from a kernel's leaving to the fork of the next: the run that has just begun goes first
FREE_SHARE = 0.1  # of the machine's memory has to be free for a kernel to be forked ahead


@dataclass
class Waiting:
    folder: Path
    lifeline: socket.socket
    commands: socket.socket
    marks: dict[str, sources.Mark | None] | None = None  # of the own files it has imported, once it has

    def changed(self) -> bool:
        """Whether its code is not what it imported any more; False while it comes up, as it will look itself."""
        if self.marks is None:
            with contextlib.suppress(OSError, ValueError):
                self.marks = sources.noted(self.folder)
        return bool(self.marks and sources.changed(self.marks))

    def close(self) -> None:
        self.lifeline.close()
        self.commands.close()


class Server:
    """Hands out kernels; `ready` of them wait."""

    def __init__(
        self,
        listening: socket.socket,
        ready: int,
        modules: tuple[list[str], list[str]],
        late: list[str],
        imported: sources.Imported,
    ):
        """`modules`: those of the notebooks, as preload finds them; `late`: those that kernels import."""
        self.listening, self.ready, self.modules, self.late = listening, ready, modules, late
        self.variables, self.packages = client.read_at_start(dict(os.environ)), client.packages()
        self.imported = imported
        self.told: set[str] = set()
        with contextlib.suppress(OSError, ValueError):  # by the one before; the code of a run is the same under both
            self.told.update(
                path
                for path in json.loads((client.server_folder() / client.IMPORTED).read_text())
                if sources.mark(path)
            )
        self.waiting: list[Waiting] = []
        self.fork_at = 0.0  # not before this time
        self.stale = False

    def serve(self) -> Callable[[], None] | None:
        """Serve until the code changes, then return None. A forked process returns too: the function it is to call."""
        check_at = 0.0
        while not self.stale:
            now = time.monotonic()
            if now >= check_at:
                check_at = now + CHECK_S
                self.look()
                continue
            due = len(self.waiting) < self.ready
            if due and now >= self.fork_at:
                self.fork_at = now + PAUSE_S
                if _free_share() > FREE_SHARE and (role := self.fork()):
                    return role
                continue
            until = min(check_at, self.fork_at) if due else check_at
            readable = select.select(
                [self.listening, *(kernel.lifeline for kernel in self.waiting)], [], [], max(0, until - now)
            )[0]
            for kernel in list(self.waiting):
                if kernel.lifeline in readable:  # it ended
                    self.waiting.remove(kernel)
                    kernel.close()
                    self.fork_at = now + CHECK_S
            if self.listening in readable and (role := self.answer()):
                return role
        for kernel in self.waiting:
            kernel.close()
        return None

    def look(self) -> None:
        """Whether code has changed: of the server, or of the kernels that wait."""
        self.stale = client.packages() != self.packages or self.imported.changed() is not None
        if self.drop_changed() and notebooks.modules_of(PROJECT) != self.modules:
            self.stale = True
        self.tell()

    def drop_changed(self) -> bool:
        """Throw away the waiting kernels whose code has changed; whether there was one."""
        changed = [kernel for kernel in self.waiting if kernel.changed()]
        for kernel in changed:
            self.waiting.remove(kernel)
            kernel.close()
        return bool(changed)

    def tell(self) -> None:
        """Which own files kernels have imported, for whoever says what the code of a run is."""
        known = set(self.imported.marks).union(*(kernel.marks or {} for kernel in self.waiting))
        files = {path for path in known if path.endswith(".py")}
        if not files <= self.told:
            self.told |= files
            path = client.server_folder() / client.IMPORTED
            path.with_suffix(".part").write_text(json.dumps(sorted(self.told)))
            path.with_suffix(".part").rename(path)

    def answer(self) -> Callable[[], None] | None:
        """Hand a kernel to whoever asks, or say why not."""
        asking, _ = self.listening.accept()
        with asking:
            asking.settimeout(1)
            try:
                _, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                asked = json.loads(asking.makefile("rb").readline())
                if uid != os.getuid():
                    return None
                if refused := self.refusal(asked):
                    asking.sendall(json.dumps({"refused": refused}).encode())
                    return None
                self.drop_changed()
                if not self.waiting and (role := self.fork(asking)):
                    return role
                kernel = self.waiting.pop(0)
                self.fork_at = time.monotonic() + PAUSE_S
                with contextlib.closing(kernel):
                    fds = [kernel.lifeline.fileno(), kernel.commands.fileno()]
                    socket.send_fds(asking, [json.dumps({"folder": str(kernel.folder)}).encode()], fds)
            except (OSError, ValueError) as error:  # it is gone, or no friend
                print(f"no answer given: {error!r}", file=sys.stderr, flush=True)
        return None

    def refusal(self, asked: dict[str, Any]) -> str:
        """Why a kernel of ours would not be what a cold one is."""
        if asked["packages"] != self.packages or self.imported.changed():
            self.stale = True
            return "code has changed since the fork server started"
        differing = sorted(name for name, _ in asked["variables"].items() ^ self.variables.items())
        return f"variables differ from the fork server's: {', '.join(dict.fromkeys(differing))}" if differing else ""

    def fork(self, asking: socket.socket | None = None) -> Callable[[], None] | None:
        """Fork one more kernel: None. The forked process, with nothing of this one open, gets the function to call."""
        folder = launch.new_folder()
        lifeline, boxs_end = socket.socketpair()
        commands, kernels_end = socket.socketpair()
        if os.fork():
            boxs_end.close()
            kernels_end.close()
            self.waiting.append(Waiting(folder, lifeline, commands))
            return None
        for ours in (self.listening, lifeline, commands, asking, *self.waiting):
            if ours is not None:
                ours.close()
        return lambda: _box(folder, boxs_end, kernels_end, self.late, self.imported)


def _box(
    folder: Path, lifeline: socket.socket, commands: socket.socket, late: list[str], imported: sources.Imported
) -> None:
    """The black box's side of the fork; it forks the kernel, and ends with it."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    watcher.guard()
    folder.mkdir(mode=0o700)  # not before the fork: a server that is killed would leave it
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    mark = in_kernel.mark(folder)  # noqa: F841  # inherited by every process that is forked from here on
    info = {"transport": "ipc", "ip": f"{folder}/kernel", "key": uuid.uuid4().hex, "signature_scheme": "hmac-sha256"}
    ports = {f"{name}_port": i for i, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    (folder / "kernel.json").write_text(json.dumps(info | ports))
    last_words, said = os.pipe()
    kernel = os.fork()
    if kernel == 0:
        lifeline.close()
        os.close(last_words)
        watcher.become_kernel(str(folder / "pid"))
        in_kernel.serve(folder, commands, late, imported, said)
        return
    commands.close()
    os.close(said)
    status, begun = watcher.watch(kernel, str(folder / "pid"), lifeline.fileno(), last_words)
    if not begun:  # nobody else will
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        lifeline.sendall(f"{status}\n".encode())
    watcher.end_all(kernel)
    os._exit(0)


def preload(modules: list[str], notes: Path) -> list[str]:
    """Import them; those that start threads, which are not imported.

    Which do so is seen in a forked process each, and kept at `notes` until the packages change.
    """
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(notes.read_text())
    if known.get("packages") != client.packages():
        known = {"packages": client.packages()}
    for name in modules:
        if name not in known:
            known[name] = _tried(name)
        if known[name] == "fine":
            importlib.import_module(name)
    notes.write_text(json.dumps(known))
    return [name for name in modules if known[name] == "threads"]


def _tried(name: str) -> str:
    """What importing it would do, seen in a forked process: "fine", "threads" or "failed"."""
    if name in sys.modules:
        return "fine"
    pid = os.fork()
    if pid == 0:
        status = 2
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
            status = int(_threads() > 1)
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "fine", 1: "threads"}.get(status, "failed")


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _free_share() -> float:
    memory = watcher.fields("/proc/meminfo")
    return memory["MemAvailable"] / memory["MemTotal"]


def main() -> Callable[[], None] | None:
    """Preload, then serve. As `serve`: None, or in a forked process the function it is to call."""
    began = time.time()
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--ready", type=int, default=1, help="kernels that wait")
    ready = arguments.parse_args().ready
    with contextlib.suppress(FileExistsError):
        client.server_folder().mkdir(mode=0o700)
    folder = client.checked_server_folder()
    lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another one serves: this takes its place when it ends
    before = dict(os.environ)
    os.environ.update({name: value for name, value in FOR_PRELOAD.items() if name not in os.environ})
    own, others = modules = notebooks.modules_of(PROJECT)
    late = preload(OF_A_KERNEL + others, folder / client.THREADS) + own
    imported = sources.Imported()
    imported.note(began)
    if (threads := _threads()) > 1:
        sys.exit(f"{threads} threads after the preload: nothing can be forked from here")
    os.environ.clear()
    os.environ.update(before)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the black boxes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # the collector would write to every page that is shared
    path = folder / "socket"
    path.unlink(missing_ok=True)

    def end(*_: object) -> None:
        path.unlink(missing_ok=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        server = Server(listening, ready, modules, late, imported)
        role = server.serve()
    if role:
        os.close(lock)
    else:
        path.unlink(missing_ok=True)
    return role


if __name__ == "__main__":
    if Path(sys.path[0] or ".").resolve() == Path.cwd():  # as a kernel has it; PYTHONPATH names the project
        del sys.path[0]
    if todo := main():
        todo()
