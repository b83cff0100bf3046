"""The digest page."""

import streamlit as st


def page() -> None:
    """All of it."""
    st.title("Digest", anchor=False)
