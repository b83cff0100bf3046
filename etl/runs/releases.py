"""What `up` runs: notebooks, YAML and code as they were when somebody released them, by the hash of their contents.

    releases/<id>/files/...      as the project has them, and beside them the own packages that notebooks import
    releases/<id>/release.json   what it was made from; comes last, so a release without it is none
    releases/current.json        which of them `up` runs, and the moves that led there

The files of a release are a project of their own: with its folder first on Python's path nothing of the working tree
is imported. What a notebook shows is none of its content: a release holds notebooks without outputs.
"""

import compileall
import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from etl import params
from etl.kernels import sources
from etl.runs import index, provenance
from etl.runs.record import now
from etl.storage import PROJECT, Damaged, LocalRoot, Root

FOLDER, CURRENT, MANIFEST = "releases", "releases/current.json", "release.json"
LEASE = "services/releases.lease"
TOLD = "services/code.json"  # what an `up` at work runs, for who reads the root
CACHE = PROJECT / "outputs" / "checkouts"  # what was fetched from an object store; a root has releases/
KEPT = 10  # releases that `up` ran last, at least; also of those in the cache
MOVES = 100  # the last, that current.json tells of
BESIDE = ("requirements.lock", "pyproject.toml")  # files of the project's own folder that are released
SHOWN = ("execution", "papermill", "collapsed", "scrolled")  # of a cell's metadata: what running it left
CODE = (".py", ".ipynb", ".yml", ".so")  # a file of these kinds that was added to a release would be run


class NoRelease(LookupError):
    """There is no such release, or none at all; the message says so."""


@dataclass(frozen=True)
class Release:
    """One release. `files`: path -> sha256; `dirty`: those of them that were not as in `git_commit`."""

    id: str
    made_at: str  # ISO, UTC
    message: str
    git_commit: str | None
    dirty: list[str]
    files: dict[str, str]

    @property
    def committed(self) -> dict[str, Any]:
        """As provenance.git says it."""
        return {"git_commit": self.git_commit, "git_dirty": bool(self.dirty) if self.git_commit else None}


@dataclass(frozen=True)
class Move:
    """One time that another release became the current one."""

    id: str
    at: str  # ISO, UTC
    how: str  # up (the first), release or rollback
    message: str = ""
    before: str | None = None  # where a rollback from here leads


@dataclass(frozen=True)
class Tree:
    """A folder of code that stages run from, and the stages in it. `release`: None for the working tree."""

    folder: Path
    project: params.Project
    release: Release | None = None


@dataclass(frozen=True)
class Change:
    """A file that is not the same in two trees. `kind`: added, changed or removed; `diff`: unified, of its text."""

    path: str
    kind: str
    diff: str


# --- what is in one ---


def contents(project: Path) -> dict[str, Path]:
    """The files that a release of a project holds: their path in it -> where they are now."""
    chosen = {name: project / name for name in BESIDE if (project / name).is_file()}
    for folder in ("notebooks", "params"):
        chosen |= files_below(project / folder, folder)
    for name, path in sources.packages_of(project, project.glob("notebooks/*.ipynb")).items():
        if not path.is_relative_to(project / "notebooks"):
            chosen |= files_below(path, name) if path.is_dir() else {path.name: path}
    return chosen


def files_below(folder: Path, name: str) -> dict[str, Path]:
    """All files of a folder, but for what editors, Python and JupyterLab leave there."""
    chosen = {}
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [child for child in folders if not child.startswith((".", "__pycache__"))]
        for child in names:
            is_nobodys = child.startswith("_") and child.endswith(".ipynb")
            if not (is_nobodys or child.startswith((".", "Untitled")) or child.endswith(("~", ".pyc"))):
                path = Path(at, child)
                chosen[f"{name}/{path.relative_to(folder).as_posix()}"] = path
    return chosen


