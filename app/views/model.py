"""The model: how good it is beside the best it could be, over time; how it does on what came since; a prediction."""

import json
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

import polars as pl
import streamlit as st

from app import markup, shown
from app.domain import CARD, NO_MODEL, model
from app.settings import Settings
from etl import charts
from etl.figures import figure
from etl.models import registry, scores
from etl.storage import Root

ASK_S = 10  # for an answer of the API
MODELS = 12  # in the table, the newest
ACROSS = 4  # fields in a row


def page() -> None:
    """All of it."""
    st.title("Model", anchor=False)
    if model is None:
        st.info(shown.heading(NO_MODEL) + ".")
        return
    root, token = shown.published_root(), shown.view().token
    st.caption(CARD.text)
    with shown.panel("The model", ["the model"]):
        if registry.mark(root):
            champion(registry.current(root))
        else:
            st.info(f"There is no model yet: `train` publishes one as soon as there are enough {CARD.rows}.")
    with shown.panel("The models so far"):
        over_time(models(root.url, token))
    with shown.panel("How it does on what came since", remedy="run the stage that scores, which tells it anew"):
        since(root)
    with shown.panel("A prediction"):
        predicted()


def champion(published: dict[str, Any]) -> None:
    """The figures of the published model beside what they are compared with; `published`: its pointer."""
    metrics, run_id = published["metrics"], published["run_id"]
    chart, figures = st.columns([3, 2])
    with chart.container(border=True, height="stretch"):
        strong = next((name for name, loss in CARD.losses(metrics).items() if loss == metrics.get("log_loss")), "")
        title = f"Log loss on {CARD.rows} it has not seen"
        shown.draw(charts.bars(CARD.losses(metrics), unit="log loss", title=title, strong=strong), "losses")
    with figures.container(border=True, height="stretch"):
        st.header(CARD.title, anchor=False)
        said = [(markup.text(label), markup.text(text.format(**metrics))) for label, text in CARD.figures.items()]
        markup.show(markup.table([f"On {CARD.rows} it has not seen", ""], said, right=[1]))
        st.caption(f"Trained, and its calibration shown, by [{run_id}]({shown.report_url(run_id)})")


@st.cache_data(max_entries=8, show_spinner=False)
def models(root_url: str, token: str) -> list[dict[str, Any]]:
    """The models that are kept, the newest first, with their aliases."""
    return registry.listed(Root.at(root_url))


def over_time(stored: list[dict[str, Any]]) -> None:
    """Every model's loss beside what it is compared with, by when it was trained; and all of them in a table."""
    if not stored:
        return
    st.header("The models so far", anchor=False)
    frame = pl.DataFrame([{"trained": _trained(each["run_id"]), **_compared(each["metrics"])} for each in stored])
    frame = frame.drop_nulls("trained").sort("trained")
    if frame.height > 1:
        shown.draw(charts.line(frame, *frame.columns[1:], unit="log loss", title="Log loss, model by model"), "models")
    rows = [
        (
            markup.link(shown.report_url(each["run_id"]), shown.at(at) if (at := _trained(each["run_id"])) else "–"),
            markup.text(", ".join(each["aliases"])),
            *(markup.text(text.format(**each["metrics"])) for text in CARD.figures.values()),
        )
        for each in stored[:MODELS]
    ]
    more = f"<p><small>and {len(stored) - MODELS} older ones</small></p>" if len(stored) > MODELS else ""
    numbers = range(2, 2 + len(CARD.figures))
    markup.show(markup.table(["Trained", "Is the", *CARD.figures], rows, right=numbers), more)


def _compared(metrics: dict[str, Any]) -> dict[str, float]:
    """The loss that the model's is to be compared with, and the model's."""
    losses = CARD.losses(metrics)
    return {name: loss for at, (name, loss) in enumerate(losses.items()) if at == 0 or loss == metrics.get("log_loss")}


def _trained(run_id: str) -> datetime | None:
    """When the run began, from its id."""
    try:
        return datetime.strptime(run_id.split("-")[-2], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except (ValueError, IndexError):
        return None


# --- on what came since ---


def since(root: Root) -> None:
    """Drift, what was predicted and what came true, by the hour; nothing where no run scores."""
    hours = scores.drift(root)
    if hours.is_empty():
        return
    st.header("On what came since", anchor=False)
    hours = hours.with_columns(pl.col("hour").dt.replace_time_zone(None))
    main = hours.filter(alias="champion") if "champion" in hours["alias"] else hours
    left, right = st.columns(2)
    with left.container(border=True):
        both = main.select("hour", "predicted", "observed").cast({"observed": pl.Float64})
        shown.draw(charts.line(both, "predicted", "observed", unit="share", title="Predicted and realized"), "realized")
    with right.container(border=True):
        wide = hours.pivot("alias", index="hour", values="psi", aggregate_function="last").sort("hour")
        title = "Drift of its predictions (PSI; above 0.2 is much)"
        shown.draw(charts.line(wide, *wide.columns[1:], unit="PSI", title=title), "drift")
    frame = scores.calibration(root)
    if frame.height:
        columns = {name: shown.column(name, dtype) for name, dtype in frame.schema.items()}
        st.markdown("**Calibration**: of what was predicted about alike, the share that came true")
        shown.table(frame, columns, "calibration")


# --- a prediction ---


def predicted() -> None:
    """A row to fill in, and what the API says of it."""
    st.header("Try a prediction", anchor=False)
    st.caption(CARD.about)
    with st.form("predict", enter_to_submit=True):
        row = {}
        names = list(CARD.row)
        for at in range(0, len(names), ACROSS):
            for column, name in zip(st.columns(ACROSS), names[at : at + ACROSS], strict=False):
                example = CARD.example.get(name)
                text = column.text_input(name, f"{example}", key=f"row-{name}", help=CARD.described.get(name))
                row[name] = _typed(text, example)
        is_asked = st.form_submit_button("Predict")
    if is_asked:
        status, said = ask(row)
        if status == 200:
            [answer] = said
            value = answer[CARD.outcome]
            st.metric(
                shown.heading(CARD.outcome),
                figure(answer["probability"], "share"),
                "yes" if value else "no",
                delta_color="blue",
                delta_arrow="off",
                border=True,
                width=260,
            )
            st.caption(f"By {shown.code(answer['model_id'])}")
        else:
            st.error(shown.plain(str(said)))
    url, body = f"{Settings().api_url.rstrip('/')}/v1/predict", json.dumps([CARD.example])
    markup.show(markup.typed(f"curl {url} -H 'Content-Type: application/json' -d '{body}'"))


def _typed(text: str, example: Any) -> Any:
    """As the example is; what is no number is left to the API, which says what is wrong with it."""
    if isinstance(example, int | float):
        try:
            return type(example)(text)
        except ValueError:
            return text
    return text


def ask(row: dict[str, Any]) -> tuple[int, Any]:
    """The API's status and answer, or its sentence; 0 when it does not answer."""
    settings = Settings()
    headers = {"Content-Type": "application/json"}
    if settings.api_token:
        headers["Authorization"] = f"Bearer {settings.api_token}"
    url = f"{settings.api_url.rstrip('/')}/v1/predict"
    request = urllib.request.Request(url, json.dumps([row]).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)["detail"]
        except (ValueError, KeyError, TypeError):
            return error.code, f"the API answered {error.code}"
    except (OSError, ValueError) as error:
        return 0, f"the API does not answer at {url}: {error}. `python orchestrate.py up` serves it"
