"""The late-delivery model: honest features, judged by the exact limit."""

import json
import math
import subprocess
import sys
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xgboost
from polars.testing import assert_frame_equal
from support import orchestrate

from etl import charts
from etl.models import registry
from etl.storage import Root
from pipeline import Lake, model, source


@pytest.fixture(scope="module")
def lineitem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    command = [generator, "parquet", "--scale-factor=0.02", "--tables=lineitem", f"--output-dir={folder}"]
    subprocess.run(command, check=True)
    return pl.read_parquet(folder / "lineitem.parquet", columns=["l_orderkey", *model.COLUMNS])


def parted(lineitem):
    return model.parted([lineitem], lineitem.height)


@pytest.fixture(scope="module")
def parts(lineitem):
    return parted(lineitem)


@pytest.fixture(scope="module")
def held_out(parts):
    return parts.held_out


@pytest.fixture(scope="module")
def booster(parts):
    return model.train(parts.training, parts.validation)


@pytest.fixture(scope="module")
def epochs():
    """One epoch of a stream's line items, and three."""
    stream = source.Stream(0.03, 2, "2026-03-01T11:00:00+00:00")
    ticks = source.make_ticks(stream, range(3 * stream.slices))
    rows = pl.concat([ticks[tick]["lineitem"] for tick in sorted(ticks)])
    assert rows["l_orderkey"].max() > 2 * stream.highest_key
    return rows.filter(pl.col("l_orderkey") <= stream.highest_key), rows


@pytest.fixture(scope="module")
def memory(lineitem):
    """A model that has learnt much of the rows by heart, the held-out ones too."""
    every = xgboost.QuantileDMatrix(
        features(lineitem).to_numpy(), model._late(lineitem).to_numpy(), feature_names=[*model.FEATURES]
    )
    return model.train(every, every, max_depth=8, max_trees=60)


@pytest.fixture
def root(booster, held_out, tmp_path):
    """A root with a published champion."""
    url = str(tmp_path / "root")
    model.publish(Root.at(url), booster, model.judge(booster, held_out), held_out, "train-1")
    return url


def features(lineitem):
    return pl.DataFrame(model.SPEC.matrix(lineitem), schema=[*model.FEATURES])


def test_features_are_known_when_the_item_ships(lineitem):
    """They come from the eight shipping columns alone: not from the receipt date, the flags or the keys."""
    assert not {"l_receiptdate", "l_returnflag", "l_linestatus", "l_ship_time"} & set(model.SHIPPED)
    alone = features(lineitem.select(model.SHIPPED))
    assert alone.columns == [*model.FEATURES]
    later = lineitem.with_columns(pl.col("l_receiptdate") + timedelta(days=100))
    assert features(later).equals(alone)
    assert not np.isnan(alone.to_numpy()).any()


def test_features_of_one_item_by_hand():
    item = {
        "l_shipdate": date(1996, 3, 13),
        "l_commitdate": date(1996, 2, 12),
        "l_quantity": Decimal("17.00"),
        "l_extendedprice": Decimal("24710.35"),
        "l_discount": Decimal("0.04"),
        "l_tax": Decimal("0.02"),
        "l_shipmode": "TRUCK",
        "l_shipinstruct": "BY PIGEON",
    }
    row = features(pl.DataFrame([item])).row(0)
    assert row[:6] == pytest.approx((-30, 17, 1453, 0.04, 0.02, model.MODES.index("TRUCK")))
    assert math.isnan(row[6])


def test_an_item_is_late_after_the_promised_day_not_on_it():
    promised = date(1996, 2, 12)
    received = [promised - timedelta(days=1), promised, promised + timedelta(days=1)]
    items = pl.DataFrame({"l_commitdate": [promised] * 3, "l_receiptdate": received})
    assert model._late(items).to_list() == [False, False, True]


def rows_of(part):
    """The rows of a part in an order that only depends on them: features, and the label."""
    if isinstance(part, model.Rows):
        frame = pl.DataFrame(part.matrix, schema=[*model.FEATURES]).with_columns(late=part.late.astype("float32"))
    else:
        values = part.get_data().toarray()  # what is left of them: in which bin each is
        frame = pl.DataFrame(values, schema=[*model.FEATURES]).with_columns(late=part.get_label())
    return frame.sort(pl.all())


