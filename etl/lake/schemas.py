"""Whether the lake's tables have the columns that are declared, and what to do when one has not."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from etl import delta
from etl.lake.table import RESCUED, TEXT

if TYPE_CHECKING:
    from etl.lake.lake import Lake


class SchemasDiffer(RuntimeError):
    """The lake's tables do not have the columns that are declared; nothing was written."""


def declared(lake: "Lake") -> dict[str, dict[str, str]]:
    """Table -> column -> type, as `delta.columns_of` has it, as they are declared."""
    return {
        table: {name: delta.name_of(delta.type_of(dtype)) for name, dtype in columns.items()}
        for table, columns in lake.columns.items()
    }


def fingerprint(columns: dict[str, str]) -> str:
    """The same for the same columns and types, in any order."""
    return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:16]


def difference(lake: "Lake", table: str, stored: dict[str, str]) -> str | None:
    """Where a table's columns, as `delta.columns_of` has them, are not the declared ones, in words; None nowhere."""
    wanted, differ = declared(lake)[table], []
    for name in dict.fromkeys([*wanted, *stored]):
        if wanted.get(name) != stored.get(name):
            here = f"declared as {wanted[name]}" if name in wanted else "not declared"
            differ.append(f"{name} is {here} and {stored.get(name, 'missing')} in the table")
    return f"{table}: {'; '.join(differ)}" if differ else None


def remedy(lake: "Lake", table: str, stored: dict[str, str]) -> str:
    """What to do about a table whose columns are not the declared ones."""
    if declared(lake)[table].items() - stored.items() == {(RESCUED, delta.type_of(TEXT))}:
        return "made by an older release: end `up`, then `orchestrate.py rebuild`"
    return "a table cannot change its columns yet: take the change of its declaration back"


def check(lake: "Lake", pointer: dict[str, Any] | None) -> None:
    """Raise SchemasDiffer when a table of the lake does not have the declared columns.

    Only a table whose columns the pointer does not know to be these is opened, so nearly always none.
    """
    known, versions = ((pointer or {}).get(what, {}) for what in ("schemas", "tables"))
    differences, remedies = [], []
    for table, wanted in lake.fingerprints.items():
        if known.get(table) == wanted or not lake.root.names(f"lake/{table}/_delta_log"):
            continue
        stored = delta.columns_of(lake.table(table, versions.get(table)))
        if differs := difference(lake, table, stored):
            differences.append(differs)
            remedies.append(remedy(lake, table, stored))
    if differences:
        raise SchemasDiffer(refusal(differences, remedies[0]))


def refusal(differences: list[str], what_to_do: str) -> str:
    what = ". ".join(differences)
    return f"the lake's tables are not as they are declared: {what}. Nothing was written; what to do: {what_to_do}"
