"""Unshipped orders by market segment

Which orders that wait to be shipped are worth the most? The highest revenue still to ship, for each market segment.
"""

from datetime import datetime, timedelta

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "customer": ["c_custkey", "c_mktsegment"],
    "orders": ["o_orderkey", "o_custkey", "o_order_time", "o_orderpriority"],
    "lineitem": ["l_orderkey", "l_ship_time", "l_extendedprice", "l_discount"],
}
FIGURE = "revenue"
SEGMENTS = ("AUTOMOBILE", "BUILDING", "FURNITURE", "HOUSEHOLD", "MACHINERY")  # TPC-H clause 4.2.2.13


SHIPS_WITHIN = 121 * timedelta(minutes=36)  # at most 121 days after the order (TPC-H clause 4.2.3), 36 minutes each


def window(*, as_of: datetime, top: int = 50):
    return {"orders": ("o_order_time", as_of - SHIPS_WITHIN), "lineitem": ("l_ship_time", as_of)}


def answer(customer, orders, lineitem, *, as_of: datetime, top: int = 50):
    """The `top` orders of each segment by the revenue of their line items that ship after `as_of`.

    segment, rank (orders of equal revenue share one), order_key, order_time, priority, revenue.
    """
    to_ship = (
        lineitem.filter(nw.col("l_ship_time") > as_of)
        .select("l_orderkey", revenue=revenue())
        .group_by("l_orderkey")
        .agg(nw.col("revenue").sum())
    )
    waiting = (
        orders.filter(nw.col("o_order_time") <= as_of)
        .join(to_ship, left_on="o_orderkey", right_on="l_orderkey")
        .join(customer, left_on="o_custkey", right_on="c_custkey")
        .select(
            segment="c_mktsegment",
            order_key="o_orderkey",
            order_time="o_order_time",
            priority="o_orderpriority",
            revenue="revenue",
        )
    )
    # one pass for each segment instead of a rank over all: Dask has no rank, and only the largest travel
    largest = nw.concat(
        [
            waiting.filter(nw.col("segment") == segment).top_k(top, by=["revenue", "order_key"], reverse=[False, True])
            for segment in SEGMENTS
        ]
    )
    return (
        gathered(largest)
        .select(
            "segment",
            nw.col("revenue").rank("min", descending=True).over("segment").cast(nw.Int64).alias("rank"),
            "order_key",
            "order_time",
            "priority",
            money("revenue", 4),
        )
        .sort("segment", "rank", "order_key")
    )


def chart(result):
    import polars as pl

    from etl.charts import in_units, plot

    by_priority = result.group_by("segment", "priority").agg(pl.col("revenue").sum()).sort("segment", "priority")
    frame, unit = in_units(by_priority, "revenue")
    return plot(frame).bar(
        x="segment",
        y="revenue",
        by="priority",
        stacked=True,
        title="Largest unshipped orders, by segment and priority",
        xlabel="",
        ylabel=unit,
    )
