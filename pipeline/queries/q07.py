"""Volume shipping

What revenue did goods bring that went from one of two nations to the other, each way, in 1995 and in 1996?
(TPC-H Q7)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "supplier": ["s_suppkey", "s_nationkey"],
    "customer": ["c_custkey", "c_nationkey"],
    "orders": ["o_orderkey", "o_custkey"],
    "lineitem": ["l_orderkey", "l_suppkey", "l_extendedprice", "l_discount", "l_shipdate"],
}
FIGURE = "revenue"


def answer(nation, supplier, customer, orders, lineitem, *, one_nation: str = "FRANCE", other_nation: str = "GERMANY"):
    """One row for each direction and year: from_nation, to_nation, year, revenue."""
    nations = nation.filter(nw.col("n_name").is_in([one_nation, other_nation]))
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select(
        "s_suppkey", from_nation="n_name"
    )
    customers = customer.join(nations, left_on="c_nationkey", right_on="n_nationkey").select(
        "c_custkey", to_nation="n_name"
    )
    their_orders = orders.join(customers, left_on="o_custkey", right_on="c_custkey").select("o_orderkey", "to_nation")
    per_year = (
        lineitem.filter(nw.col("l_shipdate") >= date(1995, 1, 1), nw.col("l_shipdate") <= date(1996, 12, 31))
        .select("l_orderkey", "l_suppkey", "l_shipdate", revenue=revenue())
        .join(suppliers, left_on="l_suppkey", right_on="s_suppkey")
        .join(their_orders, left_on="l_orderkey", right_on="o_orderkey")
        .filter(nw.col("from_nation") != nw.col("to_nation"))
        .with_columns(year=nw.col("l_shipdate").dt.year().cast(nw.Int64))
        .group_by("from_nation", "to_nation", "year")
        .agg(nw.col("revenue").sum())
    )
    return gathered(per_year).with_columns(money("revenue", 4)).sort("from_nation", "to_nation", "year")


def chart(result):
    import polars as pl

    from etl.charts import in_units, plot

    ways = result.with_columns(
        way=pl.col("from_nation").str.to_titlecase() + " to " + pl.col("to_nation").str.to_titlecase(),
        year=pl.col("year").cast(pl.String),
    )
    frame, unit = in_units(ways, "revenue")
    title = "Revenue of goods between two nations"
    return plot(frame).bar(x="year", y="revenue", by="way", title=title, xlabel="", ylabel=unit)
