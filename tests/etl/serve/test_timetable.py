"""What is due, on a clock that is set by hand; three days of it are in faults/schedules.py."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from params_cases import CELL, LOCAL, notebook

from etl import params
from etl.serve.timetable import Timetable

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize("missed", ["once", "all", "skip"])
def test_a_first_run_is_the_one_of_a_time_that_has_just_come(tmp_path: Path, missed: str):
    (tmp_path / "params/env").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params/env/local.yml").write_text(LOCAL)
    (tmp_path / "params/quick.yml").write_text(
        f"every: 5 seconds\ndeadline: 1 minute\nmissed: {missed}\noverlap: queue\n"
    )
    (tmp_path / "notebooks/quick.ipynb").write_text(notebook(CELL))
    begun: list[datetime] = []
    timetable = Timetable(
        lambda _, time: begun.append(time), lambda *_: None, lambda _: "busy" if begun else "", lambda _: None
    )
    timetable.follow(params.load(tmp_path).stages.values(), NOON - timedelta(seconds=2), {})
    timetable.make_up("quick", NOON + timedelta(seconds=0.4))  # who looks is late
    timetable.look(NOON + timedelta(seconds=0.5))
    assert begun == [NOON]
    assert [past.waiting for past in timetable.past().values()] == [[]]
