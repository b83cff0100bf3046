"""Figures as people write them, by what their names say they are."""

import pytest

from etl.figures import figure


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("rows", 1234567, "1,234,567"),
        ("year", 1995, "1995"),
        ("order_key", 1234567, "1234567"),
        ("orders_per_year", 1234567, "1,234,567"),
        ("late_share", 0.6321, "63.2 %"),
        ("log_loss", 0.12389, "0.12389"),
        ("revenue", 136_312_345.5, "136,312,346"),  # not 1.36312e+08
        ("mb", 0.002159, "< 0.01"),
        ("written_mb", 1234.5, "1,234.50"),
        ("as_of", "2026-11-03T10:00:00.5+01:00", "2026-11-03 09:00:00 UTC"),
        ("as_of", "2026-99-03T10:00:00.5+01:00", "2026-99-03T10:00:00.5+01:00"),
        ("losses", {"train": 0.5, "test": None}, "train 0.5, test none"),
        ("is_new", True, "True"),
    ],
)
def test_a_figure_reads_as_people_write_it(name, value, text):
    assert figure(value, name) == text
