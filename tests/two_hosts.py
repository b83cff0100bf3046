"""Two hosts and an object store on one machine: a network namespace each, a bridge between, no disk that they share.

A command on a host has its own processes, its own /dev/shm, and its own disk where the other one has another. What
is installed here is installed on both.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ssh_host import SSHD, config, keys, options
from support import s3_variables

STORE, HOSTS = "10.77.0.3", {"home": "10.77.0.1", "far": "10.77.0.2"}
AS_HOST = """set -e
mount --make-rprivate /
mount --bind "$1/$2" "$1/disk"
for other in home far; do mount -t tmpfs none "$1/$other"; done
mount -t tmpfs none /dev/shm
cd "$1/disk"
shift 2
exec "$@"
"""


def why_not() -> str:
    """Why there can be no two hosts here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if missing := [name for name in ("ip", "unshare", "ssh") if not shutil.which(name)]:
        return f"there is no {missing[0]}"
    if SSHD is None:
        return "there is no sshd"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


class TwoHosts:
    """`disk` is the folder that is another one on each; `url` the store's."""

    def __init__(self, folder: Path):
        self.folder, self.disk, self.url = folder, folder / "disk", f"http://{STORE}:9000"
        self.tag = f"etl{os.getpid()}"
        for name in ("disk", *HOSTS):
            (folder / name / "tmp").mkdir(parents=True)
        self.sshd: subprocess.Popen | None = None
        self.config = config(folder, HOSTS["far"], 22, f"SetEnv TMPDIR={self.disk}/tmp HOME={self.disk}")
        keys(folder)

    def connect(self) -> None:
        for name in ("store", *HOSTS):
            _ip("netns", "add", f"{self.tag}{name}")
            _ip("-n", f"{self.tag}{name}", "link", "set", "lo", "up")
        store = f"{self.tag}store"
        _ip("-n", store, "link", "add", "bridge", "type", "bridge")
        _ip("-n", store, "addr", "add", f"{STORE}/24", "dev", "bridge")
        _ip("-n", store, "link", "set", "bridge", "up")
        for name, address in HOSTS.items():
            host = f"{self.tag}{name}"
            _ip("-n", store, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", store, "link", "set", name, "master", "bridge", "up")
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    def disconnect(self) -> None:
        for name in ("store", *HOSTS):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", f"{self.tag}{name}")

    def on(self, name: str, *command: str | Path) -> list:
        """The command line that runs it on a host; who kills its process kills all that it started there."""
        inside = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["bash", "-c", f"hostname {name}\n{AS_HOST}", "host", self.folder, name]
        return ["ip", "netns", "exec", f"{self.tag}{name}", *inside, *script, *command]

    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "PREFECT_", "AWS_"))}
        here = {"TMPDIR": f"{self.disk}/tmp", "HOME": str(self.disk), "COLUMNS": "200"}
        return kept | s3_variables(self.url) | here

    def boot_far(self) -> None:
        command = self.on("far", SSHD, "-D", "-e", "-f", self.config)
        log = (self.folder / "sshd.log").open("a")
        self.sshd = subprocess.Popen(command, stderr=log, stdout=log, env={"PATH": os.environ["PATH"]})

    def kill_far(self) -> None:
        assert self.sshd
        kill(self.sshd)

    def cut_off_far(self, is_cut: bool) -> None:
        _ip("-n", f"{self.tag}store", "link", "set", "far", "down" if is_cut else "up")

    def machine(self, project: Path) -> dict:
        """The `machine` block that leads from home to the other."""
        asked = ["-oConnectTimeout=5", *options(self.folder)]
        return {
            "ssh": f"ssh://{HOSTS['far']}:22",
            "options": asked,
            "project": str(project),
            "python": sys.executable,
            "secrets": [*s3_variables("")],
            "silence": "6 seconds",
        }


def kill(process: subprocess.Popen) -> None:
    """It, and whatever it started on its host: `ip` became `unshare`, whose child is the first process there."""
    process.send_signal(signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """At work, a bucket in the store."""
    hosts = TwoHosts(folder)
    store = None
    try:
        hosts.connect()
        inside = ["ip", "netns", "exec", f"{hosts.tag}store"]
        server = [sys.executable, "-m", "moto.server", "-H", STORE, "-p", "9000"]
        store = subprocess.Popen([*inside, *server], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        make = "import boto3; boto3.client('s3').create_bucket(Bucket='hosts')"
        for _ in range(120):
            done = subprocess.run([*inside, sys.executable, "-c", make], env=hosts.variables(), capture_output=True)
            if done.returncode == 0:
                break
            time.sleep(0.5)
        hosts.boot_far()
        yield hosts
    finally:
        for process in filter(None, (hosts.sshd, store)):
            kill(process)
        hosts.disconnect()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
