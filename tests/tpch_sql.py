"""The questions in SQL, for DuckDB over tpchgen's own Parquet: what answers are held against.

TPC-H's own questions are the texts of DuckDB's tpch extension, with their literals replaced where a question is asked
with other parameters. Sums of money are DuckDB's exact decimals; its averages are doubles.
"""

import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import duckdb_extension_tpch
import polars as pl
from hypothesis import strategies as st

SMALL = ("region", "nation", "customer", "supplier", "part", "partsupp")

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

LATE_DELIVERIES = """SELECT l_shipmode, count(*), count(*) FILTER (l_receiptdate > l_commitdate),
        avg((l_receiptdate > l_commitdate)::int)
    FROM orders JOIN lineitem ON l_orderkey = o_orderkey
    WHERE o_order_time <= $1 AND o_order_time > $1 - INTERVAL 24 HOUR GROUP BY 1 ORDER BY 1"""

TOP_CUSTOMERS = """SELECT c_custkey, c_name, n_name, c_mktsegment, count(DISTINCT o_orderkey),
        sum(l_extendedprice * (1 - l_discount)) AS revenue
    FROM nation, customer, orders, lineitem
    WHERE n_nationkey = c_nationkey AND c_custkey = o_custkey AND l_orderkey = o_orderkey
    AND o_order_time <= $1 AND o_order_time > $1 - INTERVAL 1 HOUR
    GROUP BY ALL ORDER BY revenue DESC, c_custkey LIMIT 20"""


def connect(folder: Path, placed: datetime | None = None) -> duckdb.DuckDBPyConnection:
    """DuckDB over the eight Parquet files, with the tpch extension.

    With `placed`, orders and line items have the event times of one tick whose orders come in the 30 seconds from then.
    """
    connection = duckdb.connect()
    connection.execute("SET TimeZone='UTC'")
    extension = next(Path(duckdb_extension_tpch.__path__[0]).rglob("tpch.duckdb_extension"))
    connection.execute(f"LOAD '{extension}'")
    for table in SMALL if placed else (*SMALL, "orders", "lineitem"):
        connection.execute(f"CREATE VIEW {table} AS FROM '{folder}/{table}.parquet'")
    if placed:
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


def tpch(connection: duckdb.DuckDBPyConnection, number: int, **parameters: Any) -> list[tuple]:
    """The rows of TPC-H's question `number`; `parameters` by this project's names, all of them or none."""
    sql = rows_of(connection, "SELECT query FROM tpch_queries() WHERE query_nr = ?", number)[0][0]
    if parameters:
        literals = LITERALS[number](**parameters)
        missing = [old for old in literals if old not in sql]
        assert not missing, f"question {number} has no {missing}"
        sql = re.sub("|".join(map(re.escape, literals)), lambda found: literals[found[0]], sql)
    rows = rows_of(connection, sql)
    if number in (6, 19):  # of no rows SQL's sum is null, and Polars' is 0
        rows = [(rows[0][0] or Decimal(0),)]
    return sorted(rows, key=lambda row: (-row[1], row[0])) if number == 11 else rows  # ties stand in any order


def unlike(answer: pl.DataFrame, expected: list[tuple]) -> str:
    """Where an answer is not what is expected, empty when it is: doubles to the twelfth digit, all else exactly."""
    if answer.height != len(expected):
        return f"{answer.height} rows, not {len(expected)}"
    for i, (row, wanted) in enumerate(zip(answer.rows(), expected, strict=True)):
        for name, value, other in zip(answer.columns, row, wanted, strict=True):
            near = isinstance(value, float) and other is not None and abs(value - other) <= 1e-12 * abs(other)
            if value != other and not near:
                return f"row {i}, {name}: {value!r}, not {other!r}"
    return ""


# question -> its rows at `as_of`, with the questions' own default parameters
QUESTIONS: dict[str, Callable] = {
    "late_deliveries": lambda connection, as_of: rows_of(connection, LATE_DELIVERIES, as_of),
    "recommended_suppliers": lambda connection, as_of: rows_of(connection, RECOMMENDED_SUPPLIERS),
    "revenue_per_minute": lambda connection, as_of: per_minute(connection, as_of, 60),
    "top_customers": lambda connection, as_of: rows_of(connection, TOP_CUSTOMERS, as_of),
    "unshipped_orders": lambda connection, as_of: rows_of(connection, UNSHIPPED_ORDERS, as_of),
} | {f"q{n:02}": lambda connection, as_of, n=n: tpch(connection, n) for n in range(1, 23)}


