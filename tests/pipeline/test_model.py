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
from support import orchestrate

from etl import charts
from etl.storage import Root
from pipeline import model, source


@pytest.fixture(scope="module")
def lineitem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    command = [generator, "parquet", "--scale-factor=0.02", "--tables=lineitem", f"--output-dir={folder}"]
    subprocess.run(command, check=True)
    return pl.read_parquet(folder / "lineitem.parquet", columns=["l_orderkey", *model.COLUMNS])


@pytest.fixture(scope="module")
def parts(lineitem):
    return model.split(lineitem)


@pytest.fixture(scope="module")
def booster(parts):
    training, validation, _ = parts
    return model.train(training, validation)


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
    return model.train(lineitem, lineitem, max_depth=8, max_trees=60)


@pytest.fixture
def root(booster, parts, tmp_path):
    """A root with a published champion."""
    url = str(tmp_path / "root")
    model.publish(Root.at(url), booster, model.judge(booster, parts[2]), parts[2], "train-1")
    return url


def test_features_are_known_when_the_item_ships(lineitem):
    """They come from the eight shipping columns alone: not from the receipt date, the flags or the keys."""
    assert not {"l_receiptdate", "l_returnflag", "l_linestatus", "l_ship_time"} & set(model.SHIPPED)
    alone = model.features(lineitem.select(model.SHIPPED))
    assert alone.columns == [*model.FEATURES]
    later = lineitem.with_columns(pl.col("l_receiptdate") + timedelta(days=100))
    assert model.features(later).equals(alone)
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
    row = model.features(pl.DataFrame([item])).row(0)
    assert row[:6] == pytest.approx((-30, 17, 24710.35 / 17, 0.04, 0.02, model.MODES.index("TRUCK")))
    assert math.isnan(row[6])


def test_an_item_is_late_after_the_promised_day_not_on_it():
    promised = date(1996, 2, 12)
    received = [promised - timedelta(days=1), promised, promised + timedelta(days=1)]
    items = pl.DataFrame({"l_commitdate": [promised] * 3, "l_receiptdate": received})
    assert model.late(items).to_list() == [False, False, True]


def test_a_row_is_in_the_same_part_whatever_its_key_and_whatever_else_is_there(lineitem, parts):
    assert sum(part.height for part in parts) == lineitem.height
    shares = [part.height / lineitem.height for part in parts]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    rows = lineitem.with_row_index("row")
    again = rows.reverse().filter(pl.col("row") % 3 == 0).with_columns(pl.col("l_orderkey") + 6_000_000_000)
    for part, other in zip(model.split(rows), model.split(again), strict=True):
        assert set(other["row"]) == {row for row in part["row"] if row % 3 == 0}
    late = [model.late(part).mean() for part in parts]
    assert late == pytest.approx([model.late(lineitem).mean()] * 3, abs=0.01)


def test_a_stream_that_repeats_its_rows_has_none_in_two_parts(epochs):
    once, thrice = epochs
    assert thrice.height == 3 * once.height
    parts = [part.select(model.COLUMNS) for part in model.split(thrice)]
    assert [part.height for part in parts] == [3 * part.height for part in model.split(once)]
    for part, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        for other in others:
            assert parts[part].join(parts[other], on=model.COLUMNS, how="semi").is_empty()


def divergence(booster, rows):
    """Kullback and Leibler's, of the model from what TPC-H draws, summed by hand: nats a row."""
    days = (rows["l_commitdate"] - rows["l_shipdate"]).dt.total_days().to_list()
    total = 0.0
    for left, said in zip(days, model.predict(booster, rows).tolist(), strict=True):
        late = min(max(30 - left, 0), 30) / 30
        total += late * math.log(late / said) if late else 0
        total += (1 - late) * math.log((1 - late) / (1 - said)) if late < 1 else 0
    return total / rows.height


def test_more_epochs_of_the_same_rows_publish_no_worse_model(epochs, tmp_path):
    """With its rows' twins in training, the model of three epochs grew to all of 500 trees, was ten times as far from
    the truth, had a log loss below the lowest that is possible, and was published."""
    champion = None
    for rows in epochs:
        training, validation, held_out = model.split(rows)
        challenger = model.train(training, validation)
        metrics = model.judge(challenger, held_out)
        assert metrics["trees"] < 200
        assert metrics["gap"] > 0
        assert model.leak(metrics) is None
        assert metrics["divergence"] == pytest.approx(divergence(challenger, held_out), rel=1e-6)
        verdict = model.is_better(challenger, champion, held_out)
        far = divergence(challenger, epochs[0])
        assert far < 0.0005
        if champion:
            assert verdict.better == (far < divergence(champion.booster, epochs[0]))
        if verdict.better:
            model.publish(Root.at(str(tmp_path)), challenger, metrics, held_out, f"train-{rows.height}")
            champion = model.load_current(Root.at(str(tmp_path)))


def test_a_leak_is_named(memory, booster, parts):
    metrics = model.judge(memory, parts[2])
    assert metrics["gap"] < -3 * metrics["gap_error"]
    assert f"gap {metrics['gap']:.6f}, standard error" in model.leak(metrics)
    assert "there is a leak" in model.leak(metrics)
    assert model.leak(model.judge(booster, parts[2])) is None
    assert model.leak({"gap": -0.003, "gap_error": 0.001}) is None
    assert model.leak({"gap": -0.0031, "gap_error": 0.001})
    assert model.leak({"gap": -math.inf, "gap_error": math.nan})  # an outcome that is not possible at all


