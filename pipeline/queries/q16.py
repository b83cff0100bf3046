"""Suppliers for parts

How many suppliers without complaints can deliver parts of some sizes, by brand, type and size? One brand and the types
that begin in some way are left out. (TPC-H Q16)
"""

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {
    "supplier": ["s_suppkey", "s_comment"],
    "part": ["p_partkey", "p_brand", "p_type", "p_size"],
    "partsupp": ["ps_partkey", "ps_suppkey"],
}
SIZES = (49, 14, 23, 45, 19, 3, 36, 9)


def answer(
    supplier,
    part,
    partsupp,
    *,
    brand: str = "Brand#45",
    type_start: str = "MEDIUM POLISHED",
    sizes: tuple[int, ...] = SIZES,
):
    """One row for each brand, type and size: brand, part_type, size, suppliers; the most suppliers first."""
    complaints = supplier.filter(nw.col("s_comment").str.contains("Customer.*Complaints")).select("s_suppkey")
    parts = part.filter(
        nw.col("p_brand") != brand, ~nw.col("p_type").str.starts_with(type_start), nw.col("p_size").is_in(sizes)
    )
    offers = (
        partsupp.join(parts, left_on="ps_partkey", right_on="p_partkey")
        .join(complaints, left_on="ps_suppkey", right_on="s_suppkey", how="anti")
        .unique(["p_brand", "p_type", "p_size", "ps_suppkey"], keep="any")
        .group_by("p_brand", "p_type", "p_size")
        .agg(nw.len().alias("suppliers"))
    )
    return (
        gathered(offers)
        .select(brand="p_brand", part_type="p_type", size="p_size", suppliers=nw.col("suppliers").cast(nw.Int64))
        .sort("suppliers", "brand", "part_type", "size", descending=[True, False, False, False])
    )
