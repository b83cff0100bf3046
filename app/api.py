"""The API over what is published: freshness, answers, predictions, runs and their reports.

It reads, and never starts a stage. Every error is JSON, `{"detail": "<a sentence>"}`.
"""

import contextlib
import functools
import json
import re
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import polars as pl
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException

from app.domain import CARD, NO_MODEL, model
from app.predictions import ServedModel, ShortWay
from app.rows import LIKELY_FROM, prediction_model, row_model
from app.settings import Settings
from etl.lake.snapshot import POINTER, NothingPublished
from etl.models import registry
from etl.reports import page as reports
from etl.runs import index
from etl.runs.record import STATES
from etl.serve import health as health_of_root
from etl.storage import BadRoot, Root
from pipeline import Lake, queries

BODY_LIMIT = 1_000_000  # bytes; 1,000 rows of eight columns are about a quarter of it
ITEM_LIMIT = 1000
LARGE = 20_000  # bytes of a body, about 80 rows: that many take longer than all else about a request
ROW_LIMIT = 1_000_000_000
HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-f:.]+\])(:\d+)?", re.A | re.I)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "testserver"})  # the last is Starlette's TestClient
RUN_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}-\d{8}T\d{6}-[0-9a-f]{6}")
# a report's link to another of its stage, as the files lie beside each other
BESIDE = re.compile(rb'href="\.\./\.\./[0-9-]+/([\w-]+)/report\.html"')
# A report is a notebook's output: it may neither run a script nor ask the network, nor pass for a page of this origin.
REPORT_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Problem(BaseModel):
    detail: str = Field(description="What is wrong, in a sentence")


class Health(BaseModel):
    status: Literal["up"]


class Finding(BaseModel):
    kind: str = Field(description="failed, late, up, damaged, stale, quarantine, figure or slow")
    level: Literal["bad", "warning", "note"]
    about: str = Field(description='As in "stage query", "table x", "question x"')
    sentence: str
    since: datetime | None
    link: str | None = Field(description="The report of the run it comes from")
    remedy: str | None = Field(description="What to do")


class StagesHealth(BaseModel):
    healthy: bool = Field(description="Whether no finding is bad")
    sentence: str = Field(description="All of it in one")
    findings: list[Finding] = Field(description="The worst first")


class Ready(BaseModel):
    ready: bool = Field(description="Whether a snapshot of the lake is published")
    detail: str
    missing: list[str] = Field(description="What is not published yet or cannot be used, a sentence each")
    batch: int | None = Field(description="The number of the published batch")
    as_of: datetime | None = Field(description="The time of the newest row in it")
    lag_s: float | None = Field(description="Seconds between as_of and now")


class ModelInfo(BaseModel):
    model_id: str
    run_id: str = Field(description="The run that trained it; its report is at /reports/{run_id}")
    sha256: str = Field(description="Of the stored model, checked before it is used")
    metrics: dict[str, Any] = Field(description=f"On held-out {CARD.rows}, as its training recorded them")
    features: list[str] = Field(description="What it was trained on, computed from a row's columns")


Row, Prediction = row_model(CARD), prediction_model(CARD)
ROWS = TypeAdapter(Annotated[list[Row], Field(min_length=1, max_length=ITEM_LIMIT)])
BODY_SCHEMA = {"type": "array", "items": Row.model_json_schema(), "minItems": 1, "maxItems": ITEM_LIMIT}
PREDICTIONS = TypeAdapter(list[Prediction])


class Pointer(BaseModel):
    """The current answer to a question."""

    batch: int = Field(description="The batch it was computed from")
    as_of: datetime = Field(description="The time of the newest row in that batch")
    run_id: str = Field(description="The run that computed it; its report is at /reports/{run_id}")
    rows: int
    parameters: dict[str, Any]
    file: str = Field(description="The Parquet file, relative to the root")


class QuestionInfo(BaseModel):
    question: str
    title: str
    text: str
    current: Pointer | None = Field(description="null before the first answer")


class Column(BaseModel):
    name: str
    type: str = Field(description="Polars' name of the type, such as String, Int64, Decimal(38, 4)")


