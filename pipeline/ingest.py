"""JSON files become Delta tables: each row exactly once, whatever dies on the way.

A batch is numbered and written down first (`lake/batches/<n>.json`: the files with their sizes and sha256), then
committed to each table under its number, then published, then its files are archived, then it is marked done. A run
that finds an unfinished batch finishes that one, from the same files. Rows that do not fit go to `quarantine` with
file, line, reason and the raw text.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from pipeline import lake
from pipeline.tables import DAY, MONEY, TABLES, TEXT, TIME, Table
from storage import Root

RAW_CHARS = 4000  # of a refused line that quarantine keeps
NAME = re.compile(r"(?P<table>[a-z]+)-(?P<tick>\d{8})\.json")


@dataclass(frozen=True)
class File:
    """One file of JSON lines. `name`: <table>-<tick>.json."""

    name: str
    table: str
    tick: int

    @property
    def landing(self) -> str:
        return f"landing/{self.table}/{self.name}"

    def archived(self, date: str) -> str:
        return f"archive/{date}/{self.table}/{self.name}"


@dataclass(frozen=True)
class Batch:
    """The files one run ingests. `manifest`: what was written down, when an earlier run left the batch unfinished.
    `repeated`: files in landing that were ingested before; they are set aside, not read."""

    root: str
    number: int
    date: str  # of the archive, UTC
    files: tuple[File, ...]
    repeated: tuple[File, ...]
    ingested: dict[str, list[list[int]]]  # table -> ranges of ticks that are in the lake once this batch is
    manifest: dict | None = None


@dataclass(frozen=True)
class Parsed:
    """A batch read and checked, nothing written yet.

    `frames`: table -> typed rows. `refused`: rows for quarantine (columns of `lake.QUARANTINE`).
    `files`: one row a file: table, file, bytes, sha256, lines, good, bad.
    """

    batch: Batch
    frames: dict[str, pl.DataFrame]
    refused: pl.DataFrame
    files: pl.DataFrame
    as_of: str | None

    @property
    def rows(self) -> int:
        return int(self.files["lines"].sum())

    @property
    def bad_share(self) -> float:
        """The share of all lines that do not fit, 0 to 1."""
        return int(self.files["bad"].sum()) / max(self.rows, 1)


def next_batch(root: str, *, max_files: int, scheduled_for: str | None) -> Batch | None:
    """The unfinished batch when there is one, else up to `max_files` of the files that wait, oldest tick first.

    None when nothing waits.
    """
    place = Root.at(root)
    published = lake.read_published(place)
    number = published["batch"] if published else 0
    for unfinished in (number + 1, number):
        manifest = _manifest(place, unfinished)
        if manifest and not place.exists(_done(unfinished)):
            files = tuple(File(f["name"], f["table"], f["tick"]) for f in manifest["files"])
            return Batch(place.url, unfinished, manifest["date"], files, (), manifest["ingested"], manifest)
    previous = _manifest(place, number)
    ingested = previous["ingested"] if previous else {}
    waiting = sorted(_waiting(place), key=lambda file: (file.tick, list(TABLES).index(file.table)))
    repeated = tuple(f for f in waiting if _contains(ingested.get(f.table, []), f.tick))
    files = tuple(f for f in waiting if f not in repeated)[:max_files]
    if not files:
        return None
    date = scheduled_for[:10] if scheduled_for else f"{datetime.now(UTC):%Y-%m-%d}"
    after = dict(ingested)
    for file in files:
        after[file.table] = _with(after.get(file.table, []), file.tick)
    return Batch(place.url, number + 1, date, files, repeated, after)


def read(batch: Batch) -> Parsed:
    """Read a batch's files, type their rows and set apart those that do not fit. Writes nothing.

    Raises ValueError when a file is not what the manifest of an unfinished batch says.
    """
    place = Root.at(batch.root)
    expected = {f["name"]: f["sha256"] for f in batch.manifest["files"]} if batch.manifest else {}
    good: dict[str, list[pl.DataFrame]] = {}
    refused, files = [], []
    for file in batch.files:
        try:
            data = place.read(file.landing)
        except FileNotFoundError:  # a replay after some of its files were archived
            data = place.read(file.archived(batch.date))
        sha256 = hashlib.sha256(data).hexdigest()
        if expected.get(file.name, sha256) != sha256:
            raise ValueError(f"{file.landing} changed since batch {batch.number} was written down")
        rows, bad = parse(data, TABLES[file.table])
        lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        if lines != rows.height + bad.height:
            raise AssertionError(f"{file.landing}: {lines} lines, but {rows.height} rows and {bad.height} refused")
        good.setdefault(file.table, []).append(rows)
        refused.append(
            bad.select(
                pl.lit(batch.number, pl.Int64).alias("batch"),
                pl.lit(file.table).alias("table"),
                pl.lit(file.name).alias("file"),
                "line",
                "reason",
                "raw",
            )
        )
        files.append((file.table, file.name, len(data), sha256, lines, rows.height, bad.height))
    frames = {table: pl.concat(parts) for table, parts in good.items()}
    columns = ["table", "file", "bytes", "sha256", "lines", "good", "bad"]
    newest = frames["orders"]["o_order_time"].max() if "orders" in frames else None
    return Parsed(
        batch,
        frames,
        pl.concat(refused),
        pl.DataFrame(files, schema=columns, orient="row"),
        newest.isoformat() if newest else None,
    )


def commit(parsed: Parsed, *, run_id: str) -> dict[str, int]:
    """Write a batch down, commit it to every table, publish it, archive its files. Returns table -> version.

    May be killed anywhere and called again: every step looks first whether it is done. Raises storage.LeaseHeld when
    another writer is at work.
    """
    batch = parsed.batch
    place = Root.at(batch.root)
    with lake.writing(place, run_id):
        _write_down(place, parsed, run_id)
        lake.create_tables(place, run_id)
        published = lake.read_published(place) or {"batch": 0, "tables": {}, "as_of": None}
        versions = {table: published["tables"].get(table, 0) for table in lake.COLUMNS}
        if published["batch"] < batch.number:
            for table, frame in (parsed.frames | {"quarantine": parsed.refused}).items():
                if frame.height:
                    versions[table] = lake.append(place, table, frame, batch=batch.number, run_id=run_id)
            as_of = max(filter(None, (published["as_of"], parsed.as_of)), default="1970-01-01T00:00:00+00:00")
            lake.publish(place, batch=batch.number, as_of=as_of, versions=versions, run_id=run_id)
    for file in batch.files:
        place.move(file.landing, file.archived(batch.date))
    for file in batch.repeated:
        place.move(file.landing, f"archive/{batch.date}/repeated/{batch.number:08d}-{file.name}")
    place.write(_done(batch.number), b"")
    return versions


def parse(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The typed rows of a file of JSON lines, and the lines that do not fit: columns line (from 1), reason, raw.

    A clean file is read at once; one that is not, line by line.
    """
    try:
        text = pl.read_ndjson(io.BytesIO(data), schema=dict.fromkeys(table.columns, TEXT)) if data else None
        if text is not None and text.height == data.count(b"\n"):
            text = text.with_row_index("line", offset=1)
            unread = _LINES.clear()
        else:
            text, unread = _read_lines(data, table)
    except pl.exceptions.PolarsError:
        text, unread = _read_lines(data, table)
    typed = text.with_columns(_typed(column, dtype) for column, dtype in table.columns.items())
    reasons = _misfits(typed.select(*table.columns), table)
    if not reasons and not unread.height:
        return typed.select(*table.columns), unread
    raw = data.split(b"\n")
    bad = pl.DataFrame(
        {
            "line": [int(typed["line"][i]) for i in reasons],
            "reason": list(reasons.values()),
            "raw": [_as_text(raw[int(typed["line"][i]) - 1]) for i in reasons],
        },
        schema=_LINES.schema,
    )
    fits = typed.with_row_index("_row").filter(~pl.col("_row").is_in(list(reasons)))
    return fits.select(*table.columns), pl.concat([unread, bad]).sort("line")


