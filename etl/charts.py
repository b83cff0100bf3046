"""Charts: written once with hvPlot, drawn by Matplotlib in reports, by Plotly in the dashboard and in JupyterLab.

A chart is a function from a frame to a plot. Which options a plot may carry depends on the backend that is current
when it is made, so the function is called here, after the backend was chosen, and keeps to what both understand
(kind, x, y, by, stacked, title, xlabel, ylabel, clabel). Sizes, colours and fonts are this file's business.
"""

import html
import io
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from etl import maps
from etl.figures import MEGABYTES, figure, is_name, is_share, words

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from holoviews import opts
    from hvplot.plotting.core import hvPlotTabularPolars
    from matplotlib.figure import Figure

Chart = Callable[[pl.DataFrame], Any]

WIDTH_PX, HEIGHT_PX, DENSITY = 700, 280, 1.5  # on the page; a PNG has DENSITY pixels for each
COLOURS = ["#2f6db5", "#e08a2e", "#4c9f70", "#c0504d", "#8064a2", "#8c8c8c"]
MANY = 60  # points of a line that are marked, too, when there are fewer
MOST_NAMES, MOST_LETTERS = 20, 60  # along the horizontal axis
INK, FAINT = "#333333", "#dddddd"
UNITS = [(1e9, "billions"), (1e6, "millions"), (1e3, "thousands")]
CLOSE = 0.15  # of the largest: values that differ by less are dots on a fitted scale, as bars would look alike
ROWS, LETTERS = 1000, 200  # that a browser is sent: of a table and a chart, of a text in them
LEGEND_PX, MEAN_PX = 40, 80  # below a figure of several traces; beside dots, for what their mean is
FONT = "Source Sans, Helvetica, Arial, sans-serif"  # the first is the dashboard's
CLEAR = "rgba(0,0,0,0)"  # so that a chart suits a light and a dark page

_drawing = threading.Lock()  # HoloViews has one current backend for the whole process


class Picture:
    """A static PNG that a notebook shows."""

    def __init__(self, png: bytes):
        self.png = png

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png, {"width": WIDTH_PX, "height": HEIGHT_PX}


class Nothing:
    """In place of a chart that would be empty: a line, and no page of white."""

    def __repr__(self) -> str:
        return "nothing to draw: no rows"

    def _repr_html_(self) -> str:
        return f"<p><small>{self!r}</small></p>"


class Live:
    """A Plotly figure, drawn by what the package plotly brings into JupyterLab: no script, nothing from a network."""

    def __init__(self, figure: "go.Figure"):
        self.figure = figure

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {
            "application/vnd.plotly.v1+json": json.loads(self.figure.to_json()) | {"config": {"displaylogo": False}}
        }


NOTE = 24  # letters, from which on a text is a note and no value
RIGHT, TIME = ' align="right"', ' class="time"'


class Grid:
    """A frame as a notebook shows it: no types, no quotes, numbers as people write them."""

    def __init__(self, frame: pl.DataFrame, rows: int, letters: int | None):
        self.frame, self.rows, self.letters = frame, rows, letters

    def __repr__(self) -> str:
        return repr(self.frame.head(self.rows))

    def _repr_html_(self) -> str:
        same = self._said_once()
        shown = self.frame.drop(same).head(self.rows)
        sides = [RIGHT if dtype.is_numeric() else TIME if dtype.is_temporal() else "" for dtype in shown.dtypes]
        names = [html.escape(words(name)) for name in shown.columns]
        head = "".join(f"<th{side}>{name}</th>" for side, name in zip(sides, names, strict=True))
        cells = [[_text(*item) for item in zip(shown.columns, row, strict=True)] for row in shown.iter_rows()]
        rows = [[f"<td{side}>{self._cut(cell)}</td>" for side, cell in zip(sides, row, strict=True)] for row in cells]
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        more = self.frame.height - shown.height
        note = f"<p><small>and {more:,} more row{'s' if more > 1 else ''}</small></p>" if more else ""
        for name in same:
            said = html.escape(self.frame[name][0] or "none")
            note += f"<p><small>{html.escape(words(name))}: {said} (in all {self.frame.height:,} rows)</small></p>"
        kind = ' class="short"' if self.letters else ""
        return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"

    def _said_once(self) -> list[str]:
        """The columns of notes that are the same in all rows: of long texts, or empty ones."""
        texts = [name for name, dtype in self.frame.schema.items() if dtype in (pl.String, pl.Null)]
        if self.frame.height < 2:
            return []
        firsts = ((name, self.frame[name][0] or "") for name in texts if self.frame[name].n_unique() == 1)
        same = [name for name, first in firsts if not first or len(first) > NOTE]
        return same if len(same) < self.frame.width else []

    def _cut(self, text: str) -> str:
        return html.escape(text if not self.letters or len(text) <= self.letters else text[: self.letters] + "…")


