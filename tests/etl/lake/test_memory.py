import subprocess
import sys

import pytest

from etl.lake import memory

ROUNDS = """
import resource
from contextlib import nullcontext
from etl.lake import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def taken_and_freed():
    before = faults()
    for _ in range(10):
        blocks = [b"x" * (20 << 20) for _ in range(4)]
        del blocks
    return faults() - before

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

usual, before = taken_and_freed(), resident_mb()
with memory.kept():
    taken_and_freed()
    kept = taken_and_freed()
print(usual, kept, resident_mb() - before)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="another C library")
def test_memory_is_taken_once_and_given_back():
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)
    usual, kept, more_mb = map(float, done.stdout.split())
    assert kept < usual / 10
    assert more_mb < 20
