"""From JSON file to Delta table: each row exactly once, and those that do not fit in quarantine."""

import gzip
import html
import json
import multiprocessing
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal
from support import AT, ingest_all

from etl import charts
from etl.lake import commit as commits
from etl.lake import ingest, landing, ledger
from etl.lake import snapshot as snapshots
from etl.storage import PROJECT, Root
from pipeline import Lake, queries, source
from pipeline.tables import TABLES


def rows(root: str, table: str) -> pl.DataFrame:
    return Lake(root).snapshot().frame(table).collect().sort(TABLES[table].key)


def expected(made: dict, table: str) -> pl.DataFrame:
    return pl.concat([frames[table] for frames in made.values() if table in frames]).sort(TABLES[table].key)


def assert_exactly(root: str, made: dict) -> None:
    for table in TABLES:
        assert_frame_equal(rows(root, table), expected(made, table))


def test_every_row_is_in_the_lake_once(filled, made):
    assert_exactly(filled, made)
    assert all(Root.at(filled).names(f"landing/{table}") == [] for table in TABLES)


def test_the_lake_equals_what_another_engine_reads_from_the_archive(filled):
    for table, columns in (("orders", TABLES["orders"].types), ("lineitem", TABLES["lineitem"].types)):
        money = [name for name, dtype in columns.items() if isinstance(dtype, pl.Decimal)]
        sums = ", ".join(f"sum({name}::decimal(15,2))" for name in money)
        files = f"{filled}/archive/*/{table}/*.json"
        other = duckdb.sql(f"select count(*), {sums} from read_json('{files}', format='newline_delimited')").fetchone()
        frame = rows(filled, table)
        assert other == (frame.height, *(frame[name].sum() for name in money))


def test_a_second_run_finds_nothing_and_changes_no_version(filled):
    before = Lake(filled).snapshot()
    assert Lake(filled).next_batch(max_files=500, scheduled_for=AT) is None
    assert Lake(filled).snapshot() == before
    assert all(Lake(filled).table(t).version() == v for t, v in before.versions.items())


def test_a_batch_committed_again_changes_nothing(landed, made):
    parsed = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT))
    first = Lake.commit(parsed, run_id="one")
    assert Lake.commit(parsed, run_id="one") == first
    assert Lake.commit(parsed, run_id="two") == {}  # another run's
    assert_exactly(landed, made)


def test_files_are_taken_oldest_first_and_no_more_than_asked(landed):
    batch = Lake(landed).next_batch(max_files=9, scheduled_for=AT)
    assert [f.sequence for f in batch.files] == [0] * 8  # the ninth is not parted from the tenth
    Lake.commit(Lake.read(batch), run_id="one")
    assert len(Lake(landed).next_batch(max_files=500, scheduled_for=AT).files) == 4


def _commit(root: str, run_id: str, start) -> None:
    parsed = Lake.read(Lake(root).next_batch(max_files=500, scheduled_for=AT))
    start.wait()
    Lake.commit(parsed, run_id=run_id)


