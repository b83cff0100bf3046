"""Exact money on every engine, and the step from a large frame to a small one.

Polars rounds a product of decimals to the larger scale of the two, and Narwhals cannot cast to a decimal on Dask.
Whole numbers behave alike everywhere, are exact and twice as fast. So a question is given every decimal as a
whole number of hundredths: prices, balances and quantities in cents, discounts and taxes in percents. It turns the
few numbers that are left at the end into decimals.
"""

from decimal import Decimal
from typing import Any

import narwhals as nw


def cents(value: Decimal | float) -> int:
    """A parameter as a whole number of hundredths."""
    return int(Decimal(str(value)).scaleb(2).to_integral_exact())


def money(column: str, digits: int) -> nw.Expr:
    """A column of whole numbers in units of 10**-digits as a decimal; only in a frame that was gathered."""
    return nw.col(column) * Decimal(1).scaleb(-digits)


def gathered(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """The frame in Polars, in this process: what follows is small and may rank, make decimals and break ties."""
    return frame if frame.implementation.is_polars() else frame.collect("polars").lazy()
