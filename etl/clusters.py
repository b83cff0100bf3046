"""A Dask cluster: who speaks to it, and how its workers come to the code that they run.

Workers need the project's packages, in the same versions. The project itself they need not have, and where they have
another release of it they take this one: a function is sent with the source of what it is part of.
"""

import contextlib
import functools
import hashlib
import io
import logging
import pickle
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import distributed

log = logging.getLogger(__name__)
WORKER_S = 180  # for the first worker of a cluster to come: a cloud's machine boots in one or two minutes


@contextlib.contextmanager
def connected(dask: "str | distributed.Client | None") -> "Iterator[distributed.Client | None]":
    """A client of the Dask scheduler at that address, or `dask` itself. Raises OSError when nobody answers there."""
    if not isinstance(dask, str):
        yield dask
        return
    import distributed

    with distributed.Client(dask, set_as_default=False) as client:
        yield client


def require_worker(client: "distributed.Client") -> None:
    """Wait for a cluster's first worker; once, as those that are lost later may come again. Raises OSError when none
    comes within WORKER_S seconds."""
    if client in _has_had_workers:
        return
    scheduler = client.scheduler_info(n_workers=1)
    if not scheduler["workers"]:
        address = scheduler["address"]
        log.warning("the Dask scheduler at %s has no worker; waiting for one for %g s", address, WORKER_S)
        try:
            client.submit(abs, 1, pure=False).result(WORKER_S)  # an adaptive cluster has workers only for work
        except TimeoutError:
            raise OSError(f"the Dask scheduler at {address} had no worker for {WORKER_S:g} s") from None
    _has_had_workers.add(client)


_has_had_workers: "weakref.WeakSet[distributed.Client]" = weakref.WeakSet()


class Sent:
    """A function of a module, which is pickled with the source of its package and of this one. `packages`: further
    ones that it needs."""

    def __init__(self, function: Callable[..., Any], packages: tuple[str, ...] = ()):
        self.function, self.packages = function, packages

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        import cloudpickle

        module, name = self.function.__module__, self.function.__qualname__
        packages = tuple(sorted({__package__, module.partition(".")[0], *self.packages}))
        return cloudpickle.loads, (_packed(packages, module, name),)


def submit(client: "distributed.Client", function: Callable[..., Any], *arguments: Any) -> "distributed.Future[Any]":
    """Have a worker call a function of a module with what can be pickled.

    A worker that is lost has it called a second time, by another one, and of what the first has written nobody learns.
    Raises OSError when the cluster has no worker.
    """
    require_worker(client)
    called = [function, *filter(callable, arguments)]
    sent = Sent(_called, tuple(each.__module__.partition(".")[0] for each in called))
    return client.submit(sent, pickle.dumps((function, arguments)), pure=False)


def _called(payload: bytes) -> Any:
    function, arguments = pickle.loads(payload)  # noqa: S301  (from `submit`, by the cluster that runs its code anyway)
    return function(*arguments)


@functools.cache
def _packed(packages: tuple[str, ...], module: str, name: str) -> bytes:
    import cloudpickle

    folders = {package: Path(next(iter(sys.modules[package].__path__))) for package in packages}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for package, folder in folders.items():
            for path in sorted(folder.rglob("*.py")):
                archive.write(path, f"{package}/{path.relative_to(folder)}")
    this = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(this)
    try:
        there = functools.partial(_there, _digest(folders), zipped.getvalue(), packages, module, name)
        packed: bytes = cloudpickle.dumps(there)
        return packed
    finally:
        cloudpickle.unregister_pickle_by_value(this)


def _digest(folders: dict[str, Path]) -> str:
    """Of the source of some packages."""
    digest = hashlib.sha256()
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _there(
    digest: str, code: bytes, packages: tuple[str, ...], module: str, name: str, /, *arguments: Any, **named: Any
) -> Any:
    """On a worker: call the function by this source, which is taken where the worker has none, or another."""
    import importlib
    import threading

    with sys.__dict__.setdefault("_sent_lock", threading.Lock()):
        taken = sys.__dict__.setdefault("_sent_code", {})  # package -> the digest that it is of
        if any(taken.get(package) != digest for package in packages):
            if not _has(packages, digest):
                _take(packages, code)
            taken.update(dict.fromkeys(packages, digest))
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return function(*arguments, **named)


def _has(packages: tuple[str, ...], digest: str) -> bool:
    """On a worker: whether its own packages are of this source."""
    import importlib

    try:
        folders = {name: Path(next(iter(importlib.import_module(name).__path__))) for name in packages}
    except ImportError:
        return False
    return _digest(folders) == digest


def _take(packages: tuple[str, ...], code: bytes) -> None:
    """On a worker: have packages come from this source from now on."""
    import atexit
    import importlib
    import os
    import tempfile

    for known in [known for known in sys.modules if known.partition(".")[0] in packages]:
        del sys.modules[known]
    with tempfile.NamedTemporaryFile(prefix="code-", suffix=".zip", delete=False) as file:
        file.write(code)
    atexit.register(os.unlink, file.name)
    sys.path.insert(0, file.name)
    importlib.invalidate_caches()
