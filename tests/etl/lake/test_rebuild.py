"""The lake again from its archive, and doctor: what is planted is named."""

import itertools
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from deltalake import DeltaTable
from faults import synthetic
from polars.testing import assert_frame_equal
from support import AT, ingest_all

from etl.findings import Finding
from etl.lake import ingest, rebuild, switch
from etl.lake import snapshot as snapshots
from etl.lake.table import TEXT, Column
from etl.questions import results
from etl.runs import index
from etl.storage import Damaged, Root
from pipeline import Lake, model, queries, source
from pipeline.tables import TABLES


@pytest.fixture(scope="module")
def lived_once(tmp_path_factory, stream, made) -> str:
    """A lake of three batches with a bad line and an unknown field, compacted."""
    root = str(tmp_path_factory.mktemp("lived") / "root")
    for tick, frames in made.items():
        source.land(Root.at(root), stream, {tick: frames})
        if tick == 1:
            name = "landing/orders/orders-00000001.json"
            lines = Root.at(root).read(name).splitlines()
            lines[3], lines[5] = b"{oops", lines[5][:-1] + b',"extra":1}'
            Root.at(root).write(name, b"\n".join(lines))
        ingest_all(root)
    Lake(root).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="compact-1")
    return root


@pytest.fixture
def lived(root, lived_once) -> str:
    """A copy of it."""
    shutil.copytree(lived_once, root)
    return root


def examine(root: str) -> list[Finding]:
    """All that the command looks at of what is under a root."""
    return [
        *Lake(root).examine(),
        *index.examine(Root.at(root)),
        *model.examine(Root.at(root)),
        *results.examine(Root.at(root)),
    ]


def tables(root: str) -> dict:
    snapshot = Lake(root).snapshot()
    return {
        table: snapshot.frame(table, list(columns)).collect().sort(snapshot.lake.keys[table])
        for table, columns in snapshot.lake.columns.items()
    }


def test_a_rebuilt_lake_has_the_same_tables(lived, stream):
    before = tables(lived)
    source.land(Root.at(lived), stream, source.make_ticks(stream, range(3, 4)))
    Path(lived, "lake/orders/_delta_log", f"{0:020d}.json").write_bytes(b"gone")
    compared = Lake(lived).rebuild()
    after = tables(lived)
    for table, frame in before.items():
        assert_frame_equal(after[table], frame)
    assert dict(compared.select("table", "equal").rows()) == {t: None if t == "orders" else True for t in before}
    assert Lake(lived).snapshot().batch == 3
    assert [name for name in Root.at(lived).names("") if name.startswith("lake")][0] == "lake"
    ingest_all(lived)
    assert Lake(lived).snapshot().batch == 4
    assert examine(lived) == [Finding(finding.what) for finding in examine(lived)]


def test_without_pointer_and_manifests_it_is_made_from_what_is_there(lived):
    before = tables(lived)
    shutil.rmtree(Path(lived, "lake"))
    Lake(lived).rebuild()
    for table, frame in tables(lived).items():
        columns = [name for name in frame.columns if name not in ("batch", "at")]  # one batch now
        assert_frame_equal(frame.select(columns), before[table].select(columns), check_row_order=False)


def test_an_archive_that_is_not_whole_is_refused_and_nothing_touched(lived):
    before = Lake(lived).snapshot()
    next(Path(lived, "archive").glob("*/orders/orders-00000001.json")).unlink()
    with pytest.raises(rebuild.NotWhole, match="lacks 1 files .* orders/orders-00000001.json"):
        Lake(lived).rebuild()
    assert Lake(lived).snapshot() == before


def test_what_was_refused_is_listed_and_tried_again(lived, monkeypatch):
    place = Root.at(lived)
    place.write("landing/orders/orders-00000009.json", b"")
    Lake.commit(Lake.read(Lake(lived).next_batch(max_files=9, scheduled_for=AT)), run_id="x")
    assert Lake(lived).refused() == [
        {"file": "orders/orders-00000009.json", "when": place.names("refused")[0], "lines": None, "why": "is empty"},
        {
            "file": "orders/orders-00000001.json",
            "when": 2,
            "lines": 1,
            "why": "not JSON: Expecting property name enclosed in double quotes at character 2",
        },
    ]
    assert Lake(lived).retry("orders-00000009.json") == ["landing/orders/orders-00000009.json"]
    with pytest.raises(LookupError):
        Lake(lived).retry("orders-00000009.json")
    with pytest.raises(LookupError, match="nothing of orders-00000001.json fits"):
        Lake(lived).retry("orders-00000001.json")


