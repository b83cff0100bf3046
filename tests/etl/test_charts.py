"""Every question's chart is drawn by every backend, also from no rows, and brings no JavaScript into a notebook."""

import io
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import nbclient
import nbformat
import numpy as np
import polars as pl
import pytest
from faults.answers import one_tick
from PIL import Image

from etl import charts, maps
from pipeline.queries import ask, questions

MONEY = [Decimal("1200000.5000"), Decimal("3400000.0000"), Decimal("250000.2500")]
BY_NATION = pl.DataFrame({"nation": ["CHINA", "INDIA", "JAPAN"], "revenue": MONEY})
UNSHIPPED = pl.DataFrame({"segment": ["A", "A", "B"], "priority": ["1-URGENT", "2-HIGH", "5-LOW"], "revenue": MONEY})
CHARTED = {question.name: question for question in questions() if question.chart}
every_chart = pytest.mark.parametrize("name", CHARTED)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Each charted question's answer from TPC-H at scale 0.01, a minute after the orders came."""
    snapshot, _ = one_tick(tmp_path_factory.mktemp("tpch"), 0.01)
    later = replace(snapshot, as_of=snapshot.as_of + timedelta(minutes=1))
    return {name: ask(question, later) for name, question in CHARTED.items()}


@every_chart
def test_a_picture_has_the_size_of_the_report_and_is_small(answers, name):
    picture = charts.show(CHARTED[name].chart, answers[name])
    png, size = picture._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert image.size == (charts.WIDTH_PX * charts.DENSITY, charts.HEIGHT_PX * charts.DENSITY)
    assert size["width"] == charts.WIDTH_PX
    assert len(png) < 40_000
    assert len(image.getcolors()) > 4  # something is drawn


@every_chart
def test_plotly_draws_figures_with_a_title(answers, name):
    figure = charts.plotly(CHARTED[name].chart, answers[name])
    assert figure.layout.title.text != "No rows"
    assert figure.layout.width is None
    assert max(number for trace in figure.data for number in numbers_of(trace)) >= 0


def test_plotly_draws_the_same_figures():
    figure = charts.plotly(CHARTED["q05"].chart, BY_NATION)
    assert max(number for trace in figure.data for number in numbers_of(trace)) == pytest.approx(3.4)


