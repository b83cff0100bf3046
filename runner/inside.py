"""The kernel's own side of a run: `python -m runner.inside`, in place of `python -m ipykernel_launcher`.

Before IPython starts: the stack of every thread on request, also from a blocked C call; no TCP port; and output that
waits for its reader, so that a cell which prints without end neither fills memory nor loses a line.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

FOLDER = "ETL_KERNEL_FOLDER"  # the variable that names the kernel's folder, for its sockets and stacks
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

    write, begin = OutStream.write, IOPubThread.__init__

    def write_in_pieces(self, text):
        if isinstance(text, str) and len(text) > PIECE:
            return sum(self.write(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
        write(self, text)
        self.unsent = getattr(self, "unsent", 0) + len(text)
        if self.unsent >= PIECE:
            self.unsent = 0
            self.flush()
        return len(text)

    def begin_without_drops(self, socket, *args, **kwargs):
        socket.setsockopt(zmq.XPUB_NODROP, 1)
        begin(self, socket, *args, **kwargs)

    OutStream.write, IOPubThread.__init__ = write_in_pieces, begin_without_drops
    OutStream.flush_timeout = 24 * 3600  # s: the run's deadline counts, not this


def listen_on_no_port(folder: str) -> None:
    """Forked children hand their output over through a unix socket; ipykernel opens a TCP port for that."""
    import zmq
    from ipykernel.iostream import IOPubThread
    from zmq.eventloop.zmqstream import ZMQStream

    address = f"ipc://{folder}/forked"

    def pipe_in(self):
        self._pipe_uuid = os.urandom(16)
        socket = self.socket.context.socket(zmq.PULL)
        socket.linger = 0
        socket.bind(address)
        self._pipe_in = ZMQStream(socket, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def pipe_out(self):
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.linger = 3000  # ms, as ipykernel has it
        socket.connect(address)
        return context, socket

    IOPubThread._setup_pipe_in, IOPubThread._setup_pipe_out = pipe_in, pipe_out


if __name__ == "__main__":
    if Path(sys.path[0] or ".").resolve() == Path.cwd():  # as ipykernel_launcher does; IPython adds it back
        del sys.path[0]
    write_stacks_on_signal(f"{os.environ[FOLDER]}/stacks")
    wait_for_readers()
    listen_on_no_port(os.environ[FOLDER])
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
