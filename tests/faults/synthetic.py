"""A made-up month of runs: every stage at its real cadence, about one run in a hundred bad, the same for a seed."""

import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from etl.runs import index
from etl.runs.record import RunRecord
from etl.storage import Root

DAYS, END = 30, datetime(2026, 3, 31, tzinfo=UTC)  # 131,880 runs
CADENCE_S = {"generate": 30, "preprocess": 60, "compact": 1800, "query": 3600, "train": 21600}
TYPICAL_S = {"generate": 1.2, "preprocess": 2.5, "compact": 5, "query": 8, "train": 12}
NOOP_SHARE = {"generate": 0, "preprocess": 0.05, "compact": 0.2, "query": 0, "train": 0.1}
BAD = {"failed": 50, "check_failed": 20, "timed_out": 15, "killed": 10, "cancelled": 5}  # per cent of the bad ones
# bytes of report.html, report.ipynb and run.json, as measured on the notebooks
REPORT_BYTES = {
    "generate": (37_800, 32_300, 3_400),
    "preprocess": (40_200, 37_200, 3_400),
    "compact": (41_700, 40_000, 3_100),
    "query": (303_400, 356_400, 6_300),
    "train": (55_200, 45_100, 3_900),
}
EARLY_BYTES = (24_200, 12_000, 3_400)  # of a run that failed in one of its first cells
CARD_BYTES = (3_000, 2_000, 500)  # more in one that failed in one of its last: the card, the stack, the last minute
EPISODE = 2  # bad runs in a row, on average: a retry, or the same trouble a tick later
FILES = ("report.html", "report.ipynb", "run.json")
LINKS = 30_000  # names that one file may have; ext4 ends at 65,000


def month(seed: int, days: int = DAYS, bad_share: float = 0.01, end: datetime = END) -> list[RunRecord]:
    """The runs of `days` days before `end`, in the order they ended: 4,396 a day."""
    rng = random.Random(seed)
    made = (record for stage in CADENCE_S for record in _runs_of(stage, rng, days, bad_share, end))
    return sorted(made, key=lambda record: record.ended_at)


def _runs_of(stage: str, rng: random.Random, days: int, bad_share: float, end: datetime) -> Iterator[RunRecord]:
    headings = ("Read", "Transform", "Look", "Check", "Write", "What was written")
    state = "ok"
    for back in range(days * 86_400, 0, -CADENCE_S[stage]):
        scheduled = end - timedelta(seconds=back)
        bad_chance = 1 - 1 / EPISODE if state in BAD else bad_share / (1 - bad_share) / EPISODE
        state = "noop" if rng.random() < NOOP_SHARE[stage] else "ok"
        if rng.random() < bad_chance:
            [state] = rng.choices([*BAD], [*BAD.values()])
        seconds = round(TYPICAL_S[stage] * rng.lognormvariate(0, 0.3), 3)
        started = scheduled + timedelta(milliseconds=rng.randrange(100, 900))
        run_id = f"{stage}-{scheduled:%Y%m%dT%H%M%S}-{rng.randrange(16**6):06x}"
        rows = rng.randrange(500, 5000)
        yield RunRecord(
            stage=stage,
            run_id=run_id,
            root="/data/etl",
            scheduled_for=scheduled.isoformat(),
            attempt=1,
            parameters={"root": "/data/etl", "run_id": run_id, "scale": 0.1, "slices": 288, "max_ticks": 8},
            origins=dict.fromkeys(("scale", "slices", "max_ticks"), f"params/{stage}.yml:7"),
            report=f"reports/{stage}/{scheduled:%Y-%m-%d}/{run_id}",
            host="here",
            started_at=started.isoformat(timespec="milliseconds"),
            ended_at=(started + timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
            seconds=seconds,
            state=state,
            reason={"ok": "", "noop": "no new files"}.get(state, "ValueError: line 17 of orders-00000123.json"),
            metrics={"rows": rows, "files": 2, "bytes": rows * 310},
            checks=[{"name": "every row is in or refused", "ok": True, "detail": f"{rows:,} rows"}],
            versions_read={"orders": back // 60},
            provenance={"git_commit": "0ab1fca9", "git_dirty": False, "python": "3.11.2"},
            cells=[{"heading": name, "state": "ok", "seconds": round(rng.random(), 3)} for name in headings],
            receipt={"wall_s": seconds, "cpu_s": round(seconds * 0.8, 2), "peak_memory_mb": rng.randrange(200, 400)},
        )


def write_index(root: Root, records: list[RunRecord], recent: int = 60) -> None:
    """The index as a compaction leaves it, and `recent` rows on top, each appended as its run ended."""
    from deltalake import DeltaTable, write_deltalake

    url, old, options = root.url_of(index.TABLE), records[: len(records) - recent], root.storage_options
    for at in range(0, len(old), 20_000):
        rows = index.frame(old[at : at + 20_000])
        write_deltalake(url, rows, mode="append", configuration=index.PROPERTIES, storage_options=options)
    DeltaTable(url, storage_options=options).optimize.compact(target_size=128_000_000)
    for record in records[len(old) :]:
        index.append(root, record)


def report_bytes(record: RunRecord) -> tuple[int, ...]:
    """Of report.html, report.ipynb and run.json; half of the bad runs failed early."""
    usual = REPORT_BYTES[record.stage]
    if record.ok:
        return usual
    return EARLY_BYTES if record.metrics["rows"] % 2 else tuple(map(sum, zip(usual, CARD_BYTES, strict=True)))


def write_reports(root: Root, records: list[RunRecord], templates: Path) -> None:
    """A folder a report, of the usual sizes; its files are links to a few in `templates`, on the same disk."""
    templates.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        folder = Path(root.url) / record.report
        os.makedirs(folder)
        for name, size in zip(FILES, report_bytes(record), strict=True):
            template = templates / f"{size}-{number // LINKS}"
            if not template.exists():
                template.write_bytes(random.Random(size).randbytes(size))
            os.link(template, folder / name)
