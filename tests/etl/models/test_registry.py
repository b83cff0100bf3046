"""The registry of models, with a toy of two features: what is damaged is never loaded, and never becomes current."""

import json
import math
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import xgboost

from etl.lake.table import FLOAT
from etl.models import registry
from etl.storage import Root

FEATURES = ["width", "height"]
ROW = dict.fromkeys(FEATURES, FLOAT)
GOLDEN = [{"width": float(number % 7), "height": float(number % 3)} for number in range(8)]
METRICS = {"loss": 0.25}


FUNCTIONS = {name: itemgetter(name) for name in FEATURES}
SPEC = registry.Spec(ROW, FUNCTIONS)
matrix = SPEC.matrix


def train(seed: int, trees: int = 40) -> xgboost.Booster:
    """Whether something is wider than high."""
    values = np.random.default_rng(seed).uniform(0, 7, (2000, 2)).astype("float32")
    data = xgboost.DMatrix(values, label=values[:, 0] > values[:, 1], feature_names=FEATURES, nthread=1)
    return xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, num_boost_round=trees)


@pytest.fixture(scope="module")
def booster():
    return train(seed=0)


@pytest.fixture
def root(booster, tmp_path):
    """A root with a published champion."""
    root = Root.at(tmp_path / "root")
    registry.publish(root, booster, METRICS, GOLDEN, "train-1", SPEC)
    return root


def model_file(root: Root, name: str = "model.json") -> Path:
    (path,) = Path(root.url).glob(f"models/*/{name}")
    return path


def _sparse(path: Path) -> None:
    """Larger than what is read, and of no block on the disk."""
    with path.open("wb") as file:
        file.truncate(150_000_000 if path.name == "aliases.json" else 300_000_000)


NO_FILES = [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name), _sparse]


def test_what_is_published_is_what_is_loaded(root, booster):
    loaded = registry.load_current(root, SPEC)
    assert loaded.run_id == "train-1"
    assert loaded.model_id == f"train-1-{loaded.sha256[:8]}"
    assert loaded.metrics == METRICS
    assert loaded.features == FEATURES
    expected = booster.predict(xgboost.DMatrix(matrix(GOLDEN), feature_names=FEATURES))
    assert loaded.predict(GOLDEN) == pytest.approx(expected.tolist(), abs=1e-7)
    assert [p > 0.5 for p in loaded.predict([{"width": 5, "height": 1}, {"width": 1, "height": 5}])] == [True, False]
    assert registry.champion(root, SPEC).model_id == loaded.model_id


def test_the_files_of_a_model_and_its_pointer(root):
    pointer = json.loads(Path(root.url, "models/aliases.json").read_text())["champion"]
    folder = Path(root.url, "models", pointer["model_id"])
    assert list(pointer) == ["model_id", "sha256", "run_id", "metrics"]
    assert sorted(path.name for path in folder.iterdir()) == ["golden.json", "metrics.json", "model.json"]
    golden = json.loads((folder / "golden.json").read_text())
    assert list(golden) == ["rows", "predictions"] and golden["rows"] == GOLDEN
    assert json.loads((folder / "metrics.json").read_text()) == pointer | {"features": FEATURES}


def test_the_golden_lists_are_called_as_the_domain_says(booster, tmp_path):
    root, spec = Root.at(tmp_path), registry.Spec(ROW, FUNCTIONS, golden_rows="boxes", golden_predictions="wide")
    registry.publish(root, booster, METRICS, GOLDEN, "train-1", spec)
    assert json.loads(model_file(root, "golden.json").read_text()).keys() == {"boxes", "wide"}
    assert registry.load_current(root, spec).predict(GOLDEN)


def test_no_model_yet(tmp_path):
    root = Root.at(tmp_path)
    with pytest.raises(registry.NoModel, match="run train"):
        registry.load_current(root, SPEC)
    assert registry.champion(root, SPEC) is None
    assert registry.given(root, SPEC) == {}


def test_every_truncation_and_bit_flip_of_the_model_is_refused(root):
    path = model_file(root)
    whole = path.read_bytes()
    offsets = np.random.default_rng(0).integers(0, len(whole), 20).tolist()
    damaged = [whole[:at] for at in offsets] + [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in offsets
    ]
    for data in (*damaged, b""):
        path.write_bytes(data)
        with pytest.raises(registry.ModelDamaged, match="sha256"):
            registry.load_current(root, SPEC)
    assert registry.champion(root, SPEC) is None
    path.unlink()
    with pytest.raises(registry.ModelDamaged, match="cannot be read"):
        registry.load_current(root, SPEC)