def table(frame: pl.DataFrame, rows: int = 10, letters: int | None = None) -> Grid:
    """The first `rows` rows, to be shown; of each text the first `letters`, on one line."""
    return Grid(frame, rows, letters)


def _text(column: str, value: Any) -> str:
    """Numbers with separators, money to the cent, times to the second, shares in percent; keys and years as names."""
    match value:
        case None:
            return "–"
        case int() if is_name(column) or isinstance(value, bool):
            return str(value)
        case int():
            return f"{value:,}"
        case Decimal():
            return f"{value:,.2f}"
        case float() if is_share(column) or MEGABYTES.fullmatch(column):
            return figure(value, column)
        case float():
            digits = ",.4g" if abs(value) < 1000 else ",.2f" if abs(value) < 1e6 else ",.0f"
            return f"{value:{digits}}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
    return str(value)


def plot(frame: pl.DataFrame) -> "hvPlotTabularPolars":
    """`plot(frame).bar(...)` is `frame.hvplot.bar(...)` without the JavaScript that `import hvplot.polars` puts in a
    notebook. Decimals are drawn as floats."""
    from hvplot.plotting.core import hvPlotTabularPolars

    return hvPlotTabularPolars(frame.with_columns(pl.selectors.decimal().cast(pl.Float64)))


def in_units(frame: pl.DataFrame, column: str) -> tuple[pl.DataFrame, str]:
    """The frame with `column` in millions or whatever suits it, a share in percent; and the label of its axis."""
    values, name = frame[column].cast(pl.Float64), words(column)
    if is_share(column):
        return frame.with_columns((values * 100).alias(column)), f"{name}, percent"
    largest = cast(float, values.abs().max() or 0)
    factor, unit = next(((factor, f"{name}, {unit}") for factor, unit in UNITS if largest >= factor), (1, name))
    return frame.with_columns((values / factor).alias(column)), unit


def show(chart: Chart, frame: pl.DataFrame) -> Picture | Live | Nothing:
    """What a notebook shows: a Picture, or a live plot where ETL_CHARTS=plotly (JupyterLab); of no rows, a line."""
    if frame.is_empty():
        return Nothing()
    if os.environ.get("ETL_CHARTS") == "plotly":
        return Live(plotly(chart, frame))
    return Picture(png(chart, frame))


def png(chart: Chart, frame: pl.DataFrame) -> bytes:
    """The chart as a PNG of WIDTH_PX x HEIGHT_PX, times DENSITY."""
    import holoviews.plotting.mpl  # noqa: F401  # where a reader of the code finds it, the fork server among them
    from PIL import Image

    figure = _drawn("matplotlib", chart, frame)
    (_tidy_matplotlib if figure.axes[0].axison else _tidy_map)(figure)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=100 * DENSITY)
    # 16 colours, half a byte a pixel, are plenty for bars and lines; a map has one for each value
    colours = 16 if figure.axes[0].axison else 64
    Image.open(full).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def plotly(chart: Chart, frame: pl.DataFrame) -> "go.Figure":
    """The chart as a Plotly figure, as wide as the place it is put in."""
    import plotly.graph_objects as go

    state = _drawn("plotly", chart, frame)
    if isinstance(state, go.Figure):
        state.update_layout(_layout(bool(state.layout.title.text)))
        return state
    figure = go.Figure({"data": state["data"], "layout": state["layout"]})
    _tidy_plotly(figure)
    return figure


