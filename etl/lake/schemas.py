"""What columns a table has, which it is declared to have, and what has to become of the one to be the other."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl import delta
from etl.notebook import CheckFailed

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake
    from etl.lake.table import DataType

APP_ID = "preprocess"  # whose transactions number the batches; it is in the log of every lake, whatever the stage
READER_VERSION, WRITER_VERSION = 1, 2  # of Delta's protocol, that this engine reads and writes
WIDER = {
    "byte": {"short", "integer", "long"},
    "short": {"integer", "long"},
    "integer": {"long"},
    "float": {"double"},
}
DIGITS = {"byte": 3, "short": 5, "integer": 10, "long": 19}  # of their largest values
FOREIGN = {  # properties of a table that ask of writers what this engine does not do
    "delta.columnMapping.mode": {"name", "id"},
    "delta.enableDeletionVectors": {"true"},
    "delta.appendOnly": {"true"},
}
DECIMAL = re.compile(r"decimal\((\d+),(\d+)\)")
OURS = ("quarantine", "files")  # tables that every batch may write to
REMEDY = "take the change of its declaration back, or give the column another name"


class SchemasDiffer(CheckFailed):
    """The lake's tables are not as they are declared, and cannot become it; nothing was written to them. A run that
    ends with it is not tried again: it would come to the same end."""


class ChangedMeanwhile(RuntimeError):
    """Somebody gave a table other columns while a batch was committed; it can become what it is declared to be."""


class RowsTaken(SchemasDiffer):
    """Another writer took rows of ours away; nothing was written."""


class Look(NamedTuple):
    """What came to a table since it was published: its newest `version`, the newest `batch` of ours, 0 for none,
    and whether its columns may have been `touched`. `why`: what of it is not welcome."""

    version: int
    batch: int
    touched: bool
    why: str | None = None


@dataclass(frozen=True)
class Move:
    """What is to become of a table's columns. `fields`: all of them then, as Delta's schema has them. `rewrites`:
    whether each file is written again. `defaults`: new column -> what rows have in it that were there before."""

    fields: list[delta.Action]
    rewrites: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)


def declared(lake: "Lake") -> dict[str, list[delta.Action]]:
    """Table -> its columns as they are declared, as Delta's schema has them."""
    return {
        table: [delta.field(name, dtype, name not in lake.required[table]) for name, dtype in columns.items()]
        for table, columns in lake.columns.items()
    }


def fingerprint(fields: list[delta.Action], partitions: Sequence[str] = ()) -> str:
    """The same for the same columns, types and what may be null, in any order, and the same partitions."""
    said: list[Any] = sorted((column["name"], delta.name_of(column["type"]), column["nullable"]) for column in fields)
    said += [[*partitions]] if partitions else []
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def unsettled(
    lake: "Lake", pointer: dict[str, Any] | None, looks: "Mapping[str, Look] | None" = None
) -> dict[str, str | None]:
    """The tables that there are and that are not known to be as they are declared -> why one cannot become it, or was
    changed by others to what this engine does not write; None where it can. `looks`: as of `look_at_all`, if that was
    asked already.

    Only a table is opened whose columns the pointer does not know, or that others changed since, so nearly always none:
    of the others the commits since the published version are looked at, which nearly always are none.
    """
    seen = look_at_all(lake, pointer) if looks is None else looks
    known = (pointer or {}).get("schemas", {})

    def looked(table: str) -> tuple[bool, str | None]:
        if table in seen and seen[table].why:
            return True, seen[table].why
        unknown = known.get(table) != lake.fingerprints[table] or table not in seen
        if not (table in seen and seen[table].touched) and not (unknown and is_there(lake, table)):
            return False, None
        try:
            return True, plan(lake, table, lake.table(table))[1]
        except SchemasDiffer as error:
            return True, str(error)

    every = zip(lake.columns, lake.root.each(looked, lake.columns), strict=True)
    return {table: why for table, (asked, why) in every if asked}


