"""Forecast of a revenue change

How much more revenue would there have been in a year without the discounts of about some percent on small quantities?
(TPC-H Q6)
"""

from datetime import date
from decimal import Decimal

import narwhals as nw

from etl.questions.exact import cents, money
from pipeline.queries._dates import months_later

TABLES = {
    "lineitem": ["l_shipdate", "l_discount", "l_quantity", "l_extendedprice"],
}
FIGURE = "revenue"


MERGES = {"revenue": "sum"}


def portion(lineitem, *, first_day: date = date(1994, 1, 1), discount: Decimal = Decimal("0.06"), quantity: int = 24):
    """One row: revenue, in 1/10,000. Discounts count from one percent below to one above `discount`, quantities below
    `quantity`."""
    percent = cents(discount)
    return lineitem.filter(
        nw.col("l_shipdate") >= first_day,
        nw.col("l_shipdate") < months_later(first_day, 12),
        nw.col("l_discount") >= percent - 1,
        nw.col("l_discount") <= percent + 1,
        nw.col("l_quantity") < cents(quantity),
    ).select(revenue=(nw.col("l_extendedprice") * nw.col("l_discount")).sum())


def answer(sums):
    """One row: revenue."""
    return sums.select(money("revenue", 4))
