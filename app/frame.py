"""What is around every page: it is drawn again when there is something new, and its footer says what is looked at."""

from datetime import datetime
from zoneinfo import available_timezones

import streamlit as st

from app import poller, shown
from app.settings import Settings
from etl.runs import releases
from etl.serve import health

FILES = 20  # that are named, of those that differ from the release
# These have no setting. A table's own download would be of what is shown, with texts cut; the answers have whole ones.
STYLE = """<style>
.stMainBlockContainer { padding: 4rem 3rem 2rem; max-width: 90rem; }
@media (max-width: 48rem) { .stMainBlockContainer { padding: 4rem 1rem 2rem; } }
[class*="st-key-excerpt-"] [data-testid="stElementToolbarButton"]:has([aria-label^="Download as CSV"]) {
    display: none;
}
[data-testid="stMetricValue"] > div { white-space: normal; overflow: visible; text-overflow: clip; }
.st-key-footer { border-top: 1px solid light-dark(#d5d9e0, #39414d); margin-top: 2rem; padding-top: 1rem; }
</style>"""


@st.fragment(run_every=poller.LOOK_S)
def _look_again(drawn: str) -> None:
    if poller.view(shown.published_root()).token != drawn:
        st.rerun()


def follow() -> None:
    """Draw the page again as soon as it would show something else."""
    _look_again(shown.view().token)


def footer() -> None:
    """What is looked at: root, environment, release, when `up` was seen; the reader's time zone; where more is."""
    with st.container(key="footer"), shown.panel("The footer", remedy="start `python orchestrate.py up` again"):
        view, api_url = shown.view(), Settings().api_url.rstrip("/")
        beat = view.seen.beat
        said = [shown.code(shown.published_root().url)]
        if beat:
            said.append(f"environment {shown.plain(beat['env'])}")
            seen = shown.at(datetime.fromisoformat(beat.get("ended_at") or beat["at"]), both=True)
            dead = beat.get("ended_at") or health.is_dead(view.at, view.seen)
            said.append(
                f"`up` {'ended' if beat.get('ended_at') else 'was last seen'} at {seen}" if dead else "`up` is at work"
            )
        else:
            said.append("no `up` was ever at work here")
        told = releases.told(shown.published_root())
        if told:
            said.append(shown.plain(str(told)))
        said += [f"[API]({api_url}/docs)", f"[reports]({api_url}/)"]
        pages = (beat or {}).get("pages", {})
        said += [f"[{shown.plain(name)}]({url})" for name, url in pages.items() if name not in ("API", "dashboard")]
        text, zone = st.columns([4, 1])
        text.caption(
            "  ·  ".join(said), help="\n".join(f"- {path}" for path in told.differs[:FILES]) or None if told else None
        )
        zone.selectbox("Time zone", _zones(), key=shown.ZONE, help="Of the times on these pages; a report has UTC.")


def _zones() -> list[str]:
    """The reader's own first, then UTC."""
    own = [st.session_state.get(shown.ZONE), shown.own_zone(), "UTC"]
    return list(dict.fromkeys([*filter(None, own), *sorted(available_timezones())]))
