"""Promotion effect

What share of a month's revenue came from parts in promotion? (TPC-H Q14)
"""

from datetime import date

import narwhals as nw

from pipeline.queries._dates import months_later
from pipeline.queries._revenue import revenue

TABLES = {
    "part": ["p_partkey", "p_type"],
    "lineitem": ["l_partkey", "l_extendedprice", "l_discount", "l_shipdate"],
}
FIGURE = "promotion_percent"


MERGES = {"revenue": "sum", "promotion": "sum"}


def portion(lineitem, part, *, first_day: date = date(1995, 9, 1)):
    """One row: the revenue of the month, and what of it came from parts in promotion, in 1/10,000."""
    sold = lineitem.filter(nw.col("l_shipdate") >= first_day, nw.col("l_shipdate") < months_later(first_day, 1)).select(
        "l_partkey", revenue=revenue()
    )
    promoted = part.select("p_partkey", promoted=nw.col("p_type").str.starts_with("PROMO").cast(nw.Int64))
    return (
        promoted.join(sold, left_on="p_partkey", right_on="l_partkey")
        .select("revenue", promotion=nw.col("revenue") * nw.col("promoted"))
        .select(nw.col("revenue").sum(), nw.col("promotion").sum())
    )


def answer(sums):
    """One row: promotion_percent, a float; null when nothing was sold."""
    return sums.select(
        promotion_percent=nw.when(nw.col("revenue") > 0).then(100 * nw.col("promotion") / nw.col("revenue"))
    )
