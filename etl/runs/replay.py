"""A run again: with its parameters and some of them changed, or exactly as it was, to see whether the same comes out.

A rerun takes a run's recorded parameters, then the new ones, into the same root. A replay takes all of them, and the
versions of the tables that the run read, into a root of its own, and compares what both made.
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from etl import delta, params
from etl.figures import shortened, words
from etl.params import Environment, Stage
from etl.params.cell import SUPPLIED
from etl.runs.record import RunRecord
from etl.runs.releases import Release
from etl.storage import Root

REPLAYS = "outputs/replay"  # a folder for each replayed run
KEPT = 20  # of them
PINNED = "lake/pinned.json"  # has the lake's readers see another root's versions
TIME_LIKE = re.compile(r"(.*_)?(s|ms|seconds|at)")  # metrics of how long or when: never twice the same
TOLERANCE = 1e-9  # of floats, relative: threads add in any order
NAMED = 3  # differences of a part that a sentence has
CODE = {"code_sha256": "the code", "notebook_sha256": "the notebook", "lock_sha256": "the packages"}
NOTABLE_S = 0.1  # cells that differ by less took the same time


class NotRepeatable(Exception):
    """The run cannot be run again this way; the message says why."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same. `part`: parameters, code, inputs, state, checks, metrics, results, models ..."""

    part: str
    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Replay:
    """What came of a replay. `changed`: code, lock and machine since the run; `compared`: how many of each part."""

    run_id: str
    record: RunRecord
    differences: list[Difference]
    changed: list[Difference]
    compared: dict[str, int]

    @property
    def equal(self) -> bool:
        return not self.differences


def recorded(
    project: Path, env: str, run: dict[str, Any], overrides: Iterable[str] = ()
) -> tuple[Stage, Environment, list[Difference]]:
    """A run's stage as it would run again: recorded values win over today's YAML, `overrides` over both.

    Also the environment, and the differences of parameters: "parent" to the run, "today" to a run without it.
    Raises NotRepeatable for a recorded parameter that the notebook no longer declares, ParamsError for wrong values.
    """
    name, run_id = run["stage"], run["run_id"]
    today = params.load(project, env, stage=name).stages[name]
    values = {key: value for key, value in run["parameters"].items() if key not in SUPPLIED}
    if gone := sorted(set(values) - set(today.values)):
        where = today.notebook_path.relative_to(project)
        raise NotRepeatable(f"{run_id} was run with {', '.join(gone)}, which {where} no longer declares")
    loaded = params.load(project, env, overrides, stage=name, values=values, values_from=f"run {run_id}")
    stage = loaded.stages[name]
    differences = [
        *unlike("parent", values, as_json(stage.values)),
        *unlike("today", as_json(today.values), as_json(stage.values)),
    ]
    return stage, loaded.environment, differences


def replay(
    run: dict[str, Any],
    stage: Stage,
    environment: Environment,
    on_cell: Callable[[int, int, str], None] | None = None,
    release: Release | None = None,
) -> Replay:
    """Run `run` again as `stage` (from `recorded`) in a root of its own, on the versions it read, and compare.

    `release`: the one whose folder the stage was loaded from; None: the working tree.

    `environment.root` is where the run is. Raises NotRepeatable when what it read is gone or was not recorded.
    """
    from etl.runs import dispatch

    source, scratch = Root.at(environment.root), Root.at(f"{REPLAYS}/{run['run_id']}")
    _remove_oldest(Root.at(REPLAYS))
    prepare(run, source, scratch)
    record = dispatch.run_stage(
        replace(stage, retries=0, machine=None),
        replace(environment, root=scratch.url),
        scheduled_for=datetime.fromisoformat(run["scheduled_for"]),
        on_cell=on_cell,
        parent=run["run_id"],
        release=release,
    )
    differences, compared = compare(source, run, scratch, vars(record))
    return Replay(run["run_id"], record, differences, _code(run, vars(record)), compared)


def prepare(run: dict[str, Any], source: Root, scratch: Root) -> None:
    """Make `scratch` a root in which the run finds what it found in `source`: the versions that it read, and what it
    recorded as given. Raises NotRepeatable when that is gone or was not recorded."""
    given = run["metrics"].get("given", {})
    if wrote_tables(run):
        tables = ", ".join(run["versions_written"])
        raise NotRepeatable(f"{run['run_id']} wrote the lake ({tables}), and what it found there is not recorded")
    for table, version in run["versions_read"].items():
        _require_version(source, table, version)
    scratch.remove_tree("")
    if run["versions_read"]:
        pinned = {
            "source_root": source.url,
            "batch": run["metrics"].get("batch", 0),
            "as_of": run["metrics"].get("as_of", run["scheduled_for"]),
            "tables": run["versions_read"],
            "run_id": run["run_id"],
        }
        scratch.write(PINNED, json.dumps(pinned, indent=1).encode())
    for path, content in given.items():
        _give(source, scratch, path, content)


