"""Business questions: one file each in this folder. A file that is added here is found by itself.

`etl.questions` says what such a file holds.
"""

from etl.questions import (
    Answer,
    Question,
    ask,
    ask_all,
    changes,
    current,
    discover,
    figure,
    history,
    overview,
    save,
)

__all__ = ["Answer", "Question", "ask", "ask_all", "changes", "current", "figure", "history", "overview"]
__all__ += ["questions", "save"]


def questions() -> list[Question]:
    """Every question of this folder, by name."""
    return discover(__name__)
