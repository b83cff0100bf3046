"""Order priority checking

How many of a quarter's orders had an item that came later than promised, by the order's priority? (TPC-H Q4)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered
from pipeline.queries._dates import months_later

TABLES = {
    "orders": ["o_orderkey", "o_orderdate", "o_orderpriority"],
    "lineitem": ["l_orderkey", "l_commitdate", "l_receiptdate"],
}
FIGURE = "orders"


def answer(orders, lineitem, *, first_day: date = date(1993, 7, 1)):
    """One row for each priority: priority, orders."""
    placed = orders.filter(
        nw.col("o_orderdate") >= first_day, nw.col("o_orderdate") < months_later(first_day, 3)
    ).select("o_orderkey", "o_orderpriority")
    late = (
        lineitem.filter(nw.col("l_commitdate") < nw.col("l_receiptdate"))
        .select("l_orderkey")
        .join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .unique("l_orderkey", keep="any")
    )
    by_priority = late.group_by("o_orderpriority").agg(nw.len().alias("orders"))
    return (
        gathered(by_priority)
        .select(priority="o_orderpriority", orders=nw.col("orders").cast(nw.Int64))
        .sort("priority")
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result, "orders")
    title = "Orders with an item that came late, by priority"
    return plot(frame).bar(x="priority", y="orders", title=title, xlabel="", ylabel=unit)
