"""Delta tables that are written exactly once: files come in, tables and a snapshot of them come out.

A project declares its tables and hands them over:

    class Lake(etl.lake.Lake):
        tables = {table.name: table for table in (...)}
"""

from etl.lake.lake import Lake
from etl.lake.snapshot import NothingPublished, Snapshot
from etl.lake.table import Column, Table

__all__ = ["Column", "Lake", "NothingPublished", "Snapshot", "Table"]