def test_two_processes_with_the_same_batch_commit_it_once(landed, made):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    both = [context.Process(target=_commit, args=(landed, name, start)) for name in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert_exactly(landed, made)


def test_an_ingested_file_that_appears_again_is_set_aside(filled, stream, made):
    source.land(Root.at(filled), stream, {2: made[2]})
    batch = Lake(filled).next_batch(max_files=500, scheduled_for=AT)
    assert ([f.sequence for f in batch.repeated], batch.files) == ([2, 2], ())
    Lake.commit(Lake.read(batch), run_id="again")
    assert Lake(filled).snapshot().batch == 1
    assert_exactly(filled, made)
    assert Root.at(filled).names("landing/orders") == []
    assert len([*Path(filled, "archive").glob("*/.repeated/*/*")]) == 2
    assert Lake(filled).next_batch(max_files=500, scheduled_for=AT) is None


def test_bad_rows_reach_quarantine_with_file_and_line(landed, made):
    place, name = Root.at(landed), "landing/orders/orders-00000001.json"
    lines = place.read(name).splitlines()
    lines[3] = b"{oops"
    place.write(name, b"\n".join(lines) + b"\n")
    batch = Lake(landed).next_batch(max_files=500, scheduled_for=AT)
    parsed = Lake.read(batch)
    assert parsed.refused.height == 1
    Lake.commit(parsed, run_id="one")
    quarantine = Lake(landed).snapshot().frame("quarantine").collect()
    assert quarantine.select("batch", "table", "file", "line", "raw").rows() == [
        (1, "orders", "orders/orders-00000001.json", 4, "{oops")
    ]
    total = sum(frames["orders"].height for frames in made.values())
    assert rows(landed, "orders").height == total - 1


UNSAYABLE = {
    "a time past the year 9999 in UTC": {"o_order_time": "9999-12-31T23:30:00.000-01:00"},
    "a time in the year 0": {"o_order_time": "0000-07-01T00:00:00.000+00:00"},
    "a time before the year 1 in UTC": {"o_order_time": "0001-01-01T00:30:00.000+01:00"},
    "a 60th second at the end of time": {"o_order_time": "9999-12-31T23:59:60.000+00:00"},
    "a day in the year 0": {"o_orderdate": "0000-01-01"},
    "a time far ahead": {"o_order_time": "9998-01-01T00:00:00.000+00:00"},
    "a lone surrogate": {"o_comment": "\ud800"},
    "the highest key and one": {"o_orderkey": 2**63},
    "nothing": {"o_order_time": None},
}


@pytest.mark.parametrize("what", UNSAYABLE)
def test_a_row_that_nothing_can_say_is_set_apart_and_stops_nothing(landed, made, what):
    place, name = Root.at(landed), "landing/orders/orders-00000001.json"
    lines = place.read(name).splitlines()
    odd = json.dumps(json.loads(lines[3]) | UNSAYABLE[what]).encode()
    place.write(name, b"\n".join([*lines[:3], odd, *lines[4:]]))
    done = Lake(landed).drain(**LIMITS | {"max_files": 8}, for_s=60)
    assert done["batch"].to_list() == [1, 2]
    assert [Root.at(landed).names(f"landing/{table}") for table in TABLES] == [[]] * len(TABLES)
    whole = pl.concat([frames["orders"] for frames in made.values()])
    snapshot = Lake(landed).snapshot()
    assert rows(landed, "orders").height == whole.height - 1
    assert snapshot.as_of == whole["o_order_time"].max()
    apart = snapshot.frame("quarantine").collect()
    assert apart.select("file", "line", "raw").rows() == [("orders/orders-00000001.json", 4, odd.decode())]
    assert apart["reason"][0].startswith(next(iter(UNSAYABLE[what])))
    assert odd.decode()[:20] in html.unescape(charts.table(apart)._repr_html_())


CLOCK = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("scheduled_for", "hours_ahead", "fits"),
    [
        (None, 23, True),
        (None, 25, False),
        ("2026-03-01T12:00:10+00:00", 23, True),
        ("2026-03-01T12:00:10+00:00", 25, False),
        ("2026-01-01T00:00:00+00:00", 23, True),  # a run of then takes what waits now
        ("2026-01-01T00:00:00+00:00", 25, False),
        ("2026-03-02T12:00:10+00:00", 47, True),  # a stream that is ahead of the clock
        ("2026-03-02T12:00:10+00:00", 49, False),
        ("2026-03-01", 25, False),
    ],
)
def test_a_row_is_at_most_a_day_ahead(root, made, scheduled_for, hours_ahead, fits):
    ahead = (
        made[1]["orders"]
        .head(2)
        .with_columns(o_order_time=pl.Series([CLOCK, CLOCK + timedelta(hours=hours_ahead)]).dt.cast_time_unit("us"))
    )
    Root.at(root).write("landing/orders/orders-00000001.json", source.to_json_lines(ahead))
    batch = Lake(root).next_batch(max_files=9, scheduled_for=scheduled_for, now=CLOCK)
    with pytest.MonkeyPatch.context() as patched:  # a crash after it was written down; the next run is days later
        stop_before(patched, "append")
        with pytest.raises(KeyboardInterrupt):
            Lake.commit(Lake.read(batch), run_id="one")
    later = Lake(root).next_batch(max_files=9, scheduled_for=None, now=CLOCK + timedelta(days=3))
    assert (later.at, later.date) == (batch.at, "2026-03-04")
    Lake.commit(Lake.read(later), run_id="two")
    snapshot = Lake(root).snapshot()
    assert rows(root, "orders").height == 1 + fits
    assert snapshot.as_of == CLOCK + fits * timedelta(hours=hours_ahead)
    assert snapshot.frame("quarantine").collect().height == 1 - fits


