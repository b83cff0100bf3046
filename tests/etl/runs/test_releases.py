"""What is released is what runs: a frozen copy of notebooks, YAML and code, moved whole, and back."""

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest
from faults import toy
from support import write_stage

from etl.kernels import client, sources
from etl.notebook import RECORD_MIME
from etl.runs import dispatch, elsewhere, gate, index, live, provenance, releases
from etl.runs import replay as replays
from etl.runs.record import RunRecord
from etl.serve import released
from etl.storage import Damaged, Root

AT = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)
ENV = "root: outputs\nmachine: null\ndask: null\nready_kernels: 0\n"


@pytest.fixture
def small(tmp_path) -> Path:
    """A project with one stage, a module beside it, and one that lies elsewhere."""
    project = tmp_path / "project"
    for folder in ("notebooks", "params/env", "mine"):
        (project / folder).mkdir(parents=True)
    (project / "params/env/local.yml").write_text(ENV)
    (project / "mine/__init__.py").touch()
    (project / "mine/figures.py").write_text("VALUE = 1\n")
    (project / "mine/words.txt").write_text("one\n")
    write_stage(project, "says", "from mine import figures\nrecord(said=[figures.VALUE])")
    return project


@pytest.fixture
def own_only(monkeypatch):
    """Without the engine's files, which are of no interest to most tests."""
    path_of = sources._path_of
    monkeypatch.setattr(sources, "_path_of", lambda project, name: None if name == "etl" else path_of(project, name))


@pytest.fixture
def place(root) -> Root:
    return Root.at(root)


def released_now(project: Path, place: Root, message: str = "") -> releases.Release:
    """As the command does it, without a gate."""
    release = releases.freeze(project, place, message)
    made = releases.moves(place)
    releases.move(place, release.id, "release", message, after=made[-1].id if made else None)
    return release


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- what is in one ---


