"""The benchmarks run, in the smallest numbers: what they find is for `make bench` on a quiet machine."""

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
        ("notebook_overhead", "1 0", lambda result: len(result["cpu_s"]) == 1 and result["times_faster"] > 1),
        ("endurance", "6 1", lambda result: (result["zombies"], result["left"], result["failed"]) == ([], [], 0)),
        ("throughput", "1 1", lambda result: min(result["medians"].values()) > 0),
        ("scheduled_run", "1 11", lambda result: result["times_less"] > 1),
        ("ingest", "--rounds 0 --versions 5", lambda result: set(result["ticks"]["seconds"]) == {"old", "fresh"}),
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
