"""The benchmarks of the data run, in the smallest numbers. Those of runs and of the service start servers and kernels
by the dozen, as other tests do, and that of ingest makes a long stream: they are for `make bench` when all is quiet."""

import json
import shutil
import subprocess
import sys

import pytest
from support import environment

from etl.storage import PROJECT


@pytest.mark.parametrize(
    ("name", "numbers", "found"),
    [
        ("compaction", "--target-mb 1 --total-mb 2", lambda result: set(result["tables"]) == {"grows", "newest"}),
        (
            "upsert",
            "--keys 50 --updates 2000 --files 10 --batch 5 --rounds 1",
            lambda result: len(result["after"]) == 2,
        ),
        ("ledger", "--files 3000 --batches 20 --waiting 50 --rounds 2", lambda result: len(result["looks"]) == 2),
        ("queries", "--scale 0.01 --engine polars --engine duckdb --rounds 1 --question 1 --question 6", bool),
    ],
)
def test_it_runs(project, name, numbers, found):
    shutil.copytree(PROJECT / "benchmarks", project / "benchmarks")
    command = [sys.executable, f"benchmarks/{name}.py", *numbers.split()]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((project / f"outputs/benchmarks/{name}.json").read_text())
    assert found(result), result
    assert "load" in done.stdout
