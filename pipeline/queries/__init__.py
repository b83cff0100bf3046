"""Business questions: one file each in this folder, written once and answered by Polars or by Dask.

A question's file holds its title and text (the docstring), the tables and columns it reads (`TABLES`), `answer`, a pure
function from Narwhals frames to a Narwhals frame, and `chart`. A file that is added here is found by itself.
"""

import inspect
import io
import json
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import polars as pl

from storage import Root

if TYPE_CHECKING:
    import narwhals as nw

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
    if dask is None:
        return _answer(question, _polars_frame, snapshot, parameters)

    import distributed

    with distributed.Client(dask):  # becomes the scheduler of everything computed inside
        return _answer(question, _dask_frame, snapshot, parameters)


def _answer(question: Question, frame: Callable[..., "nw.LazyFrame"], snapshot: "Snapshot", parameters: dict):
    frames = {table: frame(snapshot, table, columns) for table, columns in question.tables.items()}
    return question.answer(**frames, **parameters).collect("polars").to_native()


def _polars_frame(snapshot: "Snapshot", table: str, columns: list[str]) -> "nw.LazyFrame":
    import narwhals as nw

    decimals = pl.selectors.decimal()
    # in memory a decimal(15,2) is the whole number of its hundredths
    return nw.from_native(snapshot.frame(table, columns).with_columns(decimals.to_physical().cast(pl.Int64)))


def _dask_frame(snapshot: "Snapshot", table: str, columns: list[str]) -> "nw.LazyFrame":
    import dask.dataframe as dd
    import narwhals as nw

    # Dask cannot compare date32 with a timestamp; questions compare it with a date, which works
    frame = dd.read_parquet(snapshot.files(table), columns=columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dask support is moving out of Narwhals", FutureWarning)
        return nw.from_native(frame)


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