def test_a_pointer_to_another_model_or_to_nonsense_is_refused(root):
    path = Path(root.url, registry.ALIASES)
    pointer = json.loads(path.read_text())["champion"]
    changes = ({"model_id": "other"}, {"model_id": 7}, {"sha256": "0"}, {"metrics": None}, {"run_id": ["train-1"]})
    changed = [json.dumps({"champion": pointer | change}) for change in changes]
    for data in ("{", "[]", "{}", "null", "[" * 100_000, "\ud800", *changed):
        path.write_bytes(data.encode(errors="surrogatepass"))
        with pytest.raises(registry.ModelDamaged):
            registry.load_current(root, SPEC)
        assert registry.champion(root, SPEC) is None and registry.given(root, SPEC) == {}


@pytest.mark.parametrize("name", [registry.ALIASES, "model.json", "golden.json"])
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(root, name):
    path = Path(root.url, name) if "/" in name else model_file(root, name)
    for put in NO_FILES:
        path.unlink()
        put(path)
        with pytest.raises(registry.ModelDamaged, match=path.name):
            registry.load_current(root, SPEC)
        if path.is_dir():
            path.rmdir()
            path.touch()


def test_a_folder_of_models_that_is_a_file_is_refused(root):
    Path(root.url, "models").rename(Path(root.url, "elsewhere"))
    Path(root.url, "models").touch()
    with pytest.raises(registry.ModelDamaged, match="models/aliases.json"):
        registry.load_current(root, SPEC)


@pytest.mark.parametrize("off", [0.001, math.nan, math.inf, -math.inf])
def test_a_model_that_predicts_something_else_is_refused_though_its_bytes_are_right(root, off):
    path = model_file(root, "golden.json")
    golden = json.loads(path.read_text())
    golden["predictions"][3] += off
    path.write_text(json.dumps(golden))
    with pytest.raises(registry.ModelDamaged, match="does not predict what it did"):
        registry.load_current(root, SPEC)


def test_a_change_of_the_code_that_makes_the_features_is_noticed(root):
    swapped = registry.Spec(ROW, {"width": FUNCTIONS["height"], "height": FUNCTIONS["width"]})
    with pytest.raises(registry.ModelDamaged, match="does not predict what it did"):
        registry.load_current(root, swapped)
    with pytest.raises(registry.ModelDamaged, match="other features: .'width', 'height'."):
        registry.load_current(root, registry.Spec(ROW, dict(reversed(FUNCTIONS.items()))))
    with pytest.raises(registry.ModelDamaged, match="cannot be read: KeyError"):
        registry.load_current(root, registry.Spec(ROW, FUNCTIONS | {"height": itemgetter("depth")}))


@pytest.mark.parametrize(
    "golden",
    [
        {"rows": [], "predictions": []},
        {"rows": GOLDEN, "predictions": []},
        {"rows": GOLDEN},
        {"rows": [{"width": 1}], "predictions": [0.5]},
        [],
        None,
    ],
)
def test_a_model_without_golden_predictions_is_refused(root, golden):
    model_file(root, "golden.json").write_text(json.dumps(golden))
    with pytest.raises(registry.ModelDamaged):
        registry.load_current(root, SPEC)


def test_a_model_that_cannot_be_read_back_leaves_the_champion(root, monkeypatch):
    before = root.read(registry.ALIASES)
    write = type(root).write

    def torn(self, rel, data):
        write(self, rel, data[:-100] if rel.endswith("model.json") else data)

    monkeypatch.setattr(type(root), "write", torn)
    with pytest.raises(registry.ModelDamaged, match="sha256"):
        registry.publish(root, train(seed=1), {}, GOLDEN, "train-2", SPEC)
    assert root.read(registry.ALIASES) == before
    assert registry.load_current(root, SPEC).run_id == "train-1"


def test_a_model_without_a_golden_prediction_is_not_published(root):
    with pytest.raises(registry.ModelDamaged, match="does not predict"):
        registry.publish(root, train(seed=1), {}, [], "train-2", SPEC)
    assert registry.load_current(root, SPEC).run_id == "train-1"


