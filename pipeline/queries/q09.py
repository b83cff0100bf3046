"""Profit by product type

What profit did each nation's suppliers make in each year with parts that have a word in their name? (TPC-H Q9)
"""

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "supplier": ["s_suppkey", "s_nationkey"],
    "part": ["p_partkey", "p_name"],
    "partsupp": ["ps_partkey", "ps_suppkey", "ps_supplycost"],
    "orders": ["o_orderkey", "o_orderdate"],
    "lineitem": ["l_orderkey", "l_partkey", "l_suppkey", "l_quantity", "l_extendedprice", "l_discount"],
}
FIGURE = "profit"


def answer(nation, supplier, part, partsupp, orders, lineitem, *, color: str = "green"):
    """One row for each nation and year, the newest year first: nation, year, profit."""
    parts = part.filter(nw.col("p_name").str.contains(color, literal=True)).select("p_partkey")
    costs = partsupp.join(parts, left_on="ps_partkey", right_on="p_partkey").join(
        supplier, left_on="ps_suppkey", right_on="s_suppkey"
    )
    profits = (
        lineitem.select("l_orderkey", "l_partkey", "l_suppkey", "l_quantity", revenue=revenue())
        .join(costs, left_on=["l_partkey", "l_suppkey"], right_on=["ps_partkey", "ps_suppkey"])
        .select(
            "l_orderkey",
            "s_nationkey",
            profit=nw.col("revenue") - nw.col("ps_supplycost") * nw.col("l_quantity"),
        )
    )
    per_year = (
        orders.join(profits, left_on="o_orderkey", right_on="l_orderkey")
        .select("s_nationkey", "profit", year=nw.col("o_orderdate").dt.year())
        .group_by("s_nationkey", "year")
        .agg(nw.col("profit").sum())
        .join(nation, left_on="s_nationkey", right_on="n_nationkey")
        .select("n_name", "year", "profit")
    )
    return (
        gathered(per_year)
        .select(nation="n_name", year=nw.col("year").cast(nw.Int64), profit=money("profit", 4))
        .sort("nation", "year", descending=[False, True])
    )


def chart(result):
    import polars as pl

    from etl.charts import in_units, plot

    by_year = result.group_by("year").agg(pl.col("profit").sum()).sort("year")
    frame, unit = in_units(by_year.with_columns(pl.col("year").cast(pl.String)), "profit")
    return plot(frame).bar(x="year", y="profit", title="Profit of all nations", xlabel="", ylabel=unit)
