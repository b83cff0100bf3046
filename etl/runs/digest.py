"""A day of a root's runs on a page: how long the stages took, what failed and how often, what was out of the ordinary.

Made from the index of runs alone, by one read. A run is of the day, in UTC, in which it started.
"""

import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from etl.figures import shortened
from etl.runs import index
from etl.runs.failures import BAD, Group, groups
from etl.storage import Root

if TYPE_CHECKING:
    import polars as pl

SLICES = 48  # of a day, for the sparklines: half hours
FAR, FAR_S = 3, 1.0  # times as long as usual, and seconds more: a run that is out of the ordinary
OUTLIERS, REASON = 10, 300  # that are named; characters of a reason
NO_REASON = "no reason is known"
COST = "cost_usd"  # in a run's receipt, where its machine has a price
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class StageDay:
    """A stage's runs of a day. `p50_s`, `p99_s`: seconds of those that were ok, None without one; `spark_s`: the mean
    seconds of each half hour's; `rows`: those that its runs recorded, None where none did; `cost_usd` likewise."""

    stage: str
    runs: int
    bad: int
    cancelled: int
    p50_s: float | None
    p99_s: float | None
    spark_s: list[float | None]
    rows: int | None
    cpu_s: float | None
    cost_usd: float | None


@dataclass(frozen=True)
class Outlier:
    """A run that took far longer than its stage's median of the day."""

    run_id: str
    stage: str
    started_at: datetime
    seconds: float
    usual_s: float


