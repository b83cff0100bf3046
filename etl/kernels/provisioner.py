"""A kernel that was there before it was asked for, as jupyter_client knows kernels.

JupyterLab and Papermill use it without knowing, for every Python notebook, when they run with

    JUPYTER_DEFAULT_PROVISIONER_NAME=forked-kernel

Whenever no fork server can help they get the kernel that they would have got anyway.
"""

import json
import os
import sys
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from etl.kernels import client


class ForkedKernel(LocalProvisioner):
    """Hands out a forked kernel in place of this interpreter's own; any other, and after a restart, is spawned."""

    forked: client.Forked | None = None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        # a restarted kernel has to listen where the one before did, as its clients stay connected
        if not self.connection_info and self._is_native():
            env = dict(kwargs.get("env") or os.environ)
            forked = client.take(env | {"PYTHONPATH": client.python_path(env)})
            if forked and await forked.begin(env, kwargs.get("cwd") or os.getcwd(), journal=None, memory_mb=None):
                self.forked = forked
                return {**kwargs, "cmd": []}
        return await super().pre_launch(**kwargs)

    def _is_native(self) -> bool:
        named = getattr(self.parent, "kernel_name", None) == NATIVE_KERNEL_NAME
        return named and self.kernel_spec.argv[0] in ("python", "python3", sys.executable)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        if self.forked is None or self.connection_info:
            return await super().launch_kernel(cmd, **kwargs)
        self.process = self.forked  # type: ignore[assignment]  # which has all that is asked of a Popen
        self.pid = self.forked.pid
        self.pgid, self.cwd = self.pid, kwargs.get("cwd")
        info = json.loads((self.forked.folder / "kernel.json").read_text())
        self.connection_info = info | {"key": info["key"].encode()}
        return self.connection_info

    async def cleanup(self, restart: bool = False) -> None:
        await super().cleanup(restart)
        if self.forked and not restart:
            self.forked.close()
