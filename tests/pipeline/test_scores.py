"""What ships is scored once, by champion and shadow, and held against what is known of it."""

import json
import threading

import duckdb
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from starlette.testclient import TestClient
from support import ingest_all
from typer.testing import CliRunner

from app import api
from etl.leases import LeaseLost
from etl.models import registry, scores
from etl.storage import Damaged, Root
from orchestrate import app as command_line
from pipeline import Lake, model, source

STREAM = source.Stream(0.01, 6, "2026-03-01T11:00:00+00:00")
HOW = {"run_id": "score-1", "hours": 48, "days_kept": 14}
KEY = ["l_orderkey", "l_linenumber"]


def came(root, *ticks):
    """These ticks are in the lake; its snapshot."""
    source.land(Root.at(root), STREAM, source.make_ticks(STREAM, ticks))
    ingest_all(str(root))
    return Lake(root).snapshot()


def score(snapshot, **how):
    return model.score(snapshot, model.scoring(snapshot.root), root=snapshot.root, **HOW | how)


def table(root):
    return pl.scan_delta(root.table("scores")).collect()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A root with a champion and a shadow; of the two ticks nothing has shipped before the third, two hours later."""
    root = Root.at(tmp_path_factory.mktemp("shipped"))
    snapshot = came(root.url, 0, 1)
    parts = model.split(snapshot)
    for alias, trees in ((registry.CHAMPION, 40), (registry.SHADOW, 3)):
        booster = model.train(parts.training, parts.validation, max_trees=trees)
        model.publish(root, booster, model.judge(booster, parts.held_out), parts.held_out, f"train-{trees}", alias)
    assert score(snapshot) is None
    assert model.drift(root, 48).is_empty() and model.scored(root).is_empty()
    return root


def test_what_has_shipped_is_scored_once_by_champion_and_shadow(shipped):
    snapshot = came(shipped.url, 240)
    done = score(snapshot)
    items = snapshot.frame("lineitem").filter(pl.col("l_ship_time") <= snapshot.as_of).collect()
    assert (done.rows, done.until) == (items.height, snapshot.as_of) and items.height > 300
    for alias, each in model.scoring(shipped).items():
        said = table(shipped).filter(pl.col("alias") == alias).sort(KEY)
        assert said["model_id"].unique().to_list() == [each.model_id]
        assert said["version"].unique().to_list() == [snapshot.versions["lineitem"]]
        expected = items.sort(KEY)
        assert_frame_equal(said.select(KEY), expected.select(KEY))
        assert said["probability"].to_list() == each.predict(expected)
        assert said["outcome"].to_list() == (expected["l_receiptdate"] > expected["l_commitdate"]).to_list()
    assert score(snapshot) is None  # the same run again
    later = came(shipped.url, 480)
    lost, rows = [], []

    def run():
        try:
            rows.append(score(later))
        except LeaseLost:
            lost.append(1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for each in [*threads]:
        each.start()
    for each in [*threads]:
        each.join()
    assert len(rows) + len(lost) == 3 and sum(done is not None for done in rows) == 1
    assert not table(shipped).select(*KEY, "model_id").is_duplicated().any()
    items = later.frame("lineitem").filter(pl.col("l_ship_time") <= later.as_of).collect()
    assert table(shipped).height == 2 * items.height


def test_the_drift_of_each_hour_is_what_another_engine_says(shipped):
    said = model.drift(shipped, 48)
    rows, until, at_hour = table(shipped), scores.scored_until(shipped), pl.col("at").dt.truncate("1h")
    expected = duckdb.sql(f"""
        WITH each AS (SELECT *, date_trunc('hour', "at") AS hour, greatest(exact, 1e-15) AS low,
            greatest(1 - exact, 1e-15) AS high, outcome::DOUBLE AS y FROM rows)
        SELECT hour, model_id, alias, count(*) AS n, avg(probability) AS predicted,
            avg(exact * ln(low / probability) + (1 - exact) * ln(high / (1 - probability))) AS divergence,
            CASE WHEN bool_and(known_at <= TIMESTAMPTZ '{until}') THEN avg(y) END AS observed,
            CASE WHEN bool_and(known_at <= TIMESTAMPTZ '{until}')
                THEN avg(y * ln(low / probability) + (1 - y) * ln(high / (1 - probability))) END AS gap
        FROM each GROUP BY ALL ORDER BY hour, model_id, alias""").pl()
    assert said.height == expected.height > 4
    assert said["rows"].to_list() == expected["n"].to_list()
    for name in ("predicted", "divergence", "observed", "gap"):
        assert said[name].to_list() == pytest.approx(expected[name].to_list(), abs=1e-9)
    champion, shadow = (said.filter(alias=alias)["divergence"].mean() for alias in ("champion", "shadow"))
    assert champion < shadow / 3
    hour = said.filter(alias="champion").row(-1, named=True)  # what ships first is not spread as all that ships
    now = np.histogram(rows.filter(at_hour == hour["hour"], alias="champion")["probability"], 10, (0, 1))[0] + 0.5
    then = shipped.read_json(f"models/{hour['model_id']}/metrics.json")["reference"]
    shares = now / now.sum()
    assert hour["psi"] == pytest.approx(np.sum((shares - then) * np.log(shares / then))) and hour["psi"] > 1


def test_outcomes_are_told_once_all_of_an_hour_are_known_and_old_scores_go(shipped):
    assert model.drift(shipped, 48)["observed"].null_count() == model.drift(shipped, 48).height  # 18 hours on the road
    snapshot = came(shipped.url, 480 + 40 * 120)
    assert score(snapshot).rows > 1000
    told = model.drift(shipped, 48)
    known = told.filter(pl.col("observed").is_not_null() & (pl.col("rows") > 100), alias="champion")
    assert known.height > 20 and (known["gap"].abs() < 4 * known["gap_error"] + 0.01).all()
    assert told["observed"].to_list()[-1] is None
    calibrated = model.scored(shipped)
    assert calibrated["rows"].sum() == told.filter(pl.col("observed").is_not_null(), alias="champion")["rows"].sum()
    assert ((calibrated["predicted"] - calibrated["observed"]).abs() < 0.15).all()
    before = table(shipped)["at"].min()
    later = came(shipped.url, 480 + 50 * 120)
    score(later, days_kept=1)
    assert table(shipped)["at"].min() > before  # the files of the first hours are of no version any more


def test_a_restored_root_has_its_scores_and_goes_on_with_them(shipped, tmp_path):
    shipped.write("releases/r1/files/notebooks/score.ipynb", b"{}")
    shipped.write("releases/current.json", b"{}")
    made = Lake(shipped).backup(Root.at(tmp_path / "backup"))
    other = Root.at(tmp_path / "other")
    Lake(other).restore(Root.at(tmp_path / "backup"))
    assert_frame_equal(table(other), table(shipped), check_row_order=False)
    assert made.point.tables["scores"].rows == table(shipped).height
    assert scores.scored_until(other) == scores.scored_until(shipped) <= Lake(other).snapshot().as_of
    assert_frame_equal(scores.drift(other), scores.drift(shipped))
    assert registry.listed(other) == registry.listed(shipped)
    assert other.files("releases") == shipped.files("releases") != []
    assert score(Lake(other).snapshot()) is None  # nothing a second time
    later = came(other.url, 480 + 51 * 120)
    assert score(later).rows > 100
    assert not table(other).select(*KEY, "model_id").is_duplicated().any()


def test_a_line_is_held_against_the_newest_hour_with_enough_rows(shipped):
    champion, told = model.scoring(shipped)["champion"], model.drift(shipped, 48)
    hour = model.newest_hour(told, champion, 50)
    assert hour["hour"] == told.filter(pl.col("rows") >= 50, alias="champion")["hour"].max()
    assert model.newest_hour(told, champion, 10**6) == {}


def test_psi_by_hand():
    """Halves against three quarters and a quarter: 0.25 ln 2 + (-0.25) ln (2/3), with half a row more in each part."""
    reference = [0.75, 0.25, *[1e-9] * 8]
    assert scores.psi({0: 500_000_000, 1: 500_000_000}, reference) == pytest.approx(0.274653, abs=1e-5)
    assert scores.psi({0: 1}, ()) is None


def test_a_damaged_file_of_drift_is_named(shipped):
    before = shipped.read(scores.TOLD)
    for text in (b"{", b"[]", b'{"drift": 1}', b'{"drift": [{"hour": 7}]}'):
        shipped.write(scores.TOLD, text)
        with pytest.raises(Damaged, match=r"drift\.json"):
            scores.drift(shipped)
    shipped.write(scores.TOLD, before)


def test_a_promoted_rolled_back_and_shadowed_model_is_seen_wherever_models_are_told(shipped, monkeypatch):
    monkeypatch.setenv("ETL_ROOT", shipped.url)
    api.settings.cache_clear()
    client, row = TestClient(api.app), dict(model.CARD.example)
    first, second = (registry.find(shipped, alias)["model_id"] for alias in (registry.CHAMPION, registry.SHADOW))

    def told(*command):
        done = CliRunner().invoke(command_line, ["models", *command, "--root", shipped.url, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def seen():
        """What each says: alias -> model. The shadow is scored, and answers nobody."""
        by_command = {alias: each["model_id"] for each in told("list") for alias in each["aliases"]}
        listed = client.get("/v1/models").json()
        assert by_command == {alias: each["model_id"] for each in listed for alias in each["aliases"]}
        champion = by_command["champion"]
        assert [each["model_id"] for each in listed if each["is_current"]] == [champion]
        assert client.get("/v1/model").json()["model_id"] == champion
        assert client.post("/v1/predict", json=[row]).json()[0]["model_id"] == champion
        assert f'etl_model_info{{model_id="{champion}"' in client.get("/metrics").text
        assert registry.current(shipped)["model_id"] == told("show")["model_id"] == champion  # as the dashboard has it
        return by_command

    assert seen() == {"champion": first, "shadow": second}
    figures, drift = client.get("/metrics").text, scores.drift(shipped)
    for alias, model_id in (("champion", first), ("shadow", second)):
        line = drift.filter(alias=alias).row(-1, named=True)
        labels = f'{{alias="{alias}",model_id="{model_id}"}}'
        assert f"etl_model_drift_divergence{labels} {line['divergence']}" in figures
        assert f"etl_model_scored_rows{labels} {line['rows']:.1f}" in figures
    told("promote", "shadow")
    assert seen() == {"champion": second, "previous": first}
    told("rollback")
    assert seen() == {"champion": first, "previous": second}
    told("promote", "previous", "--as", "shadow")
    assert seen() == {"champion": first, "previous": second, "shadow": second}
    shipped.write(scores.TOLD, b"{")
    assert "etl_model_info" in client.get("/metrics").text and "drift" not in client.get("/metrics").text
