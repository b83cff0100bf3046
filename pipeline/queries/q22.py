"""Global sales opportunity

Where are customers with more than the usual balance who have never ordered? Customers and their balances, by the
country code of their phone. (TPC-H Q22)
"""

import narwhals as nw

from etl.questions.exact import gathered, money

TABLES = {
    "customer": ["c_custkey", "c_phone", "c_acctbal"],
    "orders": ["o_custkey"],
}
FIGURE = "account_balance"
CODES = ("13", "31", "23", "29", "30", "18", "17")


def answer(customer, orders, *, codes: tuple[str, ...] = CODES):
    """One row for each code: country_code, customers, account_balance."""
    customers = customer.select("c_custkey", "c_acctbal", country_code=nw.col("c_phone").str.slice(0, 2)).filter(
        nw.col("country_code").is_in(codes), nw.col("c_acctbal") > 0
    )
    usual = customers.select(nw.col("c_acctbal").sum().alias("balance"), nw.len().alias("of"))
    rich = customers.join(usual, how="cross").filter(nw.col("c_acctbal") * nw.col("of") > nw.col("balance"))
    buyers = orders.join(rich.select("c_custkey"), left_on="o_custkey", right_on="c_custkey").unique(
        "o_custkey", keep="any"
    )
    by_code = (
        rich.join(buyers, left_on="c_custkey", right_on="o_custkey", how="anti")
        .group_by("country_code")
        .agg(nw.len().alias("customers"), nw.col("c_acctbal").sum().alias("account_balance"))
    )
    return (
        gathered(by_code)
        .select("country_code", nw.col("customers").cast(nw.Int64), money("account_balance", 2))
        .sort("country_code")
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result, "account_balance")
    title = "Balance of customers who never ordered"
    return plot(frame).bar(x="country_code", y="account_balance", title=title, xlabel="country code", ylabel=unit)
