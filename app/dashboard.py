"""The dashboard: what the notebooks have published, as charts and tables, always up to date.

It reads, and never starts a stage. What it draws is cached by the pointer it was drawn from, so that looking again
every few seconds costs a few small reads.
"""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import polars as pl
import streamlit as st

from app.settings import Settings
from pipeline import charts, lake, model, queries
from runner import journal, runs
from storage import Root

LOOK_S = 15  # between two looks at the root
FOLLOW_S = 2  # between two looks at the runs under way
LINES = 12  # of a run's output, the last
LATE_S, STALE_S = 300, 3600  # age of the data; preprocess runs every minute
RUNS = 20  # in the table
TABLE_PX = 213  # a head and five rows
STATES = {  # of a run: colour of the badge and, dark enough to read, of the text; the others are bad
    "ok": ("green", "#2e7d4f"),
    "noop": ("gray", "#6b6b6b"),
    "cancelled": ("orange", "#b3640f"),
}
BAD = ("red", "#b3352c")
STYLE = "<style>.stMainBlockContainer { padding: 2rem 3rem; }</style>"  # has no setting


def main() -> None:
    st.set_page_config("ETL notebooks", layout="wide")
    st.html(STYLE)
    st.title("TPC-H, live", anchor=False)
    under_way()
    page()


@st.fragment(run_every=FOLLOW_S)
def under_way() -> None:
    """The runs of this root that are at work on this machine, as their journals tell."""
    root = Root.at(Settings().root)
    at_work = [run for run in journal.live() if run["root"] == root.url]
    if not at_work:
        st.caption("No stage is running right now.")
    for run in at_work:
        taken_s = (datetime.now(UTC) - datetime.fromisoformat(run["started_at"])).total_seconds()
        memory = f", {run['rss_mb']:,.0f} MB" if run["rss_mb"] else ""
        with st.expander(f"**{run['stage']}** runs: {run['heading'] or 'its kernel starts'}, {taken_s:.0f} s{memory}"):
            st.code(_last_lines(run["run_id"]) or "nothing printed yet", language=None)


@st.fragment(run_every=LOOK_S)
def page() -> None:
    """All that is shown; runs again by itself."""
    settings = Settings()
    root, reports_url = Root.at(settings.root), f"{settings.api_url.rstrip('/')}/reports"
    published_model = _read_json(root, model.CURRENT)
    try:
        freshness(lake.snapshot(root), published_model)
    except lake.NothingPublished:
        st.info(
            f"Nothing is published yet under {root.url}. `python orchestrate.py run all` makes one pass over all "
            "stages, `make up` keeps them running. This page fills by itself."
        )
    latest = latest_runs(root.url)
    stage_states(latest)
    questions = sorted(queries.questions(), key=lambda question: not question.live)
    cards = [(question_card, (root, q, reports_url)) for q in questions if root.exists(_pointer(q))]
    if missing := len(questions) - len(cards):
        st.caption(f"{missing} of {len(questions)} questions have no answer yet: `query` gives them.")
    if published_model:
        cards.append((model_card, (published_model, reports_url)))
    else:
        st.caption("There is no model yet: `train` publishes one as soon as there are enough line items.")
    for row in range(0, len(cards), 2):
        for column, (card, arguments) in zip(st.columns(2), cards[row : row + 2], strict=False):
            with column.container(border=True, height="stretch"):
                card(*arguments)
    runs_table(latest, reports_url)


def freshness(snapshot: lake.Snapshot, published_model: dict[str, Any] | None) -> None:
    """A row of figures: how new, how much, how good."""
    columns = iter(st.columns(6))

    def figure(label: str, value: str, note: str, colour: str = "gray", explained: str | None = None) -> None:
        next(columns).metric(
            label, value, note, delta_color=colour, delta_arrow="off", help=explained, border=True, height="stretch"
        )

    age_s = (datetime.now(UTC) - snapshot.as_of).total_seconds()
    figure(
        "Data up to (UTC)",
        f"{snapshot.as_of:%H:%M:%S}",
        _ago(snapshot.as_of),
        "green" if age_s < LATE_S else "orange" if age_s < STALE_S else "red",
        f"The newest order was placed on {snapshot.as_of:%-d %B %Y}.",
    )
    rows = row_counts(snapshot.root, snapshot.versions)
    figure("Batch", f"{snapshot.batch:,}", "in every table")
    figure("Orders", f"{rows['orders']:,}", "in the lake")
    figure("Line items", f"{rows['lineitem']:,}", "in the lake")
    figure("Refused rows", f"{rows['quarantine']:,}", "in quarantine", "orange" if rows["quarantine"] else "gray")
    if published_model:
        metrics = published_model["metrics"]
        figure("Model's log loss", f"{metrics['log_loss']:.4f}", f"best possible {metrics['best_log_loss']:.4f}")
    else:
        figure("Model's log loss", "–", "no model yet")