def blocked(unsettled: Mapping[str, str | None]) -> dict[str, str]:
    """Of `unsettled` the tables that cannot become what they are declared to be: nothing is written to them."""
    return {table: why for table, why in unsettled.items() if why}


def require_none(blocked: Mapping[str, str], tables: Iterable[str]) -> None:
    """Raise SchemasDiffer when one of these tables, or of the engine's own, is blocked."""
    if wrong := [why for table, why in blocked.items() if table in {*tables, *OURS}]:
        raise SchemasDiffer(refusal(wrong))


def is_there(lake: "Lake", table: str) -> bool:
    """Whether there is such a table."""
    return bool(lake.root.names(delta.log_of(f"lake/{table}")))


def look_at_all(lake: "Lake", pointer: dict[str, Any] | None, tables: Iterable[str] | None = None) -> dict[str, Look]:
    """What came to each published table (of these) since; where that is not welcome, why."""
    asked = lake.columns.keys() if tables is None else {*tables}
    versions = {table: version for table, version in (pointer or {}).get("tables", {}).items() if table in asked}

    def looked(table: str) -> Look:
        try:
            return look(lake, table, versions[table])
        except SchemasDiffer as error:
            return Look(versions[table], 0, touched=True, why=str(error))

    return dict(zip(versions, lake.root.each(looked, versions), strict=True))


def look(lake: "Lake", table: str, after: int) -> Look:
    """What came to a table after the version `after`, nearly always nothing.

    Rows that others append are welcome; that they take rows away is not. Raises SchemasDiffer when somebody asks for
    what this engine does not write, RowsTaken.
    """
    version, batch, touched = after, 0, False
    theirs: set[str] = set()  # files that others have brought since
    gone: dict[str, str] = {}  # files that others have taken away since, and that are not back: who did it
    try:
        for number, lines in delta.since(lake.root, f"lake/{table}", after):
            version = number
            info: delta.Action = next((line["commitInfo"] for line in lines if "commitInfo" in line), {})
            ours = "run_id" in info and info.get("stage") in (lake.ingested_by, lake.compacted_by)
            for line in lines:
                require_protocol(table, line.get("protocol", {}))
                touched |= "protocol" in line or "metaData" in line
                if line.get("txn", {}).get("appId") == APP_ID:
                    batch = max(batch, line["txn"]["version"])
                removed = line.get("remove", {})
                if removed.get("dataChange") and not ours and removed["path"] not in theirs:
                    gone[removed["path"]] = f"version {number} ({info.get('operation', 'of an unknown operation')})"
            for line in lines:  # a file may be taken away and brought by one commit
                added = line.get("add", {})
                if gone.pop(added.get("path"), None) is None and added.get("dataChange") and not ours:
                    theirs.add(added["path"])
    except delta.Cleaned:  # what came is known by the table alone
        handle = lake.table(table)
        _require_all_rows(lake, table, handle)
        return Look(handle.version(), handle.transaction_version(APP_ID) or 0, touched=True)
    if gone:
        raise RowsTaken(_taken(table, f"by {' and '.join(sorted(set(gone.values())))}", after))
    return Look(version, batch, touched)


def _require_all_rows(lake: "Lake", table: str, handle: "DeltaTable") -> None:
    counted = rows_by_ledger(lake, table, lake.table("files"))
    there = delta.file_stats(handle)[1]
    if counted is not None and there < counted:
        raise RowsTaken(_taken(table, f"{counted - there:,} of {counted:,}, and cleaned its log", None))


def _taken(table: str, what: str, version: int | None) -> str:
    back = f"bring them back (`DeltaTable(...).restore({version})`)" if version is not None else "bring them back"
    return (
        f"{table}: another writer took rows of ours away, {what}. Nothing was written; what to do: {back}, or make the "
        f"lake again from its archive: `orchestrate.py rebuild`"
    )


