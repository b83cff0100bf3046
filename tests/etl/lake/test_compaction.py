"""The same rows in fewer files."""

import json
import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import CommitFailedError
from polars.testing import assert_frame_equal
from support import AT, ingest_all

from etl import delta
from etl.lake import compaction, retention, sorting
from etl.lake import snapshot as snapshots
from etl.storage import Root
from pipeline import Lake, source
from pipeline.tables import TABLES

ASK = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24}


def test_rows_stay_and_files_become_one(scattered):
    before = Lake(scattered).snapshot()
    rows = {t: before.frame(t).collect().sort(TABLES[t].key) for t in TABLES}
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    after = Lake(scattered).snapshot()
    assert done.filter(table="lineitem").select("files_before", "files_after").row(0) == (3, 1)
    assert done["rows_before"].equals(done["rows_after"])
    assert (after.batch, after.as_of) == (before.batch, before.as_of)
    assert after.versions["lineitem"] > before.versions["lineitem"]
    assert len(after.files("lineitem")) == 1
    for table, expected in rows.items():
        assert_frame_equal(after.frame(table).collect().sort(TABLES[table].key), expected)
    assert Lake(scattered).table("orders").history(1)[0]["run_id"] == "compact-1"


def test_a_second_compaction_changes_nothing(scattered):
    Lake(scattered).compact(**ASK, run_id="compact-1")
    before = Lake(scattered).snapshot()
    Lake(scattered).compact(**ASK, run_id="compact-2")
    assert Lake(scattered).snapshot().versions == before.versions


def test_readers_of_the_old_snapshot_are_not_disturbed(scattered):
    before = Lake(scattered).snapshot()
    Lake(scattered).compact(**ASK, run_id="compact-1")
    assert before.frame("lineitem").collect().height > 0


def test_the_batches_go_on_after_a_compaction(scattered, stream):
    Lake(scattered).compact(**ASK, run_id="compact-1")
    before = Lake(scattered).snapshot().frame("orders").collect().height
    more = source.make_tick(stream, 3)
    source.land(Root.at(scattered), stream, {3: more})
    ingest_all(scattered)
    assert Lake(scattered).snapshot().frame("orders").collect().height == before + more["orders"].height
    assert Lake(scattered).next_batch(max_files=500, scheduled_for=AT) is None


def test_an_unfinished_batch_is_never_published_by_a_compaction(scattered, stream, monkeypatch):
    source.land(Root.at(scattered), stream, {3: source.make_tick(stream, 3)})
    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "swap_pointer", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ingest_all(scattered)
    before = Lake(scattered).snapshot()
    rows = before.frame("lineitem").collect().height
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    assert done.filter(table="lineitem").select("files_before", "files_after").row(0) == (3, 1)
    assert Lake(scattered).snapshot() == before  # three files in one, and one of a batch that readers must not see yet
    ingest_all(scattered)
    after = Lake(scattered).snapshot()
    assert (after.batch, len(after.files("lineitem"))) == (4, 2)
    assert after.frame("lineitem").collect().height > rows


def test_rows_are_sorted_by_key_so_that_statistics_prune(scattered):
    Lake(scattered).compact(**ASK, run_id="compact-1")
    snapshot = Lake(scattered).snapshot()
    for table, key in (("orders", "o_orderkey"), ("lineitem", "l_orderkey")):
        (file,) = snapshot.files(table)
        rows = pl.read_parquet(file)
        assert rows[key].is_sorted()
        said = pa.table(snapshot.table(table).get_add_actions(flatten=True)).to_pylist()[0]
        assert (said[f"min.{key}"], said[f"max.{key}"]) == (rows[key].min(), rows[key].max())
        money = next(name for name, dtype in TABLES[table].types.items() if isinstance(dtype, pl.Decimal))
        assert (said[f"min.{money}"], said[f"max.{money}"]) == (rows[money].min(), rows[money].max())
        time = next(name for name in rows.columns if name.endswith("_time"))
        assert said[f"max.{time}"] == rows[time].max()
    few = snapshot.frame("orders").filter(pl.col("o_orderkey") == 1).collect()
    assert few.height == 1


