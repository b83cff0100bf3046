"""Tables that are not TPC-H's, with columns of all kinds: what the two ways of reading are held against."""

from datetime import UTC, datetime

import polars as pl

from etl.lake.table import DAY, INT, TEXT, TIME, Column, Table, decimal

EVENTS = Table(
    "events",
    {
        "id": INT,
        "kind": Column(TEXT, choices=("click", "view")),
        "price": Column(decimal(9, 2), nullable=True, range=(0, None)),
        "score": Column(pl.Float64, nullable=True),
        "ok": Column(pl.Boolean, default=True),
        "small": Column(pl.Int8, nullable=True),
        "day": Column(DAY, nullable=True),
        "at": TIME,
    },
    ("id",),
    time="at",
)
LOGS = Table(
    "logs",
    {
        "msg": Column(TEXT, default="-"),
        "level": Column(pl.Int16, default=30),
        "took": Column(pl.Float32, nullable=True),
        "nullable": Column(TEXT, nullable=True),
        "until": Column(TIME, nullable=True),
    },
    (),
)
SWITCHES = Table("switches", {"on": pl.Boolean, "weight": pl.Float64, "note": Column(TEXT, nullable=True)}, ())
CLOCKS = Table(
    "clocks",
    {
        "ms": Column(TIME, unit="ms"),
        "s": Column(TIME, unit="s", nullable=True),
        "us": Column(TIME, unit="us", default=datetime(2026, 3, 1, tzinfo=UTC)),
        "ns": Column(TIME, unit="ns", nullable=True, range=(None, datetime(2100, 1, 1, tzinfo=UTC))),
        "plain": Column(TIME, nullable=True),
    },
    ("ms",),
    time="ms",
)
TABLES_OF_ALL_KINDS = (EVENTS, LOGS, SWITCHES, CLOCKS)
