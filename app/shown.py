"""What the dashboard's pages share: answers and runs as they are shown, cached by the pointers they come from."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import polars as pl
import streamlit as st

from app import poller
from app.domain import model
from app.settings import Settings
from etl import charts, findings
from etl.figures import figure as written
from etl.figures import is_name, is_share, shortened, span, words
from etl.questions import results
from etl.runs import index
from etl.serve import health
from etl.storage import Root
from pipeline import Lake, queries

log = logging.getLogger(__name__)
TABLE_PX, WHOLE_PX = 213, 738  # a head and five rows, and twenty; the others are scrolled to
SECONDS = "YYYY-MM-DD HH:mm:ss"
DOCTOR = "see what `python orchestrate.py doctor` says"
EXCERPT = "excerpt"  # how the keys of containers begin that hold a part of something
ZONE = "zone"  # the key of the field in which the reader chooses one
EXAMINE = {  # what is not of the lake
    **({"the model": model.examine} if model else {}),
    "the answers": results.examine,
    "the index of runs": index.examine,
}


def published_root() -> Root:
    """The root that ETL_ROOT names."""
    return Root.at(Settings().root)


def report_url(run_id: str) -> str:
    """Where the API serves a run's report."""
    return f"{Settings().api_url.rstrip('/')}/reports/{run_id}"


@contextmanager
def panel(what: str, looks: Iterable[str] = (), about: str = "", remedy: str = DOCTOR) -> Iterator[None]:
    """A part of a page that stands or falls alone: an error inside is said in its place, with what is to be done.

    `what`: the part, as a sentence begins; `looks`: what `doctor` calls the things it is read from, of whose problems
    those are shown that name `about`. `remedy`: what is to be done when it names none.
    """
    try:
        yield
    except BaseException as error:
        if not findings.may_be_damage(error):  # Streamlit ends and begins the drawing of a page by exceptions too
            raise
        wrong = problems(published_root().url, what, tuple(looks), error)
        said = [
            f"{code(finding.problem)}. What to do: {finding.remedy}." for finding in wrong if about in finding.problem
        ]
        unknown = f"{code(findings.sentence(error))}. What to do: {remedy}."
        st.warning("\n\n".join([f"**{what} cannot be shown.**", *(said or [unknown])]))


@st.cache_data(ttl=60, max_entries=32, show_spinner=False)
def problems(root_url: str, what: str, looks: tuple[str, ...], _error: BaseException) -> list[findings.Finding]:
    """What `doctor` finds wrong where it looks; once a minute, as it reads a table's whole log."""
    log.error("%s cannot be shown", what, exc_info=_error)
    root = Root.at(root_url)
    return [
        finding
        for look in looks
        for finding in (EXAMINE[look](root) if look in EXAMINE else Lake(root).look(look))
        if finding.problem
    ]


def view() -> poller.View:
    """The root as it is now; what is cached of it goes by its token."""
    return poller.view(published_root())


def own_zone() -> str:
    """The time zone that the reader's browser says."""
    try:
        return ZoneInfo(st.context.timezone or "UTC").key
    except (ZoneInfoNotFoundError, ValueError):
        return "UTC"


def zone() -> ZoneInfo:
    """The one in which times are shown: what the reader has chosen, else the browser's."""
    return ZoneInfo(st.session_state.get(ZONE) or own_zone())


def at(moment: datetime, both: bool = False) -> str:
    """A time in the reader's zone, with its day when that is not today's; `both`: in UTC beside."""
    local, now = moment.astimezone(zone()), datetime.now(zone())
    text = f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%Y-%m-%d %H:%M}"
    return (
        f"{text} {local:%Z} ({moment.astimezone(UTC):%H:%M} UTC)"
        if both and zone().key != "UTC"
        else f"{text} {local:%Z}"
    )


def plain(text: str) -> str:
    """Text of any kind in Markdown, as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!$:~|<>-])", r"\\\1", text.replace("\n", " "))


def _in_words(name: str, value: Any) -> str:
    said = ", ".join(map(str, value)) if isinstance(value, list) else written(value, name)
    return shortened(said, charts.LETTERS)


def code(text: str) -> str:
    """Text of any kind in a line of Markdown."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


