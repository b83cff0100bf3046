"""The late-delivery model: will a line item that ships now be received after the day it was promised for?

TPC-H draws the receipt date as the ship date plus 1 to 30 days, each as likely (specification 3.0.1, clause 4.2.3), so
the true probability is known, and with it the lowest log loss that any model can have on given rows.
"""

import math
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from etl.lake.table import TEXT, Column
from etl.models import registry
from etl.models.card import Card
from etl.models.registry import CURRENT, Model, ModelDamaged, NoModel
from etl.storage import Root
from pipeline.tables import TABLES

if TYPE_CHECKING:
    import numpy as np
    import xgboost

    from etl.findings import Finding

__all__ = ["CURRENT", "Model", "ModelDamaged", "NoModel"]  # the registry's, for those who read the published model

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
    "unit_price": lambda row: row["l_extendedprice"] / row["l_quantity"],
    "discount": itemgetter("l_discount"),
    "tax": itemgetter("l_tax"),
    "ship_mode": itemgetter("l_shipmode"),
    "ship_instruction": itemgetter("l_shipinstruct"),
}
LONGEST_DAYS = 30  # on the road
GOLDEN_ROWS = 32


def features(lineitem: pl.DataFrame) -> pl.DataFrame:
    """One Float32 column for each of FEATURES, from SHIPPED columns; an unknown mode or instruction is NaN."""
    return pl.DataFrame(SPEC.matrix(lineitem), schema=[*FEATURES])


def late(lineitem: pl.DataFrame) -> pl.Series:
    """The label: received after the day it was promised for."""
    return lineitem.select(late=pl.col("l_receiptdate") > pl.col("l_commitdate")).to_series()


def too_little(lineitem: pl.DataFrame, minimum_rows: int) -> str | None:
    """Why there is too little to learn from; None when there is enough."""
    if lineitem.height < minimum_rows:
        return f"{lineitem.height:,} line items, fewer than the {minimum_rows:,} that training needs"
    for part, rows in zip(("training", "validation", "held-out"), split(lineitem), strict=True):
        if late(rows).n_unique() < 2:
            return f"the {rows.height:,} {part} line items are all late or all in time"
    return None


