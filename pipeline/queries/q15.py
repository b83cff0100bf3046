"""Top supplier

Which supplier has brought the most revenue in a quarter? (TPC-H Q15)
"""

from datetime import date

import narwhals as nw

from etl.questions.exact import money
from pipeline.queries._dates import months_later
from pipeline.queries._revenue import revenue

TABLES = {
    "supplier": ["s_suppkey", "s_name", "s_address", "s_phone"],
    "lineitem": ["l_suppkey", "l_extendedprice", "l_discount", "l_shipdate"],
}
FIGURE = "revenue"


MERGES = {"revenue": "sum"}


def portion(lineitem, *, first_day: date = date(1996, 1, 1)):
    """The revenue of each supplier in the quarter, in 1/10,000."""
    return (
        lineitem.filter(nw.col("l_shipdate") >= first_day, nw.col("l_shipdate") < months_later(first_day, 3))
        .select("l_suppkey", revenue=revenue())
        .group_by("l_suppkey")
        .agg(nw.col("revenue").sum())
    )


def answer(revenues, supplier):
    """One row, more where several are equal: supplier_key, supplier, address, phone, revenue."""
    top = revenues.join(revenues.select(nw.col("revenue").max()), on="revenue")
    return (
        supplier.join(top, left_on="s_suppkey", right_on="l_suppkey")
        .select(
            supplier_key="s_suppkey",
            supplier="s_name",
            address="s_address",
            phone="s_phone",
            revenue=money("revenue", 4),
        )
        .sort("supplier_key")
    )