@st.cache_data(max_entries=32, show_spinner=False)
def answer(root_url: str, question: str, pointer: bytes) -> tuple[dict[str, Any], pl.DataFrame]:
    """A question's pointer, and what is shown of its rows. `pointer`: its bytes, by which the cache knows it."""
    current, whole = queries.current(Root.at(root_url), question)
    return current, charts.brief(whole)


@st.cache_data(max_entries=32, show_spinner=False)
def drawing(root_url: str, path: str) -> dict[str, Any]:
    """A chart as it is stored beside its answer: a Plotly figure, whose path names its run."""
    figure: dict[str, Any] = json.loads(Root.at(root_url).read(path))
    return figure


EXPORTS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {  # kind -> its MIME type, the answer's file as that
    "CSV": ("text/csv", lambda data: _flat(pl.read_parquet(data)).write_csv().encode()),
    "JSON": ("application/json", lambda data: _flat(pl.read_parquet(data), nested=False).write_json().encode()),
    "Parquet": ("application/vnd.apache.parquet", lambda data: data),
}


def downloads(root: Root, current: dict[str, Any]) -> None:
    """Buttons that give an answer whole and exact; `current`: its pointer. A file is made when it is asked for."""
    with st.container(horizontal=True):
        for kind, (mime, made) in EXPORTS.items():
            st.download_button(
                kind,
                partial(_exported, root, current["file"], made),
                f"{current['run_id']}-{current['question']}.{kind.lower()}",
                mime,
                key=f"{current['question']}-{kind}",
                on_click="ignore",
                type="tertiary",
                icon=":material/download:",
            )


def _exported(root: Root, path: str, made: Callable[[bytes], bytes]) -> bytes:
    return made(root.read(path))


def _flat(frame: pl.DataFrame, nested: bool = True) -> pl.DataFrame:
    """With bytes, durations and, if `nested`, lists and structs as text: CSV has none of them, JSON no bytes."""
    odd = (
        column
        for column in frame
        if column.dtype in (pl.Binary, pl.Duration, pl.Object) or nested and column.dtype.is_nested()
    )
    return frame.with_columns(
        pl.Series(column.name, [None if value is None else str(value) for value in column.to_list()], pl.String)
        for column in odd
    )


def figure(chart: charts.Chart, frame: pl.DataFrame) -> dict[str, Any]:
    """The chart as a Plotly figure for Streamlit. Takes a tenth of a second: to be cached."""
    return json.loads(charts.stored(chart, frame))


def _names_kept(part: Any, name: str = "") -> Any:
    """A part of a figure with U+2060, which nobody sees, after each `#` that begins no colour; `name`: the part's.

    Streamlit's page takes `#` and six digits anywhere in a figure for a colour of its theme: of Customer#000012451 it
    made Customer#46039f451.
    """
    if isinstance(part, dict):
        return {key: value if key == "template" else _names_kept(value, key) for key, value in part.items()}
    if isinstance(part, list):
        return [_names_kept(value, name) for value in part]
    return part.replace("#", "#\u2060") if isinstance(part, str) and "color" not in name else part


def answer_card(root: Root, question: queries.Question, rows_px: int | None = TABLE_PX) -> None:
    """A question's current answer as a chart and a table, and its run; without `rows_px` with downloads."""
    with panel("The answer", ["the answers"], f"results/{question.name}/current.json"):
        current, frame = answer(root.url, question.name, root.read(pointer(question)))
        asked_with = [code(f"{words(name)}: {_in_words(name, value)}") for name, value in current["parameters"].items()]
        st.caption(" ".join([question.text, *asked_with]))
        st.markdown(age(question, current))
        answer_chart(root, question, current)
        table(frame, {name: column(name, dtype) for name, dtype in frame.schema.items()}, question.name, rows_px)
        if rows_px is None:
            downloads(root, current)
        rows = "1 row" if current["rows"] == 1 else f"{current['rows']:,} rows"
        rows = rows if frame.height == current["rows"] else f"The first {frame.height:,} of {rows}"
        st.caption(f"{rows}, by [{current['run_id']}]({report_url(current['run_id'])})")


