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
    """The world: for how many types of part each nation has the supplier that is recommended in its region."""
    import json
    from pathlib import Path

    import polars as pl

    from etl.charts import maps

    outlines = json.loads((Path(__file__).parent.parent / "world.json").read_text("utf-8"))
    counted = result.group_by("region", "nation").agg(types=pl.len()).sort("nation")
    said = pl.format("{} ({}) · {} part types", pl.col("nation").str.to_titlecase(), pl.col("region"), "types")
    title = "Where the recommended suppliers are"
    return maps.areas(
        counted.with_columns(said=said),
        outlines,
        name="nation",
        value="types",
        text="said",
        title=title,
        label="part types",
    )
