"""The domain: TPC-H as a live stream. Its tables, its source, its questions, its model.

What notebooks, app and commands use of the engine comes from here: `Lake` knows this project's tables.
"""

from typing import ClassVar

from etl import charts, lake
from pipeline.tables import TABLES

__all__ = ["COUNTED", "TITLE", "Lake", "charts"]

TITLE = "TPC-H, live"  # of the dashboard
COUNTED = {"orders": "Orders", "lineitem": "Line items"}  # tables whose rows it counts, and what it calls them


class Lake(lake.Lake):
    """The lake of this project under a root."""

    tables: ClassVar = TABLES
    beside: ClassVar = ("stream.json",)  # how far the source has come
    sequence: ClassVar = r"-(\d{8})\b"  # the tick that a file is of
