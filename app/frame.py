"""What is around every page: it is drawn again when there is something new, and its footer says what is looked at."""

from datetime import datetime
from zoneinfo import available_timezones

import streamlit as st

from app import markup, poller, shown
from app.settings import Settings
from etl.runs import releases
from etl.serve import health

FILES = 20  # that are named, of those that differ from the release
# These have no setting. A table's own download would be of what is shown, with texts cut; the answers have whole ones.
# A page that is drawn again does not fade meanwhile, and what is small is not too faint to read. A chart's texts and
# grid follow the theme at once: drawn for a dark page, they could not be read when the reader's system turned to light.
STYLE = """<style>
.stMainBlockContainer { padding: 4rem 3rem 2rem; max-width: 90rem; }
@media (max-width: 48rem) { .stMainBlockContainer { padding: 4rem 1rem 2rem; } }
[class*="st-key-excerpt-"] [data-testid="stElementToolbarButton"]:has([aria-label^="Download as CSV"]) {
    display: none;
}
[data-testid="stMetricValue"] > div { white-space: normal; overflow: visible; text-overflow: clip; }
.js-plotly-plot :is(.xtick, .ytick, .g-gtitle, .g-xtitle, .g-ytitle, .legend, .annotation, .colorbar) text {
    fill: light-dark(#333333, #d7d9dd) !important;
}
.js-plotly-plot .gridlayer path { stroke: light-dark(#dddddd, #3a3f47) !important; }
[data-stale="true"] { opacity: 1 !important; transition: none !important; }
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] * { opacity: 1 !important; }
[data-testid="stCaptionContainer"] p { color: light-dark(#555d68, #adb5c0); }
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
        beat, told = view.seen.beat or {}, releases.told(shown.published_root())
        said = [f"<code>{markup.text(shown.published_root().url)}</code>"]
        said += [markup.text(f"environment {beat['env']}")] if beat else []
        said += [markup.text(_of_up(view))]
        said += [markup.text(str(told))] if told else []
        said += [markup.link(f"{api_url}/docs", "API"), markup.link(f"{api_url}/", "Reports")]
        pages = beat.get("pages", {}).items()
        said += [markup.link(url, name) for name, url in pages if name not in ("API", "dashboard")]
        text, zone = st.columns([4, 1])
        with text:
            differs = told.differs[:FILES] if told else []
            files = f"<br>{markup.text(', '.join(differs))}" if differs else ""
            markup.show(markup.small("  ·  ".join(said), files))
        zone.selectbox("Time zone", _zones(), key=shown.ZONE, help="Of the times on these pages; a report has UTC.")


def _of_up(view: poller.View) -> str:
    beat = view.seen.beat
    if beat is None:
        return "no `up` was ever at work here"
    if ended_at := beat.get("ended_at"):
        return f"`up` ended at {shown.at(datetime.fromisoformat(ended_at), both=True)}"
    seen = shown.at(datetime.fromisoformat(beat["at"]), both=True)
    return f"`up` was last seen at {seen}" if health.is_dead(view.at, view.seen) else f"`up` is at work, seen at {seen}"


def _zones() -> list[str]:
    """The reader's own first, then UTC."""
    own = [st.session_state.get(shown.ZONE), shown.own_zone(), "UTC"]
    return list(dict.fromkeys([*filter(None, own), *sorted(available_timezones())]))
