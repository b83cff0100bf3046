"""Where kernels come from: each run gets a new process, and takes it down with everything it started."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

START_S = 120  # a kernel that has not answered by then never will, also on a busy machine
POLITE_S = 5  # for what the notebook registered with atexit, such as closing a cluster
# Not ipykernel's shutdown request: before any exit handler runs, that kills the children which one of them
# may want to close in order (a cluster's workers), waits for their zombies, and hangs once in fifteen (7.4).
EXIT = "get_ipython().kernel.io_loop.stop()"


class Kernel:
    """A kernel process that leads a process group of its own, and our connection to it over unix sockets.

    `start` returns at once, `ready` waits until it answers, `close` leaves no process, socket or file behind.
    """

    def __init__(self, manager: Any, folder: Path):
        self._manager, self._folder = manager, folder
        self._process = manager.provisioner.process
        self.pid: int = self._process.pid  # also the id of its process group
        self.client = manager.client()

    @property
    def manager(self) -> Any:
        """The jupyter_client manager, for nbclient to ask whether the kernel lives."""
        return self._manager

    @property
    def exit_status(self) -> int | None:
        """None while it runs; as in subprocess: -9 when SIGKILL ended it."""
        return self._process.poll()

    def log_tail(self, lines: int = 12) -> str:
        """The last lines the process wrote besides cell outputs, such as why it did not start."""
        return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-lines:])

    async def ready(self) -> None:
        """Wait until the kernel answers. Raises RuntimeError when it dies first or takes two minutes."""
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=START_S)
        self.client.allow_stdin = False

    def signal(self, number: int) -> None:
        """Send a signal to the kernel and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def close(self, polite: bool) -> None:
        """End the kernel and its whole process group; `polite` lets its own exit handlers run first."""
        try:
            if polite and self.exit_status is None:
                self.client.execute(EXIT, silent=True)
                await self._gone_within(POLITE_S)
            self.signal(signal.SIGTERM)
            await self._gone_within(0.5)
        finally:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self.client.stop_channels()
            await self._manager.cleanup_resources()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _gone_within(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.exit_status is None and time.monotonic() < until:
            await asyncio.sleep(0.01)


async def start(name: str, cwd: Path, env: dict[str, str]) -> Kernel:
    """Start a kernel without waiting for it. Raises NoSuchKernel, or OSError when its process cannot start.

    `python3` is always the interpreter that runs this, whatever a kernelspec of that name elsewhere says.
    """
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    # a unix socket's path must stay under 108 characters; a deep TMPDIR does not leave that
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="kernel-", dir=base))
    try:
        specs = KernelSpecManager(**({"kernel_dirs": []} if name == NATIVE_KERNEL_NAME else {}))
        manager = AsyncKernelManager(
            kernel_name=name,
            kernel_spec_manager=specs,
            transport="ipc",
            connection_file=str(folder / "kernel.json"),
        )
        with (folder / "log").open("wb") as log:
            await manager.start_kernel(
                cwd=str(cwd),
                env=env,
                stdout=log,
                stderr=log,
                extra_arguments=["--HistoryManager.hist_file=:memory:"],
            )
        return Kernel(manager, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