def test_two_compactions_that_read_the_same_files_change_no_row(scattered):
    lake = Lake(scattered)
    before = lake.snapshot()
    handle = before.table("lineitem")
    ((group,),) = [compaction._worth_it(lake, handle, "lineitem", 64_000_000, 2)]
    declared = pa.schema(handle.schema().to_arrow())
    first, second = (compaction._rewrite(lake, "lineitem", group, declared, 64_000_000)[0] for _ in range(2))
    compaction._swap(lake, "lineitem", [first], "one")
    with pytest.raises(compaction.Overlapped):
        compaction._swap(lake, "lineitem", [second], "two")
    assert delta.file_stats(lake.table("lineitem"))[1] == before.rows().filter(table="lineitem")["rows"][0]
    assert len(lake.table("lineitem").file_uris()) == 1


def test_a_table_has_one_compaction_at_a_time(scattered):
    with Root.at(scattered).lease("leases/tables/lineitem", "another"):
        done = Lake(scattered).compact(**ASK, run_id="compact-1")
    assert "left to another compaction" in done.filter(table="lineitem")["note"][0]
    assert done.filter(table="orders")["files_after"][0] == 1


@pytest.mark.parametrize("wrong", [1, 5], ids=["as it was read", "as it came back"])
def test_a_file_that_does_not_come_back_as_it_went_is_not_taken(scattered, monkeypatch, wrong):
    real, asked = sorting.checksum, []

    def once_wrong(frame):
        asked.append(1)
        return real(frame) + (len(asked) == wrong)

    monkeypatch.setattr(sorting, "checksum", once_wrong)
    before = Lake(scattered).snapshot()
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    ((table, why),) = done.filter(pl.col("failed").is_not_null()).select("table", "failed").rows()
    assert why.startswith("RowsDiffer: ") and why.endswith("left as it was")
    after = Lake(scattered).snapshot()
    assert after.versions[table] == before.versions[table]
    assert not [name for name in Root.at(scattered).names(f"lake/{table}") if name.startswith("compacted")]
    (other,) = {"orders", "lineitem"} - {table}
    assert (len(before.files(other)), len(after.files(other))) == (3, 1)


def test_a_checksum_is_of_rows_and_not_of_their_order(made):
    frame = made[1]["lineitem"]
    assert sorting.checksum(frame) == sorting.checksum(frame.sort("l_comment"))
    changed = frame.with_columns(
        l_tax=pl.when(pl.int_range(pl.len()) == 7).then(0).otherwise("l_tax").cast(pl.Decimal(15, 2))
    )
    for other in (frame.head(-1), pl.concat([frame, frame.head(1)]), changed.with_columns(l_linenumber=pl.lit(9))):
        assert sorting.checksum(other) != sorting.checksum(frame)


def test_nothing_is_vacuumed_while_the_clock_looks_wrong(scattered):
    place = Root.at(scattered)
    started = datetime.now(UTC)
    half_hours = [started + timedelta(minutes=30 * i) for i in range(60)]
    said = [retention.clock(place, now, hours=24).problem for now in half_hours]
    assert all("steady only since" in why for why in said[:48])
    assert said[48:] == [None] * 12
    assert "went from" in retention.clock(place, started + timedelta(days=30), hours=24).problem
    assert "steady only since" in retention.clock(place, started + timedelta(days=30, hours=1), hours=24).problem
    assert "before the newest snapshot" in retention.clock(place, started - timedelta(hours=1), hours=24).problem


