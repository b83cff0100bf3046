"""Rows of many files in order, a part of them in memory at a time: the same rows, each once."""

import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

from etl import delta
from etl.lake import sorting
from etl.storage import Root

TYPES = {
    "number": (pl.Int64, lambda n: n - 40),
    "text": (pl.String, lambda n: "éa" * (n % 7) + str(n)),
    "exact": (pl.Decimal(9, 2), lambda n: Decimal(n - 20) / 4),
    "day": (pl.Date, lambda n: date(2026, 1, 1) + timedelta(days=n)),
    "time": (pl.Datetime("us", "UTC"), lambda n: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=n)),
    "float": (pl.Float64, lambda n: n / 3),
    "yes": (pl.Boolean, lambda n: n % 2 == 0),
}


def source(folder, frames: list[pl.DataFrame], by_pyarrow: bool) -> sorting.Source:
    files = []
    for number, frame in enumerate(frames):
        path = folder / f"t/{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        frame.write_parquet(path, row_group_size=20, use_pyarrow=by_pyarrow)
        files.append(delta.File(path.name, path.stat().st_size, frame.height, {}))
    declared = frames[0].clear().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    fields = [pa.field(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in declared]
    return sorting.Source(Root.at(folder), "t", files, pa.schema(fields), {})


@pytest.mark.parametrize("by_pyarrow", [True, False])
@pytest.mark.parametrize("first", TYPES)
def test_ranges_have_every_row_once_and_are_in_order(tmp_path, first, by_pyarrow):
    pick = random.Random(f"{first} {by_pyarrow}")
    dtype, value = TYPES[first]
    values = [pick.choice([None, *map(value, range(80))]) for _ in range(300)]
    rows = pl.DataFrame({"a": pl.Series(values, dtype=dtype), "b": [pick.choice([None, 1, 2, 3]) for _ in values]})
    rows = rows.with_row_index("n").with_columns(pl.col("n").cast(pl.Int64))
    frames = [rows.slice(0, 90).sort("a"), rows.slice(90, 1), rows.slice(91)]
    made = source(tmp_path, frames, by_pyarrow)
    seen = sorting.look(made, ["a", "b"], memory=int(rows.estimated_size()) // 6)
    assert (seen.rows, seen.checksum) == (rows.height, sorting.checksum(rows))
    assert len(seen.bounds) > 2
    parts = [*sorting.ranges(made, ["a", "b"], seen.bounds)]
    assert len(parts) == len(seen.bounds) + 1
    assert max(part.height for part in parts) < rows.height / 2
    joined = pl.concat(part.sort("a", "b", "n") for part in parts)
    assert_frame_equal(joined, rows.sort("a", "b", "n").select(joined.columns))


def test_rows_that_fit_are_one_range_and_so_are_rows_in_no_order(tmp_path):
    rows = pl.DataFrame({"a": range(50)})
    made = source(tmp_path, [rows, rows], by_pyarrow=True)
    assert sorting.look(made, ["a"], memory=10**6).bounds == sorting.look(made, [], memory=1).bounds == []
    (part,) = sorting.ranges(made, ["a"], [])
    assert part.equals(pl.concat([rows, rows]))


def test_statistics_of_parts_are_those_of_all():
    frame = pl.DataFrame(
        {
            "n": [3, None, 1, 2],
            "f": [1.0, 2.0, float("nan"), 4.0],
            "none": pl.Series([None] * 4, dtype=pl.Int64),
            "at": [datetime(2026, 1, n, tzinfo=UTC) for n in (4, 3, 2, 1)],
            "s": ["x", None, "y", "z"],
        }
    )
    for cut in range(5):
        parts = [delta.statistics(part) for part in (frame.head(cut), frame.tail(4 - cut))]
        assert delta.merged(parts) == delta.statistics(frame)
