"""Small-quantity orders

How much revenue a year would be lost if orders of less than a fifth of a part's usual quantity were no longer taken?
For parts of one brand in one kind of container. (TPC-H Q17)
"""

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {
    "part": ["p_partkey", "p_brand", "p_container"],
    "lineitem": ["l_partkey", "l_quantity", "l_extendedprice"],
}
FIGURE = "revenue_per_year"
YEARS = 7  # that the data spans


def answer(part, lineitem, *, brand: str = "Brand#23", container: str = "MED BOX"):
    """One row: revenue_per_year, a float; null when there is no such order."""
    parts = part.filter(nw.col("p_brand") == brand, nw.col("p_container") == container).select("p_partkey")
    sold = lineitem.join(parts, left_on="l_partkey", right_on="p_partkey")
    usual = sold.group_by("l_partkey").agg(nw.col("l_quantity").sum().alias("quantity"), nw.len().alias("items"))
    small = (
        sold.join(usual, on="l_partkey")
        .filter(5 * nw.col("l_quantity") * nw.col("items") < nw.col("quantity"))
        .select("l_extendedprice")
    )
    return (
        gathered(small)
        .select(revenue=nw.col("l_extendedprice").sum(), items=nw.len())
        .select(revenue_per_year=nw.when(nw.col("items") > 0).then(nw.col("revenue") / 100 / YEARS))
    )
