"""A machine of Coiled's that commands are run on by SSH: paramiko's server on loopback, and Docker played in a folder.

    python tests/coiled_home.py FOLDER [up]   the commands of `deploy`, one after the other; prints what came of each

The project is the working folder, a copy that may be changed. `/scratch` is a folder below FOLDER. Unless `up` is asked
for, what is run there says only that it beats.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import paramiko
from coiled_machines import begin
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from etl.storage import Root

TOKEN = 'it\'s $HOME; "and" `more`'  # noqa: S105 - of which a shell would make something else
BEAT = """import json, os, sys, time
from datetime import UTC, datetime
from etl.storage import Root
assert sys.argv[1:4] == ["orchestrate.py", "up", "--env"], sys.argv
since = str(time.time())
while True:
    told = {"at": datetime.now(UTC).isoformat(), "since": since, "expected_since": since, "pid": os.getpid()}
    told |= {"host": "there", "env": sys.argv[4], "machine": "there", "token": os.environ["ETL_API_TOKEN"]}
    told |= {"listens": os.environ["ETL_API_HOST"], "folder": os.getcwd()}
    Root.at(sys.argv[6]).write("services/heartbeat.json", json.dumps(told).encode())
    time.sleep(1)
"""
DOCKER = """import os, subprocess, sys
words = sys.argv[1:]
if words[0] == "inspect":
    print('["tini", "-g", "--", "env"]')
    sys.exit()
variables, folder, is_detached, at = dict(os.environ), None, False, 1
while words[at].startswith("-"):
    if words[at] == "--workdir":
        folder, at = words[at + 1], at + 1
    elif words[at] == "--env":
        name, _, value = words[at + 1].partition("=")
        variables |= {name: value} if "=" in words[at + 1] else {}
        at += 1
    is_detached |= words[at] == "--detach"
    at += 1
assert words[at] == "tmp-dask-1", words
out = open(os.path.join(folder, "log"), "ab")
child = subprocess.Popen(words[at + 1 :], cwd=folder, env=variables, stdout=out, stderr=out, start_new_session=True)
print(child.pid, file=open(os.path.join(folder, "pids"), "a"))
sys.exit(0 if is_detached else child.wait())
"""


class Host:
    """Its disk is `folder`, of which /scratch is a part."""

    def __init__(self, folder: Path, python: str):
        self.folder = folder
        self.scratch, self.bin = folder / "disk", folder / "bin"
        self.scratch.mkdir(parents=True)
        self.bin.mkdir()
        programs = {"docker": DOCKER, "sudo": "import os, sys\nos.execvp(sys.argv[1], sys.argv[1:])"}
        for name, text in programs.items():
            self._program(name, f"#!{sys.executable}\n{text}")
        self._program("python", python)
        self.key = paramiko.RSAKey.generate(2048)
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.socket.getsockname()[1]}"

    def _program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def here(self, text: str) -> str:
        return text.replace("/scratch", str(self.scratch)).replace("/proc/1/fd/1", str(self.folder / "docker.log"))

    def _accept(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            transport = paramiko.Transport(connection)
            transport.add_server_key(self.key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files, host=self)
            transport.start_server(server=Session(self))

    def end(self) -> None:
        """As a machine ends: whatever runs there is gone."""
        with contextlib.suppress(OSError):
            for pid in (self.scratch / "pids").read_text().split():
                os.killpg(int(pid), signal.SIGKILL)


class Session(paramiko.ServerInterface):
    def __init__(self, host: Host):
        self.host = host

    def get_allowed_auths(self, username):
        return "publickey"

    def check_auth_publickey(self, username, key):
        return paramiko.AUTH_SUCCESSFUL if username == "ubuntu" else paramiko.AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel, command):
        threading.Thread(target=self._run, args=(channel, self.host.here(command.decode())), daemon=True).start()
        return True

    def _run(self, channel, command: str) -> None:
        for script in self.host.scratch.rglob("*.sh"):  # their paths are those of the machine
            script.write_text(self.host.here(script.read_text()))
        path = f"{self.host.bin}:/usr/local/bin:/usr/bin:/bin"
        variables = {name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "PYTHON"))}
        variables |= {"PATH": path, "HOME": str(self.host.folder)}
        done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, stdin=subprocess.DEVNULL)
        channel.sendall(done.stdout)
        channel.sendall_stderr(done.stderr)
        channel.send_exit_status(done.returncode)
        channel.close()


class Files(paramiko.SFTPServerInterface):
    def __init__(self, server, *arguments, host: Host, **named):
        super().__init__(server, *arguments, **named)
        self.host = host

    def _path(self, path: str) -> Path:
        return Path(self.host.here(path))

    def stat(self, path):
        try:
            return paramiko.SFTPAttributes.from_stat(self._path(path).stat())
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)

    lstat = stat

    def chattr(self, path, attr):
        if attr.st_mode is not None:
            self._path(path).chmod(attr.st_mode & 0o777)
        return paramiko.SFTP_OK

    def open(self, path, flags, attr):
        path = self._path(path)
        handle = paramiko.SFTPHandle(flags)
        handle.writefile = handle.readfile = path.open("w+b")
        return handle


BLOCK = """\
root: s3://machines/home
deploy:
  vm_type: t3.medium
  software: etl
  port: 8000
  subdomain: ours
  tags: {bill: etl}
  secrets: [ETL_API_TOKEN]
