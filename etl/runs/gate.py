"""Before a release: what the stages that changed would have made of the runs that were, and what they ask otherwise.

Each changed stage runs its last ok runs again, on the versions they read, with the candidate's code and values; only
what was given to a run alone stays as it was. What comes out otherwise, and would not with the code in use, differs.
Replays cannot show everything: a check that asks less passes what passed. So values and checks are compared as well.

A run that wrote tables cannot be replayed: what it found in them is gone. Instead both releases run the stage, each in
a root of its own below tries/, which the lake prepares (`Bench`), and are held against each other.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from etl import params
from etl.kernels import imports, sources
from etl.params import Stage
from etl.params.cell import SUPPLIED, read_cell
from etl.runs import index, provenance, replay, tries
from etl.runs.releases import Tree
from etl.runs.replay import Difference, NotRepeatable, as_json, unlike
from etl.storage import Damaged, Root

LOCKED = re.compile(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;\\]+)", re.M)  # a package of the lock, and its version
GIVEN = re.compile(r"command line|Prefect|run \S+")  # origins of values that were one run's alone
TIMES = ("every_s", "cron", "timezone", "until", "enabled", "missed", "overlap")
WHEN = (*TIMES, "deadline_s", "retries", "memory_mb", "machine", "dask")
CLOCK = (("metrics", "given"), ("metrics", "as_of"))  # otherwise by when a run was, or what it began with
Progress = Callable[[Stage], AbstractContextManager[Callable[[int, int, str], None] | None]]


@dataclass(frozen=True)
class Bench:
    """What the gate asks of a lake. `again`: have the files of a batch wait in a folder below the root, how many;
    `branch`: make a branch there; `rows`: how the tables of two such roots differ: table -> (the one, the other)."""

    again: Callable[[int, str], int]
    branch: Callable[[str], Any]
    rows: Callable[[Root, Root], dict[str, tuple[str, str]]]


@dataclass
class Verdict:
    """What the gate has seen of a stage. `differences` have to be accepted; of `settings` it only tells."""

    stage: str
    changed: list[str]  # its files that are not as in the release in use
    differences: list[Difference] = field(default_factory=list)
    settings: list[Difference] = field(default_factory=list)  # when and where it runs, and what is new
    replayed: list[str] = field(default_factory=list)  # run_ids
    unseen: list[str] = field(default_factory=list)  # why a run was not replayed, or how it was


def look(
    root: Root, current: Tree | None, candidate: Tree, runs: int, progress: Progress, bench: Bench | None = None
) -> list[Verdict]:
    """A verdict of each stage that is not what it is in `current`; of all of them when there is none.

    `runs`: how many of a stage's runs are replayed at most. `progress`: a context a replay, which gives its `on_cell`.
    `bench`: for stages that write tables; None: they are not looked at.
    """
    before = current.project.stages if current else {}
    verdicts = []
    for name in [*candidate.project.stages, *(name for name in before if name not in candidate.project.stages)]:
        changed = _changed(name, current, candidate)
        if not changed:
            continue
        verdict = Verdict(name, changed)
        verdicts.append(verdict)
        if name not in candidate.project.stages:
            verdict.differences.append(Difference("stage", name, "there", "gone"))
            continue
        if current and name in before:
            _compare(before[name], candidate.project.stages[name], verdict)
        elif current:
            verdict.unseen.append("it is new")
            continue
        _replay(root, current, candidate, runs, progress, verdict, bench)
    return verdicts


def packages(current: Tree | None, candidate: Tree) -> list[Difference]:
    """The packages that the lock names in another version than that of the release in use; each changes every stage."""
    if current is None:
        return []
    locks = [tree.folder / provenance.LOCK for tree in (current, candidate)]
    versions: list[dict[str, str]] = []
    for lock in locks:
        named: dict[str, str] = {}
        for name, version in LOCKED.findall(lock.read_text() if lock.exists() else ""):
            named[name] = f"{named[name]}, {version}" if name in named else version  # by machine and Python
        versions.append(named)
    return unlike("packages", versions[0], versions[1])


def _changed(name: str, current: Tree | None, candidate: Tree) -> list[str]:
    """The files of a stage that differ: its notebook, its YAML, the env file, the lock, and all code it imports."""
    files = [_files(name, tree) if tree else {} for tree in (current, candidate)]
    return sorted({path for path, _ in files[0].items() ^ files[1].items()})


def _files(name: str, tree: Tree) -> dict[str, str]:
    assert tree.release, "of a release"
    notebook = f"notebooks/{name}.ipynb"
    own = sources.packages_of(tree.folder, [tree.folder / notebook]).values()
    held = [path for path in own if path.is_relative_to(tree.folder)]  # others came after it
    code = tuple(f"{path.relative_to(tree.folder)}{'/' if path.is_dir() else ''}" for path in held)
    exact = (notebook, f"params/{name}.yml", f"params/env/{tree.project.environment.name}.yml", provenance.LOCK)
    return {
        path: sha256
        for path, sha256 in tree.release.files.items()
        if path in exact or path.startswith(code) and not path.endswith(".ipynb")
    }


def _compare(before: Stage, after: Stage, verdict: Verdict) -> None:
    """What two releases ask of a stage without its running."""
    values = unlike("parameters", as_json(before.values), as_json(after.values))
    checks = unlike("checks", _checks(before), _checks(after))
    for difference in values + checks:
        is_new = difference.name not in (before.values if difference.part == "parameters" else _checks(before))
        (verdict.settings if is_new else verdict.differences).append(difference)
    named = {difference.name for difference in values}
    defaults = unlike("defaults", _defaults(before), _defaults(after))
    verdict.settings += [difference for difference in defaults if difference.name not in named]  # the YAML's are used
    when = [as_json({name: getattr(stage, name) for name in WHEN}) for stage in (before, after)]
    verdict.settings += unlike("when", when[0], when[1])


def _defaults(stage: Stage) -> dict[str, Any]:
    """Of the parameters in its notebook."""
    notebook = stage.notebook_path
    return as_json(read_cell(notebook.parent, notebook.name, [])[1].value)


def _checks(stage: Stage) -> dict[str, str]:
    """Name of each check in a stage's notebook -> what it asks, as Python."""
    asked: dict[str, str] = {}
    try:
        tree = ast.parse(imports.code_of(stage.notebook_path))
    except (SyntaxError, ValueError):
        return asked  # its runs will say so
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "check" and len(node.args) > 1:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0])
            asked[str(name)] = ast.unparse(node.args[1])
    return asked


