"""What a question is, and how it is asked: written once, answered by Polars or by Dask.

A question is a module of a package. It holds its title and text (the docstring), the tables and columns it reads
(`TABLES`) and `answer`, a pure function from Narwhals frames to a Narwhals frame, whose keyword arguments are the
question's parameters. It may also hold

- `chart`: a function from the answer to a plot,
- `FIGURE`: the answer's column that is followed over time,
- `window`: since when rows matter, by the question's parameters and `as_of`; older ones are not read.
"""

import inspect
import logging
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from etl.questions.engines import Window, by_dask, by_polars, connected

if TYPE_CHECKING:
    import distributed

    from etl.lake.snapshot import Snapshot

log = logging.getLogger(__name__)
Draw: TypeAlias = Callable[[Callable[[pl.DataFrame], Any], pl.DataFrame], Any]  # (chart, answer) -> picture


@dataclass(frozen=True)
class Question:
    """One business question. `tables`: table -> columns it reads; `parameters`: name -> default."""

    name: str
    title: str
    text: str
    tables: dict[str, list[str]]
    parameters: dict[str, Any]
    live: bool  # whether the answer depends on the moment it is asked for
    figure: str | None
    answer: Callable[..., Any] = field(repr=False)
    chart: Callable[[pl.DataFrame], Any] | None = field(repr=False)
    window: Callable[..., Window] | None = field(repr=False)

    @property
    def given(self) -> str:
        """A sentence: with which parameters it is asked; "" when there are none."""
        words = [f"{name.replace('_', ' ')} {_in_words(value)}" for name, value in self.parameters.items()]
        return f"With {'; '.join(words)}." if words else ""


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of asking a question. `frame`: None without an answer; `picture`: None where there is nothing to draw;
    `problem`: in words, "" when all went well; `seconds`: of the answer, without its picture."""

    question: Question
    frame: pl.DataFrame | None
    picture: Any
    problem: str
    seconds: float


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def discover(package: str) -> list[Question]:
    """Every question of an imported package, by name: its modules whose names begin with no underscore."""
    modules = pkgutil.iter_modules(sys.modules[package].__path__)
    return [load(f"{package}.{name}") for name in sorted(module.name for module in modules) if name[0] != "_"]


def load(module_name: str) -> Question:
    """The question that a module holds."""
    module = import_module(module_name)
    title, _, text = (inspect.getdoc(module) or "").partition("\n")
    arguments = inspect.signature(module.answer).parameters.values()
    keywords = {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
    return Question(
        name=module_name.rpartition(".")[2],
        title=title,
        text=" ".join(text.split()),
        tables=module.TABLES,
        parameters={key: default for key, default in keywords.items() if key != "as_of"},
        live="as_of" in keywords,
        figure=getattr(module, "FIGURE", None),
        answer=module.answer,
        chart=getattr(module, "chart", None),
        window=getattr(module, "window", None),
    )


def ask(
    question: Question, snapshot: "Snapshot", *, dask: "str | distributed.Client | None" = None, **parameters: Any
) -> pl.DataFrame:
    """The answer from one snapshot, by Polars in this process or by a Dask cluster: its address, or a client of it.

    Raises TypeError for a parameter that the question does not have, OSError when no cluster answers.
    """
    unknown = sorted(set(parameters) - set(question.parameters))
    if unknown:
        raise TypeError(f"{question.name} has no parameter {', '.join(unknown)}; it has {list(question.parameters)}")
    if question.live:
        parameters["as_of"] = snapshot.as_of
    window = question.window(**parameters) if question.window else {}
    with connected(dask) as client:
        if client is None:
            return by_polars(question.answer, snapshot, question.tables, window, parameters)
        return by_dask(client, question.answer, snapshot, question.tables, window, parameters)


def ask_all(
    asked: Iterable[Question],
    snapshot: "Snapshot",
    *,
    draw: Draw | None = None,
    dask: str | None = None,
) -> list[Answer]:
    """Every question's answer, one after the other; one that fails is told, and the next is asked.

    `draw` makes a picture of a question's chart and its answer; an answer whose picture fails is an answer. `dask`: the
    address of a cluster. Raises OSError when nobody answers there: then no question would have an answer.
    """
    with connected(dask) as client:
        return [_answer(question, snapshot, draw, client) for question in asked]


def _answer(question: Question, snapshot: "Snapshot", draw: Draw | None, client: "distributed.Client | None") -> Answer:
    began, frame, seconds, picture, problem = time.perf_counter(), None, None, None, ""
    try:
        frame = ask(question, snapshot, dask=client)
        seconds = time.perf_counter() - began
        if draw and question.chart and frame.height:
            picture = draw(question.chart, frame)
    except Exception as error:
        log.exception("%s failed", question.name)
        problem = f"{'' if frame is None else 'the chart: '}{type(error).__name__}: {error}"
    return Answer(question, frame, picture, problem, seconds or time.perf_counter() - began)


def overview(answers: list[Answer]) -> pl.DataFrame:
    """One row a question: question, title, rows (null without an answer), seconds, problem."""
    lines = [
        (a.question.name, a.question.title, None if a.frame is None else a.frame.height, a.seconds, a.problem)
        for a in answers
    ]
    return pl.DataFrame(lines, schema=["question", "title", "rows", "seconds", "problem"], orient="row")