def test_a_release_is_a_project_of_its_own_and_is_made_once(small, place, own_only, tmp_path, monkeypatch):
    (tmp_path / "lib/elsewhere").mkdir(parents=True)
    (tmp_path / "lib/elsewhere/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    edit(small / "mine/figures.py", "VALUE", "import elsewhere\nVALUE")
    (small / "notebooks/.ipynb_checkpoints").mkdir()
    for name in ("Untitled.ipynb", "_scratch.ipynb", ".ipynb_checkpoints/says-checkpoint.ipynb", "~"):
        (small / "notebooks" / name).write_text("{}")
    first = releases.freeze(small, place)
    assert set(first.files) == {
        *("notebooks/says.ipynb", "params/says.yml", "params/env/local.yml"),
        *("mine/__init__.py", "mine/figures.py", "mine/words.txt", "elsewhere/__init__.py"),
    }
    assert (first.git_commit, first.dirty) == (None, [])
    folder = releases.checkout(place, first)
    assert folder == Path(place.url, "releases", first.id, "files")
    assert not any((folder / path).stat().st_mode & 0o222 for path in first.files)
    assert releases.freeze(small, place, "again").made_at == first.made_at, "one copy for one content"
    assert releases.freeze(folder, place).id == first.id, "it is all that it needs"
    assert list(releases.load(place, first.id, "local").project.stages) == ["says"]


def test_what_a_notebook_shows_is_no_difference_and_what_it_says_is(small, place, own_only):
    release = releases.freeze(small, place)
    looks = releases.WorkingTree(small)
    path = small / "notebooks/says.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[-1].outputs, nb.cells[-1].execution_count = [nbformat.v4.new_output("stream", text="1\n")], 7
    nb.metadata["language_info"] = {"name": "python", "version": "3.14"}
    nbformat.write(nb, path)
    assert looks.differs_from(release) == [] and releases.freeze(small, place).id == release.id
    edit(path, "figures.VALUE", "figures.VALUE + 1")
    edit(small / "params/says.yml", "5 seconds", "6 seconds")
    (small / "mine/more.py").write_text("")
    (small / "mine/words.txt").unlink()
    expected = ["mine/more.py", "mine/words.txt", "notebooks/says.ipynb", "params/says.yml"]
    assert looks.differs_from(release) == expected
    changes = {change.path: change for change in releases.diff(place, release, small)}
    assert {path: change.kind for path, change in changes.items()} == dict(
        zip(expected, ("added", "removed", "changed", "changed"), strict=True)
    )
    assert "+record(said=[figures.VALUE + 1])" in changes["notebooks/says.ipynb"].diff.splitlines()
    assert {"-every: 5 seconds", "+every: 6 seconds"} <= set(changes["params/says.yml"].diff.splitlines())
    assert changes == {c.path: c for c in releases.diff(place, release, releases.freeze(small, place))}


def test_a_release_says_which_commit_it_is_made_from_and_what_is_not_in_it(small, place, own_only, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(small.parent))
    who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    for command in (["init"], ["add", "."], [*who, "commit", "-m", "a"]):
        assert provenance._git(small, *command) is not None
    head = provenance._git(small, "rev-parse", "HEAD").strip()
    (small / "README.md").write_text("of no stage")
    clean = releases.freeze(small, place)
    assert (clean.git_commit, clean.dirty, clean.committed) == (head, [], {"git_commit": head, "git_dirty": False})
    edit(small / "mine/figures.py", "1", "2")
    (small / "mine/new.py").write_text("")
    assert releases.freeze(small, place).dirty == ["mine/figures.py", "mine/new.py"]


# --- the pointer ---


def test_the_pointer_moves_forward_and_back_and_back_again(small, place, own_only):
    with pytest.raises(releases.NoRelease, match="nothing is released"):
        releases.current(place)
    made = []
    for value in (1, 2, 3):
        (small / "mine/figures.py").write_text(f"VALUE = {value}\n")
        made.append(released_now(small, place, f"value {value}").id)
    assert releases.current(place) == made[2] and len(set(made)) == 3
    assert releases.roll_back(place).id == made[1]
    assert releases.roll_back(place).id == made[0], "not forward again"
    with pytest.raises(releases.NoRelease, match="there is none before"):
        releases.roll_back(place)
    assert releases.roll_back(place, made[2][:8]).id == made[2]
    assert releases.roll_back(place).id == made[1]
    assert [(m.id, m.how) for m in releases.moves(place)][3:5] == [(made[1], "rollback"), (made[0], "rollback")]
    assert sorted(r.message for r in releases.newest(place)) == ["value 1", "value 2", "value 3"]
    with pytest.raises(RuntimeError, match=f"somebody else has moved to release {made[1]}"):
        releases.move(place, made[0], "release", after=made[2])


def test_of_old_releases_those_stay_that_a_kept_run_names(small, place, own_only, monkeypatch):
    monkeypatch.setattr(releases, "KEPT", 2)
    made = []
    for value in range(5):
        (small / "mine/figures.py").write_text(f"VALUE = {value}\n")
        made.append(released_now(small, place).id)
    for number in (0, 1):
        record = RunRecord(
            **{"stage": "says", "run_id": f"says-{number}", "root": place.url, "attempt": 1, "host": "h"},
            **dict.fromkeys(("scheduled_for", "started_at", "ended_at"), AT.isoformat()),
            **{"parameters": {}, "origins": {}, "report": f"reports/says/2026-03-01/says-{number}"},
            release=made[number],
        )
        index.append(place, record)
        if number == 0:
            place.write(f"{record.report}/{index.COMPLETE}", b"{}")
    assert sorted(releases.prune(place)) == sorted(made[1:3])
    assert {release.id for release in releases.newest(place)} == {made[0], made[3], made[4]}


# --- what is not as it was released ---


def test_a_release_that_was_changed_does_not_run_and_is_made_whole_again(small, place, own_only):
    release = released_now(small, place)
    path = Path(place.url, "releases", release.id, "files/mine/figures.py")
    path.chmod(0o644)
    path.write_text("VALUE = 66\n")
    trees = released.Released(place, "local")
    releases._checkout.cache_clear()
    with pytest.raises(released.Unreadable, match=f"release {release.id}: mine/figures.py is not what was released"):
        trees()
    releases.freeze(small, place)
    assert trees().release == release
    (path.parent / "planted.py").write_text("")
    releases._checkout.cache_clear()
    with pytest.raises(Damaged, match=r"mine/planted.py was not released"):
        releases.checkout(place, release)
    place.write(releases.CURRENT, b'{"id": ')
    with pytest.raises(released.Unreadable, match=r"current.json is damaged"):
        trees()


def test_one_in_an_object_store_is_fetched_once_and_verified(small, s3_root, own_only, monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "CACHE", tmp_path / "cache")
    place = Root.at(s3_root)
    release = released_now(small, place)
    folder = releases.load(place, release.id, "local").folder
    assert folder == tmp_path / "cache" / release.id / "files"
    assert (folder / "mine/figures.py").read_text() == "VALUE = 1\n"
    place.write(f"releases/{release.id}/files/mine/figures.py", b"VALUE = 66\n")
    releases._checkout.cache_clear()
    assert releases.checkout(place, release) == folder, "by another process: it is here"
    (folder / "mine/figures.py").chmod(0o644)
    (folder / "mine/figures.py").write_text("VALUE = 67\n")
    releases._checkout.cache_clear()
    with pytest.raises(Damaged, match=r"mine/figures.py is not what was released"):
        releases.checkout(place, release)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [release.id]
    monkeypatch.setattr(releases, "KEPT", 1)
    edit(small / "mine/figures.py", "1", "2")
    other = released_now(small, place)
    releases.checkout(place, other)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [other.id], "the last stay"


def test_what_is_fetched_is_not_where_a_root_of_this_project_has_its_releases():
    assert Path(Root.at("outputs").url_of(releases.FOLDER)) != releases.CACHE


def test_another_machine_runs_the_release_that_it_fetches(small, s3_root, own_only, monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "CACHE", tmp_path / "here")
    place = Root.at(s3_root)
    tree = releases.load(place, released_now(small, place).id, "local")
    stage, environment = tree.project.stages["says"], tree.project.environment
    asked = dispatch.make_request(stage, environment, AT, 1, dask_address=None, release=tree.release)
    edit(small / "mine/figures.py", "1", "2")
    releases._checkout.cache_clear()
    monkeypatch.setattr(releases, "CACHE", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    live.ask(place, asdict(asked) | {"silence_s": 60})
    assert elsewhere.there(place.url, asked.run_id) == 0
    events = [json.loads(line) for line in live.rest(place, asked.run_id, 1)]
    said = [event["output"]["data"][RECORD_MIME] for event in events if event["event"] == "output"]
    assert (events[-1]["state"], said[0]["metrics"]) == ("ok", {"said": [1]})
    assert events[0]["request"]["release"] == tree.release.id
    assert (tmp_path / "there" / tree.release.id / "files/mine/figures.py").exists()


# --- what runs ---

LOOK = """import json, os, pathlib, psutil, sys
import etl.storage
from mine import figures
own = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('etl', 'mine')]
record(said=[1, figures.VALUE, n], forked='forkserver' in str(psutil.Process().cmdline()),
       folders=sorted({f[: f.index(f'{os.sep}files{os.sep}') + 6] if 'releases' in f else f for f in own}),
       project=str(etl.storage.PROJECT), cwd=os.getcwd())"""


def test_runs_are_of_the_release_whole_in_ready_kernels_too(small, place, tmp_path, monkeypatch):
    monkeypatch.setenv("ETL_KERNELS", str(tmp_path / "k"))
    write_stage(small, "says", LOOK, parameters="n: int = 1  # a\n", yml="parameters:\n  n: 1\n")
    trees = released.Released(place, "local")

    def ran() -> tuple:
        tree = trees()
        record = dispatch.run_stage(tree.project.stages["says"], tree.project.environment, release=tree.release)
        assert record.state == "ok", record.reason
        assert index.get(place, record.run_id)["release"] == record.release == tree.release.id
        assert record.metrics["folders"] == [str(tree.folder)] and record.metrics["project"] == str(tree.folder)
        assert record.metrics["cwd"] == str(tree.folder / "notebooks")
        assert record.provenance["code_sha256"] == sources.Code(tree.folder).sha256()
        return record.release, record.metrics["said"], record.metrics["forked"]

    def ready(tree: releases.Tree) -> client.Keeper:
        keeper = client.Keeper(1, tmp_path / "log", tree.folder)
        keeper.start()
        toy.until((client.server_folder(tree.folder) / "socket").exists, 240, "the fork server answers")
        return keeper

    first = released_now(small, place).id
    keeper = ready(trees())
    try:
        assert ran() == (first, [1, 1, 1], True)
        edit(small / "notebooks/says.ipynb", "said=[1", "said=[2")
        edit(small / "mine/figures.py", "1", "2")
        edit(small / "params/says.yml", "n: 1", "n: 2")
        assert ran() == (first, [1, 1, 1], True), "an edit is not taken"
        second = released_now(small, place).id
        assert ran() == (second, [2, 2, 2], False), "the kernel that waits is of another release"
        keeper.end()
        keeper = ready(trees())
        assert ran() == (second, [2, 2, 2], True)
        releases.roll_back(place)
        assert ran() == (first, [1, 1, 1], False)
    finally:
        keeper.end()
    run = index.get(place, index.newest(place, limit=1)[0]["run_id"])
    release, folder = releases.of_run(place, run)
    assert release.id == first and folder == trees().folder
    stage, environment, _ = replays.recorded(folder, "local", run)
    monkeypatch.setattr(replays, "REPLAYS", str(tmp_path / "replay"))
    again = replays.replay(run, stage, replace(environment, root=place.url), release=release)
    assert again.record.release == first and again.record.metrics["said"] == [1, 1, 1] and again.changed == []
    releases.discard(place, first)
    assert releases.of_run(place, run) is None


ASKS = 'from mine import figures\nrecord(total=figures.total(n))\ncheck("few are late", n / 100 < limit / 100)'


def test_the_gate_names_what_would_be_otherwise(small, place, tmp_path, monkeypatch):
    """A question that is broken, a default that is another, a check that asks less; and a stage that is none of it."""
    monkeypatch.setattr(replays, "REPLAYS", str(tmp_path / "replay"))
    monkeypatch.setenv("ETL_KERNELS", str(tmp_path / "none"))
    (small / "mine/figures.py").write_text("def total(n):\n    return sum(range(n))\n")
    write_stage(small, "asks", ASKS, parameters="n: int = 4  # a\nlimit: int = 5  # a\nk: int = 1  # a\n")
    (small / "params/asks.yml").write_text("every: 5 seconds\ndeadline: 1 minute\nparameters: {k: 3}\n")
    write_stage(small, "says", "record(said=1)")
    first = released_now(small, place)
    tree = releases.load(place, first.id, "local")
    record = dispatch.run_stage(tree.project.stages["asks"], tree.project.environment, scheduled_for=AT, release=first)
    assert record.state == "ok" and record.metrics["total"] == 6

    edit(small / "mine/figures.py", "sum(range(n))", "sum(range(n)) + 1")
    edit(small / "notebooks/asks.ipynb", "limit: int = 5", "limit: int = 6")
    edit(small / "notebooks/asks.ipynb", "k: int = 1", "k: int = 2")
    edit(small / "notebooks/asks.ipynb", "n / 100 < limit", "n / 200 < limit")
    edit(small / "params/asks.yml", "5 seconds", "7 seconds")
    write_stage(small, "new", "1")
    candidate = releases.load(place, releases.freeze(small, place).id, "local")

    class Quiet:
        def __init__(self, stage):
            assert stage.name == "asks"

        def __enter__(self):
            return None

        def __exit__(self, *_):
            pass

    verdicts = {verdict.stage: verdict for verdict in gate.look(place, tree, candidate, 1, Quiet)}
    assert set(verdicts) == {"asks", "new"}
    asks = verdicts["asks"]
    assert {(d.part, d.name, d.before, d.after) for d in asks.differences} == {
        ("metrics", "total", 6, 7),
        ("parameters", "limit", 5, 6),
        ("checks", "few are late", "n / 100 < limit / 100", "n / 200 < limit / 100"),
    }
    assert {(d.name, d.before, d.after) for d in asks.settings} == {("every_s", 5, 7), ("k", 1, 2)}
    assert asks.replayed == [record.run_id] and asks.unseen == []
    assert asks.changed == ["mine/figures.py", "notebooks/asks.ipynb", "params/asks.yml"]
    assert verdicts["new"].unseen == ["it is new"] and not verdicts["new"].differences
    assert releases.current(place) == first.id, "to look moves nothing"
    (gone,) = gate.look(place, candidate, tree, 0, Quiet)[-1:]
    assert (gone.stage, gone.differences[0].after) == ("new", "gone")


def test_what_is_told_of_it(small, place, own_only):
    said = []
    first = released_now(small, place)
    teller = released.Teller(place, small, said.append)
    tree = releases.load(place, first.id, "local")
    for _ in range(2):
        teller.tell(tree)
    edit(small / "mine/figures.py", "1", "2")
    teller.tell(tree)
    told = releases.told(place)
    assert (told.release, told.differs, told.since) == (first.id, ["mine/figures.py"], releases.moves(place)[0].at)
    assert len(said) == 2 and said[1].endswith("working tree differs from the release: 1 file")
    assert json.loads(place.read(releases.TOLD))["release"] == first.id
    teller.tell(replace(tree, release=None))
    assert said[2:] == ["live: the working tree runs"] and releases.told(place).release is None
    teller.end()
    assert releases.told(place) is None and not os.path.exists(f"{place.url}/{releases.TOLD}")