@dataclass(frozen=True)
class Digest:
    """A day. `stages` in the order in which they first ran, `failures` the most frequent first."""

    day: date
    stages: list[StageDay]
    outliers: list[Outlier]
    failures: list[Group]

    @property
    def sentence(self) -> str:
        """All of it in one."""
        runs, bad = sum(stage.runs for stage in self.stages), sum(stage.bad for stage in self.stages)
        if not runs:
            return "No stage ran."
        slow = f"; {_count(len(self.outliers), 'run')} took far longer than usual" if self.outliers else ""
        failed = f"{_count(bad, 'run')} failed" if bad else "none failed"
        return f"{_count(runs, 'run')} of {_count(len(self.stages), 'stage')}, {failed}{slow}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def of_day(root: Root, day: date | None = None) -> Digest:
    """The runs of a day, today when it is None."""
    import polars as pl

    start = datetime.combine(day or datetime.now(UTC).date(), datetime.min.time(), UTC)
    started = pl.col("started_at")
    numbers = {
        "rows": pl.col("metrics").str.json_path_match("$.rows"),
        "cpu_s": pl.col("receipt").str.json_path_match("$.cpu_s"),
        COST: pl.col("receipt").str.json_path_match(f"$.{COST}"),
    }
    runs = (
        index.scan(root)
        .filter(started >= start, started < start + timedelta(days=1))
        .select(
            *("run_id", "stage", "state", "reason", "started_at", "seconds"),
            *(number.cast(pl.Float64, strict=False).alias(name) for name, number in numbers.items()),
            slice=((started - start).dt.total_seconds() * SLICES // 86_400).cast(pl.Int64),
        )
        .sort("started_at", "run_id")
        .collect()
    )
    parts = {str(name): part for (name,), part in runs.group_by("stage", maintain_order=True)}
    stages = [_stage_day(name, part) for name, part in parts.items()]
    usual = {stage.stage: stage.p50_s for stage in stages}
    ok = [run for run in runs.to_dicts() if run["state"] == "ok"]
    far = [(run, median) for run in ok if (median := usual[run["stage"]]) is not None and _is_far(run, median)]
    named = [Outlier(run["run_id"], run["stage"], run["started_at"], run["seconds"], median) for run, median in far]
    named.sort(key=lambda run: run.seconds / max(run.usual_s, 0.01), reverse=True)
    failed = sorted(groups(runs.to_dicts()), key=lambda group: -group.count)
    return Digest(start.date(), stages, named[:OUTLIERS], failed)


def _is_far(run: dict[str, Any], usual_s: float) -> bool:
    return bool(run["seconds"] > FAR * usual_s and run["seconds"] > usual_s + FAR_S)


def _stage_day(stage: str, runs: "pl.DataFrame") -> StageDay:
    import polars as pl

    ok = runs.filter(state="ok")["seconds"]
    means = dict(runs.group_by("slice").agg(pl.col("seconds").mean()).iter_rows())
    sums = {name: float(runs[name].sum()) if runs[name].count() else None for name in ("rows", "cpu_s", COST)}
    return StageDay(
        stage,
        runs.height,
        runs.filter(pl.col("state").is_in(BAD)).height,
        runs.filter(state="cancelled").height,
        ok.quantile(0.5, "linear"),
        ok.quantile(0.99, "linear"),
        [means.get(at) for at in range(SLICES)],
        None if (rows := sums["rows"]) is None else int(rows),
        sums["cpu_s"],
        sums[COST],
    )


# --- as a page for mail ---

_CELL = "padding:4px 12px 4px 0;border-bottom:1px solid #d5d9e0;vertical-align:top"
_FAINT = "color:#555d68;font-size:13px;overflow-wrap:anywhere"
_FONT = "font-family:Helvetica,Arial,sans-serif;font-size:14px;color:#101418"


def spark(values: list[float | None]) -> str:
    """A sparkline of characters; where there is no value a dot."""
    most = max((value for value in values if value is not None), default=0) or 1
    return "".join("·" if value is None else BLOCKS[round(7 * max(value, 0) / most)] for value in values)


def as_html(digest: Digest, title: str, link: Callable[[str], str | None] = lambda run_id: None) -> str:
    """The day as a page that mail programs show: tables with styles of their own. `link`: where a run's report is."""

    def run(run_id: str) -> str:
        url = link(run_id)
        name = html.escape(run_id)
        return f'<a href="{html.escape(url)}" style="color:#1d5fa8">{name}</a>' if url else name

    stages = [
        [
            html.escape(stage.stage),
            f"{stage.runs:,}",
            _alarming(stage.bad),
            *(_seconds(value) for value in (stage.p50_s, stage.p99_s)),
            f'<span style="font-family:monospace;letter-spacing:-1px">{spark(stage.spark_s)}</span>',
            "–" if stage.rows is None else f"{stage.rows:,}",
            _seconds(stage.cpu_s),
            "–" if stage.cost_usd is None else f"{stage.cost_usd:,.2f}",
        ]
        for stage in digest.stages
    ]
    failures = [
        [
            f"{each.count:,}",
            f"{html.escape(each.stage)}<br>{html.escape(each.state.replace('_', ' '))}",
            f'<div style="overflow-wrap:anywhere">{html.escape(shortened(each.reason or NO_REASON, REASON))}</div>'
            f'<div style="{_FAINT}">{each.first_at:%H:%M} to {each.last_at:%H:%M}, last: {run(each.run_id)}</div>',
        ]
        for each in digest.failures
    ]
    outliers = [
        [f"{each.started_at:%H:%M:%S}", html.escape(each.stage), _seconds(each.seconds), _seconds(each.usual_s)]
        + [f'<span style="overflow-wrap:anywhere">{run(each.run_id)}</span>']
        for each in digest.outliers
    ]
    parts = [
        ("Stages", ["Stage", "Runs", "Failed", "p50", "p99", "Seconds over the day", "Rows", "CPU", "US$"], stages),
        ("What failed", ["Times", "Stage", "Why"], failures),
        ("Far longer than usual", ["UTC", "Stage", "Took", "Usually", "Run"], outliers),
    ]
    name = f"{html.escape(title)}, {digest.day:%-d %B %Y}"
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><body style="margin:24px;background:#ffffff;{_FONT}">'
        f'<h1 style="font-size:22px;margin:0 0 8px">{name}</h1>'
        f'<p style="margin:0 0 16px">{html.escape(digest.sentence)} Times are in UTC.</p>'
    )
    return head + "".join(_part(*part) for part in parts if part[2])


def _part(heading: str, names: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th style="{_CELL};text-align:left">{name}</th>' for name in names)
    lines = ["".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f'<table style="border-collapse:collapse;{_FONT}"><tr>{head}</tr>{body}</table>'
    scrolls = f'<div style="overflow-x:auto">{table}</div>'  # on a phone; the page does not
    return f'<h2 style="font-size:17px;margin:24px 0 8px">{heading}</h2>{scrolls}'


def _alarming(count: int) -> str:
    return f'<b style="color:#a9261d">{count:,}</b>' if count else "0"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}&nbsp;s"


def as_json(digest: Digest) -> dict[str, Any]:
    """For programs."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(digest) | {"sentence": digest.sentence}, default=str))
    return document
