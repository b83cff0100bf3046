"""The runs page: the index of runs, by stage and state."""

import streamlit as st

from app import shown
from etl.runs import index
from etl.runs.record import STATES
from etl.storage import Root

ALL, BAD = "all", "not ok"
RUNS = 200  # in the table, the newest


def page() -> None:
    """The newest runs that the reader asks for."""
    st.title("Runs", anchor=False)
    with shown.panel("The list of runs"):
        stages = [ALL, *shown.stages(shown.published_root())]
        stage = st.segmented_control("Stage", stages, default=ALL, key="stage", required=True)
        state = st.segmented_control(
            "State", [ALL, BAD, *STATES], default=ALL, format_func=shown.words, key="state", required=True
        )
        listed(stage, state)


@st.fragment(run_every=shown.LOOK_S)
def listed(stage: str, state: str) -> None:
    """The newest runs of a stage in a state; runs again by itself."""
    with shown.panel("The list of runs", ["the index of runs"]):
        rows = newest(shown.published_root().url, stage, state)
        if rows:
            shown.runs_table(rows)
        else:
            st.caption("There is no such run.")


@st.cache_data(ttl=shown.LOOK_S - 5, max_entries=32, show_spinner=False)
def newest(root_url: str, stage: str, state: str) -> list[dict]:
    """The newest runs, or those that were not ok."""
    states = [name for name in STATES if name not in ("ok", "noop")] if state == BAD else state
    wanted = {"stage": stage, "state": states}
    return index.newest(Root.at(root_url), **{k: v for k, v in wanted.items() if v != ALL}, limit=RUNS)
