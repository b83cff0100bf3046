"""Customer distribution

How many customers have placed how many orders, not counting orders with two words in their comment? (TPC-H Q13)
"""

import re

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {
    "customer": ["c_custkey"],
    "orders": ["o_custkey", "o_comment"],
}
FIGURE = "customers"


def answer(customer, orders, *, word: str = "special", later_word: str = "requests"):
    """One row for each number of orders: orders, customers; the most frequent number first."""
    both = f"{re.escape(word)}.*{re.escape(later_word)}"
    per_customer = (
        orders.filter(~nw.col("o_comment").str.contains(both)).group_by("o_custkey").agg(nw.len().alias("orders"))
    )
    distribution = (
        customer.join(per_customer, left_on="c_custkey", right_on="o_custkey", how="left")
        .select(nw.col("orders").fill_null(0).cast(nw.Int64))
        .group_by("orders")
        .agg(nw.len().alias("customers"))
    )
    return (
        gathered(distribution)
        .with_columns(nw.col("customers").cast(nw.Int64))
        .sort("customers", "orders", descending=True)
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result.sort("orders"), "customers")
    return plot(frame).bar(x="orders", y="customers", title="Customers by orders placed", xlabel="orders", ylabel=unit)
