"""Which reports stay, as an env file says it."""

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt


class Rules(BaseModel):
    """The `retention:` block of an env file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    all_hours: NonNegativeFloat = 1  # every report, noop runs' as well
    hourly_days: NonNegativeFloat = 1  # the first ok run of each hour
    daily: bool = True  # the first ok run of each day
    slowest: bool = True  # the slowest ok run of each day
    page_days: NonNegativeFloat = 7  # report.html, half of a report's size; made anew from the notebook when asked for
    bad_a_day: NonNegativeInt = (
        100  # of a stage, of those that are neither ok nor noop: half the first, half the newest
    )
    days: NonNegativeFloat | None = None  # after that, none at all; null: no end
