"""What two writers of one Delta table do to each other: the reason for the pin of deltalake.

Two processes open a table at the same version; one commits, then the other, which does not know of it. Either the
second is rejected, or the rows are those of one after the other. An upgrade that doubles or revives rows fails here.
"""

import itertools
import multiprocessing

import duckdb
import pyarrow as pa
import pytest

ROWS = 1000
OPERATIONS = ("append", "compact", "overwrite", "delete", "delete all")


def serve(pipe) -> None:
    """A writer: takes ("open", url), then (operation, key of the rows it adds); answers what happened."""
    from deltalake import DeltaTable, write_deltalake
    from deltalake.exceptions import CommitFailedError

    table = None
    while (asked := pipe.recv())[0] != "end":
        what, value = asked
        try:
            match what:
                case "open":
                    table = DeltaTable(value)
                    table.version()
                case "append" | "overwrite":
                    write_deltalake(table, pa.table({"k": range(value, value + 50)}), mode=what)
                case "compact":
                    table.optimize.compact()
                case "delete":
                    table.delete(f"k < {ROWS // 2}")
                case "delete all":
                    table.delete()
            pipe.send("committed")
        except CommitFailedError:
            pipe.send("rejected")


def after(keys: list[int], operation: str, added: int) -> list[int]:
    new = list(range(added, added + 50))
    return {
        "append": keys + new,
        "compact": keys,
        "overwrite": new,
        "delete": [key for key in keys if key >= ROWS // 2],
        "delete all": [],
    }[operation]


@pytest.fixture(scope="module")
def writers():
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(context.Process(target=serve, args=(theirs,)))
        processes[-1].start()
    yield pipes
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(("end", None))
        process.join()


def told(pipe, *asked):
    pipe.send(asked)
    return pipe.recv()


@pytest.mark.parametrize("first,second", list(itertools.product(OPERATIONS, repeat=2)))
def test_two_writers_are_as_one_after_the_other(tmp_path, writers, first, second):
    from deltalake import DeltaTable, write_deltalake

    url, quarter = str(tmp_path / "table"), ROWS // 4
    for start in range(0, ROWS, quarter):
        write_deltalake(url, pa.table({"k": range(start, start + quarter)}), mode="append")
    for pipe in writers:
        told(pipe, "open", url)
    assert told(writers[0], first, 10_000) == "committed"
    outcome = told(writers[1], second, 20_000)
    base = list(range(ROWS))
    one = after(base, first, 10_000)
    allowed = (
        [one]
        if outcome == "rejected"
        else [after(one, second, 20_000), after(after(base, second, 20_000), first, 10_000)]
    )
    files = DeltaTable(url).file_uris()
    there = [key for (key,) in duckdb.sql(f"select k from read_parquet({files})").fetchall()] if files else []
    assert sorted(there) in [sorted(keys) for keys in allowed], f"{outcome}: {len(there)} rows"
