"""The kernel's own side of a run: `python -m etl.kernels.in_kernel` in place of `python -m ipykernel_launcher`, or
`serve` in a process that the fork server has forked.

Before IPython starts: the stack of every thread on request, also from a blocked C call; no TCP port; and output that
waits for its reader, so that a cell which prints without end neither fills memory nor loses a line.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from etl.kernels import sources, watcher

BEGINS, STALE = b"\n", b"!"  # what a forked kernel says to its order
FOLDER = "ETL_KERNEL_FOLDER"  # the variable that names the kernel's folder, for its sockets and stacks
PROFILE = ("ipython", "ipython_kernel")  # files that IPython runs when it starts, beside those in its folder `startup`
OWN = (FOLDER, "JPY_PARENT_PID")  # variables of the kernel, not of its run
NO_HISTORY = "--HistoryManager.hist_file=:memory:"
STACKS_SIGNAL = signal.SIGRTMIN + 9  # one that nothing else uses; its handler is C and needs no lock of Python's
PIECE = 64 * 1024  # characters of a stream in one message; a thousand messages may be on their way


def write_stacks_on_signal(path: str) -> None:
    """STACKS_SIGNAL, and a crash, append every thread's stack to the file at `path`."""
    file = open(path, "a")  # noqa: SIM115  # for the life of the process
    faulthandler.enable(file)
    faulthandler.enable = lambda *_, **__: None  # ipykernel would point it at its log
    faulthandler.register(STACKS_SIGNAL, file, all_threads=True)


