"""The questions page: one business question at a time, its answer whole, and how that changed from run to run."""

from typing import Any

import polars as pl
import streamlit as st

from app import shown
from etl import charts
from etl.figures import is_share
from etl.storage import Root
from pipeline import queries

ASKED, GROUP = "question", "group"  # the fields; the first is in the page's address, so that an answer can be linked
GROUPS = {"all": lambda question: True, "of the moment": lambda q: q.live, "of all time": lambda q: not q.live}


def page() -> None:
    """One question, chosen by the reader or by the page's URL."""
    st.title("Questions", anchor=False)
    every = sorted(queries.questions(), key=lambda question: not question.live)
    if not every:
        st.info("This project has no questions.")
        return
    names = {question.name: question for question in every}
    linked = st.query_params.get(ASKED)
    search, group = st.columns([3, 2])
    chosen = group.segmented_control(
        "Group", list(GROUPS), default="all", format_func=shown.heading, key=GROUP, required=True
    )
    asked = {question.name: question for question in every if GROUPS[chosen](question) or question.name == linked}
    st.session_state[ASKED] = linked if linked in names else next(iter(asked), every[0].name)
    name = search.selectbox(
        f"{len(asked)} questions; type to search",
        list(asked) or list(names),
        format_func=lambda name: f"{names[name].title}  ·  {name}",
        key=ASKED,
        on_change=link,
    )
    answered(names[name])


def link() -> None:
    """Put what was chosen into the page's address, which the page goes by: so the browser's Back works too."""
    st.query_params[ASKED] = st.session_state[ASKED]


def answered(question: queries.Question) -> None:
    """All about a question."""
    root = shown.published_root()
    with shown.panel("The answer", ["the answers"], f"results/{question.name}/"):
        if not root.exists(shown.pointer(question)):
            st.caption(question.text)
            st.info("There is no answer yet: the next run of `query` gives it.")
            return
        answer, past = st.columns([3, 2])
        with answer.container(border=True):
            shown.answer_card(root, question, rows_px=None)
        with past.container(border=True):
            label = shown.heading(question.figure or "rows")
            st.header(f"{label}, run by run", anchor=False)
            with shown.panel("The history", ["the answers"], f"results/{question.name}/history.json"):
                over_time(root, question, label)
            read_from(question)


def over_time(root: Root, question: queries.Question, label: str) -> None:
    """The figure that stands for the answer, run by run: those that were asked with the same parameters.

    `label`: what the figure is called.
    """
    history = queries.history(root, question.name)
    alike = history.filter(pl.col("parameters") == history["parameters"][-1]) if history.height else history
    if alike.height > 1:
        line = alike.select("as_of", pl.col("figure").alias(label))
        shown.draw(history_chart(line), f"{question.name}-history")
    runs = alike.reverse().select(
        "as_of", "figure", "batch", "rows", report=pl.col("run_id").map_elements(shown.report_url, pl.String)
    )
    columns = {
        "as_of": st.column_config.DatetimeColumn("Up to (UTC)", format=shown.SECONDS),
        "batch": st.column_config.NumberColumn("Batch", format="%,d"),
        "rows": st.column_config.NumberColumn("Rows", format="%,d"),
        "figure": st.column_config.NumberColumn(label, format="percent" if is_share(label) else "localized"),
        "report": st.column_config.LinkColumn("Report", display_text="open"),
    }
    shown.table(runs if question.figure else runs.drop("figure"), columns, f"{question.name}-runs")


def read_from(question: queries.Question) -> None:
    """Which tables and columns the answer comes from."""
    st.header("Read from", anchor=False)
    st.markdown("\n".join(f"- **{table}**: {', '.join(columns)}" for table, columns in question.tables.items()))


def history_chart(history: pl.DataFrame) -> dict[str, Any]:
    """A figure over time; `history`: as_of, and the figure under its name."""
    name = history.columns[1]
    scaled, unit = charts.in_units(history, name)
    return charts.line(scaled, name, unit=unit)