def _replay(
    root: Root,
    current: Tree | None,
    candidate: Tree,
    runs: int,
    progress: Progress,
    verdict: Verdict,
    bench: Bench | None,
) -> None:
    """Run a stage's last ok runs again with the candidate, and what then differs with the release in use as well."""
    last = index.newest(root, stage=verdict.stage, state="ok", limit=runs) if runs else []
    if not last:
        verdict.unseen.append("no run of it was ok yet" if runs else "no run is replayed")
    for row in last:
        run = index.get(root, row["run_id"])
        before = current if current and verdict.stage in current.project.stages else None
        try:
            if bench and before and replay.wrote_tables(run):
                differences = _beside(root, run, (before, candidate), progress, bench, verdict)
            else:
                differences = _replayed(run, candidate, progress)
                if differences and before:
                    anyway = {_key(difference) for difference in _replayed(run, before, progress)}
                    differences = [difference for difference in differences if _key(difference) not in anyway]
        except (NotRepeatable, Damaged, params.ParamsError) as error:
            why = str(error).removeprefix(run["run_id"]).strip()
            verdict.unseen.append(f"{run['run_id']}: {why}; `try {verdict.stage}` shows what it does now")
            continue
        verdict.replayed.append(run["run_id"])
        verdict.differences += differences


def _beside(
    root: Root, run: dict[str, Any], trees: Iterable[Tree], progress: Progress, bench: Bench, verdict: Verdict
) -> list[Difference]:
    """What differs of a stage that writes tables by two trees, in roots in which what a run found is again as far as it
    can be: the files of its batch where it ingested one, else the lake of now. Raises NotRepeatable."""
    from etl.runs import dispatch

    batch, files, made = run["metrics"].get("batch"), 0, list[tuple[Root, dict[str, Any]]]()
    for tree in trees:
        folder = tries.begin(root, f"gate-{run['stage']}")
        if batch is None or run["versions_read"]:
            bench.branch(folder)
        elif not (files := bench.again(batch, folder)):
            raise NotRepeatable(f"the files of batch {batch} are in the archive no more")
        stage, place = _as_it_was(run, tree), Root.at(root.url_of(folder))
        with progress(stage) as on_cell:
            record = dispatch.run_stage(
                replace(stage, retries=0, machine=None),
                replace(tree.project.environment, root=place.url),
                scheduled_for=datetime.fromisoformat(run["scheduled_for"]),
                on_cell=on_cell,
                parent=run["run_id"],
                release=tree.release,
            )
        if not made and not record.ok:
            raise NotRepeatable(f"the release in use does not run it again: {record.reason}")
        made.append((place, vars(record)))
    (one, before), (other, after) = made
    where = f"{files} files of batch {batch}" if files else "a branch of what is published"
    verdict.unseen.append(f"it wrote tables: both releases ran on {where}, and are compared")
    differences, _ = replay.compare(one, before, other, after)
    differences = [one for one in differences if (one.part, one.name) not in CLOCK]
    return differences + [Difference("rows", table, *rows) for table, rows in bench.rows(one, other).items()]


def _replayed(run: dict[str, Any], tree: Tree, progress: Progress) -> list[Difference]:
    stage = _as_it_was(run, tree)
    with progress(stage) as on_cell:
        return replay.replay(run, stage, tree.project.environment, on_cell, tree.release).differences


def _as_it_was(run: dict[str, Any], tree: Tree) -> Stage:
    """The stage of a tree, with the values that were given to a run alone."""
    name = run["stage"]
    given = {
        name: value
        for name, value in run["parameters"].items()
        if name not in SUPPLIED and GIVEN.fullmatch((run.get("origins") or {}).get(name, ""))
    }
    env, whence = tree.project.environment.name, f"run {run['run_id']}"
    return params.load(tree.folder, env, stage=name, values=given, values_from=whence).stages[name]


def _key(difference: Difference) -> tuple[str, str, str]:
    return difference.part, difference.name, json.dumps(difference.after, default=str)
