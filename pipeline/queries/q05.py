"""Local supplier volume

Where in a region do suppliers sell to customers of their own nation, and for how much, in the year that begins on a
day? (TPC-H Q5)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "region": ["r_regionkey", "r_name"],
    "nation": ["n_nationkey", "n_name", "n_regionkey"],
    "customer": ["c_custkey", "c_nationkey"],
    "supplier": ["s_suppkey", "s_nationkey"],
    "orders": ["o_orderkey", "o_custkey", "o_orderdate"],
    "lineitem": ["l_orderkey", "l_suppkey", "l_extendedprice", "l_discount"],
}
FIGURE = "revenue"


def answer(
    region,
    nation,
    customer,
    supplier,
    orders,
    lineitem,
    *,
    region_name: str = "ASIA",
    first_day: date = date(1994, 1, 1),
):
    """One row for each nation of the region that sold anything: nation, revenue; the highest revenue first."""
    year_later = first_day.replace(year=first_day.year + 1)
    nations = nation.join(
        region.filter(nw.col("r_name") == region_name), left_on="n_regionkey", right_on="r_regionkey"
    ).select("n_nationkey", "n_name")
    customers = customer.join(nations, left_on="c_nationkey", right_on="n_nationkey").select("c_custkey", "c_nationkey")
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select("s_suppkey", "s_nationkey")
    orders_of_year = (
        orders.filter(nw.col("o_orderdate") >= first_day, nw.col("o_orderdate") < year_later)
        .join(customers, left_on="o_custkey", right_on="c_custkey")
        .select("o_orderkey", "c_nationkey")
    )
    by_nation = (
        lineitem.select("l_orderkey", "l_suppkey", revenue=revenue())
        .join(orders_of_year, left_on="l_orderkey", right_on="o_orderkey")
        .join(suppliers, left_on=["l_suppkey", "c_nationkey"], right_on=["s_suppkey", "s_nationkey"])
        .group_by("c_nationkey")
        .agg(nw.col("revenue").sum())
        .join(nations, left_on="c_nationkey", right_on="n_nationkey")
        .select(nation="n_name", revenue="revenue")
    )
    return (
        gathered(by_nation)
        .with_columns(revenue=money("revenue", 4))
        .sort("revenue", "nation", descending=[True, False])
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result.reverse(), "revenue")  # bars go upwards
    title = "Revenue from customers of the supplier's own nation"
    return plot(frame).barh(x="nation", y="revenue", title=title, xlabel="", ylabel=unit)
