"""Home on one host and runs on another, no disk between them: either is killed, or cut off, while it works.

The function takes how many times and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from support import copy_project
from two_hosts import kill, two_hosts, why_not

ROOT = "s3://hosts/etl"
FILES = 4  # of orders that wait for each run
LAND = """import sys
from etl.storage import Root
line = '{"o_orderkey":%d,"o_custkey":1,"o_orderstatus":"O","o_totalprice":"1.00","o_orderdate":"1996-01-02",'
line += '"o_orderpriority":"5-LOW","o_clerk":"c","o_shippriority":0,"o_comment":"c",'
line += '"o_order_time":"2026-03-01T12:00:00Z"}\\n'
root = Root.at(sys.argv[1])
first, last = map(int, sys.argv[2:])
root.each(lambda n: root.write(f"landing/orders/some-{n:05d}.json", (line % n).encode()), range(first, last))
"""
COUNT = """import json, sys
from etl.runs import index
from etl.storage import Root
from pipeline import Lake
root = Root.at(sys.argv[1])
keys = Lake(root).published().frame("orders", ["o_orderkey"]).collect()["o_orderkey"].to_list()
runs = [(run["run_id"], run["state"]) for run in index.newest(root)]
print(json.dumps({"keys": keys, "waiting": root.files("landing"), "runs": runs, "left": root.files("live")}))
"""


def hosts(n: int, seed: int) -> str:
    """`n` runs on the other host, one of the two killed or cut off meanwhile: each row once, true records."""
    if why := why_not():
        return f"not provoked: {why}"
    rng, met = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="hosts-") as text, two_hosts(Path(text)) as both:
        project = both.disk / "project"
        for name in ("home", "far"):
            copy_project(both.folder / name / "project")
        block = {"root": ROOT, "machine": both.machine(project), "dask": None}
        block["stages"] = {"preprocess": {"deadline": "10 minutes"}}
        (both.folder / "home" / "project" / "params" / "env" / "far.yml").write_text(yaml.safe_dump(block))
        variables = both.variables() | {"PYTHONPATH": str(project)}
        orchestrate = [sys.executable, project / "orchestrate.py"]
        run = both.on("home", *orchestrate, "run", "preprocess", "--env", "far", "-p", "quiet_s=0")

        def at_home(code: str, *arguments: object) -> str:
            command = both.on("home", sys.executable, "-c", code, ROOT, *map(str, arguments))
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        def begun() -> subprocess.Popen:
            return subprocess.Popen(run, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        took_s = 0.0
        for k in range(n + 1):
            at_home(LAND, k * FILES + 1, (k + 1) * FILES + 1)
            began, under_way = time.monotonic(), begun()
            fault = "none" if k == 0 else ("home", "far", "cut off")[k % 3]
            if fault != "none":
                time.sleep(rng.uniform(0.2, 1) * took_s)
            if fault == "home":
                kill(under_way)
            elif fault == "far":
                both.kill_far()
                time.sleep(1)
                both.boot_far()
            elif fault == "cut off":
                both.cut_off_far(True)
                time.sleep(8)
                both.cut_off_far(False)
            told = under_way.communicate(timeout=600)[0]
            assert fault != "none" or under_way.returncode == 0, told
            took_s = took_s or time.monotonic() - began
            met[fault] += 1
        for _ in range(3):  # what was killed last is finished, and what waits still is taken
            ended = begun()
            told = ended.communicate(timeout=600)[0]
        assert ended.returncode == 0, told
        counted = json.loads(at_home(COUNT).splitlines()[-1])
    assert Counter(counted["keys"]) == Counter(range(1, (n + 1) * FILES + 1)), Counter(counted["keys"])
    assert counted["waiting"] == [], counted
    # a machine may have told more after home had died and given the run up: a sweep takes it a day later
    killed = {run_id for run_id, state in counted["runs"] if state == "killed"}
    assert {path.split("/")[1] for path in counted["left"]} <= killed, counted
    states = Counter(state for _, state in counted["runs"])
    assert states.keys() <= {"ok", "noop", "killed", "failed"} and states["ok"], states
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    faults = f"home killed {met['home']} times, the other {met['far']}, cut off {met['cut off']}"
    return f"{faults}: {len(counted['keys'])} rows, each once; runs {ended}"
