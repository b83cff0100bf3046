"""A map as a chart: named areas, filled by a value. Outlines are the project's own data, so nothing asks a network.

Plotly's own choropleths fetch the outlines of countries from its makers as soon as a page draws one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl
    from matplotlib.figure import Figure

Outlines = Mapping[str, Sequence[Sequence[float]]]  # name -> rings of longitude, latitude, longitude, ..., in degrees
PALE, STRONG = "#bcd4ee", "#174a86"  # of the lowest value and of the highest
LAND = "rgba(128,128,128,0.22)"  # without a value: on a light and on a dark page
EDGE = "#ffffff"


@dataclass(frozen=True)
class Areas:
    """Areas by their values. `texts`: what stands beside the pointer; `label`: what the values are."""

    outlines: Outlines
    values: Mapping[str, float]
    texts: Mapping[str, str]
    title: str
    label: str

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        known = [value for name, value in self.values.items() if name in self.outlines]
        return (min(known), max(known)) if known else (0, 1)

    def colour(self, name: str) -> str | None:
        """That of an area; None without a value."""
        if name not in self.values:
            return None
        low, high = self.span
        share = (self.values[name] - low) / (high - low) if high > low else 1
        ends = [[int(end[at : at + 2], 16) for at in (1, 3, 5)] for end in (PALE, STRONG)]
        return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def areas(
    frame: "pl.DataFrame", outlines: Outlines, *, name: str, value: str, text: str | None = None, title: str, label: str
) -> Areas:
    """A chart of the rows whose `name` has an outline. `text`: a column of what stands beside the pointer."""
    names = frame[name].to_list()
    said = frame[text].to_list() if text else [f"{at} · {of:,.4g}" for at, of in zip(names, frame[value], strict=True)]
    values = {at: float(of) for at, of in zip(names, frame[value], strict=True) if of is not None}
    return Areas(outlines, values, dict(zip(names, said, strict=True)), title, label)


def plotly(chart: Areas) -> "go.Figure":
    """Polygons on plain axes."""
    import numpy as np
    import plotly.graph_objects as go

    def polygon(names: Sequence[str], colour: str, **more: Any) -> go.Scatter:
        gap = [np.nan, np.nan]
        points = [[*ring, *gap] for name in names for ring in chart.outlines[name]]
        flat = np.array([number for ring in points for number in ring], "float32")
        line = {"width": 0.5, "color": EDGE}
        look = {"mode": "lines", "fill": "toself", "fillcolor": colour, "line": line}
        return go.Scatter(x=flat[0::2], y=flat[1::2], showlegend=False, **look, **more)

    coloured = {name: colour for name in chart.outlines if (colour := chart.colour(name))}
    figure = go.Figure()
    figure.add_trace(polygon([name for name in chart.outlines if name not in coloured], LAND, hoverinfo="skip"))
    for name, colour in coloured.items():
        figure.add_trace(polygon([name], colour, hoveron="fills", hoverinfo="text", text=chart.texts[name]))
    low, high = chart.span
    bar = {"thickness": 8, "len": 0.7, "title": {"text": chart.label, "side": "right"}, "outlinewidth": 0}
    scale = {"colorscale": [[0, PALE], [1, STRONG]], "cmin": low, "cmax": high, "color": [low], "colorbar": bar}
    figure.add_trace(
        go.Scatter(x=[None], y=[None], mode="markers", marker=scale | {"showscale": True}, showlegend=False)
    )
    figure.update_layout(title=chart.title)
    figure.update_xaxes(visible=False, range=[-172, 182])
    figure.update_yaxes(visible=False, range=[-57, 84], scaleanchor="x")
    return figure


def matplotlib(chart: Areas) -> "Figure":
    """The same, for a report."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for name, rings in chart.outlines.items():
        shapes = [list(zip(ring[0::2], ring[1::2], strict=True)) for ring in rings]
        colour = chart.colour(name) or "#e3e3e3"
        axes.add_collection(PolyCollection(shapes, facecolor=colour, edgecolor=EDGE, linewidth=0.4))
    axes.set(xlim=(-172, 182), ylim=(-57, 84), aspect="equal")
    axes.set_axis_off()
    axes.set_title(chart.title)
    shades = LinearSegmentedColormap.from_list("areas", [PALE, STRONG])
    bar = figure.colorbar(ScalarMappable(Normalize(*chart.span), shades), ax=axes, shrink=0.7, pad=0.01, aspect=25)
    bar.set_label(chart.label, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9)
    return figure
