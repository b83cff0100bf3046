"""Predictions the short way: a body of plain rows goes from the socket to the model and back in one step.

What comes whole and is small the server has answered before anything else sees it (`Straight`); what is larger, or has
to wait for its turn, a layer around the application answers (`ShortWay`). What is odd about a request, and what is
wrong with it, is left to the route that is documented: it is handed on as it came, and would answer with the same
numbers.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from app.front import Entrance, Message, Pace, again, refuse
from app.rows import LIKELY_FROM
from etl.models import registry
from etl.models.card import Card
from etl.models.rows import Decoder
from etl.storage import Root

LOOK_S = 1  # between two looks at the pointer
REST_S = 30  # at most, while what it names cannot be used
TURN = 200_000  # bytes of bodies, and EACH for each of them, before the loop looks who else asks for something: 2 ms
EACH = 10_000
WAITING = 1000  # requests at once for predictions that wait for their turn
PATHS = ("/predict", "/v1/predict")
JSON = (b"application/json", b"application/json; charset=utf-8")


class ServedModel:
    """The model that predictions come from: the published one, or the last good one while that cannot be used."""

    def __init__(self, root: Root, spec: registry.Spec):
        self.root, self.spec = root, spec
        self.model: registry.Model | None = None
        self._problem: str | None = None
        self._looking = threading.Lock()
        self._mark: str | None = None  # of the pointer to the model that is served
        self._ended: threading.Event | None = None  # of the watch, while there is one

    def current(self) -> tuple[registry.Model | None, str | None]:
        """The model, and what is wrong with the published one: None when nothing is. Safe in threads."""
        if not self.is_watched:
            self.look()
        return self.model, self._problem

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks for another one, so that requests need not."""
        return self._ended is not None

    def look(self) -> None:
        """Take up what is published since. What is wrong with that is tried again the next time."""
        if self._looking.acquire(blocking=self.model is None):  # while one loads, others go on with what is there
            try:
                self._problem = self._look()
            finally:
                self._looking.release()

    def _look(self) -> str | None:
        try:
            mark = registry.mark(self.root)
            if mark is None or mark != self._mark:
                self.model = registry.load_current(self.root, self.spec)
                self._mark = mark
        except Exception as error:  # whatever it is, of the files or of where they are, what is loaded still predicts
            if self.model is not None:
                return f"the published model cannot be used, {self.model.model_id} still is: {error}"
            return str(error) if isinstance(error, registry.NoModel) else f"the published model cannot be used: {error}"
        return None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For the length of the block another thread looks for another one, every second."""
        self.look()
        self._ended = ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="published model", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            self._ended = None
            thread.join()

    def _watch(self, ended: threading.Event) -> None:
        wait_s: float = LOOK_S
        while not ended.wait(wait_s):
            began = time.monotonic()
            self.look()
            # to load what is damaged costs: it is looked at the less often the longer it is
            wait_s = min(2 * wait_s, REST_S) if self._problem and self.model else LOOK_S
            wait_s = max(wait_s, 3 * (time.monotonic() - began))


class Busy(Exception):
    """So many requests wait for predictions that another one would wait too long."""


class Turns:
    """The loop's own work, predictions, a few at a time: whatever else came in is seen to between two turns."""

    def __init__(self) -> None:
        self._pace = Pace(TURN)
        self.waiting = 0
        self._taken, self._is_counted = 0, False  # by those who did not wait, since the loop came round

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """For the length of the block one more waits. Raises Busy when there are too many."""
        if self.waiting >= WAITING:
            raise Busy(f"{WAITING} requests wait for their predictions already; try again in a second")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def come(self, size: int) -> None:
        """Wait for a turn with room left. `size`: bytes of the body."""
        await self._pace.come(EACH + size)

    def take(self, size: int) -> bool:
        """Whether there is room for a body without a turn. Of few requests the loop is not asked to come round."""
        if self.waiting or self._taken > TURN:
            return False
        self._taken += EACH + size
        if self._taken > TURN / 2 and not self._is_counted:
            self._is_counted = True
            asyncio.get_running_loop().call_soon(self._came_round)
        return True

    def _came_round(self) -> None:
        self._taken, self._is_counted = 0, False


class Plain:
    """From the body of a plain request to that of its answer."""

    def __init__(self, card: Card, served: Callable[[], ServedModel | None], most: int):
        """`served`: the model that is watched, None while none is. `most`: rows of a body."""
        self._served, self._encode, self._decoder = served, _encoder(card), None
        with suppress(ValueError):  # a column is no number: such rows go the long way
            self._decoder = Decoder(card.row, most)

    def answer(self, body: bytes) -> bytes | None:
        """None where the long way has to say what is wrong, or do it."""
        served = self._served()
        model = served.model if served else None
        columns = self._decoder.decode(body) if model and self._decoder else None
        if model is None or columns is None:
            return None
        try:
            probabilities = model.predict_columns(columns)
        except Exception:  # the long way meets it, too, and tells
            return None
        return self._encode(probabilities, model.model_id)


class Straight:
    """What the server asks before it hands a small request on, as `etl.serve.web` says."""

    urls = frozenset(path.encode() for path in PATHS)

    def __init__(self, entrance: Entrance, plain: Plain, turns: Turns):
        self.entrance, self.plain, self.turns = entrance, plain, turns

    def answer(self, scope: Message, headers: dict[bytes, bytes], body: bytes) -> tuple[bytes, bytes] | None:
        """Lines of the head and the body of the answer; None when the application has to see the request."""
        began, known = time.perf_counter(), self.entrance.known
        if (
            known.rate  # which counts it
            or headers.get(b"content-type", b"").lower() not in JSON
            or known.refusal(scope, headers)
            or not self.turns.take(len(body))
            or (answer := self.plain.answer(body)) is None
        ):
            return None
        request_id = self.entrance.id_of(headers)
        self.entrance.write_down(scope, request_id, 200, time.perf_counter() - began, len(answer))
        return b"content-type: application/json\r\nx-request-id: " + request_id + b"\r\n", answer


class ShortWay:
    """ASGI middleware: answers plain requests for predictions, and hands all else on as it came.

    The layer around it has seen to it that a body comes whole, in one message."""

    def __init__(self, app: Any, plain: Plain, turns: Turns):
        self.app, self.plain, self.turns = app, plain, turns

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS or not _is_plain(scope):
            await self.app(scope, receive, send)
            return
        message = await receive()
        try:
            with self.turns.admitted():
                body = message.get("body", b"")
                await self.turns.come(len(body))
                answer = self.plain.answer(body)
        except Busy as error:
            await refuse(send, 503, str(error))
            return
        if answer is None:
            await self.app(scope, again(message, receive), send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def _is_plain(scope: Message) -> bool:
    """Whether a request has nothing besides rows as JSON."""
    kinds = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] == "POST" and not scope["query_string"] and len(kinds) == 1 and kinds[0] in JSON


def _encoder(card: Card) -> Callable[[list[float], str], bytes]:
    """The answer's bytes, of probabilities and the model's id."""
    kind = msgspec.defstruct(
        "Predicted", [("probability", float), ("outcome", bool), ("model_id", str)], rename={"outcome": card.outcome}
    )
    encode = functools.partial(msgspec.json.Encoder().encode)
    return lambda probabilities, model_id: encode([kind(p, p >= LIKELY_FROM, model_id) for p in probabilities])
