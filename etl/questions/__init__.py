"""Questions to the lake: what one is, who answers it, where answers are kept and how they changed."""

from etl.questions.question import Answer, Question, ask, ask_all, discover, overview
from etl.questions.results import changes, current, figure, history, save

__all__ = [
    "Answer",
    "Question",
    "ask",
    "ask_all",
    "changes",
    "current",
    "discover",
    "figure",
    "history",
    "overview",
    "save",
]
