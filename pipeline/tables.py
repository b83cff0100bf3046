"""The eight tables of TPC-H: columns, types, keys and the rules a row must keep, in one place.

Column names and types are those of the TPC-H specification, revision 3.0.1, clause 1.4, with two columns of our own
that make the stream live: `o_order_time` and `l_ship_time`, both UTC. Money is decimal, never float.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime

import polars as pl

KEY, COUNT, TEXT, DAY = pl.Int64, pl.Int32, pl.String, pl.Date
MONEY = pl.Decimal(15, 2)
TIME = pl.Datetime("us", "UTC")
RESCUED = "_rescued"  # in the lake, beside a table's own columns: the fields of a line that no column takes, as JSON


@dataclass(frozen=True)
class Table:
    """One table. `columns`: name -> Polars type, in order. `keys`: what names a row, never null.
    `ranges`: column -> (lowest, highest) allowed, None for open. `choices`: column -> the values allowed.
    `time`: the column that says when a row came to be; the newest of all is the lake's `as_of`."""

    name: str
    columns: dict[str, pl.DataType]
    keys: tuple[str, ...]
    ranges: dict[str, tuple] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    time: str | None = None

    def until(self, latest: datetime) -> "Table":
        """The table, of which no row may have come to be after `latest`."""
        return replace(self, ranges=self.ranges | {self.time: (None, latest)}) if self.time else self


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
            "c_custkey": KEY,
            "c_name": TEXT,
            "c_address": TEXT,
            "c_nationkey": KEY,
            "c_phone": TEXT,
            "c_acctbal": MONEY,
            "c_mktsegment": TEXT,
            "c_comment": TEXT,
        },
        ("c_custkey",),
        ranges={"c_custkey": (1, None)},
    ),
    Table(
        "supplier",
        {
            "s_suppkey": KEY,
            "s_name": TEXT,
            "s_address": TEXT,
            "s_nationkey": KEY,
            "s_phone": TEXT,
            "s_acctbal": MONEY,
            "s_comment": TEXT,
        },
        ("s_suppkey",),
        ranges={"s_suppkey": (1, None)},
    ),
    Table(
        "part",
        {
            "p_partkey": KEY,
            "p_name": TEXT,
            "p_mfgr": TEXT,
            "p_brand": TEXT,
            "p_type": TEXT,
            "p_size": COUNT,
            "p_container": TEXT,
            "p_retailprice": MONEY,
            "p_comment": TEXT,
        },
        ("p_partkey",),
        ranges={"p_partkey": (1, None), "p_size": (1, 50), "p_retailprice": (0, None)},
    ),
    Table(
        "partsupp",
        {
            "ps_partkey": KEY,
            "ps_suppkey": KEY,
            "ps_availqty": COUNT,
            "ps_supplycost": MONEY,
            "ps_comment": TEXT,
        },
        ("ps_partkey", "ps_suppkey"),
        ranges={"ps_availqty": (0, None), "ps_supplycost": (0, None)},
    ),
    Table(
        "orders",
        {
            "o_orderkey": KEY,
            "o_custkey": KEY,
            "o_orderstatus": TEXT,
            "o_totalprice": MONEY,
            "o_orderdate": DAY,
            "o_orderpriority": TEXT,
            "o_clerk": TEXT,
            "o_shippriority": COUNT,
            "o_comment": TEXT,
            "o_order_time": TIME,
        },
        ("o_orderkey",),
        ranges={"o_orderkey": (1, None), "o_totalprice": (0, None)},
        choices={"o_orderstatus": ("F", "O", "P")},
        time="o_order_time",
    ),
    Table(
        "lineitem",
        {
            "l_orderkey": KEY,
            "l_partkey": KEY,
            "l_suppkey": KEY,
            "l_linenumber": COUNT,
            "l_quantity": MONEY,
            "l_extendedprice": MONEY,
            "l_discount": MONEY,
            "l_tax": MONEY,
            "l_returnflag": TEXT,
            "l_linestatus": TEXT,
            "l_shipdate": DAY,
            "l_commitdate": DAY,
            "l_receiptdate": DAY,
            "l_shipinstruct": TEXT,
            "l_shipmode": TEXT,
            "l_comment": TEXT,
            "l_ship_time": TIME,
        },
        ("l_orderkey", "l_linenumber"),
        ranges={
            "l_orderkey": (1, None),
            "l_linenumber": (1, 7),
            "l_quantity": (1, None),
            "l_extendedprice": (0, None),
            "l_discount": (0, 1),
            "l_tax": (0, 1),
        },
        choices={"l_returnflag": ("R", "A", "N"), "l_linestatus": ("O", "F")},
    ),
]

TABLES = {table.name: table for table in _ALL}
STREAMED = ("orders", "lineitem")  # grow with every tick; the others come once, with the first