def rows_by_ledger(lake: "Lake", table: str, ledger: "DeltaTable") -> int | None:
    """How many rows of a table a version of the ledger knows of; None where it cannot say: of a table in which newer
    rows replace older ones, of the ledger itself, and where a file's rows were not counted."""
    if table == "files" or lake.upserts(table):
        return None
    files = pl.scan_delta(ledger)
    counted = files.select("refused") if table == "quarantine" else files.filter(table=table).select("rows")
    column = counted.collect().to_series()
    return None if column.null_count() else int(column.sum())


def require_protocol(table: str, protocol: delta.Action) -> None:
    """Raise SchemasDiffer when a table's `protocol`, as its log has it, asks for what this engine does not write."""
    features = {*(protocol.get("readerFeatures") or ()), *(protocol.get("writerFeatures") or ())}
    versions = protocol.get("minReaderVersion", 1), protocol.get("minWriterVersion", 2)
    if features or versions[0] > READER_VERSION or versions[1] > WRITER_VERSION:
        named = f", with {', '.join(sorted(features))}" if features else ""
        raise SchemasDiffer(
            f"{table}: another writer gave the table Delta's protocol {versions[0]} to read and {versions[1]} to write"
            f"{named}; this engine reads {READER_VERSION} and writes {WRITER_VERSION}, without such features. Nothing "
            f"was written to it; undo what was enabled, as by `restore` of that writer to the version before"
        )


def require_ours(lake: "Lake", table: str, handle: "DeltaTable") -> None:
    """As `require_protocol`, of an open table, and for what its properties and columns ask of writers, and where it is
    partitioned otherwise than it is declared."""
    protocol, known = handle.protocol(), handle.metadata()
    asked = {"minReaderVersion": protocol.min_reader_version, "minWriterVersion": protocol.min_writer_version}
    features = {"readerFeatures": protocol.reader_features, "writerFeatures": protocol.writer_features}
    require_protocol(table, asked | features)
    odd = [
        f"{name} = {known.configuration[name]}" for name in FOREIGN if known.configuration.get(name) in FOREIGN[name]
    ]
    odd += [f"an invariant of {f['name']}" for f in stored(handle).values() if "delta.invariants" in f["metadata"]]
    if odd:
        raise SchemasDiffer(
            f"{table}: another writer gave the table {' and '.join(odd)}, which this engine does not write. Nothing "
            f"was written to it; undo that"
        )
    if (has := (*known.partition_columns,)) != (wanted := lake.partitions[table]):
        raise SchemasDiffer(
            f"{table} is declared to be partitioned by {_listed(wanted)}, and in the lake it is by {_listed(has)}: its "
            f"files would all be others. Nothing was written; what to do: take the change of partition_by back, "
            f"or `orchestrate.py rebuild`, which makes the lake again from its archive as it is declared"
        )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "nothing"


def stored(handle: "DeltaTable") -> dict[str, delta.Action]:
    """Column -> it, as the schema of an open table has it."""
    return {column["name"]: column for column in json.loads(handle.schema().to_json())["fields"]}


def plan(lake: "Lake", table: str, handle: "DeltaTable") -> tuple[Move | None, str | None]:
    """What has to become of a table's columns, None when nothing has; or why it cannot, in words.

    `handle`: on its newest version. Raises SchemasDiffer as `require_ours`.
    """
    require_ours(lake, table, handle)
    here = stored(handle)
    after, wrong, rewrites, defaults = dict(here), [], False, {}
    for column in declared(lake)[table]:
        name, wanted = column["name"], delta.name_of(column["type"])
        if name not in here:
            default = lake.defaults[table].get(name)
            wrong += _not_added(column, handle, default)
            after[name] = column
            if default is not None:
                defaults[name] = default
            continue
        has = delta.name_of(here[name]["type"])
        if has != wanted and not widens(here[name]["type"], column["type"]):
            wrong.append(f"{name} is declared as {wanted} and {has} in the table")
        elif here[name]["nullable"] and not column["nullable"] and (nulls := _nulls(handle, name)):
            wrong.append(f"{name} is declared as never null and null in {nulls:,} rows of the table")
        rewrites |= has != wanted
        after[name] = here[name] | {"type": column["type"], "nullable": column["nullable"]}
    for name in here.keys() - lake.columns[table].keys():
        after[name] = here[name] | {"nullable": True}
    if wrong:
        return None, f"{table}: {'; '.join(wrong)}"
    if after == here:
        return None, None
    return Move([*after.values()], rewrites or bool(defaults), defaults), None


