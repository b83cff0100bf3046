"""Scores: what the champion, and a shadow beside it, say of rows as they come, and how far that drifts.

A run scores what has come since the run before, up to the snapshot's time. The rows are in the Delta table `scores`,
beside the lake: a rebuild of that leaves them as they are. Each commit says in its transaction up to which time rows
are scored, and is the version after the one that was read, or none: the same run again, one that was killed, and two
at once score no row twice. What can be told of them by the hour is kept in one small file, for readers.
"""

import json
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl import delta
from etl.leases import LeaseLost
from etl.models import registry
from etl.storage import Damaged, Root, crash_point

if TYPE_CHECKING:
    from etl.lake.snapshot import Snapshot
    from etl.models.registry import Model, Spec

log = logging.getLogger(__name__)
TABLE, TOLD = "scores", "models/drift.json"
APP_ID = "scores"
TIME = pl.Datetime("us", "UTC")
FILE_ROWS = 1_000_000
UNNEEDED_HOURS = 24  # that a file stays which no version needs any more
BINS = registry.BINS
EPSILON = 1e-15  # of a probability to 0 and to 1, where its logarithm is taken
DRIFT: dict[str, Any] = {
    **{"hour": TIME, "model_id": pl.String, "alias": pl.String, "rows": pl.Int64},
    **{"predicted": pl.Float64, "psi": pl.Float64, "divergence": pl.Float64},
    **{"observed": pl.Float64, "gap": pl.Float64, "gap_error": pl.Float64},
}
CALIBRATION: dict[str, Any] = {
    **{"model_id": pl.String, "alias": pl.String},
    **{"predicted": pl.Float64, "observed": pl.Float64, "rows": pl.Int64},
}


@dataclass(frozen=True)
class Scored:
    """What the domain says of the rows that are scored.

    `table`: theirs; `time`: its column by which a row is due to be scored. Of a row: `outcome`, what is predicted, true
    or false; `known_at`, when that is known; `exact`, the true probability, where the domain knows it.
    """

    table: str
    time: str
    outcome: pl.Expr = field(repr=False)
    known_at: pl.Expr = field(repr=False)
    exact: pl.Expr = field(repr=False, default_factory=lambda: pl.lit(None, pl.Float64))


class Done(NamedTuple):
    """What a run scored: rows that are due after `since`, up to `until`, by all models; `version`: of the table."""

    rows: int
    since: datetime
    until: datetime
    version: int


def models(root: Root, spec: "Spec") -> "dict[str, Model]":
    """Alias -> the model that scores: the champion, and a shadow that can be used. Raises NoModel, ModelDamaged."""
    scoring = {registry.CHAMPION: registry.load_current(root, spec)}
    try:
        scoring[registry.SHADOW] = registry.verify(root, registry.SHADOW, spec)
    except registry.NoModel:
        pass
    except registry.ModelDamaged as error:  # `doctor` tells it
        log.warning("the shadow scores nothing: %s", error)
    return scoring


