"""From JSON file to Delta table: each row exactly once, and those that do not fit in quarantine."""

import json
import multiprocessing

import duckdb
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support import AT, ingest_all

from pipeline import ingest, lake, source
from pipeline.tables import TABLES
from storage import LocalRoot, Root


def rows(root: str, table: str) -> pl.DataFrame:
    return lake.snapshot(root).frame(table).collect().sort(TABLES[table].keys)


def expected(made: dict, table: str) -> pl.DataFrame:
    return pl.concat([frames[table] for frames in made.values() if table in frames]).sort(TABLES[table].keys)


def assert_exactly(root: str, made: dict) -> None:
    for table in TABLES:
        assert_frame_equal(rows(root, table), expected(made, table))


def test_every_row_is_in_the_lake_once(filled, made):
    assert_exactly(filled, made)
    assert all(Root.at(filled).list(f"landing/{table}") == [] for table in TABLES)


def test_the_lake_equals_what_another_engine_reads_from_the_archive(filled):
    for table, columns in (("orders", TABLES["orders"].columns), ("lineitem", TABLES["lineitem"].columns)):
        money = [name for name, dtype in columns.items() if isinstance(dtype, pl.Decimal)]
        sums = ", ".join(f"sum({name}::decimal(15,2))" for name in money)
        files = f"{filled}/archive/*/{table}/*.json"
        other = duckdb.sql(f"select count(*), {sums} from read_json('{files}', format='newline_delimited')").fetchone()
        frame = rows(filled, table)
        assert other == (frame.height, *(frame[name].sum() for name in money))


def test_a_second_run_finds_nothing_and_changes_no_version(filled):
    before = lake.snapshot(filled)
    assert ingest.next_batch(filled, max_files=500, scheduled_for=AT) is None
    assert lake.snapshot(filled) == before
    assert all(lake.open_table(Root.at(filled), t).version() == v for t, v in before.versions.items())


def test_a_batch_committed_again_changes_nothing(landed, made):
    parsed = ingest.read(ingest.next_batch(landed, max_files=500, scheduled_for=AT))
    first = ingest.commit(parsed, run_id="one")
    assert ingest.commit(parsed, run_id="two") == first
    assert_exactly(landed, made)


def test_files_are_taken_oldest_first_and_no_more_than_asked(landed):
    batch = ingest.next_batch(landed, max_files=9, scheduled_for=AT)
    assert [f.tick for f in batch.files] == [0] * 8 + [1]
    ingest.commit(ingest.read(batch), run_id="one")
    assert len(ingest.next_batch(landed, max_files=500, scheduled_for=AT).files) == 3


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch, step: int) -> None:
    """Crash before the `step`-th write, creation, move or commit."""
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    for owner, names in ((LocalRoot, ("write", "create", "move")), (lake, ("append", "create_tables", "publish"))):
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("table", ["orders", "lineitem"])
def test_a_crash_at_any_step_loses_and_doubles_nothing(root, stream, made, monkeypatch, table):
    small = {tick: {t: f.head(5) for t, f in frames.items()} for tick, frames in made.items()}
    source.land(root, stream, {0: small[0]})
    ingest_all(root)
    source.land(root, stream, {1: small[1], 2: small[2]})
    crashes = 0
    for step in range(1, 40):
        with monkeypatch.context() as patched:
            crash_at(patched, step)
            try:
                while batch := ingest.next_batch(root, max_files=500, scheduled_for=AT):
                    ingest.commit(ingest.read(batch), run_id=f"run-{step}")
                break
            except Crash:
                crashes += 1
        snapshot = lake.snapshot(root)
        heights = {t: snapshot.frame(t).collect().height for t in ("orders", "lineitem")}
        assert heights in ({"orders": 5, "lineitem": 5}, {"orders": 15, "lineitem": 15}), "a snapshot mixes batches"
    # each crash leaves one step less to do, so the next one comes a step later in the protocol
    assert crashes >= 4
    assert_frame_equal(rows(root, table), expected(small, table))


def test_every_single_step_can_be_the_last(root, stream, made, monkeypatch):
    small = {tick: {t: f.head(3) for t, f in frames.items()} for tick, frames in made.items()}
    for step in range(1, 40):
        place = f"{root}-{step}"
        source.land(place, stream, {1: small[1]})
        with monkeypatch.context() as patched:
            crash_at(patched, step)
            try:
                ingest_all(place, "dies")
            except Crash:
                pass
            else:
                break
        while batch := ingest.next_batch(place, max_files=500, scheduled_for=AT):
            ingest.commit(ingest.read(batch), run_id="rerun")
        for table in ("orders", "lineitem"):
            assert_frame_equal(rows(place, table), expected({1: small[1]}, table))
    assert step >= 9  # manifest, tables, two appends, publish, two moves, done: all of them were reached


def _commit(root: str, run_id: str, start) -> None:
    parsed = ingest.read(ingest.next_batch(root, max_files=500, scheduled_for=AT))
    start.wait()
    ingest.commit(parsed, run_id=run_id)


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
    source.land(filled, stream, {2: made[2]})
    assert ingest.next_batch(filled, max_files=500, scheduled_for=AT) is None
    source.land(filled, stream, source.make_ticks(stream, range(3, 4)))
    batch = ingest.next_batch(filled, max_files=500, scheduled_for=AT)
    assert [f.tick for f in batch.repeated] == [2, 2]
    ingest.commit(ingest.read(batch), run_id="again")
    assert lake.snapshot(filled).frame("orders").collect().height == 4 * made[2]["orders"].height
    assert Root.at(filled).list("landing/orders") == []
    assert len(Root.at(filled).list("archive/2026-03-01/repeated")) == 2


