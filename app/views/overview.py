"""The overview: what runs, how new the data is, the questions of the moment, the model."""

from datetime import UTC, datetime
from typing import Any

import polars as pl
import streamlit as st

from app import shown
from app.domain import CARD, model
from etl.figures import shortened
from etl.lake import NothingPublished, Snapshot
from etl.models import registry
from etl.runs import journal
from etl.serve import health
from etl.storage import Root
from pipeline import COUNTED, TITLE, Lake, queries

FOLLOW_S = 2  # between two looks at the runs under way
LINES = 12  # of a run's output, the last
HEADING = 80  # characters of a cell's heading
LATE_S, STALE_S, TODAY_S = 300, 3600, 43_200  # age of the data; preprocess runs every minute
RUNS = 20  # in the table
GROWING = COUNTED | {"quarantine": "Refused rows"}  # tables whose rows are counted


def page() -> None:
    """All of it."""
    st.title(TITLE, anchor=False)
    is_it_well()
    under_way()
    published()


def is_it_well() -> None:
    """One sentence, and below it, where there is more to say, what to do."""
    with shown.panel("The state of the stages", ["the index of runs"]):
        told = shown.view().findings
        say = st.success if health.is_healthy(told) else st.error
        say(shown.plain(health.summary(told)))
        for finding in told:
            link = f" [Its report]({finding.link})" if finding.link and "://" in finding.link else ""
            st.caption(f"{shown.plain(finding.sentence)}. {shown.plain(finding.remedy or '')}{link}")


@st.fragment(run_every=FOLLOW_S)
def under_way() -> None:
    """The runs of this root that are at work on this machine, as their journals tell."""
    with shown.panel("What is running"):
        root = shown.published_root()
        at_work = [run for run in journal.live() if run["root"] == root.url]
        if not at_work:
            st.caption("No stage is running right now.")
        for run in at_work:
            taken_s = (datetime.now(UTC) - datetime.fromisoformat(run["started_at"])).total_seconds()
            memory = f", {run['rss_mb']:,.0f} MB" if run["rss_mb"] else ""
            heading = shown.plain(shortened(run["heading"] or "its kernel starts", HEADING))
            with st.expander(f"**{run['stage']}** runs: {heading}, {taken_s:.0f} s{memory}"):
                st.code(_last_lines(run["run_id"]) or "nothing printed yet", language=None)


def published() -> None:
    """What is published; runs again by itself."""
    root = shown.published_root()
    with shown.panel("The published snapshot", ["the published snapshot"]):
        freshness(root)
    with shown.panel("The answers"):
        question_cards(root)
    with shown.panel("The last runs", ["the index of runs"]):
        last_runs(shown.latest_runs(root.url)[:RUNS])


def freshness(root: Root) -> None:
    """A row of figures: how new, how much, how good."""
    try:
        snapshot = Lake(root).snapshot()
    except NothingPublished:
        st.info(
            f"Nothing is published yet under {root.url}. `python orchestrate.py run all` makes one pass over all "
            "stages, `python orchestrate.py up` keeps them running. This page fills by itself."
        )
        return
    columns = st.columns(len(GROWING) + 2 + (model is not None))
    age_s = (datetime.now(UTC) - snapshot.as_of).total_seconds()
    with columns[0]:
        figure(
            "Data up to (UTC)",
            f"{snapshot.as_of:{'%H:%M:%S' if age_s < TODAY_S else '%Y-%m-%d'}}",
            shown.ago(snapshot.as_of),
            "green" if age_s < LATE_S else "orange" if age_s < STALE_S else "red",
            f"The newest row is of {snapshot.as_of:%-d %B %Y, %H:%M:%S} UTC.",
        )
    with columns[1]:
        figure("Batch", f"{snapshot.batch:,}", "in every table")
    for column, (table, label) in zip(columns[2:], GROWING.items(), strict=False):
        with column, shown.panel(label, [f"table {table}"]):
            rows = row_count(snapshot.root.url, table, snapshot.versions[table], snapshot)
            note, colour = ("in quarantine", "orange") if table == "quarantine" else ("in the lake", "gray")
            figure(label, f"{rows:,}", note, colour if rows else "gray")
    if model:
        with columns[-1], shown.panel("The model", ["the model"]):
            model_figure(root)