def test_as_of_leaves_room_to_look_back(root, made):
    old = made[1]["orders"].head(1).with_columns(o_order_time=pl.datetime(1, 1, 1, time_zone="UTC"))
    Root.at(root).write("landing/orders/orders-00000001.json", source.to_json_lines(old))
    ingest_all(root)
    assert Lake(root).snapshot().as_of == datetime(1970, 1, 1, tzinfo=UTC)
    for question in queries.questions():
        queries.ask(question, Lake(root).snapshot())


def test_a_batch_that_an_earlier_release_wrote_down_is_of_today():
    today = datetime(2026, 3, 4, 12, tzinfo=UTC)
    assert ledger.time_of({"date": "2026-03-01"}, today) == "2026-03-04T12:00:00+00:00"
    assert ledger.time_of({"date": "2026-03-04"}, today) == "2026-03-04T23:59:59+00:00"
    assert ledger.time_of({"date": "2026-03-04", "at": AT}, today) == AT


def test_files_are_archived_under_the_day_of_the_clock(landed, made, monkeypatch):
    """`scheduled_for` is what a run says of itself: what it archives today must not be deleted as that day's."""
    place = Root.at(landed)
    place.write("landing/orders/orders-00000007.json", b"")
    batch = Lake(landed).next_batch(max_files=8, scheduled_for="2025-01-01T00:00:00+00:00", now=CLOCK)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def end(name):
            if name == "after the archive: customer":
                raise KeyboardInterrupt

        patched.setattr(landing, "crash_point", end)
        Lake.commit(Lake.read(batch), run_id="one")
    assert place.names("archive") == [ledger.read(place, 1)["date"]] == ["2026-03-01"]
    batch = Lake(landed).next_batch(max_files=8, scheduled_for=AT, now=CLOCK + timedelta(days=1))
    parsed = Lake.read(batch)
    assert (len(parsed.batch.files), parsed.batch.refused) == (8, ())
    Lake.commit(parsed, run_id="two")
    names = [{path.name for path in Path(landed, "archive").glob(f"2026-03-0{day}/*/*")} for day in (1, 2)]
    assert [len(day) for day in names] == [3, 5]
    assert names[0] | names[1] == {Path(file.path).name for file in batch.files}
    ingest_all(landed)
    assert place.names("refused") == [max(place.names("archive"))]  # today's
    compared = Lake(landed).rebuild()
    assert compared["equal"].all()
    assert_exactly(landed, made)


def test_a_file_of_which_no_line_fits_is_refused_and_stops_nothing(landed, made):
    place = Root.at(landed)
    rows_of = [json.loads(line) for line in place.read("landing/orders/orders-00000001.json").splitlines()]
    place.write("landing/orders/orders-00000007.json", json.dumps(rows_of, indent=1).encode()[:-1])
    place.write("landing/orders/orders-00000008.json", b"\n".join(b"{oops %d" % (n % 9 == 0) for n in range(99)))
    place.write("landing/orders/orders-00000009.json", b"\n \n")
    first = place.read("landing/orders/orders-00000002.json")
    place.write("landing/orders/orders-00000002.json", b"\n" * 9000 + first + b"\n")
    done = Lake(landed).drain(**LIMITS, for_s=60)
    assert done.select("files", "files_refused", "files_unfit", "refused").rows() == [(12, 3, 1, 0)]
    assert_exactly(landed, made)
    last = len(rows_of)
    assert {Path(file).name: why for file, why in why_refused(landed).items()} == {
        "orders-00000007.json": f"is a JSON array that cannot be read beyond element {last}: no comma and no end",
        "orders-00000008.json": "99 of 99 lines do not fit: not JSON: Expecting property name enclosed in double "
        "quotes 99; line 1: not JSON: Expecting property name enclosed in double quotes at character 2",
        "orders-00000009.json": "has no rows, only blank lines",
    }