def stage_states(latest: list[dict[str, Any]]) -> None:
    """The state of each stage's last run, and how long ago it ended."""
    with st.container(horizontal=True):
        for run in sorted({run["stage"]: run for run in reversed(latest)}.values(), key=lambda run: run["stage"]):
            ended_at = datetime.fromisoformat(run["ended_at"])
            st.badge(
                f"{run['stage']}: {_words(run['state'])}, {_ago(ended_at)}", color=STATES.get(run["state"], BAD)[0]
            )


def question_card(root: Root, question: queries.Question, reports_url: str) -> None:
    """A question with the chart and the table of its current answer."""
    st.subheader(question.title, anchor=False)
    try:
        pointer, frame, figure = answer(root.url, question.name, root.read(_pointer(question)))
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        st.warning(f"The answer cannot be read: {error}")
        return
    asked_with = [f"`{_words(name)}: {value}`" for name, value in pointer["parameters"].items()]
    st.caption(" ".join([question.text, *asked_with]))
    _chart(figure, question.name)
    _table(frame, {name: _column(name, dtype) for name, dtype in frame.schema.items()}, question.name)
    as_of = datetime.fromisoformat(pointer["as_of"])
    st.caption(
        f"{pointer['rows']:,} rows, batch {pointer['batch']:,}, up to {as_of:%Y-%m-%d %H:%M:%S} UTC, "
        f"by [{pointer['run_id']}]({reports_url}/{pointer['run_id']})"
    )


def model_card(published: dict[str, Any], reports_url: str) -> None:
    """The model's figures beside the best that any model can reach."""
    metrics, run_id = published["metrics"], published["run_id"]
    st.subheader("Late deliveries", anchor=False)
    st.caption(
        "Will a line item that ships now arrive after the day it was promised for? TPC-H draws the days on the road "
        "evenly from 1 to 30, so the lowest log loss that any model can have is known."
    )
    _chart(loss_chart(metrics), "model")
    figures = {
        "Log loss above the best possible": f"{metrics['gap']:.5f}",
        "Area under the ROC curve": f"{metrics['auc']:.4f}",
        "Brier score": f"{metrics['brier']:.4f}",
        "Share of line items that were late": f"{metrics['late_share']:.1%}",
        "Line items it was judged by": f"{metrics['rows']:,}",
    }
    table = pl.DataFrame({"figure": list(figures), "value": list(figures.values())})
    labels = {
        "figure": st.column_config.TextColumn("On line items it has not seen", width="large"),
        "value": st.column_config.TextColumn("", alignment="right"),
    }
    _table(table, labels, "model")
    st.caption(f"Trained, and its calibration shown, by [{run_id}]({reports_url}/{run_id})")


def runs_table(latest: list[dict[str, Any]], reports_url: str) -> None:
    """The last runs, each with a link to its report."""
    if not latest:
        st.caption("No stage has run yet.")
        return
    st.subheader("Last runs", anchor=False)
    shown = latest[:RUNS]
    table = pd.DataFrame(
        {
            "Stage": [run["stage"] for run in shown],
            "State": [_words(run["state"]) for run in shown],
            "Started (UTC)": [datetime.fromisoformat(run["started_at"]) for run in shown],
            "Seconds": [run["seconds"] for run in shown],
            "Why": [run["reason"] or "" for run in shown],
            "Report": [f"{reports_url}/{run['run_id']}" if run["kept"] else None for run in shown],
        }
    )
    colours = {_words(state): colour for state, (_, colour) in STATES.items()}
    st.dataframe(
        table.style.map(lambda state: f"color: {colours.get(state, BAD[1])}", subset=["State"]),
        height="content",
        hide_index=True,
        column_config={
            "Started (UTC)": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "Seconds": st.column_config.NumberColumn(format="%,.1f", width="small"),
            "Why": st.column_config.TextColumn(width="large"),
            "Report": st.column_config.LinkColumn(display_text=r"([^/]+)$"),
        },
        key="runs",
    )


