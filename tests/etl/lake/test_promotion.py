"""A field that was in `_rescued` gets its column, history included: once, by the rules that lines are typed by."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support import orchestrate
from test_evolution import Died, _die, dying_at, files, ingested, lake_of, land, read_by_others, rows_of

import pipeline
from etl.lake import Lake, ingest, parse, promotion, schemas, snapshot
from etl.lake.promotion import Promoted
from etl.lake.rebuild import RowsWouldGo
from etl.lake.table import DAY, INT, INT32, RESCUED, TEXT, TIME, Column, Table, decimal
from etl.runs import provenance

SIZE = Column(INT32, nullable=True, range=(0, None))


@pytest.fixture
def rescued(root) -> Lake:
    """Three files: in two of them fields that no column takes."""
    lake = lake_of(root, id=INT)
    land(lake, 0, {"id": 0, "size": 5, "colour": "red"}, {"id": 1, "size": "six"}, {"id": 2})
    ingested(lake)
    land(lake, 1, {"id": 3, "colour": "blue"})
    land(lake, 2, {"id": 4, "size": -1}, {"id": 5, "size": None}, {"id": 6, "size": 2**31}, {"id": 7, "size": 7})
    ingested(lake)
    land(lake, 3, {"id": 8})
    ingested(lake)
    return lake


def test_rebuild_asks_only_for_rows_that_would_newly_go(rescued):
    """Those whose value stayed, as their line does not fit any more; not for a line that was in quarantine before."""
    land(rescued, 4, {"id": "x"}, {"id": 9, "size": 9})
    ingested(rescued)
    lake = lake_of(rescued.root, id=INT, size=SIZE)
    assert lake.promote("item", "size", "promote-1").left == 3
    with pytest.raises(RowsWouldGo) as error:
        lake.rebuild()
    assert str(error.value).startswith("3 of 10 rows of item would go: 3 lines to quarantine, as size: ")
    lake.rebuild(accept_quarantine=True)
    assert lake.refused_lines().height == 4
    assert lake.rebuild()["equal"].all()  # nothing is asked for again


def kept(lake: Lake) -> dict[int, Any]:
    return {row["id"]: row[RESCUED] and json.loads(row[RESCUED]) for row in rows_of(lake, ["id", RESCUED])}


def test_values_of_before_are_typed_and_what_does_not_fit_stays(rescued):
    before, had = rescued.snapshot(), set(rescued.snapshot().files("item"))
    lake = lake_of(rescued.root, id=INT, size=SIZE)
    done = lake.promote("item", "size", "promote-1")
    assert (done.table, done.column, done.version, done.rows, done.left) == ("item", "size", 4, 3, 3)
    assert done.why == {
        "size: 'six' is not a whole number": 1,
        "size: -1 is not at least 0": 1,
        "size: 2147483648 is out of range": 1,
    }
    assert [row["size"] for row in rows_of(lake)] == [5, None, None, None, None, None, None, 7, None]
    assert kept(lake) == {
        **dict.fromkeys((2, 5, 7, 8)),
        **{0: {"colour": "red"}, 1: {"size": "six"}, 3: {"colour": "blue"}, 4: {"size": -1}, 6: {"size": 2**31}},
    }
    assert len(had & set(lake.snapshot().files("item"))) == 1  # the file without such rows was left alone
    assert lake.snapshot().batch == before.batch
    assert provenance.whence(lake.root, "item", 4) | {"at": None} == {
        "table": "item", "version": 4, "operation": "UPDATE", "at": None, "run_id": "promote-1", "stage": "preprocess",
    }  # fmt: skip
    read_by_others(lake)
    assert before.frame("item").collect().height == 9
    assert not [finding for finding in lake.examine() if finding.problem]

    now = files(lake)
    again = lake.promote("item", "size", "promote-2")
    assert (again.version, again.rows, again.left, again.why) == (4, 0, 3, done.why)
    assert files(lake) == now
    land(lake, 4, {"id": 9, "size": 9}, {"id": 10, "size": "ten"})
    ingested(lake)
    assert (rows_of(lake)[9], lake.refused_lines()["reason"].to_list()) == (
        {"id": 9, "size": 9},
        ["size: 'ten' is not a whole number"],
    )


def test_a_table_that_has_the_column_already_and_one_with_a_default(rescued):
    lake = lake_of(rescued.root, id=INT, size=SIZE, colour=Column(TEXT, default="none"))
    land(lake, 4, {"id": 9, "size": 9})
    ingested(lake)
    assert {row["colour"] for row in rows_of(lake)} == {"none"} and kept(lake)[0] == {"size": 5, "colour": "red"}
    assert lake.promote("item", "colour", "p").rows == 2
    assert lake.promote("item", "size", "p").rows == 3
    assert [row["colour"] for row in rows_of(lake)] == ["red", *["none"] * 2, "blue", *["none"] * 6]
    assert kept(lake)[0] is None
    assert lake.promote("item", "colour", "p") == Promoted("item", "colour", 7, 0, 0, {})


def test_fields_within_objects_lists_and_structs(root):
    lake = lake_of(root, id=INT)
    user = {"id": 7, "name": "Ada", "address": {"city": "London", "zip": "N1"}}
    land(lake, 0, {"id": 0, "user": user}, {"id": 1, "user": {"address": {"city": 5}}}, {"id": 2, "user": "nobody"})
    ingested(lake)
    city = Column(TEXT, nullable=True, path="user.address.city")
    lake = lake_of(root, id=INT, city=city)
    assert lake.promote("item", "user.address.city", "p") == Promoted(
        "item", "city", 2, 1, 1, {"city: 5 is not a text": 1}
    )
    assert [row["city"] for row in rows_of(lake)] == ["London", None, None]
    assert kept(lake)[0] == {"user": {"id": 7, "name": "Ada", "address": {"zip": "N1"}}}
    assert lake.promote("item", "city", "p").rows == 0

    root = lake.root.url + "-nested"
    lake = lake_of(root, id=INT)
    land(lake, 0, {"id": 0, "user": user, "tags": [1, 2]}, {"id": 1, "tags": "none"}, {"id": 2, "user": {}})
    ingested(lake)
    struct = Column(pl.Struct({"id": INT, "name": TEXT}), nullable=True)
    lake = lake_of(root, id=INT, user=struct, tags=Column(pl.List(INT), nullable=True))
    assert [lake.promote("item", field, "p").rows for field in ("user", "tags", "user", "tags")] == [2, 1, 0, 0]
    assert [row["user"] for row in rows_of(lake)] == [
        {"id": 7, "name": "Ada"}, None, {"id": None, "name": None},
    ]  # fmt: skip
    assert kept(lake) == {0: {"user": {"address": user["address"]}}, 1: {"tags": "none"}, 2: None}
    land(lake, 1, {"id": 3, "user": user})
    ingested(lake)
    assert lake.promote("item", "user", "p").rows == 0  # what else a new line had is no value of before
    assert rows_of(lake)[3]["user"] == {"id": 7, "name": "Ada"}
    read_by_others(lake)
    with pytest.raises(ValueError, match="item.user has a default"):
        lake_of(root, id=INT, user=Column(struct.type, default={"id": 1, "name": ""})).promote("item", "user", "p")


VALUES: list[tuple[Any, list[Any]]] = [
    (INT, [1, -(2**63), 2**63, 1.5, "1", True]),
    (pl.Int8, [127, 128, -128]),
    (pl.Float32, [1.5, 1, 1e39, "x"]),
    (pl.Boolean, [True, 0, "true"]),
    (TEXT, ["", "é\u0000", 1, [1], {"a": 1}]),
    (DAY, ["2026-02-28", "2026-02-29", "0006-01-02", "2026-02-28T00:00:00Z"]),
    (TIME, ["2026-02-28T10:00:00Z", "2026-02-28T10:00:00", "0001-01-01T00:00:00+01:00", "2026-02-28 10:00:00.5+01"]),
    (decimal(5, 2), [1, "1.25", 1.25, "1.255", 1234.5, 999.99]),
    (pl.List(INT), [[1, None], [1, "x"], {}]),
]


@pytest.mark.parametrize(("dtype", "values"), VALUES)
def test_a_value_is_what_it_would_have_been_in_a_line(dtype, values):
    """Beside `parse` of the same lines with the column declared from the beginning."""
    table = Table("t", {"id": INT, "it": Column(dtype, nullable=True)}, ("id",))
    lines = [json.dumps({"id": n, "it": value}).encode() for n, value in enumerate(values)]
    late, _ = parse.parse(b"\n".join(lines), Table("t", {"id": INT}, ("id",)))
    made, reasons = parse.promoted(late, "it", table)
    wanted, refused = parse.parse(b"\n".join(lines), table)
    assert {n + 1: why for n, why in reasons.items()} == dict(refused.select("line", "reason").rows())
    fits = made.filter(~pl.col("id").is_in(list(reasons))).select(wanted.columns)
    assert fits.to_dicts() == wanted.to_dicts()
    left = made.filter(pl.col("id").is_in(list(reasons)))
    assert left[RESCUED].to_list() == late.filter(pl.col("id").is_in(list(reasons)))[RESCUED].to_list()
    assert left["it"].null_count() == left.height


def test_a_rule_may_look_at_other_columns(rescued):
    check = (pl.col("size") > pl.col("id"), "is not more than id")
    lake = lake_of(rescued.root, id=INT, size=Column(INT, nullable=True, check=check))
    done = lake.promote("item", "size", "p")
    assert (done.rows, done.left) == (3, 3) and done.why["size: 7 is not more than id"] == 1
    assert [row["size"] for row in rows_of(lake)] == [5, None, None, None, None, None, 2**31, None, None]


def test_what_is_not_possible_is_said_and_nothing_is_written(rescued, tmp_path):
    before = files(rescued)
    with pytest.raises(promotion.NotDeclared, match="item has no column for size"):
        rescued.promote("item", "size", "p")
    with pytest.raises(schemas.SchemasDiffer, match="size is declared as integer and missing in the table: its 9 rows"):
        lake_of(rescued.root, id=INT, size=INT32).promote("item", "size", "p")
    with pytest.raises(snapshot.NothingPublished):
        lake_of(tmp_path / "new", id=INT, size=SIZE).promote("item", "size", "p")
    assert files(rescued) == before
    land(rescued, 4, {"id": 9, "size": 9})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ingest, "crash_point", lambda name: _die(name, "after the commit: item"))
        with pytest.raises(Died):
            ingested(rescued)
    lake, before = lake_of(rescued.root, id=INT, size=SIZE), files(rescued)
    with pytest.raises(promotion.NotFinished, match="batch 4 is not finished: run preprocess first"):
        lake.promote("item", "size", "p")
    assert files(lake) == before
    ingested(lake)
    assert lake.promote("item", "size", "p").rows == 4
    assert rows_of(lake)[9] == {"id": 9, "size": 9}


def test_a_promotion_that_dies_changes_nothing_twice(rescued, tmp_path):
    lake = lake_of(rescued.root, id=INT, size=SIZE)
    names = set()
    for number in count(1):
        lake = lake_of(tmp_path / str(number), id=INT, size=SIZE)
        subprocess.run(["cp", "-r", rescued.root.url, lake.root.url], check=True)
        with pytest.MonkeyPatch.context() as patched:
            dying_at(patched, number)
            try:
                lake.promote("item", "size", "promote-1")
                break
            except Died as point:
                names.add(str(point))
        assert [row["id"] for row in rows_of(lake)] == [*range(9)]
        if number % 2:  # a batch comes before it is asked for again
            land(lake, 4, {"id": 9, "size": 9})
            ingested(lake)
        lake.promote("item", "size", "promote-2")
        after = [9] if number % 2 else []
        assert [row["size"] for row in rows_of(lake)] == [5, *[None] * 6, 7, None, *after]
        assert lake.snapshot().row_count("item") == 9 + len(after)
        assert lake.promote("item", "size", "promote-3").rows == 0
    assert {"written again, not committed: item", "its columns are changed: item"} <= names
    assert "before the promotion is published" in Counter(names) or number > 3


def test_a_promotion_that_is_killed_changes_nothing_twice(rescued):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_evolution import lake_of\nfrom etl.lake.table import *\n"
        f"lake_of({rescued.root.url!r}, id=INT, size=Column(INT32, nullable=True, range=(0, None)))"
        f".promote('item', 'size', 'p')"
    )
    variables = os.environ | {
        "ETL_CRASH_AT": "before the promotion is published",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    killed = subprocess.run([sys.executable, "-c", code], env=variables, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    lake = lake_of(rescued.root, id=INT, size=SIZE)
    assert lake.snapshot().versions["item"] == 3
    assert lake.promote("item", "size", "p").rows == 0
    assert lake.snapshot().versions["item"] == 4 and rows_of(lake)[7]["size"] == 7


def test_a_column_is_proposed(rescued):
    assert rescued.propose("item", "size") == promotion.Proposal('"size": Column(INT, nullable=True),', 6, 1)
    assert rescued.propose("item", "size", INT32).left == 2
    assert rescued.propose("item", "colour").line == '"colour": Column(TEXT, nullable=True),'
    with pytest.raises(LookupError, match="no row of item has a field nothing"):
        rescued.propose("item", "nothing")
    row = {
        "day": "2026-01-01",
        "at": "2026-01-01T10:00:00Z",
        "ok": True,
        "share": 0.5,
        "in": {"a": 1},
        "a.b": 1,
        "c d": 1,
    }
    land(rescued, 4, {"id": 9, **row})
    ingested(rescued)
    assert [rescued.propose("item", name).line for name in ("day", "at", "ok", "share", "in.a", "a.b", "c d")] == [
        '"day": Column(DAY, nullable=True),',
        '"at": Column(TIME, nullable=True),',
        '"ok": Column(BOOL, nullable=True),',
        '"share": Column(FLOAT, nullable=True),',
        "\"in_a\": Column(INT, nullable=True, path='in.a'),",
        "\"a_b\": Column(INT, nullable=True, path='a\\\\.b'),",
        "\"c_d\": Column(INT, nullable=True, path='c d'),",
    ]
    with pytest.raises(LookupError, match="1 rows of item have in, as lists or structs"):
        rescued.propose("item", "in")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("INT", INT), ("int32", INT32), ("long", INT), ("pl.Float64", pl.Float64), ("timestamp", TIME), ("date", DAY),
     ("decimal(9,2)", decimal(9, 2)), ("text", TEXT), ("Boolean", pl.Boolean)],
)  # fmt: skip
def test_a_type_is_named_as_people_name_it(name, dtype):
    assert promotion.type_named(name) == dtype


@pytest.mark.parametrize("name", ["number", "decimal(50,2)", ""])
def test_what_is_no_type_is_refused(name):
    with pytest.raises(ValueError):
        promotion.type_named(name)


def test_on_the_command_line(project, filled):
    """What `_rescued` has of a table of the project: the line to add, then the column."""
    lake = pipeline.Lake(filled)
    rows = lake.snapshot().frame("region").collect().to_dicts()
    told = "".join(json.dumps(row | {"r_regionkey": 90 + n, "r_size": n}) + "\n" for n, row in enumerate(rows[:2]))
    lake.root.write("landing/region/region-00000007.json", told.encode())
    ingested(lake)
    asked = orchestrate(project, "promote", "region", "r_size", "--root", filled)
    assert asked.returncode == 1 and '"r_size": Column(INT, nullable=True),' in asked.stderr
    assert "which 2 rows have: all of them fit" in asked.stderr
    tables = project / "pipeline/tables.py"
    tables.write_text(
        tables.read_text().replace('"r_comment": TEXT', '"r_comment": TEXT, "r_size": Column(INT, nullable=True)')
    )
    for arguments in (("region", "r_size", "--as", "TEXT"), ("region", "r_size", "--as", "number"), ("nothing", "x")):
        assert orchestrate(project, "promote", *arguments, "--root", filled).returncode == 2
    done = orchestrate(project, "promote", "region", "r_size", "--as", "INT", "--root", filled, "--json")
    assert json.loads(done.stdout) == {
        "table": "region", "column": "r_size", "version": 3, "rows": 2, "left": 0, "why": {},
    }, done.stderr  # fmt: skip
    again = orchestrate(project, "promote", "region", "r_size", "--root", filled)
    assert again.stdout == "region@3: 0 rows have their r_size in r_size now\n" and again.returncode == 0