def _not_added(column: delta.Action, handle: "DeltaTable", default: Any) -> list[str]:
    """Why a column cannot be added to a table, in words."""
    name, wanted = column["name"], delta.name_of(column["type"])
    if alike := [other for other in stored(handle) if other.lower() == name.lower()]:
        return [f"{name} is declared and {alike[0]} in the table, and Delta does not tell small letters from capitals"]
    if column["nullable"] or default is not None or not (rows := delta.file_stats(handle)[1]):
        return []
    needs = f"its {rows:,} rows there need it to be nullable or to have a default"
    return [f"{name} is declared as {wanted} and missing in the table: {needs}"]


def _nulls(handle: "DeltaTable", name: str) -> int:
    """How many rows of a table are null in a column: from the log, or where it does not say, from the files."""
    actions = delta.live(handle)
    counts = actions[f"null_count.{name}"].to_pylist() if f"null_count.{name}" in actions.column_names else [None]
    if None not in counts:
        return sum(counts)
    return int(pl.scan_delta(handle).select(pl.col(name).null_count()).collect().item())


def widens(has: str | delta.Action, wanted: str | delta.Action) -> bool:
    """Whether a type of Delta's schema holds each value of another, unchanged: a larger number of the same kind, or a
    struct with more fields."""
    if isinstance(has, str) and isinstance(wanted, str):
        return wanted in WIDER.get(has, ()) or _widens_decimal(has, wanted)
    if not isinstance(has, dict) or not isinstance(wanted, dict) or has["type"] != wanted["type"]:
        return False
    if has["type"] == "array":
        inner = has["elementType"]  # one that is not nested stays as it is
        nested = isinstance(inner, dict) and widens(inner, wanted["elementType"])
        return has["containsNull"] == wanted["containsNull"] and nested
    if has["type"] != "struct":
        return False
    before, after = ({inner["name"]: inner for inner in struct["fields"]} for struct in (has, wanted))
    added = after.keys() - before.keys()
    return (
        before.keys() <= after.keys()
        and all(after[name]["nullable"] for name in added)
        and all(_same_or_more(inner, after[name]) for name, inner in before.items())
    )


def _same_or_more(has: delta.Action, wanted: delta.Action) -> bool:
    """Whether a field of a struct is the same in another one, but for fields of its own that may be more."""
    same = delta.name_of(has["type"]) == delta.name_of(wanted["type"])
    nested = isinstance(has["type"], dict) and widens(has["type"], wanted["type"])
    return has["nullable"] == wanted["nullable"] and (same or nested)


def _widens_decimal(has: str, wanted: str) -> bool:
    to = DECIMAL.fullmatch(wanted)
    if not to:
        return False
    precision, scale = int(to[1]), int(to[2])
    if has in DIGITS:
        return precision - scale >= DIGITS[has]
    of = DECIMAL.fullmatch(has)
    return bool(of) and scale >= int(of[2]) and precision - scale >= int(of[1]) - int(of[2])  # type: ignore[index]


def column(name: str, has: str | delta.Action | None, dtype: "DataType", default: Any = None) -> pl.Expr:
    """A declared column of a version in which it has the Delta type `has`: None where it is not there yet."""
    if has is None:
        return pl.lit(pl.Series([default], dtype=dtype)).first().alias(name)
    return pl.col(name).cast(dtype) if widens(has, delta.type_of(dtype)) else pl.col(name)


def refusal(wrong: list[str]) -> str:
    """What is said of tables that cannot become what they are declared to be."""
    return (
        f"the lake's tables are not as they are declared: {'. '.join(wrong)}. Nothing was written to them, their files "
        f"wait; what to do: {REMEDY}"
    )
