"""Prefect's server for this machine alone: `python -m etl.serve.prefect_server --port N`, as `prefect server start` is.

A browser on this machine also runs the pages of others. Such a page may send a request anywhere, whatever CORS says of
the answer, and by a name of its own that leads here (DNS rebinding) it may even read that. So only requests to a name
of this machine are served, and of those that say which page they come from only those of a page of this server.
Prefect itself has the first part of that: PREFECT_SERVER_CORS_ALLOWED_ORIGINS.
"""

import argparse
import json
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "::1")
HOSTS = "ETL_PREFECT_HOSTS"  # the variable with other names that lead here by the operator's will, with commas between


class LocalOnly:
    """ASGI middleware. `names` are those that a server here may be called by, whatever the port (of a tunnel, say)."""

    def __init__(self, app: Any, names: Iterable[str] = NAMES):
        self.app, self.names = app, frozenset(names)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        refused = scope["type"] in ("http", "websocket") and self.refusal(dict(scope["headers"]))
        if not refused:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"detail": refused}).encode()})

    def refusal(self, headers: dict[bytes, bytes]) -> str:
        """Why a request with these headers is not served; "" when it is."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        here, page = _address(f"//{host}"), _address(origin)
        if here[0] not in self.names:
            return f"{host[:99]!r} is no name of this server; {HOSTS} names others that are"
        if origin and page != here and not (page[0] in self.names and page[1] == here[1]):
            return f"a page of {origin[:99]} may not use this server"
        return ""


def _address(url: str) -> tuple[str | None, int | None]:
    """(name in lower case, port) of a URL; (None, None) of what is none."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def main() -> None:
    import uvicorn
    from prefect.server.api.server import create_app

    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--port", type=int, required=True)
    port = arguments.parse_args().port
    names = [name.strip().lower() for name in os.environ.get(HOSTS, "").split(",")]
    # around it and not in it: Prefect's own services call the application in this process, by another name
    app = LocalOnly(create_app(final=True), [*NAMES, *filter(None, names)])
    uvicorn.run(app, host=HOST, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