def test_what_nothing_needs_any_more_goes_a_day_later_once_the_clock_is_known(scattered):
    Lake(scattered).compact(**ASK, run_id="compact-1")
    place, before, started = Root.at(scattered), Lake(scattered).snapshot(), datetime.now(UTC)
    files = place.names("lake/lineitem")
    assert len(files) == 1 + 3 + 1  # the log, three small files, one large
    for name in files:  # how old a file is says nothing: the large one is needed, the small ones were until now
        os.utime(f"{scattered}/lake/lineitem/{name}", (0, 0))
    removed = [
        Lake(scattered)
        .compact(**ASK, run_id=f"at {hours}", now=started + timedelta(hours=hours))
        .filter(table="lineitem")
        .select("removed", "note")
        .row(0)
        for hours in (12, 23.5, 24.5)
    ]
    assert removed[0][0] == 0 and "nothing removed: the clock is known to be steady only since" in removed[0][1]
    assert removed[1][0] == 0 and removed[2] == (3, "")
    assert len(place.names("lake/lineitem")) == 1 + 1
    assert Lake(scattered).snapshot().frame("lineitem").collect().height == before.frame("lineitem").collect().height


def test_what_a_killed_run_left_goes_a_day_later(scattered):
    place, started = Root.at(scattered), datetime.now(UTC)
    left = ["lake/orders/batch-00000009-x.zstd.parquet", "lake/orders/compacted-x.snappy.parquet"]
    hidden = ["lake/orders/.x.part", "lake/batches/.y.part", "landing/orders/.z.part", "results/q01/.z.part"]
    for rel in left + hidden:
        place.write(rel, b"x")
        os.utime(f"{scattered}/{rel}", (started.timestamp() - 3_600,) * 2)
    fresh = "lake/orders/.w.part"
    for hours, there in ((0, left + hidden), (20, left + hidden), (25, [])):
        place.write(fresh, b"x")
        os.utime(f"{scattered}/{fresh}", (started.timestamp() + hours * 3_600,) * 2)
        Lake(scattered).compact(**ASK, run_id=f"at {hours}", now=started + timedelta(hours=hours))
        assert [rel for rel in left + hidden if place.exists(rel)] == there
        assert place.exists(fresh)


