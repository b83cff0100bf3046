"""The late-delivery model: will a line item that ships now be received after the day it was promised for?

TPC-H draws the receipt date as the ship date plus 1 to 30 days, each as likely (specification 3.0.1, clause 4.2.3), so
the true probability is known, and with it the lowest log loss that any model can have on given rows.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl.lake.table import TEXT, Column
from etl.models import registry, scores
from etl.models.card import Card
from etl.models.registry import Model, ModelDamaged, NoModel
from etl.questions import engines
from etl.storage import Root
from pipeline.source import SHIP_STEP
from pipeline.tables import TABLES

if TYPE_CHECKING:
    import distributed
    import numpy as np
    import xgboost.dask

    Labelled = tuple[np.ndarray, np.ndarray]  # features, label

    from etl.findings import Finding
    from etl.lake import Lake
    from etl.lake.snapshot import Snapshot

__all__ = ["Model", "ModelDamaged", "NoModel"]  # the registry's, for those who read the published model

# what is known of a line item the moment it ships; the flags and the receipt date are not
SHIPPED = [
    "l_shipdate",
    "l_commitdate",
    "l_quantity",
    "l_extendedprice",
    "l_discount",
    "l_tax",
    "l_shipmode",
    "l_shipinstruct",
]
COLUMNS = [*SHIPPED, "l_receiptdate"]  # what training reads
MODES = ["REG AIR", "AIR", "RAIL", "SHIP", "TRUCK", "MAIL", "FOB"]
INSTRUCTIONS = ["DELIVER IN PERSON", "COLLECT COD", "NONE", "TAKE BACK RETURN"]
ROW = {name: TABLES["lineitem"].fields[name] for name in SHIPPED} | {
    "l_shipmode": Column(TEXT, choices=MODES),
    "l_shipinstruct": Column(TEXT, choices=INSTRUCTIONS),
}
FEATURES = {
    "days_to_commit": lambda row: row["l_commitdate"] - row["l_shipdate"],
    "quantity": itemgetter("l_quantity"),
    "unit_price": lambda row: row["l_extendedprice"] // row["l_quantity"],  # whole, so that its values are few
    "discount": itemgetter("l_discount"),
    "tax": itemgetter("l_tax"),
    "ship_mode": itemgetter("l_shipmode"),
    "ship_instruction": itemgetter("l_shipinstruct"),
}
LONGEST_DAYS = 30  # on the road
GOLDEN_ROWS = 32
SURE = 3  # standard errors


@dataclass(frozen=True)
class Rows:
    """Line items that a model is judged by.

    `matrix`: Float32, a row an item, a column each of FEATURES; an unknown mode or instruction is NaN. `late`: the
    label, received after the day that was promised. `content`: the hash of what is in each (uint64). `golden`: some of
    them as they are, their SHIPPED columns.
    """

    matrix: "np.ndarray"
    late: "np.ndarray"
    content: "np.ndarray"
    golden: pl.DataFrame = field(repr=False)

    @property
    def height(self) -> int:
        return len(self.late)

    @property
    def days_to_commit(self) -> "np.ndarray":
        """From the day an item ships to the one that is promised: float64."""
        return self.matrix[:, [*FEATURES].index("days_to_commit")].astype("float64")


class Parts(NamedTuple):
    """What a model is made of: rows to train on (70 %), to stop by (10 %), to judge by (20 %)."""

    training: "xgboost.QuantileDMatrix"
    validation: "xgboost.QuantileDMatrix"
    held_out: Rows

    @property
    def heights(self) -> tuple[int, int, int]:
        return self.training.num_row(), self.validation.num_row(), self.held_out.height

    @property
    def late(self) -> tuple[int, int, int]:
        """How many of each part are."""
        labels = self.training.get_label(), self.validation.get_label(), self.held_out.late
        training, validation, held_out = (int(late.sum()) for late in labels)
        return training, validation, held_out


@dataclass
class Spread:
    """The same, on the workers of a Dask cluster, but for the rows to judge by. `heights`: as of `Parts`; `late`: how
    many of each part are."""

    client: "distributed.Client"
    training: "xgboost.dask.DaskQuantileDMatrix"
    validation: "xgboost.dask.DaskQuantileDMatrix"
    held_out: Rows
    heights: tuple[int, int, int]
    late: tuple[int, int, int]


def split(
    snapshot: "Snapshot", days: int | None = None, dask: str | None = None, dask_above_rows: int = 0
) -> Parts | Spread:
    """The line items of a snapshot, divided by what is in a row: see `_content`. `days`: of those that shipped so long
    before its newest time, or later; None: of all.

    Equal rows are always in the same part, so that no model is judged by what it, or the champion before it, has seen;
    of equal ones a model is judged by one. Of each row 29 bytes are held, 37 where it is judged by, until XGBoost has
    its own copy of those to train on: 26 bytes each, and 30 more while it trains. At the most 59 bytes a row, of all.

    More than `dask_above_rows` are held by the workers of the Dask cluster at `dask`, if there is one, each its share.
    Raises OSError when nobody answers there.
    """
    if dask is not None and snapshot.row_count("lineitem") > dask_above_rows:
        import distributed

        return spread(distributed.Client(dask, set_as_default=False), snapshot, days)
    where = None if days is None else pl.col("l_ship_time") > snapshot.as_of - timedelta(days=days)
    return parted(snapshot.pieces("lineitem", COLUMNS, where=where), snapshot.row_count("lineitem"))


def parted(pieces: Iterable[pl.DataFrame], most: int) -> Parts:
    """As `split`, of line items that come in pieces, at most `most` together."""
    import numpy as np
    import xgboost

    training, validation, held_out = (_Filled(most) for _ in range(3))
    contents, golden, count = np.empty(most, np.uint64), list[pl.DataFrame](), 0
    for piece in pieces:
        to_learn, to_stop_by, (matrix, late, content), few = divided(piece)
        training.add(*to_learn)
        validation.add(*to_stop_by)
        held_out.add(matrix, late)
        contents[count : held_out.count] = content
        count = held_out.count
        golden = [_first_rows(pl.concat([*golden, few]))]
    how: Any = {"feature_names": [*FEATURES], "nthread": 1}
    seen = xgboost.QuantileDMatrix(*training.taken(), **how)
    stop_by = xgboost.QuantileDMatrix(*validation.taken(), ref=seen, **how)
    rows = pl.concat(golden) if golden else pl.DataFrame()
    return Parts(seen, stop_by, _judged_by(*held_out.taken(), contents[:count], rows))


def spread(client: "distributed.Client", snapshot: "Snapshot", days: int | None = None) -> Spread:
    """As `split`, of line items that the workers of a cluster read, and hold until the client has gone."""
    import numpy as np
    import xgboost.dask  # noqa: F401  (it is no part of what xgboost itself imports)

    since = None if days is None else ("l_ship_time", snapshot.as_of - timedelta(days=days))
    futures = engines.each_piece(client, divided, snapshot, "lineitem", COLUMNS, since)
    parts = [[client.submit(itemgetter(n), future) for future in futures] for n in range(3)]
    counts = client.gather([client.submit(_counted, part) for of in parts for part in of])
    known = [counts[n * len(futures) : (n + 1) * len(futures)] for n in range(3)]
    made = [_arrays(client, part, [rows for rows, _ in count]) for part, count in zip(parts[:2], known, strict=False)]
    with client.as_current():  # what is given it asks for all the same
        seen = xgboost.dask.DaskQuantileDMatrix(client, *made[0], feature_names=[*FEATURES])
        stop_by = xgboost.dask.DaskQuantileDMatrix(client, *made[1], feature_names=[*FEATURES], ref=seen)
    matrix, late, contents = (np.concatenate(of) for of in zip(*client.gather(parts[2]), strict=True))
    golden = pl.concat(client.gather([client.submit(itemgetter(3), future) for future in futures]))
    heights, of_them = ([sum(each[n] for each in count) for count in known] for n in range(2))
    held_out = _judged_by(matrix, late, contents, _first_rows(golden))
    return Spread(
        client,
        seen,
        stop_by,
        held_out,
        (heights[0], heights[1], held_out.height),
        (*of_them[:2], int(held_out.late.sum())),
    )


def _counted(part: "tuple[np.ndarray, ...]") -> tuple[int, int]:
    """How many rows, and how many of them are late."""
    return len(part[1]), int(part[1].sum())


def _arrays(client: "distributed.Client", parts: "list[distributed.Future]", heights: list[int]) -> "tuple[Any, Any]":
    """Features and label of the parts that have rows, as arrays of Dask."""
    import dask.array
    import numpy as np
    from dask import delayed

    def array(n: int, shape: tuple[int, ...], dtype: Any) -> Any:
        pieces = [client.submit(itemgetter(n), part) for part, rows in zip(parts, heights, strict=True) if rows]
        tall = [rows for rows in heights if rows]
        return dask.array.concatenate(
            [
                dask.array.from_delayed(delayed(piece), (rows, *shape), dtype)
                for piece, rows in zip(pieces, tall, strict=True)
            ]
        )

    return array(0, (len(FEATURES),), np.float32), array(1, (), bool)


def divided(
    piece: pl.DataFrame,
) -> "tuple[Labelled, Labelled, tuple[np.ndarray, np.ndarray, np.ndarray], pl.DataFrame]":
    """Line items by their part: those to train on and to stop by; of those to judge by also what is in each, and some
    of them as they are."""
    import numpy as np

    matrix, late = SPEC.matrix(piece), _late(piece).to_numpy()
    content = _content(matrix, piece["l_shipdate"])
    percent = content % 100
    training, validation = percent >= 30, (percent >= 20) & (percent < 30)
    judged_by = np.flatnonzero(percent < 20)
    few = piece.select(SHIPPED)[judged_by].with_columns(pl.Series("_content", content[judged_by]))
    return (
        (matrix[training], late[training]),
        (matrix[validation], late[validation]),
        (matrix[judged_by], late[judged_by], content[judged_by]),
        _first_rows(few),
    )


def _first_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Some of the rows, the same whatever order they come in."""
    return rows.unique("_content", keep="any").sort("_content").head(GOLDEN_ROWS)


