"""A host that is reached by SSH: OpenSSH's own server on loopback, with keys, port and settings of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support import free_port

from etl.storage import PROJECT

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


def keys(folder: Path) -> None:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)


def config(folder: Path, address: str, port: int, *more: str) -> Path:
    """sshd's settings, with those keys."""
    lines = [f"Port {port}", f"ListenAddress {address}", f"HostKey {folder}/host", f"PidFile {folder}/pid", *more]
    lines += [f"AuthorizedKeysFile {folder}/user.pub", "StrictModes no", "UsePAM no", "PasswordAuthentication no"]
    (folder / "sshd_config").write_text("\n".join(lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return folder / "sshd_config"


def options(folder: Path) -> list[str]:
    """Of ssh, to get in with those keys."""
    known = [f"-i{folder}/user", "-oStrictHostKeyChecking=no", f"-oUserKnownHostsFile={folder}/known"]
    return [*known, "-oLogLevel=ERROR", "-F/dev/null"]


@contextlib.contextmanager
def ssh_host(project: Path = PROJECT) -> Iterator[dict]:
    """The `machine` block that leads to it."""
    with tempfile.TemporaryDirectory(prefix="ssh-host-") as text:
        folder, port = Path(text), free_port()
        keys(folder)
        config(folder, "127.0.0.1", port)
        log = (folder / "log").open("w")
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, start_new_session=True)
        try:
            address = f"ssh://127.0.0.1:{port}"
            asked = ["ssh", "-oBatchMode=yes", *options(folder), address, "true"]
            for _ in range(100):
                if subprocess.run(asked, capture_output=True).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                raise OSError((folder / "log").read_text())
            yield {"ssh": address, "options": options(folder), "project": str(project), "python": sys.executable}
        finally:
            server.terminate()
            server.wait(10)
            log.close()
