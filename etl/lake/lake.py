"""The lake under one root, with the tables that a project declares: what notebooks, commands and readers hold."""

import hashlib
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from etl.lake import branch as branches
from etl.lake import compaction, doctor, ingest, landing, promotion, quarantine, retention, schemas
from etl.lake.backup import backup, restore
from etl.lake.rebuild import rebuild
from etl.lake.snapshot import published, snapshot
from etl.lake.table import LEDGER, LEDGER_KEY, QUARANTINE, QUARANTINE_KEY, DataType, Table
from etl.storage import Root

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")


class Lake:
    """Made once, from a root's text. A project says in a subclass which `tables` it has, and which stages write them.

    What can be done with it is a function of the module whose job it is; its first parameter is the lake.
    """

    tables: ClassVar[Mapping[str, Table]] = {}
    ingested_by: ClassVar[str] = "preprocess"
    compacted_by: ClassVar[str] = "compact"
    beside: ClassVar[Collection[str]] = ()  # names under landing/ that are no input, as what a source remembers
    # a pattern of paths under landing/, of which the first group is a whole number: files come in its order, and those
    # that have the same one in one batch, where they are not too many; without one the oldest come first
    sequence: ClassVar[str | None] = None

    def __init__(self, root: "str | Root"):
        self.root = Root.at(root)
        self.finished: int | None = None  # the last batch that was ended with it

    def __eq__(self, other: object) -> bool:
        """The same tables under the same root: by this snapshots are compared."""
        return type(other) is type(self) and other.root.url == self.root.url

    def __hash__(self) -> int:
        return hash((type(self), self.root.url))

    def at(self, root: "str | Root") -> Self:
        """A lake of the same tables under another root."""
        return type(self)(root)

    def plain(self) -> "Lake":
        """The same tables under the same root, for a process that does not have the project."""
        plain = Lake(self.root)
        vars(plain).update(tables=self.tables, ingested_by=self.ingested_by, compacted_by=self.compacted_by)
        return plain

    @cached_property
    def columns(self) -> dict[str, dict[str, DataType]]:
        """Table -> its columns as they are stored; `quarantine` and the ledger, `files`, are among the tables."""
        return self._with_ours({name: table.stored for name, table in self.tables.items()}, QUARANTINE, LEDGER)

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Table -> the columns that name a row."""
        return self._with_ours({name: table.key for name, table in self.tables.items()}, QUARANTINE_KEY, LEDGER_KEY)

    @cached_property
    def sorted_by(self) -> dict[str, tuple[str, ...]]:
        """Table -> the columns by which its compacted files are sorted."""
        return self.keys | {name: table.cluster_by for name, table in self.tables.items() if table.cluster_by}

    @cached_property
    def partitions(self) -> dict[str, tuple[str, ...]]:
        """Table -> the columns by which it is partitioned."""
        return self._with_ours({name: table.partitions for name, table in self.tables.items()}, (), ())

    @cached_property
    def required(self) -> dict[str, tuple[str, ...]]:
        """Table -> the columns that are never null."""
        of_ledger = tuple(name for name in LEDGER if name not in ("rows", "refused"))
        return self._with_ours({name: table.required for name, table in self.tables.items()}, QUARANTINE_KEY, of_ledger)

    @staticmethod
    def _with_ours(of_tables: dict[str, T], quarantine: T, files: T) -> dict[str, T]:
        return of_tables | {"quarantine": quarantine, "files": files}

    def upserts(self, table: str) -> bool:
        """Whether of a table only the newest row of a key counts."""
        return table in self.tables and self.tables[table].upserts

    def sequence_of(self, path: str) -> int | None:
        """The number by which a file comes in turn, from its path below landing/; None when it has none."""
        match = re.search(self.sequence, path) if self.sequence else None
        return int(match[1]) if match else None

    @cached_property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Table -> column -> what stands where a row has no value, for the columns that have such a default."""
        given = {t: {n: c.default for n, c in table.fields.items()} for t, table in self.tables.items()}
        of_tables = {t: {n: value for n, value in of.items() if value is not None} for t, of in given.items()}
        return self._with_ours(of_tables, {}, {})

    @cached_property
    def declaration(self) -> str:
        """What stands for all that is declared of the tables, the rules of their rows too."""
        return hashlib.sha256(repr([*self.tables.values()]).encode()).hexdigest()[:16]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Table -> what stands for its declared columns, their types, what may be null, and the partitions."""
        return {
            table: schemas.fingerprint(fields, self.partitions[table])
            for table, fields in schemas.declared(self).items()
        }

    def table(self, name: str, version: int | None = None) -> "DeltaTable":
        """A handle on a table, at its newest version when none is given: for its writers. Readers take `snapshot`."""
        return self.root.table(f"lake/{name}", version)

    snapshot = snapshot
    published = published
    next_batch = ingest.next_batch
    read = staticmethod(ingest.read)
    commit = staticmethod(ingest.commit)
    summary = staticmethod(ingest.summary)
    unfit = staticmethod(ingest.unfit)
    batch_chart = staticmethod(ingest.chart)
    drain = ingest.drain
    survey = compaction.survey
    compact = compaction.compact
    compaction_chart = staticmethod(compaction.chart)
    prune = retention.prune
    unmatched = landing.unmatched
    idle = landing.idle
    blocked = ingest.blocked
    refused_files = quarantine.refused_files
    refused_lines = quarantine.refused_lines
    refused = quarantine.overview
    find_refused = quarantine.find
    retry = quarantine.retry
    promote = promotion.promote
    propose = promotion.propose
    rebuild = rebuild
    branch = branches.branch
    backup = backup
    restore = restore
    examine = doctor.examine
    look = doctor.look
