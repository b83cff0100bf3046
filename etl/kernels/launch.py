"""Where kernels come from: each run gets a new process, and takes it down with everything it started.

Where a fork server is kept (client.py) the process is there already, with its imports; else it is spawned.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etl.kernels import client, in_kernel, watcher
from etl.storage import PROJECT

START_S = 120  # a kernel that has not answered by then never will, also on a busy machine
POLITE_S = 5  # for what the notebook registered with atexit, such as closing a cluster
STACKS_S = 1  # for the stacks of all threads to be written; it takes a few milliseconds
UNREAD = 50  # messages of outputs that may wait in this process's memory; then the kernel waits
# Not ipykernel's shutdown request: before any exit handler runs, that kills the children which one of them
# may want to close in order (a cluster's workers), waits for their zombies, and hangs once in fifteen (7.4).
EXIT = "get_ipython().kernel.io_loop.stop()"
# what ipykernel and its debugger say at every start, to people at a terminal
ADVICE = re.compile(
    r"NOTE: When using the `ipython kernel`|To exit, you will have to|\"quit\" from a client|To read more about this"
    r"|To connect another client|    --existing |\d+\.\d+s - |\[IPKernelApp\] WARNING \| Parent appears"
)


class Kernel:
    """A kernel process that leads a process group of its own, and our connection to it over unix sockets.

    Its parent is a black box (watcher.py), which ends it and all it started when this process dies.
    `start` returns at once, `ready` waits until it answers, `close` leaves no process, socket or file behind.
    """

    def __init__(
        self, manager: Any, folder: Path, lifeline: socket.socket, process: client.Forked | subprocess.Popen[bytes]
    ):
        self._manager, self._folder, self._lifeline, self._process = manager, folder, lifeline, process
        self._log_begins = 0  # bytes of the log that were written before the run
        manager.context.rcvhwm = UNREAD  # of every socket it makes from now on
        self.client = manager.client()

    @property
    def manager(self) -> Any:
        """The jupyter_client manager, for nbclient to ask whether the kernel lives."""
        return self._manager

    @property
    def exit_status(self) -> int | None:
        """None while it runs; as in subprocess: -9 when SIGKILL ended it."""
        return self._process.poll()

    @property
    def pid(self) -> int | None:
        """Of the kernel itself, also the id of its process group; None before it has one."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._folder / "pid").read_text())
        return None

    def log_tail(self, lines: int = 12) -> str:
        """The last lines the process wrote besides cell outputs: in the run, or why it did not start."""
        written = (self._folder / "log").read_bytes()[self._log_begins :].decode(errors="replace")
        return "\n".join([line for line in written.splitlines() if not ADVICE.match(line)][-lines:])

    async def ready(self) -> None:
        """Wait until the kernel answers. Raises RuntimeError when it dies first or takes two minutes."""
        self.client.start_channels()
        if isinstance(self._process, client.Forked):  # it has answered, but outputs come once we are subscribed to them
            while (await self.client.get_iopub_msg(timeout=START_S))["msg_type"] != "iopub_welcome":
                continue
        else:
            await self.client.wait_for_ready(timeout=START_S)
        self.client.allow_stdin = False
        self._log_begins = (self._folder / "log").stat().st_size

    def tell(self, cell: int) -> None:
        """The number of the cell that begins, for the samples."""
        with contextlib.suppress(OSError):
            self._lifeline.sendall(b"%d\n" % cell)

    def signal(self, number: int) -> None:
        """Send a signal to the kernel and everything it started."""
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    async def stacks(self) -> str:
        """Where every thread of the kernel is, as faulthandler writes it; "" when it does not say."""
        before, text = self.crash(), ""
        if (pid := self.pid) and self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, in_kernel.STACKS_SIGNAL)
            until = time.monotonic() + STACKS_S
            while time.monotonic() < until:
                await asyncio.sleep(0.05)
                if (last := self.crash()[len(before) :]) and last == text:
                    break
                text = last
        return text

    def crash(self) -> str:
        """What faulthandler wrote by itself when the kernel crashed."""
        with contextlib.suppress(OSError):
            return (self._folder / "stacks").read_text(errors="replace")
        return ""

    async def close(self, polite: bool) -> None:
        """End the kernel and everything it started; `polite` lets its own exit handlers run first."""
        try:
            if polite and self.exit_status is None:
                self.client.execute(EXIT, silent=True)
                self.client.stop_channels()  # nobody listens any more; it takes as long as the kernel's last words
                await self._gone_within(POLITE_S)
            self.signal(signal.SIGTERM)
            await self._gone_within(0.5)
        finally:
            with contextlib.suppress(OSError):
                self._lifeline.shutdown(socket.SHUT_WR)  # the black box kills what is left, and ends
            await self._gone_within(client.END_S)
            self.signal(signal.SIGKILL)
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._lifeline.close()
            if self.pid:  # the black box removes the file when nothing is left; it did not come to that
                end_all_of(self._folder)
            self.client.stop_channels()
            await self._manager.cleanup_resources()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _gone_within(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.exit_status is None and time.monotonic() < until:
            await asyncio.sleep(0.001)


def new_folder() -> Path:
    """Where the sockets, the log and the stacks of one kernel will be; whoever makes it removes it in the end."""
    # a unix socket's path must stay under 108 characters; a deep TMPDIR does not leave that
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"
    return Path(base, f"kernel-{uuid.uuid4().hex[:12]}")


async def start(
    name: str,
    announce: Callable[[Path], None],
    cwd: Path,
    env: dict[str, str],
    journal: Path | None = None,
    memory_mb: float | None = None,
    project: Path = PROJECT,
) -> Kernel:
    """Start a kernel without waiting for it. Raises NoSuchKernel, or OSError when its process cannot start.

    `python3` is always the interpreter that runs this, whatever a kernelspec of that name elsewhere says. `announce` is
    called with the kernel's folder before there is anything that may be left behind; with two, if a forked kernel turns
    out to be no help. The samples go to the file at `journal`; above `memory_mb` for the whole process tree the kernel
    is killed. `project`: the folder of its code, which `env` leads to.
    """
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME

    if name == NATIVE_KERNEL_NAME and (forked := client.take(env, project)):
        announce(forked.folder)
        if await forked.begin(env, str(cwd), journal, memory_mb):
            manager = _manager(name, forked.folder)
            manager.load_connection_file()
            from etl.kernels.provisioner import ForkedKernel

            manager.provisioner = ForkedKernel(kernel_id="", kernel_spec=manager.kernel_spec, parent=manager)
            manager.provisioner.process = forked
            return Kernel(manager, forked.folder, forked.lifeline, forked)
    folder = new_folder()
    folder.mkdir(mode=0o700)
    announce(folder)
    ours, lifeline = socket.socketpair()
    manager = _manager(name, folder)
    ours.sendall(client.run_line(journal, memory_mb))
    try:
        with lifeline, (folder / "log").open("wb") as log:
            await manager.start_kernel(
                cwd=str(cwd),
                env=env | {in_kernel.FOLDER: str(folder)},
                stdin=lifeline,
                stdout=log,
                stderr=log,
                extra_arguments=[in_kernel.NO_HISTORY],
            )
    except BaseException:
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Kernel(manager, folder, ours, manager.provisioner.process)


def _manager(name: str, folder: Path) -> Any:
    """What jupyter_client knows of the kernel in `folder`; it starts it under a black box."""
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    watched = [sys.executable, "-I", "-S", watcher.__file__, str(folder / "pid")]

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            command = super().format_kernel_cmd(extra_arguments)
            return watched + ["etl.kernels.in_kernel" if part == "ipykernel_launcher" else part for part in command]

    return Manager(
        kernel_name=name,
        kernel_spec_manager=KernelSpecManager(**({"kernel_dirs": []} if name == NATIVE_KERNEL_NAME else {})),
        transport="ipc",
        connection_file=str(folder / "kernel.json"),
    )


def end_all_of(folder: Path | str) -> None:
    """Kill every process that a kernel with this folder has left, and remove the folder, its sockets with it.

    The folder is in the environment of what was spawned, and mapped into what was forked and never spawned.
    """
    variable, mapped = f"{in_kernel.FOLDER}={folder}".encode(), f" {folder}/".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            spawned = variable in (path / "environ").read_bytes().split(b"\0")
            if spawned or mapped in (path / "maps").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