def test_a_row_is_in_the_same_part_whatever_its_key_and_in_whatever_order_and_pieces_they_come(lineitem, parts):
    assert sum(parts.heights) == lineitem.height
    shares = [height / lineitem.height for height in parts.heights]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    again = lineitem.sample(fraction=1, shuffle=True, seed=3).with_columns(pl.col("l_orderkey") + 6_000_000_000)
    other = model.parted(again.iter_slices(7_001), lineitem.height)
    for part, same in zip(parts, other, strict=True):
        assert_frame_equal(rows_of(part), rows_of(same))
    late = [parts.training.get_label().mean(), parts.validation.get_label().mean(), parts.held_out.late.mean()]
    assert late == pytest.approx([model._late(lineitem).mean()] * 3, abs=0.01)


def test_a_window_has_the_rows_that_shipped_in_it(filled):
    snapshot = Lake(filled).snapshot()
    shipped = snapshot.frame("lineitem", ["l_ship_time"]).collect().to_series()
    since = snapshot.as_of + timedelta(days=2)  # most of a stream's items ship in the three days after their order
    expected = (shipped > since).sum()
    assert 0 < expected < len(shipped)
    assert sum(model.split(snapshot, days=-2).heights) == expected
    assert sum(model.split(snapshot).heights) == len(shipped)


def test_the_workers_of_a_cluster_train_the_same_model(filled, cluster):
    snapshot, address = Lake(filled).snapshot(), cluster.scheduler_address
    for days in (None, -2):
        here, there = model.split(snapshot, days), model.split(snapshot, days, address)
        assert isinstance(model.split(snapshot, days, address, snapshot.row_count("lineitem")), model.Parts)
        assert (there.heights, there.late) == (here.heights, here.late)
        assert_frame_equal(there.held_out.golden, here.held_out.golden)
        assert sorted(there.held_out.content) == sorted(here.held_out.content)
        assert model.too_little(there, 10) == model.too_little(here, 10)
    boosters = [model.fit(parts, max_trees=30) for parts in (here, there)]
    losses = [model.judge(booster, here.held_out)["log_loss"] for booster in boosters]
    assert losses[1] == pytest.approx(losses[0], rel=0.001)


def test_the_same_rows_give_the_same_bytes_in_any_order_and_by_any_number_of_threads(lineitem, booster):
    shuffled = lineitem.sample(fraction=1, shuffle=True, seed=5)
    parts = model.parted(shuffled.iter_slices(10_000), lineitem.height)
    for threads in (1, 2):
        again = model.train(parts.training, parts.validation, threads=threads)
        assert again.save_raw("json") == booster.save_raw("json")


def test_a_stream_that_repeats_its_rows_is_judged_by_one_of_each_and_none_is_in_two_parts(epochs):
    once, thrice = epochs
    assert thrice.height == 3 * once.height
    parts, other = parted(once), parted(thrice)
    assert other.heights == (3 * parts.heights[0], 3 * parts.heights[1], parts.heights[2])
    assert_frame_equal(rows_of(other.held_out), rows_of(parts.held_out))


def divergence(booster, held_out):
    """Kullback and Leibler's, of the model from what TPC-H draws, summed by hand: nats a row."""
    days = held_out.days_to_commit.tolist()
    total = 0.0
    for left, said in zip(days, model.predict(booster, held_out).tolist(), strict=True):
        late = min(max(30 - left, 0), 30) / 30
        total += late * math.log(late / said) if late else 0
        total += (1 - late) * math.log((1 - late) / (1 - said)) if late < 1 else 0
    return total / held_out.height


def everything(lineitem):
    """All of the rows as those that a model is judged by."""
    late, matrix = model._late(lineitem).to_numpy(), features(lineitem).to_numpy()
    return model.Rows(matrix, late, np.arange(len(late), dtype="uint64"), lineitem.head(0))


def test_more_epochs_of_the_same_rows_publish_no_worse_model(epochs, tmp_path):
    """With its rows' twins in training, the model of three epochs grew to all of 500 trees, was ten times as far from
    the truth, had a log loss below the lowest that is possible, and was published."""
    champion, every = None, everything(epochs[0])
    for rows in epochs:
        training, validation, held_out = parted(rows)
        challenger = model.train(training, validation)
        metrics = model.judge(challenger, held_out)
        assert metrics["trees"] < 200
        assert metrics["gap"] > 0
        assert model.leak(metrics) is None
        assert metrics["divergence"] == pytest.approx(divergence(challenger, held_out), rel=1e-6)
        verdict = model.is_better(challenger, champion, held_out)
        far = divergence(challenger, every)
        assert far < 0.0005
        if champion and verdict.better:
            assert far < divergence(champion.booster, every)
        if verdict.better:
            model.publish(Root.at(str(tmp_path)), challenger, metrics, held_out, f"train-{rows.height}")
            champion = model.load_current(Root.at(str(tmp_path)))


