"""What changes under a root, looked at once a process, however many pages are open.

A page is drawn from a `View` and again when there is one with another token: so an idle page costs next to nothing.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.domain import model
from etl.findings import may_be_damage
from etl.lake import snapshot
from etl.models import registry
from etl.runs import journal, releases
from etl.serve import health
from etl.storage import Root
from pipeline import Lake, queries

LOOK_S = 2  # between two looks, at the least
WATCHED = (releases.TOLD, snapshot.POINTER, *((registry.ALIASES,) if model else ()))  # besides what health reads


@dataclass(frozen=True)
class View:
    """A root as it was looked at. `token` is another one when a page would show something else.

    `under_way`: the runs of this root that are at work on this machine.
    """

    token: str
    at: datetime
    seen: health.Seen
    findings: Sequence[health.Finding]
    under_way: Sequence[dict[str, Any]]


class Poller:
    """Looks at a root when it is asked, and not more often than every LOOK_S seconds."""

    def __init__(self, root: Root, clock: Callable[[], float] = time.monotonic):
        self._root, self._clock = root, clock
        self._reader = health.Reader(root, Lake(root), queries.questions())
        self._looking = threading.Lock()
        self._view: View | None = None
        self._looked_at = 0.0

    def view(self) -> View:
        """The newest. While another thread looks nobody waits for it, but for the first time."""
        if self._looking.acquire(blocking=self._view is None):
            try:
                if self._view is None or self._clock() - self._looked_at >= LOOK_S:
                    self._view = self._look()
                    self._looked_at = self._clock()
            finally:
                self._looking.release()
        assert self._view, "the first look was waited for"
        return self._view

    def _look(self) -> View:
        now, seen = datetime.now(UTC), self._reader.seen()
        findings = health.findings(now, seen)
        under_way = [run for run in journal.live() if run["root"] == self._root.url]
        beat = {name: value for name, value in (seen.beat or {}).items() if name != "at"}
        parts = (
            f"{now:%Y%m%d%H%M}",  # ages are told in minutes
            *((finding.key, finding.since) for finding in findings),
            *(run["run_id"] for run in seen.runs),
            *((run["run_id"], run["cell"]) for run in under_way),
            *beat.items(),
            *(self._bytes(path) for path in WATCHED),
        )
        token = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return View(token, now, seen, findings, under_way)

    def _bytes(self, path: str) -> bytes:
        try:
            return self._root.read(path)
        except FileNotFoundError:
            return b""
        except BaseException as error:  # whoever shows it says so
            if not may_be_damage(error):
                raise
            return repr(error).encode()


_pollers: dict[str, Poller] = {}
_making = threading.Lock()


def view(root: Root) -> View:
    """A root as it is now."""
    with _making:
        if root.url not in _pollers:
            _pollers[root.url] = Poller(root)
    return _pollers[root.url].view()
