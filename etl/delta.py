"""The log of a Delta table, written by hand: every file of it is on the disk before it has its name.

delta-rs syncs nothing, so a power cut may leave its newest commit empty (then its rows are gone without a word) or torn
(then the table does not open). And it lists the whole log for a commit, twice, which on an old table costs more than
all the rest of a batch. The lines are those of the protocol:
https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

import io
import itertools
import json
import re
import time
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast
from urllib.parse import quote, unquote

from etl.storage import Damaged, Root, crash_point, temporary_folder

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from deltalake import DeltaTable

Action: TypeAlias = dict[str, Any]  # a line of a commit
CHECKPOINT_INTERVAL = 20  # commits
PROPERTIES = {  # of a table of ours
    "delta.checkpointInterval": str(CHECKPOINT_INTERVAL),
    "delta.logRetentionDuration": "interval 24 hours",  # listing it is the greater part of what opening a table costs
    "delta.deletedFileRetentionDuration": "interval 24 hours",
}
TYPES = {
    **{"Int64": "long", "Int32": "integer", "Int16": "short", "Int8": "byte"},
    **{"Float64": "double", "Float32": "float", "Boolean": "boolean", "String": "string", "Date": "date"},
}
EXACT_DIGITS = 15  # that a float has: of a longer decimal the log would say bounds that its values are beyond
LAST = "_last_checkpoint"
NUMBERED = re.compile(r"\d{20}\.")  # begins the name of a file that is a version's
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"


class File(NamedTuple):
    """A live file of a table. `path`: below the table's folder, as the log has it. `values`: what each of its rows has
    in the columns by which the table is partitioned, which it does not have itself."""

    path: str
    bytes: int
    rows: int
    values: dict[str, Any]

    @property
    def rel(self) -> str:
        """Its path below the table's folder, as it is called."""
        return unquote(self.path)


class Cleaned(LookupError):
    """A version's commit is gone from a table's log, and newer ones are there."""


def log_of(table: str) -> str:
    """The path of a table's log. `table`: the path of the table."""
    return f"{table}/_delta_log"


def commit_of(table: str, version: int) -> str:
    """The path of a version's commit."""
    return f"{log_of(table)}/{version:020d}.json"


def newest_version(root: Root, table: str) -> int | None:
    """The newest version of a table, from its log's names; None when there is no table."""
    return max((int(name[:20]) for name in root.names(log_of(table)) if NUMBERED.match(name)), default=None)


def actions(root: Root, table: str, version: int) -> list[Action]:
    """The lines of a version's commit. Raises FileNotFoundError, Damaged."""
    path = commit_of(table, version)
    data = root.read(path)
    try:
        lines = [json.loads(line) for line in data.splitlines()]
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise Damaged(f"{path} is damaged: it is no JSON object a line")
    return lines


def since(root: Root, table: str, after: int) -> Iterator[tuple[int, list[Action]]]:
    """The commits after version `after` that there are, in order: version, lines. Raises Damaged, and Cleaned where
    the log begins after that version by now: what came between can be known from the table alone.

    As delta-rs would say it, but at the cost of these few commits: to open a table it lists the whole log.
    """
    version = after
    while True:
        last, following = commit_of(table, version), commit_of(table, version + 1)
        there = root.which([last, following])
        if following not in there:
            if version == after and last not in there and (newest_version(root, table) or -1) > version:
                raise Cleaned(f"the log of {table} has no version {version} any more")
            return
        version += 1
        yield version, actions(root, table, version)


def added(root: Root, table: str, after: int, until: int) -> list[Action] | None:
    """The files with rows that the commits after version `after` up to `until` brought, as the log has them.

    Also those that were compacted since. None when it cannot be said so: a commit was cleaned up, took rows away, or
    changed the columns. Raises Damaged.
    """
    try:
        commits = root.each(lambda version: actions(root, table, version), range(after + 1, until + 1))
    except FileNotFoundError:
        return None
    files = []
    for line in itertools.chain.from_iterable(commits):
        if "metaData" in line or line.get("remove", {}).get("dataChange"):
            return None
        if line.get("add", {}).get("dataChange"):
            files.append(line["add"])
    return files


