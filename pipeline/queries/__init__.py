"""Business questions: one file each in this folder, written once and answered by Polars or by Dask.

A question's file holds its title and text (the docstring), the tables and columns it reads (`TABLES`), `answer`, a pure
function from Narwhals frames to a Narwhals frame, and `chart`. A file that is added here is found by itself.
"""

import inspect
import io
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.queries._engines import Window, by_dask, by_polars
from storage import Root

if TYPE_CHECKING:
    from pipeline.lake import Snapshot


@dataclass(frozen=True)
class Question:
    """One business question. `tables`: table -> columns it reads; `parameters`: name -> default."""

    name: str
    title: str
    text: str
    tables: dict[str, list[str]]
    answer: Callable[..., Any] = field(repr=False)
    chart: Callable[[pl.DataFrame], Any] = field(repr=False)
    parameters: dict[str, Any]
    live: bool  # whether the answer depends on the moment it is asked for
    window: Callable[..., Window] | None = field(repr=False)  # since when rows matter, by the same parameters


def questions() -> list[Question]:
    """Every question of this folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [_question(name) for name in names]


def _question(name: str) -> Question:
    module = import_module(f"{__name__}.{name}")
    title, _, text = inspect.getdoc(module).partition("\n")
    arguments = inspect.signature(module.answer).parameters.values()
    keywords = {a.name: a.default for a in arguments if a.kind is a.KEYWORD_ONLY}
    return Question(
        name=name,
        title=title,
        text=" ".join(text.split()),
        tables=module.TABLES,
        answer=module.answer,
        chart=getattr(module, "chart", None),
        parameters={key: default for key, default in keywords.items() if key != "as_of"},
        live="as_of" in keywords,
        window=getattr(module, "window", None),
    )


def ask(question: Question, snapshot: "Snapshot", *, dask: str | None = None, **parameters: Any) -> pl.DataFrame:
    """The answer from one snapshot, by Polars in this process or by the Dask cluster at the address `dask`.

    Raises TypeError for a parameter that the question does not have.
    """
    unknown = sorted(set(parameters) - set(question.parameters))
    if unknown:
        raise TypeError(f"{question.name} has no parameter {', '.join(unknown)}; it has {list(question.parameters)}")
    if question.live:
        parameters["as_of"] = snapshot.as_of
    window = question.window(**parameters) if question.window else {}
    if dask is None:
        return by_polars(question.answer, snapshot, question.tables, window, parameters)
    return by_dask(dask, question.answer, snapshot, question.tables, window, parameters)


def save(
    root: str,
    result: pl.DataFrame,
    question: Question,
    snapshot: "Snapshot",
    run_id: str,
    parameters: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an answer, then make it the current one; returns the pointer.

    `parameters`: those that `ask` was given. What made the answer stands in the Parquet file as well.
    """
    place = Root.at(root)
    pointer = {
        "question": question.name,
        "title": question.title,
        "file": f"results/{question.name}/{run_id}.parquet",
        "rows": result.height,
        "batch": snapshot.batch,
        "as_of": snapshot.as_of.isoformat(),
        "run_id": run_id,
        "parameters": question.parameters | (parameters or {}),
    }
    buffer = io.BytesIO()
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in pointer.items()
    }
    result.write_parquet(buffer, metadata=metadata)
    place.write(pointer["file"], buffer.getvalue())
    place.write(f"results/{question.name}/current.json", json.dumps(pointer, default=str, indent=1).encode())
    return pointer


def current(root: str, question: str) -> tuple[dict[str, Any], pl.DataFrame]:
    """The pointer to a question's current answer, and the answer. Raises FileNotFoundError before the first."""
    place = Root.at(root)
    pointer = json.loads(place.read(f"results/{question}/current.json"))
    return pointer, pl.read_parquet(place.read(pointer["file"]))