def test_files_that_are_no_tables_are_left_alone(landed):
    place = Root.at(landed)
    place.write("landing/orders/readme.txt", b"hello")
    place.write("landing/secrets/secrets-00000001.json", b"{}\n")
    ingest_all(landed)
    assert place.names("landing/orders") == []
    assert "orders/readme.txt" in why_refused(landed)
    assert place.names("landing/secrets") == ["secrets-00000001.json"]


def earlier(place: Root, number: int) -> None:
    """A manifest as releases until November 2026 wrote it down."""
    document = ledger.read(place, number)
    document["files"] = [
        {"name": file["path"].rpartition("/")[2]} | {key: file[key] for key in ("table", "bytes", "sha256")}
        for file in document["files"]
    ]
    document |= {"ingested": {file["table"]: [[0, 2]] for file in document["files"]}}
    del document["known"]
    place.write(ledger.manifest(number), ledger.written(document))


def why_refused(root: str) -> dict[str, str]:
    """File -> why, of all that was refused."""
    return {one["file"]: one["why"] for one in Lake(root).refused_files()}


STEPS = {"append": commits, "swap_pointer": snapshots}


def stop_before(monkeypatch, name: str) -> None:
    """The next commit ends where the function `name` would be called."""

    def end(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(STEPS[name], name, end)


@pytest.mark.parametrize("step", STEPS)
def test_a_batch_that_an_earlier_release_left_unfinished_is_finished(landed, made, monkeypatch, step):
    """Its manifest has names of files in the folder of their table, and which numbers are in the lake."""
    place = Root.at(landed)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_before(patched, step)
        ingest_all(landed)
    manifest = ledger.read(place, 1)
    earlier(place, 1)
    batch = Lake(landed).next_batch(max_files=1, scheduled_for=AT)
    assert [file.path for file in batch.files] == [file["path"] for file in manifest["files"]]
    parsed = Lake.read(batch)
    assert parsed.batch.refused == ()
    Lake.commit(parsed, run_id="again")
    assert_exactly(landed, made)
    assert all(place.names(f"landing/{table}") == [] for table in TABLES)
    known = ledger.known(Lake(landed), snapshots.read_pointer(place), ledger.read(place, 1))
    assert place.exists(ledger.done(1)) and len(known.all()) == 2 * 12
    assert Lake(landed).next_batch(max_files=9, scheduled_for=AT) is None
    assert Lake(landed).rebuild()["equal"].all()
    assert_exactly(landed, made)


@pytest.mark.parametrize("step", STEPS)
def test_a_file_that_changes_after_it_was_written_down_is_refused(landed, made, monkeypatch, step):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_before(patched, step)
        ingest_all(landed)
    name = "landing/orders/orders-00000001.json"
    Root.at(landed).write(name, Root.at(landed).read(name).replace(b"Clerk", b"Clark"))
    parsed = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT))
    assert [(file.name, file.why) for file in parsed.batch.refused] == [
        ("orders/orders-00000001.json", "changed since batch 1 was written down")
    ]
    Lake.commit(parsed, run_id="again")
    clerks = rows(landed, "orders")["o_clerk"]
    assert not clerks.str.starts_with("Clark").any()
    # what was committed before the change stays; what was not is not half there
    whole = sum(frames["orders"].height for frames in made.values())
    assert clerks.len() == (whole if step == "swap_pointer" else whole - made[1]["orders"].height)
    assert why_refused(landed) == {"orders/orders-00000001.json": "changed since batch 1 was written down"}
    # brought back, it is ingested only where its name never was
    assert Lake(landed).retry("orders-00000001.json") == ["landing/orders/orders-00000001.json"]
    batch = Lake(landed).next_batch(max_files=500, scheduled_for=AT)
    assert len(batch.files) == (0 if step == "swap_pointer" else 1)


def test_rows_of_a_file_that_vanishes_after_they_were_committed_are_published_with_their_batch(
    landed, made, monkeypatch
):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_before(patched, "swap_pointer")
        Lake.commit(Lake.read(Lake(landed).next_batch(max_files=8, scheduled_for=AT)), run_id="one")
    Root.at(landed).remove("landing/region/region-00000000.json")
    ingest_all(landed)
    assert_frame_equal(rows(landed, "region"), made[0]["region"].sort("r_regionkey"))
    ingest_all(landed)
    assert_exactly(landed, made)


