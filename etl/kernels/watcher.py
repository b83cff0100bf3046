"""The black box of a kernel: a small process between a runner and its kernel, which ends the one with the other.

It is the parent of the kernel and, as a subreaper, of everything that loses its own parent below it, so nothing the
kernel starts gets out of sight, not by setsid and not by forking twice. It samples the whole tree, ends it when it
takes too much memory, and ends it when the runner is gone, however that died: then its lifeline is closed. What it
sees goes to the run's journal. Needs nothing but the standard library; as a script it starts the kernel,

    python -I -S watcher.py PID_PATH COMMAND ...

with the lifeline as standard input, and ends with the kernel's own exit status. The fork server (forkserver.py) forks
it instead. What comes through the lifeline, a line each: first, when the run begins, what to do,

    {"runner": pid, "journal": path or null, "memory_mb": number or null}

then the number of the current cell whenever a cell begins. Where the lifeline is a socket, its last line goes the
other way: the kernel's exit status.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # as in typing, which this small process does without
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

LOOK_S = 0.2  # between two looks at the memory; a process takes about a gigabyte in that time
SAMPLE_S = 1  # between two samples in the journal
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PF_EXITING = 0x4  # of the flags in /proc/<pid>/stat
PAGE_BYTES, CLOCK_HZ = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
MB = 1e6
_LIBC = ctypes.CDLL(None)


def main(pid_path: str, command: list[str]) -> int | None:
    """Run `command` to its end, or to that of the process that started this one; the status it ended with."""
    guard()
    kernel = os.fork()
    if kernel == 0:
        try:
            become_kernel(pid_path)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execvpe(command[0], command, os.environ)
        except BaseException as error:
            print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)
    return watch(kernel, pid_path, 0)[0]


def guard() -> None:
    """Make this process the one that inherits what loses its parent below it."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def become_kernel(pid_path: str) -> None:
    """The kernel's side of the fork: a group of its own, dead when its parent is."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ["JPY_PARENT_PID"] = str(os.getppid())
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # when memory runs out, rather the kernel than the runner
    with open(pid_path, "w") as file:
        file.write(str(os.getpid()))


def watch(kernel: int, pid_path: str, lifeline: int, last_words: int | None = None) -> tuple[int | None, bool]:
    """Watch the child `kernel` to its end, or end it when it is time.

    (its status as in subprocess, whether it had a run). What comes through `last_words` says that all its code has
    ended, and is what it has used; then, if it left nothing that runs, its end is told before it is gone: to give back
    the memory of its imports takes longer than to write the report. Its caller waits for that: `end_all`.
    """
    ended, cause, begun = os.pidfd_open(kernel), "", b""
    run: _Run | None = None
    status: int | None = None
    told: dict[str, Any] | None = None
    while status is None and not cause:
        # before the run begins there is nothing to look at
        runner = [run.runner] if run and run.runner is not None else []
        words = [last_words] if last_words is not None else []
        ready = select.select([lifeline, ended, *runner, *words], [], [], LOOK_S if run else None)[0]
        if lifeline in ready:
            said = _read(lifeline)
            *lines, begun = (begun + said).split(b"\n")
            for line in lines:
                if run:
                    run.cell = int(line)
                else:
                    run = _Run(json.loads(line))
            cause = "" if said else "closed"
        if run:
            cause = "closed" if run.runner is None or run.runner in ready else cause
            cause = run.look() or cause
        status = _reap(kernel)
        if last_words in ready:
            said, last_words = _read(last_words), None
            if said and run and status is None and not cause and _tree() == [kernel]:
                status, told = 0, json.loads(said)
                break
        if run and status is None and (cause == "memory" or not is_ending(kernel)):
            run.sample(cause)
    if not told:
        last = end_all(kernel)
        status = last if status is None else status
    with contextlib.suppress(OSError):
        os.unlink(pid_path)
    if run:
        run.tell_end(status, cause, told)
        if run.is_left:
            _remove(os.path.dirname(pid_path))
    return status, run is not None


class _Run:
    """What the black box knows of the run that its kernel serves."""

    def __init__(self, asked: "dict[str, Any]"):
        self.memory_mb: float | None = asked["memory_mb"]
        self.cell: int | None = None
        self._journal: int | None = None
        self.runner: int | None = None
        with contextlib.suppress(OSError, TypeError):  # a run without a journal is watched, too
            self._journal = os.open(asked["journal"], os.O_WRONLY | os.O_APPEND)
        with contextlib.suppress(OSError):  # gone already
            self.runner = os.pidfd_open(asked["runner"])
        self._limit_mb = min(filter(None, [self.memory_mb, _machine_mb()]))
        self._oom_kills, self._next_sample = _oom_kills(), time.monotonic() + SAMPLE_S
        self._rss_mb = self._cpu_s = self._peak_mb = 0.0

    @property
    def is_left(self) -> bool:
        """Whether the runner has gone, which would have removed the kernel's folder."""
        return self.runner is None or bool(select.select([self.runner], [], [], 0)[0])

    def look(self) -> str:
        """Look at the memory; "memory" when it is too much."""
        self._rss_mb, self._cpu_s = _used()
        self._peak_mb = max(self._peak_mb, self._rss_mb)
        return "memory" if self.memory_mb and self._rss_mb > self.memory_mb else ""

    def sample(self, cause: str) -> None:
        """Once a second, and before a kernel is killed for its memory, a line in the journal."""
        if time.monotonic() >= self._next_sample or cause == "memory":
            self._next_sample = time.monotonic() + SAMPLE_S
            self._tell("sample", rss_mb=round(self._rss_mb), cpu_s=round(self._cpu_s, 2), cell=self.cell)

    def tell_end(self, status: int | None, cause: str, told: "dict[str, Any] | None") -> None:
        """`told`: what the kernel says it has used, where it is not waited for yet."""
        every = [used(resource.RUSAGE_CHILDREN), *([told] if told else [])]
        self._tell(
            "kernel_end",
            status=status,
            cause=cause,
            oom_kills=_oom_kills() - self._oom_kills,
            cpu_s=round(sum(each["cpu_s"] for each in every), 3),
            bytes_read=_sum(each["bytes_read"] for each in every),
            bytes_written=_sum(each["bytes_written"] for each in every),
            peak_memory_mb=round(max(self._peak_mb, *(each["peak_memory_mb"] for each in every))),
        )

    def _tell(self, event: str, **fields: float | str | None) -> None:
        """One line, in one write, so that the runner's lines and these never mix."""
        if self._journal is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}+00:00"
        line = json.dumps({"event": event, "t": stamp, **fields, "limit_mb": round(self._limit_mb)}) + "\n"
        with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
            os.write(self._journal, line.encode())


