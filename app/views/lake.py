"""The lake: its tables and who wrote their versions, what did not fit, what compaction did, the age of the backup."""

from datetime import UTC, datetime
from typing import Any

import polars as pl
import streamlit as st

from app import markup, shown
from etl.lake import NothingPublished, backup, doctor
from etl.runs import index, provenance
from etl.storage import Root
from pipeline import Lake

SMALL_MB = 8  # a file below it is worth compacting
VERSIONS = 12  # of a table, the newest
REASONS, SAMPLES = 20, 3  # that are named; of each


def page() -> None:
    """All of it."""
    st.title("Lake", anchor=False)
    root, token = shown.published_root(), shown.view().token
    with shown.panel("The tables", ["the published snapshot"]):
        tables(root, token)
    left, right = st.columns(2)
    with left.container(border=True, height="stretch"):
        st.header("Compaction", anchor=False)
        with shown.panel("The last compaction", ["the index of runs"]):
            compaction(root, token)
    with right.container(border=True, height="stretch"):
        st.header("Backup", anchor=False)
        with shown.panel("The backup"):
            backed_up(root)
    st.header("What did not fit", anchor=False)
    with shown.panel("Quarantine", ["the published snapshot", "table quarantine"]):
        quarantined(root, token)
    with shown.panel("The refused files"):
        refused(root, token)


# --- tables and their versions ---


def tables(root: Root, token: str) -> None:
    """A line a table; of the one that is selected the versions, and who wrote them."""
    survey, published = surveyed(root.url, token)
    if survey.is_empty():
        st.info("There is no table yet. `python orchestrate.py run all` makes one pass over all stages.")
        return
    st.caption(
        f"Batch {published['batch']:,} is published, with rows up to "
        f"{shown.at(datetime.fromisoformat(published['as_of']), both=True)}. Select a table to see who wrote it."
        if published
        else "Nothing is published yet."
    )
    number = st.column_config.NumberColumn
    columns = {
        "table": st.column_config.TextColumn("Table", pinned=True),
        "version": number("Version", format="%,d", help="That is published"),
        "rows": number("Rows", format="%,d"),
        "files": number("Files", format="%,d"),
        "small_files": number(f"Below {SMALL_MB} MB", format="%,d", help="Files that compaction makes one of"),
        "mb": number("Size", format="bytes"),
        "mean_mb": number("A file", format="bytes", help="On average"),
        "failed": st.column_config.TextColumn("Cannot be read", width="large"),
    }
    given = survey if survey["failed"].null_count() < survey.height else survey.drop("failed")
    chosen = st.dataframe(
        given,
        hide_index=True,
        column_config=columns,
        key="tables",
        height="content",
        on_select="rerun",
        selection_mode="single-row",
    ).selection.rows
    if chosen and chosen[0] < survey.height:
        name = survey["table"][chosen[0]]
        with shown.panel(f"The versions of {name}", [f"table {name}"]):
            versions(root, token, name)


@st.cache_data(max_entries=8, show_spinner=False)
def surveyed(root_url: str, token: str) -> tuple[pl.DataFrame, dict[str, Any] | None]:
    """A line a table (the version that is published, and the figures of the newest), and what is published."""
    lake = Lake(root_url)
    try:
        snapshot = lake.snapshot()
        versions, about = snapshot.versions, {"batch": snapshot.batch, "as_of": snapshot.as_of.isoformat()}
    except NothingPublished:
        versions, about = {}, None
    survey = lake.survey(small_mb=SMALL_MB)
    version = pl.Series("version", [versions.get(name) for name in survey["table"]], pl.Int64)
    return survey.insert_column(1, version).with_columns(pl.col("mb", "mean_mb") * 1e6), about


def versions(root: Root, token: str, table: str) -> None:
    """The newest versions of a table: what was done, when, by which run."""
    st.markdown(f"**{table}**, its last versions")
    columns = {
        "version": st.column_config.NumberColumn("Version", format="%,d"),
        "operation": st.column_config.TextColumn("What was done"),
        "at": st.column_config.DatetimeColumn("At (UTC)", format=shown.SECONDS),
        "stage": st.column_config.TextColumn("Stage"),
        "report": st.column_config.LinkColumn("Run", display_text=r"([^/]+)$"),
    }
    shown.table(written(root.url, token, table), columns, "versions", rows_px=shown.WHOLE_PX)


@st.cache_data(max_entries=32, show_spinner=False)
def written(root_url: str, token: str, table: str) -> pl.DataFrame:
    """Who wrote the newest versions of a table, as `whence` says: version, operation, at, stage, report."""
    said = pl.DataFrame(
        provenance.last_versions(Root.at(root_url), table, VERSIONS),
        schema={"version": pl.Int64, "operation": pl.String, "at": pl.String, "stage": pl.String, "run_id": pl.String},
    )
    return said.with_columns(
        pl.col("at").str.to_datetime(time_unit="ms", time_zone="UTC"),
        report=pl.col("run_id").map_elements(shown.report_url, pl.String),
    ).drop("run_id")


# --- what compaction did, and the backup ---


