"""Figures, names and times as people write them: in reports, on the dashboard and on terminals."""

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

NAMES = re.compile(r"(.*_)?(?<!per_)(key|id|year)")
SHARES = re.compile(r"(.*[_ ])?share", re.I)
MEGABYTES = re.compile(r"(.*_)?mb")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]{8,}([+-]\d\d:\d\d|Z)")


def figure(value: Any, name: str = "") -> str:
    """A value as people read it: 1,234,567 or 0.12389; by its name a year, a key, 63.2 % of a whole, megabytes."""
    match value:
        case None:
            return "none"
        case Mapping():
            return ", ".join(f"{part} {figure(of, name)}" for part, of in value.items())
        case str() if MOMENT.fullmatch(value):
            with contextlib.suppress(ValueError, OverflowError):
                return moment(value)
        case int() if not isinstance(value, bool) and not is_name(name):
            return f"{value:,}"
        case float() if is_share(name):
            return f"{100 * value:,.1f} %"
        case float() if MEGABYTES.fullmatch(name):
            return "< 0.01" if 0 < value < 0.01 else f"{value:,.2f}"
        case float():
            digits = ",.6g" if abs(value) < 1000 else ",.2f" if abs(value) < 1e6 else ",.0f"
            return f"{value:{digits}}"
    return str(value)


def is_name(column: str) -> bool:
    """Whether whole numbers called so are names, such as years and keys, and no amounts."""
    return bool(NAMES.fullmatch(column))


def is_share(name: str) -> bool:
    """Whether numbers called so are shares of a whole, 0 to 1."""
    return bool(SHARES.fullmatch(name))


def words(name: str) -> str:
    """A name as people write it."""
    return re.sub(r"\bmb\b", "MB", name.replace("_", " "))


def moment(iso: str) -> str:
    """A time as people write it, in UTC."""
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: a longer one ends in an ellipsis behind a whole word, where it has any."""
    if len(text) <= most:
        return text
    words = text[: most - 1].rpartition(" ")[0]
    return f"{words if len(words) > most // 2 else text[: most - 1]}…"