class Answer(QuestionInfo):
    current: Pointer
    columns: list[Column]
    rows: list[dict[str, Any]] = Field(
        description="Column name -> value. Decimals (money) are strings, exact to the last digit; times are ISO 8601"
    )


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("Input should be a time whose year in UTC is between 1 and 9999") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
State = Literal[STATES]


class Run(BaseModel):
    run_id: str
    stage: str
    state: State
    reason: str | None = Field(description="Why it is not ok")
    scheduled_for: datetime
    started_at: datetime
    ended_at: datetime
    seconds: float
    attempt: int
    report: str = Field(description="The report's folder, relative to the root; it is served at /reports/{run_id}")
    kept: bool = Field(description="Whether the report is there: old ones that tell nothing new are removed")


class KnownHosts:
    """ASGI middleware: refuses requests for another host than those of `known_hosts`.

    Or a page anywhere could have its own name lead to this machine, and read all that is served here (DNS rebinding).
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and not self._known(Headers(scope=scope).getlist("host")):
            sentence = "this service is not known by that name; ETL_API_HOSTS lists the names it has besides localhost"
            await JSONResponse({"detail": sentence}, 400)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _known(self, asked: list[str]) -> bool:
        match = HOST.fullmatch(asked[0]) if len(asked) == 1 else None
        return match is not None and match["name"].lower() in known_hosts()


class BodyLimit:
    """ASGI middleware: refuses a request body of more than `limit` bytes, declared or counted as it comes in."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        total = 0

        async def counted() -> dict:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limit or declared.isdecimal() and int(declared) > self.limit:
                # FastAPI calls this while it reads the body, and turns other exceptions into a 400
                raise HTTPException(413, f"the body is larger than {self.limit:,} bytes")
            return message

        await self.app(scope, counted, send)


@functools.cache
def served_model(root: Root) -> ServedModel | None:
    """The model that is served of a root; None where the project has none."""
    return ServedModel(root, model.SPEC) if model else None


def _current(root: Root) -> tuple[registry.Model | None, str | None]:
    """As `ServedModel.current`; (None, None) where the project has no model."""
    served = served_model(root)
    return served.current() if served else (None, None)


@contextlib.asynccontextmanager
async def watching(_: FastAPI) -> AsyncIterator[None]:
    """While the service is up another thread looks what is published. Without a usable root each request says so."""
    global watched
    try:
        served = served_model(_root_at(settings().root))
    except BadRoot:
        yield
        return
    with served.watched() if served else contextlib.nullcontext():
        watched = served
        yield
    watched = None


watched: ServedModel | None = None  # by the service that is up

# What holds the interpreter's lock for long has threads of its own, and few: nobody else waits for one of them, and
# they keep nobody waiting for the lock. All else shares the 40 of Starlette's pool.
PREDICTING = CapacityLimiter(2)
LOOKING = CapacityLimiter(2)


@functools.cache
def settings() -> Settings:
    """Read once: it costs more than a prediction."""
    return Settings()


@functools.cache
def known_hosts() -> frozenset[str]:
    """The names by which this service may be asked: this machine's own, ETL_API_URL's and those in ETL_API_HOSTS."""
    named = [urlsplit(settings().api_url).netloc, *settings().api_hosts.split(",")]
    matches = (HOST.fullmatch(name.strip()) for name in named)
    return LOOPBACK | {match["name"].lower() for match in matches if match}


async def published_root() -> Root:
    """The root that ETL_ROOT names. Not in a thread: FastAPI would have it wait for a free one."""
    return _root_at(settings().root)


_root_at = functools.cache(Root.at)  # one object a root: the served model is kept by it
PublishedRoot = Annotated[Root, Depends(published_root)]


def _problems(**sentences: str) -> dict[int | str, dict[str, Any]]:
    """`_problems(e404="...")`: the responses that are a Problem, for the documentation."""
    return {int(code[1:]): {"model": Problem, "description": text} for code, text in sentences.items()}


