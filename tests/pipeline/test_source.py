"""The stream is canonical TPC-H, cut into slices, and a tick is a pure function."""

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal, assert_series_equal

from etl.storage import Root
from pipeline import source
from pipeline.tables import STREAMED, TABLES


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """tpchgen's own eight tables at scale 0.001, and where they are."""
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    subprocess.run([generator, "parquet", "--scale-factor=0.001", f"--output-dir={folder}"], check=True)
    return {name: pl.read_parquet(folder / f"{name}.parquet") for name in TABLES}


def test_all_slices_together_are_tpch_row_by_row(canonical):
    stream = source.Stream(0.001, 4, "2026-03-01T00:00:00+00:00")
    made = source.make_ticks(stream, range(4))
    for name, expected in canonical.items():
        parts = [frames[name] for frames in made.values() if name in frames]
        assert len(parts) == (4 if name in STREAMED else 1)
        assert_frame_equal(pl.concat(parts).select(expected.columns), expected)


# scale, slices, slice: how many chunks the generator makes of a slice's orders
EVEN, UNEVEN, THREE = (0.1, 1, 1), (10, 288, 287), (1, 7, 4)


@pytest.mark.parametrize("scale, slices, part", [EVEN, UNEVEN, THREE])
def test_a_slice_has_the_line_items_of_its_orders_and_no_other(scale, slices, part):
    stream = source.Stream(scale, slices, "2026-03-01T00:00:00+00:00")
    frames = source._tpchgen_slices(stream, {part})[part]
    assert_series_equal(
        frames["lineitem"]["l_orderkey"].unique().sort(), frames["orders"]["o_orderkey"].sort(), check_names=False
    )
    as_cut = source._tpchgen(scale, ("orders",), slices, {part})[part]["orders"]
    assert_frame_equal(frames["orders"], as_cut)  # where a stream begun before has its orders


def test_neighbouring_slices_leave_no_order_out():
    stream = source.Stream(10, 288, "2026-03-01T00:00:00+00:00")
    made = source.make_ticks(stream, range(286, 289))  # the last has what the division leaves; then a new epoch
    keys = [made[tick]["orders"]["o_orderkey"] for tick in (286, 287, 288)]
    assert source.orphans(made) == source.repeated_keys(made) == 0
    assert keys[0].len() == stream.orders_a_slice
    assert keys[1].len() == stream.orders_a_slice + 15_000_000 % 288
    assert keys[1].max() == stream.highest_key
    assert keys[2].min() == stream.highest_key + 1
    between = _count(keys[1].min()) - _count(keys[0].max())
    assert between == 1


def _count(key: int) -> int:
    """How many keys of an epoch are used up to that one."""
    return key // 32 * 8 + key % 32


def test_a_large_table_comes_in_pieces(root, monkeypatch, canonical):
    stream = source.Stream(0.001, 4, "2026-03-01T00:00:00+00:00", file_rows=130)
    monkeypatch.setattr(source, "PART_ROWS", 500)
    files = source.give_out(Root.at(root), stream, range(4)).files
    assert files["rows"].max() == 130
    assert files["file"].n_unique() == files.height
    for name in set(canonical) - set(STREAMED):
        mine = files.filter(table=name)
        assert mine["file"].to_list() == [source.file_name(name, 0, piece) for piece in range(mine.height)]
        data = b"".join(Root.at(root).read(file) for file in mine["file"])
        assert data == source.to_json_lines(canonical[name].select(*TABLES[name].columns))
    for tick, frames in source.make_ticks(stream, range(1, 3)).items():
        for name in STREAMED:
            mine = files.filter(tick=tick, table=name)
            data = b"".join(Root.at(root).read(file) for file in mine["file"])
            assert data == source.to_json_lines(frames[name])
    assert source.rows_per_tick(files)["lineitem"].sum() == canonical["lineitem"].height