def test_a_file_that_changed_after_it_was_written_down_is_refused(landed, monkeypatch):
    with monkeypatch.context() as patched:
        crash_at(patched, 2)  # the manifest is there, nothing is committed
        with pytest.raises(Crash):
            ingest_all(landed)
    Root.at(landed).write("landing/region/region-00000000.json", b"{}\n")
    with pytest.raises(ValueError, match="region-00000000.json changed since batch 1"):
        ingest.read(ingest.next_batch(landed, max_files=500, scheduled_for=AT))


GOOD = json.loads(
    '{"o_orderkey":1,"o_custkey":370,"o_orderstatus":"O","o_totalprice":"186600.18","o_orderdate":"1996-01-02",'
    '"o_orderpriority":"5-LOW","o_clerk":"Clerk#000000951","o_shippriority":0,"o_comment":"nstructions sleep",'
    '"o_order_time":"2026-03-01T11:59:37.919+00:00"}'
)


def line(**changed) -> str:
    return json.dumps(GOOD | changed)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{oops", "not a JSON object"),
        ("", "not a JSON object"),
        ("[1, 2]", "a JSON list, not an object"),
        (line() + " trailing", "not a JSON object"),
        (line(o_orderkey=None), "o_orderkey: missing"),
        (line(o_orderkey="abc"), "o_orderkey: missing or of the wrong type"),
        (line(o_orderkey=2**63), "o_orderkey: missing or of the wrong type"),
        (line(o_orderkey=0), "o_orderkey: 0 is not"),
        (line(o_orderkey=1.5), "o_orderkey: missing or of the wrong type"),
        (line(o_totalprice="1.234"), "o_totalprice: missing or of the wrong type"),
        (line(o_totalprice="-1.00"), "o_totalprice: -1.00 is not"),
        (line(o_totalprice="99999999999999.00"), "o_totalprice: missing or of the wrong type"),
        (line(o_totalprice=float("nan")), "o_totalprice: missing or of the wrong type"),
        (line(o_orderdate="1996-02-30"), "o_orderdate: missing or of the wrong type"),
        (line(o_orderstatus="X"), "o_orderstatus: X is not"),
        (line(o_order_time="2026-03-01 11:59"), "o_order_time: missing or of the wrong type"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "o_clerk"}), "o_clerk: missing"),
        ('{"o_orderkey": ' + "[" * 100_000, "not a JSON object"),
    ],
)
def test_a_line_that_does_not_fit_is_set_apart_with_its_reason(bad, reason):
    data = "\n".join([line(), bad, line(o_orderkey=2), ""]).encode()
    kept, refused = ingest.parse(data, TABLES["orders"])
    assert kept["o_orderkey"].to_list() == [1, 2]
    assert refused["line"].to_list() == [2]
    assert reason in refused["reason"][0]
    assert refused["raw"][0] == bad[: ingest.RAW_CHARS]


def test_types_are_exact():
    kept, refused = ingest.parse(
        (line(o_totalprice=12.5) + "\n" + line(o_totalprice="0.01")).encode(), TABLES["orders"]
    )
    assert refused.is_empty()
    assert [str(value) for value in kept["o_totalprice"]] == ["12.50", "0.01"]
    assert kept.schema == pl.Schema(TABLES["orders"].columns)
    assert str(kept["o_order_time"][0]) == "2026-03-01 11:59:37.919000+00:00"


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf{}\n", b"\x00\x00\n", "ü".encode("utf-16"), b"\xff\xfe\n"])
def test_odd_files_are_read_line_for_line(data):
    kept, refused = ingest.parse(data, TABLES["orders"])
    lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    assert (kept.height, refused.height) == (0, lines)


def test_bad_rows_reach_quarantine_with_file_and_line(landed, made):
    place, name = Root.at(landed), "landing/orders/orders-00000001.json"
    lines = place.read(name).splitlines()
    lines[3] = b"{oops"
    place.write(name, b"\n".join(lines) + b"\n")
    batch = ingest.next_batch(landed, max_files=500, scheduled_for=AT)
    parsed = ingest.read(batch)
    assert parsed.bad_share == pytest.approx(1 / parsed.rows)
    ingest.commit(parsed, run_id="one")
    quarantine = lake.snapshot(landed).frame("quarantine").collect()
    assert quarantine.select("batch", "table", "file", "line", "raw").rows() == [
        (1, "orders", "orders-00000001.json", 4, "{oops")
    ]
    total = sum(frames["orders"].height for frames in made.values())
    assert rows(landed, "orders").height == total - 1


def test_files_that_are_no_tables_are_left_alone(landed):
    place = Root.at(landed)
    place.write("landing/orders/readme.txt", b"hello")
    place.write("landing/orders/lineitem-00000001.json", b"{}\n")
    place.write("landing/secrets/secrets-00000001.json", b"{}\n")
    ingest_all(landed)
    assert place.list("landing/orders") == ["lineitem-00000001.json", "readme.txt"]
    assert place.list("landing/secrets") == ["secrets-00000001.json"]


def test_ranges_of_ticks_stay_small():
    ranges = []
    for tick in (0, 1, 2, 5, 4, 3, 9):
        ranges = ingest._with(ranges, tick)
    assert ranges == [[0, 5], [9, 9]]
    assert ingest._contains(ranges, 4)
    assert not ingest._contains(ranges, 7)