def _no_page(sentence: str) -> dict[int | str, dict[str, Any]]:
    """The same for what is not JSON otherwise: FastAPI would give a Problem the type of the page."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"4XX": {"description": sentence, "content": {"application/json": {"schema": schema}}}}


app = FastAPIOffline(
    title="ETL notebooks",
    summary="What the notebooks have published: freshness, answers, predictions, runs and their reports.",
    description='Reads only, and never starts a stage. Every error is JSON: `{"detail": "<a sentence>"}`.',
    lifespan=watching,
)
app.add_middleware(BodyLimit, limit=BODY_LIMIT)
app.add_middleware(ShortWay, card=CARD, served=lambda: watched, limits=(BODY_LIMIT, ITEM_LIMIT))
app.add_middleware(KnownHosts)  # the outermost


@app.get("/health", tags=["service"])
async def health() -> Health:
    """The process is up."""
    return Health(status="up")


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
    """Whether there is something to read: 200 when a snapshot is published. Says what else is missing."""
    readiness = await to_thread.run_sync(_ready, root, limiter=LOOKING)
    response.status_code = 200 if readiness.ready else 503
    return readiness


def _ready(root: Root) -> Ready:
    missing = [f"{name} has no answer yet: run query" for name in _names() if _pointer(root, name) is None]
    _, model_problem = _current(root)
    missing += [model_problem] if model_problem else []
    try:
        snapshot = Lake(root).snapshot()
    except (NothingPublished, ValueError, KeyError) as error:
        why = str(error) if isinstance(error, NothingPublished) else f"{POINTER} is damaged: {error!r}"
        return Ready(ready=False, detail=why, missing=[why, *missing], batch=None, as_of=None, lag_s=None)
    return Ready(
        ready=True,
        detail=f"batch {snapshot.batch} is published",
        missing=missing,
        batch=snapshot.batch,
        as_of=snapshot.as_of,
        lag_s=round((datetime.now(UTC) - snapshot.as_of).total_seconds(), 1),
    )


@app.get(
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


@app.post(
    "/predict",
    tags=["model"],
    include_in_schema=model is not None,
    responses=_problems(
        e400="The body is not text, or nested too deeply",
        e413=f"The body is larger than {BODY_LIMIT:,} bytes",
        e422="A row is not what it should be; the sentence says which and why",
        e503="No model is published yet, or none can be used",
    ),
    response_model=list[Prediction],
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": BODY_SCHEMA}}}},
)
async def predict(request: Request, root: PublishedRoot) -> Response:
    """How likely each row is to be what the model predicts, in the order they were sent."""
    body = await request.body()
    limiter = PREDICTING if len(body) > LARGE else None
    answer = await to_thread.run_sync(_predict, body, request.headers.get("content-type", ""), root, limiter=limiter)
    return Response(answer, media_type="application/json")


def _predict(body: bytes, content_type: str, root: Root) -> bytes:
    """All of a prediction but the network, so that none of it holds up the event loop."""
    if model is None:
        raise HTTPException(404, NO_MODEL)
    sent = _rows(body, content_type)
    served, problem = _current(root)
    if served is None:
        raise HTTPException(503, problem)
    predictions = [
        Prediction(
            probability=probability,
            model_id=served.model_id,
            **{CARD.outcome: probability >= LIKELY_FROM},
        )
        for probability in served.predict([dict(row) for row in sent])
    ]
    return PREDICTIONS.dump_json(predictions)


def _rows(body: bytes, content_type: str) -> list[BaseModel]:
    """The rows in a request's body. Raises RequestValidationError and HTTPException 400."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.*\+)?json", kind):
        raise _refuse("content_type", "Input should be application/json", kind)
    if not body:
        raise _refuse("missing", "Field required")
    try:
        return ROWS.validate_python(json.loads(body))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError([line | {"loc": ("body", *line["loc"])} for line in errors]) from error
    except json.JSONDecodeError as error:
        raise _refuse("json_invalid", error.msg, where=(error.pos,)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body cannot be read: {error}") from error


def _refuse(kind: str, message: str, given: Any = None, where: tuple = ()) -> RequestValidationError:
    """What pydantic would say of a body that it does not get to see."""
    line = {"type": kind, "loc": ("body", *where), "msg": message, "input": given, "ctx": {"error": message}}
    return RequestValidationError([line])


@app.get("/results", tags=["results"])
def results(root: PublishedRoot) -> list[QuestionInfo]:
    """Every business question, with the pointer to its current answer."""
    return [
        QuestionInfo(question=q.name, title=q.title, text=q.text, current=_pointer(root, q.name))
        for q in queries.questions()
    ]


@app.get(
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
    asked = next((q for q in queries.questions() if q.name == question), None)
    if asked is None:
        raise HTTPException(404, f"there is no question {ascii(question)}; there are {', '.join(_names())}")
    try:
        pointer, frame = queries.current(root, question)
    except FileNotFoundError:
        raise HTTPException(404, f"{question} has no answer yet: run query") from None
    except (ValueError, TypeError, KeyError, OSError, pl.exceptions.PolarsError) as error:
        raise HTTPException(503, f"the answer to {question} cannot be read: {error}") from error
    return Answer(
        question=asked.name,
        title=asked.title,
        text=asked.text,
        current=pointer,
        columns=[Column(name=name, type=str(dtype)) for name, dtype in frame.schema.items()],
        rows=frame.head(limit or frame.height).to_dicts(),
    )


@app.get("/runs", tags=["runs"], responses=_problems(e422="A filter or the limit is not what it should be"))
def list_runs(
    root: PublishedRoot,
    stage: Annotated[str | None, Query(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", examples=["query"])] = None,
    state: State | None = None,
    since: Annotated[Moment | None, Query(description="Started at this time or later; UTC unless it says")] = None,
    until: Annotated[Moment | None, Query(description="Started before this time")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many")] = 50,
) -> list[Run]:
    """The last runs, newest first."""
    return index.newest(root, stage=stage, state=state, since=since, until=until, limit=limit)


@app.get(
    "/reports/{run_id}",
    tags=["runs"],
    response_class=HTMLResponse,
    responses=_no_page("There is no such run, or it left no page"),
)
def report(run_id: str, root: PublishedRoot) -> HTMLResponse:
    """A run's report as a page: the executed notebook, its parameters, its checks."""
    record = _run(root, run_id)
    try:
        page = reports.page_of(root, record)
    except FileNotFoundError:
        raise HTTPException(404, f"run {run_id} left no report.html") from None
    return HTMLResponse(BESIDE.sub(rb'href="/reports/\1"', page), headers=REPORT_HEADERS)


@app.get(
    "/reports/{run_id}/notebook",
    tags=["runs"],
    response_class=Response,
    responses=_no_page("There is no such run, or it left no notebook"),
)
def notebook(run_id: str, root: PublishedRoot) -> Response:
    """A run's report as the executed notebook, to download."""
    try:
        content = root.read(f"{_run(root, run_id)['report']}/report.ipynb")
    except FileNotFoundError:
        raise HTTPException(404, f"run {run_id} left no report.ipynb") from None
    headers = REPORT_HEADERS | {"Content-Disposition": f'attachment; filename="{run_id}.ipynb"'}
    return Response(content, media_type="application/x-ipynb+json", headers=headers)


@app.exception_handler(RequestValidationError)
def _refused(_: Request, error: RequestValidationError) -> JSONResponse:
    """Pydantic's list of errors as a sentence, the first five of them."""
    errors = error.errors()
    more = [f"and {len(errors) - 5} more"] if len(errors) > 5 else []
    return JSONResponse({"detail": "; ".join([*map(_sentence, errors[:5]), *more])}, 422)


@app.exception_handler(StarletteHTTPException)
def _failed(_: Request, error: StarletteHTTPException) -> JSONResponse:
    plain = {"Not Found": "there is nothing here; /docs lists what there is"}
    return JSONResponse({"detail": plain.get(error.detail, error.detail)}, error.status_code, error.headers)


@app.exception_handler(BadRoot)
def _no_root(_: Request, error: BadRoot) -> JSONResponse:
    """What ETL_ROOT names is none."""
    return JSONResponse({"detail": f"ETL_ROOT is no root: {error}"}, 503)


@app.exception_handler(Exception)
def _broke(_: Request, error: Exception) -> JSONResponse:
    """The traceback goes to the log."""
    return JSONResponse({"detail": f"the service failed ({type(error).__name__}); its log says why"}, 500)


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