def test_a_plot_that_a_notebook_makes_with_bokeh_looks_like_the_others():
    """In a kernel of its own, as the style is of the whole process."""
    done = subprocess.run([sys.executable, "-c", BY_BOKEH], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [
        *("#2f6db5", "None", charts.FAINT, "None", charts.INK, "NumeralTickFormatter"),
        *("#2f6db5", "None", charts.FAINT, charts.INK, "NumeralTickFormatter"),
    ], done.stderr[-2000:]


BY_BOKEH = """
import holoviews as hv, hvplot.polars, polars as pl
from etl import charts
charts.style_bokeh()
frame = pl.DataFrame({"name": ["a", "b"], "at": [1, 2], "of": [1234567.5, 2.0]})
drawn = hv.renderer("bokeh").get_plot(frame.hvplot.barh(x="name", y="of", title="Of")).state
[bars], x, y = drawn.renderers, drawn.xaxis[0], drawn.yaxis[0]
print(bars.glyph.fill_color, bars.glyph.line_color, drawn.xgrid[0].grid_line_color, drawn.ygrid[0].grid_line_color)
print(drawn.title.text_color, type(x.formatter).__name__)
drawn = hv.renderer("bokeh").get_plot(frame.hvplot.line(x="at", y="of")).state
[line], x, y = drawn.renderers, drawn.xaxis[0], drawn.yaxis[0]
print(line.glyph.line_color, drawn.xgrid[0].grid_line_color, drawn.ygrid[0].grid_line_color)
print(y.major_label_text_color, type(y.formatter).__name__)
"""


def test_bars_that_look_alike_are_dots_around_their_mean_on_a_fitted_scale():
    """Of seven bars from 60.8 to 63.6 percent nobody saw which is the longest."""
    alike = pl.DataFrame({"ship_mode": ["AIR", "FOB", "MAIL"], "late_share": [0.60, 0.62, 0.64]})
    apart = alike.with_columns(late_share=pl.Series([0.1, 0.2, 0.4]))
    chart = CHARTED["late_deliveries"].chart
    figure = charts.plotly(chart, alike)
    [dots] = figure.data
    assert (dots.type, dots.mode, list(numbers_of(dots))) == ("scatter", "markers", [60, 62, 64])
    assert [round(end) for end in figure.layout.yaxis.range] == [59, 65]
    assert figure.layout.annotations[0].text.strip() == "mean 62"
    assert dots.hovertemplate == "%{x} · %{y:,.1f} %<extra></extra>"
    assert charts.plotly(chart, apart).data[0].type == "bar"
    drawn, bars = (charts._drawn("matplotlib", chart, frame) for frame in (alike, apart))
    for made in (drawn, bars):
        charts._tidy_matplotlib(made)
    assert [round(end) for end in drawn.axes[0].get_ylim()] == [59, 65]
    assert "mean 62" in [text.get_text().strip() for text in drawn.axes[0].texts]
    assert bars.axes[0].get_ylim()[0] == 0 and not bars.axes[0].texts


def test_beside_the_pointer_stand_the_time_and_the_figure_with_its_unit(answers):
    [line] = charts.plotly(CHARTED["revenue_per_minute"].chart, answers["revenue_per_minute"]).data
    assert line.hovertemplate == "%{x|%H:%M} UTC · %{y:,.1f} billion<extra></extra>"
    days = [datetime(2026, 3, day) for day in (1, 2, 3)]
    own = charts.line(pl.DataFrame({"day": days, "orders": [1, 2, 3]}), "orders")
    assert own["data"][0]["hovertemplate"] == "%{x|%Y-%m-%d} · %{y:,d}<extra></extra>"
    moments = pl.DataFrame({"at": [datetime(2026, 3, 1, 12, 0, 5), days[2]], "a": [1.5, 2], "b": [2, None]})
    two = charts.line(moments, "a", "b", unit="s")["data"]
    assert two[0]["hovertemplate"] == "%{x|%Y-%m-%d %H:%M} UTC · %{fullData.name} · %{y:,.4~f}<extra></extra>"
    assert charts.bars({"long": 3.0, "short": 1.0})["data"][0]["y"] == ["short", "long"], "the first at the top"


def numbers_of(trace):
    """The numbers of a trace."""
    for values in (trace.x, trace.y, getattr(trace, "z", None)):
        numbers = [value for value in charts._listed(values) if isinstance(value, float | int | np.number)]
        yield from (number for number in numbers if not np.isnan(number))


def test_a_map_needs_no_network_and_fills_the_areas_that_have_a_value(answers):
    answer = answers["recommended_suppliers"]
    figure = charts.plotly(CHARTED["recommended_suppliers"].chart, answer)
    assert {trace.type for trace in figure.data} == {"scatter"}, "Plotly's own maps fetch their outlines"
    filled = {trace.text: trace.fillcolor for trace in figure.data if trace.hoveron == "fills"}
    assert len(filled) == answer["nation"].n_unique(), "each nation has its outline"
    counts = dict(answer.group_by("nation").len().iter_rows())
    said = {text.partition(" (")[0].upper(): text for text in filled}
    assert all(f"· {count} part types" in said[nation] for nation, count in counts.items())
    assert filled[said[max(counts, key=counts.get)]] == maps.STRONG
    assert filled[said[min(counts, key=counts.get)]] == maps.PALE


def test_no_rows_are_drawn_as_no_rows():
    chart, nothing = CHARTED["q05"].chart, BY_NATION.clear()
    assert charts.show(chart, nothing)._repr_html_() == "<p><small>nothing to draw: no rows</small></p>"
    assert charts.png(chart, nothing).startswith(b"\x89PNG")
    assert charts.plotly(chart, nothing).layout.title.text == "No rows"


def test_a_stack_has_the_same_colours_and_order_on_the_dashboard():
    figure = charts.plotly(CHARTED["unshipped_orders"].chart, UNSHIPPED)
    assert [trace.name for trace in figure.data] == ["1-URGENT", "2-HIGH", "5-LOW"]
    assert [trace.marker.color for trace in figure.data] == charts.COLOURS[:3]


def test_groups_stand_in_the_order_of_the_rows_not_of_the_alphabet():
    frame = pl.DataFrame({"table": ["orders", "orders"], "when": ["before", "after"], "files": [30, 1]})

    def chart(rows):
        return charts.plot(rows).bar(x="table", y="files", by="when", title="Files", xlabel="", ylabel="files")

    figure = charts.plotly(chart, frame)
    assert [trace.name for trace in figure.data] == ["before", "after"]
    drawn = charts._drawn("matplotlib", chart, frame).axes[0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["before", "after"]
    assert [bars[0].get_height() for bars in drawn.containers] == [30, 1]


def test_a_scale_is_in_numbers_as_people_write_them_and_has_no_halves_of_what_is_counted():
    def ticks(*values):
        frame = pl.DataFrame({"table": ["orders", "parts"], "files": values})
        drawn = charts._drawn("matplotlib", lambda rows: charts.plot(rows).bar(x="table", y="files"), frame)
        charts._tidy_matplotlib(drawn)
        drawn.canvas.draw()
        return [label.get_text() for label in drawn.axes[0].get_yticklabels()]

    assert ticks(1, 2)[:2] == ["0", "1"]
    assert "0.5" in ticks(0.5, 2.0)
    assert "5,000" in ticks(17_000, 4)


@pytest.mark.parametrize(
    "largest, unit", [("3400000000", "billions"), ("999999", "thousands"), ("1000000", "millions"), ("12", "")]
)
def test_units_suit_the_largest_value(largest, unit):
    frame = pl.DataFrame({"net_revenue": [Decimal("1"), Decimal(largest)]})
    scaled, label = charts.in_units(frame, "net_revenue")
    assert label == f"net revenue, {unit}".removesuffix(", ")
    assert 1 <= scaled["net_revenue"].max() < 1000
    shares, label = charts.in_units(pl.DataFrame({"Late share": [0.632]}), "Late share")
    assert (shares["Late share"].round(9).to_list(), label) == ([63.2], "Late share, percent")


def test_a_notebook_gets_one_png_and_nothing_else_or_one_live_plot_when_asked_for():
    cells = [
        "import polars as pl\n"
        "from etl import charts\n"
        "from pipeline.queries import ask, questions\n"
        "question = next(q for q in questions() if q.name == 'q05')\n"
        "result = pl.DataFrame({'nation': ['CHINA', 'INDIA'], 'revenue': [2.5, 1.5]})",
        "charts.show(question.chart, result)",
        "import os\nos.environ['ETL_CHARTS'] = 'plotly'\ncharts.show(question.chart, result)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook).execute()
    imports, picture, live = (cell.outputs for cell in notebook.cells)
    assert imports == []
    assert [set(output.data) for output in picture] == [{"image/png", "text/plain"}]
    assert [set(output.data) for output in live] == [{"application/vnd.plotly.v1+json", "text/plain"}]


def test_a_note_that_is_the_same_in_all_rows_is_one_sentence():
    note = "nothing removed: the clock went back <b>"
    frame = pl.DataFrame({"table": ["a", "b"], "note": [note, note], "failed": [None, None], "kind": ["x", "x"]})
    text = charts.table(frame, rows=1)._repr_html_()
    assert "<th>note</th>" not in text and "<th>failed</th>" not in text and "<th>kind</th>" in text
    assert "note: nothing removed: the clock went back &lt;b&gt; (in all 2 rows)<" in text
    assert "failed: none (in all 2 rows)<" in text
    assert "<th>note</th>" in charts.table(frame.head(1))._repr_html_()  # of one row


def test_a_table_reads_as_people_write_and_holds_no_markup():
    frame = pl.DataFrame(
        {
            "part_key": [1234567, None],
            "rows": [1234567, None],
            "name": ["<script>x</script>", None],
            "price": [Decimal("1234.5049"), None],
            "ratio": [0.123456, 1e7],
            "late_share": [0.123456, None],
            "mean_mb": [0.002159, None],
            "order_year": [1995, None],
            "at": [datetime(2026, 3, 1, 12, 0, 5, 999), None],
        }
    )
    text = charts.table(frame, rows=1)._repr_html_()
    assert '<th align="right">part key</th><th align="right">rows</th><th>name</th>' in text
    assert '<th align="right">mean MB</th>' in text
    assert (
        '<td align="right">1234567</td><td align="right">1,234,567</td><td>&lt;script&gt;x&lt;/script&gt;</td>' in text
    )
    numbers = ["1,234.50", "0.1235", "12.3 %", "&lt; 0.01", "1995"]
    time = '<td class="time">2026-03-01 12:00:05</td>'
    assert "".join(f'<td align="right">{number}</td>' for number in numbers) + time in text
    assert "and 1 more row<" in text
    assert charts.table(frame, rows=2)._repr_html_().count(">–</td>") == 8
    short = charts.table(frame, rows=1, letters=9)._repr_html_()
    assert '<table class="short">' in short and "<td>&lt;script&gt;x…</td>" in short
