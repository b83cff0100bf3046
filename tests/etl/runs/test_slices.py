"""Many runs, each once: which are left, which come after which, and what has to be repaired."""

import signal
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from support import write_stage
from test_index import FIRST

from etl import params
from etl.leases import LeaseHeld
from etl.runs import index, slices
from etl.storage import Root

DAY = datetime(2026, 3, 1, tzinfo=UTC)


def day(number: int, hour: int = 0) -> datetime:
    return DAY + timedelta(days=number - 1, hours=hour)


@pytest.fixture
def toys(tmp_path) -> params.Project:
    """A project of three stages, from the shortest cadence on: load, report, train."""
    for folder in ("notebooks", "params/env"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "params/env/local.yml").write_text(f"root: {tmp_path}/root\nmachine: null\ndask: null\n")
    for name, every in (("load", "6 hours"), ("report", "1 day"), ("train", "2 days")):
        write_stage(tmp_path, name, "print(n)", parameters="n: int = 1  # any\nword: str = ''  # any\n")
        path = tmp_path / f"params/{name}.yml"
        path.write_text(path.read_text().replace("5 seconds", every))
    return params.load(tmp_path)


class Told:
    """Rows in the index of a project's root, each later than the one before."""

    def __init__(self, project: params.Project, folder):
        self.project, self.folder, self.root = project, folder, Root.at(project.environment.root)
        self.number = 0

    def __call__(self, stage: str, when: datetime, state: str = "ok", parent: str | None = None, **values) -> dict:
        self.number += 1
        run_id = f"{stage}-{when:%Y%m%dT%H%M%S}-{self.number:06x}"
        parameters = {"root": self.root.url, "run_id": run_id} | self.project.stages[stage].values | values
        began = (datetime(2026, 11, 26, tzinfo=UTC) + timedelta(minutes=self.number)).isoformat()
        times = {"scheduled_for": when.isoformat(timespec="seconds"), "started_at": began, "ended_at": began}
        names = {"stage": stage, "run_id": run_id, "state": state, "parent": parent, "parameters": parameters}
        index.append(
            self.root, record := replace(FIRST, root=self.root.url, report=f"reports/{run_id}", **names, **times)
        )
        return vars(record)

    def to_repair(self, *runs: dict) -> list[tuple[str, str]]:
        """The stage and day of each that would be run, in the order in which that is."""
        groups, refused = slices.to_repair(self.project, self.folder, runs)
        assert not refused
        return [(slice.stage.name, f"{slice.scheduled_for:%d}") for group in groups for slice in group]


@pytest.fixture
def told(toys, tmp_path) -> Told:
    return Told(toys, tmp_path)


def test_times_are_those_of_the_schedule_or_every_so_often_without_the_last(toys):
    load = toys.stages["load"]
    assert slices.times(load, day(1), day(2), None) == [day(1, hour) for hour in (0, 6, 12, 18)]
    assert slices.times(load, day(1, 1), day(1, 12), None) == [day(1, 6)]
    nightly = replace(load, every_s=None, cron="30 2 * * *")
    assert slices.times(nightly, day(1, 3), day(3, 3), None) == [day(2, 2.5), day(3, 2.5)]
    assert slices.times(load, day(1), day(31), "1 day") == [day(number) for number in range(1, 31)]
    assert slices.times(load, day(1, 1), day(2, 3), "1 day") == [day(1, 1), day(2, 1)]
    assert slices.times(load, day(2), day(1), "1 day") == slices.times(load, day(2), day(1), None) == []
    with pytest.raises(ValueError, match="'1 dy' is no duration"):
        slices.times(load, day(1), day(2), "1 dy")


def test_values_are_parted_by_commas_outside_of_brackets_and_quotes():
    assert slices.values("load", []) == [[]]
    assert [
        [override for override, _ in given] for given in slices.values("load", ["n=1,2", "word='a, b',[c, d]"])
    ] == [
        ["load.n=1", "load.word='a, b'"],
        ["load.n=1", "load.word=[c, d]"],
        ["load.n=2", "load.word='a, b'"],
        ["load.n=2", "load.word=[c, d]"],
    ]
    for wrong in ("n", "n=", "=1", "n=[1"):
        with pytest.raises(ValueError, match="is not name=value,value"):
            slices.values("load", [wrong])


def test_what_is_left_are_the_slices_whose_last_run_is_not_ok(told, toys, monkeypatch):
    load, environment = toys.stages["load"], toys.environment
    other = replace(load, values=load.values | {"n": 2})
    wanted = [slices.Slice(stage, environment, day(number)) for number in range(1, 8) for stage in (load, other)]
    assert slices.not_ok(told.root, wanted) == wanted and slices.not_ok(told.root, []) == []
    for number, states in enumerate(
        (["ok"], ["noop"], ["failed", "ok"], ["ok", "failed"], ["killed"], ["cancelled"]), 1
    ):
        for state in states:
            told("load", day(number), state)
    told("report", day(7))
    left = slices.not_ok(told.root, [*wanted, *wanted])
    assert [slice.scheduled_for.day for slice in left if slice.stage is load] == [4, 5, 6, 7]
    assert [slice.scheduled_for.day for slice in left if slice.stage is other] == list(range(1, 8)), "other values"
    again = slices.not_ok(told.root, wanted, datetime(2026, 11, 26, 0, 2, tzinfo=UTC))
    assert [slice.scheduled_for.day for slice in again if slice.stage is load] == [1, 4, 5, 6, 7], "not ok since then"
    monkeypatch.setenv("SOME_PASSWORD", "open sesame")
    hidden = slices.Slice(replace(load, values=load.values | {"word": "open sesame"}), environment, day(9))
    told("load", day(9), word="‹secret SOME_PASSWORD›")
    assert slices.not_ok(told.root, [hidden]) == []


