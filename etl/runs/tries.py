"""Stages of the working tree on real data, before they are released: in a root of their own, a branch of the real one.

    <root>/tries/<id>/...   as a root has it: what is there begins as it is published, and what a try writes stays there

The lake's part of it is `etl.lake.branch`; here is what else a stage finds, the runs, and what they made otherwise than
production's last. A try goes after a day.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from etl.params import Environment, Stage
from etl.params.cell import SUPPLIED
from etl.runs import index, replay
from etl.runs.record import RunRecord
from etl.runs.replay import Difference, as_json, unlike
from etl.storage import Root

TRIES = "tries"
KEPT = timedelta(days=1)
NAME = re.compile(r".+-(\d{8}T\d{6})-[0-9a-f]{6}", re.ASCII)


@dataclass(frozen=True)
class Tried:
    """A run of a try, and `beside`, production's last ok run of the stage, None when there is none: its record."""

    record: RunRecord
    beside: dict[str, Any] | None
    differences: list[Difference]
    compared: dict[str, int]  # how many of each part


def begin(root: Root, what: str) -> str:
    """The folder of a new try, below the root, where answers and models are those of now; old ones are swept."""
    sweep(root)
    folder = f"{TRIES}/{new_id(what)}"
    root.duplicate([*_answers(root), *root.files("models")], folder)
    return folder


def new_id(what: str) -> str:
    """A name that says when it was made."""
    return f"{what}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _answers(root: Root) -> list[str]:
    """The current answers, and what names them."""
    rels = []
    for question in root.names("results"):
        with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # damaged: no answer
            pointer = f"results/{question}/current.json"
            current = json.loads(root.read(pointer))
            rels += [current["file"], pointer, f"results/{question}/history.json"]
            rels += [current["chart"]] if current.get("chart") else []
    return rels


def sweep(root: Root, folder: str = TRIES, now: datetime | None = None) -> int:
    """Remove the tries that began more than a day ago, or what else has such ids in a folder; how many."""
    before = (now or datetime.now(UTC)) - KEPT
    old = [
        name
        for name in root.names(folder)
        if (match := NAME.fullmatch(name)) and datetime.strptime(f"{match[1]}+0000", "%Y%m%dT%H%M%S%z") < before
    ]
    for name in old:
        root.remove_tree(f"{folder}/{name}")
    return len(old)


def run(
    root: Root,
    folder: str,
    stage: Stage,
    environment: Environment,
    on_cell: Callable[[int, int, str], None] | None = None,
) -> Tried:
    """Run a stage of the working tree once, on this machine, in the try in `folder`, and compare."""
    from etl.runs import dispatch

    scratch = Root.at(root.url_of(folder))
    last = index.newest(root, stage=stage.name, state="ok", limit=1)
    beside = index.get(root, last[0]["run_id"]) if last else None
    record = dispatch.run_stage(
        replace(stage, retries=0, machine=None), replace(environment, root=scratch.url), on_cell=on_cell
    )
    if beside is None:
        return Tried(record, None, [], {})
    differences, compared = replay.compare(root, beside, scratch, vars(record))
    differences = [one for one in differences if (one.part, one.name) != ("metrics", "given")]  # what it began with
    before = {name: value for name, value in beside["parameters"].items() if name not in SUPPLIED}
    return Tried(record, beside, [*unlike("parameters", before, as_json(stage.values)), *differences], compared)
