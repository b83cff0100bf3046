"""Top pages of the last day

Which pages were seen most in the last hours, and in how many sessions?"""

from datetime import timedelta

import narwhals as nw

from etl.charts import plot

TABLES, FIGURE = {"events": ["session", "kind", "page", "at"]}, "views"


def answer(events, *, as_of, hours: int = 24):
    seen = events.filter(nw.col("kind") == "view", nw.col("at") > as_of - timedelta(hours=hours))
    by_page = seen.group_by("page").agg(nw.len().alias("views"), nw.col("session").n_unique().alias("sessions"))
    return by_page.sort("views", "page", descending=[True, False])


def chart(result):
    return plot(result.reverse()).barh(x="page", y="views", title="Views, by page", xlabel="", ylabel="views")