def compaction(root: Root, token: str) -> None:
    """Files before and after, of the last run that compacted."""
    run = compacted(root.url, token)
    if run is None:
        st.caption(f"No ok run of `{Lake.compacted_by}` yet: it makes large files of small ones.")
        return
    figures = run["metrics"]
    before, after = st.columns(2)
    for side, name in ((before, "before"), (after, "after")):
        count = figures.get(f"files_{name}")
        side.metric(f"Files {name}", "–" if count is None else f"{count:,}")
    ended = shown.at(datetime.fromisoformat(run["ended_at"]), both=True)
    st.caption(f"The last compaction ended at {ended}: [{run['run_id']}]({shown.report_url(run['run_id'])})")


@st.cache_data(max_entries=8, show_spinner=False)
def compacted(root_url: str, token: str) -> dict[str, Any] | None:
    """The last ok run that compacted; None before the first."""
    root = Root.at(root_url)
    last = index.find_last(root, Lake.compacted_by)
    return index.get(root, last["run_id"]) if last else None


def backed_up(root: Root) -> None:
    """How old the newest backup is; amber where `doctor` would say so."""
    made = backup.newest(root)
    if made is None:
        st.caption("No backup was ever made of this root.")
        markup.show(markup.typed("python orchestrate.py backup URL"))
        return
    url, at = made
    is_old = datetime.now(UTC) - at > doctor.BACKUP_AGE
    colour = "orange" if is_old else "green"
    st.metric("The newest", shown.ago(at), shown.at(at, both=True), delta_color=colour, delta_arrow="off")
    markup.show(markup.typed(f"python orchestrate.py backup {url}" if is_old else url))


# --- what did not fit ---


def quarantined(root: Root, token: str) -> None:
    """Lines in quarantine by reason, with samples."""
    reasons = by_reason(root.url, token)
    if reasons.is_empty():
        st.caption("No line is in quarantine.")
        return
    st.markdown(f"**Lines in quarantine**: {reasons['lines'].sum():,}, by reason")
    columns = {
        "reason": st.column_config.TextColumn("Reason", width="large"),
        "table": st.column_config.TextColumn("Table"),
        "lines": st.column_config.NumberColumn("Lines", format="%,d"),
        "files": st.column_config.NumberColumn("Files", format="%,d"),
        "batch": st.column_config.NumberColumn("Last batch", format="%,d"),
        "samples": st.column_config.ListColumn("Samples", width="large"),
    }
    sampled(reasons, columns, "quarantine")
    st.caption("`python orchestrate.py quarantine show FILE` has them whole, `quarantine retry FILE` tries them again.")


@st.cache_data(max_entries=8, show_spinner=False)
def by_reason(root_url: str, token: str) -> pl.DataFrame:
    """The most frequent reasons: reason, table, lines, files, batch (the last), samples."""
    schema = {"reason": pl.String, "table": pl.String, "lines": pl.UInt32}
    try:
        snapshot = Lake(root_url).snapshot()
    except NothingPublished:
        return pl.DataFrame(schema=schema)
    if "quarantine" not in snapshot.versions:
        return pl.DataFrame(schema=schema)
    raw = pl.col("raw").cast(pl.String).str.head(shown.charts.LETTERS)
    return (
        snapshot.frame("quarantine")
        .group_by("reason", "table")
        .agg(
            lines=pl.len(),
            files=pl.col("file").n_unique(),
            batch=pl.col("batch").max(),
            samples=raw.drop_nulls().head(SAMPLES),
        )
        .sort("lines", "reason", descending=[True, False])
        .head(REASONS)
        .collect()
    )


def refused(root: Root, token: str) -> None:
    """Files that were refused whole, by reason."""
    files = refused_files(root.url, token)
    if files.is_empty():
        st.caption("No file was refused.")
        return
    st.markdown(f"**Refused files**: {files['files'].sum():,}, by reason")
    columns = {
        "why": st.column_config.TextColumn("Reason", width="large"),
        "files": st.column_config.NumberColumn("Files", format="%,d"),
        "date": st.column_config.TextColumn("Last day"),
        "samples": st.column_config.ListColumn("Such as", width="large"),
    }
    sampled(files, columns, "refused")


def sampled(frame: pl.DataFrame, columns: dict[str, Any], key: str) -> None:
    """A table with lists of samples, which shown.table would make texts."""
    st.container(key=f"{shown.EXCERPT}-{key}").dataframe(
        frame, hide_index=True, column_config=columns, key=key, height="content"
    )


@st.cache_data(max_entries=8, show_spinner=False)
def refused_files(root_url: str, token: str) -> pl.DataFrame:
    """By reason: why, files, date (the last), samples of their paths."""
    every = [{name: str(file[name]) for name in ("why", "date", "file")} for file in Lake(root_url).refused_files()]
    return (
        pl.DataFrame(every, schema={"why": pl.String, "date": pl.String, "file": pl.String})
        .group_by("why")
        .agg(files=pl.len(), date=pl.col("date").max(), samples=pl.col("file").head(SAMPLES))
        .sort("files", "why", descending=[True, False])
        .head(REASONS)
    )