def stored(chart: Chart, frame: pl.DataFrame) -> bytes:
    """The chart of the first rows as a Plotly figure in JSON, to be drawn without what makes charts."""
    text: str = plotly(chart, brief(frame)).to_json()
    return text.encode()


def brief(frame: pl.DataFrame) -> pl.DataFrame:
    """The first rows with their texts cut: what a browser can draw. It drew 100,000 rows 3.5 million pixels high."""
    text = pl.selectors.string(include_categorical=True).cast(pl.String)
    return frame.head(ROWS).with_columns(
        pl.when(text.str.len_chars() > LETTERS).then(text.str.head(LETTERS) + "…").otherwise(text)
    )


def line(points: pl.DataFrame, *names: str, unit: str = "", title: str = "") -> dict[str, Any]:
    """Figures over time as a Plotly figure, made without HoloViews; a time column first, then those named.

    `unit`: of the axis, as `in_units` gives it.
    """
    time = points.columns[0]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if points.height < MANY else "lines",
            "name": name,
            "x": [moment.isoformat() for moment in points[time]],
            "y": points[name].to_list(),
            "line": {"color": COLOURS[at % len(COLOURS)], "width": 2},
            "marker": {"size": 5},
        }
        for at, name in enumerate(names)
    ]
    return _plain(data, title, {"title": {"text": unit}, "rangemode": "normal"})


def bars(values: dict[str, float], unit: str = "", title: str = "", strong: str = "") -> dict[str, Any]:
    """Named values as horizontal bars, the first at the top: a Plotly figure made without HoloViews. `strong`: the name
    of the one that the others are compared with."""
    names = [*values][::-1]
    colours = [COLOURS[0] if name == strong or not strong else COLOURS[5] for name in names]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [values[name] for name in names],
        "marker": {"color": colours},
    }
    return _plain([trace], title, {}, {"title": {"text": unit}})


def style_bokeh() -> None:
    """Plots that a notebook makes by hvPlot itself, as `frame.hvplot.bar(...)` with Bokeh, look like the others."""
    import holoviews as hv

    import_module("holoviews.plotting.bokeh")
    hv.opts.defaults(*_styles("bokeh"))
    for kind in (hv.opts.Bars, hv.opts.Curve, hv.opts.Area, hv.opts.Scatter):
        hv.opts.defaults(kind(hooks=[_tidy_bokeh], backend="bokeh"))


def _tidy_bokeh(plot: Any, _: Any) -> None:
    """What is around the marks; a hook, as HoloViews calls it on each plot."""
    from bokeh.models import BasicTickFormatter, CategoricalAxis, NumeralTickFormatter

    figure = plot.state
    figure.outline_line_color = figure.background_fill_color = figure.border_fill_color = None
    figure.title.update(text_font=FONT, text_font_size="15px", text_color=INK)
    has_names = any(isinstance(axis, CategoricalAxis) for axis in figure.yaxis)
    for axes, grids, is_ruled in ((figure.xaxis, figure.xgrid, has_names), (figure.yaxis, figure.ygrid, not has_names)):
        for axis in axes:
            axis.update(axis_line_color=None, major_tick_line_color=None, minor_tick_line_color=None)
            axis.update(axis_label_text_font=FONT, axis_label_text_color=INK, axis_label_text_font_style="normal")
            axis.update(major_label_text_font=FONT, major_label_text_color=INK)
            if isinstance(axis.formatter, BasicTickFormatter):
                axis.formatter = NumeralTickFormatter(format="0,0.[0000]")
        for grid in grids:
            grid.update(grid_line_color=FAINT if is_ruled else None, visible=True)