def test_a_model_that_predicts_no_number_is_not_published(root):
    """Its gradients overflowed in training: it has no error of its own."""
    label = np.full(8, -3e38, np.float32)
    data = xgboost.DMatrix(matrix(GOLDEN), label=label, feature_names=FEATURES, nthread=1)
    overflowed = xgboost.train({"nthread": 1, "base_score": 3e38}, data, num_boost_round=2)
    assert not np.isfinite(overflowed.predict(data)).any()
    with pytest.raises(registry.ModelDamaged, match="does not predict"):
        registry.publish(root, overflowed, {}, GOLDEN, "train-2", SPEC)
    assert registry.load_current(root, SPEC).run_id == "train-1"


def test_what_a_training_starts_from_is_told_for_its_replay(root):
    told = registry.given(root, SPEC)
    pointer = json.loads(root.read(registry.ALIASES))["champion"]
    folder = f"models/{pointer['model_id']}"
    assert told[registry.ALIASES] == {"champion": pointer}
    assert told[f"{folder}/model.json"] == pointer["sha256"]
    assert told.keys() == {registry.ALIASES, f"{folder}/model.json", f"{folder}/golden.json"}


def test_a_damaged_model_is_told_with_what_to_do(root, tmp_path):
    for whole in (root, Root.at(tmp_path / "empty")):
        (finding,) = registry.examine(whole, SPEC)
        assert (finding.what, finding.problem, finding.remedy) == ("the model", None, None)
    model_file(root).write_bytes(b"{}")
    (finding,) = registry.examine(root, SPEC)
    assert "sha256" in finding.problem
    assert finding.remedy == "run train: it publishes another"


COUNT_SWITCHES = """
import pathlib, sys, time
from operator import itemgetter
from etl.lake.table import FLOAT
from etl.models import registry
from etl.storage import Root

def switches(thread):
    lines = (thread / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

def threads():
    return {path for path in pathlib.Path("/proc/self/task").iterdir() if (path / "comm").read_text() == own}

own = pathlib.Path("/proc/self/comm").read_text()
features = ["width", "height"]
spec = registry.Spec(dict.fromkeys(features, FLOAT), {name: itemgetter(name) for name in features})
import xgboost
before = threads()
served = registry.load_current(Root.at(sys.argv[1]), spec)  # loading has them all work once
team = sorted(threads() - before)
time.sleep(0.5)  # they look out for more before they sleep
asleep = [switches(thread) for thread in team]
for _ in range(100):
    served.predict([{"width": 5, "height": 1}])
served.predict([{"width": 5, "height": 1}] * 1000)
print([switches(thread) - count for thread, count in zip(team, asleep)])
"""


def test_a_prediction_wakes_no_other_thread(root):
    """Each waits for the others on busy cores: a row cost 14 to 21 ms of CPU."""
    done = subprocess.run([sys.executable, "-c", COUNT_SWITCHES, root.url], capture_output=True, text=True, check=True)
    assert not any(json.loads(done.stdout))


def test_of_many_models_the_oldest_go_and_none_that_an_alias_names(root, booster):
    first = registry.promote(root, "champion", SPEC, "shadow").model_id
    os.utime(f"{root.url}/models/{first}", (0, 0))
    for number in range(registry.KEPT + 2):
        root.write(f"models/old-{number:02d}/model.json", b"{}")
        os.utime(f"{root.url}/models/old-{number:02d}", (number + 1, number + 1))
    (Path(root.url) / "models/lost+found").mkdir()
    registry.publish(root, booster, METRICS, GOLDEN, "train-2", SPEC)
    gone = {f"old-{number:02d}" for number in range(registry.KEPT + 3)} - {*root.names("models")}
    assert gone == {"old-00", "old-01", f"old-{registry.KEPT + 2}"}
    for number in range(3, 9):
        current = registry.publish(root, booster, METRICS, GOLDEN, f"train-{number}", SPEC)
    models = [name for name in root.names("models") if root.exists(f"models/{name}/model.json")]
    assert len(models) == registry.KEPT and {current, first} <= {*models}
    assert named(root) == {"champion": "train-8", "previous": "train-7", "shadow": "train-1"}
    assert registry.load_current(root, SPEC).model_id == current and root.names("models/lost+found") == []


def named(root: Root) -> dict[str, str]:
    """Alias -> the run whose model it is."""
    return {alias: pointer["run_id"] for alias, pointer in registry.aliases(root).items()}