def test_a_file_that_changes_while_it_is_ingested_does_not_reach_the_archive(landed):
    parsed = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT))
    Root.at(landed).write("landing/orders/orders-00000001.json", b"{}\n")
    Lake.commit(parsed, run_id="one")
    assert "changed while it was ingested" in why_refused(landed)["orders/orders-00000001.json"]
    (day,) = Root.at(landed).names("archive")
    assert Root.at(landed).names(f"archive/{day}/orders") == ["orders-00000000.json", "orders-00000002.json"]


def test_an_ingested_name_with_other_content_is_refused(filled):
    place = Root.at(filled)
    place.write("landing/orders/orders-00000001.json", b"{}\n")
    batch = Lake(filled).next_batch(max_files=500, scheduled_for=AT)
    assert (batch.files, batch.repeated) == ((), ())
    Lake.commit(Lake.read(batch), run_id="again")
    assert why_refused(filled) == {"orders/orders-00000001.json": "was ingested in batch 1 with other content"}
    assert Lake(filled).next_batch(max_files=500, scheduled_for=AT) is None


def test_a_batch_has_at_most_so_many_bytes(landed):
    batch = Lake(landed).next_batch(max_files=500, max_bytes=2_000_000, scheduled_for=AT)
    assert 0 < sum(file.bytes for file in batch.files) <= 2_000_000
    assert not batch.refused
    small = Lake(landed).next_batch(max_files=500, max_bytes=400_000, scheduled_for=AT)
    assert {(file.table, file.sequence, file.why) for file in small.refused} >= {
        ("lineitem", 1, f"has {Root.at(landed).size('landing/lineitem/lineitem-00000001.json'):,} bytes: "
         "more than the 400,000 of a batch")
    }  # fmt: skip


LIMITS = {"max_files": 500, "max_bytes": 10**9, "max_bad_share": 0.01, "scheduled_for": AT, "run_id": "x"}


def test_what_waits_is_drained_in_batches(landed, made):
    done = Lake(landed).drain(**LIMITS | {"max_files": 3}, for_s=60)
    assert done["files"].to_list() == [3, 3, 2, 2, 2]  # a tick's files together where a batch can hold them
    assert_exactly(landed, made)


def test_500_waiting_files_are_in_after_at_most_three_runs(root, made):
    """With the limits that preprocess has, as its notebook uses them: a batch, then what else waits."""
    limits = yaml.safe_load((PROJECT / "params/preprocess.yml").read_text())["parameters"]
    for_s = limits.pop("drain_s")
    one, items = made[1]["orders"].head(1), made[1]["lineitem"].head(1)
    for tick in range(250):
        for table, frame in (("orders", one), ("lineitem", items)):
            key = frame.columns[0]
            lines = source.to_json_lines(frame.with_columns(pl.lit(tick + 1, pl.Int64).alias(key)))
            path = Path(root, source.file_name(table, tick))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lines)
            os.utime(path, (0, 0))  # it is not waited for
    runs = 0
    while any(Root.at(root).names(f"landing/{table}") for table in TABLES):
        runs += 1
        assert runs <= 3
        Lake(root).drain(**limits, for_s=for_s, scheduled_for=AT, run_id=f"preprocess-{runs}")
    assert rows(root, "orders")["o_orderkey"].to_list() == [*range(1, 251)]
    assert rows(root, "lineitem")["l_orderkey"].to_list() == [*range(1, 251)]


def test_nothing_is_begun_when_the_time_is_over(landed):
    assert Lake(landed).drain(**LIMITS, for_s=0).is_empty()
    assert len(Lake(landed).drain(**LIMITS | {"max_files": 1}, for_s=0.001)) == 1


