"""Top customers of the last hour

Who has ordered for the most in the last hour?
"""

from datetime import datetime, timedelta

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "customer": ["c_custkey", "c_name", "c_nationkey", "c_mktsegment"],
    "orders": ["o_orderkey", "o_custkey", "o_order_time"],
    "lineitem": ["l_orderkey", "l_extendedprice", "l_discount", "l_ship_time"],
}
FIGURE = "revenue"


def window(*, as_of: datetime, hours: int = 1, top: int = 20):
    """Nothing ships before it is ordered."""
    since = as_of - timedelta(hours=hours)
    return {"orders": ("o_order_time", since), "lineitem": ("l_ship_time", since)}


def answer(nation, customer, orders, lineitem, *, as_of: datetime, hours: int = 1, top: int = 20):
    """At most `top` rows: customer_key, customer, nation, segment, orders, revenue; the highest revenue first."""
    since = as_of - timedelta(hours=hours)
    placed = orders.filter(nw.col("o_order_time") > since, nw.col("o_order_time") <= as_of).select(
        "o_orderkey", "o_custkey"
    )
    per_order = (
        lineitem.select("l_orderkey", revenue=revenue())
        .join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .group_by("o_custkey", "l_orderkey")
        .agg(nw.col("revenue").sum())
    )
    largest = (
        per_order.group_by("o_custkey")
        .agg(nw.len().alias("orders"), nw.col("revenue").sum())
        .top_k(top, by=["revenue", "o_custkey"], reverse=[False, True])
    )
    named = (
        customer.join(largest, left_on="c_custkey", right_on="o_custkey")
        .join(nation, left_on="c_nationkey", right_on="n_nationkey")
        .select(
            customer_key="c_custkey",
            customer="c_name",
            nation="n_name",
            segment="c_mktsegment",
            orders="orders",
            revenue="revenue",
        )
    )
    return (
        gathered(named)
        .with_columns(nw.col("orders").cast(nw.Int64), money("revenue", 4))
        .sort("revenue", "customer_key", descending=[True, False])
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result.head(12).reverse(), "revenue")  # bars go upwards
    title = "Revenue of the last hour, by customer"
    return plot(frame).barh(x="customer", y="revenue", title=title, xlabel="", ylabel=unit)