@pytest.fixture
def three(root):
    """A root with a champion of train-2, the previous one of train-1 and a challenger of train-3."""
    registry.publish(root, train(seed=2), METRICS, GOLDEN, "train-2", SPEC)
    registry.publish(root, train(seed=3), {"loss": 0.5}, GOLDEN, "train-3", SPEC, registry.CHALLENGER)
    return root


def test_champion_and_previous_move_together_and_back(three):
    assert named(three) == {"champion": "train-2", "previous": "train-1", "challenger": "train-3"}
    assert registry.load_current(three, SPEC).run_id == "train-2", "a challenger is not published"
    assert registry.promote(three, "challenger", SPEC).metrics == {"loss": 0.5}
    assert named(three) == {"champion": "train-3", "previous": "train-2"}
    assert registry.promote(three, "train-3", SPEC).run_id == "train-3"
    assert named(three) == {"champion": "train-3", "previous": "train-2"}, "the second time there is nothing to do"
    assert registry.rollback(three, SPEC).run_id == "train-2"
    assert named(three) == {"champion": "train-2", "previous": "train-3"}
    registry.promote(three, "train-1", SPEC, registry.SHADOW)
    registry.rollback(three, SPEC)
    assert named(three) == {"champion": "train-3", "previous": "train-2", "shadow": "train-1"}
    assert [each["aliases"] for each in registry.listed(three)] == [["champion"], ["previous"], ["shadow"]]


def test_what_is_damaged_is_not_promoted_and_all_stays(three):
    before = three.read(registry.ALIASES)
    (path,) = Path(three.url).glob("models/train-1-*/model.json")
    path.write_bytes(path.read_bytes()[:-9])
    (golden,) = Path(three.url).glob("models/train-3-*/golden.json")
    golden.write_text(golden.read_text().replace("0.", "1."))
    for name, why in (("train-1", "sha256"), ("challenger", "does not predict"), ("previous", "sha256")):
        with pytest.raises(registry.ModelDamaged, match=why):
            registry.promote(three, name, SPEC)
    with pytest.raises(registry.ModelDamaged, match="sha256"):
        registry.rollback(three, SPEC)
    unknown = {"train-": "3 models begin", "train-9": "no model train-9", "": "no model", "shadow": "no shadow"}
    for name, why in unknown.items():
        with pytest.raises(registry.NoModel, match=why):
            registry.promote(three, name, SPEC)
    assert three.read(registry.ALIASES) == before
    problems = [finding for finding in registry.examine(three, SPEC) if finding.problem]
    assert [finding.problem.split(":")[0] for finding in problems] == ["challenger", "previous"]
    assert all("promote" in finding.remedy for finding in problems)


def test_a_root_of_an_older_release_goes_on(root):
    """It has the champion's pointer alone."""
    pointer = registry.current(root)
    root.write(registry.OLDER, json.dumps(pointer).encode())
    root.remove(registry.ALIASES)
    assert registry.load_current(root, SPEC).run_id == "train-1" and registry.mark(root)
    with pytest.raises(registry.NoModel, match="there is no previous"):
        registry.rollback(root, SPEC)
    registry.publish(root, train(seed=2), METRICS, GOLDEN, "train-2", SPEC)
    assert named(root) == {"champion": "train-2", "previous": "train-1"}
    assert not root.exists(registry.OLDER)


def test_aliases_move_in_an_object_store(s3_root, booster):
    root = Root.at(s3_root)
    for number in (1, 2):
        registry.publish(root, booster, METRICS, GOLDEN, f"train-{number}", SPEC)
    registry.publish(root, booster, METRICS, GOLDEN, "train-3", SPEC, registry.CHALLENGER)
    before = registry.mark(root)
    registry.rollback(root, SPEC)
    assert named(root) == {"champion": "train-1", "previous": "train-2", "challenger": "train-3"}
    assert before != registry.mark(root) and registry.load_current(root, SPEC).run_id == "train-1"


def test_of_two_who_move_aliases_at_once_neither_is_lost(three):
    """Also when they do not hold the same lease, as two releases."""
    replace, others = type(three).replace, ["train-3"]

    def interrupted(self, rel, data, mark):
        if others:
            registry._name(three, registry.SHADOW, registry.find(three, others.pop()))
        return replace(self, rel, data, mark)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(three), "replace", interrupted)
        registry.promote(three, "train-1", SPEC)
    also = {"challenger": "train-3", "shadow": "train-3"}
    assert named(three) == {"champion": "train-1", "previous": "train-2"} | also
