"""Malformed input: lines and files made by hand, and any number by a seeded mutator. Nothing lost, nothing crashed."""

import itertools
import json
import os
import random
import re
import resource
import tempfile

import polars as pl
from faults.lake_tables import TABLES_OF_ALL_KINDS
from faults.lake_world import AT, NotHeld

from etl.lake import commit, formats, ingest, parse
from etl.lake.table import Table
from etl.storage import Root, Unreadable
from pipeline import Lake
from pipeline.tables import RESCUED, TABLES

GOOD = json.loads(
    '{"o_orderkey":1,"o_custkey":370,"o_orderstatus":"O","o_totalprice":"186600.18","o_orderdate":"1996-01-02",'
    '"o_orderpriority":"5-LOW","o_clerk":"Clerk#000000951","o_shippriority":0,"o_comment":"nstructions sleep",'
    '"o_order_time":"2026-03-01T11:59:37.919+00:00"}'
)


def line(**changed) -> str:
    return json.dumps(GOOD | changed)


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


# what; the line; why it is refused
LINES = [
    ("cut off", b"{oops", "not JSON: "),
    ("a list", b"[1, 2]", "not JSON: a list, not an object"),
    ("a number", b"17", "not JSON: a int, not an object"),
    ("trailing text", line().encode() + b" trailing", "not JSON: Extra data"),
    ("two objects", line().encode() * 2, "not JSON: Extra data"),
    ("a key missing", without("o_clerk"), "o_clerk: missing"),
    ("two keys missing", b"{}", "o_orderkey: missing; o_custkey: missing"),
    ("null", line(o_orderkey=None).encode(), "o_orderkey: null"),
    ("text for a number", line(o_orderkey="abc").encode(), "o_orderkey: 'abc' is not a whole number"),
    ("a number for a text", line(o_comment=5).encode(), "o_comment: 5 is not a text"),
    ("true for a number", line(o_orderkey=True).encode(), "o_orderkey: true is not a whole number"),
    ("an object for a text", line(o_clerk={"a": 1}).encode(), 'o_clerk: {"a": 1} is not a text'),
    ("2^63", line(o_orderkey=2**63).encode(), "o_orderkey: 9223372036854775808 is out of range"),
    ("2^31", line(o_shippriority=2**31).encode(), "o_shippriority: 2147483648 is out of range"),
    ("5,000 digits", line().replace("370", "9" * 5000).encode(), "Exceeds the limit"),
    ("below the range", line(o_orderkey=0).encode(), "o_orderkey: 0 is not at least 1"),
    ("a fraction", line(o_orderkey=1.5).encode(), "o_orderkey: 1.5 is not a whole number"),
    ("three decimals", line(o_totalprice="1.234").encode(), "o_totalprice: '1.234' is not an amount"),
    ("a negative price", line(o_totalprice="-1.00").encode(), "o_totalprice: -1.00 is not at least 0"),
    ("too much money", line(o_totalprice="99999999999999.00").encode(), "o_totalprice: '99999999999999.00' is not"),
    ("NaN", line(o_totalprice=float("nan")).encode(), "not JSON: NaN"),
    ("Infinity", line(o_totalprice=float("-inf")).encode(), "not JSON: -Infinity"),
    ("NaN as text", line(o_totalprice="NaN").encode(), "o_totalprice: 'NaN' is not an amount"),
    ("1e999", line().replace('"186600.18"', "1e999").encode(), "1e999 is out of range"),
    ("a day that is none", line(o_orderdate="1996-02-30").encode(), "o_orderdate: '1996-02-30' is not a date"),
    ("a time without zone", line(o_order_time="2026-03-01 11:59").encode(), "o_order_time: '2026-03-01 11:59' is not"),
    ("the year 0 as a day", line(o_orderdate="0000-01-01").encode(), "o_orderdate: '0000-01-01' is not a date of the"),
    ("the year 0", line(o_order_time="0000-07-01T00:00:00.000+00:00").encode(), "is not a time with zone of the"),
    ("before the year 1", line(o_order_time="0001-01-01T00:30:00.000+01:00").encode(), "is not a time with zone of"),
    ("the year 10000", line(o_order_time="9999-12-31T23:30:00.000-01:00").encode(), "is not a time with zone of the"),
    ("a 60th second", line(o_order_time="2026-03-01T11:59:60.000+00:00").encode(), "is not a time with zone of the"),
    ("the year 6", line(o_orderdate="6-01-02").encode(), "o_orderdate: '6-01-02' is not a date"),
    ("a blank in a day", line(o_orderdate=" 1996-01-02").encode(), "o_orderdate: ' 1996-01-02' is not a date"),
    ("not among the choices", line(o_orderstatus="X").encode(), "o_orderstatus: X is not one of F, O, P"),
    ("a key twice", b'{"o_orderkey": 2, ' + line().encode()[1:], "the key 'o_orderkey' comes twice"),
    ("a key twice inside", line(x=1).replace('"x": 1', '"x": {"a": 1, "a": 2}').encode(), "the key 'a' comes twice"),
    ("a lone surrogate", line(o_comment="Q").replace("Q", "\\ud800").encode(), "o_comment: a lone surrogate"),
    ("bytes that are not UTF-8", line(o_comment="Q").encode().replace(b"Q", b"\xff\xfe"), "not UTF-8: "),
    ("a NUL byte", line(o_comment="Q").encode().replace(b"Q", b"\x00"), "not JSON: Invalid control character"),
    ("a byte order mark", b"\xef\xbb\xbf" + line().encode(), "not JSON: begins with a byte order mark"),
    ("depth 100,000, open", b'{"o_orderkey": ' + b"[" * 100_000, "nested too deep"),
    ("depth 100,000", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    ("10 MB", line(o_comment="x" * 10_000_000).encode(), "a line of 10,000,2"),
]


def _gzip_bomb() -> bytes:
    import gzip

    return gzip.compress(b"\0" * 300_000_000, 1)


def _files() -> list[tuple[str, object, str | None]]:
    """What; the bytes, or what makes it at a path; why it is refused whole, None when its lines are looked at."""
    whole, text = f"{line()}\n{line(o_orderkey=2)}\n".encode(), line()
    return [
        ("empty", b"", "is empty"),
        ("truncated", whole[:-40], None),
        ("no last newline", whole[:-1], None),
        ("Windows newlines", whole.replace(b"\n", b"\r\n"), None),
        ("byte order mark", b"\xef\xbb\xbf" + whole, None),
        ("UTF-16", whole.decode().encode("utf-16"), "is UTF-16, not UTF-8"),
        ("UTF-16 without a mark", whole.decode().encode("utf-16-be"), "is UTF-16, not UTF-8"),
        ("blank lines", b"\n" + whole.replace(b"\n", b"\n \t\r\n\n"), None),
        ("only NUL bytes", b"\0" * 4096, "1 of 1 lines do not fit: not JSON"),
        ("only newlines", b"\n" * 100, "has no rows, only blank lines"),
        (
            "an array that ends early",
            f"[{text},{text}".encode(),
            "is a JSON array that cannot be read beyond element 2",
        ),
        ("pretty printed", json.dumps(GOOD, indent=2).encode(), "has JSON objects over several lines each"),
        ("an empty array", b" [ ]\n", "has no rows"),
        ("CSV", b"o_orderkey,o_custkey\n1,2\n", "is a CSV without the column 'o_orderstatus'"),
        ("Parquet", b"PAR1" + b"\x15" * 100, "is damaged Parquet"),
        ("gzip bomb", _gzip_bomb(), "inflates to more than 256,000,000 bytes"),
        ("too large", b"x" * 6_000_000, "has 6,000,000 bytes: more than the 5,000,000 of a batch"),
        ("symbolic link", lambda path: os.symlink("/etc/passwd", path), "is a symbolic link"),
        ("dangling link", lambda path: os.symlink("/nowhere", path), "is a symbolic link"),
        ("named pipe", os.mkfifo, "is a named pipe"),
        ("device", lambda path: os.mknod(path, 0o020666, os.makedev(1, 5)), "is a device"),  # /dev/zero
    ]


def by_hand(n: int, seed: int) -> str:
    """All lines in one file, each odd file on its own, in one batch; the first n of them."""
    with tempfile.TemporaryDirectory(prefix="lake-") as root:
        place, cases = Root.at(root), [*_files()][:n]
        lines = [bad for _, bad, _ in LINES if len(bad) < 1_000_000][:n]
        place.write("landing/orders/orders-00000000.json", b"\n".join([*lines, line().encode(), b""]))
        want = {"orders/orders-00000000.json": (len(lines) + 1, 1)}
        for tick, (what, content, why) in enumerate(cases, start=1):
            name = f"orders/orders-{tick:08d}.json"
            if isinstance(content, bytes):
                place.write(f"landing/{name}", content)
            elif what != "device" or os.geteuid() == 0:  # only root makes one
                content(f"{root}/landing/{name}")
            if why is None:
                want[name] = (parse.line_count(content) - parse.blank_lines(content), None)
        batch = Lake(root).next_batch(max_files=500, max_bytes=5_000_000, scheduled_for=AT)
        parsed = ingest.read(batch)
        ingest.commit(parsed, run_id="by-hand")
        _all_accounted(root, want)
        whys = {one["file"]: one["why"] for one in Lake(root).refused_files()}
        for tick, (what, _, why) in enumerate(cases, start=1):
            if why and why not in whys.get(
                f"orders/orders-{tick:08d}.json", f"nothing; {what} was not made" * (what != "device")
            ):
                raise NotHeld(f"{what}: {whys.get(f'orders/orders-{tick:08d}.json')!r} does not say {why!r}")
        if waiting := [path for path, _ in place.tree("landing")]:
            raise NotHeld(f"{waiting} still wait")
        refused = f"{len(whys)} files refused, {parsed.refused.height} lines set apart"
        return f"{len(lines)} lines and {len(cases)} files: {refused}"


def _all_accounted(root: str, want: dict[str, tuple[int, int | None]]) -> None:
    """Of each file as many lines in quarantine, each once, as did not become rows."""
    snapshot, place = Lake(root).snapshot(), Root.at(root)
    number = snapshot.batch
    lines = snapshot.frame("quarantine").filter(pl.col("batch") == number).collect()
    if lines.select("file", "line").is_duplicated().any():
        raise NotHeld("a line is in quarantine twice")
    refused = dict(lines.group_by("file").len().rows())
    given = sum(lines for lines, _ in want.values())
    kept = sum(frame.height for frame in [snapshot.frame("orders").collect()])
    if kept + sum(refused.values()) != given:
        raise NotHeld(f"of {given} lines {kept} are rows and {sum(refused.values())} in quarantine")
    for file, (lines, good) in want.items():
        if good is not None and refused.get(file, 0) != lines - good:
            raise NotHeld(f"{file}: {refused.get(file, 0)} of {lines} lines are in quarantine, not {lines - good}")
        if not any(place.exists(f"archive/{day}/{file}") for day in place.names("archive")):
            raise NotHeld(f"{file} is not in the archive")


def generated(n: int, seed: int) -> str:
    """n files that a seeded mutator made of clean ones: what is kept is exactly what a strict reader keeps."""
    pick, table = random.Random(seed), TABLES["orders"]
    lines = kept = apart = whole = 0
    for i in range(n):
        clean = [
            line(o_orderkey=k + 1, o_comment=pick.choice(["plain", 'q"\\', "ü: {"])) for k in range(pick.randint(1, 8))
        ]
        data = _mutated("".join(f"{one}\n" for one in clean).encode(), pick)
        try:
            content = formats.opened(data, table.named)
        except Unreadable:
            content = None
        if content is None or content.kind != "lines":
            whole += 1
            continue
        data = content.data
        good, bad = parse.parse(data, table)
        count = parse.line_count(data) - parse.blank_lines(data)
        if good.height + bad.height != count or bad["line"].is_duplicated().any():
            raise NotHeld(f"file {i}: {good.height} + {bad.height} of {count} lines: {data[:300]!r}")
        _assert_strict(f"file {i}", data, good)
        lines, kept, apart = lines + count, kept + good.height, apart + bad.height
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = f"{kept} rows as a strict reader has them, {apart} lines apart, {whole} files refused"
    return f"{n} files, {lines} lines: {found}; at most {peak_mb:.0f} MB"


TOGETHER = 200  # lines


def both_ways(n: int, seed: int) -> str:
    """n lines, most of them odd, one to four at a time: what the quick way reads is what the slow way makes of them.

    The same rows, `_rescued` and all, and no reason to refuse one; as a strict reader has them, too. All of it can be
    written and shown.
    """
    pick, table = random.Random(seed), TABLES["orders"]
    kept = apart = rescued = quick = 0
    for at in range(0, n, TOGETHER):
        lines = [odd_line(pick) + b"\n" for _ in range(TOGETHER)]
        data, first = b"".join(lines), 1
        good, bad = parse._line_by_line(data, table, first)
        wrong, every = set(bad["line"]), enumerate(data.split(b"\n"), start=1)
        good = good.with_columns(
            _line=pl.Series([number for number, one in every if one.strip() and number not in wrong])
        )
        while lines:
            few = pick.randint(1, 4)
            part, lines = b"".join(lines[:few]), lines[few:]
            after = first + parse.line_count(part)
            rows = parse._plain(part, table, after - first)
            if rows is not None:
                slow = good.filter(pl.col("_line").is_between(first, after, closed="left")).drop("_line")
                if not rows.equals(slow) or wrong.intersection(range(first, after)):
                    raise NotHeld(f"{part!r} is {rows.rows()} by the quick way, not {slow.rows()}")
                quick += rows.height
            first = after
        good = good.drop("_line")
        if not all(map(pl.DataFrame.equals, parse.parse(data, table), (good, bad))):
            raise NotHeld(f"from line {at}: not the same in pieces as line by line: {data!r}")
        _assert_strict(f"from line {at}", data, good)
        commit.encode(Lake("."), "orders", good)
        json.dumps([bad.to_dicts(), good["o_order_time"].max().isoformat()])
        kept, apart, rescued = kept + good.height, apart + bad.height, rescued + good[RESCUED].count()
    return f"{n} lines: {kept} rows, {quick} of them read quickly, {rescued} with unknown fields, {apart} lines apart"


VALUES = {  # JSON for a column of the type; the first of each fits everywhere
    "Int64": ["1", "0", "-5", "1.0", "true", '"1"', "9223372036854775808", "[]", "1e2"],
    "Int16": ["1", "-32768", "32768", "null"],
    "Int8": ["1", "127", "128", "-129", '"1"'],
    "Float64": ["1.5", "1", "-0", "-0.0", "1e-400", "1e999", "123456789012345678901234567890", '"1.5"', "false", "NaN"],
    "Float32": ["0.1", "1e39", "16777217", "null", "3"],
    "Boolean": ["true", "false", "1", '"true"', "0", "null"],
    "String": ['"click"', '"view"', '""', '"null"', '"a,b"', "5", "true", '"[x"', '"{"', '["a"]', '"\\u00e9"', '"ü"'],
    "Date": ['"2026-03-01"', '"1996-02-30"', '"2026-03-01T00:00:00.000"', "5", '"0000-01-01"'],
    "Datetime": ['"2026-03-01T11:59:37.919Z"', '"2026-03-01T11:59:37.919+00:00"', '"2026-03-01 11:59:37+00"', '"x"'],
    "Decimal": ['"1.50"', "1.5", "2", '"1.505"', '"-1"', '"1e2"', "null"],
    "Epoch": ["0", "-1000", "1772366377000", "1772366377919001", "9223372036854775807", "9223372036854775808", "1.0"]
    + ["true", '"5"', '"2026-03-01T11:59:37.919Z"', "-62135596800", "253402300799", "253402300800", "-62135596801"],
}


def mutated_lines(table: Table, n: int, pick: random.Random) -> list[bytes]:
    """n lines for a table, most of them odd."""
    return [_line_for(table, pick) for _ in range(n)]


def _line_for(table: Table, pick: random.Random) -> bytes:
    pairs, odd = [], pick.choice([0.0, 0.0, 0.1, 0.3])
    for name, column in table.fields.items():
        values = VALUES["Epoch" if column.unit else str(column.type.base_type())]
        if column.optional and pick.random() < 0.4:
            if pick.random() < 0.6:
                pairs.append((name, "null"))
        else:
            pairs.append((name, pick.choice(values) if pick.random() < odd else values[0]))
    while pairs and pick.random() < odd:
        extra = pick.choice([*table.fields, "x", "=price", "nullable", "MSG"])
        pairs.insert(
            pick.randrange(len(pairs) + 1), (extra, pick.choice(["null", "1", '"a"', '"a,b"', "[null]", "{}"]))
        )
    comma, colon = pick.choice([(",", ":"), (",", ":"), (", ", ": "), (" ,", " :")])
    text = "{" + comma.join(f'"{key}"{colon}{value}' for key, value in pairs) + "}"
    return pick.choice([b"", b"null", b"[1]", text.encode() * 2]) if pick.random() < odd / 5 else text.encode()


def same_both_ways(table: Table, lines: list[bytes], pick: random.Random, few: int = 4) -> int:
    """How many lines were read quickly, a few at a time; each time as the slow way reads them. Raises NotHeld."""
    at = quick = 0
    while at < len(lines):
        count = pick.randint(1, few) if few != len(lines) else few
        part = b"".join(line + b"\n" for line in lines[at : at + count])
        at += count
        plain = parse._plain(part, table, parse.line_count(part))
        slow, refused = parse._line_by_line(part, table, 1)
        if plain is not None:
            quick += plain.height
            if refused.height or not plain.equals(slow) or str(plain.rows()) != str(slow.rows()):  # -0.0 equals 0.0
                raise NotHeld(f"{part!r} is {plain.rows()} by the quick way, not {slow.rows()}, {refused.rows()}")
    return quick


def any_table(n: int, seed: int) -> str:
    """n lines of tables with columns of all kinds, a few at a time: the quick way reads what the slow way reads."""
    pick = random.Random(seed)
    each = n // len(TABLES_OF_ALL_KINDS)
    quick = [same_both_ways(table, mutated_lines(table, each, pick), pick) for table in TABLES_OF_ALL_KINDS]
    return f"{n} lines of {len(quick)} tables: {sum(quick)} of them read quickly, as slowly"


TEXTS = ["o_orderstatus", "o_orderpriority", "o_clerk", "o_comment"]
NO_TEXTS = ["12345", "1.50", "true", "false", "null", "-0", "1e5", "[]", "[1]", '["a"]', "{}", '{"a":1}', '{"a":"b"}']
FIELDS = ["7", '"web"', "null", "true", "1.5", '""', '"a,b:c"', "[1,2]", '["x","y"]', '{"a":"b"}', "{}", '"\\u00e9"']
PLAIN_TIMES = [
    "2026-03-01T11:59:37.919Z",
    "2026-03-01T11:59:37+00:00",
    "2026-03-01T11:59:37.9+01:30",
    "2026-03-01T11:59:37.919123-00:00",
    "0001-01-01T00:00:00.000+00:00",
    "9999-12-31T23:59:59.999+00:00",
]
NO_TIMES = [
    "9999-12-31T23:30:00.000-01:00",
    "0001-01-01T00:30:00.000+01:00",
    "0000-05-05T00:00:00.000+00:00",
    "2026-03-01T11:59:60.000+00:00",
    "2026-02-29T11:59:37.919+00:00",
    "2026-03-01 11:59:37",
]
# keys; the values (JSON) that one of them gets; how often
ODD_VALUES = [
    (TEXTS, NO_TEXTS, 4),
    (["o_totalprice"], ["12.34", "12", "0", "1e2", '"1.5"', '"0001.5"', '"1,5"', "-0.0"], 4),
    (["o_order_time"], [f'"{time}"' for time in PLAIN_TIMES], 4),
    (["o_order_time"], [f'"{time}"' for time in NO_TIMES], 1),
    (TEXTS[1:], ['""', '"a,b"', '"a:b"', '"{x"', '"[x"', '"ü\u2028"', '"q\\"\\\\"'], 2),
    (["o_orderdate"], ['"0001-01-01"', '"9999-12-31"', '"0000-01-01"', '"1996-02-30"', '"96-01-02"'], 1),
    (["o_custkey", "o_shippriority"], ['"1"', "1.0", "true", "-0", "2147483648"], 1),
]


def odd_line(pick: random.Random) -> bytes:
    """A line with nothing odd, or with up to three things; now and then one that is not one line."""
    pairs = [[key, json.dumps(value)] for key, value in (GOOD | {"o_orderkey": pick.randint(1, 10**6)}).items()]
    for _ in range(pick.choice([0, 0, 1, 1, 2, 3])):
        _make_odd(pairs, pick)
    comma, colon = pick.choice([(",", ":"), (",", ":"), (", ", ": "), (" ,\t", " :")])
    text = "{" + comma.join(f'"{key}"{colon}{value}' for key, value in pairs) + "}"
    match pick.randrange(40):
        case 0:
            text = pick.choice(["", " ", "\t\r", text + "\n", text + text, text + " ", text.replace(",", ",\n", 1)])
        case 1:
            return _mutated(text.encode(), pick)
    return text.encode()


def _make_odd(pairs: list[list[str]], pick: random.Random) -> None:
    """Change, add or remove one of the pairs of key and value (JSON)."""
    at = pick.randrange(len(pairs))
    match pick.randrange(10):
        case 0 | 1:
            pairs.insert(at, [pick.choice(["o_channel", "x", "", "O_CLERK"]), pick.choice(FIELDS)])
        case 2:
            pairs.insert(at, [pick.choice(pairs)[0], pick.choice(pairs)[1]])
        case 3:
            pairs[at : at + 1] = pick.choice([[], [["other", pairs[at][1]]], [pairs[at], ["x", "1"]]])
        case _:
            keys, values, _ = pick.choices(ODD_VALUES, [often for *_, often in ODD_VALUES])[0]
            key, value = pick.choice(keys), pick.choice(values)
            pairs[:] = [[name, value if name == key else before] for name, before in pairs]


def _assert_strict(what: str, data: bytes, good: pl.DataFrame) -> None:
    """The rows are those that a strict reader keeps, in all columns."""
    rows = good.with_columns(pl.col("o_order_time").dt.strftime("%Y-%m-%dT%H:%M:%S.%6f")).rows()
    found = [tuple(None if value is None else str(value) for value in row) for row in rows]
    if found != (want := _strictly(data)):
        raise NotHeld(f"{what}: {_first_unlike(found, want)} by a strict reader: {data[:300]!r}")


def _first_unlike(found: list[tuple], want: list[tuple]) -> str:
    return next(f"{a}, not {b}" for a, b in itertools.zip_longest(found, want) if a != b)


def _mutated(data: bytes, pick: random.Random) -> bytes:
    for _ in range(pick.randint(0, 3)):
        at, end = sorted(pick.randrange(len(data) + 1) for _ in range(2))
        token = pick.choice(
            [
                b"\n",
                b"{",
                b"}",
                b"[",
                b'"',
                b"\\",
                b":",
                b",",
                b"\0",
                b"\r",
                b" ",
                b"NaN",
                b"null",
                b"1e5",
                b"\\ud800",
                b"\xff",
            ]
            + [b',"x":1', b',"o_orderkey":7', b"\xef\xbb\xbf", b"9" * 25, b"\xed\xa0\x80", b"-", b"0"]
        )
        match pick.randrange(6):
            case 0:
                data = data[:at] + token + data[at:]
            case 1:
                data = data[:at] + data[min(end, at + pick.randint(1, 30)) :]
            case 2:
                data = data[:at]
            case 3 if data:
                at %= len(data)
                data = data[:at] + bytes([data[at] ^ 1 << pick.randrange(8)]) + data[at + 1 :]
            case 4:
                data = data[:at] + data[at:end] + data[at:]
            case 5:
                key = pick.choice(sorted(GOOD)).encode()
                data = data.replace(b'"' + key + b'"', pick.choice([b'"other"', b"key", b'"o_clerk"', b'""']), 1)
    return data


def _strictly(data: bytes) -> list[tuple[str | None, ...]]:
    """What of these lines is kept, by the plainest reading of the rules: nothing shared with the code under test."""
    from datetime import UTC, date, datetime
    from decimal import Decimal, InvalidOperation

    def pairs(items):
        if len({key for key, _ in items}) < len(items):
            raise ValueError
        return dict(items)

    def constant(_):
        raise ValueError

    class Fraction(str):  # as it is written, and no text
        encode = None

    kept = []
    for one in data.split(b"\n")[: data.count(b"\n") + (not data.endswith(b"\n") and bool(data))]:
        if not one.strip():
            continue
        try:
            row = json.loads(one.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_float=Fraction)
            for key in ("o_orderkey", "o_custkey", "o_shippriority"):
                if type(row[key]) is not int or abs(row[key]) >= (2**31 if key == "o_shippriority" else 2**63):
                    raise ValueError
            for key in ("o_orderstatus", "o_orderdate", "o_orderpriority", "o_clerk", "o_comment", "o_order_time"):
                row[key].encode()
            price, day, moment = row["o_totalprice"], row["o_orderdate"], row["o_order_time"]
            is_text = isinstance(price, str) and not isinstance(price, Fraction)  # which may have no exponent
            if isinstance(price, bool) or (is_text and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", price)):
                raise ValueError
            price = Decimal(price) + 0  # no -0
            ok = bool(
                re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-5][0-9])", moment)
            )
            moment = datetime.fromisoformat(moment).astimezone(UTC)
            ok &= row["o_orderkey"] >= 1 and 0 <= price < 10**13 and price == round(price, 2)
            ok &= row["o_orderstatus"] in "FOP" and len(row["o_orderstatus"]) == 1
            ok &= bool(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", day)) and bool(date.fromisoformat(day))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidOperation, OverflowError):
            continue
        if ok:
            known = {"o_totalprice": f"{price:.2f}", "o_order_time": f"{moment:%Y-%m-%dT%H:%M:%S.%f}".zfill(26)}
            extra = {key: value for key, value in json.loads(one).items() if key not in GOOD}
            values = [str(known.get(key, row[key])) for key in GOOD]
            kept.append((*values, json.dumps(extra) if extra else None))
    return kept
