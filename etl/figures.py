"""Figures, names and times as people write them: in reports, on the dashboard and on terminals."""

import contextlib
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

NAMES = re.compile(r"(.*_)?(?<!per_)(key|id|year)")
SHARES = re.compile(r"(.*[_ ])?share", re.I)
MEGABYTES = re.compile(r"(.*_)?mb(_.*)?")
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
        case float() if 1e-7 <= abs(value) < 1e-4:
            return f"{value:.7f}"
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


def utc(time: datetime | str) -> datetime:
    """A time, or its ISO text, in UTC, which it is in where it names no zone. Raises ValueError."""
    parsed = datetime.fromisoformat(time) if isinstance(time, str) else time
    return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def span(seconds: float, tenths: bool = True) -> str:
    """A time that passed, as in "54 min"; of less than ten seconds with a tenth, unless `tenths` is False."""
    for unit, length_s in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{math.floor(seconds / length_s)} {unit}"
    return f"{seconds:.{1 if tenths and seconds < 9.95 else 0}f} s"


def change(before: Any, now: Any, name: str = "") -> str:
    """What has become of a figure, as in "was 1,190, +3.7 %"; "" where it is the same, or nothing to compare."""
    if before is None or type(before) is bool or before == now or isinstance(before, Mapping | list):
        return ""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, now))
    is_amount = numbers and before and not is_name(name) and not is_share(name)
    percent = f", {100 * (now - before) / abs(before):+,.1f} %" if is_amount and abs(now) < 10 * abs(before) else ""
    return f"was {figure(before, name)}{percent if percent[3:] != '0.0 %' else ''}"


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: a longer one ends in an ellipsis behind a whole word, where it has any."""
    if len(text) <= most:
        return text
    words = text[: most - 1].rpartition(" ")[0]
    return f"{words if len(words) > most // 2 else text[: most - 1]}…"