def wait_for_readers() -> None:
    """Streams are sent in pieces, and a writer waits while the runner is behind; stock ipykernel drops messages."""
    import zmq
    from ipykernel.iostream import IOPubThread, OutStream

    write: Any = OutStream.write
    begin: Any = IOPubThread.__init__

    def write_in_pieces(self: Any, text: str) -> int:
        if isinstance(text, str) and len(text) > PIECE:
            return sum(self.write(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
        write(self, text)
        self.unsent = getattr(self, "unsent", 0) + len(text)
        if self.unsent >= PIECE:
            self.unsent = 0
            self.flush()
        return len(text)

    def begin_without_drops(self: Any, socket: "zmq.Socket[bytes]", *args: Any, **kwargs: Any) -> None:
        socket.setsockopt(zmq.XPUB_NODROP, 1)
        begin(self, socket, *args, **kwargs)

    # ipykernel has no setting for either
    OutStream.write = write_in_pieces  # type: ignore[method-assign, assignment]
    IOPubThread.__init__ = begin_without_drops  # type: ignore[method-assign]
    OutStream.flush_timeout = 24 * 3600  # s: the run's deadline counts, not this


def listen_on_no_port(folder: str) -> None:
    """Forked children hand their output over through a unix socket; ipykernel opens a TCP port for that."""
    import zmq
    from ipykernel.iostream import IOPubThread
    from zmq.eventloop.zmqstream import ZMQStream

    address = f"ipc://{folder}/forked"

    def pipe_in(self: IOPubThread) -> None:
        self._pipe_uuid = os.urandom(16)
        socket = self.socket.context.socket(zmq.PULL)
        socket.linger = 0
        socket.bind(address)
        self._pipe_in = ZMQStream(socket, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def pipe_out(self: IOPubThread) -> "tuple[zmq.Context[Any], zmq.Socket[bytes]]":
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.linger = 3000  # ms, as ipykernel has it
        socket.connect(address)
        return context, socket

    IOPubThread._setup_pipe_in = pipe_in  # type: ignore[method-assign]  # as above
    IOPubThread._setup_pipe_out = pipe_out  # type: ignore[method-assign]


def mark(folder: Path) -> mmap.mmap:
    """A mapping by which this process and those that it forks are known to belong to the kernel; see launch.py."""
    with open(folder / "mark", "w+b") as file:
        file.write(b"\0")
        file.flush()
        return mmap.mmap(file.fileno(), 1)


def serve(
    folder: Path, commands: socket.socket, modules: list[str], imported: sources.Imported, last_words: int
) -> None:
    """In a process forked from one that has the imports: be the kernel of the one run that `commands` will tell of.

    Comes up as far as a kernel can, notes in `folder` which own files it has imported, and waits. An order is one line
    of JSON: `env`, the whole environment, and `cwd`. It is answered by BEGINS once it is followed, or by STALE when one
    of those files has changed; the end of `commands` ends the process. `last_words` leads to its black box.
    """
    began = time.time()
    os.environ[FOLDER] = str(folder)
    sys.argv = [__file__, "-f", f"{folder}/kernel.json", NO_HISTORY]
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    reseed()
    free_blas()
    prepare(str(folder))
    for name in modules:
        with contextlib.suppress(Exception):  # the notebook's own import will say what is wrong
            importlib.import_module(name)
    # when it is imported it tells the shell how to show figures, and until now there was none
    sys.modules.pop("matplotlib_inline.backend_inline", None)
    before = dict(os.environ)
    from ipykernel.kernelapp import IPKernelApp
    from tornado.ioloop import IOLoop

    app = IPKernelApp.instance()
    app.initialize(sys.argv[1:])
    assert app.shell is not None and app.profile_dir is not None, "initialized"
    app.shell.run_cell("0", silent=True)  # the first cell takes several times as long as any other
    app.shell.display_formatter.format(0)
    set_by_kernel = {name: value for name, value in os.environ.items() if before.get(name) != value}
    imported.note(began)
    startup = Path(app.profile_dir.startup_dir)
    for path in (startup, *startup.iterdir(), *(startup.parent / f"{name}_config.py" for name in PROFILE)):
        imported.add(str(path), began)
    noted = folder / sources.NOTED
    noted.with_suffix(".part").write_text(json.dumps(imported.marks))
    noted.with_suffix(".part").rename(noted)
    gc.collect()
    gc.freeze()  # what is imported stays: no collection, the one that IPython ends with included, looks at it again
    kept = set_by_kernel | {name: os.environ[name] for name in OWN}
    loop = IOLoop.current()

    def obey(*_: object) -> None:
        loop.remove_handler(commands)
        commands.setblocking(True)
        with commands, commands.makefile("rwb") as talk:
            line = talk.readline()
            if not line:
                os._exit(0)
            if imported.changed():
                talk.write(STALE)
                talk.flush()
                os._exit(0)
            follow(json.loads(line), kept)
            talk.write(BEGINS)

    loop.add_handler(commands, obey, loop.READ)
    app.start()  # the kernel is at work while it waits
    leave(last_words)


def leave(last_words: int | None = None) -> None:
    """End as a process of Python ends, but leave its memory to the operating system: to free all that was imported,
    object by object, takes longer than most runs, and of a forked process first copies every page. When nothing is left
    but that, say to `last_words` what was used."""
    threading._shutdown()  # type: ignore[attr-defined]  # not public; waits for threads, as at any exit
    atexit._run_exitfuncs()
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream:
                stream.flush()
    if last_words is not None:
        with contextlib.suppress(OSError):
            os.write(last_words, json.dumps(watcher.used(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)).encode())
    os._exit(0)


def follow(order: dict[str, Any], kept: dict[str, str]) -> None:
    """Take over the environment and the working folder of the run; `kept` is what a kernel sets in it."""
    if order["env"].get("MPLBACKEND"):  # the one that a kernel sets only where it is not set
        kept.pop("MPLBACKEND", None)
    os.environ.clear()
    os.environ.update(order["env"] | kept)
    time.tzset()
    os.chdir(order["cwd"])


def reseed() -> None:
    """Random streams that forked processes would share; Python's own reseeds itself."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


def free_blas() -> None:
    """Give NumPy's BLAS the threads it was not given in the fork server."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[5] for line in maps if "scipy_openblas64_" in line), None)
    if path and "OPENBLAS_NUM_THREADS" not in os.environ:
        ctypes.CDLL(path).scipy_openblas_set_num_threads64_(len(os.sched_getaffinity(0)))


def prepare(folder: str) -> None:
    """What is done to a kernel before IPython starts."""
    write_stacks_on_signal(f"{folder}/stacks")
    wait_for_readers()
    listen_on_no_port(folder)


if __name__ == "__main__":
    if Path(sys.path[0] or ".").resolve() == Path.cwd():  # as ipykernel_launcher does; IPython adds it back
        del sys.path[0]
    prepare(os.environ[FOLDER])
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
    leave()
