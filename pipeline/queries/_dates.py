"""Calendar arithmetic of the questions' parameters."""

from datetime import date


def months_later(day: date, months: int) -> date:
    """The same day of a later month. Raises ValueError where that month has no such day."""
    years, month = divmod(day.month - 1 + months, 12)
    return day.replace(year=day.year + years, month=month + 1)