def _later(day: date, months: int) -> date:
    return date(day.year + (day.month - 1 + months) // 12, (day.month - 1 + months) % 12 + 1, day.day)


def _span(old: str, old_end: str, first: date, months: int) -> dict[str, str]:
    """The literals of a span of months, in the text and as they are to be."""
    return {old: str(first), old_end: str(_later(first, months))}


def _list(values) -> str:
    return ", ".join(map(repr, values))


# number of a question -> from its parameters: literals of DuckDB's text, and what they become
LITERALS: dict[int, Callable[..., dict[str, str]]] = {
    1: lambda days: {"1998-09-02": str(date(1998, 12, 1) - timedelta(days=days))},
    2: lambda size, type_end, region_name: {
        "p_size = 15": f"p_size = {size}",
        "%BRASS": f"%{type_end}",
        "EUROPE": region_name,
    },
    3: lambda segment, day: {"BUILDING": segment, "1995-03-15": str(day)},
    4: lambda first_day: _span("1993-07-01", "1993-10-01", first_day, 3),
    5: lambda region_name, first_day: {"ASIA": region_name} | _span("1994-01-01", "1995-01-01", first_day, 12),
    6: lambda first_day, discount, quantity: (
        {
            "BETWEEN 0.05": f"BETWEEN {discount - Decimal('0.01')}",
            "AND 0.07": f"AND {discount + Decimal('0.01')}",
            "l_quantity < 24": f"l_quantity < {quantity}",
        }
        | _span("1994-01-01", "1995-01-01", first_day, 12)
    ),
    7: lambda one_nation, other_nation: {"FRANCE": one_nation, "GERMANY": other_nation},
    8: lambda nation_name, region_name, part_type: {
        "BRAZIL": nation_name,
        "AMERICA": region_name,
        "ECONOMY ANODIZED STEEL": part_type,
    },
    9: lambda color: {"green": color},
    10: lambda first_day: _span("1993-10-01", "1994-01-01", first_day, 3),
    11: lambda nation_name, fraction: {"GERMANY": nation_name, "0.0001000000": str(fraction)},
    12: lambda one_mode, other_mode, first_day: (
        {"MAIL": one_mode, "'SHIP'": f"'{other_mode}'"} | _span("1994-01-01", "1995-01-01", first_day, 12)
    ),
    13: lambda word, later_word: {"special": word, "requests": later_word},
    14: lambda first_day: _span("1995-09-01", "1995-10-01", first_day, 1),
    15: lambda first_day: _span("1996-01-01", "1996-04-01", first_day, 3),
    16: lambda brand, type_start, sizes: {
        "Brand#45": brand,
        "MEDIUM POLISHED": type_start,
        "49, 14, 23, 45, 19, 3, 36, 9": _list(sizes),
    },
    17: lambda brand, container: {"Brand#23": brand, "MED BOX": container},
    18: lambda quantity: {"> 300": f"> {quantity}"},
    19: lambda small_brand, medium_brand, large_brand, small_quantity, medium_quantity, large_quantity: {
        "Brand#12": small_brand,
        "Brand#23": medium_brand,
        "Brand#34": large_brand,
        ">= 1\n": f">= {small_quantity}\n",
        "<= 1 + 10": f"<= {small_quantity} + 10",
        ">= 10\n": f">= {medium_quantity}\n",
        "<= 10 + 10": f"<= {medium_quantity} + 10",
        ">= 20\n": f">= {large_quantity}\n",
        "<= 20 + 10": f"<= {large_quantity} + 10",
    },
    20: lambda color, first_day, nation_name: (
        {"forest": color, "CANADA": nation_name} | _span("1994-01-01", "1995-01-01", first_day, 12)
    ),
    21: lambda nation_name: {"SAUDI ARABIA": nation_name},
    22: lambda codes: {"'13', '31', '23', '29', '30', '18', '17'": _list(codes)},
}

REGIONS = {
    "AFRICA": ["ALGERIA", "ETHIOPIA", "KENYA", "MOROCCO", "MOZAMBIQUE"],
    "AMERICA": ["ARGENTINA", "BRAZIL", "CANADA", "PERU", "UNITED STATES"],
    "ASIA": ["INDIA", "INDONESIA", "JAPAN", "CHINA", "VIETNAM"],
    "EUROPE": ["FRANCE", "GERMANY", "ROMANIA", "RUSSIA", "UNITED KINGDOM"],
    "MIDDLE EAST": ["EGYPT", "IRAN", "IRAQ", "JORDAN", "SAUDI ARABIA"],
}
SEGMENTS = ["AUTOMOBILE", "BUILDING", "FURNITURE", "HOUSEHOLD", "MACHINERY"]
TYPES = (
    ["STANDARD", "SMALL", "MEDIUM", "LARGE", "ECONOMY", "PROMO"],
    ["ANODIZED", "BURNISHED", "PLATED", "POLISHED", "BRUSHED"],
    ["TIN", "NICKEL", "BRASS", "STEEL", "COPPER"],
)
CONTAINERS = ["SM", "LG", "MED", "JUMBO", "WRAP"], ["CASE", "BOX", "BAG", "JAR", "PKG", "PACK", "CAN", "DRUM"]
MODES = ["REG AIR", "AIR", "RAIL", "SHIP", "TRUCK", "MAIL", "FOB"]
COLORS = ["almond", "blue", "chocolate", "dark", "forest", "green", "ivory", "lemon", "navy", "pale", "sky", "yellow"]

_pick = st.sampled_from
_region, _nation, _color = _pick(sorted(REGIONS)), _pick(sum(REGIONS.values(), [])), _pick(COLORS)
_brand = st.builds("Brand#{}{}".format, st.integers(1, 5), st.integers(1, 5))
_year = st.builds(date, st.integers(1993, 1997), st.just(1), st.just(1))


def _two(values) -> st.SearchStrategy:
    return st.lists(_pick(values), min_size=2, max_size=2, unique=True)


def _month(first: date, last: date) -> st.SearchStrategy:
    months = (last.year - first.year) * 12 + last.month - first.month
    return st.integers(0, months).map(lambda n: _later(first, n))


# number of a question -> its parameters within the ranges of the specification, clause 2.4
PARAMETERS: dict[int, st.SearchStrategy] = {
    1: st.fixed_dictionaries({"days": st.integers(60, 120)}),
    2: st.fixed_dictionaries({"size": st.integers(1, 50), "type_end": _pick(TYPES[2]), "region_name": _region}),
    3: st.fixed_dictionaries({"segment": _pick(SEGMENTS), "day": st.dates(date(1995, 3, 1), date(1995, 3, 31))}),
    4: st.fixed_dictionaries({"first_day": _month(date(1993, 1, 1), date(1997, 10, 1))}),
    5: st.fixed_dictionaries({"region_name": _region, "first_day": _year}),
    6: st.fixed_dictionaries(
        {
            "first_day": _year,
            "discount": st.integers(2, 9).map(lambda n: Decimal(n) / 100),
            "quantity": st.integers(24, 25),
        }
    ),
    7: _two(sum(REGIONS.values(), [])).map(lambda two: {"one_nation": two[0], "other_nation": two[1]}),
    8: st.builds(
        lambda pair, words: {"region_name": pair[0], "nation_name": pair[1], "part_type": " ".join(words)},
        _pick([(region, nation) for region, nations in REGIONS.items() for nation in nations]),
        st.tuples(*map(_pick, TYPES)),
    ),
    9: st.fixed_dictionaries({"color": _color}),
    10: st.fixed_dictionaries({"first_day": _month(date(1993, 2, 1), date(1995, 1, 1))}),
    # 0.0001 / scale; the lower ones let more rows through
    11: st.fixed_dictionaries({"nation_name": _nation, "fraction": _pick([Decimal("0.0001"), Decimal("0.01")])}),
    12: st.builds(
        lambda two, first_day: {"one_mode": two[0], "other_mode": two[1], "first_day": first_day}, _two(MODES), _year
    ),
    13: st.fixed_dictionaries(
        {
            "word": _pick(["special", "pending", "unusual", "express"]),
            "later_word": _pick(["packages", "requests", "accounts", "deposits"]),
        }
    ),
    14: st.fixed_dictionaries({"first_day": _month(date(1993, 1, 1), date(1997, 12, 1))}),
    15: st.fixed_dictionaries({"first_day": _month(date(1993, 1, 1), date(1997, 10, 1))}),
    16: st.fixed_dictionaries(
        {
            "brand": _brand,
            "type_start": st.tuples(*map(_pick, TYPES[:2])).map(" ".join),
            "sizes": st.lists(st.integers(1, 50), min_size=8, max_size=8, unique=True).map(tuple),
        }
    ),
    17: st.fixed_dictionaries({"brand": _brand, "container": st.tuples(*map(_pick, CONTAINERS)).map(" ".join)}),
    # 312 to 315; at a small scale there are orders of less only
    18: st.fixed_dictionaries({"quantity": st.integers(312, 315) | st.integers(200, 311)}),
    19: st.fixed_dictionaries(
        {
            "small_brand": _brand,
            "medium_brand": _brand,
            "large_brand": _brand,
            "small_quantity": st.integers(1, 10),
            "medium_quantity": st.integers(10, 20),
            "large_quantity": st.integers(20, 30),
        }
    ),
    20: st.fixed_dictionaries({"color": _color, "first_day": _year, "nation_name": _nation}),
    21: st.fixed_dictionaries({"nation_name": _nation}),
    22: st.lists(st.integers(10, 34).map(str), min_size=7, max_size=7, unique=True).map(
        lambda codes: {"codes": tuple(codes)}
    ),
}