@st.cache_data(max_entries=32, show_spinner=False)
def answer(root_url: str, question: str, pointer: bytes) -> tuple[dict[str, Any], pl.DataFrame, Any]:
    """A question's current pointer, rows and Plotly figure. `pointer`: its bytes, by which the cache knows it."""
    current, frame = queries.current(root_url, question)
    chart = next(q.chart for q in queries.questions() if q.name == question)
    return current, frame, charts.plotly(chart, frame)


@st.cache_data(max_entries=8, show_spinner=False)
def loss_chart(metrics: dict[str, Any]) -> Any:
    """The model's log loss between the best possible and that of always giving the share of late items."""
    from pipeline.charts import plot

    late, best, loss = metrics["late_share"], metrics["best_log_loss"], metrics["log_loss"]
    guess = -late * math.log(late) - (1 - late) * math.log1p(-late)
    losses = pl.DataFrame({"of": ["best possible", "the model", "the share as a guess"], "loss": [best, loss, guess]})

    def chart(frame: pl.DataFrame) -> Any:
        return plot(frame).barh(x="of", y="loss", title="Log loss on held-out line items", xlabel="", ylabel="log loss")

    return charts.plotly(chart, losses)


@st.cache_data(max_entries=32, show_spinner=False)
def row_counts(root_url: str, versions: dict[str, int]) -> dict[str, int]:
    """Rows of the tables that grow, from their logs; `versions` as in the published snapshot."""
    place = Root.at(root_url)
    growing = ("orders", "lineitem", "quarantine")
    return {name: lake.file_stats(lake.open_table(place, name, versions[name]))[1] for name in growing}


@st.cache_data(ttl=LOOK_S - 5, max_entries=8, show_spinner=False)
def latest_runs(root_url: str) -> list[dict[str, Any]]:
    """The last runs of all, newest first, and at least one of every stage that has a report."""
    root = Root.at(root_url)
    latest = runs.list(root, limit=200)
    for stage in set(root.list("reports")) - {run["stage"] for run in latest}:
        latest += runs.list(root, stage=stage, limit=1)
    return latest


def _last_lines(run_id: str) -> str:
    """The end of what a run has printed so far; nothing when it has ended in the meantime."""
    try:
        events = journal.read(journal.spool() / run_id / "journal.jsonl")
    except OSError:
        return ""
    shown = (event["output"] for event in events if event["event"] == "output")
    text = "".join(out.get("text") or out.get("data", {}).get("text/plain", "") + "\n" for out in shown)
    return "\n".join(text.splitlines()[-LINES:])


def _chart(figure: Any, name: str) -> None:
    st.plotly_chart(figure, theme=None, config={"displayModeBar": False}, key=f"chart-{name}")


def _table(frame: pl.DataFrame, columns: dict[str, Any], name: str) -> None:
    st.dataframe(
        frame.with_columns(pl.selectors.decimal().cast(pl.Float64)),
        height=min(TABLE_PX, 38 + 35 * frame.height),
        hide_index=True,
        column_config=columns,
        key=f"table-{name}",
    )


def _column(name: str, dtype: pl.DataType) -> Any:
    """How a column of an answer is shown: a human name, thousands apart, two decimals, keys as they are."""
    label = _words(name).capitalize()
    if dtype.is_integer():
        return st.column_config.NumberColumn(label, format="%d" if name.endswith("_key") else "%,d")
    if dtype.is_numeric():
        return st.column_config.NumberColumn(label, format="%,.2f")
    if dtype.is_temporal():
        return st.column_config.DatetimeColumn(f"{label} (UTC)", format="MM-DD HH:mm:ss")
    return st.column_config.TextColumn(label)


def _pointer(question: queries.Question) -> str:
    return f"results/{question.name}/current.json"


def _read_json(root: Root, rel: str) -> dict[str, Any] | None:
    try:
        return json.loads(root.read(rel))
    except FileNotFoundError:
        return None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _ago(moment: datetime) -> str:
    """ "12 s ago", "3 min ago", "5 h ago", "2 days ago"."""
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0)
    for unit, length_s in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= length_s:
            return f"{seconds // {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    main()
