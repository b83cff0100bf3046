"""The lake page."""

import streamlit as st


def page() -> None:
    """All of it."""
    st.title("Lake", anchor=False)
