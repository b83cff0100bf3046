"""Cheapest suppliers of a part

Which supplier of a region offers a part of some size and type for the least? Those with the highest account balance
first, 100 of them. (TPC-H Q2)
"""

import narwhals as nw

from etl.questions.exact import gathered, money

TABLES = {
    "region": ["r_regionkey", "r_name"],
    "nation": ["n_nationkey", "n_name", "n_regionkey"],
    "supplier": ["s_suppkey", "s_name", "s_address", "s_nationkey", "s_phone", "s_acctbal", "s_comment"],
    "part": ["p_partkey", "p_mfgr", "p_type", "p_size"],
    "partsupp": ["ps_partkey", "ps_suppkey", "ps_supplycost"],
}


def answer(
    region,
    nation,
    supplier,
    part,
    partsupp,
    *,
    size: int = 15,
    type_end: str = "BRASS",
    region_name: str = "EUROPE",
):
    """At most 100 rows: account_balance, supplier, nation, part_key, manufacturer, address, phone, comment."""
    nations = nation.join(
        region.filter(nw.col("r_name") == region_name), left_on="n_regionkey", right_on="r_regionkey"
    ).select("n_nationkey", "n_name")
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey")
    parts = part.filter(nw.col("p_size") == size, nw.col("p_type").str.ends_with(type_end)).select(
        "p_partkey", "p_mfgr"
    )
    offers = partsupp.join(parts, left_on="ps_partkey", right_on="p_partkey").join(
        suppliers.select("s_suppkey"), left_on="ps_suppkey", right_on="s_suppkey"
    )
    lowest = offers.group_by("ps_partkey").agg(nw.col("ps_supplycost").min())
    cheapest = (
        offers.join(lowest, on=["ps_partkey", "ps_supplycost"])
        .join(suppliers, left_on="ps_suppkey", right_on="s_suppkey")
        .select(
            account_balance="s_acctbal",
            supplier="s_name",
            nation="n_name",
            part_key="ps_partkey",
            manufacturer="p_mfgr",
            address="s_address",
            phone="s_phone",
            comment="s_comment",
        )
    )
    return (
        gathered(cheapest)
        .sort("account_balance", "nation", "supplier", "part_key", descending=[True, False, False, False])
        .head(100)
        .with_columns(account_balance=money("account_balance", 2))
    )
