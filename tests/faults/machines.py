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
    "again": ("ok", "", 1),
    "changed": ("ok", "", 1),
    "lost": ("killed", "the machine was lost in 'work'", 1),
    "worker": ("killed", "the runner got SIGTERM in 'work'", 1),
    "hung": ("killed", "the machine was lost in 'work'", 1),
    "overdue": ("timed_out", "deadline of ", 1),
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
    for name, ended in [(name, ended) for name, all_ended in told["ended"].items() for ended in all_ended]:
        state, reason, attempts = EXPECTED[name]
        assert (ended["state"], ended["attempts"]) == (state, attempts), (name, ended, done.stderr[-3000:])
        assert ended["reason"].startswith(reason) and (reason or not ended["reason"]), (name, ended)
        assert ended["kernels"] == (name != "refused"), (name, ended)  # one a run id, or none
    of_name = {name: [ended["machine"]["name"] for ended in all_ended] for name, all_ended in told["ended"].items()}
    assert len({*of_name.get("changed", [])}) == len(of_name.get("changed", [])), of_name
    assert not {*of_name.get("changed", [])} & {*of_name.get("again", [])}, of_name
    assert told["open"] == 0 and told["left"] == [], told
    ok = sum(ended["state"] == "ok" for all_ended in told["ended"].values() for ended in all_ended)
    assert told["rows"] == ok, (told["rows"], ok)
    took = {"cancelled": "after_s", "lost": "after_s", "hung": "after_s", "overdue": "over_s"}
    times = [
        f"{name} {max(e[what] for e in told['ended'][name]):g} s" for name, what in took.items() if name in of_name
    ]
    lag_s = max(ended["lag_s"] for all_ended in told["ended"].values() for ended in all_ended)
    return (
        f"{n} of each of {len(of_name)}: {ok} ok, each row once; {told['asked']} machines, 0 open at the end; at most, "
        f"after the word, the fault, the deadline: {', '.join(times)}; a line seen after {lag_s:g} s"
    )
