"""The questions in SQL, for DuckDB over tpchgen's own Parquet: what answers are held against.

Sums of money are DuckDB's own exact decimals; its averages are doubles.
"""

from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb
import duckdb_extension_tpch

SMALL = ("region", "nation", "customer", "supplier", "part", "partsupp")

Q01 = """SELECT l_returnflag, l_linestatus, sum(l_quantity), sum(l_extendedprice),
    sum(l_extendedprice * (1 - l_discount)), sum(l_extendedprice * (1 - l_discount) * (1 + l_tax)),
    avg(l_quantity), avg(l_extendedprice), avg(l_discount), count(*)
    FROM lineitem WHERE l_shipdate <= DATE '1998-12-01' - to_days(?) GROUP BY 1, 2 ORDER BY 1, 2"""

Q05 = """SELECT n_name, sum(l_extendedprice * (1 - l_discount)) AS revenue
    FROM customer, orders, lineitem, supplier, nation, region
    WHERE c_custkey = o_custkey AND l_orderkey = o_orderkey AND l_suppkey = s_suppkey
    AND c_nationkey = s_nationkey AND s_nationkey = n_nationkey AND n_regionkey = r_regionkey
    AND r_name = ? AND o_orderdate >= ? AND o_orderdate < ? GROUP BY 1 ORDER BY 2 DESC, 1"""

UNSHIPPED_ORDERS = """WITH waiting AS (
        SELECT c_mktsegment, o_orderkey, o_order_time, o_orderpriority,
            sum(l_extendedprice * (1 - l_discount)) AS revenue
        FROM customer, orders, lineitem
        WHERE c_custkey = o_custkey AND l_orderkey = o_orderkey AND o_order_time <= $1 AND l_ship_time > $1
        GROUP BY ALL)
    SELECT c_mktsegment, rank() OVER (PARTITION BY c_mktsegment ORDER BY revenue DESC), o_orderkey,
        o_order_time, o_orderpriority, revenue
    FROM waiting
    QUALIFY row_number() OVER (PARTITION BY c_mktsegment ORDER BY revenue DESC, o_orderkey) <= 50
    ORDER BY 1, 2, 3"""

RECOMMENDED_SUPPLIERS = """SELECT r_name, p_type, s_name, n_name, ps_supplycost, s_acctbal, ps_partkey, s_suppkey
    FROM region, nation, supplier, part, partsupp
    WHERE r_regionkey = n_regionkey AND n_nationkey = s_nationkey AND s_suppkey = ps_suppkey
    AND p_partkey = ps_partkey
    QUALIFY row_number() OVER (
        PARTITION BY r_name, p_type ORDER BY ps_supplycost, s_acctbal DESC, s_name, s_suppkey, ps_partkey) = 1
    ORDER BY 1, 2"""

REVENUE_PER_MINUTE = """SELECT minute, count(DISTINCT o_orderkey), coalesce(sum(l_extendedprice * (1 - l_discount)), 0)
    FROM generate_series($1, $2, INTERVAL 1 MINUTE) AS minutes(minute)
    LEFT JOIN (orders JOIN lineitem ON l_orderkey = o_orderkey) ON date_trunc('minute', o_order_time) = minute
    WHERE minute >= (SELECT date_trunc('minute', min(o_order_time)) FROM orders) OR minute = $2
    GROUP BY 1 ORDER BY 1 DESC"""


def connect(folder: Path, placed: datetime) -> duckdb.DuckDBPyConnection:
    """DuckDB over the eight Parquet files, as one tick's whose orders were placed in the 30 seconds from `placed`."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone='UTC'")
    extension = next(Path(duckdb_extension_tpch.__path__[0]).rglob("tpch.duckdb_extension"))
    connection.execute(f"LOAD '{extension}'")
    for table in SMALL:
        connection.execute(f"CREATE VIEW {table} AS FROM '{folder}/{table}.parquet'")
    connection.execute(
        f"""CREATE TABLE orders AS SELECT *,
            TIMESTAMPTZ '{placed.isoformat()}' + to_milliseconds(o_orderkey * 7919 % 30000) AS o_order_time
            FROM '{folder}/orders.parquet';
        CREATE TABLE lineitem AS SELECT l.*,
            o_order_time + to_minutes(36 * (l_shipdate - o_orderdate)) AS l_ship_time
            FROM '{folder}/lineitem.parquet' l JOIN orders ON l_orderkey = o_orderkey"""
    )
    return connection


def rows_of(connection: duckdb.DuckDBPyConnection, sql: str, *parameters) -> list[tuple]:
    return connection.execute(sql, parameters).fetchall()


def per_minute(connection: duckdb.DuckDBPyConnection, as_of: datetime, minutes: int) -> list[tuple]:
    """The last whole minutes before `as_of`."""
    last = (as_of + timedelta(seconds=1)).replace(second=0, microsecond=0) - timedelta(minutes=1)
    return rows_of(connection, REVENUE_PER_MINUTE, last - timedelta(minutes=minutes - 1), last)


# question -> its rows at `as_of`, with the questions' own default parameters
QUESTIONS = {
    "q01": lambda connection, as_of: rows_of(connection, Q01, 90),
    "q05": lambda connection, as_of: rows_of(connection, Q05, "ASIA", date(1994, 1, 1), date(1995, 1, 1)),
    "unshipped_orders": lambda connection, as_of: rows_of(connection, UNSHIPPED_ORDERS, as_of),
    "recommended_suppliers": lambda connection, as_of: rows_of(connection, RECOMMENDED_SUPPLIERS),
    "revenue_per_minute": lambda connection, as_of: per_minute(connection, as_of, 60),
}
