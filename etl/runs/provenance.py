"""Where a figure comes from: the code and the machine of a run, and the run of a table's version."""

import contextlib
import datetime
import functools
import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from etl import delta
from etl.kernels import client, sources
from etl.runs import index
from etl.storage import PROJECT, Root

LOCK = "requirements.lock"


def of(
    notebook: dict[str, Any], project: Path | None = None, committed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that decides what a run does besides its parameters and its data; a few milliseconds.

    `project`: the folder of its code, this process's own when None; `committed`: what `git` would say of it, if known.

    git_commit and git_dirty (null where there is no repository), code_sha256 (of the own code that notebooks import,
    wherever it lies), notebook_sha256 (of the cells' sources: outputs do not count), lock_sha256 (null without a lock),
    python, machine.
    """
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in notebook["cells"]]
    project = project or PROJECT
    lock = project / LOCK
    return {
        **(committed or git(project)),
        "code_sha256": _code(project).sha256(),
        "notebook_sha256": _sha256(json.dumps(cells).encode()),
        "lock_sha256": _sha256(lock.read_bytes()) if lock.exists() else None,
        **here(),
    }


@functools.lru_cache(8)  # of releases, too
def _code(project: Path) -> sources.Code:
    return sources.Code(project, client.server_folder(project) / client.IMPORTED)


def git(project: Path | None = None) -> dict[str, Any]:
    """git_commit and git_dirty: whether the project's files differ from it, or are not in it."""
    said = _git(project or PROJECT, "status", "--porcelain=v2", "--branch", "--", ".")
    if said is None:
        return {"git_commit": None, "git_dirty": None}
    commit = re.search(r"^# branch\.oid ([0-9a-f]+)$", said, re.M)
    dirty = any(not line.startswith("#") for line in said.splitlines())
    return {"git_commit": commit and commit[1], "git_dirty": dirty}


def uncommitted(project: Path) -> list[str]:
    """The project's files, from its folder, that differ from git's commit or are not in it; none without git."""
    said = _git(project, "ls-files", "-z", "--modified", "--others", "--exclude-standard")
    staged = _git(project, "diff", "-z", "--cached", "--name-only", "--relative")
    return sorted({path for text in (said, staged) for path in (text or "").split("\0") if path})


def _git(project: Path, *command: str) -> str | None:
    """What git says; None when there is no git, or no repository."""
    # without optional locks: must not be in the way of somebody who is committing
    asked = ["git", "--no-optional-locks", "-C", str(project), *command]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def here() -> dict[str, str]:
    """python and machine of this process."""
    return {"python": platform.python_version(), "machine": platform.platform()}


def _sha256(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def whence(root: Root, table: str, version: int | None = None) -> dict[str, Any]:
    """Who wrote a version of a table of the lake, or of the index `runs`, the newest when `version` is None.

    table, version, operation, at (ISO, UTC), run_id and stage (null when no run wrote it, as with a commit by hand).
    Of a version whose commit was cleaned up the index of runs tells, if a run recorded it: `operation` is null then,
    and `at` is when that run ended. Raises LookupError when there is no such table or version, or nothing tells of it.
    """
    # not by DeltaTable.history(): it numbers the newest commits downwards from the version that it was opened at, so it
    # is wrong for an older version, and for the newest while others commit (deltalake 1.6.3)
    folder = table if table == index.TABLE else f"lake/{table}"
    if version is None:
        version = delta.newest_version(root, folder)
        if version is None:
            raise LookupError(f"there is no table {table} under {root.url}")
    try:
        lines = delta.actions(root, folder, version)
    except FileNotFoundError:
        return _whence_by_index(root, table, version)
    info: delta.Action = next((line["commitInfo"] for line in lines if "commitInfo" in line), {})
    return {
        "table": table,
        "version": version,
        "operation": info.get("operation"),
        "at": _iso(info["timestamp"]) if "timestamp" in info else None,
        "run_id": info.get("run_id"),
        "stage": info.get("stage"),
    }


def last_versions(root: Root, table: str, limit: int) -> list[dict[str, Any]]:
    """Who wrote the newest versions of a table of the lake, the newest first, as far as `whence` knows."""
    newest = delta.newest_version(root, f"lake/{table}")
    told: list[dict[str, Any]] = []
    with contextlib.suppress(LookupError):  # its commit was cleaned up
        for version in range(newest, max(newest - limit, -1), -1) if newest is not None else ():
            told.append(whence(root, table, version))
    return told


def _whence_by_index(root: Root, table: str, version: int) -> dict[str, Any]:
    run = index.find_writer(root, table, version)
    if run is None:
        raise LookupError(f"there is no version {version} of {table} under {root.url}, or no more")
    about = {"run_id": run["run_id"], "stage": run["stage"]}
    return {"table": table, "version": version, "operation": None, "at": run["ended_at"], **about}


def _iso(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).isoformat(timespec="milliseconds")