def score(
    snapshot: "Snapshot",
    scored: Scored,
    by: "Mapping[str, Model]",
    *,
    root: Root,
    run_id: str,
    hours: int,
    days_kept: int,
) -> Done | None:
    """Score what is due since the last time, by each of the models; None when nothing is.

    The first time that is what was due in the last `hours`. Rows that were due more than `days_kept` ago go. Raises
    LeaseLost when another run scores at once.
    """
    until, version = snapshot.as_of, delta.newest_version(root, TABLE)
    began, columns = until - timedelta(hours=hours), _columns(snapshot, scored)
    if version is None:
        about = {"run_id": run_id, "stage": TABLE}
        required = columns.keys() - {"exact", "outcome", "known_at"}
        delta.create_table(root, TABLE, columns, keys=required, properties=delta.PROPERTIES, about=about)
        version = 0
    since = scored_until(root) or began
    files, rows = [], 0
    for part in _parts(snapshot, scored, by, columns, since):
        files.append(delta.put(root, TABLE, f"{uuid.uuid4()}.parquet", part, changes=True))
        rows += part.height
    if not rows:
        return None
    crash_point("scores written, not committed")
    info = delta.commit_info("WRITE", {"operationParameters": {"mode": "Append"}, "run_id": run_id, "stage": TABLE})
    done = {"appId": APP_ID, "version": _micros(until), "lastUpdated": info["commitInfo"]["timestamp"]}
    lines = [info, {"txn": done}, *files, *_old(root, until - timedelta(days=days_kept))]
    if not delta.commit(root, TABLE, version + 1, lines):
        raise LeaseLost("another run scored the same rows meanwhile: run this one again")
    handle = root.table(TABLE)
    handle.vacuum(UNNEEDED_HOURS, dry_run=False, full=True)
    handle.cleanup_metadata()
    return Done(rows // len(by), since, until, version + 1)


def scored_until(root: Root) -> datetime | None:
    """Up to which time rows are scored; None before the first."""
    from deltalake.exceptions import TableNotFoundError

    try:
        micros = root.table(TABLE).transaction_version(APP_ID)
    except TableNotFoundError:
        return None
    return None if micros is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def _micros(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _columns(snapshot: "Snapshot", scored: Scored) -> dict[str, Any]:
    """The table's columns: the key of the row, and what is said of it. `version`: of the table that the row is in."""
    types, key = snapshot.lake.columns[scored.table], snapshot.lake.keys[scored.table]
    said = {"at": TIME, "model_id": pl.String, "alias": pl.String, "version": pl.Int64, "probability": pl.Float64}
    return {name: types[name] for name in key} | said | {"exact": pl.Float64, "outcome": pl.Boolean, "known_at": TIME}


def _parts(
    snapshot: "Snapshot", scored: Scored, by: "Mapping[str, Model]", columns: dict[str, Any], since: datetime
) -> Iterator[pl.DataFrame]:
    """The scores of all rows that are due, about FILE_ROWS at a time."""
    at, key = pl.col(scored.time), snapshot.lake.keys[scored.table]
    asked = [*next(iter(by.values())).spec.row]
    named = {*asked, *key, *(name for each in (scored.outcome, scored.known_at, scored.exact) for name in names(each))}
    where = (at > since) & (at <= snapshot.as_of)
    waiting, count = list[pl.DataFrame](), 0
    for piece in snapshot.pieces(scored.table, sorted(named | {scored.time}), where=where):
        said = {"exact": scored.exact, "outcome": scored.outcome, "known_at": scored.known_at}
        known = piece.select(*key, at=at, version=pl.lit(snapshot.versions[scored.table], pl.Int64), **said)
        for alias, model in by.items():
            probability = pl.Series(registry.predict(model.booster, model.spec.matrix(piece)))
            by_it = known.with_columns(model_id=pl.lit(model.model_id), alias=pl.lit(alias), probability=probability)
            waiting.append(by_it.select(pl.col(name).cast(dtype) for name, dtype in columns.items()))
        count += piece.height * len(by)
        if count >= FILE_ROWS:
            yield pl.concat(waiting)
            waiting, count = [], 0
    if count:
        yield pl.concat(waiting)


def names(expression: pl.Expr) -> list[str]:
    """The columns that an expression reads."""
    return expression.meta.root_names()


def _old(root: Root, limit: datetime) -> list[delta.Action]:
    """The lines that remove the files whose rows were all due before `limit`."""
    handle = root.table(TABLE)
    sizes = delta.sizes(handle)
    return [
        delta.remove(path, sizes[path], changes=True)
        for path, _, newest in delta.bounds(handle, "at")
        if newest is not None and newest < limit
    ]


def measure(root: Root, *, hours: int) -> None:
    """What the scores of the last `hours` say, for `drift` and `calibration`; where nothing was scored yet, nothing."""
    until = scored_until(root)
    if until is None:
        return
    since = (until - timedelta(hours=hours)).replace(minute=0, second=0, microsecond=0)
    sums = _sums(pl.scan_delta(root.table(TABLE)).filter(pl.col("at") >= since), until)
    told = {
        "until": until.isoformat(),
        "drift": _plain(_by_hour(sums, references(root, sums["model_id"].unique().to_list()))),
        "calibration": _plain(_calibrated(sums)),
    }
    root.write(TOLD, json.dumps(told).encode())


def _plain(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them; what is no number is null."""
    return [
        {
            name: value.isoformat()
            if isinstance(value, datetime)
            else None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in row.items()
        }
        for row in frame.to_dicts()
    ]


def references(root: Root, model_ids: Sequence[str]) -> dict[str, list[float]]:
    """Model id -> the shares of its predictions in BINS even parts of 0 to 1, when it was trained."""
    kept = {said["model_id"]: said.get("reference", []) for said in registry.stored(root)}
    return {name: kept[name] for name in model_ids if name in kept}


def _sums(scores: pl.LazyFrame, until: datetime) -> pl.DataFrame:
    """Sums over the rows of an hour that a model predicted about alike; all else is told from them."""
    p, exact = (pl.col(name).clip(EPSILON, 1 - EPSILON) for name in ("probability", "exact"))
    happened, is_known = pl.col("outcome").cast(pl.Float64), pl.col("known_at") <= until
    divergence = pl.col("exact") * (exact / p).log() + (1 - pl.col("exact")) * ((1 - exact) / (1 - p)).log()
    # the loss of the prediction above that of the true probability
    above = happened * (exact / p).log() + (1 - happened) * ((1 - exact) / (1 - p)).log()
    return (
        scores.group_by(
            pl.col("at").dt.truncate("1h").alias("hour"),
            "model_id",
            "alias",
            (pl.col("probability") * BINS).floor().clip(0, BINS - 1).cast(pl.Int32).alias("bin"),
        )
        .agg(
            rows=pl.len().cast(pl.Int64),
            known=is_known.sum().cast(pl.Int64),
            predicted=pl.col("probability").sum(),
            divergence=pl.when(pl.col("exact").is_null().any()).then(None).otherwise(divergence.sum()),
            observed=happened.filter(is_known).sum(),
            above=pl.when(pl.col("exact").is_null().any()).then(None).otherwise(above.filter(is_known).sum()),
            above_squared=(above**2).filter(is_known).sum(),
        )
        .sort("hour", "model_id", "alias", "bin")
        .collect()
    )


def _by_hour(sums: pl.DataFrame, references: Mapping[str, Sequence[float]]) -> pl.DataFrame:
    """As `drift`. The outcome is told of an hour when that of all its rows is known: those that are known first are not
    like the others."""
    rows = []
    for (hour, model_id, alias), group in sums.group_by("hour", "model_id", "alias", maintain_order=True):
        n, total = group["rows"].sum(), group.sum().row(0, named=True)
        is_known, has_exact = total["known"] == n, not group["divergence"].is_null().any()
        line: dict[str, Any] = {"hour": hour, "model_id": model_id, "alias": alias, "rows": n}
        line["predicted"] = total["predicted"] / n
        line["psi"] = psi(dict(zip(group["bin"], group["rows"], strict=True)), references.get(str(model_id), ()))
        line["divergence"] = total["divergence"] / n if has_exact else None
        line["observed"] = total["observed"] / n if is_known else None
        if is_known and has_exact:
            gap = total["above"] / n
            line |= {"gap": gap, "gap_error": math.sqrt(max(0, total["above_squared"] / n - gap**2) / n)}
        rows.append(line)
    return pl.DataFrame(rows, schema=DRIFT, orient="row")


def psi(counts: Mapping[int, int], reference: Sequence[float]) -> float | None:
    """The population stability index of predictions, counted in even parts of 0 to 1, against their shares of then.

    Half a row is added to each part, so that an empty one has a logarithm. None without a reference.
    """
    if len(reference) != BINS:
        return None
    n = sum(counts.values())
    shares = [(counts.get(part, 0) + 0.5) / (n + 0.5 * BINS) for part in range(BINS)]
    return math.fsum((now - then) * math.log(now / then) for now, then in zip(shares, reference, strict=True))


def _calibrated(sums: pl.DataFrame) -> pl.DataFrame:
    """As `calibration`, of the hours whose outcomes are all known."""
    hourly = ["hour", "model_id", "alias"]
    whole = sums.filter((pl.col("known") == pl.col("rows")).all().over(hourly))
    rows = whole.group_by("model_id", "alias", "bin").agg(pl.col("predicted", "observed", "rows").sum())
    means = (pl.col("predicted", "observed") / pl.col("rows")).name.keep()
    return rows.sort("model_id", "alias", "bin").with_columns(means).select([*CALIBRATION])


def drift(root: Root) -> pl.DataFrame:
    """An hour and model a row, oldest first: DRIFT; none before the first scores. Raises Damaged.

    `rows` that were scored, the mean of what was `predicted`; `psi` against the predictions of the model's training;
    `divergence` from the true probability (nats); of an hour whose outcomes are all known the share that was
    `observed`, and by how much the log loss is above that of the true probability: `gap`, with its standard error.
    """
    return _told(root, "drift", DRIFT)


def calibration(root: Root) -> pl.DataFrame:
    """A model and a tenth of the probabilities a row: CALIBRATION. What was predicted, and the share that came true, of
    the hours of `drift` whose outcomes are all known. Raises Damaged."""
    return _told(root, "calibration", CALIBRATION)


def _told(root: Root, what: str, schema: dict[str, Any]) -> pl.DataFrame:
    told, plain = root.read_json(TOLD) or {what: []}, schema | dict.fromkeys({"hour"} & schema.keys(), pl.String)
    try:
        frame = pl.DataFrame(told[what], schema=plain, orient="row")
        return frame.with_columns(pl.col(name).str.to_datetime("%+").cast(TIME) for name in schema if name == "hour")
    except (TypeError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        raise Damaged(f"{TOLD} is damaged: {error}") from None


def newest(told: pl.DataFrame, model_id: str, least: int) -> dict[str, Any] | None:
    """Of `drift` the newest hour in which a model scored `least` rows or more; None without one."""
    hours = told.filter(pl.col("model_id") == model_id, pl.col("rows") >= least)
    return hours.row(-1, named=True) if hours.height else None