def wrote_tables(run: dict[str, Any]) -> bool:
    """Whether it wrote tables of the lake and did not record what it found."""
    return bool(run.get("versions_written")) and not run["metrics"].get("given")


def _remove_oldest(replays: Root) -> None:
    """Of more than KEPT replays the two that were written to longest ago go."""
    written = sorted((time, name) for name in replays.names("") if (time := replays.newest(name)))
    for _, name in written[: max(0, min(2, len(written) - KEPT))]:
        replays.remove_tree(name)


def _require_version(source: Root, table: str, version: int) -> None:
    from deltalake.exceptions import DeltaError

    gone = f"version {version} of {table}, which it read, is no more"
    try:
        handle = source.table(f"lake/{table}", version)
    except (DeltaError, OSError) as error:
        raise NotRepeatable(f"{gone}: {error}") from None
    missing = {file.rel for file in delta.files(handle)} - delta.data_names(source, f"lake/{table}")
    if missing:
        raise NotRepeatable(f"{gone}: {len(missing)} of its files were vacuumed")


def _give(source: Root, scratch: Root, path: str, content: Any) -> None:
    """Put what the run started from where it found it: `content` itself, or the source's file with that sha256."""
    if not isinstance(content, str):
        scratch.write(path, json.dumps(content, indent=1).encode())
        return
    try:
        data = source.read(path)
    except FileNotFoundError:
        raise NotRepeatable(f"{path}, which it read, is no more") from None
    if hashlib.sha256(data).hexdigest() != content:
        raise NotRepeatable(f"{path}, which it read, has changed since")
    scratch.write(path, data)


def compare(
    source: Root, run: dict[str, Any], scratch: Root, again: dict[str, Any]
) -> tuple[list[Difference], dict[str, int]]:
    """What differs of what both runs made, state first, and how many of each part were compared; the root and the
    run's own name may differ anywhere."""
    before, after = _nameless(run, source), _nameless(again, scratch)
    parts = {
        "state": (_of(before, "state", "reason"), _of(after, "state", "reason")),
        "checks": (_checks(before), _checks(after)),
        "inputs": (before["versions_read"], after["versions_read"]),
        "metrics": (_lasting(before["metrics"]), _lasting(after["metrics"])),
        "models": (_models(source, run["run_id"]), _models(scratch, again["run_id"])),
    }
    differences = [difference for part, (a, b) in parts.items() for difference in unlike(part, a, b)]
    compared = {part: len(a.keys() | b.keys()) for part, (a, b) in parts.items()}
    results, made = _results(source, run["run_id"]), _results(scratch, again["run_id"])
    for question in sorted(results.keys() | made.keys()):
        differences += _frames_unlike(question, results.get(question), made.get(question))
    return differences, compared | {"results": len(results.keys() | made.keys())}


def _of(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record.get(key) for key in keys}


def _checks(record: dict[str, Any]) -> dict[str, Any]:
    """Check -> whether it was ok."""
    return _numbered({check["name"]: check["ok"]} for check in record["checks"] or [])