def test_a_leak_fails_the_run_by_name_and_the_champion_stays(project, filled):
    """In a copy of the project whose split leaves the held-out rows in training."""
    code = project / "pipeline" / "model.py"
    code.write_text(code.read_text().replace("lineitem.filter(percent >= 30),", "lineitem,"))
    done = orchestrate(project, "run", "train", "--root", filled, "-p", "min_rows=500", "-p", "max_depth=8")
    assert done.returncode == 1
    (record,) = (json.loads(path.read_text()) for path in Path(filled).glob("reports/train/*/*/run.json"))
    assert record["state"] == "check_failed"
    assert "no leak: held-out rows" in record["reason"] and "there is a leak" in record["reason"]
    assert model.load_current(Root.at(filled)).run_id == "train-1"


def test_a_champion_that_has_seen_the_held_out_rows_does_not_stay(memory, booster, parts):
    """Its log loss on them is lower than any honest model's."""
    champion = model.Model("seen", "train-0", "", {}, memory, model.SPEC)
    verdict = model.is_better(booster, champion, parts[2])
    assert model.judge(memory, parts[2])["log_loss"] < model.judge(booster, parts[2])["log_loss"]
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


def test_the_model_comes_close_to_the_best_possible(booster, parts):
    metrics = model.judge(booster, parts[2])
    assert 0 < metrics["gap"] < 0.002
    assert metrics["gap"] == pytest.approx(metrics["log_loss"] - metrics["best_log_loss"])
    assert metrics["best_log_loss"] == pytest.approx(metrics["expected_log_loss"], abs=0.004)
    assert metrics["rows"] == parts[2].height
    assert 0.6 < metrics["late_share"] < 0.66
    assert metrics["auc"] > 0.98
    assert 1 < metrics["trees"] < 500  # it stopped early


def test_training_twice_gives_the_same_bytes(booster, parts):
    training, validation, _ = parts
    assert model.train(training, validation).save_raw("json") == booster.save_raw("json")


def test_calibration_counts_every_row_and_is_drawn(booster, parts):
    result = model.calibration(booster, parts[2])
    assert result["rows"].sum() == parts[2].height
    assert result.height == 10
    assert ((result["predicted"] - result["observed"]).abs() < 0.08).all()
    days = model.by_days(booster, parts[2])
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
    assert reason in model.too_little(lineitem.filter(keep), minimum)
    assert model.too_little(lineitem, 1000) is None


def test_what_is_published_is_what_is_loaded(root, booster, parts):
    loaded = model.load_current(Root.at(root))
    held_out = parts[2]
    assert loaded.run_id == "train-1"
    assert loaded.model_id == f"train-1-{loaded.sha256[:8]}"
    assert loaded.metrics == model.judge(booster, held_out)
    assert loaded.predict(held_out) == model.predict(booster, held_out).tolist()
    as_sent = [
        {
            key: str(value) if "date" in key else float(value) if "_ship" not in key else value
            for key, value in row.items()
        }
        for row in held_out.head(20).select(model.SHIPPED).to_dicts()
    ]
    assert loaded.predict(json.loads(json.dumps(as_sent))) == pytest.approx(loaded.predict(held_out.head(20)), abs=1e-6)


def test_what_is_stored_of_a_model_has_the_names_of_this_domain(root, booster, parts):
    (folder,) = Path(root).glob("models/train-1-*")
    assert json.loads((folder / "metrics.json").read_text())["features"] == [*model.FEATURES]
    golden = json.loads((folder / "golden.json").read_text())
    assert list(golden) == ["line_items", "late"]
    assert len(golden["line_items"]) == model.GOLDEN_ROWS and list(golden["line_items"][0]) == model.SHIPPED
    assert golden["late"] == pytest.approx(model.predict(booster, parts[2].head(model.GOLDEN_ROWS)).tolist(), abs=1e-6)


def test_a_damaged_model_is_told_with_what_to_do(root):
    assert not [finding for finding in model.examine(Root.at(root)) if finding.problem]
    Path(root, model.CURRENT).write_text("{}")
    assert model.champion(Root.at(root)) is None and model.given(Root.at(root)) == {}
    (finding,) = model.examine(Root.at(root))
    assert (finding.what, finding.remedy) == ("the model", "run train: it publishes another")


def test_no_model_yet(tmp_path):
    with pytest.raises(model.NoModel, match="run train"):
        model.load_current(Root.at(str(tmp_path)))
    assert model.champion(Root.at(str(tmp_path))) is None


def test_the_champion_stays_unless_the_challenger_is_better_on_the_same_rows(root, booster, parts):
    training, validation, held_out = parts
    champion = model.champion(Root.at(root))
    weak = model.train(training.head(500), validation.head(200), max_trees=3)
    verdict = model.is_better(weak, champion, held_out)
    assert not verdict.better
    champion_loss = model.judge(booster, held_out)["log_loss"]
    assert f"{champion_loss:.6f} on the same {held_out.height:,} rows" in verdict.reason
    assert not model.is_better(booster, champion, held_out).better  # no better than itself

    model.publish(Root.at(root), weak, {}, held_out, "train-2")
    assert model.is_better(booster, model.champion(Root.at(root)), held_out).better
    assert model.is_better(weak, None, held_out).better
