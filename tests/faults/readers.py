"""Readers that are not ours: the newest deltalake, DuckDB's own reader of Delta tables, plain Polars.

They read in a process of their own, with packages that the project does not have: fetched once a campaign, in full
numbers, and left out where they cannot be had.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NEWEST = "1.6.6"  # of deltalake
PACKAGES = "ETL_FAULTS_READERS"  # the variable with the folder that has them


def fetch() -> str:
    """Have the packages, for this process and those it starts; what could not be had, empty for nothing."""
    import duckdb

    folder = tempfile.mkdtemp(prefix="readers-")
    atexit.register(subprocess.run, ["rm", "-rf", folder])
    missing = []
    for package in (f"deltalake=={NEWEST}", f"duckdb-extension-delta=={duckdb.__version__}"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, package]
        if subprocess.run(command, capture_output=True).returncode:
            missing.append(package)
    os.environ[PACKAGES] = folder
    return ", ".join(missing)


def read(url: str, version: int, asked: str, options: dict[str, str]) -> dict[str, list[str]]:
    """What each reader says to `asked`, the columns of a query that each understands; by its name and version.

    `options`: of the object store. Without the packages, Polars and the project's own deltalake alone. DuckDB reads no
    object store here.
    """
    reader = _process()
    reader.stdin.write(json.dumps([url, version, asked, options]) + "\n")
    reader.stdin.flush()
    return json.loads(reader.stdout.readline() or '{"nobody": ["the process ended"]}')


@functools.cache
def _process() -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.environ.get(PACKAGES, "")}
    reader = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(reader.kill)
    return reader


def _readers(url: str, version: int, asked: str, options: dict[str, str]):
    """Name -> what it reads, one after the other."""
    import deltalake
    import polars as pl
    import pyarrow as pa

    handle = deltalake.DeltaTable(url, version=version, storage_options=options)
    rows = deltalake.QueryBuilder().register("t", handle).execute(f"select {asked} from t").read_all()
    yield f"deltalake {deltalake.__version__}", [*pa.table(rows).to_pylist()[0].values()]
    if not re.fullmatch(r"[\w./:-]+", url, re.A):  # Polars takes the path's percent encoding for its name
        return
    frame = pl.scan_delta(url, version=version, storage_options=options)
    yield f"Polars {pl.__version__}", [*pl.SQLContext(t=frame).execute(f"select {asked} from t").collect().row(0)]
    if not options and (database := _duckdb()):
        found = database.sql(f"select {asked} from delta_scan('{url}', version={version})").fetchone()
        yield "DuckDB's reader", [*found]


@functools.cache
def _duckdb():
    """With its reader of Delta tables; None where that could not be had."""
    import duckdb

    folder = Path(os.environ.get(PACKAGES) or "/nowhere")
    for extension in folder.glob("duckdb_extension_delta/extensions/*/*.duckdb_extension"):
        database = duckdb.connect()
        database.sql(f"load '{extension}'")
        return database
    return None


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            found = {name: [*map(str, row)] for name, row in _readers(*json.loads(line))}
        except Exception as error:
            found = {"one of the readers": [f"{type(error).__name__}: {error}"]}
        print(json.dumps(found), flush=True)
