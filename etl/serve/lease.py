"""One `up` a root. Whoever comes second is told who is at work, since when, and where its pages are.

It holds two leases (etl.leases): one on the folder of the services on this machine, and where the root is in an object
store one there, so that there is none on another machine either.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etl import leases
from etl.storage import LocalRoot, Root

PLACE = "services/up.lease"
HOLDER = "`up`"


class Held(RuntimeError):
    """Another `up` is at work; the message says which."""


class Lease:
    """Held from `take` to `release`. `lost` says who has it, when another has taken it over."""

    def __init__(self, folder: Path, root: Root, pages: dict[str, str], on_lost: Callable[[], None]):
        """`folder`: of the services on this machine; `pages`: name -> URL; `on_lost` is called in a thread."""
        self._folder, self._root, self._pages, self._on_lost = folder, root, pages, on_lost
        self._held = contextlib.ExitStack()
        self.lost: str | None = None
        self.after_death = False  # whether the last one here did not give it back

    def take(self) -> None:
        """Raises Held, or OSError when the root cannot be reached."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.ExitStack() as held:
                here = held.enter_context(leases.of_file(str(self._folder / "up.json"), HOLDER, wait_s=0))
                here.tell(pages=self._pages)
                if not isinstance(self._root, LocalRoot):
                    there = held.enter_context(leases.in_store(self._root, PLACE, HOLDER, wait_s=0))
                    there.on_lost = self._lose
                    there.tell(pages=self._pages)
                self.after_death, self._held = here.after_death, held.pop_all()
        except leases.LeaseHeld as error:
            raise Held(self._sentence(error.document)) from None

    def release(self) -> None:
        """Let go of it. A root that is down lets the document die."""
        with contextlib.suppress(Exception):
            self._held.close()

    def _lose(self) -> None:
        document: Mapping[str, Any] = {}
        with contextlib.suppress(Exception):
            document = self._root.read_json(PLACE) or {}
        self.lost = self._sentence(document)
        self._on_lost()

    def _sentence(self, document: Mapping[str, Any]) -> str:
        pages = document.get("about", {}).get("pages", {})
        if not document.get("holder") or not pages:
            return "another `up` is starting here"
        return (
            f"`up` is at work on {self._root.url} already: process {document['pid']} on {document['host']}, since "
            f"{document['since']}; its pages: {', '.join(f'{name} {url}' for name, url in pages.items())}"
        )


def pages(folder: Path) -> dict[str, str]:
    """Where the pages of the `up` are that holds the lease in `folder`, name -> URL; none when nobody does."""
    try:
        document = json.loads((folder / "up.json").read_text())
        return dict(document["about"]["pages"]) if document["holder"] and leases.is_alive(document) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
