"""What columns a table has, which it is declared to have, and what has to become of the one to be the other."""

import hashlib
import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from etl import delta

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from etl.lake.lake import Lake
    from etl.lake.table import DataType

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
REMEDY = "take the change of its declaration back, or give the column another name"


class SchemasDiffer(RuntimeError):
    """The lake's tables are not as they are declared, and cannot become it; nothing was written."""


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


def fingerprint(fields: list[delta.Action]) -> str:
    """The same for the same columns, types and what may be null, in any order."""
    said = sorted((column["name"], delta.name_of(column["type"]), column["nullable"]) for column in fields)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def check(lake: "Lake", pointer: dict[str, Any] | None, but: Container[str] = ()) -> list[str]:
    """Raise SchemasDiffer when a table of the lake is not as it is declared and cannot become it, or was changed by
    others to what this engine does not write. Returns the tables of which that had to be looked at.

    Only a table is opened whose columns the pointer does not know, or that others changed since, so nearly always none.
    `but`: tables that are known to be as they are declared.
    """
    wrong, tables = [], _unsettled(lake, pointer, [table for table in lake.columns if table not in but])
    for table in tables:
        _, why = plan(lake, table, lake.table(table))
        wrong += [why] if why else []
    if wrong:
        raise SchemasDiffer(refusal(wrong))
    return tables


def _unsettled(lake: "Lake", pointer: dict[str, Any] | None, tables: list[str]) -> list[str]:
    """Those of the tables that there are and that are not known to be as they are declared.

    Of the others only the commits since the published version are looked at, which nearly always are none.
    Raises SchemasDiffer where one of them asks for what this engine does not write.
    """
    known, versions = ((pointer or {}).get(what, {}) for what in ("schemas", "tables"))

    def looked(table: str) -> bool:
        touched = table in versions and _touched(lake, table, versions[table])
        unknown = known.get(table) != lake.fingerprints[table] or table not in versions
        return touched or (unknown and bool(lake.root.names(delta.log_of(f"lake/{table}"))))

    return [table for table, asked in zip(tables, lake.root.each(looked, tables), strict=True) if asked]


def _touched(lake: "Lake", table: str, after: int) -> bool:
    """Whether a commit after the version says something of the table's columns or protocol."""
    touched = False
    for _, lines in delta.since(lake.root, f"lake/{table}", after):
        for line in lines:
            require_protocol(table, line.get("protocol", {}))
            touched |= "protocol" in line or "metaData" in line
    return touched


def require_protocol(table: str, protocol: delta.Action) -> None:
    """Raise SchemasDiffer when a table's `protocol`, as its log has it, asks for what this engine does not write."""
    features = {*(protocol.get("readerFeatures") or ()), *(protocol.get("writerFeatures") or ())}
    versions = protocol.get("minReaderVersion", 1), protocol.get("minWriterVersion", 2)
    if features or versions[0] > READER_VERSION or versions[1] > WRITER_VERSION:
        named = f", with {', '.join(sorted(features))}" if features else ""
        raise SchemasDiffer(
            f"{table}: another writer gave the table Delta's protocol {versions[0]} to read and {versions[1]} to write"
            f"{named}; this engine reads {READER_VERSION} and writes {WRITER_VERSION}, without such features. Nothing "
            f"was written; what to do: undo what was enabled, as by `restore` of that writer to the version before"
        )


def require_ours(table: str, handle: "DeltaTable") -> None:
    """As `require_protocol`, of an open table, and for what its properties and columns ask of writers."""
    protocol, known = handle.protocol(), handle.metadata()
    asked = {"minReaderVersion": protocol.min_reader_version, "minWriterVersion": protocol.min_writer_version}
    features = {"readerFeatures": protocol.reader_features, "writerFeatures": protocol.writer_features}
    require_protocol(table, asked | features)
    odd = [
        f"{name} = {known.configuration[name]}" for name in FOREIGN if known.configuration.get(name) in FOREIGN[name]
    ]
    odd += [f"partitions by {', '.join(known.partition_columns)}"] * bool(known.partition_columns)
    odd += [f"an invariant of {f['name']}" for f in stored(handle).values() if "delta.invariants" in f["metadata"]]
    if odd:
        raise SchemasDiffer(
            f"{table}: another writer gave the table {' and '.join(odd)}, which this engine does not write. Nothing "
            f"was written; what to do: undo that"
        )


def stored(handle: "DeltaTable") -> dict[str, delta.Action]:
    """Column -> it, as the schema of an open table has it."""
    return {column["name"]: column for column in json.loads(handle.schema().to_json())["fields"]}


def plan(lake: "Lake", table: str, handle: "DeltaTable") -> tuple[Move | None, str | None]:
    """What has to become of a table's columns, None when nothing has; or why it cannot, in words.

    `handle`: on its newest version. Raises SchemasDiffer as `require_ours`.
    """
    require_ours(table, handle)
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
    actions = pa.table(handle.get_add_actions(flatten=True))
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
        f"the lake's tables are not as they are declared: {'. '.join(wrong)}. Nothing was written; what to do: {REMEDY}"
    )
