"""Child processes: none outlives its parent, and when to start again one that has ended."""

import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FORGET_S = 3600  # an older death does not count
SLOWEST_S = 60  # between two starts of what always ends
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec is no time for it


def die_with_parent() -> None:
    """To be run in a child before it starts: however its parent dies, the operating system ends it.

    It does so when the *thread* that started it ends, so children are started from the main thread.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command: list[str], env: Mapping[str, str], cwd: Path | None, log_path: Path) -> "subprocess.Popen[bytes]":
    """A child of the main thread, in a group of its own, as Ctrl-C is for its parent. `env`: beside this process's own
    variables; what it prints is added to its log."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as out:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def signal_group(process: "subprocess.Popen[bytes] | None", number: int) -> None:
    """To such a child, if there is one, and to its own children."""
    if process:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


class Deaths:
    """When to start again what has ended: at once, and the later the more often it ended within FORGET_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._at: collections.deque[float] = collections.deque()

    def add(self) -> int:
        """One more, now; how many count."""
        self._at.append(self._clock())
        while self._at[0] < self._clock() - FORGET_S:
            self._at.popleft()
        return len(self._at)

    @property
    def wait_s(self) -> float:
        """Until it may be started again: 0 after the first, then 1, 3, 7, ... seconds."""
        if not self._at:
            return 0.0
        return max(0.0, self._at[-1] + min(SLOWEST_S, 2.0 ** (len(self._at) - 1) - 1) - self._clock())