def _judged_by(matrix: "np.ndarray", late: "np.ndarray", contents: "np.ndarray", golden: pl.DataFrame) -> Rows:
    """Of equal rows one."""
    import numpy as np

    # with the label in its lowest bit: of equal rows that ended otherwise there is one of each
    _, first = np.unique(contents & ~np.uint64(1) | late, return_index=True)
    for column in matrix.T:
        column[: len(first)] = column[first]  # no second copy of all of them
    return Rows(matrix[: len(first)], late[first], contents[first], golden.drop("_content", strict=False))


class _Filled:
    """The rows of a part as they come. Room for `most` is asked for; what is not filled takes no memory."""

    def __init__(self, most: int):
        import numpy as np

        self._matrix, self._late = np.empty((most, len(FEATURES)), np.float32), np.empty(most, bool)
        self.count = 0

    def add(self, matrix: "np.ndarray", late: "np.ndarray") -> None:
        until = self.count + len(late)
        self._matrix[self.count : until], self._late[self.count : until] = matrix, late
        self.count = until

    def taken(self) -> "tuple[np.ndarray, np.ndarray]":
        """Features and label; they are not held here any more."""
        matrix, late = self._matrix[: self.count], self._late[: self.count]
        del self._matrix, self._late
        return matrix, late


def _late(lineitem: pl.DataFrame) -> pl.Series:
    return lineitem.select(late=pl.col("l_receiptdate") > pl.col("l_commitdate")).to_series()