"""


def key() -> str:
    """A private one, as Coiled makes it."""
    made = Ed25519PrivateKey.generate()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    return made.private_bytes(*form).decode()


class Play:
    """Commands, one after the other: of each its exit status, the last line it said, the machines that are open."""

    def __init__(self, folder: Path, is_real: bool):
        from etl.serve import deployed

        self.project, self.folder = deployed.PROJECT, folder
        self.python = f"#!/bin/sh\nexec {sys.executable} " + ('"$@"' if is_real else f'-c {shlex.quote(BEAT)} "$@"')
        self.plane, self.hosts, self.told = begin(is_apart=False), {}, {}
        self.plane.ssh = self.ssh
        deployed.LOOK_S = 0.2

    def ssh(self, number: int) -> dict:
        if number not in self.hosts:
            self.hosts[number] = host = Host(self.folder / f"host-{number}", self.python)
            self.plane.clusters[number].on_end = host.end
        return {"scheduler_address_to_use": self.hosts[number].address, "private_key": key()}

    def run(self, name: str, *arguments: str) -> None:
        from orchestrate import app

        done = CliRunner().invoke(app, ["deploy", *arguments])
        lines = [line for line in done.output.splitlines() if line.strip() and not line.startswith("Exit: ")]
        self.told[name] = [done.exit_code, lines[-1], self.plane.open()]
        print(f"--- {name}: {done.exit_code}", *lines, sep="\n", file=sys.stderr, flush=True)
        if done.exc_info and done.exc_info[0] is not SystemExit:
            traceback.print_exception(*done.exc_info)

    def play(self) -> dict:
        home = self.project / "params" / "env" / "home.yml"
        home.write_text(BLOCK)
        self.run("no secret")
        os.environ["ETL_API_TOKEN"] = TOKEN
        self.run("status of none", "--status")
        self.run("deployed")
        wanted = self.plane.clusters[1].wanted
        self.run("again")
        with (self.project / "notebooks" / "query.ipynb").open("a") as file:
            file.write("\n")  # what is released of a notebook is as it was
        self.run("status of saved", "--status")
        with (self.project / "app" / "dashboard.py").open("a") as file:
            file.write("# changed\n")
        self.run("status of changed", "--status")
        self.run("changed")
        beat = json.loads(Root.at("s3://machines/home").read("services/heartbeat.json"))
        self.run("stopped", "--stop")
        self.run("status of stopped", "--status")
        return {"told": self.told, "wanted": wanted, "beat": beat, "token": TOKEN}


if __name__ == "__main__":
    print(json.dumps(Play(Path(sys.argv[1]), sys.argv[2:] == ["up"]).play()))
    sys.stdout.flush()
    os._exit(0)  # the client's threads would be waited for
