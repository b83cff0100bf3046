"""JupyterLab for one notebook: on this machine alone, behind a token, with the code of one folder."""

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from etl.kernels import client
from etl.kernels.children import start
from etl.serve.services import answers

START_S = 60  # for it to answer
END_S = 10  # for its kernels to end
UNASKED = ("panel.io.jupyter_server_extension", "notebook_shim")  # of its server; Panel's takes a second
OPTIONS = (
    "--ip=127.0.0.1",
    "--port=8888",  # or the next that is free
    "--no-browser",
    "--allow-root",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=None",  # else its page asks whether news are wanted
    # whether its page has to be built anew, which only whoever changes JupyterLab asks
    "--ServerApp.tornado_settings={'page_config_data': {'buildAvailable': False, 'buildCheck': False}}",
    *(f"--ServerApp.jpserver_extensions={name}=False" for name in UNASKED),
)


class Lab:
    """A server of the folder that a notebook is in. `code`: where its kernel imports from; it runs in the folder
    `notebooks` there, as a run does."""

    def __init__(self, notebook: Path, code: Path):
        self._notebook, self._code, self._own = notebook, code, notebook.parent / ".jupyter"
        self._token, self._url = secrets.token_hex(24), ""

    def start(self) -> None:
        """Raises RuntimeError when it does not answer."""
        folder, runtime = self._notebook.parent, self._own / "runtime"
        runtime.mkdir(parents=True)
        env = client.variables(self._code)
        env |= {"JUPYTER_TOKEN": self._token, "JUPYTER_RUNTIME_DIR": str(runtime), "ETL_CHARTS": "plotly"}
        env |= {"JUPYTER_DEFAULT_PROVISIONER_NAME": "forked-kernel"}
        folders = [f"--ServerApp.root_dir={folder}", f"--MappingKernelManager.root_dir={self._code / 'notebooks'}"]
        command = [sys.executable, "-m", "jupyterlab", *OPTIONS, *folders, f"--LabApp.workspaces_dir={self._own}"]
        self._process = start(command, env, None, self._own / "log")
        until = time.monotonic() + START_S
        while not (self._url and answers(f"{self._url}/api")):
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"JupyterLab does not answer: {self._own / 'log'} says why")
            time.sleep(0.05)
            for told in runtime.glob("jpserver-*.json"):
                with contextlib.suppress(ValueError):  # it is being written
                    self._url = json.loads(told.read_text())["url"].rstrip("/")

    def page(self, cell: str | None) -> str:
        """Where the notebook is, its token in it. `cell`: the id of the one that is gone to."""
        fragment = f"#cell-id={quote(cell)}" if cell else ""
        return f"{self._url}/lab/tree/{quote(self._notebook.name)}?token={self._token}{fragment}"

    def run_before(self, cell: str) -> None:
        """Start the notebook's kernel, and have it run the cells before one, as far as none of them fails."""
        cells = json.loads(self._notebook.read_text())["cells"]
        before = cells[: next(n for n, other in enumerate(cells) if other.get("id") == cell)]
        sources = ["".join(other["source"]) for other in before if other["cell_type"] == "code"]
        name = self._notebook.name
        asked = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
        headers = {"Authorization": f"token {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/api/sessions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            kernel = json.load(answer)["kernel"]["id"]
        asyncio.run(self._run(kernel, sources))

    async def _run(self, kernel: str, sources: list[str]) -> None:
        from tornado.httpclient import HTTPRequest
        from tornado.websocket import websocket_connect

        url = f"ws{self._url.removeprefix('http')}/api/kernels/{kernel}/channels"
        socket = await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {self._token}"}))
        for source in sources:
            header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "", "username": ""}
            content = {"code": source, "silent": False, "store_history": True, "stop_on_error": True}
            message: dict[str, Any] = {"header": header, "content": content, "parent_header": {}, "metadata": {}}
            await socket.write_message(json.dumps(message | {"channel": "shell"}))
        left = len(sources)
        while left and (said := await socket.read_message()) is not None:
            left -= json.loads(said)["header"]["msg_type"] == "execute_reply" if isinstance(said, str) else 0
        socket.close()
        while await socket.read_message() is not None:  # until the server has closed it too
            pass

    def wait(self) -> int:
        """Until it ends; its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """End it and its kernels."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