def ran(groups, states: dict[str, str], at_once: int = 1) -> list[str]:
    """What ran, and in brackets what was not needed; `states` of those that are not ok."""

    def work(slice, cancel):
        state = states.get(str(slice), "ok")
        return SimpleNamespace(state=state, ok=state in slices.GOOD)

    return [str(slice) if record else f"({slice})" for slice, record in slices.run(groups, work, at_once)]


def test_what_follows_comes_after_what_it_may_read_and_only_if_that_came_off(toys):
    load, report, train = [*toys.stages.values()]
    groups = slices.linked(
        [
            [slices.Slice(load, toys.environment, day(number, 6)) for number in (1, 2, 3)],
            [slices.Slice(report, toys.environment, day(number)) for number in (2, 3, 4)],
            [slices.Slice(train, toys.environment, day(number)) for number in (3,)],
        ]
    )
    names = [[str(slice) for slice in group] for group in groups]
    assert ran(groups, {}) == sum(names, [])
    assert ran(groups, {names[0][1]: "failed"}) == [*names[0], names[1][0], names[1][2]], "nor the report of the 3rd"
    assert sorted(ran(groups, {names[1][0]: "killed"}, at_once=3)) == sorted(names[0] + names[1]), "no train"


def test_one_that_is_stopped_begins_no_more_and_tells_what_was_under_way(toys):
    begun = threading.Event()

    def work(slice, cancel):
        begun.set()
        cancel.wait(30)
        return SimpleNamespace(state="cancelled", ok=False)

    group = [slices.Slice(toys.stages["load"], toys.environment, day(number)) for number in range(1, 9)]
    main = threading.main_thread().ident

    def interrupt():
        begun.wait(30)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    ended = list(slices.run([group], work, 2))
    assert 1 <= len(ended) <= 2 and {record.state for _, record in ended} == {"cancelled"}


def test_repaired_is_what_is_not_ok_by_now_and_what_depended_on_it(told):
    for number in range(1, 6):
        told("load", day(number), "failed" if number == 2 else "ok")
        told("report", day(number, 1), "check_failed" if number == 4 else "ok")
    told("train", day(1, 2))
    told("train", day(3, 2), "cancelled")
    told("train", day(5, 2))
    rows = index.told(told.root, state=slices.BAD)
    expected = [("load", "02"), ("report", "02"), ("report", "04"), ("train", "05")]
    assert told.to_repair(*rows) == expected
    assert told.to_repair(rows[0]) == [("load", "02"), ("report", "02"), ("train", "05")]
    assert told.to_repair() == []

    by_hand = told("load", day(2), parent=rows[0]["run_id"], n=5)
    assert told.to_repair(*rows) == expected[1:], "with other parameters; what depends has not run since"
    told("report", day(2, 1))
    told("train", day(5, 2))
    assert told.to_repair(*rows) == [("report", "04"), ("train", "05")]
    told("report", day(4, 1))  # nobody's repair: a retry
    assert told.to_repair(*rows) == [] and told.to_repair(by_hand) == []


def test_nothing_that_depends_is_run_again_when_nothing_new_came(told):
    failed = told("load", day(1), "failed")
    told("load", day(2))
    told("report", day(1, 1))
    groups, _ = slices.to_repair(told.project, told.folder, [failed])
    (load,), (report,), () = groups
    assert (load.parent, load.key, report.after) == (failed["run_id"], slices.key_of(failed), {load.key})
    assert ran(groups, {str(load): "noop"}) == [str(load), f"({report})"]
    assert ran(groups, {str(load): "failed"}) == [str(load)]
    told("load", day(1), "noop", parent=failed["run_id"])
    assert told.to_repair(failed) == []


def test_what_cannot_be_run_again_is_told_and_stops_no_other(told, tmp_path):
    rows = [told("load", day(1), "failed"), told("load", day(2), "failed", gone=1), told("train", day(9), "failed")]
    told("report", day(2))
    (tmp_path / "params/train.yml").unlink()
    groups, (why, gone) = slices.to_repair(params.load(tmp_path, stage="load"), tmp_path, rows)
    assert [slice.scheduled_for.day for group in groups for slice in group] == [1]
    assert "gone, which notebooks/load.ipynb no longer declares" in why and gone == "train is no stage any more"


def test_two_at_once_are_refused(told):
    with (
        slices.held(told.root, ["load", "report"]),
        slices.held(told.root, ["train"]),
        pytest.raises(LeaseHeld, match="is held by process"),
        slices.held(told.root, ["report", "train"]),
    ):
        pass
