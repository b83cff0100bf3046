"""A receiver of alerts on loopback, as Apprise's json:// posts them."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Receiver:
    """`posts`: what was taken, in order. `takes` is asked for each post whether it is."""

    url: str = ""
    posts: list[dict] = field(default_factory=list)
    takes: Callable[[dict], bool] = lambda post: True

    @property
    def titles(self) -> list[str]:
        return [post["title"] for post in self.posts]


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    """One that serves until the end."""
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            post = json.loads(self.rfile.read(int(self.headers["content-length"])))
            taken = received.takes(post)
            if taken:
                received.posts.append(post)
            self.send_response(200 if taken else 503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    received.url = f"json://127.0.0.1:{server.server_port}/hook"
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
