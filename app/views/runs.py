"""The runs: those that the reader asks for, and failures that say the same as one."""

from datetime import date, datetime, time, timedelta
from typing import Any

import streamlit as st

from app import markup, shown
from etl.figures import shortened, words
from etl.runs import failures, index
from etl.runs.record import STATES
from etl.storage import Root

BAD = "not ok"
RUNS, GROUPS = 100, 8  # that are listed, the newest
SAID = 200  # characters of a reason


def page() -> None:
    """The newest runs that the reader asks for."""
    st.title("Runs", anchor=False)
    with shown.panel("The list of runs", ["the index of runs"]):
        listed()


def listed() -> None:
    """The filters, which the page's address has too; failures; runs."""
    root, view = shown.published_root(), shown.view()
    names = list(dict.fromkeys([*view.seen.stages, *(run["stage"] for run in view.seen.runs)]))
    bound: dict[str, Any] = {"bind": "query-params"}
    of_stage, of_state, of_day, of_text = st.columns(4)
    stage = of_stage.selectbox("Stage", names, index=None, placeholder="all", key="stage", **bound)
    states = [BAD, *STATES]
    state = of_state.selectbox("State", states, index=None, placeholder="all", key="state", format_func=words, **bound)
    day = of_day.date_input("Day", None, key="day", **bound)
    text = of_text.text_input("Text in the reason or id", key="text", **bound)
    with shown.panel("The failures", ["the index of runs"]):
        grouped(groups(root.url, stage, view.token))
    with shown.panel("The list of runs", ["the index of runs"]):
        since, until = _bounds(day)
        rows = newest(root.url, stage, state, since, until, text or None, view.token)
        under_way = [] if state or text or day else [run for run in view.under_way if stage in (None, run["stage"])]
        made = [*map(_at_work, under_way), *map(_ended, rows)]
        head = ["Started", "Stage", "State", "Ran", "Why", ""]
        markup.show(
            "<h2>The newest</h2>",
            markup.table(head, made, right=[3], below=4) if made else "<p>There is no such run.</p>",
        )
        if len(rows) == RUNS:
            st.caption(f"The newest {RUNS}; a day or a text finds earlier ones.")


def _bounds(day: date | None) -> tuple[datetime | None, datetime | None]:
    """When a day begins and ends where the reader is."""
    if day is None:
        return None, None
    start = datetime.combine(day, time(), shown.zone())
    return start, start + timedelta(days=1)


@st.cache_data(max_entries=32, show_spinner=False)
def groups(root_url: str, stage: str | None, token: str) -> list[failures.Group]:
    """What failed, of a stage or of all; `token`: the view's, by which the cache knows it."""
    return failures.of_root(Root.at(root_url), stage)


@st.cache_data(max_entries=32, show_spinner=False)
def newest(
    root_url: str,
    stage: str | None,
    state: str | None,
    since: datetime | None,
    until: datetime | None,
    text: str | None,
    token: str,
) -> list[dict[str, Any]]:
    """The newest runs that are asked for; `token`: the view's, by which the cache knows it."""
    states = [name for name in STATES if name not in ("ok", "noop")] if state == BAD else state
    return index.newest(Root.at(root_url), stage, states, since, until, limit=RUNS, search=text)


def grouped(known: list[failures.Group]) -> None:
    """Failures that say the same, as one."""
    if not known:
        return
    rows = [
        (
            markup.link(f"runs?stage={group.stage}", group.stage),
            markup.badge(words(group.state), "red"),
            markup.text(shortened(group.reason, SAID)),
            f"{failures.ordinal(group.count)} time, first at {shown.at(group.first_at)}" if group.count > 1 else "once",
            markup.link(f"run?id={group.run_id}", shown.at(group.last_at)),
        )
        for group in known[:GROUPS]
    ]
    more = f"<p><small>and {len(known) - GROUPS} more kinds</small></p>" if len(known) > GROUPS else ""
    table = markup.table(["Stage", "State", "Why", "How often", "Last"], rows, below=2)
    markup.show("<h2>Failures, by what they say</h2>", table, more)


def _ended(run: dict[str, Any]) -> tuple[str, ...]:
    report = markup.link(shown.report_url(run["run_id"]), "report") if run["kept"] else ""
    return (
        markup.link(f"run?id={run['run_id']}", shown.at(datetime.fromisoformat(run["started_at"]))),
        markup.text(run["stage"]),
        markup.badge(words(run["state"]), markup.STATES.get(run["state"], "red")),
        f"{run['seconds']:,.1f} s",
        markup.text(shortened(run["reason"] or "", SAID)),
        report,
    )


def _at_work(run: dict[str, Any]) -> tuple[str, ...]:
    return (
        markup.link(f"run?id={run['run_id']}", shown.at(datetime.fromisoformat(run["started_at"]))),
        markup.text(run["stage"]),
        markup.badge("running", markup.STATES["running"]),
        "",
        markup.text(f"now in “{shortened(run['heading'] or 'its kernel starts', SAID)}”"),
        "",
    )
