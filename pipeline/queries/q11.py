"""Important stock

Which parts make up more than some share of the value of all that a nation's suppliers have in stock? (TPC-H Q11)
"""

from decimal import Decimal

import narwhals as nw

from etl.questions.exact import gathered, money

TABLES = {
    "nation": ["n_nationkey", "n_name"],
    "supplier": ["s_suppkey", "s_nationkey"],
    "partsupp": ["ps_partkey", "ps_suppkey", "ps_availqty", "ps_supplycost"],
}
FIGURE = "value"


def answer(nation, supplier, partsupp, *, nation_name: str = "GERMANY", fraction: Decimal = Decimal("0.0001")):
    """One row for each such part: part_key, value; the highest value first. TPC-H divides `fraction` by the scale."""
    nations = nation.filter(nw.col("n_name") == nation_name)
    suppliers = supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select("s_suppkey")
    stock = (
        partsupp.join(suppliers, left_on="ps_suppkey", right_on="s_suppkey")
        .select("ps_partkey", value=nw.col("ps_supplycost") * nw.col("ps_availqty"))
        .group_by("ps_partkey")
        .agg(nw.col("value").sum())
    )
    share, of = Decimal(fraction).as_integer_ratio()  # whole numbers: a part on the border is not a matter of rounding
    values = gathered(stock)
    total = values.select(total=nw.col("value").sum())
    return (
        values.join(total, how="cross")
        .filter(nw.col("value") * of > nw.col("total") * share)
        .select(part_key="ps_partkey", value=money("value", 2))
        .sort("value", "part_key", descending=[True, False])
    )
