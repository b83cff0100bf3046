"""Recommended suppliers

Who sells a type of part for the least in a region? Of equal prices the supplier with the higher account balance.
"""

import narwhals as nw

from etl.questions.exact import gathered, money

TABLES = {
    "region": ["r_regionkey", "r_name"],
    "nation": ["n_nationkey", "n_name", "n_regionkey"],
    "supplier": ["s_suppkey", "s_name", "s_nationkey", "s_acctbal"],
    "part": ["p_partkey", "p_type"],
    "partsupp": ["ps_partkey", "ps_suppkey", "ps_supplycost"],
}


def answer(region, nation, supplier, part, partsupp):
    """One row for each region and part type; further ties go to the first supplier by name, then the first part.

    region, part_type, supplier, nation, supply_cost, account_balance, part_key, supplier_key.
    """
    places = nation.join(region, left_on="n_regionkey", right_on="r_regionkey").select(
        "n_nationkey", "n_name", "r_name"
    )
    suppliers = supplier.select("s_suppkey", "s_name", "s_nationkey", balance=nw.col("s_acctbal"))
    offers = (
        partsupp.select("ps_partkey", "ps_suppkey", cost=nw.col("ps_supplycost"))
        .join(part, left_on="ps_partkey", right_on="p_partkey")
        .join(supplier.select("s_suppkey", "s_nationkey"), left_on="ps_suppkey", right_on="s_suppkey")
        .join(nation.select("n_nationkey", "n_regionkey"), left_on="s_nationkey", right_on="n_nationkey")
        .select("n_regionkey", "p_type", "cost", "ps_partkey", "ps_suppkey")
    )
    lowest = offers.group_by("n_regionkey", "p_type").agg(nw.col("cost").min())
    cheapest = (
        offers.join(lowest, on=["n_regionkey", "p_type", "cost"])
        .join(suppliers, left_on="ps_suppkey", right_on="s_suppkey")
        .join(places, left_on="s_nationkey", right_on="n_nationkey")
        .select(
            region="r_name",
            part_type="p_type",
            supplier="s_name",
            nation="n_name",
            supply_cost="cost",
            account_balance="balance",
            part_key="ps_partkey",
            supplier_key="ps_suppkey",
        )
    )
    return (
        gathered(cheapest)
        .with_columns(supply_cost=money("supply_cost", 2), account_balance=money("account_balance", 2))
        .with_columns(owed=-nw.col("account_balance"))
        .unique(["region", "part_type"], keep="first", order_by=["owed", "supplier", "supplier_key", "part_key"])
        .drop("owed")
        .sort("region", "part_type")
    )


def chart(result):
    import polars as pl

    from etl.charts import plot

    # a part type is three words, the first is its class
    by_class = (
        result.with_columns(part_class=pl.col("part_type").str.split(" ").list.first())
        .group_by("region", "part_class")
        .agg(pl.col("supply_cost").cast(pl.Float64).mean())
        .sort("region", "part_class")
    )
    title = "Lowest supply cost by class of part, mean of its types"
    return plot(by_class).heatmap(x="part_class", y="region", C="supply_cost", title=title, xlabel="", ylabel="")