def model_figure(root: Root) -> None:
    """The model's loss beside the one that it is to be compared with."""
    if registry.mark(root):
        metrics = registry.current(root)["metrics"]
        beside, loss = next(iter(CARD.losses(metrics).items()))
        figure("Model's log loss", f"{metrics['log_loss']:.4f}", f"{beside} {loss:.4f}")
    else:
        figure("Model's log loss", "–", "no model yet")


def figure(label: str, value: str, note: str, colour: str = "gray", explained: str | None = None) -> None:
    """One figure of the row, with a note in a colour below it."""
    st.metric(label, value, note, delta_color=colour, delta_arrow="off", help=explained, border=True, height="stretch")


def question_cards(root: Root) -> None:
    """The live questions and the model, two in a row; which of them are not there yet."""
    live = [question for question in queries.questions() if question.live]
    cards = [(question_card, (root, question)) for question in live if root.exists(shown.pointer(question))]
    if missing := len(live) - len(cards):
        st.caption(f"{missing} of {len(live)} live questions have no answer yet: `query` gives them.")
    if model and registry.mark(root):
        cards.append((model_card, (root,)))
    elif model:
        st.caption(f"There is no model yet: `train` publishes one as soon as there are enough {CARD.rows}.")
    for row in range(0, len(cards), 2):
        for column, (card, arguments) in zip(st.columns(2), cards[row : row + 2], strict=False):
            with column.container(border=True, height="stretch"):
                card(*arguments)


def question_card(root: Root, question: queries.Question) -> None:
    """A question with its current answer."""
    st.subheader(question.title, anchor=False)
    shown.answer_card(root, question)


def model_card(root: Root) -> None:
    """The model's figures beside what they are compared with."""
    st.subheader(CARD.title, anchor=False)
    with shown.panel("The model", ["the model"]):
        model_figures(registry.current(root))


def model_figures(published: dict[str, Any]) -> None:
    """How well the model does; `published`: its pointer."""
    metrics, run_id = published["metrics"], published["run_id"]
    st.caption(CARD.text)
    shown.draw(loss_chart(metrics), "model")
    figures = {label: text.format(**metrics) for label, text in CARD.figures.items()}
    table = pl.DataFrame({"figure": list(figures), "value": list(figures.values())})
    labels = {
        "figure": st.column_config.TextColumn(f"On {CARD.rows} it has not seen", width="large"),
        "value": st.column_config.TextColumn("", alignment="right"),
    }
    shown.table(table, labels, "model")
    st.caption(f"Trained, and its calibration shown, by [{run_id}]({shown.report_url(run_id)})")


@st.cache_data(max_entries=8, show_spinner=False)
def loss_chart(metrics: dict[str, Any]) -> Any:
    """The model's log loss beside those it is compared with."""
    from etl.charts import plot

    named = CARD.losses(metrics)
    losses = pl.DataFrame({"of": list(named), "loss": list(named.values())})
    title = f"Log loss on held-out {CARD.rows}"

    def chart(frame: pl.DataFrame) -> Any:
        return plot(frame).barh(x="of", y="loss", title=title, xlabel="", ylabel="log loss")

    return shown.figure(chart, losses)


def last_runs(latest: list[dict[str, Any]]) -> None:
    """The runs, newest first."""
    if not latest:
        st.caption("No stage has run yet.")
        return
    st.subheader("Last runs", anchor=False)
    shown.runs_table(latest)


@st.cache_data(max_entries=32, show_spinner=False)
def row_count(root_url: str, table: str, version: int, _snapshot: Snapshot) -> int:
    """A table's rows, from its log; its root and version are the snapshot's, by which the cache knows it.

    Raises storage.Damaged when the log is not what was written.
    """
    return _snapshot.row_count(table)


def _last_lines(run_id: str) -> str:
    """The end of what a run has printed so far; nothing when it has ended in the meantime."""
    try:
        events = list(journal.read(journal.spool() / run_id / "journal.jsonl"))
    except OSError:
        return ""
    outputs = (event["output"] for event in events if event["event"] == "output")
    text = "".join(out.get("text") or out.get("data", {}).get("text/plain", "") + "\n" for out in outputs)
    return "\n".join(shortened(line, shown.LINE) for line in text.splitlines()[-LINES:])
