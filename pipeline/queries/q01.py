"""Pricing summary

How much was sold, returned and still open, at list price, discounted and with tax, for everything shipped up to some
days before 1 December 1998? (TPC-H Q1)
"""

from datetime import date, timedelta

import narwhals as nw

from etl.questions.exact import money
from pipeline.queries._revenue import revenue

TABLES = {
    "lineitem": [
        "l_returnflag",
        "l_linestatus",
        "l_shipdate",
        "l_quantity",
        "l_extendedprice",
        "l_discount",
        "l_tax",
    ],
}
FIGURE = "charge"


MERGES = dict.fromkeys(("quantity", "list_price", "revenue", "tax", "discount", "line_items"), "sum")


def portion(lineitem, *, days: int = 90):
    """What some line items come to, by return flag and line status: whole numbers, in hundredths and their products."""
    return (
        lineitem.filter(nw.col("l_shipdate") <= date(1998, 12, 1) - timedelta(days=days))
        .select(
            return_flag=nw.col("l_returnflag"),
            line_status=nw.col("l_linestatus"),
            quantity=nw.col("l_quantity"),
            list_price=nw.col("l_extendedprice"),
            revenue=revenue(),
            tax=revenue() * nw.col("l_tax"),
            discount=nw.col("l_discount"),
        )
        .group_by("return_flag", "line_status")
        .agg(
            nw.col("quantity", "list_price", "revenue", "tax", "discount").sum(),
            nw.len().alias("line_items"),
        )
    )


def answer(sums):
    """One row for each return flag and line status; averages are floats, all money is exact."""
    return sums.select(
        "return_flag",
        "line_status",
        quantity=money("quantity", 2),
        list_price=money("list_price", 2),
        revenue=money("revenue", 4),
        charge=money("revenue", 4) + money("tax", 6),
        average_quantity=nw.col("quantity") / nw.col("line_items") / 100,
        average_price=nw.col("list_price") / nw.col("line_items") / 100,
        average_discount=nw.col("discount") / nw.col("line_items") / 100,
        line_items=nw.col("line_items").cast(nw.Int64),
    ).sort("return_flag", "line_status")


def chart(result):
    import polars as pl

    from etl.charts import in_units, plot

    returned = pl.col("return_flag").replace({"A": "accepted", "R": "returned", "N": "not received"})
    status = pl.col("line_status").replace({"F": "filled", "O": "open"})
    items = result.with_columns(items=returned + ", " + status).reverse()  # bars go upwards
    frame, unit = in_units(items, "charge")
    return plot(frame).barh(
        x="items", y="charge", title="Charged, with tax, by state of the line item", xlabel="", ylabel=unit
    )