_LINES = pl.DataFrame(schema={"line": pl.Int64, "reason": pl.String, "raw": pl.String})


def _read_lines(data: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Line by line: the objects as text columns with their line number, and the lines that are none."""
    rows, unread = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if data.endswith(b"\n") or not data else lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a JSON {type(value).__name__}, not an object")
            rows.append([number, *(_as_field(value.get(column)) for column in table.columns)])
        except (ValueError, RecursionError) as error:
            unread.append((number, f"not a JSON object: {error}", _as_text(line)))
    schema = {"line": pl.UInt32} | dict.fromkeys(table.columns, TEXT)
    return (
        pl.DataFrame(rows, schema=schema, orient="row"),
        pl.DataFrame(unread, schema=_LINES.schema, orient="row"),
    )


def _as_field(value) -> str | None:
    """A JSON value as the text that is then typed; None stays missing."""
    if value is None or isinstance(value, str):
        return None if value is None else value.encode("utf-8", "replace").decode()
    return json.dumps(value)


def _as_text(line: bytes) -> str:
    return line[:RAW_CHARS].decode("utf-8", "replace")


def _typed(column: str, dtype) -> pl.Expr:
    """Text to `dtype`; what does not fit becomes null. Money with more than two decimals is not rounded: null."""
    text = pl.col(column)
    if dtype == TEXT:
        return text
    if dtype == DAY:
        return text.str.to_date("%Y-%m-%d", strict=False)
    if dtype == TIME:
        return text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", time_zone="UTC", strict=False)
    if dtype == MONEY:
        return pl.when(text.str.contains(r"^-?\d{1,13}(\.\d{1,2})?$")).then(text).cast(dtype, strict=False)
    return text.cast(dtype, strict=False)


def _misfits(frame: pl.DataFrame, table: Table) -> dict[int, str]:
    """Row number -> why it does not fit its table, for the rows that do not."""
    import pandera.polars as pa

    try:
        _schema(table, pa).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases.sort("index")
        reasons: dict[int, list[str]] = {}
        for case in cases.iter_rows(named=True):
            why = (
                "missing or of the wrong type"
                if case["check"] == "not_nullable"
                else f"{case['failure_case']} is not {case['check']}"
            )
            reasons.setdefault(case["index"], []).append(f"{case['column']}: {why}")
        return {index: "; ".join(found) for index, found in reasons.items()}
    return {}


def _schema(table: Table, pa):
    """The table as a pandera schema."""
    checks: dict[str, list] = {column: [] for column in table.columns}
    for column, (lowest, highest) in table.ranges.items():
        if lowest is not None:
            checks[column].append(pa.Check.ge(lowest, name=f"at least {lowest}", error=f"at least {lowest}"))
        if highest is not None:
            checks[column].append(pa.Check.le(highest, name=f"at most {highest}", error=f"at most {highest}"))
    for column, choices in table.choices.items():
        checks[column].append(pa.Check.isin(choices, error=f"one of {', '.join(choices)}"))
    return pa.DataFrameSchema(
        {column: pa.Column(dtype, checks[column], nullable=False) for column, dtype in table.columns.items()}
    )


def _waiting(place: Root) -> list[File]:
    """The files in landing that are named as a table's are; others are left alone."""
    return [
        File(name, table, int(match["tick"]))
        for table in TABLES
        for name in place.list(f"landing/{table}")
        if (match := NAME.fullmatch(name)) and match["table"] == table
    ]


def _manifest(place: Root, number: int) -> dict | None:
    try:
        return json.loads(place.read(f"lake/batches/{number:08d}.json"))
    except FileNotFoundError:
        return None


def _done(number: int) -> str:
    return f"lake/batches/{number:08d}.done"


def _write_down(place: Root, parsed: Parsed, run_id: str) -> None:
    batch = parsed.batch
    ticks = {file.name: file.tick for file in batch.files}
    manifest = {
        "batch": batch.number,
        "run_id": run_id,
        "date": batch.date,
        "files": [
            {
                "name": f["file"],
                "table": f["table"],
                "tick": ticks[f["file"]],
                "bytes": f["bytes"],
                "sha256": f["sha256"],
            }
            for f in parsed.files.iter_rows(named=True)
        ],
        "ingested": batch.ingested,
    }
    if place.create(f"lake/batches/{batch.number:08d}.json", json.dumps(manifest, indent=1).encode()):
        return
    there = _manifest(place, batch.number)
    if there["files"] != manifest["files"]:
        raise RuntimeError(f"another run wrote down batch {batch.number} with other files; run this one again")


def _contains(ranges: list[list[int]], tick: int) -> bool:
    return any(low <= tick <= high for low, high in ranges)


def _with(ranges: list[list[int]], tick: int) -> list[list[int]]:
    """The ranges of whole numbers with one more in them, merged: [[0, 4]] and 5 give [[0, 5]]."""
    merged: list[list[int]] = []
    for low, high in sorted([*ranges, [tick, tick]]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = [merged[-1][0], max(merged[-1][1], high)]
        else:
            merged.append([low, high])
    return merged


def chart(files: pl.DataFrame):
    """Rows kept and refused per table as bars; `files` as in `Parsed`."""
    from pipeline.charts import plot

    rows = files.group_by("table").agg(kept=pl.sum("good"), refused=pl.sum("bad")).sort("kept", descending=True)
    return plot(rows).bar(
        x="table", y=["kept", "refused"], stacked=True, title="Rows of this batch", xlabel="", ylabel="rows"
    )
