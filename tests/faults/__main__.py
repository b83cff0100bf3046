"""The fault campaign: what a notebook run promises, provoked in full numbers. `python tests/faults --help`."""

import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import Annotated

if not __package__:  # run as a folder: then that is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer  # noqa: E402
from faults import (
    alert_scenarios,
    answers,
    clustered,
    endings,
    epochs,
    hosts,
    kinds,
    lake_backups,
    lake_cadence,
    lake_crashes,
    lake_damage,
    lake_days,
    lake_fence,
    lake_files,
    lake_malformed,
    lake_model,
    lake_mutants,
    lake_older,
    lake_s3,
    lake_schema,
    loads,
    machines,
    month,
    power_cuts,
    readers,
    release_scenarios,
    replay_scenarios,
    schedules,
    service,
    slice_scenarios,
    under_prefect,
    untrusted,
    up_scenarios,
    workers,
)  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

# what; the function; how many, and how many with --small; of what
SCENARIOS = [
    ("deaths", endings.deaths, 6, 6, "ways to die"),
    ("hangs", endings.hangs, 4, 4, "ways to hang"),
    ("canary", untrusted.canary, 20, 5, "runs that show a secret"),
    ("kinds", kinds.kinds, len(kinds.KINDS), 15, "kinds of notebooks"),
    ("yamls", untrusted.yamls, 20, 20, "wrong and right values each"),
    ("hostile", untrusted.hostile, 100, 100, "names and values"),
    ("polled", loads.polled, 60, 6, "cells, read while they run"),
    ("tailed", loads.tailed, 60, 5, "lines, followed"),
    ("printed", loads.printed, 200, 3, "MB in one cell"),
    ("terminated", endings.terminated, 20, 1, "runners, SIGTERM"),
    ("killed", endings.killed, 20, 1, "runners, SIGKILL"),
    ("at once", loads.at_once, 200, 4, "runs, 8 at a time"),
    ("month", month.swept, 30, 1, "days of runs"),
    ("releases", release_scenarios.moving, 400, 6, "runs while releases move"),
    ("backfills", slice_scenarios.killed, 30, 4, "days, killed twice"),
    ("alerts", alert_scenarios.incidents, 20, 3, "incidents, told by two"),
    ("replays", replay_scenarios.replays_equal, 20, 2, "runs of query"),
    ("whence", replay_scenarios.whence_right, 20, 2, "runs of preprocess"),
    ("schedules", schedules.simulated_days, 100, 1, "times 72 hours over a night when clocks change"),
    ("draws", answers.draws, 200, 1, "draws of parameters for each of TPC-H's questions"),
    ("pieces", answers.in_pieces, 10, 1, "hundredths of scale 1, in as many pieces as scale 10, on Dask"),
    ("scale", answers.at_scales, 100, 1, "hundredths of scale 1, and two below, through the pipeline, both engines"),
    ("by hand", lake_malformed.by_hand, 50, 50, "malformed lines, and as many files"),
    ("generated", lake_malformed.generated, 2000, 100, "malformed files"),
    ("both ways", lake_malformed.both_ways, 100_000, 2_000, "odd lines, read the quick way and one by one"),
    ("any table", lake_malformed.any_table, 100_000, 1_000, "odd lines of tables with columns of all kinds, both ways"),
    ("any file", lake_files.any_file, 20_000, 150, "files of CSV and of Parquet with odd values, both ways"),
    ("interleaved", lake_model.interleaved, 1000, 1, "lakes, of files that come in every way, beside a model of them"),
    ("points", lake_crashes.at_every_point, 160, 1, "crashes of preprocess at named points"),
    ("points of compact", lake_crashes.at_every_point_of_compact, 80, 1, "crashes of compact at named points"),
    ("random", lake_crashes.at_random, 300, 2, "SIGKILLs of preprocess under load"),
    ("random compact", lake_crashes.at_random_compact, 100, 1, "SIGKILLs of compact under load"),
    ("overlapping", lake_crashes.overlapping, 40, 1, "times two of preprocess and two of compact at once"),
    ("clustered", clustered.clustered, 60, 1, "drivers and workers killed, where a cluster does the work"),
    ("disk full", lake_damage.disk_full, 30, 1, "full disks"),
    ("failing writes", lake_damage.failing_writes, 120, 1, "writes, syncs, renames and links that fail"),
    ("power cuts", power_cuts.power_cuts, 1000, 6, "losses of power"),
    ("damage", lake_damage.damaged_bytes, 120, 1, "damages of commit, checkpoint, manifest, pointer, data file"),
    ("lost replies", lake_s3.lost_replies, 40, 1, "batches in an object store"),
    ("schema under way", lake_schema.under_way, 200, 8, "batches of tables whose declaration changes"),
    ("stopped", lake_fence.stopped, 130, 1, "writers in an object store, stopped at named points and continued"),
    ("rebuilds", lake_fence.rebuilds_killed, 80, 1, "rebuilds, killed"),
    ("storms", lake_fence.storms, 100, 1, "times rebuild, preprocess and compact at once"),
    ("foreign", lake_fence.foreign, 60, 2, "times others write into our tables"),
    ("pointers", lake_fence.pointers, 20, 1, "pointers older than the tables"),
    ("pairs", lake_fence.pairs, 2400, 1, "pairs of crashes of preprocess and compact at named points"),
    ("superseded", lake_days.superseded, 10, 1, "days of batches, compactions and killed runs"),
    ("cadence", lake_cadence.cadence, 28_800, 60, "ticks at the default cadence, on a clock of their own"),
    ("older", lake_older.older, 4, 1, "lakes of earlier versions, continued"),
    ("backups", lake_backups.backups, 100, 2, "copies of a lake that goes on, each restored and continued"),
    ("mutants", lake_mutants.mutants, 20, 1, "safeguards taken out"),
    ("requests", service.generated, 5000, 60, "requests that the API's description allows, or just does not"),
    ("boundaries", service.boundaries, 100, 100, "requests at the ends of what may be asked, by hand, or fewer"),
    ("floods", service.floods, 100, 3, "hundredths of 1,100 half-open connections, and of other floods"),
    ("publishes", service.publishes, 400, 3, "models published or damaged under load"),
    ("epochs", epochs.epochs, 48, 6, "hours of the stream, of two scales, with a training every six"),
    ("cancelled", under_prefect.cancelled, 20, 2, "runs, cancelled in Prefect"),
    ("interrupted", under_prefect.interrupted, 20, 1, "times a process of up stopped or killed, or a database damaged"),
    ("frozen", up_scenarios.frozen, 120, 5, "seconds in which each process of up is stopped"),
    ("killed services", up_scenarios.killed_services, 20, 1, "kills of each service of up"),
    ("database", up_scenarios.database, 180, 5, "seconds of Prefect's database locked, and it damaged, deleted"),
    ("older deployments", up_scenarios.older, 60, 5, "seconds of up on Prefect's database of earlier versions"),
    ("two", up_scenarios.two, 60, 5, "seconds of two up on one server of Prefect's"),
    ("drafts", up_scenarios.drafts, 600, 20, "seconds of half edits while up runs a release"),
    ("workers", workers.same_states, 1, 1, "time all flows by both workers"),
    ("machines", machines.machines, 20, 1, "times machines lost, hung, refused, cancelled, asked otherwise"),
    ("hosts", hosts.hosts, 20, 2, "times a host of two killed or cut off, no disk between them"),
    ("up", under_prefect.whence_after_up, 10, 1, "minutes, then whence"),
]


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Of these scenarios; all when none is named.")] = None,
    small: Annotated[bool, typer.Option(help="Small numbers, as in the tests.")] = False,
    seed: Annotated[int | None, typer.Option(help="One that was printed; today's otherwise.")] = None,
):
    """Provoke every fault, print a table, and end with status 1 when something did not hold."""
    console = Console()
    seed = int(time.time()) % 10**6 if seed is None else seed
    if unknown := set(only or ()) - {name for name, *_ in SCENARIOS}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not among {', '.join(s[0] for s in SCENARIOS)}")
    chosen = [scenario for scenario in SCENARIOS if not only or scenario[0] in only]
    if not small and (missing := readers.fetch()):
        console.print(f"read by fewer: {missing} could not be had", markup=False)
    rows = []
    for name, scenario, full, few, what in chosen:
        n, began = few if small else full, time.monotonic()
        with console.status(f"{name}: {n} {what}"):
            try:
                passed, found = True, scenario(n, seed)
            except Exception as error:
                passed, found = False, f"{type(error).__name__}: {str(error)[:2000]}"
        row = (name, f"{n} {what}", str(seed), passed, f"{time.monotonic() - began:.0f}", found)
        rows.append((*row[:5], shorten(found, 200)))
        console.print("passed" if passed else "FAILED", *row[:3], f"{row[4]} s", found, markup=False, highlight=False)
    table = Table("what", "numbers", "seed", "", "seconds", "found", title="What was provoked", title_justify="left")
    for name, numbers, of, passed, seconds, found in rows:
        table.add_row(name, numbers, of, "[green]passed" if passed else "[bold red]FAILED", seconds, found)
    console.print(table)
    raise typer.Exit(0 if all(row[3] for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
