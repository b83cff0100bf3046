"""What the service takes and answers, as its documentation shows it."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from app.domain import CARD
from app.rows import explained_model, prediction_model, row_model
from etl.runs.record import STATES

ITEM_LIMIT = 1000  # rows in a request


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


class ModelListed(ModelInfo):
    is_current: bool = Field(description="Whether predictions come from it")
    aliases: list[str] = Field(description="champion: the published one; previous, challenger, shadow")


Row, Prediction = row_model(CARD), prediction_model(CARD)
Explained = explained_model(Prediction)
WHOLE = TypeAdapter(list[dict[str, Any]])  # rows of an answer, its decimals as text
ROWS = TypeAdapter(Annotated[list[Row], Field(min_length=1, max_length=ITEM_LIMIT)])
BODY_SCHEMA = {"type": "array", "items": Row.model_json_schema(), "minItems": 1, "maxItems": ITEM_LIMIT}
PREDICTIONS, EXPLAINED = TypeAdapter(list[Prediction]), TypeAdapter(list[Explained])


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
