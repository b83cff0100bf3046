"""Active users by country

How many users were there in the last hours, by the country and plan that they have now?"""

from datetime import timedelta

import narwhals as nw

from etl.charts import plot

TABLES, FIGURE = {"events": ["user_id", "at"], "users": ["user_id", "country", "plan", "updated_at"]}, "users"


def answer(events, users, *, as_of, hours: int = 24):
    newest = users.group_by("user_id").agg(nw.col("updated_at").max())
    active = events.filter(nw.col("at") > as_of - timedelta(hours=hours)).select("user_id").unique()
    by_plan = active.join(users.join(newest, on=["user_id", "updated_at"]), on="user_id").group_by("country", "plan")
    return by_plan.agg(nw.len().alias("users")).sort("country", "plan")


def chart(result):
    return plot(result).bar(x="country", y="users", by="plan", stacked=True, title="Active users, by plan", xlabel="")
