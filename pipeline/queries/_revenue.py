"""What many of the questions count by."""

import narwhals as nw


def revenue() -> nw.Expr:
    """l_extendedprice * (1 - l_discount) of a line item, in 1/10,000. The sum fits 64 bits up to scale 4,000."""
    return nw.col("l_extendedprice") * (100 - nw.col("l_discount"))
