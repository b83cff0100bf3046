"""Discounted revenue

What revenue did three brands bring with parts that suit their containers, sent by air and delivered in person?
(TPC-H Q19)
"""

import narwhals as nw

from etl.questions.exact import cents, money
from pipeline.queries._revenue import revenue

TABLES = {
    "part": ["p_partkey", "p_brand", "p_size", "p_container"],
    "lineitem": ["l_partkey", "l_quantity", "l_extendedprice", "l_discount", "l_shipinstruct", "l_shipmode"],
}
FIGURE = "revenue"
KINDS = ("CASE", "BOX", "PACK", "PKG"), ("BAG", "BOX", "PKG", "PACK"), ("CASE", "BOX", "PACK", "PKG")


MERGES = {"revenue": "sum"}


def portion(
    lineitem,
    part,
    *,
    small_brand: str = "Brand#12",
    medium_brand: str = "Brand#23",
    large_brand: str = "Brand#34",
    small_quantity: int = 1,
    medium_quantity: int = 10,
    large_quantity: int = 20,
):
    """One row: revenue, in 1/10,000. Each quantity reaches from the number given to ten more."""
    wanted = [
        part.filter(
            nw.col("p_brand") == brand,
            nw.col("p_container").is_in([f"{size} {kind}" for kind in kinds]),
            nw.col("p_size") >= 1,
            nw.col("p_size") <= largest,
        ).select("p_partkey", least=nw.lit(cents(quantity)))
        for brand, size, kinds, largest, quantity in (
            (small_brand, "SM", KINDS[0], 5, small_quantity),
            (medium_brand, "MED", KINDS[1], 10, medium_quantity),
            (large_brand, "LG", KINDS[2], 15, large_quantity),
        )
    ]
    return (
        lineitem.filter(
            nw.col("l_shipinstruct") == "DELIVER IN PERSON",
            nw.col("l_shipmode").is_in(["AIR", "AIR REG"]),
        )
        .join(nw.concat(wanted), left_on="l_partkey", right_on="p_partkey")
        .filter(nw.col("l_quantity") >= nw.col("least"), nw.col("l_quantity") <= nw.col("least") + cents(10))
        .select(revenue=revenue().sum())
    )


def answer(sums):
    """One row: revenue, 0 when there is none."""
    return sums.select(money("revenue", 4))