def test_lines_that_fit_by_now_are_ingested_once(root, stream, made, monkeypatch):
    place = Root.at(root)
    source.land(Root.at(root), stream, {1: made[1]})
    name = "landing/orders/orders-00000001.json"
    place.write(name, place.read(name).replace(b'"O"', b'"Q"', 1))
    ingest_all(root)
    whole = made[1]["orders"].height
    assert Lake(root).snapshot().frame("orders").collect().height == whole - 1
    orders = TABLES["orders"]
    columns = orders.columns | {"o_orderstatus": Column(TEXT, choices=("F", "O", "P", "Q"))}  # a new release takes it
    monkeypatch.setattr(Lake, "tables", TABLES | {"orders": replace(orders, columns=columns)})
    Lake(root).retry("orders-00000001.json")
    ingest_all(root)
    assert Lake(root).snapshot().frame("orders").collect().height == whole
    with pytest.raises(LookupError, match="1 of its lines were put into landing before"):
        Lake(root).retry("orders-00000001.json")
    assert Lake(root).rebuild().filter(table="orders").select("rows", "rows_before").row(0) == (whole, whole)
    assert Lake(root).snapshot().frame("orders").collect().height == whole


def test_a_line_that_was_not_kept_as_it_came_is_not_tried_again(root, stream, made):
    """The end of a long line is not in quarantine."""
    source.land(Root.at(root), stream, {1: made[1]})
    place, name = Root.at(root), "landing/orders/orders-00000001.json"
    lines = place.read(name).splitlines()
    lines[0] = lines[0].replace(b"Clerk", b"Clerk\xff")
    lines[1] = lines[1].replace(b"Clerk", "Clérk".encode()) + b" " * 4000 + b"x"
    place.write(name, b"\n".join(lines))
    ingest_all(root)
    assert Lake(root).refused_lines()["line"].to_list() == [1, 2]
    with pytest.raises(
        LookupError, match="nothing of orders-00000001.json fits.* 1 of its lines are not kept as they came"
    ):
        Lake(root).retry("orders-00000001.json")
    assert place.names("landing/orders") == []


def test_what_a_batch_that_died_had_in_landing_is_made_again_once_more(lived, stream, made, monkeypatch):
    source.land(Root.at(lived), stream, source.make_ticks(stream, range(3, 4)))
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(ingest, "crash_point", lambda name: name != "before it is published" or _die())
        ingest_all(lived)
    Lake(lived).rebuild()
    ingest_all(lived)
    assert not Root.at(lived).names("landing/orders")
    assert Lake(lived).rebuild()["equal"].all()


def test_what_a_batch_of_long_ago_had_in_landing_is_archived_today(root, stream, made, monkeypatch):
    source.land(Root.at(root), stream, {1: made[1]})
    many = 1 << 40
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(ingest, "crash_point", lambda name: name != "before it is published" or _die())
        limits = {"max_files": 9, "max_bytes": many, "max_bad_share": 1, "for_s": many}
        ingest.drain(Lake(root), **limits, scheduled_for=AT, run_id="x", now=datetime(2026, 3, 1, tzinfo=UTC))
    assert not any(Path(root, "archive").rglob("*.json"))
    Lake(root).rebuild()
    today = Path(root, "archive", f"{datetime.now(UTC):%Y-%m-%d}")
    assert [*Path(root, "archive").rglob("*.json")] == [*today.rglob("*.json")]


def _edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def torn(data: bytes) -> bytes:
    return data[:-20]


def overwritten(data: bytes) -> bytes:
    return data[:-20] + b"\xff" * 20