def test_a_leak_is_named(memory, booster, held_out):
    metrics = model.judge(memory, held_out)
    assert metrics["gap"] < -3 * metrics["gap_error"]
    assert f"gap {metrics['gap']:.6f}, standard error" in model.leak(metrics)
    assert "there is a leak" in model.leak(metrics)
    assert model.leak(model.judge(booster, held_out)) is None
    assert model.leak({"gap": -0.003, "gap_error": 0.001}) is None
    assert model.leak({"gap": -0.0031, "gap_error": 0.001})
    assert model.leak({"gap": -math.inf, "gap_error": math.nan})  # an outcome that is not possible at all


def test_a_leak_fails_the_run_by_name_and_the_champion_stays(project, filled):
    """In a copy of the project whose split leaves the held-out rows in training."""
    code = project / "pipeline" / "model.py"
    code.write_text(code.read_text().replace("= percent >= 30,", "= percent >= 0,"))
    done = orchestrate(project, "run", "train", "--root", filled, "-p", "min_rows=500", "-p", "max_depth=8")
    assert done.returncode == 1
    (record,) = (json.loads(path.read_text()) for path in Path(filled).glob("reports/train/*/*/run.json"))
    assert record["state"] == "check_failed"
    assert "no leak: held-out rows" in record["reason"] and "there is a leak" in record["reason"]
    assert model.load_current(Root.at(filled)).run_id == "train-1"


def test_a_champion_that_has_seen_the_held_out_rows_does_not_stay(memory, booster, held_out):
    """Its log loss on them is lower than any honest model's."""
    champion = model.Model("seen", "train-0", "", {}, memory, model.SPEC)
    verdict = model.is_better(booster, champion, held_out)
    assert model.judge(memory, held_out)["log_loss"] < model.judge(booster, held_out)["log_loss"]
    assert verdict.better