def split(lineitem: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Training (70 %), validation (10 %) and held-out (20 %) rows, by what is in a row: see `content`.

    Equal rows are always in the same part, so that no model is judged by what it, or the champion before it, has seen.
    """
    percent = pl.Series(content(lineitem) % 100)
    return (
        lineitem.filter(percent >= 30),
        lineitem.filter(percent.is_between(20, 29)),
        lineitem.filter(percent < 20),
    )


def content(lineitem: pl.DataFrame) -> "np.ndarray":
    """A hash (uint64) of what is known of each row when it ships: its features and the day. Always the same one.

    Not of its keys: the stream brings the same rows under new keys, and a model that has learnt the outcome of a row by
    heart must not be judged by its twin. Not of the outcome, or the parts would differ in how often it is late. Not of
    the features alone: where they are few and coarse their values make few groups, and those held out would be values
    that training never sees; with the day two rows are equal only when they are the same item again. Items of one order
    may come apart: TPC-H draws their receipt independently, and no feature says which order an item is of.
    """
    import numpy as np

    columns = [*features(lineitem), lineitem["l_shipdate"].to_physical()]
    mixed = np.zeros(lineitem.height, np.uint64)
    for column in columns:
        mixed ^= column.to_numpy().view(np.uint32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that nothing is lost; numpy's product wraps around
        mixed ^= mixed >> np.uint64(32)
    return mixed


def train(
    training: pl.DataFrame,
    validation: pl.DataFrame,
    *,
    learning_rate: float = 0.2,
    max_depth: int = 3,
    max_trees: int = 500,
    patience: int = 20,
    threads: int = 1,
    seed: int = 0,
) -> "xgboost.Booster":
    """A classifier of late line items; stops when `patience` trees in a row do not help on the validation rows.

    One thread by default: where other work has the cores, two wait for each other (420,000 rows: 1.5 s became 35 s).
    """
    import xgboost

    booster = xgboost.train(
        {
            "objective": "binary:logistic",
            "eval_metric": "logloss",
            "tree_method": "hist",
            "learning_rate": learning_rate,
            "max_depth": max_depth,
            "monotone_constraints": {"days_to_commit": -1},  # more days left, never more likely late
            "nthread": threads,
            "seed": seed,
        },
        _matrix(training, threads),
        num_boost_round=max_trees,
        evals=[(_matrix(validation, threads), "validation")],
        early_stopping_rounds=patience,
        verbose_eval=False,
    )
    return booster[: booster.best_iteration + 1]


def _matrix(lineitem: pl.DataFrame, threads: int) -> "xgboost.DMatrix":
    import xgboost

    label = late(lineitem).to_numpy()
    return xgboost.DMatrix(SPEC.matrix(lineitem), label=label, feature_names=[*FEATURES], nthread=threads)


def predict(booster: "xgboost.Booster", lineitem: pl.DataFrame) -> "np.ndarray":
    """The probability that each line item arrives late. Safe in threads."""
    return registry.predict(booster, SPEC.matrix(lineitem))


def best_possible(days_to_commit: "np.ndarray") -> "np.ndarray":
    """The true probability of late: 1 to 30 days on the road, each as likely."""
    import numpy as np

    return np.clip((LONGEST_DAYS - days_to_commit) / LONGEST_DAYS, 0, 1)


def judge(booster: "xgboost.Booster", held_out: pl.DataFrame) -> dict[str, float]:
    """How good the model is on rows it has not seen; losses are in nats.

    `divergence`: Kullback and Leibler's, of the predictions from the true probability; nothing drawn is in it.
    `log_loss`, `best_log_loss` (of the true probability, on the same rows), `gap` between the two, which is the
    divergence and chance, and its `gap_error`: the standard error, where equal rows count as one draw.
    `expected_log_loss` (the mean entropy: what the best is over many draws), `auc`, `brier`, `late_share`, `rows`,
    `trees`.
    """
    import numpy as np

    truth = late(held_out).to_numpy().astype("float64")
    predicted, exact = predict(booster, held_out), _exact(held_out)
    losses, best = _losses(predicted, truth), _losses(exact, truth)
    entropy = _log_loss(exact, exact)
    return {
        "divergence": _log_loss(predicted, exact) - entropy,
        "log_loss": float(losses.mean()),
        "best_log_loss": float(best.mean()),
        "gap": float(losses.mean() - best.mean()),
        "gap_error": _standard_error(losses - best, content(held_out)),
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
    if gap >= -3 * error:
        return None
    return (
        f"gap {gap:.6f}, standard error {error:.6f}: the held-out rows are predicted better than is possible without"
        " having seen how they ended, so there is a leak from them into training"
    )


def _exact(lineitem: pl.DataFrame) -> "np.ndarray":
    """The true probability of late for each row."""
    return best_possible(features(lineitem)["days_to_commit"].to_numpy().astype("float64"))


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


def calibration(booster: "xgboost.Booster", held_out: pl.DataFrame, bins: int = 10) -> pl.DataFrame:
    """Of the rows with about the same prediction, the share that was late: predicted, observed (0 to 1), rows."""
    return (
        pl.DataFrame({"predicted": predict(booster, held_out), "observed": late(held_out)})
        .group_by((pl.col("predicted") * bins).floor().clip(0, bins - 1).alias("bin"))
        .agg(pl.col("predicted").mean(), pl.col("observed").mean(), pl.len().alias("rows"))
        .sort("bin")
        .drop("bin")
    )


def calibration_chart(result: pl.DataFrame):
    """Predicted against observed, beside the diagonal of a model that is right about how sure it is."""
    from etl.charts import plot

    labels = {"xlabel": "predicted probability of late", "ylabel": "share that was late"}
    diagonal = pl.DataFrame({"predicted": [0.0, 1.0], "observed": [0.0, 1.0]})
    line = plot(diagonal).line(
        x="predicted", y="observed", label="perfect", title="Calibration, held-out rows", **labels
    )
    return line * plot(result).scatter(x="predicted", y="observed", label="model", **labels)


def by_days(booster: "xgboost.Booster", held_out: pl.DataFrame) -> pl.DataFrame:
    """What the model says for each number of days between shipping and the promised day, near where it matters.

    days_to_commit, model (mean prediction), observed (share late), best_possible, rows.
    """
    days = features(held_out)["days_to_commit"]
    columns = {
        "days_to_commit": days,
        "model": predict(booster, held_out),
        "observed": late(held_out),
        "best_possible": best_possible(days.to_numpy()),
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


def is_better(booster: "xgboost.Booster", champion: Model | None, held_out: pl.DataFrame) -> Verdict:
    """Whether the challenger is nearer to the true probability than the champion, on the same held-out rows.

    By divergence, not by log loss: that has the luck of the draw in it, and a champion which has seen these very rows,
    as one that an older release published, has the lower one for ever.
    """
    challenger = judge(booster, held_out)
    reason = f"divergence {challenger['divergence']:.6f}, log loss {challenger['log_loss']:.6f}"
    if champion is None:
        return Verdict(True, f"{reason}; there is no champion to beat")
    other = judge(champion.booster, held_out)
    reason += (
        f"; the champion's divergence {other['divergence']:.6f}, log loss {other['log_loss']:.6f}"
        f" on the same {held_out.height:,} rows"
    )
    return Verdict(challenger["divergence"] < other["divergence"], reason)


def publish(
    root: Root, booster: "xgboost.Booster", metrics: dict[str, Any], held_out: pl.DataFrame, run_id: str
) -> str:
    """Publish the model, with some of the held-out rows to check it by; returns its model_id.

    Raises ModelDamaged, and the champion stays, when what is read back is not what was trained.
    """
    golden = _rows_as_json(held_out.select(SHIPPED).head(GOLDEN_ROWS))
    return registry.publish(root, booster, metrics, golden, run_id, SPEC)


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


def _rows_as_json(lineitem: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows as a client of the API would send them: dates as text, money as numbers."""
    dates, money = pl.selectors.date(), pl.selectors.decimal()
    return lineitem.with_columns(dates.cast(pl.String), money.cast(pl.Float64)).to_dicts()


SPEC = registry.Spec(ROW, FEATURES, golden_rows="line_items", golden_predictions="late")


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