PLANTED = {
    "a torn pointer": ("the published snapshot", lambda root: _edit(root / "lake/published.json", torn)),
    "no pointer": ("the published snapshot", lambda root: (root / "lake/published.json").unlink()),
    "a pointer without tables": (
        "the published snapshot",
        lambda root: (root / "lake/published.json").write_text('{"batch": 3}'),
    ),
    "a torn manifest": ("the manifests", lambda root: _edit(root / "lake/batches/00000003.json", torn)),
    "an overwritten commit": (
        "table orders",
        lambda root: _edit(root / f"lake/orders/_delta_log/{2:020d}.json", overwritten),
    ),
    "a commit that lacks its last line": (
        "table region",
        lambda root: _edit(root / f"lake/region/_delta_log/{1:020d}.json", lambda data: data[: data.rindex(b"\n")]),
    ),
    "a commit gone": ("table lineitem", lambda root: (root / f"lake/lineitem/_delta_log/{2:020d}.json").unlink()),
    "a hint that is none": (
        "table part",
        lambda root: (root / "lake/part/_delta_log/_last_checkpoint").write_text("{"),
    ),
    "an empty commit": (
        "table region",
        lambda root: (root / f"lake/region/_delta_log/{1:020d}.json").write_bytes(b""),
    ),
    "a data file gone": ("table lineitem", lambda root: next((root / "lake/lineitem").glob("compacted-*")).unlink()),
    "a data file cut off": (
        "table part",
        lambda root: _edit(next((root / "lake/part").glob("batch-*")), lambda data: data[:-1]),
    ),
    "a data file of zeros": (
        "table part",
        lambda root: _edit(next((root / "lake/part").glob("batch-*")), lambda data: bytes(len(data))),
    ),
    "a data file overwritten": (
        "table part",
        lambda root: _edit(next((root / "lake/part").glob("batch-*")), overwritten),
    ),
    "a run's row gone": ("the index of runs", lambda root: next((root / "runs").glob("*.parquet")).unlink()),
    "an answer gone": (
        "the answers",
        lambda root: (root / "results/q01/current.json").write_text('{"file": "results/q01/gone"}'),
    ),
    "an answer cut off": (
        "the answers",
        lambda root: _edit(root / "results/q01/query-1.parquet", lambda data: data[:-9]),
    ),
    "a list where an answer's pointer was": (
        "the answers",
        lambda root: (root / "results/q01/current.json").write_text("[]"),
    ),
    "a history cut off": ("the answers", lambda root: _edit(root / "results/q01/history.json", lambda data: data[:-9])),
    "a list where the pointer was": (
        "the published snapshot",
        lambda root: (root / "lake/published.json").write_text("[]"),
    ),
    "another model than was published": ("the model", lambda root: (root / "models/m/model.json").write_text("{}")),
    "a batch that was left unfinished": (
        "landing",
        lambda root: shutil.copy(root / "lake/batches/00000003.json", root / "lake/batches/00000004.json"),
    ),
}


@pytest.fixture(scope="module")
def answered_once(tmp_path_factory, lived_once) -> str:
    """A lake that has lived, with an answer and a run, in which nothing is wrong. Only to copy."""
    root = str(shutil.copytree(lived_once, tmp_path_factory.mktemp("answered") / "root"))
    question, snapshot = next(q for q in queries.questions() if q.name == "q01"), Lake(root).snapshot()
    queries.save(Root.at(root), queries.ask(question, snapshot), question, snapshot, "query-1")
    index.append(Root.at(root), synthetic.month(1, days=1)[0])
    assert not [finding for finding in examine(root) if finding.problem]
    return root


@pytest.mark.parametrize("what", PLANTED)
def test_doctor_names_what_is_planted_and_what_to_do(root, answered_once, what):
    named, plant = PLANTED[what]
    shutil.copytree(answered_once, root)
    if named == "the model":
        pointer = {"model_id": "m", "sha256": "0" * 64, "run_id": "train-1", "metrics": {}}
        Root.at(root).write("models/current.json", json.dumps(pointer).encode())
        Path(root, "models/m").mkdir()
    plant(Path(root))
    wrong = [finding for finding in examine(root) if finding.problem]
    assert {one.what for one in wrong} == {named}
    assert all(one.remedy for one in wrong)


class Died(BaseException):
    """As if the process had been killed."""


def _die() -> None:
    raise Died


SWITCH = [
    ("made again, not switched", 1),
    ("what was before is beside", 1),
    ("some of it is there", 2),
    ("what was before is gone", 1),
    ("switched and moved", 1),
]