def _plain(data: list[Any], title: str, y: dict[str, Any], x: dict[str, Any] | None = None) -> dict[str, Any]:
    import plotly.graph_objects as go

    figure = go.Figure({"data": data, "layout": {"title": {"text": title}, "xaxis": x or {}, "yaxis": y}})
    _tidy_plotly(figure, is_reversed=False)
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _made(backend: str, chart: Chart, frame: pl.DataFrame) -> Any:
    """The HoloViews object, in this project's colours, without `hv.extension` and what it would publish."""
    import holoviews as hv

    module = "mpl" if backend == "matplotlib" else backend
    import_module(f"holoviews.plotting.{module}")
    with _drawing:
        before = hv.Store.current_backend
        hv.Store.set_current_backend(backend)
        try:
            made = (chart if frame.height else _nothing)(frame)
            if isinstance(made, maps.Areas):
                return made
            if isinstance(made, hv.Bars) and len(made.kdims) == 2:  # groups as they come, not by the alphabet
                made = made.redim.values(**{made.kdims[1].name: made.dimension_values(1, expanded=False)})
            return made.opts(*_styles(backend))
        finally:
            hv.Store.set_current_backend(before)


def _nothing(frame: pl.DataFrame) -> Any:
    import holoviews as hv

    return hv.Curve([]).opts(title="No rows", xaxis=None, yaxis=None)


def _drawn(backend: str, chart: Chart, frame: pl.DataFrame) -> Any:
    """The backend's own figure: a Matplotlib Figure, a Plotly dict, of a map a Plotly Figure."""
    import holoviews as hv

    made = _made(backend, chart, frame)
    if isinstance(made, maps.Areas):
        return getattr(maps, backend)(made)
    return hv.renderer(backend).get_plot_state(made)


def _styles(backend: str) -> list["opts.Options"]:
    """Colours, and what a backend alone understands. Sizes follow in `_tidy_*`."""
    from holoviews import Cycle, opts
    from holoviews.plotting.util import process_cmap

    colours = Cycle(values=COLOURS)
    is_matplotlib = backend == "matplotlib"
    edges: dict[str, dict[str, Any]] = {"matplotlib": {"edgecolor": "none"}, "bokeh": {"line_color": None}}
    of_bars = edges.get(backend, {})
    of_dots: dict[str, Any] = {"marker": "o", "s": 30} if is_matplotlib else {"marker": "circle", "size": 7}
    return [
        opts.Bars(color=colours, multi_level=False, **of_bars, backend=backend),
        opts.Curve(color=colours, backend=backend),
        opts.Area(color=colours, backend=backend),
        opts.Scatter(color=COLOURS[1], **of_dots, backend=backend),
        # the lighter half: dark text can be read on all of it
        opts.HeatMap(cmap=process_cmap("Blues", 64)[:36], backend=backend),
    ]


def _tidy_map(figure: "Figure") -> None:
    figure.set_size_inches(WIDTH_PX / 100, HEIGHT_PX / 100)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.axes[0]
    axes.set_title(axes.get_title(), loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_title("", loc="center")


def _tidy_matplotlib(figure: "Figure") -> None:
    from matplotlib import dates, ticker

    figure.set_size_inches(WIDTH_PX / 100, HEIGHT_PX / 100)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes, *colour_bars = figure.axes
    for bar in colour_bars:  # the cells of a heat map carry their values
        bar.remove()
    for text in axes.texts:
        value = text.get_text()
        text.set(text="" if value == "-" else f"{float(value):,.2f}", fontsize=9, color=INK)
    axes.set_aspect("auto")
    _dots_matplotlib(axes)
    axes.set_title(axes.get_title(), loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_title("", loc="center")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9, color=INK)
        axis.set_zorder(-1)  # the grid: HoloViews draws at 0
    x_named, y_named = (isinstance(axis.get_major_locator(), ticker.FixedLocator) for axis in (axes.xaxis, axes.yaxis))
    if not (x_named and y_named):
        axes.grid(axis="x" if y_named else "y", color=FAINT, linewidth=0.8)
    if x_named:
        names = [label.get_text() for label in axes.get_xticklabels()]
        step = len(names) // MOST_NAMES + 1
        slanted: dict[str, Any] = {"rotation": 30, "ha": "right"} if sum(map(len, names[::step])) > MOST_LETTERS else {}
        axes.set_xticks(axes.get_xticks()[::step], names[::step], **slanted)
        if len(names) < 3 and not y_named:  # one bar need not fill the page
            bars = axes.get_xticks()
            axes.set_xlim(bars[0] - 1, bars[-1] + 1)
    if x_named != y_named:
        _tidy_values(axes.xaxis if y_named else axes.yaxis, [bar for bars in axes.containers for bar in bars])
    if isinstance(axes.xaxis.get_major_locator(), dates.DateLocator):
        locator = dates.AutoDateLocator(maxticks=8)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        axes.xaxis.get_offset_text().set(fontsize=9, color=INK)
    if legend := axes.get_legend():
        stacked = any(bar.get_y() for bars in axes.containers for bar in bars)
        step = -1 if stacked else 1  # a stack is read from the top
        axes.legend(
            [handle for handle in legend.legend_handles[::step] if handle is not None],
            [text.get_text() for text in legend.get_texts()][::step],
            loc="upper left",
            bbox_to_anchor=(1, 1),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )


def _tidy_values(axis: Any, bars: Sequence[Any]) -> None:
    """The scale of bars, in numbers as people write them; without halves where what they count has none."""
    from matplotlib import ticker

    lengths = [float(bar.get_width() if axis.axis_name == "x" else bar.get_height()) for bar in bars]
    if all(length.is_integer() for length in lengths):
        axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))


