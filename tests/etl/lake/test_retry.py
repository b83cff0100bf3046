"""What did not fit is tried again: each line as it came, whatever kind of file it came in."""

import io
import json
import random
from dataclasses import replace
from typing import ClassVar

import polars as pl
import pytest
from support import AT

from etl import lake as lakes
from etl.lake import parse
from etl.lake.table import INT, TEXT, Column, Table

NOTES = Table("notes", {"id": INT, "kind": Column(TEXT, choices=("a",)), "note": Column(TEXT, nullable=True)}, ("id",))
LATER = replace(NOTES, columns=NOTES.columns | {"kind": TEXT})
ROWS = [(1, "a", "x"), (2, "b", 'b,1;q"\n\tz'), (3, "a", None), (4, "c", "{"), (5, "", "id,kind,note")]


def csv_of(mark: str) -> bytes:
    cells = [[note, number, kind] for number, kind, note in ROWS]
    quoted = [["" if c is None else '"{}"'.format(str(c).replace('"', '""')) for c in row] for row in cells]
    return "".join(mark.join(row) + "\n" for row in [["note", "id", "kind"], *quoted]).encode()


def as_objects() -> list[dict]:
    return [dict(zip(("id", "kind", "note"), row, strict=True)) for row in ROWS]


def parquet() -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(as_objects()).with_columns(pl.col("id").cast(pl.Float64)).write_parquet(buffer)
    return buffer.getvalue()