def test_the_pieces_of_a_tick_are_the_same_however_it_was_made(tmp_path, monkeypatch):
    stream = source.Stream(0.001, 4, "2026-03-01T00:00:00+00:00", file_rows=100)
    source.land(Root.at(tmp_path / "a"), stream, source.make_ticks(stream, range(2)))
    monkeypatch.setattr(source, "PART_ROWS", 500)
    source.give_out(Root.at(tmp_path / "b"), stream, range(2))
    names = sorted(Root.at(tmp_path / "a").files("landing"))
    assert names == sorted(Root.at(tmp_path / "b").files("landing"))
    assert any("partsupp-00000000-0007.json" in name for name in names)
    for name in names:
        assert Root.at(tmp_path / "a").read(name) == Root.at(tmp_path / "b").read(name)


def test_a_file_of_line_items_is_far_below_what_a_batch_may_have(made):
    bytes_a_row = len(source.to_json_lines(made[1]["lineitem"])) / made[1]["lineitem"].height
    assert 48e6 < bytes_a_row * source.FILE_ROWS < 64e6


def test_a_stream_begun_before_files_had_a_limit_has_none(root):
    before = {"scale": 0.001, "slices": 4, "origin": "2026-03-01T00:00:00+00:00", "next_tick": 1}
    Root.at(root).write(source.DESCRIPTION, json.dumps(before).encode())
    ask = {"scale": 0.001, "slices": 4, "history": 0, "max_ticks": 1, "scheduled_for": None}
    stream, ticks = source.due_ticks(Root.at(root), **ask)
    assert (stream.file_rows, ticks) == (None, range(1, 2))
    source.give_out(Root.at(root), stream, ticks)
    assert source.due_ticks(Root.at(root), **ask)[0].file_rows is None


def test_a_tick_that_does_not_fit_together_is_not_written(root, stream, made, monkeypatch):
    broken = {1: made[1], 2: {"orders": made[2]["orders"], "lineitem": made[1]["lineitem"]}}
    monkeypatch.setattr(source, "GROUP_ORDERS", 1)
    monkeypatch.setattr(source, "_streamed", lambda stream, ticks: {tick: broken[tick] for tick in ticks})
    done = source.give_out(Root.at(root), stream, range(1, 3))
    assert (done.orphans, done.repeated_keys) == (made[1]["lineitem"].height, 0)
    assert done.files["tick"].unique().to_list() == [1]
    assert not Root.at(root).exists(source.file_name("orders", 2))
    assert source.Stream.of(Root.at(root)).next_tick == 2


def test_many_ticks_at_once_are_the_ticks_one_by_one(stream, made):
    many = source.make_ticks(stream, range(1, 8))  # enough to have the generator make all slices in one go
    for tick in (1, 2):
        for table in STREAMED:
            assert_frame_equal(many[tick][table], made[tick][table])
    one = source.make_tick(stream, 7)
    for table in STREAMED:
        assert_frame_equal(many[7][table], one[table])


def test_a_tick_made_twice_is_the_same_bytes(stream, made, tmp_path, monkeypatch, generator):
    monkeypatch.setattr(source, "_tpchgen", generator)
    again = source.make_ticks(stream, range(1, 3))
    source.land(Root.at(str(tmp_path / "a")), stream, made)
    source.land(Root.at(str(tmp_path / "b")), stream, again)
    for tick in (1, 2):
        for table in STREAMED:
            name = source.file_name(table, tick)
            assert Root.at(tmp_path / "a").read(name) == Root.at(tmp_path / "b").read(name)


def test_past_the_last_slice_order_keys_never_repeat():
    stream = source.Stream(0.001, 1, "2026-03-01T00:00:00+00:00")
    first, second = (source.make_tick(stream, tick) for tick in (0, 1))
    assert set(second) == set(STREAMED)
    assert first["orders"]["o_orderkey"].max() == stream.highest_key
    assert second["orders"]["o_orderkey"].min() == stream.highest_key + 1
    assert second["lineitem"]["l_orderkey"].min() == stream.highest_key + 1
    same = pl.exclude("o_orderkey", "o_order_time")
    assert_frame_equal(first["orders"].select(same), second["orders"].select(same))