def spoil(root: str, sequence: int, bad: int) -> tuple[str, bytes]:
    """The first lines of a file of orders lack their clerk, and every third of them has a text for a number too.

    Returns the name, and what was in it."""
    place, name = Root.at(root), f"orders-{sequence:08d}.json"
    before = place.read(f"landing/orders/{name}")
    lines = [json.loads(line) for line in before.splitlines()]
    for number, line in enumerate(lines[:bad]):
        del line["o_clerk"]
        if number % 3 == 0:
            line["o_custkey"] = f"c{number}"
    place.write(f"landing/orders/{name}", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return name, before


def test_a_file_of_which_too_few_lines_fit_is_refused_and_the_others_are_taken(landed, made):
    whole = made[1]["orders"].height
    spoil(landed, 1, whole // 2)
    spoil(landed, 2, 3)
    name, _ = spoil(landed, 0, 1)
    lines = {sequence: made[sequence]["orders"].height for sequence in range(3)}
    most = 2 / lines[2]
    done = Lake(landed).drain(**LIMITS | {"max_bad_share": most, "max_files": 8}, for_s=60)
    assert done.select("files", "files_refused", "files_unfit", "refused").rows() == [(8, 0, 0, 1), (2, 2, 2, 0)]
    half = -(-(whole // 2) // 3)
    why = {
        "orders/orders-00000001.json": f"{whole // 2} of {lines[1]} lines do not fit: `o_clerk` missing {whole // 2}, "
        f"`o_custkey` is not a whole number {half}; line 1: o_custkey: 'c0' is not a whole number; o_clerk: missing",
        "orders/orders-00000002.json": f"3 of {lines[2]} lines do not fit: `o_clerk` missing 3, `o_custkey` is not a "
        "whole number 1; line 1: o_custkey: 'c0' is not a whole number; o_clerk: missing",
    }
    assert why_refused(landed) == why
    assert Lake.unfit(done) == "2 files, " + "; ".join(f"{file}: {said}" for file, said in why.items())
    assert rows(landed, "orders").height == lines[0] - 1
    assert_frame_equal(rows(landed, "lineitem"), expected(made, "lineitem"))
    assert Lake(landed).refused_lines().select("file", "line").rows() == [(f"orders/{name}", 1)]
    assert all(Root.at(landed).names(f"landing/{table}") == [] for table in TABLES)
    Lake(landed).retry("orders-00000002.json")
    again = Lake(landed).drain(**LIMITS | {"max_bad_share": 1.0}, for_s=60)
    assert again.select("files", "files_refused", "refused").rows() == [(1, 0, 3)]
    assert Lake(landed).rebuild()["equal"].all()


def test_rows_are_counted_by_the_run_that_published_them(landed, monkeypatch):
    """Of two at once the other one finds its batch published."""
    first, second = (Lake(landed).read(Lake(landed).next_batch(max_files=4, scheduled_for=AT)) for _ in range(2))
    counted = [Lake.summary(parsed, Lake.commit(parsed, run_id=run)) for parsed, run in ((first, "a"), (second, "b"))]
    assert [frame.height for frame in counted] == [1, 0]
    limits = LIMITS | {"for_s": 60}
    others = []

    def meanwhile(name: str) -> None:  # another run takes all that waits, once this one has read its batch
        monkeypatch.setattr(ingest, "crash_point", lambda name: None)
        others.append(Lake(landed).drain(**limits | {"run_id": "c"}))

    monkeypatch.setattr(ingest, "crash_point", meanwhile)
    done = Lake(landed).drain(**limits)
    assert (done.height, others[0].height) == (0, 1)
    total = sum(frame["rows"].sum() for frame in [*counted, *others])
    assert total == sum(Lake(landed).snapshot().row_count(table) for table in TABLES)


@pytest.mark.parametrize(
    ("share", "lines", "bad", "taken"),
    [(0.01, 20, 1, True), (0.01, 20, 2, False), (0.01, 200, 2, True), (0.01, 200, 3, False), (0.01, 2, 1, True)]
    + [(0.01, 1, 1, False), (0.0, 200, 1, False), (0.0, 20, 0, True), (1.0, 20, 19, True)],
)
def test_one_line_of_a_small_file_may_not_fit(root, share, lines, bad, taken):
    good = [json.dumps({"r_regionkey": n, "r_name": "a", "r_comment": "b"}) for n in range(lines - bad)]
    Root.at(root).write("landing/region/region-00000001.json", "\n".join([*good, *["{oops"] * bad]).encode())
    done = Lake(root).drain(**LIMITS | {"max_bad_share": share}, for_s=60)
    assert done.select("files", "refused").row(0) == ((1, bad) if taken else (0, 0))
    assert done["files_refused"].item() == (not taken)


def pack(root: str) -> dict[int, int]:
    """The files in landing become gzip. Returns the bytes that those of each sequence had together."""
    place, sizes = Root.at(root), {}
    for table in TABLES:
        for name in place.names(f"landing/{table}"):
            data = place.read(f"landing/{table}/{name}")
            sequence = Lake(root).sequence_of(name)
            sizes[sequence] = sizes.get(sequence, 0) + len(data)
            place.write(f"landing/{table}/{name}", gzip.compress(data, 1))
    return sizes


def test_a_batch_ends_where_it_would_inflate_to_more_than_it_may(landed, made):
    sizes, batches = pack(landed), []
    most = max(sizes.values())
    while batch := Lake(landed).next_batch(max_files=500, scheduled_for=AT):
        parsed = Lake.read(batch, max_inflated=most)
        assert parsed.rows == sum(frame.height for frame in parsed.frames.values())
        Lake.commit(parsed, run_id="one")
        batches.append({file.sequence for file in parsed.batch.files})
    assert len(batches) > 1 and all(sum(sizes[sequence] for sequence in batch) <= most for batch in batches)
    assert sorted(sequence for batch in batches for sequence in batch) == [0, 1, 2]  # none is in two
    assert_exactly(landed, made)
    assert Lake(landed).rebuild()["equal"].all()


def test_a_batch_has_a_file_at_least_and_all_of_those_that_were_written_down(landed, made, monkeypatch):
    pack(landed)
    batch = Lake(landed).next_batch(max_files=500, scheduled_for=AT)
    assert 0 < len(Lake.read(batch, max_inflated=1).batch.files) < len(batch.files)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_before(patched, "append")
        Lake.commit(Lake.read(batch), run_id="one")
    again = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT), max_inflated=1)
    assert {file.name for file in again.batch.files} == {file.name for file in batch.files}
    Lake.commit(again, run_id="two")
    assert_exactly(landed, made)


def test_small_files_that_inflate_to_much_take_little_memory(root):
    """200 files of 20 kB, each of 20 MB: 4 GB in all, and a process that may have a few hundred MB more."""
    lines = (b"{" + b" " * 999_980 + b'"o":1}\n') * 20
    packed = gzip.compress(lines, 6)
    for number in range(200):
        Root.at(root).write(f"landing/orders/orders-{number:08d}.json", packed + gzip.compress(b"%d\n" % number))
    code = (
        "import resource, sys; from pipeline import Lake; lake = Lake(sys.argv[1])\n"
        "batch = lake.next_batch(max_files=500, scheduled_for=None)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "parsed = lake.read(batch, max_inflated=60_000_000)\n"
        "print(len(parsed.batch.refused), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, root], cwd=PROJECT, capture_output=True, text=True)
    files, kilobytes = map(int, done.stdout.split())
    assert files == 3 and kilobytes < 600_000, done.stderr


@pytest.mark.parametrize("step", STEPS)
def test_a_file_that_was_written_down_is_not_refused_by_its_share(landed, made, monkeypatch, step):
    """Its rows may be in the lake: whoever finishes the batch takes it as it was taken."""
    spoil(landed, 1, made[1]["orders"].height // 2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_before(patched, step)
        ingest_all(landed)
    done = Lake(landed).drain(**LIMITS | {"max_bad_share": 0.0}, for_s=60)
    assert done.select("files_refused", "files_unfit").rows() == [(0, 0)]
    assert why_refused(landed) == {}
    bad = made[1]["orders"].height // 2
    assert Lake(landed).refused_lines().height == bad
    assert rows(landed, "orders").height == expected(made, "orders").height - bad


def test_unknown_fields_are_kept(landed):
    place, name = Root.at(landed), "landing/orders/orders-00000001.json"
    lines = place.read(name).splitlines()
    lines[0] = lines[0][:-1] + b',"channel":"web","score":[1,2.5]}'
    place.write(name, b"\n".join(lines) + b"\n")
    parsed = Lake.read(Lake(landed).next_batch(max_files=500, scheduled_for=AT))
    assert (parsed.rescued, parsed.refused.height) == (1, 0)
    Lake.commit(parsed, run_id="one")
    rescued = Lake(landed).snapshot().frame("orders", ["_rescued"]).collect()["_rescued"].drop_nulls()
    assert [json.loads(value) for value in rescued] == [{"channel": "web", "score": [1, 2.5]}]
