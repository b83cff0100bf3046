"""The digest: a day of runs on a page."""

from datetime import UTC, date, datetime

import polars as pl
import streamlit as st

from app import shown
from etl.figures import words
from etl.runs import digest
from etl.storage import Root

DAY = "day"  # the field, and in the page's address


def page() -> None:
    """One day, chosen by the reader or by the page's URL."""
    st.title("Digest", anchor=False)
    today = datetime.now(UTC).date()
    st.session_state[DAY] = min(_linked() or today, today)
    day = st.date_input("Day (UTC)", max_value=today, key=DAY, on_change=_link, width=180)
    with shown.panel("The digest", ["the index of runs"]):
        root = shown.published_root()
        told = of_day(root.url, shown.view().token, day)
        st.header(told.sentence, anchor=False)
        if told.stages:
            stages(told)
            failures(told)
            outliers(told)
            mail(told)


def _linked() -> date | None:
    try:
        return date.fromisoformat(st.query_params.get(DAY, ""))
    except ValueError:
        return None


def _link() -> None:
    st.query_params[DAY] = st.session_state[DAY].isoformat()


@st.cache_data(max_entries=8, show_spinner=False)
def of_day(root_url: str, token: str, day: date) -> digest.Digest:
    """A day's runs; `token`: of the view, by which the cache knows whether there are new ones."""
    return digest.of_day(Root.at(root_url), day)


def stages(told: digest.Digest) -> None:
    """A line a stage: how many runs, how long they took, over the day, how many rows, what they cost."""
    frame = pl.DataFrame(
        {
            "stage": [stage.stage for stage in told.stages],
            "runs": [stage.runs for stage in told.stages],
            "bad": [stage.bad for stage in told.stages],
            "p50": [stage.p50_s for stage in told.stages],
            "p99": [stage.p99_s for stage in told.stages],
            "spark": [[value or 0.0 for value in stage.spark_s] for stage in told.stages],
            "rows": [stage.rows for stage in told.stages],
            "cpu": [stage.cpu_s for stage in told.stages],
            "cost": [stage.cost_usd for stage in told.stages],
        }
    )
    number = st.column_config.NumberColumn
    columns = {
        "stage": st.column_config.TextColumn("Stage", pinned=True),
        "runs": number("Runs", format="%,d"),
        "bad": number("Failed", format="%,d"),
        "p50": number("p50, s", format="%,.1f", help="Half of the ok runs were as quick"),
        "p99": number("p99, s", format="%,.1f", help="99 of 100 ok runs were as quick"),
        "spark": st.column_config.BarChartColumn("Seconds by half hour", y_min=0, width="medium"),
        "rows": number("Rows", format="%,d", help="That its runs recorded"),
        "cpu": number("CPU, s", format="%,.1f"),
        "cost": number("Cost, US$", format="%,.2f", help="Of machines that have a price"),
    }
    given = [name for name in frame.columns if frame[name].null_count() < frame.height]
    # a list is a sparkline here, which shown.table would make a text
    said = {"column_config": columns, "placeholder": "–"}
    st.dataframe(frame.select(given), hide_index=True, key="stages", height="content", **said)


def failures(told: digest.Digest) -> None:
    """What failed alike, once with how often."""
    if not told.failures:
        return
    st.header("What failed", anchor=False)
    frame = pl.DataFrame(
        {
            "times": [each.count for each in told.failures],
            "stage": [each.stage for each in told.failures],
            "state": [words(each.state) for each in told.failures],
            "reason": [each.reason or digest.NO_REASON for each in told.failures],
            "first": [each.first_at for each in told.failures],
            "last": [each.last_at for each in told.failures],
            "report": [shown.report_url(each.run_id) for each in told.failures],
        }
    )
    columns = {
        "times": st.column_config.NumberColumn("Times", format="%,d", width="small"),
        "stage": st.column_config.TextColumn("Stage", width="small"),
        "state": st.column_config.TextColumn("State", width="small"),
        "reason": st.column_config.TextColumn("Reason", width="large"),
        "first": st.column_config.DatetimeColumn("First (UTC)", format="HH:mm:ss"),
        "last": st.column_config.DatetimeColumn("Last (UTC)", format="HH:mm:ss"),
        "report": st.column_config.LinkColumn("The last", display_text=r"([^/]+)$"),
    }
    shown.table(frame, columns, "failures")


def outliers(told: digest.Digest) -> None:
    """The runs that took far longer than their stage's median."""
    if not told.outliers:
        return
    st.header("Far longer than usual", anchor=False)
    frame = pl.DataFrame(
        {
            "at": [run.started_at for run in told.outliers],
            "stage": [run.stage for run in told.outliers],
            "seconds": [run.seconds for run in told.outliers],
            "usual": [run.usual_s for run in told.outliers],
            "report": [shown.report_url(run.run_id) for run in told.outliers],
        }
    )
    columns = {
        "at": st.column_config.DatetimeColumn("Started (UTC)", format="HH:mm:ss"),
        "stage": st.column_config.TextColumn("Stage"),
        "seconds": st.column_config.NumberColumn("Took, s", format="%,.1f"),
        "usual": st.column_config.NumberColumn("Usually, s", format="%,.1f"),
        "report": st.column_config.LinkColumn("Report", display_text=r"([^/]+)$"),
    }
    shown.table(frame, columns, "outliers")


def mail(told: digest.Digest) -> None:
    """The same as a page for mail."""
    st.download_button(
        "As HTML for mail",
        lambda: digest.as_html(told, f"Runs of {shown.published_root().url}", shown.report_url),
        f"digest-{told.day}.html",
        "text/html",
        key="mail",
        on_click="ignore",
        type="tertiary",
        icon=":material/download:",
    )