def test_orders_are_placed_in_the_30_seconds_before_their_tick(stream, made):
    for tick, frames in made.items():
        times = frames["orders"]["o_order_time"]
        assert times.min() >= stream.time_of(tick) - timedelta(seconds=30)
        assert times.max() < stream.time_of(tick)
        assert times.n_unique() > len(times) * 0.95
    orders, lineitem = made[1]["orders"], made[1]["lineitem"]
    joined = lineitem.join(orders, left_on="l_orderkey", right_on="o_orderkey")
    days = (joined["l_shipdate"] - joined["o_orderdate"]).dt.total_days()
    minutes = (joined["l_ship_time"] - joined["o_order_time"]).dt.total_minutes()
    assert (minutes == days * 36).all()
    assert minutes.max() <= 121 * 36  # three days and a bit, by TPC-H 4.2.3


def test_a_new_stream_brings_history_and_then_catches_up(root):
    ask = {"scale": 0.001, "slices": 10, "history": 2, "max_ticks": 3}
    at = datetime.fromisoformat("2026-03-01T12:00:10+00:00")
    stream, ticks = source.due_ticks(Root.at(root), **ask, scheduled_for=at.isoformat())
    assert (ticks, stream.time_of(2)) == (range(3), datetime.fromisoformat("2026-03-01T12:00:00+00:00"))
    source.land(Root.at(root), stream, source.make_ticks(stream, ticks))

    def due(seconds: int) -> range:
        return source.due_ticks(Root.at(root), **ask, scheduled_for=(at + timedelta(seconds=seconds)).isoformat())[1]

    assert list(due(0)) == []
    assert list(due(20)) == [3]
    assert list(due(3600)) == [3, 4, 5]
    assert list(source.due_ticks(Root.at(root), **ask, scheduled_for=None)[1]) == [3]
    assert list(source.due_ticks(Root.at(root), **ask, scheduled_for=None, tick=1)[1]) == [1]


def test_making_an_old_tick_again_does_not_move_the_stream(root, stream, made):
    source.land(Root.at(root), stream, made)
    before = Root.at(root).read(source.DESCRIPTION)
    begun, ticks = source.due_ticks(
        Root.at(root), scale=stream.scale, slices=stream.slices, history=0, max_ticks=1, scheduled_for=None, tick=1
    )
    source.land(Root.at(root), begun, {1: made[1]})
    assert list(ticks) == [1]
    assert Root.at(root).read(source.DESCRIPTION) == before


def test_a_stream_keeps_its_scale(root, stream, made):
    source.land(Root.at(root), stream, {0: made[0]})
    with pytest.raises(ValueError, match="keeps its scale"):
        source.due_ticks(Root.at(root), scale=1.0, slices=10, history=0, max_ticks=1, scheduled_for=None)


def test_two_beginnings_of_one_stream_are_told(root, stream, made):
    source.land(Root.at(root), stream, {0: made[0]})
    other = source.Stream(stream.scale, stream.slices, "2026-03-01T10:00:00+00:00")
    with pytest.raises(RuntimeError, match="another run began"):
        source.land(Root.at(root), other, {0: made[0]})


def test_the_generators_own_words_are_passed_on():
    with pytest.raises(RuntimeError, match="tpchgen-cli failed with status"):
        source.make_tick(source.Stream(-1, 1, "2026-03-01T00:00:00+00:00"), 0)


def test_orphans_and_repeated_keys_are_counted(made):
    assert (source.orphans(made), source.repeated_keys(made)) == (0, 0)
    broken = {0: made[0], 1: {"orders": made[0]["orders"], "lineitem": made[1]["lineitem"]}}
    assert source.orphans(broken) == made[1]["lineitem"].height
    assert source.repeated_keys(broken) == made[0]["orders"].height