def are_close(values: Sequence[float]) -> bool:
    """Whether bars of such lengths would look alike: three or more, none of them at or below zero."""
    return len(values) > 2 and min(values) > 0 and max(values) - min(values) < CLOSE * max(values)


def _fitted(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and where the scale of such values begins and ends."""
    low, high = min(values), max(values)
    margin = 0.25 * (high - low) or 0.01 * high
    return sum(values) / len(values), low - margin, high + margin


def _dots_matplotlib(axes: Any) -> None:
    """Bars that look alike as dots, and their mean as a line."""
    containers = [group for group in axes.containers if len(group)]
    if len(containers) == 1:  # as HoloViews draws them: of one colour in one group, or each on its own
        bars = [*containers[0]]
    elif all(len(group) == 1 for group in containers) and not axes.get_legend():
        bars = [group[0] for group in containers]
    else:
        return
    rows = len({round(bar.get_x(), 6) for bar in bars}) == 1
    lengths = [float(bar.get_width() if rows else bar.get_height()) for bar in bars]
    if not are_close(lengths):
        return
    middles = [bar.get_y() + bar.get_height() / 2 if rows else bar.get_x() + bar.get_width() / 2 for bar in bars]
    mean, low, high = _fitted(lengths)
    for bar in bars:
        bar.set_visible(False)
    axes.scatter(*((lengths, middles) if rows else (middles, lengths)), s=60, color=COLOURS[0], zorder=3)
    (axes.set_xlim if rows else axes.set_ylim)(low, high)
    (axes.axvline if rows else axes.axhline)(mean, color=COLOURS[5], linewidth=1, linestyle="--")
    where = (mean, 1.0, f" {_mean(mean)}") if rows else (1.0, mean, f" {_mean(mean)}")
    to = axes.get_xaxis_transform() if rows else axes.get_yaxis_transform()
    axes.text(*where, transform=to, fontsize=9, color=INK, va="bottom" if rows else "center")


def _mean(value: float) -> str:
    return f"mean {value:,.4g}"


def _dots_plotly(figure: "go.Figure") -> bool:
    """As `_dots_matplotlib`; whether it did."""
    import plotly.graph_objects as go

    if len(figure.data) != 1 or figure.data[0].type != "bar":
        return False
    [trace] = figure.data
    rows = trace.orientation == "h"
    lengths = [float(value) for value in _listed(trace.x if rows else trace.y) if value is not None]
    if not are_close(lengths):
        return False
    mean, low, high = _fitted(lengths)
    dots = go.Scatter(x=trace.x, y=trace.y, mode="markers", marker={"size": 11, "color": COLOURS[0]})
    figure.data = ()
    figure.add_trace(dots)
    add = figure.add_vline if rows else figure.add_hline
    side = {} if rows else {"x": 1, "xanchor": "left", "yanchor": "middle"}
    note = {"text": f" {_mean(mean)}", "showarrow": False, "font": {"size": 11}} | side
    add(mean, line={"color": COLOURS[5], "width": 1, "dash": "dash"}, annotation=note)
    (figure.update_xaxes if rows else figure.update_yaxes)(range=[low, high])
    (figure.update_yaxes if rows else figure.update_xaxes)(type="category", range=None)
    return True


def _listed(values: Any) -> list[Any]:
    """The values of a trace, which Plotly keeps as tuples, arrays or base64."""
    if isinstance(values, dict):
        import base64

        import numpy as np

        values = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return [] if values is None else list(values)


def _tidy_plotly(figure: "go.Figure", is_reversed: bool = True) -> None:
    """`is_reversed`: HoloViews hands over the last bars first."""
    bars = [trace for trace in figure.data if trace.type == "bar"]
    if bars and is_reversed:
        figure.data = bars[::-1]
        for trace, colour in zip(figure.data, COLOURS, strict=False):
            trace.marker.color = colour
    rows = any(trace.type == "bar" and trace.orientation == "h" for trace in figure.data)
    named_x = any(trace.type == "heatmap" or trace.type == "bar" and not rows for trace in figure.data)
    named_y = any(trace.type == "heatmap" or trace.type == "bar" and rows for trace in figure.data)
    is_dotted = _dots_plotly(figure)
    figure.update_traces(selector={"type": "heatmap"}, showscale=False, texttemplate="%{z:,.2f}", textfont_color=INK)
    figure.update_layout(_layout(bool(figure.layout.title.text)))
    if len(figure.data) > 1:
        legend = {"orientation": "h", "y": -0.3, "x": 0}
        figure.update_layout(showlegend=True, legend=legend, height=HEIGHT_PX + LEGEND_PX)
    figure.update_xaxes(automargin=True, gridcolor=FAINT, showgrid=named_y and not named_x, zeroline=False)
    figure.update_yaxes(automargin=True, gridcolor=FAINT, showgrid=not named_y, zeroline=False)
    if is_dotted and not rows:
        figure.update_layout(margin={"r": MEAN_PX})
    for trace in figure.data:
        trace.hovertemplate = _hover(figure, trace, rows)


def _layout(is_titled: bool) -> dict[str, Any]:
    """What all figures have in common."""
    return {
        "template": "none",
        "autosize": True,
        "width": None,
        "height": HEIGHT_PX,
        "margin": {"l": 10, "r": 10, "t": 45 if is_titled else 10, "b": 10},
        "font": {"color": INK, "size": 12, "family": FONT},
        "title": {"x": 0, "xref": "container", "font": {"size": 15, "weight": 600}},
        "showlegend": False,
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "hoverlabel": {"align": "left"},
    }


def _hover(figure: "go.Figure", trace: Any, rows: bool) -> str:
    """What stands beside the pointer: "06:19 UTC · 136.3 million"."""
    if trace.type == "heatmap":
        return "%{y}, %{x} · %{z:,.2f}<extra></extra>"
    along, value = ("y", "x") if rows else ("x", "y")
    axis = figure.layout.xaxis if rows else figure.layout.yaxis
    unit = next((unit for unit in _SAID if (axis.title.text or "").endswith(unit)), "")
    values = [each for each in _listed(trace[value]) if each is not None]
    digits = ",.1f" if unit else ",d" if all(float(each).is_integer() for each in values) else ",.4~f"
    places = [str(each) for each in _listed(trace[along])]
    name = "%{fullData.name} · " if len(figure.data) > 1 else ""
    if places and all(_MOMENT.match(each) for each in places):
        days = {each[:10] for each in places}
        whole = all(each[11:19] in ("", "00:00:00") for each in places)
        at = "%Y-%m-%d" if whole else "%H:%M" if len(days) == 1 else "%Y-%m-%d %H:%M"
        where = f"%{{{along}|{at}}}{'' if whole else ' UTC'}"
    else:
        where = f"%{{{along}}}"
    return f"{where} · {name}%{{{value}:{digits}}}{_SAID.get(unit, '')}<extra></extra>"


_SAID = {plural: f" {plural[:-1]}" for _, plural in UNITS} | {"percent": " %"}
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d([T ]|$)")
