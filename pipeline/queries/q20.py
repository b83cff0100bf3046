"""Potential part promotion

Which suppliers of a nation have more than half of a year's sales of some parts still in stock, and could promote them?
(TPC-H Q20)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import gathered
from pipeline.queries._dates import months_later

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "supplier": ["s_suppkey", "s_name", "s_address", "s_nationkey"],
    "part": ["p_partkey", "p_name"],
    "partsupp": ["ps_partkey", "ps_suppkey", "ps_availqty"],
    "lineitem": ["l_partkey", "l_suppkey", "l_quantity", "l_shipdate"],
}


def answer(
    nation,
    supplier,
    part,
    partsupp,
    lineitem,
    *,
    color: str = "forest",
    first_day: date = date(1994, 1, 1),
    nation_name: str = "CANADA",
):
    """One row for each supplier: supplier, address. The parts are those whose names begin with `color`."""
    nations = nation.filter(nw.col("n_name") == nation_name)
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select(
        "s_suppkey", "s_name", "s_address"
    )
    parts = part.filter(nw.col("p_name").str.starts_with(color)).select("p_partkey")
    stock = partsupp.join(parts, left_on="ps_partkey", right_on="p_partkey").join(
        suppliers.select("s_suppkey"), left_on="ps_suppkey", right_on="s_suppkey"
    )
    too_much = (
        lineitem.filter(nw.col("l_shipdate") >= first_day, nw.col("l_shipdate") < months_later(first_day, 12))
        .select("l_partkey", "l_suppkey", "l_quantity")
        .join(stock, left_on=["l_partkey", "l_suppkey"], right_on=["ps_partkey", "ps_suppkey"])
        .group_by("l_partkey", "l_suppkey", "ps_availqty")
        .agg(nw.col("l_quantity").sum())
        .filter(nw.col("ps_availqty").cast(nw.Int64) * 200 > nw.col("l_quantity"))
        .select("l_suppkey")
        .unique("l_suppkey", keep="any")
    )
    promoters = suppliers.join(too_much, left_on="s_suppkey", right_on="l_suppkey")
    return (
        gathered(promoters)
        .select("s_suppkey", supplier="s_name", address="s_address")
        .sort("supplier", "s_suppkey")
        .drop("s_suppkey")
    )
