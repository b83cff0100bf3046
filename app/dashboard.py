"""The dashboard: what the notebooks have published and how their runs went, as pages that keep themselves up to date.

It reads, and never starts a stage. What it draws is cached by the pointer it was drawn from.
"""

import streamlit as st

from app import frame, markup
from app.views import digest, lake, model, overview, questions, run, runs
from pipeline import TITLE

PAGES = (  # title -> what draws it; in the page's address it is the title in small letters
    ("Overview", overview.page),
    ("Questions", questions.page),
    ("Runs", runs.page),
    ("Lake", lake.page),
    ("Model", model.page),
    ("Digest", digest.page),
)


def main() -> None:
    st.set_page_config(TITLE, layout="wide")
    st.html(frame.STYLE + markup.STYLE)
    pages = [st.Page(draw, title=title, url_path=title.lower(), default=title == "Overview") for title, draw in PAGES]
    pages.append(st.Page(run.page, title="Run", url_path="run", visibility="hidden"))  # linked from where runs are
    page = st.navigation(pages, position="top")
    frame.follow()
    page.run()
    frame.footer()


if __name__ == "__main__":
    main()
