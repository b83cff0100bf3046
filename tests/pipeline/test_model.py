"""The late-delivery model: honest features, judged by the exact limit, and never served when it is damaged."""

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

from etl import charts
from pipeline import model


@pytest.fixture(scope="module")
def lineitem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    command = [generator, "parquet", "--scale-factor=0.02", "--tables=lineitem", f"--output-dir={folder}"]
    subprocess.run(command, check=True)
    return pl.read_parquet(folder / "lineitem.parquet", columns=model.COLUMNS)


@pytest.fixture(scope="module")
def parts(lineitem):
    return model.split(lineitem)


@pytest.fixture(scope="module")
def booster(parts):
    training, validation, _ = parts
    return model.train(training, validation)


@pytest.fixture
def root(booster, parts, tmp_path):
    """A root with a published champion."""
    url = str(tmp_path / "root")
    model.publish(url, booster, model.judge(booster, parts[2]), parts[2], "train-1")
    return url


def model_file(root, name="model.json"):
    (path,) = Path(root).glob(f"models/*/{name}")
    return path


def test_features_are_known_when_the_item_ships(lineitem):
    """They come from the eight shipping columns alone: not from the receipt date, the flags or the keys."""
    assert not {"l_receiptdate", "l_returnflag", "l_linestatus", "l_ship_time"} & set(model.SHIPPED)
    alone = model.features(lineitem.select(model.SHIPPED))
    assert alone.columns == model.FEATURES
    later = lineitem.with_columns(pl.col("l_receiptdate") + timedelta(days=100))
    assert model.features(later).equals(alone)
    assert alone.null_count().row(0) == (0,) * len(model.FEATURES)


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
    assert row[6] is None


def test_an_item_is_late_after_the_promised_day_not_on_it():
    promised = date(1996, 2, 12)
    received = [promised - timedelta(days=1), promised, promised + timedelta(days=1)]
    items = pl.DataFrame({"l_commitdate": [promised] * 3, "l_receiptdate": received})
    assert model.late(items).to_list() == [False, False, True]


def test_an_order_is_whole_in_one_part_whatever_else_is_there(lineitem, parts):
    keys = [set(part["l_orderkey"]) for part in parts]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert sum(part.height for part in parts) == lineitem.height
    shares = [part.height / lineitem.height for part in parts]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    fewer = lineitem.filter(pl.col("l_orderkey") % 3 == 0)
    assert set(model.split(fewer)[2]["l_orderkey"]) <= keys[2]
    high = lineitem.with_columns(pl.col("l_orderkey") + 6_000_000_000)  # scale 1,000 and beyond: no overflow
    assert model.split(high)[2].height / high.height == pytest.approx(0.2, abs=0.01)


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
    loaded = model.load_current(root)
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
    assert json.loads(model_file(root, "metrics.json").read_text())["features"] == model.FEATURES


def test_no_model_yet(tmp_path):
    with pytest.raises(model.NoModel, match="run train"):
        model.load_current(str(tmp_path))
    assert model.champion(str(tmp_path)) is None


def test_every_truncation_and_bit_flip_of_the_model_is_refused(root):
    path = model_file(root)
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 20).tolist()
    damaged = [whole[:at] for at in places] + [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in places
    ]
    for data in (*damaged, b""):
        path.write_bytes(data)
        with pytest.raises(model.ModelDamaged, match="sha256"):
            model.load_current(root)
    assert model.champion(root) is None
    path.unlink()
    with pytest.raises(model.ModelDamaged, match="cannot be read"):
        model.load_current(root)


def test_a_pointer_to_another_model_or_to_nonsense_is_refused(root):
    place = Path(root) / model.CURRENT
    pointer = json.loads(place.read_text())
    for data in ("{", "[]", "{}", json.dumps(pointer | {"model_id": "other"}), json.dumps(pointer | {"sha256": "0"})):
        place.write_text(data)
        with pytest.raises(model.ModelDamaged):
            model.load_current(root)


def test_a_model_that_predicts_something_else_is_refused_though_its_bytes_are_right(root):
    """As after a change of the code that makes the features."""
    path = model_file(root, "golden.json")
    golden = json.loads(path.read_text())
    golden["late"][3] += 0.001
    path.write_text(json.dumps(golden))
    with pytest.raises(model.ModelDamaged, match="does not predict what it did"):
        model.load_current(root)


def test_a_model_that_cannot_be_read_back_leaves_the_champion(root, booster, parts, monkeypatch):
    before = (Path(root) / model.CURRENT).read_bytes()
    write = model.Root.at(root).__class__.write

    def torn(self, rel, data):
        write(self, rel, data[:-100] if rel.endswith("model.json") else data)

    monkeypatch.setattr(model.Root.at(root).__class__, "write", torn)
    with pytest.raises(model.ModelDamaged, match="sha256"):
        model.publish(root, booster, {}, parts[2], "train-2")
    assert (Path(root) / model.CURRENT).read_bytes() == before
    assert model.load_current(root).run_id == "train-1"


def test_the_champion_stays_unless_the_challenger_is_better_on_the_same_rows(root, booster, parts):
    training, validation, held_out = parts
    champion = model.champion(root)
    weak = model.train(training.head(500), validation.head(200), max_trees=3)
    verdict = model.is_better(weak, champion, held_out)
    assert not verdict.better
    champion_loss = model.judge(booster, held_out)["log_loss"]
    assert f"{champion_loss:.6f} on the same {held_out.height:,} rows" in verdict.reason
    assert not model.is_better(booster, champion, held_out).better  # no better than itself

    model.publish(root, weak, {}, held_out, "train-2")
    assert model.is_better(booster, model.champion(root), held_out).better
    assert model.is_better(weak, None, held_out).better
