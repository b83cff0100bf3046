"""A lake that was made again takes the place of the present one, by one swap of the pointer.

The new lake is whole in a folder beside the present one (`rebuilding-<fence>/lake`). Its tables' logs begin at a
version above all that the present tables have, so no file of one has the name of a file of the other, but for what is
told apart by its batch. Then the pointer is swapped for one that says `under`: from here on readers read the new lake
where it is, and whatever dies, whoever takes the writer's lease next first does what is left: what was before goes
beside as `lake-before-<time>`, the new files come into `lake/`, the pointer says `under` no more. Each of these steps
may be done again, also by a writer that was stopped meanwhile and comes too late: it brings the same bytes under the
same names, and removes only what was there before the swap, by a list that was written then.

A writer of before the swap that goes on too late holds versions that are below those of the new logs: its commits are
where nobody reads, and its pointer is not the one that is there.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from etl import delta
from etl.lake import snapshot
from etl.leases import Lease, LeaseLost
from etl.storage import Root, crash_point

if TYPE_CHECKING:
    from etl.lake.lake import Lake

SCRATCH = re.compile(r"rebuilding(?:-(\d+))?")
PLAN = "switch.json"
STEP = 1000  # versions: logs begin at a multiple, half of it or more above what was before


def folder_of(lease: Lease) -> str:
    """Where the holder of a lease makes a lake."""
    return f"rebuilding-{lease.fence}"


def scratch(lake: "Lake", lease: Lease) -> "Lake":
    """An empty lake there."""
    clear(lake.root, lease)
    return lake.at(lake.root.url_of(folder_of(lease)))


def clear(root: Root, lease: Lease) -> None:
    """Remove what rebuilds that died left, but of those that came after this lease. Only where nothing is `under`."""
    for name in root.names(""):
        match = SCRATCH.fullmatch(name)
        if match and int(match[1] or 0) <= lease.fence:
            root.remove_tree(name)


def begin(lake: "Lake", scratch: "Lake", lease: Lease, mark: str | None, least: int, before: str) -> None:
    """Have the pointer name the new lake, if it still has this mark. `least`: the number of the last batch of before;
    `before`: the folder for what was before. Raises LeaseLost, and nothing has changed then."""
    root = lake.root
    pointer = snapshot.read_pointer(scratch.root)
    assert pointer is not None, "its caller has seen that it is published"
    for table in pointer["tables"]:
        was = delta.newest_version(root, f"lake/{table}") or 0
        pointer["tables"][table] = (was + STEP // 2) // STEP * STEP + STEP
        about = {"run_id": pointer["run_id"], "stage": lake.ingested_by}
        delta.renumber(scratch.root, f"lake/{table}", pointer["tables"][table], about)
    there = root.files("lake")
    folder = folder_of(lease)
    root.write(f"{folder}/{PLAN}", json.dumps({"before": there, "folder": before}).encode())
    lease.require()
    pointer |= {"under": folder, "batch": max(pointer["batch"], least), "fence": lease.fence}
    crash_point("made again, not switched")
    if mark is not None:  # the others are copied once nobody writes to them any more
        root.copy([snapshot.POINTER], "lake", before)
    if root.replace(snapshot.POINTER, json.dumps(pointer, indent=1).encode(), mark) is None:
        root.remove_tree(before)
        raise LeaseLost("another run published while the lake was made again: run this one again")
    lease.about["batch"] = pointer["batch"]
    crash_point("switched")


def finish(root: Root, pointer: dict[str, Any], lease: Lease) -> dict[str, Any]:
    """Bring the new lake where lakes are; returns the pointer that names it there. Raises LeaseLost."""
    scratch = pointer["under"]
    plan = root.read_json(f"{scratch}/{PLAN}")
    if plan is None:
        raise LeaseLost("another run has put the new lake into its place: run this one again")
    made = {rel.removeprefix(f"{scratch}/") for rel in root.files(scratch)}
    made = {rel for rel in made if rel.startswith(("lake/", "refused/"))} - {snapshot.POINTER}
    before = {*plan["before"]} - {snapshot.POINTER}
    beside = {rel.removeprefix(plan["folder"]) for rel in root.files(plan["folder"])}
    left = {rel for rel in before & {*root.files("lake")} if rel.removeprefix("lake") not in beside}
    lease.require()
    root.copy(left, "lake", plan["folder"])
    crash_point("what was before is beside")
    for rels in _in_order(made):
        lease.require()
        root.copy([f"{scratch}/{rel}" for rel in rels], f"{scratch}/", "")
        crash_point("some of it is there")
    lease.require()
    root.remove_all(sorted(before - made))
    crash_point("what was before is gone")
    installed = {key: value for key, value in pointer.items() if key != "under"} | {"fence": lease.fence}
    snapshot.replace_pointer(root, pointer, installed)
    crash_point("switched and moved")
    root.remove_tree(scratch)
    return installed


def _in_order(rels: Iterable[str]) -> list[list[str]]:
    """Files before the logs that name them, and a log's hint, which says where it begins, at last."""

    def rank(rel: str) -> int:
        return 2 if rel.endswith(delta.LAST) else 1 if "/_delta_log/" in rel else 0

    return [[rel for rel in sorted(rels) if rank(rel) == n] for n in range(3)]