def content(path: Path) -> bytes:
    """What is released of a file: of a notebook, what running it in JupyterLab does not change."""
    data = path.read_bytes()
    if path.suffix != ".ipynb":
        return data
    try:
        nb = json.loads(data)
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
            cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key not in SHOWN}
        nb["metadata"] = {key: nb["metadata"][key] for key in ("kernelspec",) if key in nb["metadata"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return data  # no notebook: `check` says so
    return (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode(errors="surrogatepass")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _id_of(files: Mapping[str, str]) -> str:
    return _sha256(json.dumps(sorted(files.items())).encode())[:12]


class WorkingTree:
    """A project's folder, looked at again and again: what has not changed is not read again."""

    def __init__(self, project: Path):
        self.project = project
        self._marks: dict[str, sources.Mark] = {}  # of all its files, and of the folders where more may appear
        self._files: dict[str, tuple[sources.Mark, str]] = {}  # path in a release -> mark, sha256

    def differs_from(self, release: Release) -> list[str]:
        """The files that a release made now would have otherwise, or would not have, or more."""
        if not self._marks or any(sources.mark(path) != mark for path, mark in self._marks.items()):
            self._read()
        files = {rel: sha256 for rel, (_, sha256) in self._files.items()}
        return sorted({rel for rel, _ in files.items() ^ release.files.items()})

    def _read(self) -> None:
        chosen, before = contents(self.project), self._files
        folders = {str(path.parent) for path in chosen.values()} | {str(self.project / "params")}
        self._marks = {path: sources.mark(path) for path in (str(self.project), *folders, *map(str, chosen.values()))}
        self._files = {}
        for rel, path in chosen.items():
            mark = self._marks[str(path)]
            if before.get(rel, ((), ""))[0] == mark:
                self._files[rel] = before[rel]
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._files[rel] = mark, _sha256(content(path))


# --- making, and finding ---


def freeze(project: Path, root: Root, message: str = "") -> Release:
    """Keep a copy of what the project's stages are now, once for each content; it is not yet what `up` runs."""
    held = {rel: content(path) for rel, path in contents(project).items()}
    files = {rel: _sha256(data) for rel, data in held.items()}
    try:
        release = find(root, _id_of(files))
        if not isinstance(root, LocalRoot) or not _problem(_stored(root, release.id), release):
            return release
    except (NoRelease, Damaged):
        release = Release(
            id=_id_of(files),
            made_at=now(),
            message=message,
            git_commit=provenance.git(project)["git_commit"],
            dirty=[path for path in provenance.uncommitted(project) if path in files],
            files=files,
        )

    def write(rel: str) -> None:
        root.write(f"{FOLDER}/{release.id}/files/{rel}", held[rel])
        if isinstance(root, LocalRoot):
            os.chmod(_stored(root, release.id) / rel, 0o444)

    root.each(write, files)
    root.write(f"{FOLDER}/{release.id}/{MANIFEST}", json.dumps(asdict(release), indent=1).encode())
    return release


def find(root: Root, beginning: str) -> Release:
    """A release by its id, or the beginning of it. Raises NoRelease for none or several, Damaged."""
    ids = [name for name in root.names(FOLDER) if name.startswith(beginning) and re.fullmatch(r"[0-9a-f]{12}", name)]
    if len(ids) > 1:
        raise NoRelease(f"{len(ids)} releases begin with {beginning}")
    document = root.read_json(f"{FOLDER}/{ids[0]}/{MANIFEST}") if ids else None
    if document is None:
        raise NoRelease(f"there is no release {beginning} under {root.url}")
    try:
        release = Release(**{name: document[name] for name in Release.__dataclass_fields__})
    except KeyError as error:
        raise Damaged(f"{FOLDER}/{ids[0]}/{MANIFEST} is damaged: it has no {error}") from None
    return release


def newest(root: Root) -> list[Release]:
    """All releases, the one made last first."""
    found = []
    for name in root.names(FOLDER):
        with contextlib.suppress(NoRelease):
            found.append(find(root, name))
    return sorted(found, key=lambda release: release.made_at, reverse=True)


# --- the current one ---


def moves(root: Root) -> list[Move]:
    """How the pointer moved, the last move last; none before the first release. Raises Damaged."""
    document = root.read_json(CURRENT)
    if document is None:
        return []
    try:
        return [Move(**move) for move in document["moves"]]
    except (KeyError, TypeError) as error:
        raise Damaged(f"{CURRENT} is damaged: {error}") from None


def current(root: Root) -> str:
    """The id of the release that runs begin with. Raises NoRelease, Damaged."""
    made = moves(root)
    if not made:
        raise NoRelease(f"nothing is released under {root.url}")
    return made[-1].id


def move(root: Root, id: str, how: str, message: str = "", after: str | None = None) -> None:
    """Make a release the current one, if that is `after` until now; else raise RuntimeError."""
    with root.lease(LEASE, f"process {os.getpid()}"):
        made = moves(root)
        at = made[-1].id if made else None
        if at != after:
            raise RuntimeError(f"somebody else has moved to release {at} in the meantime: look again")
        before = at
        if how == "rollback":  # from there it leads to where it led from there
            before = next((m.before for m in reversed(made) if m.id == id), None)
        made.append(Move(id, now(), how, message, before))
        document = {"id": id, "moves": [asdict(m) for m in made[-MOVES:]]}
        root.write(CURRENT, json.dumps(document, indent=1).encode())


def roll_back(root: Root, beginning: str | None = None) -> Release:
    """Go back to a release, by default to the one before; it is looked at first. Raises NoRelease, Damaged."""
    at, last = current(root), moves(root)[-1]
    if beginning is None and last.before is None:
        raise NoRelease(f"there is none before release {at}")
    release = find(root, beginning or last.before or "")
    if release.id == at:
        raise NoRelease(f"release {at} is the current one")
    checkout(root, release)
    move(root, release.id, "rollback", after=at)
    return release


def first(project: Path, root: Root) -> Release:
    """The first release of a root, without a gate: nothing is at work there that it could differ from."""
    release = freeze(project, root)
    move(root, release.id, "up")
    return release


def prune(root: Root) -> list[str]:
    """Remove the releases that are of no use any more; their ids.

    Kept are the current one, the last that were, and each that a run names whose report is there.
    """
    import polars as pl

    last = list(dict.fromkeys(m.id for m in reversed(moves(root))))[:KEPT]
    old = [release.id for release in newest(root) if release.id not in last]
    if len(old) + len(last) <= KEPT:
        return []
    runs = index.scan(root)
    if "release" in runs.collect_schema():
        named = runs.filter(pl.col("release").is_in(old)).select("release", "report").collect()
        for release, report in named.iter_rows():
            if release in old and root.exists(f"{report}/{index.COMPLETE}"):
                old.remove(release)
    for release in old:
        discard(root, release)
    return old


def discard(root: Root, id: str) -> None:
    """Remove a release."""
    root.remove(f"{FOLDER}/{id}/{MANIFEST}")
    root.remove_tree(f"{FOLDER}/{id}")


# --- on this machine ---


def checkout(root: Root, release: Release) -> Path:
    """The folder with a release's files, on this machine, each file as it was released. Raises Damaged, NoRelease."""
    return _checkout(root.url, release.id, _Unhashed((root, release)))


@dataclass(frozen=True)
class _Unhashed:
    """An argument that a cache does not look at."""

    value: Any = field(compare=False)


@functools.lru_cache(32)  # once a process: what it forks and starts looks no more than it does
def _checkout(_: str, id: str, asked: _Unhashed) -> Path:
    root, release = asked.value
    folder = _stored(root, id)
    if isinstance(root, LocalRoot) and os.pathsep not in str(folder):  # which no entry of PYTHONPATH can have
        if problem := _problem(folder, release):
            raise Damaged(f"release {id}: {problem}")
        return _compiled(folder)
    folder = CACHE / id / "files"
    if _problem(folder, release):
        _fetch(root, release)
        if problem := _problem(folder, release):
            raise Damaged(f"release {id}: {problem}")
    os.utime(CACHE / id)
    with contextlib.suppress(FileNotFoundError):  # another process fetches one, or drops it
        for path in sorted(CACHE.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)
    return _compiled(folder)


def _compiled(folder: Path) -> Path:
    """The folder, its code compiled: where Python writes no bytecode, each kernel would do so."""
    compileall.compile_dir(folder, quiet=2)
    return folder


def _stored(root: Root, id: str) -> Path:
    return Path(root.url_of(f"{FOLDER}/{id}/files"))


def _fetch(root: Root, release: Release) -> None:
    """Put a release into the cache, where it appears whole."""
    part = CACHE / f".{release.id}-{uuid.uuid4().hex[:8]}.part"

    def read(rel: str) -> None:
        path = part / "files" / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(root.read(f"{FOLDER}/{release.id}/files/{rel}"))
        path.chmod(0o444)

    try:
        root.each(read, release.files)
        if (CACHE / release.id).exists():  # not what was released
            (CACHE / release.id).rename(part / "before")
        with contextlib.suppress(OSError):  # another process was quicker
            part.rename(CACHE / release.id)
    except FileNotFoundError as error:
        raise Damaged(f"release {release.id}: a file of it is gone: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(CACHE / release.id / "before", ignore_errors=True)


def _problem(folder: Path, release: Release) -> str | None:
    """What is not as it was released."""
    for rel, sha256 in release.files.items():
        try:
            if _sha256((folder / rel).read_bytes()) != sha256:
                return f"{rel} is not what was released"
        except OSError as error:
            return f"{rel} cannot be read: {error.strerror}"
    held = {
        Path(at, name).relative_to(folder).as_posix()
        for at, _, names in os.walk(folder)
        for name in names
        if name.endswith(CODE) and "/.ipynb_checkpoints" not in at
    }
    if more := sorted(held - release.files.keys()):
        return f"{more[0]} was not released"
    return None


def load(root: Root, id: str, env: str) -> Tree:
    """A release and the stages in it, as they run in this root. Raises NoRelease, Damaged, ParamsError."""
    release = find(root, id)
    folder = checkout(root, release)
    project = params.load(folder, env)
    return Tree(folder, replace(project, environment=replace(project.environment, root=root.url)), release)


def of_run(root: Root, run: Mapping[str, Any]) -> tuple[Release, Path] | None:
    """(a run's release, its folder); None of the working tree, or when it is no more."""
    if not run.get("release"):
        return None
    try:
        release = find(root, run["release"])
        return release, checkout(root, release)
    except (NoRelease, Damaged):
        return None


# --- what is not the same ---


def diff(root: Root, before: Release | None, after: Release | Path) -> list[Change]:
    """What differs between two releases, or between one and a working tree; everything from None."""
    old, old_text = _texts(root, before) if before else ({}, lambda rel: "")
    new, new_text = _texts(root, after)
    changes = []
    for rel in sorted({rel for rel, _ in old.items() ^ new.items()}):
        kind = "added" if rel not in old else "removed" if rel not in new else "changed"
        was = old_text(rel).splitlines() if rel in old else []
        now = new_text(rel).splitlines() if rel in new else []
        lines = difflib.unified_diff(was, now, f"before/{rel}", f"after/{rel}", lineterm="", n=2)
        changes.append(Change(rel, kind, "\n".join(lines)))
    return changes


def _texts(root: Root, tree: Release | Path) -> tuple[dict[str, str], Callable[[str], str]]:
    """(path -> sha256, a function that reads a path's text)"""
    if isinstance(tree, Release):
        release = tree
        return release.files, lambda rel: _text(rel, root.read(f"{FOLDER}/{release.id}/files/{rel}"))
    held = {rel: content(path) for rel, path in contents(tree).items()}
    return {rel: _sha256(data) for rel, data in held.items()}, lambda rel: _text(rel, held[rel])


def _text(rel: str, data: bytes) -> str:
    """As people read it: of a notebook its cells, one below the other."""
    text = data.decode(errors="replace")
    if rel.endswith(".ipynb"):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return "\n".join(_cells(json.loads(text)))
    return text


def _cells(nb: dict[str, Any]) -> Iterator[str]:
    for cell in nb["cells"]:
        tags = cell["metadata"].get("tags")
        yield f"# %% {cell['cell_type']}{f' {tags}' if tags else ''}"
        yield "".join(cell["source"])


# --- what `up` says of it ---


@dataclass(frozen=True)
class Told:
    """What `up` runs, as people are told it. `differs`: files of the working tree that are not as in the release."""

    release: str | None  # None: the working tree
    since: str | None  # when it became the current one, ISO, UTC
    differs: list[str]

    def __str__(self) -> str:
        if self.release is None:
            return "live: the working tree runs"
        moment = f"{self.since[:10]} {self.since[11:16]} UTC" if self.since else "an unknown time"
        text = f"release {self.release} of {moment}"
        if not self.differs:
            return f"{text}; the working tree is the same"
        return (
            f"{text}; working tree differs from the release: {len(self.differs)} file{'s' * (len(self.differs) != 1)}"
        )


def told(root: Root) -> Told | None:
    """What an `up` at work said last; None when none is."""
    document = root.read_json(TOLD)
    return Told(**document) if document else None