def dying_at(monkeypatch, point: str, time: int) -> None:
    """The `time`-th time that a rebuild comes to the point it dies."""
    met = []

    def die(name: str) -> None:
        met.append(name)
        if (name, met.count(name)) == (point, time):
            raise Died

    monkeypatch.setattr(switch, "crash_point", die)


@pytest.mark.parametrize(
    "point,time,next_run",
    [(*at, run) for at, run in zip(SWITCH, itertools.cycle(["preprocess", "compact", "rebuild"]))],
)
def test_a_rebuild_that_dies_is_ended_by_the_next_run(lived, made, stream, monkeypatch, point, time, next_run):
    before = tables(lived)
    with monkeypatch.context() as patched, pytest.raises(Died):
        dying_at(patched, point, time)
        Lake(lived).rebuild()
    for table, frame in tables(lived).items():  # readers meanwhile
        assert_frame_equal(frame, before[table])
    if next_run == "preprocess":
        assert Lake(lived).next_batch(max_files=9, scheduled_for=AT) is None
    elif next_run == "compact":
        assert (
            Lake(lived).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="c")["failed"].is_null().all()
        )
    else:
        assert Lake(lived).rebuild()["equal"].all()
    source.land(Root.at(lived), stream, source.make_ticks(stream, range(3, 4)))
    ingest_all(lived)
    after = tables(lived)
    for table, frame in before.items():
        key = Lake(lived).keys[table]
        assert_frame_equal(after[table].join(frame.select(key), on=key, how="semi"), frame)
    assert (after["files"].height, Lake(lived).snapshot().batch) == (before["files"].height + 2, 4)
    Lake(lived).compact(target_mb=64, min_small_files=2, vacuum_hours=24, run_id="c")
    left = {name.split("-")[0] for name in Root.at(lived).names("")}
    assert left == {"archive", "lake", "landing", "leases"}
    assert examine(lived) == [Finding(finding.what) for finding in examine(lived)]


def test_versions_rise_and_the_log_begins_with_what_was_made_again(lived):
    before = Lake(lived).snapshot()
    Lake(lived).rebuild()
    after = Lake(lived).snapshot()
    assert set(after.versions.values()) == {1000} and after.batch == before.batch
    assert (
        DeltaTable(f"{lived}/lake/orders").version(),
        len(list(Path(lived, "lake/orders/_delta_log").iterdir())),
    ) == (
        1000,
        3,
    )
    beside = next(path for path in Path(lived).iterdir() if path.name.startswith("lake-before-"))
    assert json.loads((beside / "published.json").read_text())["tables"] == before.versions
    assert DeltaTable(str(beside / "orders")).version() == before.versions["orders"]


def test_a_lake_that_vanished_does_not_begin_anew(lived):
    shutil.rmtree(Path(lived, "lake"))
    for _ in range(2):
        with pytest.raises(Damaged, match="batch 3 was published and archive/ has what was ingested.*rebuild"):
            Lake(lived).next_batch(max_files=9, scheduled_for=AT)
        shutil.move(Path(lived, "archive"), Path(lived, "elsewhere"))
        with pytest.raises(Damaged, match="though batch 3 was published: nothing begins anew"):
            Lake(lived).next_batch(max_files=9, scheduled_for=AT)
        shutil.move(Path(lived, "elsewhere"), Path(lived, "archive"))
    assert not Path(lived, "lake").exists()
    Lake(lived).rebuild()
    assert Lake(lived).next_batch(max_files=9, scheduled_for=AT) is None


def test_a_rebuild_in_an_object_store_that_dies_is_ended_by_the_next_run(s3_root, stream, made, monkeypatch):
    source.land(Root.at(s3_root), stream, {1: made[1]})
    ingest_all(s3_root)
    before = tables(s3_root)
    with monkeypatch.context() as patched, pytest.raises(Died):
        dying_at(patched, "some of it is there", 2)
        Lake(s3_root).rebuild()
    assert_frame_equal(tables(s3_root)["orders"], before["orders"])
    assert Lake(s3_root).next_batch(max_files=9, scheduled_for=AT) is None
    assert "under" not in snapshots.read_pointer(Root.at(s3_root))
    for table, frame in tables(s3_root).items():
        assert_frame_equal(frame, before[table])
    assert Lake(s3_root).snapshot().versions["orders"] == 1000
