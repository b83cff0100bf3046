"""What a domain says of its model to those who only read: what it is about, what a row of it is, how good it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from etl.lake.table import Column, DataType


@dataclass(frozen=True)
class Card:
    """Titles, texts and figures of the published model, for the API and the dashboard.

    `title`; `text`: what it predicts, in a sentence or two. `rows`: what its rows are called, many of them. `row`: the
    columns of one that is to be predicted, declared as those of a table; `about`: the row, in a sentence, and
    `described`: of its columns those that need words. `example`: such a row as JSON has it. `outcome`: the name of what
    is predicted, which is true from a probability of one half on. `figures`: label -> a format of the metrics that the
    model was published with, as `{gap:.5f}`. `losses`: those metrics -> label -> log loss in nats, first the one that
    the model's is to be compared with.
    """

    title: str
    text: str
    rows: str
    row: Mapping[str, Column | DataType]
    example: Mapping[str, Any]
    outcome: str
    figures: Mapping[str, str]
    losses: Callable[[dict[str, Any]], dict[str, float]]
    about: str = ""
    described: Mapping[str, str] = field(default_factory=dict)