def _content(matrix: "np.ndarray", ship_date: pl.Series) -> "np.ndarray":
    """A hash (uint64) of what is known of each row when it ships: its features and the day. Always the same one.

    Not of its keys: the stream brings the same rows under new keys, and a model that has learnt the outcome of a row by
    heart must not be judged by its twin. Not of the outcome, or the parts would differ in how often it is late. Not of
    the features alone: where they are few and coarse their values make few groups, and those held out would be values
    that training never sees; with the day two rows are equal only when they are the same item again. Items of one order
    may come apart: TPC-H draws their receipt independently, and no feature says which order an item is of.
    """
    import numpy as np

    mixed = np.zeros(len(matrix), np.uint64)
    for column in (*np.ascontiguousarray(matrix.T), ship_date.to_physical().to_numpy()):
        mixed ^= column.view(np.uint32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that nothing is lost; numpy's product wraps around
        mixed ^= mixed >> np.uint64(32)
    return mixed


def too_little(parts: Parts | Spread, minimum_rows: int) -> str | None:
    """Why there is too little to learn from; None when there is enough."""
    if sum(parts.heights) < minimum_rows:
        return f"{sum(parts.heights):,} line items, fewer than the {minimum_rows:,} that training needs"
    for part, rows, late in zip(("training", "validation", "held-out"), parts.heights, parts.late, strict=True):
        if late in (0, rows):
            return f"the {rows:,} {part} line items are all late or all in time"
    return None


def fit(parts: Parts | Spread, **settings: Any) -> "xgboost.Booster":
    """As `train`, of parts wherever they are; a cluster's workers are let go of then."""
    if isinstance(parts, Parts):
        return train(parts.training, parts.validation, threads=idle_cores(), **settings)
    with parts.client:
        return train(parts.training, parts.validation, client=parts.client, **settings)


def train(
    training: "xgboost.QuantileDMatrix | xgboost.dask.DaskQuantileDMatrix",
    validation: "xgboost.QuantileDMatrix | xgboost.dask.DaskQuantileDMatrix",
    *,
    client: "distributed.Client | None" = None,
    learning_rate: float = 0.2,
    max_depth: int = 3,
    max_trees: int = 500,
    patience: int = 20,
    threads: int = 1,
) -> "xgboost.Booster":
    """A classifier of late line items; stops when `patience` trees in a row do not help on the validation rows.

    The same rows give the same one, in any order and by any number of threads: no feature has so many values that
    XGBoost would have to estimate where to cut them. One thread by default: where other work has the cores, two wait
    for each other (420,000 rows: 1.5 s became 35 s). `client`: of the Dask cluster whose workers have the rows, and
    threads of their own.
    """
    import xgboost

    parameters = {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "learning_rate": learning_rate,
        "max_depth": max_depth,
        "monotone_constraints": {"days_to_commit": -1},  # more days left, never more likely late
    }
    how: dict[str, Any] = {
        "num_boost_round": max_trees,
        "evals": [(validation, "validation")],
        "early_stopping_rounds": patience,
        "verbose_eval": False,
    }
    if client is None:
        booster = xgboost.train(parameters | {"nthread": threads}, training, **how)
    else:
        with client.as_current():
            booster = xgboost.dask.train(client, parameters, training, **how)["booster"]
    return booster[: booster.best_iteration + 1]


def idle_cores() -> int:
    """Cores that had nothing to do in the last minute; at least 1."""
    return max(1, (os.cpu_count() or 1) - round(os.getloadavg()[0]))


def predict(booster: "xgboost.Booster", rows: Rows) -> "np.ndarray":
    """The probability that each line item arrives late. Safe in threads."""
    return registry.predict(booster, rows.matrix)


def best_possible(days_to_commit: "np.ndarray") -> "np.ndarray":
    """The true probability of late: 1 to 30 days on the road, each as likely."""
    import numpy as np

    return np.clip((LONGEST_DAYS - days_to_commit) / LONGEST_DAYS, 0, 1)


def judge(booster: "xgboost.Booster", held_out: Rows) -> dict[str, float]:
    """How good the model is on rows it has not seen; losses are in nats.

    `divergence`: Kullback and Leibler's, of the predictions from the true probability; nothing drawn is in it.
    `log_loss`, `best_log_loss` (of the true probability, on the same rows), `gap` between the two, which is the
    divergence and chance, and its `gap_error`: the standard error, where rows that are alike count as one draw.
    `expected_log_loss` (the mean entropy: what the best is over many draws), `auc`, `brier`, `late_share`, `rows`,
    `trees`.
    """
    import numpy as np

    truth = held_out.late.astype("float64")
    predicted, exact = predict(booster, held_out), best_possible(held_out.days_to_commit)
    losses, best = _losses(predicted, truth), _losses(exact, truth)
    entropy = _log_loss(exact, exact)
    return {
        "divergence": _log_loss(predicted, exact) - entropy,
        "log_loss": float(losses.mean()),
        "best_log_loss": float(best.mean()),
        "gap": float(losses.mean() - best.mean()),
        "gap_error": _standard_error(losses - best, held_out.content),
        "expected_log_loss": entropy,
        "auc": _auc(predicted, truth),
        "brier": float(np.mean((predicted - truth) ** 2)),
        "late_share": float(truth.mean()),
        "rows": held_out.height,
        "trees": booster.num_boosted_rounds(),
    }


def leak(metrics: dict[str, float]) -> str | None:
    """The sentence that names a leak, from the metrics of `judge`; None when there is none to be seen.

    By chance alone the gap is below minus three standard errors in one training of a thousand at most.
    """
    gap, error = metrics["gap"], metrics["gap_error"]
    if gap >= -SURE * error:
        return None
    return (
        f"gap {gap:.6f}, standard error {error:.6f}: the held-out rows are predicted better than is possible without"
        " having seen how they ended, so there is a leak from them into training"
    )


def _log_loss(predicted: "np.ndarray", truth: "np.ndarray") -> float:
    """Mean cross entropy in nats; where truth is 0 or 1, 0 log 0 counts as 0."""
    return float(_losses(predicted, truth).mean())


def _losses(predicted: "np.ndarray", truth: "np.ndarray") -> "np.ndarray":
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(truth > 0, truth * np.log(predicted), 0) - np.where(
            truth < 1, (1 - truth) * np.log1p(-predicted), 0
        )


def _standard_error(values: "np.ndarray", groups: "np.ndarray") -> float:
    """Of the mean of `values`, those of a group being one draw, however often it is there."""
    import numpy as np

    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, values - values.mean())
    return float(np.sqrt(np.sum(sums**2)) / len(values))


