"""What a disk may hold after the loss of power: a recorded history of writes, syncs, renames and links, cut anywhere.

POSIX promises little: a file's bytes are on the disk once the file was synced, a name once its folder was. Of all else
done before the cut any part may be there, in any order: a file under its new name without its bytes, a longer file
whose end is zeros, the second of two new files without the first. Only a rename is one step, as it is on every file
system with a journal. So a state is made from what was synced and a seeded choice of the rest.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,sendfile,copy_file_range,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,fsync,fdatasync"
)
LONGEST = 16_000_000  # bytes of one write that are recorded
ROOT = 0  # the inode of the folder that is watched
NAMES = {"openat": "open", "pwrite64": "pwrite", "renameat": "rename", "renameat2": "rename", "linkat": "link"}
NAMES |= {"mkdirat": "mkdir", "fdatasync": "fsync"}

Tree = dict[str, bytes | None]  # path -> bytes of a file, None of a folder; under the folder that is watched


@dataclass
class Change:
    """One thing done to the disk. `synced_by`: where in the history it is safe from then on; None for never."""

    at: int  # in the history, in calls
    what: str
    synced_by: int | None = None


@dataclass
class Bytes(Change):
    """Bytes of a file; None for its length alone, which is `offset` then."""

    inode: int = 0
    offset: int = 0
    data: bytes | None = None


@dataclass
class Names(Change):
    """Names that were given and taken, all at once: folder, name, and the inode that has it then, if any."""

    entries: list[tuple[int, str, int | None]] = field(default_factory=list)


def record(command: list[str], trace: Path, env: dict[str, str]) -> None:
    """Run a command under strace. Raises PermissionError where no process may be traced, CalledProcessError."""
    options = ["-f", "--seccomp-bpf", "-y", "-qq", "-xx", "-s", str(LONGEST), "-e", f"trace={CALLS}", "-o", str(trace)]
    done = subprocess.run(["strace", *options, *command], env=env, capture_output=True, text=True)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        raise PermissionError("strace may not trace a process here")
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout[-2000:], done.stderr[-4000:])


class History:
    """What was done under `folder`, which held `base` before, all of it on the disk."""

    def __init__(self, folder: Path, base: Tree):
        self.folder, self.base = str(folder), base
        self.changes: list[Change] = []
        self.calls = 0
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self.named: dict[
            str, list[tuple[Names, bytes]]
        ] = {}  # path -> each time a file got it: how, and its bytes then
        self._content: dict[int, bytearray] = {}
        self._appended: set[int] = set()
        self._positions: dict[int, int] = {}
        self._base: list[tuple[int, bytes | None]] = []
        for path, data in sorted(base.items()):
            inode = self._new(is_folder=data is None)
            above, name = self._parent(f"{self.folder}/{path}")
            self._names[above][name] = inode
            self._content[inode] = bytearray(data or b"")
            self._base.append((inode, data))
        self._base_names = {inode: dict(names) for inode, names in self._names.items()}

    @classmethod
    def of(cls, calls: "list[Call]", folder: Path, base: Tree) -> "History":
        """The history that a trace tells. Raises AssertionError when it does not end with what is there now."""
        history = cls(folder, base)
        for call in calls:
            history._add(*call)
        if wrong := sorted(path for path, _ in history.whole().items() ^ read_tree(folder).items()):
            raise AssertionError(f"the trace does not tell how {wrong[:5]} came to be ({len(wrong)} paths)")
        return history

    def whole(self) -> Tree:
        """All that was done, without a cut."""
        return self._made({id(change): None for change in self.changes})

    def cut(self, pick: random.Random) -> tuple[int, str, Tree]:
        """Power lost somewhere: the place in the history, what of it was lost, and what is on the disk then."""
        at = pick.choice(
            sorted({0, *(change.at for change in self.changes)} | {c.synced_by or 0 for c in self.changes})
        )
        open_ = [c for c in self.changes if c.at <= at and (c.synced_by is None or c.synced_by > at)]
        kept = {id(change): None for change in self.changes if change.at <= at}
        chance = pick.choice([0, 0, 0.5, 0.9])  # of each to be there
        names_only = pick.random() < 0.3  # a file system that writes names first
        one = pick.choice([None, None, *open_]) if chance else None  # or only one is lost
        lost = []
        for change in open_:
            there = change is not one if one else (names_only and isinstance(change, Names)) or pick.random() < chance
            if there:
                continue
            if isinstance(change, Bytes) and change.data and pick.random() < 0.5:
                kept[id(change)] = torn = _torn(change.data, pick)
                lost.append(f"{change.what} torn to {len(torn)} bytes")
            else:
                del kept[id(change)]
                lost.append(change.what)
        return at, f"cut at {at} of {self.calls}, without: {'; '.join(lost) or 'nothing'}", self._made(kept)

    def _made(self, kept: dict[int, bytes | None]) -> Tree:
        """What the changes that are kept make, some with other bytes."""
        files = {inode: bytearray(data) for inode, data in self._base if data is not None}
        names = {inode: dict(of_it) for inode, of_it in self._base_names.items()}
        for change in self.changes:
            if id(change) not in kept:
                continue
            if isinstance(change, Bytes):
                _apply(files.setdefault(change.inode, bytearray()), change, kept[id(change)])
            else:
                for folder, name, inode in change.entries:
                    of_it = names.setdefault(folder, {})
                    if inode is None:
                        of_it.pop(name, None)
                    else:
                        of_it[name] = inode
        tree: Tree = {}
        self._walk(ROOT, "", names, files, tree)
        return tree

    def _walk(self, folder: int, path: str, names: dict, files: dict, tree: Tree) -> None:
        for name, inode in names.get(folder, {}).items():
            if inode in self._names:
                tree[f"{path}{name}"] = None
                self._walk(inode, f"{path}{name}/", names, files, tree)
            else:
                tree[f"{path}{name}"] = bytes(files.get(inode, b""))

    # --- from a trace ---

    def _add(self, begun: int, name: str, arguments: list[str], result: str) -> None:
        self.calls += 1
        name = NAMES.get(name, name)
        if name == "open":
            self._open(_path(arguments), " ".join(arguments), result)
        elif name in ("write", "pwrite", "writev", "sendfile", "copy_file_range", "ftruncate"):
            self._write(name, arguments, result)
        elif name in ("rename", "link"):
            paths = _paths(arguments)
            self._move(*paths) if name == "rename" else self._link(*paths)
        elif name in ("unlink", "rmdir", "unlinkat"):
            self._gone(_path(arguments))
        elif name == "mkdir":
            self._named(_path(arguments), self._new, is_folder=True)
        elif name == "fsync":
            self._sync(_described(arguments[0]), begun)
        elif any(path and self._is_ours(path) for path in _paths(arguments)):
            raise AssertionError(f"the history has a call that is not understood: {name}{arguments}"[:300])

    def _is_ours(self, path: str) -> bool:
        return path.startswith(f"{self.folder}/")

    def _parent(self, path: str) -> tuple[int, str]:
        *folders, name = path[len(self.folder) + 1 :].split("/")
        inode = ROOT
        for part in folders:
            inode = self._names[inode][part]
        return inode, name

    def _inode(self, path: str) -> int | None:
        if path == self.folder:
            return ROOT
        try:
            folder, name = self._parent(path)
        except KeyError:
            return None
        return self._names[folder].get(name)

    def _new(self, is_folder: bool = False) -> int:
        inode = 1 + len(self._content)
        self._content[inode] = bytearray()
        if is_folder:
            self._names[inode] = {}
        return inode

    def _short(self, path: str) -> str:
        return path[len(self.folder) + 1 :]

    def _change_names(self, what: str, *entries: tuple[str, int | None]) -> None:
        change = Names(self.calls, what)
        for path, inode in entries:
            folder, name = self._parent(path)
            change.entries.append((folder, name, inode))
            if inode is None:
                self._names[folder].pop(name)
            else:
                self._names[folder][name] = inode
                self.named.setdefault(self._short(path), []).append((change, bytes(self._content[inode])))
        self.changes.append(change)

    def _named(self, path: str, make, **how) -> None:
        if self._is_ours(path):
            self._change_names(f"new {self._short(path)}", (path, make(**how)))

    def _open(self, path: str, how: str, result: str) -> None:
        if not self._is_ours(path) or not re.search("O_CREAT|O_TRUNC|O_APPEND|O_WRONLY|O_RDWR", how):
            return
        if self._inode(path) is None:
            self._named(path, self._new)
        inode = self._inode(path)
        if "O_TRUNC" in how and self._content[inode]:
            self._bytes(path, inode, 0, None)
        self._positions[inode] = 0
        (self._appended.add if "O_APPEND" in how else self._appended.discard)(inode)

    def _write(self, name: str, arguments: list[str], result: str) -> None:
        path = _described(arguments[2 if name == "copy_file_range" else 0])
        if not self._is_ours(path) or "(deleted)" in arguments[0]:
            return
        inode = self._inode(path)
        if name == "ftruncate":
            self._bytes(path, inode, int(arguments[1]), None)
            return
        if name in ("sendfile", "copy_file_range"):  # one whole file to another
            source = self._inode(_described(arguments[1 if name == "sendfile" else 0]))
            data = bytes(self._content[source][self._positions[inode] :])
        else:
            data = b"".join(map(_bytes_of, re.findall('"[^"]*"[.]*', arguments[1])))
        data = data[: int(result.split()[0])]
        if name == "pwrite":
            offset = int(arguments[3])
        else:
            offset = len(self._content[inode]) if inode in self._appended else self._positions[inode]
            self._positions[inode] = offset + len(data)
        self._bytes(path, inode, offset, data)

    def _bytes(self, path: str, inode: int, offset: int, data: bytes | None) -> None:
        what = (
            f"{len(data)} bytes of {self._short(path)}" if data is not None else f"{self._short(path)} cut to {offset}"
        )
        self.changes.append(change := Bytes(self.calls, what, inode=inode, offset=offset, data=data))
        _apply(self._content[inode], change, None)

    def _move(self, source: str, target: str) -> None:
        if self._is_ours(source) != self._is_ours(target):
            raise AssertionError(f"{source} moves in or out of what is watched, to {target}")
        if self._is_ours(source):
            entries = (source, None), (target, self._inode(source))
            self._change_names(f"{self._short(source)} renamed to {self._short(target)}", *entries)

    def _link(self, source: str, target: str) -> None:
        if self._is_ours(target):
            self._change_names(f"{self._short(target)} linked", (target, self._inode(source)))

    def _gone(self, path: str) -> None:
        if self._is_ours(path):
            self._change_names(f"{self._short(path)} removed", (path, None))

    def _sync(self, path: str, begun: int) -> None:
        if path != self.folder and not self._is_ours(path):
            return
        inode = self._inode(path)
        for change in self.changes:
            if change.at <= begun and change.synced_by is None:
                of_bytes = isinstance(change, Bytes) and change.inode == inode
                if of_bytes or (isinstance(change, Names) and inode in (folder for folder, *_ in change.entries)):
                    change.synced_by = self.calls


def _apply(file: bytearray, change: Bytes, other: bytes | None) -> None:
    if change.data is None:
        del file[change.offset :]
        file.extend(bytes(change.offset - len(file)))
        return
    data = change.data if other is None else other
    file.extend(bytes(max(change.offset + len(data) - len(file), 0)))
    file[change.offset : change.offset + len(data)] = data


def _torn(data: bytes, pick: random.Random) -> bytes:
    """A beginning of it; or as long as it is, with zeros at the end or in its midst."""
    start = pick.randrange(len(data))
    end = pick.choice([len(data), pick.randrange(start, len(data)) + 1])
    return pick.choice([data[:start], data[:start] + bytes(end - start) + data[end:], bytes(len(data))])


def read_tree(folder: Path) -> Tree:
    tree: Tree = {}
    for above, folders, files in os.walk(folder):
        start = os.path.relpath(above, folder)
        prefix = "" if start == "." else f"{start}/"
        tree |= {prefix + name: None for name in folders}
        tree |= {prefix + name: Path(above, name).read_bytes() for name in files if Path(above, name).is_file()}
    return tree


def lay_out(tree: Tree, folder: Path) -> None:
    """Make a folder that holds this and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, data in sorted(tree.items()):
        if data is None:
            os.mkdir(f"{folder}/{path}")
        else:
            with open(f"{folder}/{path}", "wb", buffering=0) as file:
                file.write(data)


