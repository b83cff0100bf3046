"""Revenue per minute

How many orders came in, and for how much, in each of the last whole minutes?
"""

from datetime import datetime, timedelta

import narwhals as nw

from etl.questions.exact import gathered, money
from pipeline.queries._revenue import revenue

TABLES = {
    "orders": ["o_orderkey", "o_order_time"],
    "lineitem": ["l_orderkey", "l_ship_time", "l_extendedprice", "l_discount"],
}
FIGURE = "revenue"


def window(*, as_of: datetime, minutes: int = 60):
    """Nothing ships before it is ordered; and of a day's orders before, whether there are any."""
    start, _ = _span(as_of, minutes)
    return {"orders": ("o_order_time", start - timedelta(days=1)), "lineitem": ("l_ship_time", start)}


def answer(orders, lineitem, *, as_of: datetime, minutes: int = 60):
    """One row for each of the last `minutes` whole minutes before `as_of`, newest first; 0 where nothing came in.

    Minutes before the first order are left out, but for the newest; an order of more than a day before is none.
    """
    import polars as pl

    start, end = _span(as_of, minutes)
    placed = orders.filter(nw.col("o_order_time") >= start, nw.col("o_order_time") < end)
    per_order = (
        lineitem.select("l_orderkey", revenue=revenue())
        .join(placed, left_on="l_orderkey", right_on="o_orderkey")
        .group_by("l_orderkey", "o_order_time")
        .agg(nw.col("revenue").sum())
    )
    per_minute = (
        per_order.with_columns(minute=nw.col("o_order_time").dt.truncate("1m"))
        .group_by("minute")
        .agg(nw.len().alias("orders"), nw.col("revenue").sum())
    )
    every_minute = nw.from_native(
        pl.LazyFrame(
            {"minute": [start + timedelta(minutes=i) for i in range(minutes)]},
            schema={"minute": pl.Datetime("us", "UTC")},
        )
    )
    first = gathered(orders.select(first=nw.col("o_order_time").min()))
    return (
        every_minute.join(first, how="cross")
        .filter(
            (nw.col("minute") >= nw.col("first").dt.truncate("1m")) | (nw.col("minute") == end - timedelta(minutes=1))
        )
        .join(gathered(per_minute), on="minute", how="left")
        .select(
            "minute",
            orders=nw.col("orders").cast(nw.Int64).fill_null(0),
            revenue=nw.col("revenue").fill_null(0),
        )
        .with_columns(revenue=money("revenue", 4))
        .sort("minute", descending=True)
    )


def _span(as_of: datetime, minutes: int) -> tuple[datetime, datetime]:
    """Where the whole minutes begin and end."""
    # orders come many a second: a minute whose last second has one is whole
    end = (as_of + timedelta(seconds=1)).replace(second=0, microsecond=0)
    return end - timedelta(minutes=minutes), end


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result, "revenue")
    title = "Revenue of new orders, by minute"
    return plot(frame).line(x="minute", y="revenue", title=title, xlabel="UTC", ylabel=unit, ylim=(0, None))
