"""Late deliveries by way of shipping

Of what was ordered in the last hours, which share comes later than promised, by way of shipping?
"""

from datetime import datetime, timedelta

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {
    "orders": ["o_orderkey", "o_order_time"],
    "lineitem": ["l_orderkey", "l_shipmode", "l_commitdate", "l_receiptdate", "l_ship_time"],
}
FIGURE = "late_share"


def window(*, as_of: datetime, hours: int = 24):
    """Nothing ships before it is ordered."""
    since = as_of - timedelta(hours=hours)
    return {"orders": ("o_order_time", since), "lineitem": ("l_ship_time", since)}


def answer(orders, lineitem, *, as_of: datetime, hours: int = 24):
    """One row for each mode: ship_mode, line_items, late, late_share (0 to 1, a float)."""
    since = as_of - timedelta(hours=hours)
    placed = orders.filter(nw.col("o_order_time") > since, nw.col("o_order_time") <= as_of).select("o_orderkey")
    by_mode = (
        lineitem.join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .select("l_shipmode", late=(nw.col("l_receiptdate") > nw.col("l_commitdate")).cast(nw.Int64))
        .group_by("l_shipmode")
        .agg(nw.len().alias("line_items"), nw.col("late").sum())
    )
    return (
        gathered(by_mode)
        .select(
            nw.col("line_items").cast(nw.Int64),
            "late",
            ship_mode="l_shipmode",
            late_share=nw.col("late") / nw.col("line_items"),
        )
        .select("ship_mode", "line_items", "late", "late_share")
        .sort("ship_mode")
    )


def chart(result):
    import polars as pl

    from etl.charts import plot

    percent = result.select("ship_mode", percent=100 * pl.col("late_share"))
    title = "Line items that come late"
    return plot(percent).bar(x="ship_mode", y="percent", title=title, xlabel="", ylabel="percent")
