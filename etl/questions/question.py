"""What a question is, and how it is asked: written once, answered by Polars or by Dask.

A question is a module of a package. It holds its title and text (the docstring), the tables and columns it reads
(`TABLES`) and `answer`, a pure function from Narwhals frames to a Narwhals frame, whose keyword arguments are the
question's parameters. It may also hold

- `chart`: a function from the answer to a plot,
- `FIGURE`: the answer's column that is followed over time,
- `FRESH_WITHIN`: a timedelta; an answer that is older is late,
- `window`: since when rows matter, by the question's parameters and `as_of`; older ones are not read;
- `portion` and `MERGES`: what some rows of a table that only grows come to, and how two portions become one, column
  by column: "sum", "min" or "max"; the other columns name a group. `portion` is a function as `answer` is, whose first
  frame is that table's. Then `answer` has what all rows come to as its first frame, and of the tables those that it
  names. So an answer reads the rows that are new since the one before (`portions`).
"""

import functools
import inspect
import logging
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import narwhals as nw
import polars as pl

from etl.clusters import connected, require_worker
from etl.questions import portions
from etl.questions.engines import Window, by_dask, by_polars
from etl.storage import Root

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
    portion: Callable[..., Any] | None = field(repr=False, default=None)
    merges: dict[str, str] = field(repr=False, default_factory=dict)
    fresh_within: timedelta | None = None

    @property
    def grows(self) -> str:
        """The table of which a portion is made of some rows; "" without one."""
        return next(iter(_frames(self.portion))) if self.portion else ""

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
    portion, name = getattr(module, "portion", None), module_name.rpartition(".")[2]
    keywords = (_keywords(portion) if portion else {}) | _keywords(module.answer)
    merges = getattr(module, "MERGES", {})
    if portion and ("as_of" in keywords or not {*merges.values()} <= {*portions.MERGES}):
        raise TypeError(f"{name}: a portion does not depend on as_of, and MERGES are {', '.join(portions.MERGES)}")
    return Question(
        name=name,
        title=title,
        text=" ".join(text.split()),
        tables=module.TABLES,
        parameters={key: default for key, default in keywords.items() if key != "as_of"},
        live="as_of" in keywords,
        figure=getattr(module, "FIGURE", None),
        answer=module.answer,
        chart=getattr(module, "chart", None),
        window=getattr(module, "window", None),
        portion=portion,
        merges=merges,
        fresh_within=getattr(module, "FRESH_WITHIN", None),
    )


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Its keyword arguments: name -> default."""
    arguments = inspect.signature(function).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def _frames(function: Callable[..., Any]) -> list[str]:
    """Its other arguments: the frames that it takes."""
    arguments = inspect.signature(function).parameters.values()
    return [argument.name for argument in arguments if argument.kind is not argument.KEYWORD_ONLY]


def ask(
    question: Question,
    snapshot: "Snapshot",
    *,
    dask: "str | distributed.Client | None" = None,
    portions_in: Root | None = None,
    **parameters: Any,
) -> pl.DataFrame:
    """The answer from one snapshot, by Polars in this process or by a Dask cluster: its address, or a client of it.

    `portions_in`: the root under which what is known of earlier rows is looked for and kept; without one all rows are
    read. Raises TypeError for a parameter that the question does not have, OSError when no cluster answers.
    """
    unknown = sorted(set(parameters) - set(question.parameters))
    if unknown:
        raise TypeError(f"{question.name} has no parameter {', '.join(unknown)}; it has {list(question.parameters)}")
    if question.live:
        parameters["as_of"] = snapshot.as_of
    window = question.window(**parameters) if question.window else {}
    with connected(dask) as client:
        if question.portion:
            rows = _of_portions(question, question.portion, snapshot, client, parameters, portions_in)
            tables = {name: question.tables[name] for name in _frames(question.answer)[1:]}
            answer = functools.partial(question.answer, nw.from_native(rows.lazy()))
            return by_polars(answer, snapshot, tables, {}, _of(parameters, question.answer))
        if client is None:
            return by_polars(question.answer, snapshot, question.tables, window, parameters)
        return by_dask(client, question.answer, snapshot, question.tables, window, parameters)


def _of(parameters: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those that the function takes."""
    return {name: value for name, value in parameters.items() if name in _keywords(function)}


def _of_portions(
    question: Question,
    portion: Callable[..., Any],
    snapshot: "Snapshot",
    client: "distributed.Client | None",
    parameters: dict[str, Any],
    root: Root | None,
) -> pl.DataFrame:
    """What a question's portion makes of all rows of the table that grows."""
    tables = {name: question.tables[name] for name in _frames(portion)}
    given, made = _of(parameters, portion), None
    before = portions.kept(root, question, parameters) if root else None
    new = portions.news(snapshot, question, before) if before else None
    if before and new:
        try:
            files = {question.grows: new.files}
            came = [by_polars(portion, snapshot, tables, {}, given, files)] if new.files else []
            frame = portions.merged(question, [before.frame, *came])
            made = portions.Portion(frame, snapshot.versions, before.counted + new.rows)
        except (OSError, pl.exceptions.PolarsError) as error:  # a file that was compacted since may be gone
            log.warning("%s is made of all rows again: %r", question.name, error)
    if made is None:
        asked = by_polars if client is None else functools.partial(by_dask, client)
        frame = portions.merged(question, [asked(portion, snapshot, tables, {}, given)])
        made = portions.Portion(frame, snapshot.versions, snapshot.row_count(question.grows))
    if root:
        portions.keep(root, question, parameters, made)
    return made.frame


def ask_all(
    asked: Iterable[Question],
    snapshot: "Snapshot",
    *,
    draw: Draw | None = None,
    dask: str | None = None,
    portions_in: Root | None = None,
) -> list[Answer]:
    """Every question's answer, one after the other; one that fails is told, and the next is asked.

    `draw` makes a picture of a question's chart and its answer; an answer whose picture fails is an answer. `dask`: the
    address of a cluster. `portions_in`: as of `ask`. Raises OSError when nobody answers at `dask`, or nobody works
    there: then no question would have an answer.
    """
    with connected(dask) as client:
        if client and asked:
            require_worker(client)
        return [_answer(question, snapshot, draw, client, portions_in) for question in asked]


def _answer(
    question: Question,
    snapshot: "Snapshot",
    draw: Draw | None,
    client: "distributed.Client | None",
    portions_in: Root | None,
) -> Answer:
    began, frame, seconds, picture, problem = time.perf_counter(), None, None, None, ""
    try:
        frame = ask(question, snapshot, dask=client, portions_in=portions_in)
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
