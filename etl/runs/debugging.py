"""A run's executed notebook, to be run again cell by cell: on what the run found, with the code that it ran.

    outputs/debug/<id>/<run_id>.ipynb   the report's cells and what they showed; only its root is another
    outputs/debug/<id>/...              that root: the versions that the run read, and what is written there

It is nobody's stage, and goes after a day.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl.runs import releases, replay, tries
from etl.storage import PROJECT, Root

BENCHES = "outputs/debug"  # a folder each
RAN = ("ok", "never_ran")  # states of a cell that the run did not end in


class NotThere(LookupError):
    """There is nothing to open; the message says why."""


@dataclass(frozen=True)
class Bench:
    """What is opened. `code`: the folder that its kernel imports from; `failed`: the id of the cell that did; `told`:
    what is not as it was for the run, a sentence each."""

    notebook: Path
    code: Path
    failed: str | None
    told: list[str]


def prepare(root: Root, run: dict[str, Any], branch: Callable[[str], Any]) -> Bench:
    """Make one for a run. `branch`: makes a branch of the root's lake in a folder below the root, for a run that says
    of nothing that it read it. Raises NotThere, replay.NotRepeatable, and storage.Damaged."""
    try:
        nb = json.loads(root.read(f"{run['report']}/report.ipynb"))
    except FileNotFoundError:
        raise NotThere(f"the report of {run['run_id']} was swept; `runs show` has its row") from None
    here = Root.at(PROJECT)
    tries.sweep(here, BENCHES)
    bench = Root.at(here.url_of(f"{BENCHES}/{tries.new_id(run['stage'])}"))
    told, found = [], bench
    if run["versions_read"] or run["metrics"].get("given"):
        replay.prepare(run, root, bench)
    else:
        folder = tries.begin(root, "debug")
        branch(folder)
        found = Root.at(root.url_of(folder))
        told.append("it says of no version that it read it: it finds what is published, and waits, now")
    of_run = releases.of_run(root, run)
    if of_run is None:
        gone = f"release {run['release']} is gone" if run.get("release") else "it ran without a release"
        told.append(f"{gone}: its code is the working tree's")
    cells = [cell for cell in nb["cells"] if "report" not in cell["metadata"].get("runner", {})]
    failed = [cell.get("id") for cell in cells if cell["metadata"].get("runner", {}).get("state") not in RAN]
    for cell in cells:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["source"] = _elsewhere("".join(cell["source"]), found.url)
    bench.write(f"{run['run_id']}.ipynb", json.dumps(nb | {"cells": cells}, indent=1).encode())
    notebook = Path(bench.url_of(f"{run['run_id']}.ipynb"))
    return Bench(notebook, of_run[1] if of_run else PROJECT, failed[0] if failed else None, told)


def _elsewhere(source: str, url: str) -> str:
    """The injected cell with another root, and without the address of a cluster that is gone."""
    other = {"root": url, "dask": None}
    lines = [line.partition(" = ") for line in source.splitlines()]
    return "\n".join(
        f"{name} = {other[name]!r}" if name in other else name + equal + value for name, equal, value in lines
    )
