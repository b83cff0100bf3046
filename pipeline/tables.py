"""The eight tables of TPC-H: columns, types, keys and the rules a row must keep, in one place.

Column names and types are those of the TPC-H specification, revision 3.0.1, clause 1.4, with two columns of our own
that make the stream live: `o_order_time` and `l_ship_time`, both UTC. Money is decimal, never float.
"""

from etl.lake.table import DAY, INT, INT32, RESCUED, TEXT, TIME, Column, Table, decimal

KEY, COUNT = INT, INT32
MONEY = decimal(15, 2)

__all__ = ["COUNT", "DAY", "KEY", "MONEY", "RESCUED", "STREAMED", "TABLES", "TEXT", "TIME", "Table"]

_ALL = [
    Table("region", {"r_regionkey": KEY, "r_name": TEXT, "r_comment": TEXT}, ("r_regionkey",)),
    Table(
        "nation",
        {"n_nationkey": KEY, "n_name": TEXT, "n_regionkey": KEY, "n_comment": TEXT},
        ("n_nationkey",),
    ),
    Table(
        "customer",
        {
            "c_custkey": Column(KEY, range=(1, None)),
            "c_name": TEXT,
            "c_address": TEXT,
            "c_nationkey": KEY,
            "c_phone": TEXT,
            "c_acctbal": MONEY,
            "c_mktsegment": TEXT,
            "c_comment": TEXT,
        },
        ("c_custkey",),
    ),
    Table(
        "supplier",
        {
            "s_suppkey": Column(KEY, range=(1, None)),
            "s_name": TEXT,
            "s_address": TEXT,
            "s_nationkey": KEY,
            "s_phone": TEXT,
            "s_acctbal": MONEY,
            "s_comment": TEXT,
        },
        ("s_suppkey",),
    ),
    Table(
        "part",
        {
            "p_partkey": Column(KEY, range=(1, None)),
            "p_name": TEXT,
            "p_mfgr": TEXT,
            "p_brand": TEXT,
            "p_type": TEXT,
            "p_size": Column(COUNT, range=(1, 50)),
            "p_container": TEXT,
            "p_retailprice": Column(MONEY, range=(0, None)),
            "p_comment": TEXT,
        },
        ("p_partkey",),
    ),
    Table(
        "partsupp",
        {
            "ps_partkey": KEY,
            "ps_suppkey": KEY,
            "ps_availqty": Column(COUNT, range=(0, None)),
            "ps_supplycost": Column(MONEY, range=(0, None)),
            "ps_comment": TEXT,
        },
        ("ps_partkey", "ps_suppkey"),
    ),
    Table(
        "orders",
        {
            "o_orderkey": Column(KEY, range=(1, None)),
            "o_custkey": KEY,
            "o_orderstatus": Column(TEXT, choices=("F", "O", "P")),
            "o_totalprice": Column(MONEY, range=(0, None)),
            "o_orderdate": DAY,
            "o_orderpriority": TEXT,
            "o_clerk": TEXT,
            "o_shippriority": COUNT,
            "o_comment": TEXT,
            "o_order_time": TIME,
        },
        ("o_orderkey",),
        time="o_order_time",
    ),
    Table(
        "lineitem",
        {
            "l_orderkey": Column(KEY, range=(1, None)),
            "l_partkey": KEY,
            "l_suppkey": KEY,
            "l_linenumber": Column(COUNT, range=(1, 7)),
            "l_quantity": Column(MONEY, range=(1, None)),
            "l_extendedprice": Column(MONEY, range=(0, None)),
            "l_discount": Column(MONEY, range=(0, 1)),
            "l_tax": Column(MONEY, range=(0, 1)),
            "l_returnflag": Column(TEXT, choices=("R", "A", "N")),
            "l_linestatus": Column(TEXT, choices=("O", "F")),
            "l_shipdate": DAY,
            "l_commitdate": DAY,
            "l_receiptdate": DAY,
            "l_shipinstruct": TEXT,
            "l_shipmode": TEXT,
            "l_comment": TEXT,
            "l_ship_time": TIME,
        },
        ("l_orderkey", "l_linenumber"),
    ),
]

TABLES = {table.name: table for table in _ALL}
STREAMED = ("orders", "lineitem")  # grow with every tick; the others come once, with the first
