"""Where answers are kept: Parquet files under `results/<question>/`, a pointer to the current one, and their history.

Beside an answer lies its chart, drawn: a Plotly figure, so that readers need nothing of what draws it.

An answer becomes the current one by a swap of the pointer, so a reader finds a whole one at any time. The history
lists the answers that are there, oldest first, each with one figure, so that a figure can be drawn over time without
opening any of them.
"""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from etl import figures
from etl.storage import Root

if TYPE_CHECKING:
    from etl.findings import Finding
    from etl.lake.snapshot import Snapshot
    from etl.questions.question import Question

log = logging.getLogger(__name__)
CHART = ".plotly.json"  # how the name of a chart ends, after its run
HISTORY: dict[str, pl.DataType | type[pl.DataType]] = {
    "as_of": pl.Datetime("us", "UTC"),
    "batch": pl.Int64,
    "run_id": pl.String,
    "rows": pl.Int64,
    "figure": pl.Float64,
    "parameters": pl.String,  # JSON: figures are alike only where these are
}
_Marked: TypeAlias = tuple[list[dict[str, Any]], str | None]  # a history and the mark of its file
_seen: dict[tuple[str, str], _Marked] = {}  # root, question -> the history, from `changes` to `save`: a request less


def save(
    root: Root,
    result: pl.DataFrame,
    question: "Question",
    snapshot: "Snapshot",
    run_id: str,
    parameters: dict[str, Any] | None = None,
    keep: int = 168,
) -> dict[str, Any]:
    """Write an answer, make it the current one, and remove all but the `keep` newest; returns the pointer.

    `parameters`: those that `ask` was given. What made the answer stands in the Parquet file as well.
    """
    folder = f"results/{question.name}"
    path = f"{folder}/{run_id}.parquet"
    pointer = {
        "question": question.name,
        "title": question.title,
        "file": path,
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
    root.write(path, buffer.getvalue())
    pointer["chart"] = _draw(root, question, result, f"{folder}/{run_id}{CHART}")
    line = {name: pointer[name] for name in ("as_of", "batch", "run_id", "rows")}
    line |= {"figure": figure(question, result), "parameters": metadata["parameters"]}
    seen = _seen.pop((root.url, question.name), None)
    before, mark = seen or _sound_lines(root, question)
    while True:
        lines = [*(old for old in before if old["run_id"] != run_id), line]
        if root.replace(f"{folder}/history.json", json.dumps(lines[-keep:], indent=1).encode(), mark):
            break
        before, mark = _sound_lines(root, question)  # of another run's, by now
    root.write(f"{folder}/current.json", json.dumps(pointer, default=str, indent=1).encode())
    listed = [f"{line['run_id']}.parquet" for line in lines]
    kept, yesterday = set(listed[-keep:]), datetime.now(UTC) - timedelta(days=1)
    dropped = [answer.removesuffix(".parquet") for answer in sorted({*listed[:-keep]} - kept)]
    root.remove_all(f"{folder}/{run}{suffix}" for run in dropped for suffix in (".parquet", CHART))
    is_first_of_day = not before or before[-1]["as_of"][:10] != f"{snapshot.as_of:%Y-%m-%d}"
    if root.may_tear or is_first_of_day:  # a store's listing costs as much as all else of an answer
        for entry in root.entries(folder):
            # one that is not listed and fresh is another run's, which is about to list it
            answer = entry.name.removesuffix(CHART) + ".parquet" if entry.name.endswith(CHART) else entry.name
            is_old = bool(entry.modified and entry.modified < yesterday) and answer not in kept
            if is_old and answer.endswith(".parquet") and not entry.problem:
                root.remove(f"{folder}/{entry.name}")
    return pointer


def _draw(root: Root, question: "Question", result: pl.DataFrame, path: str) -> str | None:
    """Store the answer's chart; its path, or None where there is nothing to draw: an answer without it is an answer."""
    if question.chart is None or result.is_empty():
        return None
    from etl import charts

    try:
        figure = charts.stored(question.chart, result)
    except Exception:
        log.warning("the chart of %s cannot be drawn", question.name, exc_info=True)
        return None
    root.write(path, figure)
    return path


def current(root: Root, question: str) -> tuple[dict[str, Any], pl.DataFrame]:
    """The pointer to a question's current answer, and the answer. Raises FileNotFoundError before the first."""
    pointer = json.loads(root.read(f"results/{question}/current.json"))
    return pointer, pl.read_parquet(root.read(pointer["file"]))


def history(root: Root, question: str) -> pl.DataFrame:
    """The answers that are kept, oldest first, with the columns of HISTORY; no rows before the first answer.

    Raises ValueError when the list of them is damaged; `save` makes it again.
    """
    lines = pl.DataFrame(_lines(root, question), schema=HISTORY | {"as_of": pl.String}, orient="row")
    return lines.with_columns(pl.col("as_of").str.to_datetime(time_unit="us", time_zone="UTC"))


def figure(question: "Question", result: pl.DataFrame) -> float | None:
    """What stands for an answer over time: the sum of the question's FIGURE, the mean of a share; else its rows."""
    return float(result.height) if question.figure is None else figure_of(result, question.figure)


def figure_of(result: pl.DataFrame, column: str) -> float | None:
    """What stands for a column of an answer. Raises ColumnNotFoundError."""
    values = result[column]
    value: Any = values.mean() if values.dtype.is_float() else values.sum()
    return None if value is None else float(value)


def changes(root: Root, question: "Question", result: pl.DataFrame) -> str:
    """A sentence: what is different from the answer that was saved last under `root`."""
    try:
        pointer, before = _last(root, question)
    except FileNotFoundError:
        return "This is the first answer."
    except (Exception, pl.exceptions.PanicException) as error:  # damaged; this answer takes its place
        return f"The answer before cannot be read: {error!r:.200}."
    since = f"batch {pointer['batch']}, up to {datetime.fromisoformat(pointer['as_of']):%Y-%m-%d %H:%M:%S} UTC"
    if before.schema != result.schema:
        return f"The answer to {since} had other columns."
    if before.equals(result):
        return f"The same as for {since}."
    keys = [name for name, dtype in result.schema.items() if _names(name, dtype)]
    if not keys or result.select(keys).is_duplicated().any() or before.select(keys).is_duplicated().any():
        keys = result.columns
    new, gone = (
        a.join(b, on=keys, how="anti", nulls_equal=True).height for a, b in ((result, before), (before, result))
    )
    same = result.join(before, on=result.columns, how="semi", nulls_equal=True).height
    counts = {"new": new, "changed": result.height - new - same, "gone": gone}
    rows = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count) or "the same in another order"
    return f"Since {since}: {_moved(question, before, result)}of {result.height:,} rows {rows}."


