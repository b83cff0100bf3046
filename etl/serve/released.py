"""Which code the runs of `up` run: the release that is current when they begin, or the working tree."""

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from etl import params
from etl.runs import releases
from etl.runs.releases import TOLD, NoRelease, Told, Tree, WorkingTree
from etl.storage import Damaged, Root

Trees = Callable[[], Tree]


class Unreadable(RuntimeError):
    """The release that is current cannot be run; the message is one line that says why."""


def always(tree: Tree) -> Trees:
    """One tree: the working tree as it was when `up` began."""
    return lambda: tree


class Released:
    """Called, it gives the current release, which is loaded once; safe in threads. Raises Unreadable."""

    def __init__(self, root: Root, env: str):
        self._root, self._env, self._lock = root, env, threading.Lock()
        self._tree: Tree | None = None

    def __call__(self) -> Tree:
        with self._lock:
            try:
                id = releases.current(self._root)
                if self._tree is None or self._tree.release is None or self._tree.release.id != id:
                    self._tree = releases.load(self._root, id, self._env)
            except params.ParamsError as error:
                raise Unreadable(f"release {id}: {'; '.join(map(str, error.problems))}") from None
            except (NoRelease, Damaged) as error:
                raise Unreadable(str(error)) from None
            except Exception as error:  # what a store other than S3 raises need be no OSError
                raise Unreadable(f"the release cannot be read: {type(error).__name__}: {error}") from None
            return self._tree


class Teller:
    """Keeps under the root what `up` runs, and says so when that has changed."""

    def __init__(self, root: Root, project: Path, say: Callable[[str], None]):
        self._root, self._say, self._working_tree = root, say, WorkingTree(project)
        self._told: Told | None = None
        self._since: tuple[str, str | None] = "", None

    def tell(self, tree: Tree) -> None:
        """Look at the working tree, and tell. Raises what a root or a disk that is down does."""
        release = tree.release
        if release is None:
            told = Told(None, None, [])
        else:
            if release.id != self._since[0]:
                moves = reversed(releases.moves(self._root))
                self._since = release.id, next((move.at for move in moves if move.id == release.id), None)
            told = Told(*self._since, self._working_tree.differs_from(release))
        if told != self._told:
            self._root.write(TOLD, json.dumps(asdict(told)).encode())
            if self._told is None or str(told) != str(self._told):
                self._say(str(told))
            self._told = told

    def end(self) -> None:
        """Nothing runs any more."""
        with contextlib.suppress(Exception):
            self._root.remove(TOLD)
