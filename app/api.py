"""The API over what is published: freshness, answers, predictions, runs and their reports.

It reads, and never starts a stage. Every error is JSON, `{"detail": "<a sentence>"}`.
"""

import asyncio
import contextlib
import functools
import html
import io
import itertools
import json
import logging
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import polars as pl
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from app import metrics, pages
from app.domain import CARD, NO_MODEL, model
from app.front import HERE, LOOPBACK, Entrance, Front, Known
from app.predictions import PATHS, Busy, Plain, ServedModel, ShortWay, Straight, Turns
from app.rows import LIKELY_FROM
from app.schemas import (
    BODY_SCHEMA,
    EXPLAINED,
    ITEM_LIMIT,
    PREDICTIONS,
    ROWS,
    WHOLE,
    Answer,
    Column,
    Explained,
    Health,
    ModelInfo,
    ModelListed,
    Moment,
    Pointer,
    Prediction,
    Problem,
    QuestionInfo,
    Ready,
    Row,
    Run,
    StagesHealth,
    State,
)
from app.settings import Settings
from etl.lake.snapshot import POINTER, NothingPublished
from etl.models import registry, scores
from etl.reports import page as reports
from etl.reports import pdf as printer
from etl.runs import index
from etl.serve import health as health_of_root
from etl.storage import BadRoot, Damaged, Root
from pipeline import TITLE, Lake, queries

