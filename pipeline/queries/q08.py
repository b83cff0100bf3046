"""National market share

What share of a region's revenue from a type of part did suppliers of one nation have, in 1995 and in 1996? (TPC-H Q8)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered
from pipeline.queries._revenue import revenue

TABLES = {
    "region": ["r_regionkey", "r_name"],
    "nation": ["n_nationkey", "n_name", "n_regionkey"],
    "supplier": ["s_suppkey", "s_nationkey"],
    "customer": ["c_custkey", "c_nationkey"],
    "part": ["p_partkey", "p_type"],
    "orders": ["o_orderkey", "o_custkey", "o_orderdate"],
    "lineitem": ["l_orderkey", "l_partkey", "l_suppkey", "l_extendedprice", "l_discount"],
}
FIGURE = "market_share"


def answer(
    region,
    nation,
    supplier,
    customer,
    part,
    orders,
    lineitem,
    *,
    nation_name: str = "BRAZIL",
    region_name: str = "AMERICA",
    part_type: str = "ECONOMY ANODIZED STEEL",
):
    """One row for each year: year, market_share (0 to 1, a float)."""
    nations = nation.join(
        region.filter(nw.col("r_name") == region_name), left_on="n_regionkey", right_on="r_regionkey"
    ).select("n_nationkey")
    customers = customer.join(nations, left_on="c_nationkey", right_on="n_nationkey").select("c_custkey")
    placed = (
        orders.filter(nw.col("o_orderdate") >= date(1995, 1, 1), nw.col("o_orderdate") <= date(1996, 12, 31))
        .join(customers, left_on="o_custkey", right_on="c_custkey")
        .select("o_orderkey", "o_orderdate")
    )
    suppliers = supplier.join(nation, left_on="s_nationkey", right_on="n_nationkey").select(
        "s_suppkey", national=(nw.col("n_name") == nation_name).cast(nw.Int64)
    )
    parts = part.filter(nw.col("p_type") == part_type).select("p_partkey")
    per_year = (
        lineitem.select("l_orderkey", "l_partkey", "l_suppkey", revenue=revenue())
        .join(parts, left_on="l_partkey", right_on="p_partkey")
        .join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .join(suppliers, left_on="l_suppkey", right_on="s_suppkey")
        .select("revenue", nationals=nw.col("revenue") * nw.col("national"), year=nw.col("o_orderdate").dt.year())
        .group_by("year")
        .agg(nw.col("revenue", "nationals").sum())
    )
    return (
        gathered(per_year)
        .select(nw.col("year").cast(nw.Int64), market_share=nw.col("nationals") / nw.col("revenue"))
        .sort("year")
    )


def chart(result):
    import polars as pl

    from etl.charts import plot

    percent = result.select(pl.col("year").cast(pl.String), percent=100 * pl.col("market_share"))
    return plot(percent).bar(x="year", y="percent", title="Market share", xlabel="", ylabel="percent")
