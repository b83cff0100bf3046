"""Business questions: one file each in this folder. A file that is added here is found by itself."""

from functools import partial

from etl.questions import Question, ask, ask_all, changes, current, discover, history, overview, save

__all__ = ["Question", "ask", "ask_all", "changes", "current", "history", "overview", "questions", "save"]
questions = partial(discover, __name__)
