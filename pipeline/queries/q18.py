"""Large orders

Which customers have placed very large orders? The hundred orders of the highest price, of all with more than some
quantity. (TPC-H Q18)
"""

import narwhals as nw

from etl.questions.exact import cents, gathered, money

TABLES = {
    "customer": ["c_custkey", "c_name"],
    "orders": ["o_orderkey", "o_custkey", "o_orderdate", "o_totalprice"],
    "lineitem": ["l_orderkey", "l_quantity"],
}
FIGURE = "total_price"


def answer(customer, orders, lineitem, *, quantity: int = 300):
    """At most 100 rows: customer, customer_key, order_key, order_date, total_price, quantity."""
    large = (
        lineitem.group_by("l_orderkey").agg(nw.col("l_quantity").sum()).filter(nw.col("l_quantity") > cents(quantity))
    )
    placed = (
        orders.join(large, left_on="o_orderkey", right_on="l_orderkey")
        .join(customer, left_on="o_custkey", right_on="c_custkey")
        .select(
            customer="c_name",
            customer_key="o_custkey",
            order_key="o_orderkey",
            order_date="o_orderdate",
            total_price="o_totalprice",
            quantity="l_quantity",
        )
    )
    return (
        gathered(placed)
        .sort("total_price", "order_date", "order_key", descending=[True, False, False])
        .head(100)
        .with_columns(money("total_price", 2), money("quantity", 2))
    )