def test_what_an_unfinished_batch_needs_stays_however_long_it_takes(scattered, stream, monkeypatch):
    """Published is what was there before the compaction and the batch: three days, until the batch ends."""
    started = datetime.now(UTC)
    source.land(Root.at(scattered), stream, {3: source.make_tick(stream, 3)})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(snapshots, "swap_pointer", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        ingest_all(scattered)
    before = Lake(scattered).snapshot()
    rows = before.frame("lineitem").collect().height
    for hours in (0, 24, 48, 72):
        done = Lake(scattered).compact(**ASK, run_id=f"at {hours}", now=started + timedelta(hours=hours))
        assert Lake(scattered).snapshot() == before
        assert before.frame("lineitem").collect().height == rows
    assert done["removed"].sum() == 0
    ingest_all(scattered)
    assert Lake(scattered).snapshot().frame("lineitem").collect().height > rows


def test_a_file_that_was_not_committed_yet_when_it_was_seen_has_a_day_from_its_end(scattered):
    """A sweep met a batch's file before its commit; the next one, a day later, is the one that supersedes it."""
    place, started, before = Root.at(scattered), datetime.now(UTC), Lake(scattered).snapshot()
    retention.clock(place, started, hours=24)
    rows, files = before.frame("orders").collect().height, [Path(url).name for url in before.files("orders")]
    place.write("lake/unneeded/orders.json", json.dumps({"since": {started.isoformat(): files}}).encode())
    for hours, removed in ((24, 0), (47, 0), (48, 3)):
        assert before.frame("orders").collect().height == rows
        done = Lake(scattered).compact(**ASK, run_id=f"at {hours}", now=started + timedelta(hours=hours))
        assert done.filter(table="orders").select("files_after", "removed").row(0) == (1, removed)


def test_a_memory_that_is_damaged_gives_every_file_another_day(scattered):
    started, place = datetime.now(UTC), Root.at(scattered)
    Lake(scattered).compact(**ASK, run_id="compact-1", now=started)
    for name in ("unneeded/lineitem", "unneeded/lineitem.copy", "clock", "clock.copy"):
        place.write(f"lake/{name}.json", b"{oops")
    removed = [
        Lake(scattered)
        .compact(**ASK, run_id=f"at {hours}", now=started + timedelta(hours=hours))
        .filter(table="lineitem")
        .select("removed", "failed")
        .row(0)
        for hours in (25, 48, 50)
    ]
    assert removed == [(0, None), (0, None), (3, None)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_table_with_several_kinds_of_string_is_compacted(scattered, stream, made, kind):
    """As an earlier release of ours wrote them, or plain deltalake and Polars."""
    before = Lake(scattered).snapshot()
    added = made[1]["lineitem"].with_columns(l_orderkey=pl.col("l_orderkey") + 10**9, _rescued=pl.lit(None, pl.String))
    schema = pa.schema(Lake(scattered).table("lineitem").schema().to_arrow())
    other = pa.schema([field.with_type(kind) if field.type == pa.string() else field for field in schema])
    foreign = added.select(schema.names).to_arrow().cast(other)
    for rows in (foreign.slice(0, 100), foreign.slice(100)):
        write_deltalake(before.table("lineitem").table_uri, rows, mode="append")
    source.land(Root.at(scattered), stream, {9: {"lineitem": made[2]["lineitem"].head(5)}})
    ingest_all(scattered)  # publishes them
    files = Lake(scattered).snapshot().files("lineitem")
    assert {str(pq.read_schema(file).field("l_comment").type) for file in files} >= {str(kind), "large_string"}
    sql = "select count(*), sum(l_orderkey), sum(l_extendedprice), sum(hash(l_comment)) from read_parquet({})"
    expected = duckdb.sql(sql.format(files)).fetchall()
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    assert done.filter(table="lineitem").select("files_before", "files_after", "failed").row(0) == (6, 1, None)
    (file,) = Lake(scattered).snapshot().files("lineitem")
    assert duckdb.sql(sql.format([file])).fetchall() == expected
    assert pq.read_schema(file).equals(schema)


def test_a_table_that_does_not_open_keeps_no_other_from_its_turn(scattered):
    """Readers of the lake do not need it to have been compacted."""
    place = Root.at(scattered)
    place.write(f"lake/quarantine/_delta_log/{0:020d}.json", b"{torn")
    surveyed = Lake(scattered).survey(small_mb=32).filter(table="quarantine")
    assert surveyed["files"][0] is None and surveyed["failed"][0]
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    assert done.filter(pl.col("failed").is_not_null())["table"].to_list() == ["quarantine"]
    assert len(Lake(scattered).snapshot().files("lineitem")) == 1


def test_vacuum_keeps_a_day(scattered):
    with pytest.raises(ValueError, match="24 hours"):
        Lake(scattered).compact(target_mb=64, min_small_files=2, vacuum_hours=1, run_id="x")


def test_of_two_overlapping_compactions_one_is_rejected(scattered):
    """The reason for the pin of deltalake: 1.6.4 to 1.6.6 commit both and double every row."""
    handles = [Lake(scattered).table("lineitem") for _ in range(2)]
    _, rows = delta.file_stats(handles[0])
    handles[0].optimize.compact()
    with pytest.raises(CommitFailedError):
        handles[1].optimize.compact()
    assert delta.file_stats(Lake(scattered).table("lineitem"))[1] == rows


def test_a_table_that_changed_its_rows_is_put_back(scattered, monkeypatch):
    real = delta.file_stats
    answers = iter([0])

    def miscount(handle):
        sizes, rows = real(handle)
        # the first look after lineitem's compaction says that a row is missing
        if len(sizes) == 1 and handle.version() > 3 and next(answers, None) == 0:
            return sizes, rows - 1
        return sizes, rows

    before = Lake(scattered).snapshot()
    monkeypatch.setattr(delta, "file_stats", miscount)
    done = Lake(scattered).compact(**ASK, run_id="compact-1")
    ((table, why),) = done.filter(pl.col("failed").is_not_null()).select("table", "failed").rows()
    assert why.endswith("put back")
    after = Lake(scattered).snapshot()
    assert after.files(table) == before.files(table)
    assert sorted(Lake(scattered).table(table).file_uris()) == sorted(before.files(table))


def test_a_log_that_is_old_is_cut_and_the_lake_stays_whole(root, stream, made, monkeypatch):
    for tick in range(45):
        source.land(Root.at(root), stream, {tick: {"orders": made[1]["orders"].slice(tick, 1)}})
        ingest_all(root)
    log, days_ago = Path(root, "lake/orders/_delta_log"), time.time() - 3 * 86_400
    for path in [*log.glob("*[0-9].json"), *log.glob("*.parquet")]:
        if path.suffix == ".json":
            path.write_text(re.sub(r'"timestamp":\d+', f'"timestamp":{days_ago * 1000:.0f}', path.read_text(), count=1))
        os.utime(path, (days_ago, days_ago))
    monkeypatch.setattr(retention, "clock", lambda *_: retention.Clock(datetime.now(UTC), None))
    Lake(root).compact(**ASK, run_id="compact-1")
    left = sorted(path.name for path in log.glob("*[0-9].json"))
    assert left[0] == f"{39:020d}.json"  # from the newest checkpoint on
    assert not [finding for finding in Lake(root).examine() if finding.problem]
    assert Lake(root).snapshot().frame("orders").collect().height == 45


def days_ago(days: float) -> float:
    return time.time() - days * 86_400


def archived(root: str, day: str, days: float) -> str:
    """A folder of the archive with a file that came so many days ago."""
    place, rel = Root.at(root), f"archive/{day}/orders"
    place.write(f"{rel}/orders-00000000.json", b"x")
    for folder in (f"archive/{day}", rel):
        os.utime(f"{root}/{folder}", (days_ago(days),) * 2)
    return f"archive/{day}"


def day(days: float) -> str:
    return f"{datetime.fromtimestamp(days_ago(days), UTC):%Y-%m-%d}"


def pruned(root: str, **asked) -> list[str]:
    return [path.removeprefix("archive/") for path in Lake(root).prune(**asked)]


@pytest.fixture
def steady(root) -> str:
    """A root whose clock was seen to be steady for a day."""
    retention.clock(Root.at(root), datetime.fromtimestamp(days_ago(1), UTC), 24)
    return root


def test_old_days_of_the_archive_go_one_a_run(steady):
    for age in (20, 9, 8, 7, 1, 0):
        archived(steady, day(age), age)
    assert [pruned(steady) for _ in range(4)] == [[day(20)], [day(9)], [day(8)], []]
    assert Root.at(steady).names("archive") == [day(7), day(1), day(0)]
    assert pruned(steady, archive_days=0) == []


def test_the_archive_is_pruned_by_when_files_came_and_not_by_what_a_day_is_called(steady):
    archived(steady, "1999-01-01", 2)
    archived(steady, "2100-01-01", 3)
    archived(steady, "notes", 300)
    assert pruned(steady) == []
    archived(steady, "2100-01-01", 9)
    assert [pruned(steady) for _ in range(2)] == [["2100-01-01"], []]
    assert Root.at(steady).names("archive") == ["1999-01-01", "notes"]


def test_nothing_of_the_archive_goes_while_the_clock_looks_wrong(root):
    old, started = archived(root, day(20), 20), datetime.now(UTC)
    assert pruned(root, now=started) == []
    assert pruned(root, now=started + timedelta(hours=23)) == []
    assert pruned(root, now=started + timedelta(days=3, hours=1)) == []  # a pause, or a jump
    assert pruned(root, now=datetime(2100, 1, 1, tzinfo=UTC)) == []
    assert pruned(root, now=started + timedelta(days=3, hours=2)) == []
    assert Root.at(root).exists(old)
    assert pruned(root, now=started + timedelta(days=4, hours=3)) == [day(20)]


def test_a_clock_that_is_nine_days_ahead_takes_no_week_of_the_archive(steady):
    days = [archived(steady, day(age), age) for age in (5, 4, 1)]
    started = datetime.now(UTC)
    assert pruned(steady, now=started) == []
    assert [pruned(steady, now=started + timedelta(days=9, hours=hour)) for hour in range(40)] == [[]] * 40
    assert Root.at(steady).names("archive") == sorted(path.removeprefix("archive/") for path in days)
    later = [pruned(steady, now=started + timedelta(days=9 + since)) for since in range(2, 5)]
    assert later == [[day(5)], [day(4)], []]  # as they are really seven days old


def test_in_an_object_store_the_stores_clock_counts(s3_root, monkeypatch):
    class Ahead(datetime):
        """A machine whose clock has always been nine days ahead."""

        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=9)

    place = Root.at(s3_root)
    place.write("archive/2020-01-01/orders/orders-00000000.json", b"x")
    monkeypatch.setattr(retention, "datetime", Ahead)
    seen = retention.clock(place, None, 24)
    assert abs(seen.now - datetime.now(UTC)) < timedelta(minutes=10)


def test_refused_files_old_lakes_and_leftovers_go_one_of_each_a_run(steady):
    place = Root.at(steady)
    for folder, name, age in (
        *(("refused", day(days), days) for days in (120, 92, 91, 80)),
        *((f"lake-before-{stamp(days)}", "orders", days) for days in (45, 40, 20)),
        ("runs-before-notes", "x", 99),
        ("restoring", "lake", 2),
        ("rebuilding", "lake", 0.5),
    ):
        place.write(f"{folder}/{name}/a", b"x")
        for path in (f"{steady}/{folder}/{name}", f"{steady}/{folder}"):
            os.utime(path, (days_ago(age),) * 2)
    gone = [[path.partition("-before")[0] for path in Lake(steady).prune()] for _ in range(4)]
    refused = [f"refused/{day(days)}" for days in (120, 92, 91)]
    assert gone == [[refused[0], "lake", "restoring"], [refused[1], "lake"], [refused[2]], []]
    assert Lake(steady).prune(refused_days=0) == []
    assert place.names("refused") == [day(80)] and {"runs-before-notes", "rebuilding"} <= {*place.names("")}


def stamp(days: float) -> str:
    return f"{datetime.fromtimestamp(days_ago(days), UTC):%Y%m%dT%H%M%S.%f}"


def test_a_sweep_of_a_table_takes_a_days_worth(steady):
    now, since = datetime.now(UTC), {}
    for days in range(2, 9):
        since[f"{days}.parquet"] = now - timedelta(days=days)
    clock = retention.Clock(now, None)
    assert retention._days_worth(since, timedelta(days=1), clock) == {"8.parquet"}
    paused = retention.Clock(now, None, ((now - timedelta(days=9), now - timedelta(days=1)),))
    assert retention._days_worth(since, timedelta(days=1), paused) == {"8.parquet"} and paused.age(now) == timedelta(0)
    assert retention._days_worth(since, timedelta(days=1, hours=1), paused) == set()


def test_old_days_of_an_archive_in_an_object_store_go(s3_root):
    place, started = Root.at(s3_root), datetime.now(UTC)
    place.write("landing/orders/orders-00000000.json", b"x")
    place.move("landing/orders/orders-00000000.json", "archive/2020-01-01/orders/orders-00000000.json")
    gone = [pruned(s3_root, now=started + timedelta(days=days)) for days in range(10)]
    assert gone == [[]] * 8 + [["2020-01-01"], []]
    assert place.names("archive") == []


def test_what_earlier_releases_kept_twice_is_believed_no_more(scattered):
    """Their documents have a sha256 beside their own fields."""
    place, before = Root.at(scattered), Lake(scattered).snapshot()
    for rel in (snapshots.POINTER, "lake/batches/00000003.json"):
        document = place.read_json(rel)
        place.write(rel, json.dumps({"sha256": "0" * 64} | document).encode())
        place.write(rel.replace(".json", ".copy.json"), b"{oops")
    assert Lake(scattered).snapshot() == before
    assert not [finding for finding in Lake(scattered).examine() if finding.problem]
    Lake(scattered).compact(**ASK, run_id="compact-1")
    assert Lake(scattered).snapshot().rows().select("table", "rows").equals(before.rows().select("table", "rows"))