def create_table(
    root: Root,
    table: str,
    columns: "Mapping[str, pl.DataType | type[pl.DataType]]",
    *,
    keys: Container[str],
    properties: dict[str, str],
    about: Action,
    partitions: Sequence[str] = (),
) -> None:
    """Version 0 of a table, unless it is there already; safe to race.

    `columns`: Polars types by name; `keys`: those that are never null; `about`: for the commit, as run_id and stage;
    `partitions`: the columns by which it is partitioned.
    """
    if root.exists(commit_of(table, 0)):
        root.sync([log_of(table)])  # who made it may have died before it was
        return
    fields = [field(name, dtype, name not in keys) for name, dtype in columns.items()]
    lines = [
        commit_info("CREATE TABLE", about),
        {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
        meta_data(table.rpartition("/")[2], fields, properties, partitions=partitions),
    ]
    commit(root, table, 0, lines)


def commit_info(operation: str, about: Action) -> Action:
    """A commit's line that says what it does. `about`: what else it carries, as run_id and stage."""
    return {"commitInfo": {"timestamp": time.time_ns() // 1_000_000, "operation": operation, **about}}


def meta_data(
    name: str,
    fields: list[Action],
    properties: dict[str, str],
    table_id: str | None = None,
    partitions: Sequence[str] = (),
) -> Action:
    """A commit's line that says what a table is; a new one when it has no `table_id`."""
    return {
        "metaData": {
            "id": table_id or str(uuid.uuid4()),
            "name": name,
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps({"type": "struct", "fields": fields}),
            "partitionColumns": [*partitions],
            "createdTime": time.time_ns() // 1_000_000,
            "configuration": properties,
        }
    }


def field(name: str, dtype: "pl.DataType | type[pl.DataType]", nullable: bool) -> Action:
    """A column as a table's schema has it."""
    return {"name": name, "type": type_of(dtype), "nullable": nullable, "metadata": {}}


def type_of(dtype: "pl.DataType | type[pl.DataType]") -> str | Action:
    """A Polars type as Delta's schema has it: a list or struct as an object. Raises ValueError where it has none."""
    import polars as pl

    if isinstance(dtype, pl.Decimal):
        if not 0 <= dtype.scale <= dtype.precision <= 38:
            raise ValueError(f"no table has a column of the type {dtype}: 38 digits at most, none but they behind it")
        return f"decimal({dtype.precision},{dtype.scale})"
    if dtype == pl.Datetime("us", "UTC") and isinstance(dtype, pl.Datetime):
        return "timestamp"
    if isinstance(dtype, pl.List):
        return {"type": "array", "elementType": type_of(cast("pl.DataType", dtype.inner)), "containsNull": True}
    if isinstance(dtype, pl.Struct) and dtype.fields:
        return {
            "type": "struct",
            "fields": [field(inner.name, cast("pl.DataType", inner.dtype), True) for inner in dtype.fields],
        }
    kind = str(dtype.base_type())
    if kind not in TYPES:
        known = ", ".join(TYPES)
        raise ValueError(
            f"no table has a column of the type {dtype}, but {known}, Datetime (us, UTC), Decimal, List or Struct"
        )
    return TYPES[kind]


def name_of(stored: str | Action) -> str:
    """A type of Delta's schema as one text: a list's or struct's as JSON."""
    return stored if isinstance(stored, str) else json.dumps(stored, sort_keys=True)


def add(path: str, size: int, stats: str, *, changes: bool, values: Mapping[str, Any] = {}) -> Action:
    """A commit's line that adds a file. `path`: as it is called. `changes`: whether its rows are new to the table.
    `values`: of its partition."""
    return {
        "add": {
            "path": quote(path, safe="/=") if values else path,
            "partitionValues": _texts(values),
            "size": size,
            "modificationTime": time.time_ns() // 1_000_000,
            "dataChange": changes,
            "stats": stats,
        }
    }


def remove(path: str, size: int, *, changes: bool = False, values: Mapping[str, Any] = {}) -> Action:
    """A commit's line that removes a file whose rows another one has. `path`: as the log has it. `changes`: whether it
    has them otherwise."""
    return {
        "remove": {
            "path": path,
            "dataChange": changes,
            "deletionTimestamp": time.time_ns() // 1_000_000,
            "extendedFileMetadata": True,
            "partitionValues": _texts(values),
            "size": size,
        }
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str | None]:
    """The values of a partition as the log has them."""
    return {name: None if value is None else _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)  # a day is ISO 8601


def values_of(added: Action, types: "Mapping[str, pl.DataType]") -> dict[str, Any]:
    """The values of the partition of a file, as a commit adds it. `types`: of the table's columns."""
    return {name: _value(text, types[name]) for name, text in added.get("partitionValues", {}).items()}


def _value(text: str | None, dtype: "pl.DataType") -> Any:
    if text is None or dtype.is_integer():
        return None if text is None else int(text)
    kind = str(dtype)
    return text == "true" if kind == "Boolean" else date.fromisoformat(text) if kind == "Date" else text


def folder_of(values: Mapping[str, Any]) -> str:
    """Where the files of a partition are, below the table's folder, a slash behind it: `country=DE/`.

    As Delta's writers call it, all but letters, digits and `_.-~` percent-encoded: the value is in the log, too, but
    some readers go by the folder.
    """
    folders = [(name, NULL_FOLDER if text is None else quote(text, safe="")) for name, text in _texts(values).items()]
    return "".join(f"{quote(name, safe='')}={folder}/" for name, folder in folders)


def commit(root: Root, table: str, version: int, lines: list[Action]) -> bool:
    """Add a version to a table's log, unless it is there already: then False. With it goes a checkpoint that is due."""
    if not root.create(commit_of(table, version), "\n".join(map(json.dumps, lines)).encode()):
        return False
    if (version + 1) % CHECKPOINT_INTERVAL == 0:
        crash_point(f"committed, no checkpoint: {table}")
        _checkpoint(root, table, version)
    return True


def _checkpoint(root: Root, table: str, version: int) -> None:
    """Have delta-rs write a version's checkpoint; where what it writes may tear, in a copy of the log's end."""
    if not root.may_tear:
        root.table(table, version).create_checkpoint()
        return
    log = log_of(table)
    with temporary_folder("checkpoint-") as folder:
        copy = Path(log_of(folder))
        copy.mkdir()
        for name in end_of_log(root, table, version):
            (copy / name).write_bytes(root.read(f"{log}/{name}"))
        Root.at(folder).table("").create_checkpoint()
        for name in (f"{version:020d}.checkpoint.parquet", LAST):
            root.write(f"{log}/{name}", (copy / name).read_bytes())


def end_of_log(root: Root, table: str, version: int) -> list[str]:
    """The names in a table's log that make a version: its last checkpoint and what came from that on. In order."""
    names = [name for name in root.names(log_of(table)) if NUMBERED.match(name) and int(name[:20]) <= version]
    start = max((name[:20] for name in names if ".checkpoint." in name), default="")
    return [name for name in names if name[:20] >= start]


def share(root: Root, table: str, version: int, folder: str) -> None:
    """Have a version of a table below a folder of the root too, under its number, to go on from there on its own.

    None of its files is ever written to again, so on this machine both share them; in an object store they are copied
    there. A file that is removed from one is still in the other.
    """
    live = [f"{table}/{file.rel}" for file in files(root.table(table, version))]
    log = [f"{log_of(table)}/{name}" for name in end_of_log(root, table, version)]
    root.copy([*live, *log], "", f"{folder}/")


def sync(root: Root, table: str, after: int, until: int) -> None:
    """Have what others wrote on the disk: the commits above version `after` up to `until` and all that they name."""
    if not root.may_tear or until <= after:
        return
    log = log_of(table)
    there = root.names(log)
    rels = [f"{log}/{name}" for name in there if name == LAST or (NUMBERED.match(name) and int(name[:20]) > after)]
    for version in range(after + 1, until + 1):
        if f"{version:020d}.json" not in there:  # another writer cleaned the log
            continue
        rels += [f"{table}/{unquote(line['add']['path'])}" for line in actions(root, table, version) if "add" in line]
    folders = {str(above) for rel in rels for above in PurePosixPath(rel).parents if str(above).startswith(f"{table}/")}
    root.sync([*filter(root.exists, rels), *sorted(folders - {log}, reverse=True), table, log])


def live(handle: "DeltaTable") -> "pa.Table":
    """What the log says of each live file of a table: path, size_bytes, num_records, min.<column> and the like."""
    import pyarrow as pa

    return pa.table(handle.get_add_actions(flatten=True))


def sizes(handle: "DeltaTable") -> dict[str, int]:
    """The path of each live file of a table, as the log has it -> its bytes."""
    actions = live(handle)
    return dict(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


def files(handle: "DeltaTable") -> list[File]:
    """The live files of a table."""
    actions = live(handle)
    values = {name: f"partition.{name}" for name in handle.metadata().partition_columns}
    return [
        File(line["path"], line["size_bytes"], line["num_records"], {name: line[at] for name, at in values.items()})
        for line in actions.select(["path", "size_bytes", "num_records", *values.values()]).to_pylist()
    ]


def data_names(root: Root, table: str) -> set[str]:
    """The paths below a table's folder of all Parquet files that are there, its partitions' too."""
    names, folders = set(), [""]
    while folders:
        folder = folders.pop()
        for name in root.names(f"{table}/{folder}".rstrip("/")):
            if name.endswith(".parquet"):
                names.add(f"{folder}{name}")
            elif "=" in name:
                folders.append(f"{folder}{name}/")
    return names


def folded(root: Root, table: str) -> list[Action]:
    """What all commits of a log together say, as one commit would: its protocol, columns, transactions and files."""
    kinds: dict[tuple[str, str], Action] = {}
    version = newest_version(root, table)
    assert version is not None, "its caller has seen that there is a table"
    for number in range(version + 1):
        for action in actions(root, table, number):
            kind = next(iter(action))
            if kind in ("add", "remove"):
                kinds.pop(("add", action[kind]["path"]), None)
            if kind not in ("remove", "commitInfo"):
                kinds[kind, action[kind].get("path") or action[kind].get("appId") or ""] = action
    order = ("protocol", "metaData", "txn", "add")
    return sorted(kinds.values(), key=lambda action: order.index(next(iter(action))))


def renumber(root: Root, table: str, version: int, about: Action) -> None:
    """Have a table's log begin at a version, with one commit and its checkpoint. Only of a table that nobody
    uses yet."""
    log, lines = log_of(table), [commit_info("CREATE TABLE", about), *folded(root, table)]
    before = root.names(log)
    with temporary_folder("checkpoint-") as folder:
        alone = Root.at(folder)
        alone.create(commit_of("t", 0), "\n".join(map(json.dumps, lines)).encode())
        alone.table("t", 0).create_checkpoint()
        checkpoint, hint = (
            alone.read(f"{log_of('t')}/{0:020d}.checkpoint.parquet"),
            alone.read_json(f"{log_of('t')}/{LAST}"),
        )
    root.create(commit_of(table, version), "\n".join(map(json.dumps, lines)).encode())
    root.write(f"{log}/{version:020d}.checkpoint.parquet", checkpoint)
    root.write(f"{log}/{LAST}", json.dumps((hint or {}) | {"version": version}).encode())
    root.remove_all(f"{log}/{name}" for name in before if name != LAST)


def file_stats(handle: "DeltaTable") -> tuple[list[int], int]:
    """The size in bytes of each live file of a table, and the number of rows in all of them."""
    actions = live(handle)
    return actions["size_bytes"].to_pylist(), sum(actions["num_records"].to_pylist())


def bounds(handle: "DeltaTable", column: str) -> list[tuple[str, Any, Any]]:
    """Of each live file of a table its path, and the lowest and highest value of a column of whole numbers."""
    actions = live(handle)
    found = [actions[name].to_pylist() for name in ("path", f"min.{column}", f"max.{column}")] if len(actions) else []
    return [*zip(*found, strict=True)]


def put(
    root: Root, table: str, path: str, frame: "pl.DataFrame", *, changes: bool, columns: Sequence[str] | None = None
) -> Action:
    """Write rows into a file of a table's folder; the line of a commit that adds it. `changes`: as of `add`; `columns`:
    as of `statistics`."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    root.write(f"{table}/{path}", buffer.getvalue())
    return add(path, buffer.tell(), json.dumps(statistics(frame, columns)), changes=changes)


def statistics(frame: "pl.DataFrame", columns: Sequence[str] | None = None) -> Action:
    """What a file's rows have, as the Delta log says it; texts, lists and structs have no bounds. `columns`: of these
    alone, whose texts are short and have bounds, too."""
    import polars as pl

    told = frame if columns is None else frame.select(columns)
    ranged = told.select(n for n, dtype in told.schema.items() if columns is not None or _has_bounds(frame, n, dtype))
    lowest, highest = (side.row(0, named=True) if ranged.width else {} for side in (ranged.min(), ranged.max()))
    return {
        "numRecords": frame.height,
        "minValues": {name: _plain(value) for name, value in lowest.items() if value is not None},
        "maxValues": {name: _plain(value) for name, value in highest.items() if value is not None},
        "nullCount": told.select(~pl.selectors.nested()).null_count().row(0, named=True),
    }


def merged(parts: Sequence[Action]) -> Action:
    """The statistics of all rows from those of some of them each."""
    names = {name for part in parts for name in part["minValues"]}
    partial = {
        n for n in names for part in parts if n not in part["minValues"] and part["nullCount"][n] != part["numRecords"]
    }
    bounds = {
        side: {name: choose(part[side][name] for part in parts if name in part[side]) for name in names - partial}
        for side, choose in (("minValues", min), ("maxValues", max))
    }
    nulls = {name: sum(part["nullCount"][name] for part in parts) for name in parts[0]["nullCount"]}
    return {"numRecords": sum(part["numRecords"] for part in parts), **bounds, "nullCount": nulls}


def _has_bounds(frame: "pl.DataFrame", name: str, dtype: "pl.DataType") -> bool:
    """Whether a column has a lowest and a highest value that JSON can say; NaN is above all for some and below none."""
    import polars as pl

    if dtype.is_float():
        return bool(frame[name].is_finite().all())
    if isinstance(dtype, pl.Decimal):
        return dtype.precision <= EXACT_DIGITS
    return dtype.is_numeric() or dtype.is_temporal()


def _plain(value: int | float | Decimal | date | datetime | str) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value if isinstance(value, int | str) else float(value)
