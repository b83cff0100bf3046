"""Which Python runs the command line: the one that has the packages; and how it ends."""

import atexit
import contextlib
import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

PROJECT = Path(__file__).resolve().parent.parent  # etl.storage cannot be imported without the packages
NEEDED = ("typer", "rich", "pydantic", "yaml", "cronsim", "polars", "deltalake", "papermill", "prefect")


def ensure_packages() -> None:
    """Go on in the project's own `.venv` when this interpreter lacks the packages: nobody needs to activate it.

    Ends with exit status 2 and what to do when they are not there either.
    """
    missing = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
    if missing is None:
        return
    python = PROJECT / ".venv" / "bin" / "python"
    if sys.executable == str(python) or not os.access(python, os.X_OK):
        print(f"{sys.executable} has no package {missing}: run `make setup`, which makes .venv", file=sys.stderr)
        sys.exit(2)
    os.execv(python, [str(python), *sys.argv])


def leave(status: int) -> NoReturn:
    """End this process with an exit status when all that waits for its end is done; the interpreter is not taken down.

    A thread of a library that wants the GIL meanwhile is ended by Python before 3.14 with pthread_exit, which frames of
    Rust (Polars, deltalake) do not let through: "FATAL: exception not rethrown", and what went well ends with SIGABRT.
    See https://github.com/python/cpython/issues/87135; multiprocessing ends its processes in the same way.
    """
    threads: Any = threading
    threads._shutdown()  # all threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(status)
