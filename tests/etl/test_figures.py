"""Figures as people write them, by what their names say they are."""

import pytest

from etl.figures import change, figure, span


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
        ("mb_before", 0.002159, "< 0.01"),
        ("gap", -4.92975e-05, "-0.0000493"),  # not -4.92975e-05
        ("loss", 3e-9, "3e-09"),
        ("as_of", "2026-11-03T10:00:00.5+01:00", "2026-11-03 09:00:00 UTC"),
        ("as_of", "2026-99-03T10:00:00.5+01:00", "2026-99-03T10:00:00.5+01:00"),
        ("losses", {"train": 0.5, "test": None}, "train 0.5, test none"),
        ("is_new", True, "True"),
    ],
)
def test_a_figure_reads_as_people_write_it(name, value, text):
    assert figure(value, name) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (0.26, "0.3 s"),
        (9.96, "10 s"),
        (37.4, "37 s"),
        (119, "119 s"),
        (3300, "55 min"),
        (2e5, "2 days"),
    ],
)
def test_a_span_is_as_exact_as_people_ask(seconds, text):
    assert span(seconds) == text


def test_an_age_has_no_tenths():
    assert [span(seconds, tenths=False) for seconds in (0.26, 9.6, 37.4, 3300)] == ["0 s", "10 s", "37 s", "55 min"]


@pytest.mark.parametrize(
    "before, now, name, text",
    [
        (1190, 1234, "rows", "was 1,190, +3.7 %"),
        (1000, 900, "rows", "was 1,000, -10.0 %"),
        (0, 5, "rows", "was 0"),
        (2, 400, "rows", "was 2"),  # 19,900 % says nothing
        (1995, 1996, "year", "was 1995"),
        (0.5, 0.6, "late_share", "was 50.0 %"),
        ("a", "b", "model", "was a"),
        (7, 7, "rows", ""),
        (None, 7, "rows", ""),
        ({"a": 1}, {"a": 2}, "losses", ""),
        (181_186, 181_189, "rows", "was 181,186"),  # and not +0.0 %
    ],
)
def test_what_has_become_of_a_figure(before, now, name, text):
    assert change(before, now, name) == text
