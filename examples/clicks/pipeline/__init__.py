"""The domain: clicks on a shop's pages. Its tables, its questions, its model."""

from etl import charts, lake
from pipeline.tables import TABLES

__all__ = ["COUNTED", "TITLE", "Lake", "charts"]
TITLE, COUNTED = "Clicks, live", {"events": "Events", "users": "Changes of users"}


class Lake(lake.Lake):
    tables, beside = TABLES, ("stream.json",)