def used(*whose: int) -> "dict[str, Any]":
    """What this process and those that it waited for have used so far: RUSAGE_SELF, RUSAGE_CHILDREN or both."""
    usages, io = [resource.getrusage(one) for one in whose], fields("/proc/self/io")
    return {
        "cpu_s": sum(each.ru_utime + each.ru_stime for each in usages),
        # children that were waited for count as their parent's own
        "bytes_read": io.get("rchar"),
        "bytes_written": io.get("wchar"),
        "peak_memory_mb": max(each.ru_maxrss for each in usages) * 1024 / MB,
    }


def _remove(folder: str) -> None:
    """A folder of files; as far as it is there."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def _sum(numbers: "Iterable[int | None]") -> int | None:
    """Their sum; None where one of them is not known."""
    return sum(each) if None not in (each := [*numbers]) else None  # type: ignore[arg-type]


def _tree() -> list[int]:
    """Every process below this one."""
    pids, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                pids += children
                todo += children
        except OSError:  # it has just ended
            continue
    return pids


def _used() -> tuple[float, float]:
    """(resident MB, CPU seconds) of the whole tree."""
    pages = clock = 0
    for pid in _tree():
        try:
            with open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
            with open(f"/proc/{pid}/stat") as file:
                clock += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))  # its own, its children's
        except (OSError, IndexError):
            continue
    return pages * PAGE_BYTES / MB, clock / CLOCK_HZ


def is_ending(pid: int) -> bool:
    """Whether the process has begun to exit or has ended: what it still holds by then says nothing of its life."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            values = file.read().rpartition(")")[2].split()
    except OSError:
        return True
    return values[0] in "ZX" or bool(int(values[6]) & PF_EXITING)


def _reap(kernel: int) -> int | None:
    """Wait for whatever has ended; the kernel's status as in subprocess, if it is among them."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == kernel:
            status = os.waitstatus_to_exitcode(raw)


def end_all(kernel: int, within_s: float = 10) -> int | None:
    """Kill the tree until nothing is left of it; the kernel's status, if it ended here."""
    status, until = None, time.monotonic() + within_s
    while time.monotonic() < until:
        for pid in _tree():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        last = _reap(kernel)
        status = last if status is None else status
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # what had lost its parent would be a child of this process: nothing is left
            break
        time.sleep(0.005)
    return status


def _machine_mb() -> float:
    """What this process and its neighbours may take together: the container's limit or the machine's memory."""
    limits: list[int | None] = [fields("/proc/meminfo")["MemTotal"] * 1024]
    with open("/proc/self/cgroup") as file:
        for line in file.read().splitlines():
            number, controllers, path = line.split(":", 2)
            for group in {path.rstrip("/"), ""}:
                if number == "0":
                    limits.append(_number(f"/sys/fs/cgroup{group}/memory.max"))
                elif controllers == "memory":
                    limits.append(_number(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"))
    return min(filter(None, limits)) / MB


def _oom_kills() -> int:
    """How many processes the operating system has killed for memory since it started."""
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def fields(path: str) -> dict[str, int]:
    """A file of `name: number` lines."""
    try:
        with open(path) as file:
            lines = [line.split(":") for line in file]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) for name, rest in lines if rest.split() and rest.split()[0].isdigit()}


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # no such controller, or `max`
        return None


def _read(lifeline: int) -> bytes:
    try:
        return os.read(lifeline, 65536)
    except OSError:  # of a socket: reset
        return b""


if __name__ == "__main__":
    exit_status = main(sys.argv[1], sys.argv[2:])
    if exit_status is not None and exit_status < 0:  # end as the kernel did, without a core file of this process
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(-exit_status, signal.SIG_DFL) if -exit_status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -exit_status)
    sys.exit(exit_status or 0)
