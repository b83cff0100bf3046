"""The command line of a project's folder, started where what it imports of others is imported already.

A line of JSON on stdin is a command: `folder`, `arguments`, `environment`, the files `out` and `err`. Each is a forked
process that runs the folder's orchestrate.py as Python would, with the project's modules from that folder; the line
that answers is its exit status.
"""

import importlib
import json
import os
import runpy
import sys

# None of them starts a thread, which a forked process would not have: so not Polars, nor deltalake. Nor imports the
# project, which is the folder's: so not Papermill, whose engine it is, but what Papermill imports.
OTHERS = [
    *("typer", "typer.rich_utils", "typer.testing", "rich.console", "rich.table", "rich.progress", "rich.markdown"),
    *("pydantic", "pydantic_settings", "yaml", "cronsim", "nbformat", "nbformat.v4", "jsonschema", "jupyter_client"),
    *("nbclient", "nbconvert", "nh3", "boto3", "requests", "tqdm.auto", "tenacity", "aiohttp"),
    *("numpy", "pyarrow.fs", "pyarrow.parquet"),
]


def become(folder: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Be the command. What it ends with ends this process."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    mine = os.path.dirname(os.path.abspath(__file__))
    paths = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*dict.fromkeys(paths), *(path for path in sys.path if path not in (mine, *paths))]
    sys.argv = ["orchestrate.py", *arguments]
    runpy.run_path("orchestrate.py", run_name="__main__")


def main() -> None:
    before = dict(os.environ)
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    for name in OTHERS:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(before)
    if (threads := len(os.listdir("/proc/self/task"))) > 1 or "etl" in sys.modules:
        sys.exit(f"{threads} threads, or the project is imported: nothing can be forked from here")
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
