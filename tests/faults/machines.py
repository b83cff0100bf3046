"""Machines that are lost, hang, are refused or asked for otherwise: Coiled's own client, a control plane on loopback.

The function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import json
import os
import subprocess
import sys
import tempfile

from support import s3, s3_variables

from etl.storage import PROJECT

EXPECTED = {  # the state, the beginning of the reason, attempts
    "ok": ("ok", "", 1),
    "again": ("ok", "", 1),
    "changed": ("ok", "", 1),
    "lost": ("killed", "the machine was lost in 'work'", 1),
    "worker": ("killed", "the runner got SIGTERM in 'work'", 1),
    "hung": ("killed", "the machine was lost in 'work'", 1),
    "cancelled": ("cancelled", "cancelled in 'work'", 1),
    "refused": ("failed", "no machine: ", 1),
    "retried": ("ok", "", 2),
}


def machines(n: int, seed: int, only: str = "") -> str:
    """Each fault `n` times: a true record, one kernel a run id, the rows of what is ok, and no machine left over."""
    with s3() as url, tempfile.TemporaryDirectory() as spool:
        variables = os.environ | s3_variables(url) | {"ETL_SPOOL": spool}
        variables["PYTHONPATH"] = os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)])
        make = "import boto3; boto3.client('s3').create_bucket(Bucket='machines')"
        subprocess.run([sys.executable, "-c", make], env=variables, check=True)
        script = [sys.executable, PROJECT / "tests" / "coiled_machines.py", "machines", "s3://machines/etl"]
        done = subprocess.run([*script, str(n), str(seed), only], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name, (state, reason, attempts) in EXPECTED.items():
        if only and name not in only.split(","):
            continue
        for ended in told["ended"][name]:
            assert (ended[0], ended[2], ended[3]) == (state, attempts, True), (name, ended, done.stderr[-3000:])
            assert ended[1].startswith(reason) and (reason or not ended[1]), (name, ended)
    names = {name: ended[0][5]["name"] for name, ended in told["ended"].items()}
    assert only or names["ok"] == names["again"] != names["changed"], names
    assert told["open"] == 0 and told["left"] == [], told
    assert told["rows"][0] == told["rows"][1], told["rows"]
    return (
        f"{n} of each of {len(names)}: {told['rows'][0]} ok, each row once; {told['asked']} machines, 0 open at the end"
    )
