"""A child process that does not outlive its parent."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec is no time for it


def die_with_parent() -> None:
    """To be run in a child before it starts: however its parent dies, the operating system ends it.

    It does so when the *thread* that started it ends, so children are started from the main thread.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