def _lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that may be the same twice."""
    return {name: value for name, value in metrics.items() if not TIME_LIKE.fullmatch(name)}


def _nameless(record: dict[str, Any], root: Root) -> dict[str, Any]:
    """A record's JSON without what differs by necessity: its run_id and its root's URL."""
    text = json.dumps(record, default=str)
    for own, word in ((root.url, "ROOT"), (record["run_id"], "RUN")):
        text = text.replace(json.dumps(own)[1:-1], word)
    document: dict[str, Any] = json.loads(text)
    return document


def _results(root: Root, run_id: str) -> dict[str, bytes]:
    """Question -> the Parquet file of the run's answer."""
    answers = {}
    for question in root.names("results"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            answers[question] = root.read(f"results/{question}/{run_id}.parquet")
    return answers


def _models(root: Root, run_id: str) -> dict[str, str]:
    """sha256 of each model the run published; all but one have a number behind their name."""
    folders = [name for name in root.names("models") if name.startswith(f"{run_id}-")]
    return _numbered(
        {"model.json": hashlib.sha256(root.read(f"models/{name}/model.json")).hexdigest()} for name in folders
    )


def _numbered(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One dict of many; a key that comes again gets a number: a, a (2), ..."""
    merged: dict[str, Any] = {}
    for name, value in itertools.chain.from_iterable(item.items() for item in items):
        count = next(i for i in itertools.count(1) if (name if i == 1 else f"{name} ({i})") not in merged)
        merged[name if count == 1 else f"{name} ({count})"] = value
    return merged


def _frames_unlike(question: str, before: bytes | None, after: bytes | None) -> list[Difference]:
    """Where two answers differ: columns, number of rows, or for each column the first of the rows that do."""
    if before is None or after is None:
        words = {True: "no file", False: "a file"}
        return [Difference("results", question, words[before is None], words[after is None])]
    import polars as pl

    a, b = pl.read_parquet(io.BytesIO(before)), pl.read_parquet(io.BytesIO(after))
    if a.schema != b.schema:
        types = [{f"{question} {k}": str(v) for k, v in frame.schema.items()} for frame in (a, b)]
        return unlike("results", types[0], types[1])
    if a.height != b.height:
        return [Difference("results", question, f"{a.height} rows", f"{b.height} rows")]
    differences = []
    for column in a.columns:
        differing = a[column].ne_missing(b[column])
        if a[column].dtype.is_float():
            near = (a[column] - b[column]).abs() <= TOLERANCE * a[column].abs()
            differing &= ~near.fill_null(False)
        if differing.any():
            row = differing.arg_max() or 0
            name = f"{question}: {column} in {differing.sum()} of {a.height} rows, first in row {row}"
            differences.append(Difference("results", name, a[column][row], b[column][row]))
    return differences


def diff(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    """What differs between two runs' records: parameters, code, inputs, cells, metrics and how they ended."""
    own = ("root", "run_id")
    kept = [{k: v for k, v in run["parameters"].items() if k not in own} for run in (before, after)]
    return [
        *unlike("state", _of(before, "stage", "state", "reason"), _of(after, "stage", "state", "reason")),
        *unlike("parameters", kept[0], kept[1]),
        *_code(before, after),
        *unlike("inputs", before["versions_read"], after["versions_read"]),
        *unlike("checks", _checks(before), _checks(after)),
        *unlike("metrics", before["metrics"], after["metrics"]),
        *unlike("seconds", {"whole run": before["seconds"]}, {"whole run": after["seconds"]}, NOTABLE_S),
        *unlike("seconds", _cell_seconds(before), _cell_seconds(after), NOTABLE_S),
    ]


def cause(before: dict[str, Any], after: dict[str, Any], differences: Iterable[Difference]) -> str:
    """One sentence: how two runs ended, and what they had that differs and so may be why."""
    ends = [f"{run['run_id']} {run['state'].replace('_', ' ')}" for run in (before, after)]
    given: dict[str, list[str]] = {"parameters": [], "code": [], "inputs": []}
    for one in differences:
        if one.part in given and one.name not in SUPPLIED:
            old, new = (shortened(json.dumps(value, default=str), 12) for value in (one.before, one.after))
            what = CODE.get(one.name, words(one.name)) if one.part == "code" else f"{one.name} {old} → {new}"
            given[one.part].append(what)
    limits = [
        f"{what} {before[name] or 0:,g} → {after[name] or 0:,g} {unit}"
        for name, what, unit in (("deadline_s", "deadline", "s"), ("memory_mb", "memory limit", "MB"))
        if name in before and name in after and before[name] != after[name]
    ]
    told = [*limits]
    for part, names in given.items():
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            told.append(f"{'read ' * (part == 'inputs')}{', '.join(names[:NAMED])}{more}")
    why = "; ".join(told) or "nothing that they were given: neither parameters nor code nor inputs"
    return f"{', '.join(ends)}. What differs before: {why}."


def _cell_seconds(record: dict[str, Any]) -> dict[str, float | None]:
    """Seconds under each heading; None where no cell ran."""
    seconds: dict[str, float | None] = {}
    for cell in record.get("cells") or []:
        before = seconds.setdefault(cell["heading"], None)
        if cell["seconds"] is not None:
            seconds[cell["heading"]] = round((before or 0) + cell["seconds"], 3)
    return seconds


def _code(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    return unlike("code", before.get("provenance") or {}, after.get("provenance") or {})


def unlike(part: str, before: dict[str, Any], after: dict[str, Any], tolerance: float = 0) -> list[Difference]:
    """The keys whose values differ; floats by more than `tolerance`, or relatively by more than TOLERANCE."""
    return [
        Difference(part, name, before.get(name), after.get(name))
        for name in [*before, *(name for name in after if name not in before)]
        if (name in before) != (name in after) or not _alike(before[name], after[name], tolerance)
    ]


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if type(a) is float or type(b) is float:
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        return numbers and abs(a - b) <= max(tolerance, TOLERANCE * abs(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return document
