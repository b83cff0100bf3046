"""The model page."""

import streamlit as st


def page() -> None:
    """All of it."""
    st.title("Model", anchor=False)
