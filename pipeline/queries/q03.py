"""Shipping priority

Which orders of a market segment, not yet shipped on a day, were worth the most on that day? The ten of the highest
revenue. (TPC-H Q3)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "customer": ["c_custkey", "c_mktsegment"],
    "orders": ["o_orderkey", "o_custkey", "o_orderdate", "o_shippriority"],
    "lineitem": ["l_orderkey", "l_extendedprice", "l_discount", "l_shipdate"],
}
FIGURE = "revenue"


def answer(customer, orders, lineitem, *, segment: str = "BUILDING", day: date = date(1995, 3, 15)):
    """At most ten rows: order_key, revenue, order_date, ship_priority; of equal revenue the older order first."""
    customers = customer.filter(nw.col("c_mktsegment") == segment).select("c_custkey")
    waiting = orders.filter(nw.col("o_orderdate") < day).join(customers, left_on="o_custkey", right_on="c_custkey")
    per_order = (
        lineitem.filter(nw.col("l_shipdate") > day)
        .select("l_orderkey", revenue=revenue())
        .join(waiting, left_on="l_orderkey", right_on="o_orderkey")
        .group_by("l_orderkey", "o_orderdate", "o_shippriority")
        .agg(nw.col("revenue").sum())
    )
    return (
        gathered(per_order)
        .select(order_key="l_orderkey", revenue="revenue", order_date="o_orderdate", ship_priority="o_shippriority")
        .sort("revenue", "order_date", "order_key", descending=[True, False, False])
        .head(10)
        .with_columns(revenue=money("revenue", 4))
    )


def chart(result):
    import polars as pl

    from etl.charts import in_units, plot

    frame, unit = in_units(result.with_columns(order=pl.col("order_key").cast(pl.String)).reverse(), "revenue")
    title = "Unshipped orders of the highest revenue"
    return plot(frame).barh(x="order", y="revenue", title=title, xlabel="", ylabel=unit)
