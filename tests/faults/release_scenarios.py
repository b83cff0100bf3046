"""Releases that move while runs begin: each run is of one release, whole, whichever kernel it gets.

The function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import os
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from faults import toy
from support import write_stage

from etl.kernels import client
from etl.runs import delivery, dispatch, releases
from etl.serve.released import Released
from etl.storage import Root

SAYS = """import sys, psutil
from mine import figures
own = [module.__file__ for name, module in sys.modules.items() if name.split('.')[0] in ('etl', 'mine')]
record(said=[{value}, figures.VALUE, n], folders=sorted({{path.split('/files/')[0] for path in own}}),
       forked='forkserver' in str(psutil.Process().cmdline()))"""


def released(project: Path, root: Root, values: range) -> dict[str, int]:
    """A release for each value, which its notebook, its module and its YAML all have: id -> value."""
    for folder in ("notebooks", "params/env", "mine"):
        (project / folder).mkdir(parents=True)
    (project / "params/env/local.yml").write_text("root: outputs\nmachine: null\ndask: null\n")
    (project / "mine/__init__.py").touch()
    made: dict[str, int] = {}
    for value in values:
        (project / "mine/figures.py").write_text(f"VALUE = {value}\n")
        yml = f"retries: 0\nparameters:\n  n: {value}\n"
        write_stage(project, "says", SAYS.format(value=value), parameters="n: int = 0  # a\n", yml=yml)
        release = releases.freeze(project, root)
        releases.move(root, release.id, "release", after=list(made)[-1] if made else None)
        made[release.id] = value
    return made


def moving(n: int, seed: int) -> str:
    """`n` runs, three at a time, while the pointer moves and fork servers with it: none has anything of another."""
    rng, end, moves = random.Random(seed), threading.Event(), 0
    with tempfile.TemporaryDirectory() as folder, toy.spool(folder):
        root = Root.at(Path(folder) / "root")
        values = released(Path(folder) / "project", root, range(1, 4))
        trees = Released(root, "local")

        def move() -> None:
            """As `up` does it, but late: for a while the kernels that wait are of the release before."""
            nonlocal moves
            keeper = None
            while not end.is_set():
                tree = trees()
                successor = client.Keeper(2, Path(folder) / "log", tree.folder)
                if keeper:
                    successor.take_over(keeper)
                keeper = successor
                keeper.start()
                socket = client.server_folder(tree.folder) / "socket"
                toy.until(lambda socket=socket: end.is_set() or socket.exists(), 240, "the fork server")
                end.wait(rng.uniform(1, 4))
                other = rng.choice([id for id in values if id != tree.release.id])
                releases.move(root, other, "release", after=tree.release.id)
                moves += 1
                end.wait(rng.uniform(0, 1))
            keeper.end()

        def run(_: int) -> bool:
            tree = trees()
            stage, environment = tree.project.stages["says"], tree.project.environment
            record = dispatch.run_stage(stage, environment, release=tree.release, page_later=True)
            assert record.state == "ok", record.reason
            forked, value = record.metrics.pop("forked"), values[tree.release.id]
            assert record.release == tree.release.id
            assert record.metrics == {"said": [value] * 3, "folders": [str(tree.folder.parent)]}
            return forked

        with mock.patch.dict(os.environ, {"ETL_KERNELS": f"{folder}/k"}), ThreadPoolExecutor(4) as pool:
            mover = pool.submit(move)
            try:
                forked = list(pool.map(run, range(n)))
            finally:
                end.set()
            mover.result()
            delivery.settle()
    return f"{n} runs, {sum(forked)} in forked kernels, {moves} moves of the pointer: each of one release"