def age(question: queries.Question, current: dict[str, Any]) -> str:
    """Of when an answer is and how far behind, amber where there should be another by now; `current`: its pointer."""
    seen, now = view().seen, datetime.now(UTC)
    said = f"as of {at(datetime.fromisoformat(current['as_of']), both=True)}"
    if behind := max(seen.batch - current["batch"], 0):
        said += f", {behind:,} batch{'es' if behind > 1 else ''} behind"
    given = next((given for given in seen.answers if given.question == question.name), None)
    due = _due(question, given) if given else None
    return f":{'orange' if behind and due and now > due else 'gray'}-badge[{plain(said)}]"


def _due(question: queries.Question, given: health.Answered) -> datetime | None:
    """When the answer should have been followed by another: by its own limit, or the second run of its stage since."""
    if question.fresh_within:
        return given.at + question.fresh_within
    stage = view().seen.stages.get(given.stage)
    following = stage.next_run(given.at) if stage else None
    return stage.next_run(following) if stage and following else None


def answer_chart(root: Root, question: queries.Question, current: dict[str, Any]) -> None:
    """The chart of an answer; `current`: its pointer. One of an older release has none beside it."""
    with panel("The chart", remedy="run query, which draws it anew"):
        if path := current.get("chart"):
            draw(drawing(root.url, path), question.name)
        elif "chart" not in current and question.chart:
            st.caption("Its chart comes with the next run of `query`.")


def draw(figure: dict[str, Any], name: str) -> None:
    """A Plotly figure of `etl.charts`, which frame.STYLE suits to the page's theme; `name` is its key on the page."""
    config = {"displayModeBar": False}
    st.plotly_chart(_names_kept(figure), theme=None, config=config, key=f"chart-{name}")


def table(frame: pl.DataFrame, columns: dict[str, Any], name: str, rows_px: int | None = TABLE_PX) -> None:
    """The first rows of a frame; `columns` as in Streamlit's column_config, `name` is its key on the page."""
    shown = charts.brief(
        _flat(frame.head(charts.ROWS)).with_columns(
            (pl.selectors.decimal() | pl.selectors.by_dtype(pl.Int128)).cast(pl.Float64)
        )
    )
    st.container(key=f"{EXCERPT}-{name}").dataframe(
        shown,
        height=min(rows_px or WHOLE_PX, 38 + 35 * shown.height),
        hide_index=True,
        column_config=columns,
        key=f"table-{name}",
        placeholder="–",
    )


def column(name: str, dtype: pl.DataType) -> Any:
    """How a column of an answer is shown: a human name, thousands apart, shares in percent, keys as they are."""
    label = heading(name)
    if dtype.is_integer():
        return st.column_config.NumberColumn(label, format="%d" if is_name(name) else "%,d")
    if dtype.is_numeric():
        return st.column_config.NumberColumn(label, format="percent" if is_share(name) else "%,.2f")
    if dtype == pl.Date:
        return st.column_config.DateColumn(label, format="YYYY-MM-DD")
    if dtype == pl.Datetime:
        return st.column_config.DatetimeColumn(f"{label} (UTC)", format=SECONDS)
    return st.column_config.Column(label) if dtype.is_temporal() else st.column_config.TextColumn(label)


def pointer(question: queries.Question) -> str:
    """Where the pointer to its current answer is, under the root."""
    return f"results/{question.name}/current.json"


def heading(name: str) -> str:
    """A name as a heading begins."""
    label = words(name)
    return label[:1].upper() + label[1:]


def ago(moment: datetime) -> str:
    """ "12 s ago", "3 min ago", "5 h ago", "2 days ago"."""
    return f"{how_long(datetime.now(UTC) - moment)} ago"


def how_long(passed: timedelta) -> str:
    """ "12 s", "3 min", "5 h", "2 days"; less than nothing, by a clock that is behind, is nothing."""
    return span(max(passed.total_seconds(), 0), tenths=False)


def short(value: float, name: str) -> str:
    """A figure as it is said: "136.3 million"; by its name a share, a year."""
    for least, unit in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= least and not is_name(name):
            return f"{value / least:,.1f} {unit}"
    return written(int(value) if value == int(value) else value, name)
