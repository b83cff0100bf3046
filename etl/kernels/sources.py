"""Which code is the user's own, and whether it is still what was imported.

Own is every file that is imported and is neither of the standard library nor an installed package: found by what is
imported and not by where it lies, so a package beside pipeline/ counts, and one that is installed to be edited.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import site
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from pathlib import Path

INSTALLED = re.compile(r"/(site|dist)-packages/")
_FOLDERS = (*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), site.getusersitepackages())
LIBRARIES = tuple({f"{form(folder)}/" for folder in _FOLDERS for form in (os.path.realpath, os.path.abspath)})
NOTED = "imported.json"  # in a kernel's folder: `Imported.marks`
ALWAYS = ("etl",)  # of this project's packages: what a run itself needs in its kernel
Mark = tuple[int, ...]
IMPORTED = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)|import[ \t]+([\w., \t]+))", re.M)


def is_own(path: str) -> bool:
    """Whether a module's file is the user's own."""
    known = INSTALLED.search(path) or path.startswith(LIBRARIES)
    return not known and not os.path.realpath(path).startswith(LIBRARIES)


def mark(path: str) -> Mark:
    """Changes when the file does; empty when there is none. One call of stat."""
    try:
        info = os.stat(path)
    except OSError:
        return ()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class Imported:
    """The own files behind sys.modules, as they were when they were imported."""

    def __init__(self) -> None:
        self.marks: dict[str, Mark | None] = {}  # None: changed while it was imported

    def note(self, since: float) -> None:
        """Look at the modules that are new. What has changed after `since` (Unix time), when the first of them was
        imported, may have been read before it changed: it counts as changed."""
        for module in list(sys.modules.values()):
            path = getattr(module, "__dict__", {}).get("__file__")
            if isinstance(path, str) and path not in self.marks and is_own(path) and mark(path):
                self.add(path, since)

    def add(self, path: str, since: float) -> None:
        """One more file, that has been read after `since`; or a folder, or a place where nothing is."""
        now = mark(path)
        self.marks[path] = None if now and since < now[-1] / 1e9 <= time.time() else now

    def changed(self) -> str | None:
        """The first file that is not what was imported."""
        return changed(self.marks)


def changed(marks: dict[str, Mark | None]) -> str | None:
    """The first file whose mark is not this any more."""
    return next((path for path, before in marks.items() if before is None or mark(path) != before), None)


def noted(folder: Path) -> dict[str, Mark | None]:
    """What a kernel has noted in its folder. Raises OSError before it has."""
    marks = json.loads((folder / NOTED).read_text())
    return {path: seen if seen is None else tuple(seen) for path, seen in marks.items()}


class Code:
    """The own code that the project's notebooks may import: whole packages, as some find their modules by looking."""

    def __init__(self, project: Path, extra: Path | None = None):
        """`extra`: a file with a JSON list of more own files, those that were imported without being asked for."""
        self._project, self._extra, self._lock = project, extra, threading.Lock()
        self._marks: dict[str, Mark] = {}
        self._tops: dict[str, Path | None] = {}  # name -> its folder or file, None when it is nobody's own
        self._sha256 = ""

    def sha256(self) -> str:
        """Of the contents of all of it. What has not changed is not read again. Safe in threads."""
        with self._lock:
            if self._look() != self._marks:
                self._find()
                marks, whole = self._look(), hashlib.sha256()
                for path in self._files():
                    whole.update(_read(path))
                self._marks, self._sha256 = marks, whole.hexdigest()
            return self._sha256

    def _look(self) -> dict[str, Mark]:
        """The marks of all that decides what the code is: it, the notebooks, and the folders where more may appear."""
        folders = [self._project, self._project / "notebooks"]
        notebooks = [entry for entry in _entries(folders[1]) if entry.endswith(".ipynb")]
        return {path: mark(path) for path in (*map(str, folders), *notebooks, *self._files())}

    def _files(self) -> list[str]:
        """Every file of own code, in the order of their packages' names."""
        paths: list[str] = []
        for name in sorted(self._tops):
            if path := self._tops[name]:
                paths += _files_of(path)
        if self._extra:
            with contextlib.suppress(OSError, ValueError):
                paths += sorted(json.loads(self._extra.read_text()))
        return list(dict.fromkeys(paths))

    def _find(self) -> None:
        self._tops = _tops_of(self._project, self._project.glob("notebooks/*.ipynb"))


def packages_of(project: Path, notebooks: Iterable[Path]) -> dict[str, Path]:
    """The own top-level packages and modules that notebooks import, and those import: name -> its folder or file."""
    return {name: path for name, path in sorted(_tops_of(project, notebooks).items()) if path}


def _tops_of(project: Path, notebooks: Iterable[Path]) -> dict[str, Path | None]:
    """As `packages_of`; None for each name that is nobody's own."""
    from etl.kernels import imports

    tops: dict[str, Path | None] = {}
    todo = list(ALWAYS)
    for notebook in notebooks:
        todo += _imports(imports.code_of(notebook))
    while todo:
        name = todo.pop()
        if name not in tops:
            tops[name] = top = _path_of(project, name)
            for path in _files_of(top) if top else ():
                todo += _imports(_read(path).decode(errors="replace"))
    return tops


def _path_of(project: Path, name: str) -> Path | None:
    """Where an own top-level package or module is; None for one of a library, and for what is not there."""
    if name in sys.stdlib_module_names:
        return None
    folders = (project, project / "notebooks")
    for path in [path for folder in folders for path in (folder / name / "__init__.py", folder / f"{name}.py")]:
        if path.is_file():
            return path.parent if path.name == "__init__.py" else path
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    paths = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    if paths and not any(os.path.exists(path) and is_own(f"{path}/") for path in paths):
        return None
    # a folder without __init__.py is a package where nobody else has one of that name
    namespaces = [folder / name for folder in folders if (folder / name).is_dir()]
    own = [Path(path) for path in paths if os.path.exists(path)]
    return next(iter(namespaces + own), None)


def _files_of(path: Path) -> list[str]:
    """The modules of a package, or the one file; none where nothing is."""
    if path.suffix:
        return [str(path)]
    paths, todo = [], [str(path)]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    paths.append(entry.path)
                elif not entry.name.startswith((".", "__")) and entry.is_dir():
                    todo.append(entry.path)
    return sorted(paths)


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(folder))
    except OSError:
        return []


def _imports(code: str) -> Iterable[str]:
    """The top-level names after `import` and `from`; in a text, too, where it does no harm."""
    for module, modules in IMPORTED.findall(code):
        for name in (module or modules).split(","):
            if top := name.split()[0].split(".")[0] if name.split() else "":
                yield top


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # gone a moment ago
        return b""
