"""The dashboard as a web application: Streamlit's own, with its files compressed, and at work before the first visit.

python -m streamlit run app/web.py
"""

import asyncio
import gc
import gzip
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from streamlit.starlette import App
from streamlit.watcher.polling_path_watcher import PollingPathWatcher

log = logging.getLogger(__name__)
FILES = "/static/"  # Streamlit's own: each has a name of its content, and a browser asks for it once
PACKED = frozenset({"gif", "png", "woff2"})  # already
Message = dict[str, Any]


class Compressed:
    """ASGI middleware: each of the FILES is compressed when it is first asked for, and kept for all who ask later.

    Streamlit compresses none of them, as it would each time. A first visit was sent 9.7 MB.
    """

    def __init__(self, app: Any):
        self.app = app
        self._kept: dict[str, tuple[Message, bytes]] = {}

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith(FILES) or path.rpartition(".")[2] in PACKED:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_whole = scope["method"] == "GET" and not headers.keys() & {b"range", b"if-none-match", b"if-modified-since"}
        if not is_whole or b"gzip" not in headers.get(b"accept-encoding", b""):
            await self.app(scope, receive, send)
            return
        if path not in self._kept:
            start, body = await self._answer(scope, receive)
            if b"immutable" not in dict(start["headers"]).get(b"cache-control", b""):
                await _sent(send, start, body)  # no file: its name may be any
                return
            self._kept[path] = await asyncio.to_thread(_compressed, start, body)
        await _sent(send, *self._kept[path])

    async def _answer(self, scope: Message, receive: Any) -> tuple[Message, bytes]:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        return messages[0], b"".join(message.get("body", b"") for message in messages[1:])


def _compressed(start: Message, body: bytes) -> tuple[Message, bytes]:
    body = gzip.compress(body, mtime=0)
    others = [header for header in start["headers"] if header[0] not in (b"content-length", b"accept-ranges")]
    about = [(b"content-encoding", b"gzip"), (b"vary", b"Accept-Encoding"), (b"content-length", b"%d" % len(body))]
    return start | {"headers": [*others, *about]}, body


async def _sent(send: Any, start: Message, body: bytes) -> None:
    await send(start)
    await send({"type": "http.response.body", "body": body})


def warm() -> None:
    """Import what pages are drawn with, and look at the root. Each of the collections of garbage that follow every look
    of every page then passes over all of that."""
    try:
        import_module("app.dashboard")
        import_module("app.shown").view()
    except BaseException as error:  # whoever visits is told
        log.warning("the dashboard is not warm: %s", error)
    gc.collect()
    gc.freeze()


def look_at_settings_once() -> None:
    """Streamlit looks for changes of three files of settings, whether they are there or not, five times a second each:
    most of what the process took while no page was open."""
    PollingPathWatcher._schedule = lambda self: None  # type: ignore[method-assign]


@asynccontextmanager
async def started(_: App) -> AsyncIterator[None]:
    """Warm meanwhile."""
    look_at_settings_once()
    threading.Thread(target=warm, name="warm", daemon=True).start()
    yield


served = App(Path(__file__).with_name("dashboard.py"), lifespan=started, middleware=[Middleware(Compressed)])
