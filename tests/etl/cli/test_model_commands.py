"""`models` and `runs list --sort`: what they say, what they refuse, and that nothing moves then."""

import json
from pathlib import Path

import published
import pytest
from typer.testing import CliRunner

from etl.models import registry
from etl.storage import Root
from orchestrate import app
from pipeline import Lake, model


@pytest.fixture(scope="module")
def trained(prepared):
    """A champion, the previous one and a challenger, trained on the same rows: what each is, as `train` has it."""
    training, validation, held_out = model.split(Lake(str(prepared("filled"))).snapshot())
    made = {}
    for name, trees in {"previous": 5, "champion": 20, "challenger": 40}.items():
        booster = model.train(training, validation, max_trees=trees)
        made[name] = booster, model.judge(booster, held_out), held_out
    return made


@pytest.fixture
def told(filled, trained):
    """Calls the command line on a root with three models; with what it is to end."""
    root = Root.at(filled)
    for number, name in enumerate(trained):
        alias = registry.CHALLENGER if name == "challenger" else registry.CHAMPION
        model.publish(root, *trained[name], f"train-2026030{number + 1}T120000-abcdef", alias)

    def call(*command: str, status: int = 0, as_json: bool = False):
        done = CliRunner().invoke(app, [*command, "--root", filled, *["--json"] * as_json])
        assert done.exit_code == status, done.output
        assert as_json or max(map(len, done.output.splitlines())) <= 200
        return json.loads(done.stdout) if as_json else " ".join(done.output.split())

    call.root = root
    return call


def aliases(root: Root) -> dict[str, str]:
    return {alias: pointer["run_id"][6:14] for alias, pointer in registry.aliases(root).items()}


def test_models_are_listed_compared_promoted_and_rolled_back(told, trained):
    rows = told("models", "list", as_json=True)
    assert [row["aliases"] for row in rows] == [["challenger"], ["champion"], ["previous"]]
    assert f"{trained['champion'][1]['divergence']:.6g}" in told("models", "list")

    compared = told("models", "compare", "champion", "challenger", as_json=True)
    assert compared["metrics"] == {name: trained[name][1] for name in ("champion", "challenger")}
    assert compared["judged"] == compared["metrics"], "the same rows are published still"
    assert "both on the same held-out rows of now" in told("models", "compare", "champion", "train-20260303")

    moved = told("models", "promote", "challenger", as_json=True)
    assert moved["aliases"] == {"champion": rows[0]["model_id"], "previous": rows[1]["model_id"]}
    shown = told("models", "show", as_json=True)
    assert (shown["model_id"], shown["aliases"], shown["problem"]) == (rows[0]["model_id"], ["champion"], None)
    assert shown["features"] == [*model.FEATURES]
    assert f"champion again {rows[1]['model_id']}" in told("models", "rollback")
    told("models", "promote", "train-20260301", "--as", "shadow")
    assert aliases(told.root) == {"champion": "20260302", "previous": "20260303", "shadow": "20260301"}


def test_what_is_asked_wrongly_or_damaged_is_refused_and_nothing_moves(told):
    before = told.root.read(registry.ALIASES)
    assert told("models", "promote", "train-2", status=2).startswith("3 models begin with train-2 under")
    assert told("models", "compare", "champion", "nobody", status=2).startswith("there is no model nobody under")
    assert told("models", "show", "shadow", status=2).startswith("there is no shadow under")
    told("models", "promote", "champion", "--as", "previous", status=2)
    (path,) = Path(told.root.url).glob("models/train-20260301*/model.json")
    path.write_bytes(path.read_bytes()[:-1])
    for command in (("rollback",), ("promote", "previous"), ("compare", "previous", "champion")):
        assert "does not have the sha256 that was published" in told("models", *command, status=2)
    assert "sha256" in told("models", "show", "previous", status=1, as_json=True)["problem"]
    assert told.root.read(registry.ALIASES) == before


def test_by_its_id_a_model_is_published_when_the_aliases_are_damaged(told):
    told.root.write(registry.ALIASES, b"{}")
    assert "names no model as champion" in told("models", "rollback", status=2)
    assert "names no model as champion" in told("models", "show", status=2)
    assert "names no model as champion" in told("models", "list")
    told("models", "promote", "train-20260302")
    assert aliases(told.root) == {"champion": "20260302"}


def test_a_root_without_models_says_so_and_is_left_as_it_is(tmp_path):
    (tmp_path / "root/landing").mkdir(parents=True)
    for command, status in ((("list",), 0), (("show",), 2), (("rollback",), 2), (("compare", "a", "b"), 2)):
        done = CliRunner().invoke(app, ["models", *command, "--root", f"{tmp_path}/root"])
        assert (done.exit_code, "there is no" in done.output) == (status, True), done.output
        done = CliRunner().invoke(app, ["models", *command, "--root", f"{tmp_path}/mistyped"])
        assert (done.exit_code, "it is not there" in done.output) == (1, True), done.output
    assert [path.name for path in tmp_path.rglob("*")] == ["root", "landing"]


def test_runs_are_sorted_by_what_they_recorded(tmp_path):
    root = Root.at(tmp_path / "root")
    for minute, value in enumerate([0.3, 0.1, None, "0", float("nan"), 2]):
        metrics = {"loss": value}
        published.add_run(root.url, f"train-20261122T120{minute}00-abc123", minute=minute, metrics=metrics)

    def listed(*options: str) -> list[tuple[str, float]]:
        rows = json.loads(CliRunner().invoke(app, [*list_runs, *options, "--json"]).stdout)
        return [(row["run_id"][17:19], row["value"]) for row in rows]

    list_runs = ["runs", "list", "--stage", "train", "--root", root.url]
    assert listed("--sort", "loss") == [("01", 0.1), ("00", 0.3), ("05", 2)]
    assert listed("--sort", "-loss", "--limit", "2") == [("05", 2), ("00", 0.3)]
    text = CliRunner().invoke(app, [*list_runs, "--sort", "loss"]).stdout
    assert "loss" in text and "0.3" in text
    done = CliRunner().invoke(app, [*list_runs, "--sort", "los"])
    assert done.exit_code == 2 and "has recorded a number as los" in done.output