def examine(root: Root) -> "list[Finding]":
    """Whether the current answers and the histories can be read, as readers do, and what to do when they cannot."""
    from etl import findings

    return findings.inspect("the answers", lambda: _problems(root))


def _problems(root: Root) -> Iterator[tuple[str, str]]:
    from etl.findings import may_be_damage, sentence

    for question in root.names("results"):
        rel = f"results/{question}"
        if not any(name.endswith((".json", ".parquet")) for name in root.names(rel)):  # nothing that `save` wrote
            continue
        for what, read in ((f"{rel}/current.json or its file", current), (f"{rel}/history.json", history)):
            try:
                read(root, question)
            except BaseException as error:
                if not may_be_damage(error):
                    raise
                yield f"{what} cannot be read: {sentence(error)}", "run query"


def _moved(question: "Question", before: pl.DataFrame, result: pl.DataFrame) -> str:
    """The figure before and after, where the question has one."""
    old, new = figure(question, before), figure(question, result)
    if question.figure is None or old is None or new is None:
        return ""
    percent = f" ({new / old - 1:+.1%})" if old else ""
    old_text, new_text = (figures.figure(value, question.figure) for value in (old, new))
    return f"{figures.words(question.figure)} {old_text} → {new_text}{percent}; "


def _names(column: str, dtype: pl.DataType) -> bool:
    """Whether a column says what a row is about, rather than how much."""
    return dtype == pl.String or dtype.is_temporal() or dtype.is_integer() and figures.is_name(column)


def _last(root: Root, question: "Question") -> tuple[dict[str, Any], pl.DataFrame]:
    """The answer that was saved last, as the history has it, which `save` then need not ask for."""
    _seen[root.url, question.name] = lines, _ = _sound_lines(root, question)
    if not lines:
        return current(root, question.name)
    return lines[-1], pl.read_parquet(root.read(f"results/{question.name}/{lines[-1]['run_id']}.parquet"))


def _sound_lines(root: Root, question: "Question") -> _Marked:
    """The history, and the mark of its file, also of one that is damaged."""
    rel = f"results/{question.name}/history.json"
    try:
        data, mark = root.read_marked(rel)
    except FileNotFoundError:
        return [], None
    try:
        return _parsed(data, rel), mark
    except ValueError:
        return _lines_again(root, question), mark


def _lines(root: Root, question: str) -> list[dict[str, Any]]:
    """The history as it is kept. Raises ValueError when it is damaged."""
    rel = f"results/{question}/history.json"
    try:
        return _parsed(root.read(rel), rel)
    except FileNotFoundError:
        return []


def _parsed(data: bytes, rel: str) -> list[dict[str, Any]]:
    lines = json.loads(data)
    if not isinstance(lines, list) or not all(
        isinstance(line, dict) and HISTORY.keys() <= line.keys() for line in lines
    ):
        raise ValueError(f"{rel} is no list of answers")
    return lines


def _lines_again(root: Root, question: "Question") -> list[dict[str, Any]]:
    """The history from the answers themselves, but for those that are damaged too."""
    lines = []
    for name in root.names(f"results/{question.name}"):
        if not name.endswith(".parquet"):
            continue
        data = root.read(f"results/{question.name}/{name}")
        with contextlib.suppress(Exception, pl.exceptions.PanicException):
            about, frame = pl.read_parquet_metadata(data), pl.read_parquet(data)
            line = {key: about[key] for key in ("as_of", "run_id", "parameters")}
            lines.append(line | {"batch": int(about["batch"]), "rows": frame.height, "figure": figure(question, frame)})
    return sorted(lines, key=lambda line: line["as_of"])
