"""The heartbeat of `up`: who is at work on a root, with which code, and what runs next, for whoever reads the root.

`services/heartbeat.json` is written every BEAT_S seconds for as long as the loop of `up` goes round.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from etl.leases import machine, started
from etl.runs.record import now
from etl.storage import Damaged, Root

if TYPE_CHECKING:
    from etl.runs.releases import Tree

log = logging.getLogger(__name__)
PLACE = "services/heartbeat.json"
BEAT_S = 10


class Heart:
    """Beats for `up`, as one of what it keeps alive. `tree` is the code that runs; nothing is written before it is set.

    A root that is down is a warning, and holds up nobody: it is written to in a thread.
    """

    name = "heartbeat"
    process = None

    def __init__(
        self, root: Root, pages: Mapping[str, str], reports_url: str, ill: Callable[[], list[dict[str, str]]] = list
    ):
        """`pages`: name -> URL; `reports_url`: under which reports are served; `ill` gives what of its services does
        not work: name, why, since."""
        self._root, self._thread, self._next = root, threading.Thread(), 0.0
        self.tree: Tree | None = None
        self._ill = ill
        began = now()
        self._told = {
            **{"pid": os.getpid(), "started": started(os.getpid()), "machine": machine(), "host": socket.gethostname()},
            **{"since": began, "expected_since": began, "pages": dict(pages), "reports_url": reports_url},
        }
        self._is_first, self._is_down = True, False

    def ensure(self) -> None:
        """Called by the loop, every second. Never raises."""
        if self.tree and time.monotonic() >= self._next and not self._thread.is_alive():
            self._next = time.monotonic() + BEAT_S
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def signal(self, number: int) -> None:
        """It has no process."""

    def end(self) -> None:
        """Say that `up` ended, and was not killed."""
        if self.tree:
            self._thread.join(BEAT_S)
            self._beat(ended=True)

    def _beat(self, ended: bool = False) -> None:
        try:
            if self._is_first:
                before = read(self._root)
                if before and not before.get("ended_at"):  # it died: what was expected of it is expected still
                    self._told["expected_since"] = before["expected_since"]
                self._is_first = False
            self._root.write(PLACE, json.dumps(self._document() | ({"ended_at": now()} if ended else {})).encode())
            self._is_down = False
        except Exception as error:  # what a store other than S3 raises need be no OSError
            if not self._is_down:
                log.warning("the heartbeat cannot be written: %s", error)
            self._is_down = True

    def _document(self) -> dict[str, Any]:
        assert self.tree, "ensure looked"
        at, release, project = datetime.now(UTC), self.tree.release, self.tree.project
        return self._told | {
            "at": now(),
            "release": release.id if release else None,
            "env": project.environment.name,
            "ill": self._ill(),
            "next_runs": {
                name: due.isoformat() for name, stage in project.stages.items() if (due := stage.next_run(at))
            },
        }


def read(root: Root) -> dict[str, Any] | None:
    """What an `up` wrote last, its times still text; None where never one was. Raises Damaged."""
    told = root.read_json(PLACE)
    if told is not None and not {"at", "since", "expected_since", "pid", "host", "env"} <= told.keys():
        raise Damaged(f"{PLACE} is damaged: it is no heartbeat")
    return told


def end(root: Root) -> None:
    """Say of an `up` whose machine was taken from it that it ended, as was meant."""
    told = read(root)
    if told and not told.get("ended_at"):
        root.write(PLACE, json.dumps(told | {"ended_at": now()}).encode())
