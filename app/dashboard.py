"""The dashboard: what the notebooks have published, as charts and tables, always up to date.

It reads, and never starts a stage. What it draws is cached by the pointer it was drawn from, so that looking again
every few seconds costs a few small reads.
"""

import streamlit as st

from app.views import live, questions, runs

# These have no setting. A table's own download would be of what is shown, with texts cut; the answers have whole ones.
STYLE = """<style>
.stMainBlockContainer { padding: 4rem 3rem 2rem; }
[class*="st-key-excerpt-"] [data-testid="stElementToolbarButton"]:has([aria-label^="Download as CSV"]) {
    display: none;
}
</style>"""


def main() -> None:
    st.set_page_config("ETL notebooks", layout="wide")
    st.html(STYLE)
    pages = [
        st.Page(live.page, title="Live", url_path="live", default=True),
        st.Page(questions.page, title="Questions", url_path="questions"),
        st.Page(runs.page, title="Runs", url_path="runs"),
    ]
    st.navigation(pages, position="top").run()


if __name__ == "__main__":
    main()
