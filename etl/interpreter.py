"""Which Python runs the command line: the one that has the packages."""

import importlib.util
import os
import sys
from pathlib import Path

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
