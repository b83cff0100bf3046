"""Every question's chart is drawn by every backend, also from no rows, and brings no JavaScript into a notebook."""

import base64
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import nbclient
import nbformat
import numpy as np
import polars as pl
import pytest
from PIL import Image

from pipeline import charts
from pipeline.queries import questions

REGIONS = ["AFRICA", "ASIA", "EUROPE"]
MONEY = [Decimal("1200000.5000"), Decimal("3400000.0000"), Decimal("250000.2500")]
RESULTS = {
    "q01": {"return_flag": ["A", "N", "R"], "line_status": ["F", "O", "F"], "charge": MONEY},
    "q05": {"nation": ["CHINA", "INDIA", "JAPAN"], "revenue": MONEY},
    "recommended_suppliers": {
        "region": REGIONS,
        "part_type": ["SMALL PLATED TIN", "LARGE BRUSHED STEEL", "SMALL PLATED BRASS"],
        "supply_cost": MONEY,
    },
    "revenue_per_minute": {
        "minute": [datetime(2026, 11, 1, 12, tzinfo=UTC) + timedelta(minutes=i) for i in range(3)],
        "revenue": MONEY,
    },
    "unshipped_orders": {"segment": ["A", "A", "B"], "priority": ["1-URGENT", "2-HIGH", "5-LOW"], "revenue": MONEY},
}
every_question = pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)


def result_of(question):
    return pl.DataFrame(RESULTS[question.name])


@every_question
def test_a_picture_has_the_size_of_the_report_and_is_small(question):
    picture = charts.show(question.chart, result_of(question))
    png, size = picture._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert image.size == (charts.WIDTH_PX * charts.DENSITY, charts.HEIGHT_PX * charts.DENSITY)
    assert size["width"] == charts.WIDTH_PX
    assert len(png) < 40_000
    assert len(image.getcolors()) > 4  # something is drawn


@every_question
def test_plotly_draws_the_same_figures(question):
    figure = charts.plotly(question.chart, result_of(question))
    assert figure.layout.title.text
    assert figure.layout.width is None
    largest = 3_400_000.0 if question.name == "recommended_suppliers" else 3.4
    numbers = [number for trace in figure.data for number in numbers_of(trace)]
    assert max(numbers) == pytest.approx(largest)


def numbers_of(trace):
    """The floats of a trace. Plotly keeps arrays of numbers as base64."""
    for values in (trace.x, trace.y, getattr(trace, "z", None)):
        if isinstance(values, dict) and values["dtype"] == "f8":
            array = np.frombuffer(base64.b64decode(values["bdata"]))
            yield from array[~np.isnan(array)]


@every_question
def test_no_rows_are_drawn_as_no_rows(question):
    nothing = result_of(question).clear()
    assert charts.show(question.chart, nothing)._repr_png_()[0].startswith(b"\x89PNG")
    assert charts.plotly(question.chart, nothing).layout.title.text == "No rows"


def test_a_stack_has_the_same_colours_and_order_on_the_dashboard():
    (question,) = (q for q in questions() if q.name == "unshipped_orders")
    figure = charts.plotly(question.chart, result_of(question))
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


@pytest.mark.parametrize(
    "largest, unit", [("3400000000", "billions"), ("999999", "thousands"), ("1000000", "millions"), ("12", "")]
)
def test_units_suit_the_largest_value(largest, unit):
    frame = pl.DataFrame({"net_revenue": [Decimal("1"), Decimal(largest)]})
    scaled, label = charts.in_units(frame, "net_revenue")
    assert label == f"net revenue, {unit}".removesuffix(", ")
    assert 1 <= scaled["net_revenue"].max() < 1000


def test_a_notebook_gets_one_png_and_nothing_else_and_bokeh_when_asked_for():
    cells = [
        "import polars as pl\n"
        "from pipeline import charts\n"
        "from pipeline.queries import questions\n"
        "question = next(q for q in questions() if q.name == 'q05')\n"
        "result = pl.DataFrame({'nation': ['CHINA', 'INDIA'], 'revenue': [2.5, 1.5]})",
        "charts.show(question.chart, result)",
        "import os\nos.environ['ETL_CHARTS'] = 'bokeh'\ncharts.show(question.chart, result)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook).execute()
    imports, picture, live = (cell.outputs for cell in notebook.cells)
    assert imports == []
    assert [set(output.data) for output in picture] == [{"image/png", "text/plain"}]
    assert any("bokeh" in output.data.get("text/html", "").lower() for output in live if "data" in output)


def test_a_table_reads_as_people_write_and_holds_no_markup():
    frame = pl.DataFrame(
        {
            "part_key": [1234567, None],
            "name": ["<script>x</script>", None],
            "price": [Decimal("1234.50"), None],
            "share": [0.123456, 1e7],
            "at": [datetime(2026, 3, 1, 12, 0, 5, 999), None],
        }
    )
    text = charts.table(frame, rows=1)._repr_html_()
    assert '<th align="right">part key</th><th>name</th>' in text
    assert '<td align="right">1,234,567</td><td>&lt;script&gt;x&lt;/script&gt;</td>' in text
    assert '<td align="right">1,234.50</td><td align="right">0.1235</td><td>2026-03-01 12:00:05</td>' in text
    assert "and 1 more rows" in text
    assert charts.table(frame, rows=2)._repr_html_().count("<td></td>") == 4
