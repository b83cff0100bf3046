"""Returned items

Which customers have sent back the most of what they ordered in a quarter? The twenty of the highest revenue lost.
(TPC-H Q10)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._dates import months_later
from pipeline.queries._revenue import revenue

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "customer": ["c_custkey", "c_name", "c_acctbal", "c_nationkey", "c_address", "c_phone", "c_comment"],
    "orders": ["o_orderkey", "o_custkey", "o_orderdate"],
    "lineitem": ["l_orderkey", "l_extendedprice", "l_discount", "l_returnflag"],
}
FIGURE = "revenue"


def answer(nation, customer, orders, lineitem, *, first_day: date = date(1993, 10, 1)):
    """At most 20 rows: customer_key, customer, revenue, account_balance, nation, address, phone, comment."""
    placed = orders.filter(
        nw.col("o_orderdate") >= first_day, nw.col("o_orderdate") < months_later(first_day, 3)
    ).select("o_orderkey", "o_custkey")
    lost = (
        lineitem.filter(nw.col("l_returnflag") == "R")
        .select("l_orderkey", revenue=revenue())
        .join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .group_by("o_custkey")
        .agg(nw.col("revenue").sum())
        .top_k(20, by=["revenue", "o_custkey"], reverse=[False, True])
    )
    largest = (
        customer.join(lost, left_on="c_custkey", right_on="o_custkey")
        .join(nation, left_on="c_nationkey", right_on="n_nationkey")
        .select(
            customer_key="c_custkey",
            customer="c_name",
            revenue="revenue",
            account_balance="c_acctbal",
            nation="n_name",
            address="c_address",
            phone="c_phone",
            comment="c_comment",
        )
    )
    return (
        gathered(largest)
        .with_columns(money("revenue", 4), money("account_balance", 2))
        .sort("revenue", "customer_key", descending=[True, False])
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result.head(12).reverse(), "revenue")
    title = "Revenue lost to returned items, by customer"
    return plot(frame).barh(x="customer", y="revenue", title=title, xlabel="", ylabel=unit)