def test_the_standard_error_counts_equal_rows_as_one_draw():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    by_hand = math.sqrt(1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 4
    assert model._standard_error(values, np.arange(4)) == pytest.approx(by_hand)
    assert model._standard_error(np.repeat(values, 3), np.repeat(np.arange(4), 3)) == pytest.approx(by_hand)


@pytest.mark.parametrize("days", range(-2, 34))
def test_the_true_probability_by_counting(days):
    late = sum(on_the_road > days for on_the_road in range(1, 31)) / 30
    assert model.best_possible(np.array([days]))[0] == pytest.approx(late, abs=1e-12)


def test_the_true_probability_is_what_tpch_draws(lineitem):
    shares = (
        lineitem.with_columns(days=(pl.col("l_commitdate") - pl.col("l_shipdate")).dt.total_days())
        .group_by("days")
        .agg(late=(pl.col("l_receiptdate") > pl.col("l_commitdate")).mean(), rows=pl.len())
    )
    away = (shares["late"] - pl.Series(model.best_possible(shares["days"].to_numpy()))).abs()
    assert (away * shares["rows"].sqrt()).max() < 2.5  # a standard deviation is at most 0.5


def test_metrics_on_rows_small_enough_to_check_by_hand():
    predicted, truth = np.array([0.9, 0.6, 0.6, 0.2]), np.array([1.0, 1.0, 0.0, 0.0])
    by_hand = -(math.log(0.9) + math.log(0.6) + math.log(0.4) + math.log(0.8)) / 4
    assert model._log_loss(predicted, truth) == pytest.approx(by_hand)
    assert model._auc(predicted, truth) == pytest.approx(3.5 / 4)  # the tie counts half
    assert model._log_loss(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert model._log_loss(np.array([0.0]), np.array([1.0])) == math.inf


def test_the_model_comes_close_to_the_best_possible(booster, held_out):
    metrics = model.judge(booster, held_out)
    assert 0 < metrics["gap"] < 0.002
    assert metrics["gap"] == pytest.approx(metrics["log_loss"] - metrics["best_log_loss"])
    assert metrics["best_log_loss"] == pytest.approx(metrics["expected_log_loss"], abs=0.004)
    assert metrics["rows"] == held_out.height
    assert 0.6 < metrics["late_share"] < 0.66
    assert metrics["auc"] > 0.98
    assert 1 < metrics["trees"] < 500  # it stopped early


def test_calibration_counts_every_row_and_is_drawn(booster, held_out):
    result = model.calibration(booster, held_out)
    assert result["rows"].sum() == held_out.height
    assert result.height == 10
    assert ((result["predicted"] - result["observed"]).abs() < 0.08).all()
    days = model.by_days(booster, held_out)
    assert ((days["model"] - days["best_possible"]).abs() < 0.1).all()
    for chart, frame in ((model.calibration_chart, result), (model.by_days_chart, days)):
        assert len(charts.show(chart, frame)._repr_png_()[0]) < 40_000
        assert len(charts.plotly(chart, frame).data) == 2


@pytest.mark.parametrize(
    "keep, minimum, reason",
    [
        (pl.lit(True), 10**6, "fewer than the 1,000,000"),
        (pl.col("l_receiptdate") > pl.col("l_commitdate"), 1000, "all late or all in time"),
        (pl.lit(False), 0, "the 0 training line items"),
    ],
)
def test_too_little_to_learn_from_says_why(lineitem, keep, minimum, reason):
    assert reason in model.too_little(parted(lineitem.filter(keep)), minimum)
    assert model.too_little(parted(lineitem), 1000) is None


def test_what_is_published_is_what_is_loaded(root, booster, held_out):
    loaded = model.load_current(Root.at(root))
    assert loaded.run_id == "train-1"
    assert loaded.model_id == f"train-1-{loaded.sha256[:8]}"
    assert loaded.metrics == model.judge(booster, held_out)
    golden = held_out.golden
    assert loaded.predict(golden) == registry.predict(booster, model.SPEC.matrix(golden)).tolist()
    as_sent = [
        {
            key: str(value) if "date" in key else float(value) if "_ship" not in key else value
            for key, value in row.items()
        }
        for row in golden.to_dicts()
    ]
    assert loaded.predict(json.loads(json.dumps(as_sent))) == pytest.approx(loaded.predict(golden), abs=1e-6)


def test_what_is_stored_of_a_model_has_the_names_of_this_domain(root, booster, held_out):
    (folder,) = Path(root).glob("models/train-1-*")
    assert json.loads((folder / "metrics.json").read_text())["features"] == [*model.FEATURES]
    golden = json.loads((folder / "golden.json").read_text())
    assert list(golden) == ["line_items", "late"]
    assert len(golden["line_items"]) == model.GOLDEN_ROWS and list(golden["line_items"][0]) == model.SHIPPED
    assert golden["late"] == pytest.approx(
        registry.predict(booster, model.SPEC.matrix(held_out.golden)).tolist(), abs=1e-6
    )


def test_a_damaged_model_is_told_with_what_to_do(root):
    assert not [finding for finding in model.examine(Root.at(root)) if finding.problem]
    Path(root, registry.ALIASES).write_text("{}")
    assert model.champion(Root.at(root)) is None and model.given(Root.at(root)) == {}
    (finding,) = model.examine(Root.at(root))
    assert (finding.what, finding.remedy) == ("the model", "run train: it publishes another")


def test_no_model_yet(tmp_path):
    with pytest.raises(model.NoModel, match="run train"):
        model.load_current(Root.at(str(tmp_path)))
    assert model.champion(Root.at(str(tmp_path))) is None


def test_the_champion_stays_unless_the_challenger_is_better_on_the_same_rows(root, booster, held_out, lineitem):
    champion = model.champion(Root.at(root))
    few = parted(lineitem.head(1000))
    weak = model.train(few.training, few.validation, max_trees=3)
    verdict = model.is_better(weak, champion, held_out)
    assert not verdict.better
    champion_divergence = model.judge(booster, held_out)["divergence"]
    assert f"{champion_divergence:.6f} on the same {held_out.height:,} rows" in verdict.reason
    assert not model.is_better(booster, champion, held_out).better  # no better than itself

    model.publish(Root.at(root), weak, {}, held_out, "train-2")
    assert model.is_better(booster, model.champion(Root.at(root)), held_out).better
    assert model.is_better(weak, None, held_out).better
