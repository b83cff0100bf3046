"""Suppliers who kept orders waiting

Which suppliers of a nation were the only ones late in orders of several suppliers, and how often? The hundred worst.
(TPC-H Q21)
"""

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "supplier": ["s_suppkey", "s_name", "s_nationkey"],
    "orders": ["o_orderkey", "o_orderstatus"],
    "lineitem": ["l_orderkey", "l_suppkey", "l_commitdate", "l_receiptdate"],
}
FIGURE = "waiting"


def answer(nation, supplier, orders, lineitem, *, nation_name: str = "SAUDI ARABIA"):
    """At most 100 rows: supplier, waiting (line items); the most first."""
    nations = nation.filter(nw.col("n_name") == nation_name)
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select("s_suppkey", "s_name")
    late = nw.col("l_receiptdate") > nw.col("l_commitdate")
    suspects = (
        lineitem.filter(late)
        .select("l_orderkey", "l_suppkey")
        .join(suppliers.select("s_suppkey"), left_on="l_suppkey", right_on="s_suppkey")
    )
    complete = (
        orders.filter(nw.col("o_orderstatus") == "F")
        .select("o_orderkey")
        .join(suspects, left_on="o_orderkey", right_on="l_orderkey")
    )
    items = lineitem.select("l_orderkey", "l_suppkey", late=late).join(
        complete.select(l_orderkey="o_orderkey").unique("l_orderkey", keep="any"), on="l_orderkey"
    )
    # who is least and greatest of an order is the same where there is one only
    of_several = (
        items.group_by("l_orderkey")
        .agg(nw.col("l_suppkey").min().alias("least"), nw.col("l_suppkey").max().alias("greatest"))
        .filter(nw.col("least") < nw.col("greatest"))
        .select("l_orderkey")
    )
    one_late = (
        items.filter(nw.col("late"))
        .group_by("l_orderkey")
        .agg(nw.col("l_suppkey").min().alias("least"), nw.col("l_suppkey").max().alias("greatest"))
        .filter(nw.col("least") == nw.col("greatest"))
        .select("l_orderkey")
    )
    waiting = (
        complete.join(of_several.join(one_late, on="l_orderkey"), left_on="o_orderkey", right_on="l_orderkey")
        .group_by("l_suppkey")
        .agg(nw.len().alias("waiting"))
        .join(suppliers, left_on="l_suppkey", right_on="s_suppkey")
    )
    return (
        gathered(waiting)
        .select(supplier="s_name", waiting=nw.col("waiting").cast(nw.Int64))
        .sort("waiting", "supplier", descending=[True, False])
        .head(100)
    )


def chart(result):
    from etl.charts import plot

    title = "Line items that kept orders waiting, by supplier"
    return plot(result.head(12).reverse()).barh(x="supplier", y="waiting", title=title, xlabel="", ylabel="line items")