log = logging.getLogger(__name__)
BODY_LIMIT = 1_000_000  # bytes; 1,000 rows of eight columns are about a quarter of it
LARGE = 20_000  # bytes of a body, about 80 rows: that many take longer than all else about a request
ROW_LIMIT = 1_000_000_000
SHOWN = 5  # errors of a request
FRESH_S, KEPT_S = 1, 10  # how old what was seen of the root may be: to be seen anew behind an answer, and before it
ASKED_S = 300  # without anybody who asks, after which nothing is looked at
READERS = 4  # threads for all that is read of the root
STAGE = r"^[A-Za-z][A-Za-z0-9_-]{0,99}$"
Code = Annotated[Literal["yes", "no"], Query(description="no: for readers who do not code")]
LISTED = 100  # runs on the page of all reports
RUN_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}-\d{8}T\d{6}-[0-9a-f]{6}")
# a report's link to another of its stage, as the files lie beside each other
BESIDE = re.compile(rb'href="\.\./\.\./[0-9-]+/([\w-]+)/report\.html"')
# A report is a notebook's output: it may neither run a script nor ask the network, nor pass for a page of this origin.
REPORT_HEADERS = {
    "Content-Security-Policy": "sandbox allow-downloads; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


def _parquet(frame: pl.DataFrame) -> bytes:
    frame.write_parquet(buffer := io.BytesIO())
    return buffer.getvalue()


FILES: dict[str, tuple[str, Callable[[pl.DataFrame], bytes]]] = {
    "csv": ("text/csv; charset=utf-8", lambda frame: frame.write_csv().encode()),
    "parquet": ("application/vnd.apache.parquet", _parquet),
    "json": ("application/json", lambda frame: WHOLE.dump_json(frame.to_dicts())),
}


@functools.cache
def served_model(root: Root) -> ServedModel | None:
    """The model that is served of a root; None where the project has none."""
    return ServedModel(root, model.SPEC) if model else None


def _current(root: Root) -> tuple[registry.Model | None, str | None]:
    """As `ServedModel.current`; (None, None) where the project has no model."""
    served = served_model(root)
    return served.current() if served else (None, None)


class Readiness:
    """What a root has, looked at in a thread of its own. Nobody waits while the last look is KEPT_S old at most."""

    def __init__(self, root: Root):
        self.root = root
        self._seen: tuple[float, Ready] | None = None
        self._looking = ThreadPoolExecutor(1, "readiness")
        self._look: Future[Ready] | None = None
        self._asked = -math.inf

    async def now(self) -> Ready:
        self.ask()
        if self._look and (self._seen is None or self._age > KEPT_S):
            return await asyncio.shield(asyncio.wrap_future(self._look))
        return self._said()

    def ask(self) -> None:
        """Somebody was told, or is to be: the next one is told of a look that is not older than FRESH_S by much."""
        self._asked = time.monotonic()
        self._look_again(FRESH_S)

    def known(self) -> Ready | None:
        """What may be told without a look; None when that is too old, or nobody has asked for long."""
        if time.monotonic() - self._asked > ASKED_S:
            return None
        self._look_again(KEPT_S / 2)
        return self._said() if self._seen and self._age <= KEPT_S else None

    @property
    def _age(self) -> float:
        return time.monotonic() - self._seen[0] if self._seen else math.inf

    def _said(self) -> Ready:
        seen = self._seen[1]
        return seen.model_copy(update={"lag_s": _lag_s(seen.as_of)})

    def _look_again(self, after_s: float) -> None:
        if self._age > after_s and (self._look is None or self._look.done()):
            self._look = self._looking.submit(self._see)

    def _see(self) -> Ready:
        ready = _ready(self.root)
        self._seen = time.monotonic(), ready
        return ready

    def close(self) -> None:
        self._looking.shutdown(wait=False)


class Apart:
    """What the door of the service answers, whatever the service is at, to whom the entrance would have let in."""

    def __init__(self) -> None:
        self.known: Known | None = None  # of the service that is up

    def answers(self) -> dict[str, dict[str, Any]]:
        if self.known is None:
            return {}
        names, own = sorted(self.known.hosts), {"names": sorted(LOOPBACK), "clients": sorted(HERE)}
        answers = {"/health": {"names": names, "body": UP.model_dump_json(), "silent": json.dumps({"detail": SILENT})}}
        said = readiness.known() if readiness and not self.known.rate else None  # which counts requests
        if said:
            token = self.known.token.decode()
            who = {"names": names, "authorization": f"Bearer {token}"} if token else own
            silent = said.model_copy(update={"ready": False, "detail": SILENT, "missing": [SILENT]})
            body = {"status": 200 if said.ready else 503, "body": said.model_dump_json()}
            answers["/ready"] = body | {"silent": silent.model_dump_json()} | who
        return answers

    def write_down(self, path: str, client: str, id: str, status: int, took: float, sent: int) -> None:
        scope = {"path": path, "method": "GET", "query_string": b"", "client": (client, 0)}
        ENTRANCE.write_down(scope, id.encode(), status, took, sent)
        if path == "/ready" and readiness:
            readiness.ask()


@contextlib.asynccontextmanager
async def watching(_: FastAPI) -> AsyncIterator[None]:
    """While the service is up another thread looks what is published. Without a usable root each request says so."""
    global watched, readiness
    to_thread.current_default_thread_limiter().total_tokens = READERS
    APART.known = Known(settings())
    with contextlib.ExitStack() as ending:
        ending.callback(ENTRANCE.end)
        try:
            root = _root_at(settings().root)
        except BadRoot:
            yield
            return
        served = served_model(root)
        with served.watched() if served else contextlib.nullcontext():
            watched, readiness = served, Readiness(root)
            yield
            readiness.close()
        watched = readiness = APART.known = None


watched: ServedModel | None = None  # by the service that is up
readiness: Readiness | None = None

# What holds the interpreter's lock for long has threads of its own, and few: nobody else waits for one of them, and
# they keep nobody waiting for the lock.
PREDICTING = CapacityLimiter(2)
PREDICTING_FEW = CapacityLimiter(2)
PRINTING = CapacityLimiter(1)
LOOKING = CapacityLimiter(2)
TURNS = Turns()
UP = Health(status="up")
SILENT = "the service hangs: its process is there, but has answered nobody for some seconds"
APART = Apart()
REQUESTS = metrics.Requests((*PATHS, "/health", "/ready"))


@functools.cache
def settings() -> Settings:
    """Read once: it costs more than a prediction."""
    return Settings()


async def published_root() -> Root:
    """The root that ETL_ROOT names. Not in a thread: FastAPI would have it wait for a free one."""
    return _root_at(settings().root)


_root_at = functools.cache(Root.at)  # one object a root: the served model is kept by it
PublishedRoot = Annotated[Root, Depends(published_root)]


def _problems(**sentences: str) -> dict[int | str, dict[str, Any]]:
    """`_problems(e404="...")`: the responses that are a Problem, for the documentation."""
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {int(code[1:]): {"description": text, "content": schema} for code, text in sentences.items()}


ALWAYS = _problems(
    e400="The request cannot be understood, or is not addressed to this service",
    e401="The token is missing, or another",
    e403="The service has no token, and does not answer other machines without one",
    e408="The request did not arrive in time",
    e413=f"The body is larger than {BODY_LIMIT:,} bytes",
    e429="The client asks more often than it may; `Retry-After` says when to try again",
    e500="The service failed; its log says why",
    e431="The request has too much besides its body",
    e503="Too much is asked at once, and `Retry-After` says when to try again; or what is asked for cannot be used",
)
app = FastAPIOffline(
    title="ETL notebooks",
    summary="What the notebooks have published: freshness, answers, predictions, runs and their reports.",
    description='Reads only, and never starts a stage. Every error is JSON: `{"detail": "<a sentence>"}`. '
    "Paths that begin with `/v1` are there without it as well.",
    lifespan=watching,
    redirect_slashes=False,  # it would lead to wherever the Host header says
    responses=ALWAYS,
    dependencies=[Security(HTTPBearer(auto_error=False, description="ETL_API_TOKEN, where the service has one"))],
)
ENTRANCE, PLAIN = Entrance(lambda: settings(), REQUESTS), Plain(CARD, lambda: watched, ITEM_LIMIT)
app.add_middleware(ShortWay, plain=PLAIN, turns=TURNS)
app.add_middleware(Front, entrance=ENTRANCE, limit=BODY_LIMIT)  # the outermost
app.state.apart = APART
app.state.straight = Straight(ENTRANCE, PLAIN, TURNS)
api = APIRouter()


@app.get("/", tags=["service"], response_class=HTMLResponse, responses={200: {"description": "A page"}})
async def what_there_is() -> HTMLResponse:
    """What there is to ask for, as a page."""
    requests = [
        (method.upper(), path, said["description"].partition("\n")[0])
        for path, methods in app.openapi()["paths"].items()
        for method, said in methods.items()
    ]
    links = [("reports", "Reports by stage and day"), ("health/stages", "Health"), ("docs", "How all is asked")]
    links += [("openapi.json", "the same for programs")]
    links += [(url, "Dashboard")] if (url := settings().dashboard_url) else []
    anchors = " · ".join(f'<a href="{html.escape(address)}">{text}</a>' for address, text in links)
    questions = [(q.name, q.title) for q in queries.questions()]
    return HTMLResponse(pages.home(TITLE, questions, requests, anchors), headers=pages.HEADERS)


# with the model FastAPI writes the schema that all others refer to; for what is no JSON it would name another type
@app.get("/health", tags=["service"], responses={500: {"model": Problem, "description": "The service failed"}})
async def health() -> Health:
    """The process is up."""
    return UP


@app.get("/health/stages", tags=["service"])
async def stages_health(root: PublishedRoot) -> StagesHealth:
    """Whether what is under the root is healthy: what failed last, is late or damaged. As `orchestrate.py status`."""
    return StagesHealth(**await to_thread.run_sync(_stages_health, root, limiter=LOOKING))


def _stages_health(root: Root) -> dict[str, Any]:
    with _looking_at_stages:  # one read serves all who wait
        return health_of_root.as_json(health_of_root.findings(datetime.now(UTC), _reader_of(root).seen()))


_looking_at_stages = threading.Lock()


@functools.cache
def _reader_of(root: Root) -> health_of_root.Reader:
    return health_of_root.Reader(root, Lake(root), queries.questions())


@app.get("/ready", tags=["service"], responses={503: {"model": Ready, "description": "Nothing is published yet"}})
async def ready(root: PublishedRoot, response: Response) -> Ready:
    """Whether there is something to read: 200 when a snapshot is published. Says what else is missing.

    What was seen in the last ten seconds is answered without another look."""
    said = await _readiness(root)
    response.status_code = 200 if said.ready else 503
    return said


@app.get(
    "/metrics",
    tags=["service"],
    response_class=PlainTextResponse,
    responses={200: {"description": "Prometheus' text format"}},
)
async def measured(root: PublishedRoot) -> Response:
    """Requests and how long they took, the model that is served, its age and drift, how far the lake is behind."""
    said = await _readiness(root)
    served, problem = await to_thread.run_sync(_current, root, limiter=LOOKING)
    drift = await to_thread.run_sync(_drift, root, limiter=LOOKING)
    return Response(metrics.written(REQUESTS, served, problem, said, drift), media_type=CONTENT_TYPE_LATEST)


def _drift(root: Root) -> pl.DataFrame | None:
    try:
        return scores.drift(root)
    except (Damaged, OSError) as error:
        log.warning("how far the models drift cannot be read: %s", error)
        return None


async def _readiness(root: Root) -> Ready:
    if readiness and readiness.root is root:
        return await readiness.now()
    return await to_thread.run_sync(_ready, root, limiter=LOOKING)


def _lag_s(as_of: datetime | None) -> float | None:
    return round((datetime.now(UTC) - as_of).total_seconds(), 1) if as_of else None


def _ready(root: Root) -> Ready:
    missing = [f"{name} has no answer yet: run query" for name in _names() if _pointer(root, name) is None]
    _, model_problem = _current(root)
    missing += [model_problem] if model_problem else []
    try:
        snapshot = Lake(root).snapshot()
    except Exception as error:  # whatever it is of, there is nothing to read
        why = str(error) if isinstance(error, NothingPublished) else f"{POINTER} is damaged: {error!r}"
        return Ready(ready=False, detail=why, missing=[why, *missing], batch=None, as_of=None, lag_s=None)
    return Ready(
        ready=True,
        detail=f"batch {snapshot.batch} is published",
        missing=missing,
        batch=snapshot.batch,
        as_of=snapshot.as_of,
        lag_s=_lag_s(snapshot.as_of),
    )


@api.get(
    "/model",
    tags=["model"],
    include_in_schema=model is not None,
    responses=_problems(e404="No model is published yet, or none can be used"),
)
def current_model(root: PublishedRoot) -> ModelInfo:
    """The model that predictions come from."""
    served, problem = _current(root)
    if served is None:
        raise HTTPException(404, problem or NO_MODEL)
    return ModelInfo(
        model_id=served.model_id,
        run_id=served.run_id,
        sha256=served.sha256,
        metrics=served.metrics,
        features=served.features,
    )


@api.get("/models", tags=["model"], include_in_schema=model is not None)
def models(root: PublishedRoot) -> list[ModelListed]:
    """The models that are kept, newest first, as each was stored, with their aliases."""
    served, _ = _current(root)
    current = served and served.model_id
    return [ModelListed(**said, is_current=said["model_id"] == current) for said in registry.listed(root)]


@api.post(
    "/predict",
    tags=["model"],
    include_in_schema=model is not None,
    responses=_problems(
        e400="The body is not text, or nested too deeply; or the request is not addressed to this service",
        e422="A row is not what it should be; the sentence says which and why",
    ),
    response_model=list[Explained] | list[Prediction],
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": BODY_SCHEMA}}}},
)
async def predict(
    request: Request,
    root: PublishedRoot,
    explain: Annotated[bool, Query(description="Whether to say what each feature adds")] = False,
) -> Response:
    """How likely each row is to be what the model predicts, in the order they were sent."""
    body = await request.body()
    limiter = PREDICTING if len(body) > LARGE or explain else PREDICTING_FEW
    kind = request.headers.get("content-type", "")
    try:
        with TURNS.admitted():
            answer = await to_thread.run_sync(_predict, body, kind, root, explain, limiter=limiter)
    except Busy as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
    return Response(answer, media_type="application/json")


def _predict(body: bytes, content_type: str, root: Root, explain: bool) -> bytes:
    """All of a prediction but the network, so that none of it holds up the event loop."""
    if model is None:
        raise HTTPException(404, NO_MODEL)
    sent = [dict(row) for row in _rows(body, content_type)]
    served, problem = _current(root)
    if served is None:
        raise HTTPException(503, problem)

    def of(probability: float) -> dict[str, Any]:
        return {"probability": probability, CARD.outcome: probability >= LIKELY_FROM, "model_id": served.model_id}

    if explain:
        every = served.explain(sent)
        return EXPLAINED.dump_json([Explained(**of(p), base=base, contributions=added) for p, added, base in every])
    return PREDICTIONS.dump_json([Prediction(**of(probability)) for probability in served.predict(sent)])


def _rows(body: bytes, content_type: str) -> list[Row]:
    """The rows in a request's body. Raises RequestValidationError, of the first few errors, and HTTPException 400."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.*\+)?json", kind):
        raise _refuse("content_type", "Input should be application/json", kind)
    if not body:
        raise _refuse("missing", "Field required")
    try:
        given = json.loads(body)
    except json.JSONDecodeError as error:
        raise _refuse("json_invalid", error.msg, where=(error.pos,)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body cannot be read: {error}") from error
    errors: list[dict[str, Any]] = []
    if not (isinstance(given, list) and 0 < len(given) <= ITEM_LIMIT):
        errors, given = _errors(ROWS.validate_python, given), []
    rows = []
    for number, row in enumerate(given):  # not all at once: other threads have their turn in between
        if isinstance(row, dict) and len(row) > 2 * len(Row.model_fields) + SHOWN:
            row = _narrowed(row)
        try:
            rows.append(Row.model_validate(row))
        except ValidationError:
            errors += _errors(Row.model_validate, row, number)
            if len(errors) > SHOWN:
                break
    if errors:
        given = row = None  # or the error keeps all of it until somebody looks for garbage
        raise RequestValidationError(errors)
    return rows


def _errors(validate: Any, given: Any, *where: int) -> list[dict[str, Any]]:
    try:
        validate(given)
    except ValidationError as error:
        return [line | {"loc": ("body", *where, *line["loc"])} for line in error.errors(include_url=False)]
    return []


def _narrowed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its columns and a few of all the others: there would be an error for each."""
    others = (name for name in row if name not in Row.model_fields)
    return {name: row[name] for name in row if name in Row.model_fields} | {
        name: row[name] for name in itertools.islice(others, SHOWN + 1)
    }


def _refuse(kind: str, message: str, given: Any = None, where: tuple = ()) -> RequestValidationError:
    """What pydantic would say of a body that it does not get to see."""
    line = {"type": kind, "loc": ("body", *where), "msg": message, "input": given, "ctx": {"error": message}}
    return RequestValidationError([line])


@api.get("/results", tags=["results"])
def results(root: PublishedRoot) -> list[QuestionInfo]:
    """Every business question, with the pointer to its current answer."""
    return [
        QuestionInfo(question=q.name, title=q.title, text=q.text, current=_pointer(root, q.name))
        for q in queries.questions()
    ]


@api.get(
    "/results/{question}.{form}",
    tags=["results"],
    response_class=Response,
    responses={200: {"description": "The file"}}
    | _problems(e404="There is no such question, or no answer to it yet", e422="There are no such files"),
)
def result_as_file(
    question: Annotated[str, Path(examples=[q.name for q in queries.questions()[:1]])],
    form: Literal["csv", "parquet", "json"],
    root: PublishedRoot,
) -> Response:
    """The current answer to a question as a file, all of it: exact, as CSV, Parquet, or a JSON array of its rows."""
    _, _, frame = _answer(root, question)
    headers = {"Content-Disposition": f'attachment; filename="{question}.{form}"'}
    return Response(FILES[form][1](frame), media_type=FILES[form][0], headers=headers)


@api.get(
    "/results/{question}",
    tags=["results"],
    responses=_problems(
        e404="There is no such question, or no answer to it yet",
        e422=f"The limit is not a whole number from 1 to {ROW_LIMIT:,}",
    ),
)
def result(
    question: Annotated[str, Path(examples=[q.name for q in queries.questions()[:1]])],
    root: PublishedRoot,
    limit: Annotated[int | None, Query(ge=1, le=ROW_LIMIT, description="At most so many rows, from the first")] = None,
) -> Answer:
    """The current answer to a question. Money is exact: decimals come as strings."""
    asked, pointer, frame = _answer(root, question)
    return Answer(
        question=asked.name,
        title=asked.title,
        text=asked.text,
        current=pointer,
        columns=[Column(name=name, type=str(dtype)) for name, dtype in frame.schema.items()],
        rows=frame.head(limit or frame.height).to_dicts(),
    )


def _answer(root: Root, question: str) -> tuple[Any, Any, pl.DataFrame]:
    """A question, the pointer to its current answer, and that. Raises HTTPException."""
    asked = next((q for q in queries.questions() if q.name == question), None)
    if asked is None:
        raise HTTPException(404, f"there is no question {ascii(question)}; there are {', '.join(_names())}")
    try:
        return asked, *queries.current(root, question)
    except FileNotFoundError:
        raise HTTPException(404, f"{question} has no answer yet: run query") from None
    except (ValueError, TypeError, KeyError, OSError, pl.exceptions.PolarsError) as error:
        raise HTTPException(503, f"the answer to {question} cannot be read: {error}") from error


@api.get("/runs", tags=["runs"], responses=_problems(e422="A filter or the limit is not what it should be"))
def list_runs(
    root: PublishedRoot,
    stage: Annotated[str | None, Query(pattern=STAGE, examples=["query"])] = None,
    state: State | None = None,
    since: Annotated[Moment | None, Query(description="Started at this time or later; UTC unless it says")] = None,
    until: Annotated[Moment | None, Query(description="Started before this time")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many")] = 50,
) -> list[Run]:
    """The last runs, newest first."""
    return index.newest(root, stage=stage, state=state, since=since, until=until, limit=limit)


@api.get(
    "/reports",
    tags=["runs"],
    response_class=HTMLResponse,
    responses={200: {"description": "A page"}} | _problems(e422="There is no such day, or can be no such stage"),
)
def list_reports(
    root: PublishedRoot,
    stage: Annotated[str, Query(pattern=f"^$|{STAGE}")] = "",
    day: Annotated[str, Query(pattern=r"^$|^\d{4}-\d\d-\d\d$", description="UTC")] = "",
    search: Annotated[str, Query(max_length=200, description="In a run's id, its state or its reason")] = "",
) -> HTMLResponse:
    """The reports by stage and day, and the last of those that are searched for, as a page."""
    today = datetime.now(UTC).date()
    try:
        since = datetime.fromisoformat(day).replace(tzinfo=UTC) if day else None
    except ValueError:
        raise HTTPException(422, f"query.day: there is no day {ascii(day)}") from None
    between = {"since": since, "until": since + timedelta(days=1)} if since else {}
    runs = index.newest(root, stage=stage or None, search=search, limit=LISTED, **between)
    days = index.by_day(root, today - timedelta(days=pages.DAYS - 1))
    asked = {"stage": stage, "day": day, "search": search}
    return HTMLResponse(pages.reports(TITLE, days, runs, asked, today), headers=pages.HEADERS)


@api.get(
    "/reports/{run_id}",
    tags=["runs"],
    response_class=HTMLResponse,
    responses=_problems(e404="There is no such run, or it left no page", e422="There can be no such run"),
)
def report(run_id: str, root: PublishedRoot, code: Code = "yes") -> HTMLResponse:
    """A run's report as a page: what came of it, the executed notebook, its parameters, its checks."""
    record = _run(root, run_id)
    page = _page(root, record, code, _bar(record, code))
    return HTMLResponse(BESIDE.sub(rb'href="\1"', page), headers=REPORT_HEADERS)


def _page(root: Root, record: dict[str, Any], code: str, links: list[tuple[str, str]]) -> bytes:
    """A run's report.html with these links in its bar. Raises HTTPException 404."""
    try:
        page = reports.page_of(root, record, lambda: index.before(root, record))
    except FileNotFoundError:
        raise HTTPException(404, f"run {record['run_id']} left no report.html") from None
    page = reports.served(page, links)
    return reports.without_code(page) if code == "no" else page


@api.get(
    "/reports/{run_id}/pdf",
    tags=["runs"],
    response_class=Response,
    responses={200: {"description": "The report", "content": {"application/pdf": {}}}}
    | _problems(
        e404="There is no such run, or it left no page",
        e422="There can be no such run",
        e501="No browser that prints is installed where the service runs",
    ),
)
async def pdf(run_id: str, root: PublishedRoot, code: Code = "yes") -> Response:
    """A run's report as a PDF, which takes seconds to print: one at a time."""
    if PRINTING.available_tokens < 1:
        raise HTTPException(503, "a report is being printed already; try again in a few seconds", {"Retry-After": "5"})
    return await to_thread.run_sync(_printed, run_id, root, code, limiter=PRINTING)


def _printed(run_id: str, root: Root, code: str) -> Response:
    try:
        content = printer.printed(_page(root, _run(root, run_id), code, []))
    except printer.NoBrowser as error:
        raise HTTPException(501, str(error)) from None
    except printer.NotPrinted as error:
        raise HTTPException(503, str(error)) from None
    headers = REPORT_HEADERS | {"Content-Disposition": f'attachment; filename="{run_id}.pdf"'}
    return Response(content, media_type="application/pdf", headers=headers)


def _bar(record: dict[str, Any], code: str) -> list[tuple[str, str]]:
    """Where a report leads to, beside it: (words, address). What came after it is looked up when that is asked."""
    run_id, stage, asked = record["run_id"], record["stage"], "?code=no" if code == "no" else ""
    led = [("← previous", f"{run_id}/previous"), ("next →", f"{run_id}/next")]
    led += [("latest", f"{stage}/latest"), ("last ok", f"{stage}/latest-ok")]
    switch = ("with code", run_id) if asked else ("without code", f"{run_id}?code=no")
    links = [*((text, f"{address}{asked}") for text, address in led), switch, ("notebook", f"{run_id}/notebook")]
    links += [("PDF", f"{run_id}/pdf{asked}")] if printer.browser() else []
    links += [("all reports", "../reports")]
    return links + ([("dashboard", url)] if (url := settings().dashboard_url) else [])


@api.get(
    "/reports/{run_id}/notebook",
    tags=["runs"],
    response_class=Response,
    responses=_problems(e404="There is no such run, or it left no notebook", e422="There can be no such run"),
)
def notebook(run_id: str, root: PublishedRoot) -> Response:
    """A run's report as the executed notebook, to download."""
    try:
        content = root.read(f"{_run(root, run_id)['report']}/report.ipynb")
    except FileNotFoundError:
        raise HTTPException(404, f"run {run_id} left no report.ipynb") from None
    headers = REPORT_HEADERS | {"Content-Disposition": f'attachment; filename="{run_id}.ipynb"'}
    return Response(content, media_type="application/x-ipynb+json", headers=headers)


Stage = Annotated[str, Path(pattern=STAGE, examples=["query"])]
LED = {307: {"description": "The run's report is where `Location` says"}} | _problems(
    e404="There is no such run whose report is kept", e422="There can be no such stage, or no such time"
)


@api.get("/reports/{stage}/latest", tags=["runs"], status_code=307, response_class=RedirectResponse, responses=LED)
def latest(stage: Stage, root: PublishedRoot, code: Code = "yes") -> RedirectResponse:
    """Leads to the report of a stage's last run."""
    return _led(root, "..", stage, code)


@api.get("/reports/{stage}/latest-ok", tags=["runs"], status_code=307, response_class=RedirectResponse, responses=LED)
def latest_ok(stage: Stage, root: PublishedRoot, code: Code = "yes") -> RedirectResponse:
    """Leads to the report of a stage's last run that was ok."""
    return _led(root, "..", stage, code, state="ok")


@api.get("/reports/{stage}/as-of/{at}", tags=["runs"], status_code=307, response_class=RedirectResponse, responses=LED)
def as_of(
    stage: Stage,
    at: Annotated[Moment, Path(description="UTC unless it says")],
    root: PublishedRoot,
    code: Code = "yes",
) -> RedirectResponse:
    """Leads to the report of a stage's last run that had begun at a time."""
    with contextlib.suppress(OverflowError):  # nothing begins at the end of time
        at += timedelta(microseconds=1)
    return _led(root, "../..", stage, code, until=at)


@api.get("/reports/{run_id}/previous", tags=["runs"], status_code=307, response_class=RedirectResponse, responses=LED)
def previous(run_id: str, root: PublishedRoot, code: Code = "yes") -> RedirectResponse:
    """Leads to the report of the stage's run before; of the first, to all reports of the stage."""
    return _beside(root, run_id, code, after=False)


@api.get("/reports/{run_id}/next", tags=["runs"], status_code=307, response_class=RedirectResponse, responses=LED)
def following(run_id: str, root: PublishedRoot, code: Code = "yes") -> RedirectResponse:
    """Leads to the report of the stage's next run; of the last, to all reports of the stage."""
    return _beside(root, run_id, code, after=True)


def _beside(root: Root, run_id: str, code: str, after: bool) -> RedirectResponse:
    record = _run(root, run_id)
    run = index.beside(root, record, after)
    return RedirectResponse(_address("..", run, code) if run else f"../../reports?stage={record['stage']}")


def _led(root: Root, up: str, stage: str, code: str, **asked: Any) -> RedirectResponse:
    """To a report's page, which is `up` from here; no whole address, for a proxy may have another."""
    for run in index.newest(root, stage=stage, limit=50, **asked):
        if run["kept"]:
            return RedirectResponse(_address(up, run, code))
    raise HTTPException(404, f"no report is kept of such a run of {stage}; /runs?stage={stage} lists them")


def _address(up: str, run: dict[str, Any], code: str) -> str:
    return f"{up}/{run['run_id']}{'?code=no' if code == 'no' else ''}"


app.include_router(api, prefix="/v1")
app.include_router(api, include_in_schema=False)  # as they were called before there were versions


@app.exception_handler(RequestValidationError)
def _refused(_: Request, error: RequestValidationError) -> JSONResponse:
    """Pydantic's list of errors as a sentence, the first SHOWN of them."""
    errors = error.errors()
    more = ["and more"] if len(errors) > SHOWN else []
    return JSONResponse({"detail": "; ".join([*map(_sentence, errors[:SHOWN]), *more])}, 422)


@app.exception_handler(StarletteHTTPException)
def _failed(_: Request, error: StarletteHTTPException) -> JSONResponse:
    plain = {"Not Found": "there is nothing here; /docs lists what there is"}
    return JSONResponse({"detail": plain.get(error.detail, error.detail)}, error.status_code, error.headers)


@app.exception_handler(BadRoot)
def _no_root(_: Request, error: BadRoot) -> JSONResponse:
    """What ETL_ROOT names is none."""
    return JSONResponse({"detail": f"ETL_ROOT is no root: {error}"}, 503)


def _sentence(error: dict[str, Any]) -> str:
    """ "body[3].price: Input should be less than or equal to 1, not 7"; whatever was sent is shown in ASCII."""
    start, *rest = error["loc"]
    if error["type"] == "json_invalid":
        return f"{start} is not JSON: {error['ctx']['error']} at character {rest[0]}"
    where = start + "".join(f"[{part}]" if isinstance(part, int) else f".{ascii(part)[1:-1]}" for part in rest)
    message, given = error["msg"].removeprefix("Value error, "), ascii(error["input"])
    shown = error["type"] not in ("missing", "too_short", "too_long") and len(given) < 60
    return f"{where}: {message}" + (f", not {given}" if shown else "")


def _names() -> list[str]:
    return [question.name for question in queries.questions()]


def _pointer(root: Root, question: str) -> dict[str, Any] | None:
    """The pointer to the current answer; None when there is none, or it cannot be read."""
    try:
        return Pointer.model_validate_json(root.read(f"results/{question}/current.json")).model_dump()
    except (OSError, ValueError):
        return None


def _run(root: Root, run_id: str) -> dict:
    """A run's record. Raises HTTPException 404; an id of another form never reaches the storage."""
    try:
        if not RUN_ID.fullmatch(run_id):
            raise KeyError(run_id)
        return index.get(root, run_id)
    except KeyError:
        raise HTTPException(404, f"there is no run {ascii(run_id)}; /runs lists them") from None