# --- strace's own format ---


class Call(NamedTuple):
    """A call that succeeded. `begun`: how many had ended when it began."""

    begun: int
    name: str
    arguments: list[str]
    result: str


def calls_of(trace: Path) -> Iterator[Call]:
    """The calls that succeeded, in the order of their ends."""
    begun: dict[str, tuple[int, str]] = {}
    number = 0
    with trace.open() as lines:
        for line in lines:
            pid, _, call = line.rstrip("\n").partition(" ")
            call = call.strip()
            if call.startswith(("+++", "---")):
                continue
            if call.endswith("<unfinished ...>"):
                begun[pid] = number, call.removesuffix("<unfinished ...>")
                continue
            start = number
            if call.startswith("<... "):
                start, first = begun.pop(pid)
                call = first + call.partition(" resumed>")[2]
            whole, _, result = call.rpartition(" = ")
            if result.startswith(("-1 ", "?")):
                continue
            name, _, rest = whole.strip().partition("(")
            yield Call(start, name, _split(rest.removesuffix(")").strip()), result)
            number += 1


def _split(text: str) -> list[str]:
    """Arguments: with -xx no comma is in a string or a path."""
    return re.findall(r'(?:"[^"]*"|\[[^\]]*\]|[^,\["]|\[)+', text)


def _bytes_of(text: str) -> bytes:
    if text.endswith("..."):
        raise AssertionError("a write is longer than what is recorded of it")
    return bytes.fromhex(text[text.index('"') + 1 : text.rindex('"')].replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(bytes.fromhex(text.replace("\\x", "")))


def _described(text: str) -> str:
    """The path in `3<path>`."""
    match = re.search(r"<(.*?)>", text)
    return _text(match[1]) if match else ""


def _paths(arguments: list[str]) -> list[str]:
    """The paths in the arguments of a call, whole."""
    found, folder = [], None
    for argument in arguments:
        if '"' in argument:
            found.append(os.path.normpath(os.path.join(folder or os.getcwd(), _bytes_of(argument).decode())))
        elif "<" in argument:
            folder = _described(argument)
    return found


def _path(arguments: list[str]) -> str:
    return (_paths(arguments) or [""])[0]
