"""Who is told of what, as an env file says it."""

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from etl.secrets import NAME

PLAIN = ("json", "jsons", "xml", "xmls", "form", "forms", "syslog")  # of such a URL nothing need be a secret
LINE = re.compile(r"(\w+)\.(\w+) *(<=|>=|<|>) *(-?[0-9][0-9_]*(?:\.[0-9]+)?)")


class Line(NamedTuple):
    """A figure and where it should not be: as in `revenue_per_minute.revenue < 1000`."""

    question: str
    column: str
    is_over: str  # <, >, <= or >=
    limit: float


def line(text: str) -> Line:
    """Raises ValueError for what is none."""
    match = LINE.fullmatch(text.strip())
    if not match:
        raise ValueError("not a figure over a line")
    return Line(match[1], match[2], match[3], float(match[4]))


def _target(text: str) -> str:
    """Most of Apprise's URLs hold a token somewhere: such a one is a secret, of which the file has the name."""
    scheme, separator, rest = text.partition("://")
    if not NAME.fullmatch(text) and not (separator and rest and scheme in PLAIN and not set("@?") & set(rest)):
        raise ValueError("neither a secret's name nor a URL without a secret")
    return text


def _is_line(text: str) -> str:
    line(text)
    return text


Kind = Literal["failed", "late", "up", "damaged", "stale", "quarantine", "slow", "recovered"]


class Alerts(BaseModel):
    """The `alerts:` block of an env file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    to: list[Annotated[str, AfterValidator(_target)]] = []  # names of secrets that are Apprise URLs, or such URLs
    command: list[str] = []  # a program and its arguments, which reads the message
    on: list[Kind] = ["failed", "late", "up", "damaged", "recovered"]
    figures: Annotated[list[Annotated[str, AfterValidator(_is_line)]], Field(max_length=100)] = []