def _auc(predicted: "np.ndarray", truth: "np.ndarray") -> float:
    """The share of (late, in time) pairs in the right order: Mann-Whitney's U from average ranks."""
    ranks = pl.Series(predicted).rank("average").to_numpy()
    positive = truth.sum()
    return float((ranks[truth == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


def calibration(booster: "xgboost.Booster", held_out: Rows, bins: int = 10) -> pl.DataFrame:
    """Of the rows with about the same prediction, the share that was late: predicted, observed (0 to 1), rows."""
    return (
        pl.DataFrame({"predicted": predict(booster, held_out), "observed": held_out.late})
        .group_by((pl.col("predicted") * bins).floor().clip(0, bins - 1).alias("bin"))
        .agg(pl.col("predicted").mean(), pl.col("observed").mean(), pl.len().alias("rows"))
        .sort("bin")
        .drop("bin")
    )


def calibration_chart(result: pl.DataFrame, title: str = "Calibration, held-out rows"):
    """Predicted against observed, beside the diagonal of a model that is right about how sure it is."""
    from etl.charts import plot

    labels = {"xlabel": "predicted probability of late", "ylabel": "share that was late"}
    diagonal = pl.DataFrame({"predicted": [0.0, 1.0], "observed": [0.0, 1.0]})
    line = plot(diagonal).line(x="predicted", y="observed", label="perfect", title=title, **labels)
    return line * plot(result).scatter(x="predicted", y="observed", label="model", **labels)


def by_days(booster: "xgboost.Booster", held_out: Rows) -> pl.DataFrame:
    """What the model says for each number of days between shipping and the promised day, near where it matters.

    days_to_commit, model (mean prediction), observed (share late), best_possible, rows.
    """
    columns = {
        "days_to_commit": held_out.days_to_commit,
        "model": predict(booster, held_out),
        "observed": held_out.late,
        "best_possible": best_possible(held_out.days_to_commit),
    }
    return (
        pl.DataFrame(columns)
        .filter(pl.col("days_to_commit").is_between(-10, LONGEST_DAYS + 10))
        .group_by("days_to_commit")
        .agg(pl.col("model", "observed", "best_possible").mean(), pl.len().alias("rows"))
        .sort("days_to_commit")
    )


def by_days_chart(result: pl.DataFrame):
    """The model beside the true probability: where the lines part, there is something left to learn."""
    from etl.charts import plot

    labels = {"xlabel": "days from shipping to the promised day", "ylabel": "probability of late"}
    title = "Late by days left, held-out rows"
    true = plot(result).line(x="days_to_commit", y="best_possible", label="best possible", title=title, **labels)
    return true * plot(result).scatter(x="days_to_commit", y="model", label="model", **labels)


class Verdict(NamedTuple):
    better: bool
    reason: str  # a sentence with the numbers

    @property
    def alias(self) -> str:
        """What the model is to be called."""
        return registry.CHAMPION if self.better else registry.CHALLENGER


def is_better(booster: "xgboost.Booster", champion: Model | None, held_out: Rows) -> Verdict:
    """Whether the challenger is nearer to the true probability than the champion, on the same held-out rows, by more
    than chance: SURE standard errors of the difference.

    By divergence, not by log loss: that has the luck of the draw in it, and a champion which has seen these very rows,
    as one that an older release published, has the lower one for ever.
    """
    exact = best_possible(held_out.days_to_commit)
    challenger = _losses(predict(booster, held_out), exact)
    entropy = _log_loss(exact, exact)
    reason = f"divergence {challenger.mean() - entropy:.6f}"
    if champion is None:
        return Verdict(True, f"{reason}; there is no champion to beat")
    other = _losses(predict(champion.booster, held_out), exact)
    margin = SURE * _standard_error(other - challenger, held_out.content)
    reason += (
        f"; the champion's divergence {other.mean() - entropy:.6f} on the same {held_out.height:,} rows, "
        f"and less by more than {margin:.6f} is better"
    )
    return Verdict(bool(challenger.mean() < other.mean() - margin), reason)


def compare(lake: "Lake", models: Mapping[str, Model]) -> pl.DataFrame:
    """The judgement of each model on the same rows, held out from all that is published: model, as `judge` has it."""
    held_out = split(lake.snapshot()).held_out
    return pl.DataFrame([{"model": name, **judge(each.booster, held_out)} for name, each in models.items()])


def publish(
    root: Root,
    booster: "xgboost.Booster",
    metrics: dict[str, Any],
    held_out: Rows,
    run_id: str,
    alias: str = registry.CHAMPION,
) -> str:
    """Publish the model, or store it under another alias, with some of the held-out rows to check it by; returns its
    model_id.

    Raises ModelDamaged, and the aliases stay, when what is read back is not what was trained.
    """
    golden = _rows_as_json(held_out.golden)
    return registry.publish(root, booster, metrics, golden, run_id, SPEC, alias, predict(booster, held_out))


def load_current(root: Root) -> Model:
    """The published model, checked. Raises NoModel before the first, ModelDamaged when it is not what was published.

    It predicts the probability that each line item, with its SHIPPED columns, arrives late.
    """
    return registry.load_current(root, SPEC)


def champion(root: Root) -> Model | None:
    """The published model, or None when there is none that can be used: then any challenger is better."""
    return registry.champion(root, SPEC)


def given(root: Root) -> dict[str, Any]:
    """What a training starts from besides its rows, for its replay: the champion's pointer and its files' sha256."""
    return registry.given(root, SPEC)


def examine(root: Root) -> "list[Finding]":
    """What is wrong with the published model, for `doctor`."""
    return registry.examine(root, SPEC)


def scoring(root: Root) -> dict[str, Model]:
    """Alias -> the model that scores: the champion, and the shadow; none before the first. Raises ModelDamaged."""
    try:
        return scores.models(root, SPEC)
    except NoModel:
        return {}


def score(snapshot: "Snapshot", by: Mapping[str, Model], **how: Any) -> scores.Done | None:
    """What has shipped since the last time, scored by each of the models: see `etl.models.scores`."""
    return scores.score(snapshot, SCORED, by, **how)


def drift(root: Root, hours: int) -> pl.DataFrame:
    """How far the models drift, hour by hour, from all that is scored by now: see `etl.models.scores`."""
    scores.measure(root, hours=hours)
    return scores.drift(root)


def drift_chart(result: pl.DataFrame):
    """How far each hour's predictions are from the true probability."""
    from etl.charts import plot

    labels = {"xlabel": "hour of shipping, UTC", "ylabel": "divergence, nats"}
    return plot(result).scatter(x="hour", y="divergence", by="alias", title="Drift of what has shipped", **labels)


def scored(root: Root) -> pl.DataFrame:
    """Of the champion's scores whose outcomes are known: predicted, observed, rows, as `calibration` has it."""
    return scores.calibration(root).filter(pl.col("alias") == registry.CHAMPION)


def scored_chart(result: pl.DataFrame):
    """What was predicted of what has shipped, against how it ended."""
    return calibration_chart(result, "Calibration, what has shipped")


def newest_hour(told: pl.DataFrame, of: Model, min_rows: int) -> dict[str, Any]:
    """The figures of `drift` for the newest hour in which a model scored so many rows; {} without one."""
    hour = scores.newest(told, of.model_id, min_rows) or {}
    return {name: value for name, value in hour.items() if name not in ("model_id", "alias", "rows")}


def _rows_as_json(lineitem: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows as a client of the API would send them: dates as text, money as numbers."""
    dates, money = pl.selectors.date(), pl.selectors.decimal()
    return lineitem.with_columns(dates.cast(pl.String), money.cast(pl.Float64)).to_dicts()


SPEC = registry.Spec(ROW, FEATURES, golden_rows="line_items", golden_predictions="late")
_ON_THE_ROAD, _LEFT = (pl.col(day) - pl.col("l_shipdate") for day in ("l_receiptdate", "l_commitdate"))
SCORED = scores.Scored(
    "lineitem",
    time="l_ship_time",
    outcome=pl.col("l_receiptdate") > pl.col("l_commitdate"),
    known_at=pl.col("l_ship_time") + _ON_THE_ROAD.dt.total_days() * SHIP_STEP,
    exact=((LONGEST_DAYS - _LEFT.dt.total_days()) / LONGEST_DAYS).clip(0, 1),
)


def losses(metrics: dict[str, Any]) -> dict[str, float]:
    """The model's log loss between the best possible and that of always giving the share of late items, in nats."""
    share = metrics["late_share"]
    guess = -share * math.log(share) - (1 - share) * math.log1p(-share)
    return {
        "best possible": metrics["best_log_loss"],
        "the model": metrics["log_loss"],
        "the share as a guess": guess,
    }


CARD = Card(
    title="Late deliveries",
    text="Will a line item that ships now arrive after the day it was promised for? TPC-H draws the days on the road "
    "evenly from 1 to 30, so the lowest log loss that any model can have is known.",
    rows="line items",
    row=ROW,
    example={
        "l_shipdate": "1996-03-13",
        "l_commitdate": "1996-03-25",
        "l_quantity": 17,
        "l_extendedprice": "21168.23",
        "l_discount": 0.04,
        "l_tax": 0.02,
        "l_shipmode": "TRUCK",
        "l_shipinstruct": "DELIVER IN PERSON",
    },
    outcome="late",
    figures={
        "Log loss above the best possible": "{gap:.5f}",
        "Area under the ROC curve": "{auc:.4f}",
        "Brier score": "{brier:.4f}",
        "Share of line items that were late": "{late_share:.1%}",
        "Line items it was judged by": "{rows:,}",
    },
    losses=losses,
    about="A line item the moment it ships. Amounts are numbers, or strings where exactness matters.",
    described={"l_commitdate": "The day it was promised for", "l_extendedprice": "For the whole quantity"},
)
