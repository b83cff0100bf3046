"""Malformed input: lines and files made by hand, and any number by a seeded mutator. Nothing lost, nothing crashed."""

import json
import os
import random
import re
import resource
import tempfile

import polars as pl
from faults.lake_world import AT, NotHeld

from etl.lake import ingest, parse, quarantine
from etl.lake import snapshot as lake
from etl.storage import Root
from pipeline.tables import TABLES

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
    ("empty", b"", "not JSON: "),
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

    return gzip.compress(b"\0" * 200_000_000, 1)


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
        ("only NUL bytes", b"\0" * 4096, None),
        ("only newlines", b"\n" * 100, None),
        ("one JSON array", f"[{text},{text}]".encode(), None),
        ("pretty printed", json.dumps(GOOD, indent=2).encode(), None),
        ("CSV", b"o_orderkey,o_custkey\n1,2\n", None),
        ("Parquet", b"PAR1" + b"\x15" * 100, "is Parquet, not JSON lines"),
        ("gzip bomb", _gzip_bomb(), "is compressed with gzip"),
        ("too large", b"x" * 6_000_000, "has 6,000,000 bytes: more than the 5,000,000 of a batch"),
        ("symbolic link", lambda path: os.symlink("/etc/passwd", path), "is a symbolic link"),
        ("dangling link", lambda path: os.symlink("/nowhere", path), "is a symbolic link"),
        ("folder", os.mkdir, "is a folder"),
        ("named pipe", os.mkfifo, "is a named pipe"),
        ("device", lambda path: os.mknod(path, 0o020666, os.makedev(1, 5)), "is a device"),  # /dev/zero
    ]


def by_hand(n: int, seed: int) -> str:
    """All lines in one file, each odd file on its own, in one batch; the first n of them."""
    with tempfile.TemporaryDirectory(prefix="lake-") as root:
        place, cases = Root.at(root), [*_files()][:n]
        lines = [bad for _, bad, _ in LINES if len(bad) < 1_000_000][:n]
        place.write("landing/orders/orders-00000000.json", b"\n".join([*lines, line().encode(), b""]))
        want = {"orders-00000000.json": (len(lines) + 1, 1)}
        for tick, (what, content, why) in enumerate(cases, start=1):
            name = f"orders-{tick:08d}.json"
            if isinstance(content, bytes):
                place.write(f"landing/orders/{name}", content)
            elif what != "device" or os.geteuid() == 0:  # only root makes one
                content(f"{root}/landing/orders/{name}")
            if why is None:
                want[name] = (parse.line_count(content), None)
        batch = ingest.next_batch(root, max_files=500, max_bytes=5_000_000, scheduled_for=AT)
        parsed = ingest.read(batch)
        ingest.commit(parsed, run_id="by-hand")
        _all_accounted(root, want)
        whys = {one["file"]: one["why"] for one in quarantine.refused_files(root)}
        for tick, (what, _, why) in enumerate(cases, start=1):
            if why and why not in whys.get(
                f"orders-{tick:08d}.json", f"nothing; {what} was not made" * (what != "device")
            ):
                raise NotHeld(f"{what}: {whys.get(f'orders-{tick:08d}.json')!r} does not say {why!r}")
        if waiting := place.list("landing/orders"):
            raise NotHeld(f"{waiting} still wait")
        refused = f"{len(whys)} files refused, {parsed.refused.height} lines set apart"
        return f"{len(lines)} lines and {len(cases)} files: {refused}"


def _all_accounted(root: str, want: dict[str, tuple[int, int | None]]) -> None:
    """Of each file as many lines in quarantine, each once, as did not become rows."""
    snapshot, place = lake.snapshot(root), Root.at(root)
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
        if not any(file in place.list(f"archive/{day}/orders") for day in place.list("archive")):
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
        if parse.refusal(data):
            whole += 1
            continue
        good, bad = parse.parse(data, table)
        if good.height + bad.height != parse.line_count(data) or bad["line"].is_duplicated().any():
            raise NotHeld(f"file {i}: {good.height} + {bad.height} of {parse.line_count(data)} lines: {data[:300]!r}")
        if (
            found := [tuple(map(str, row)) for row in good.select("o_orderkey", "o_totalprice", "o_comment").rows()]
        ) != (want := _strictly(data)):
            raise NotHeld(f"file {i}: {found} is kept, not {want}: {data[:300]!r}")
        lines, kept, apart = lines + parse.line_count(data), kept + good.height, apart + bad.height
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = f"{kept} rows as a strict reader has them, {apart} lines apart, {whole} files refused"
    return f"{n} files, {lines} lines: {found}; at most {peak_mb:.0f} MB"


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


def _strictly(data: bytes) -> list[tuple[str, str, str]]:
    """What of these lines is kept, by the plainest reading of the rules: nothing shared with the code under test."""
    from datetime import date, datetime
    from decimal import Decimal, InvalidOperation

    def pairs(items):
        if len({key for key, _ in items}) < len(items):
            raise ValueError
        return dict(items)

    def constant(_):
        raise ValueError

    kept = []
    for one in data.split(b"\n")[: data.count(b"\n") + (not data.endswith(b"\n") and bool(data))]:
        try:
            row = json.loads(one.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_float=Decimal)
            for key in ("o_orderkey", "o_custkey", "o_shippriority"):
                if type(row[key]) is not int or abs(row[key]) >= (2**31 if key == "o_shippriority" else 2**63):
                    raise ValueError
            for key in ("o_orderstatus", "o_orderdate", "o_orderpriority", "o_clerk", "o_comment", "o_order_time"):
                row[key].encode()
            price, day, moment = row["o_totalprice"], row["o_orderdate"], row["o_order_time"]
            if isinstance(price, bool) or (isinstance(price, str) and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", price)):
                raise ValueError
            price = Decimal(price)
            ok = bool(
                re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-5][0-9])", moment)
            )
            ok &= bool(datetime.fromisoformat(moment))
            ok &= row["o_orderkey"] >= 1 and 0 <= price < 10**13 and price == round(price, 2)
            ok &= row["o_orderstatus"] in "FOP" and len(row["o_orderstatus"]) == 1
            ok &= bool(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", day)) and bool(date.fromisoformat(day))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidOperation):
            continue
        if ok:
            kept.append((str(row["o_orderkey"]), f"{price:.2f}", row["o_comment"]))
    return kept