CONTENTS = {
    "CSV": csv_of(","),
    "CSV with semicolons": csv_of(";"),
    "CSV with tabs and a mark": b"\xef\xbb\xbf" + csv_of("\t"),
    "array": json.dumps(as_objects(), indent=1).encode(),
    "array on a line": json.dumps(as_objects()).encode(),
    "lines": "".join(json.dumps(row) + "\n" for row in as_objects()).encode(),
    "Parquet": parquet(),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_line_of_any_kind_of_file_is_tried_again_as_it_came(root, what):
    class Before(lakes.Lake):
        tables: ClassVar = {"notes": NOTES}

    class After(lakes.Lake):
        tables: ClassVar = {"notes": LATER}

    before, after = Before(root), After(root)
    before.root.write("landing/notes/notes-00000001.csv", CONTENTS[what])
    limits = {"max_files": 9, "max_bytes": 10**6, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": AT}
    assert before.drain(**limits, run_id="one")["refused"].to_list() == [3]
    with pytest.raises(LookupError, match="nothing of notes-00000001.csv fits"):
        before.retry("notes-00000001.csv")
    (landed,) = after.retry("notes-00000001.csv")
    done = after.drain(**limits, run_id="two")
    assert done.select("rows", "refused", "files_refused").rows() == [(3, 0, 0)], after.root.exists(landed)
    assert after.snapshot().frame("notes").collect().sort("id").rows() == ROWS


def test_a_line_of_which_a_part_would_fit_is_not_taken_for_it(root):
    """A line that is an array, an element with a newline in a text, a record with quotes that are not closed."""

    class Some(lakes.Lake):
        tables: ClassVar = {"notes": LATER}

    lake = Some(root)
    lines = b'{"id":1,"kind":"a"}\n[{"id":7,"kind":"a"}]\nid,kind\n'
    lake.root.write("landing/notes/notes-00000001.json", lines)
    lake.root.write("landing/notes/notes-00000002.json", b'[{"id":2,"kind":"a"},{"id":3,"kind":"a\nb"}]')
    lake.root.write("landing/notes/notes-00000003.csv", b'id,kind\n4,a\n5,"b\n6,c\n')
    ingest = {"max_files": 9, "max_bytes": 10**6, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": AT}
    assert lake.drain(**ingest, run_id="one").select("rows", "refused").rows() == [(4, 4)]
    for file in ("notes-00000001.json", "notes-00000002.json", "notes-00000003.csv"):
        with pytest.raises(LookupError, match=f"nothing of {file} fits"):
            lake.retry(file)


def choosing(root, *choices: str) -> lakes.Lake:
    """A lake whose table takes these values."""

    class Lake(lakes.Lake):
        tables: ClassVar = {"t": Table("t", {"id": INT, "k": Column(TEXT, choices=choices)}, ("id",))}

    return Lake(root)


def test_lines_that_fit_later_are_taken_each_once_and_made_again_once(tmp_path):
    lake = choosing(tmp_path, "a")
    lake.root.write("landing/t/1.json", b"".join(b'{"id": %d, "k": "%c"}\n' % (n, 96 + n) for n in (1, 2, 3)))
    asked = {"max_files": 9, "max_bytes": 10**6, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": None}
    lake.drain(**asked, run_id="r")
    with pytest.raises(LookupError, match="nothing of t/1.json fits"):
        lake.retry("t/1.json")
    for choices in (("a", "b"), ("a", "b", "c")):
        lake = choosing(tmp_path, *choices)
        lake.retry("t/1.json")
        with pytest.raises(LookupError, match=f"{len(choices) - 1} of its lines were put into landing before"):
            lake.retry("t/1.json")
        assert lake.drain(**asked, run_id="r")["rows"].to_list() == [1]
        assert sorted(lake.snapshot().frame("t").collect()["id"]) == [*range(1, len(choices) + 1)]
    lake.rebuild()
    assert sorted(lake.snapshot().frame("t").collect()["id"]) == [1, 2, 3]
    assert lake.refused_lines().is_empty()
    assert not [finding for finding in lake.examine() if finding.problem]


def odd_lines(count: int) -> list[bytes]:
    """Lines without a newline, most of them not UTF-8, with backslashes and what looks escaped."""
    pick = random.Random(5)
    parts = [
        b"\xff",
        b"\xe2\x82",
        b"\\",
        b"\\\\",
        b"\\xff",
        b"\\x",
        b"x",
        "é€".encode(),
        b'{"id": 1',
        b"\xed\xa0\x80",
        b"\x80",
    ]
    return [
        b"{" + b"".join(pick.choices(parts, k=pick.randrange(1, 9))) + bytes([pick.randrange(11, 256)])
        for _ in range(count)
    ]


def test_a_refused_line_is_kept_byte_for_byte(root):
    class Notes(lakes.Lake):
        tables: ClassVar = {"notes": NOTES}

    lines = [*odd_lines(400), b"\xef\xbb\xbf{\xff", b"{" + b"\xff" * 3998]
    good = json.dumps(as_objects()[0]).encode()
    lake = Notes(root)
    lake.root.write("landing/notes/odd.json", b"\n".join([good, *lines]) + b"\n")
    limits = {"max_files": 9, "max_bytes": 10**6, "max_bad_share": 1.0, "for_s": 60.0, "scheduled_for": AT}
    assert lake.drain(**limits, run_id="one")["refused"].to_list() == [len(lines)]
    kept = lake.refused_lines().sort("line")
    assert [parse.as_it_came(raw, reason) for raw, reason in kept.select("raw", "reason").iter_rows()] == lines
    assert parse.as_file(lines[:3], NOTES) == b"\n".join(lines[:3]) + b"\n"


def test_what_is_not_whole_is_not_said_to_be():
    assert parse.as_it_came("{\ufffd", "not UTF-8: invalid start byte at byte 2") is None  # of an older release
    [(raw, reason)] = parse.parse(b"{" + b"\xff" * 5000 + b"\n", NOTES)[1].select("raw", "reason").iter_rows()
    assert parse.as_it_came(raw, reason) is None
    [(raw, reason)] = parse.parse(b"{" + b"x" * 5000 + b"\n", NOTES)[1].select("raw", "reason").iter_rows()
    assert parse.as_it_came(raw, reason) is None
