"""Conversion by day

Of the sessions of each day (UTC), how many put something into the cart, and how many bought?"""

import narwhals as nw

from etl.charts import plot

TABLES, FIGURE = {"events": ["session", "kind", "at"]}, "bought"


def answer(events):
    cart, bought = ((nw.col("kind") == kind).cast(nw.Int64) for kind in ("cart", "purchase"))
    steps = events.with_columns(day=nw.col("at").dt.truncate("1d"), cart=cart, bought=bought).group_by("session")
    days = steps.agg(nw.col("day").min(), nw.col("cart", "bought").max())
    return days.group_by("day").agg(nw.len().alias("sessions"), nw.col("cart", "bought").sum()).sort("day")


def chart(result):
    return plot(result).line(x="day", y=["sessions", "cart", "bought"], title="Sessions, by day", xlabel="", ylabel="")
