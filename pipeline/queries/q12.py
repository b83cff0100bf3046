"""Shipping modes and order priority

Do two cheaper ways of shipping make urgent orders late? A year's items that were shipped in time and arrived late, of
urgent and of other orders. (TPC-H Q12)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered
from pipeline.queries._dates import months_later

TABLES = {
    "orders": ["o_orderkey", "o_orderpriority"],
    "lineitem": ["l_orderkey", "l_shipmode", "l_shipdate", "l_commitdate", "l_receiptdate"],
}
FIGURE = "urgent"


def answer(orders, lineitem, *, one_mode: str = "MAIL", other_mode: str = "SHIP", first_day: date = date(1994, 1, 1)):
    """One row for each mode: ship_mode, urgent (line items of urgent and high priority), other."""
    late = lineitem.filter(
        nw.col("l_receiptdate") >= first_day,
        nw.col("l_receiptdate") < months_later(first_day, 12),
        nw.col("l_shipmode").is_in([one_mode, other_mode]),
        nw.col("l_commitdate") < nw.col("l_receiptdate"),
        nw.col("l_shipdate") < nw.col("l_commitdate"),
    ).select("l_orderkey", "l_shipmode")
    by_mode = (
        orders.join(late, left_on="o_orderkey", right_on="l_orderkey")
        .select("l_shipmode", urgent=nw.col("o_orderpriority").is_in(["1-URGENT", "2-HIGH"]).cast(nw.Int64))
        .group_by("l_shipmode")
        .agg(nw.col("urgent").sum(), nw.len().alias("all"))
    )
    return (
        gathered(by_mode)
        .select("urgent", ship_mode="l_shipmode", other=nw.col("all").cast(nw.Int64) - nw.col("urgent"))
        .select("ship_mode", "urgent", "other")
        .sort("ship_mode")
    )


def chart(result):
    from etl.charts import plot

    title = "Shipped in time, arrived late"
    return plot(result).bar(x="ship_mode", y=["urgent", "other"], stacked=True, title=title, xlabel="", ylabel="items")
