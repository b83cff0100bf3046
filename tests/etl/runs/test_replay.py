"""A run again: what it then runs with, whether the same comes out, and who wrote what it read."""

import io
import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
from faults import replay_scenarios, synthetic
from support import ingest_all, write_stage

from etl import params
from etl.kernels import sources
from etl.runs import dispatch, index, provenance
from etl.runs import replay as replays
from etl.storage import PROJECT, Root
from pipeline import Lake, model, source

AT = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)
SUM = "total = sum(range(n))\nrecord(rows=n, total=total, took_s=__import__('time').time(), place=f'{root}/{run_id}')"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(replays, "REPLAYS", str(tmp_path / "replay"))


@pytest.fixture
def summed(project):
    """A stage that adds up, and has a date."""
    write_stage(
        project,
        "summed",
        SUM,
        parameters="n: int = 4  # a\nword: str = 'a'  # a\nday: datetime.date = datetime.date(2026, 1, 1)  # a\n",
        yml="retries: 2\nparameters:\n  n: 10\n  day: 2026-02-03\n",
    )
    path = project / "notebooks" / "summed.ipynb"
    path.write_text(path.read_text().replace("from etl.notebook", "import datetime\\n\\nfrom etl.notebook", 1))
    return project


def run_once(project, stage: str, root: str, overrides=()) -> dict:
    loaded = params.load(project, "local", overrides, stage=stage)
    record = dispatch.run_stage(
        replace(loaded.stages[stage], retries=0), replace(loaded.environment, root=root), scheduled_for=AT
    )
    return index.get(Root.at(root), record.run_id)


def replay(project, run: dict, root: str) -> replays.Replay:
    stage, environment, _ = replays.recorded(project, "local", run)
    return replays.replay(run, stage, replace(environment, root=root))


def said(differences) -> set[tuple]:
    return {(one.part, one.name, one.before, one.after) for one in differences}


# --- rerun ---


def recorded_run(**parameters) -> dict:
    return {"stage": "summed", "run_id": "summed-1", "parameters": {"root": "/elsewhere", "run_id": "x"} | parameters}


def test_recorded_values_win_over_todays_and_given_ones_over_both(summed):
    run = recorded_run(n=7, day="2026-02-03", word="2026-01-01: [x")
    stage, _, differences = replays.recorded(summed, "local", run, ["n=8"])
    assert stage.values == {"n": 8, "day": datetime(2026, 2, 3).date(), "word": "2026-01-01: [x"}
    assert stage.origins == {"n": "command line", "day": "run summed-1", "word": "run summed-1"}
    assert said(differences) == {
        ("parent", "n", 7, 8),
        ("today", "n", 10, 8),
        ("today", "word", "a", "2026-01-01: [x"),
    }


def test_a_parameter_that_came_later_takes_todays_value(summed):
    stage, _, differences = replays.recorded(summed, "local", recorded_run(n=7, day="2026-02-03"))
    assert stage.values["word"] == "a" and stage.origins["word"] == "notebook default"
    assert said(differences) == {("parent", "word", None, "a"), ("today", "n", 10, 7)}


def test_a_parameter_that_went_is_refused_by_name(summed):
    with pytest.raises(replays.NotRepeatable, match="with fewer, which notebooks/summed.ipynb no longer declares"):
        replays.recorded(summed, "local", recorded_run(n=7, fewer=1))


def test_a_parameter_of_another_type_by_now_is_refused(summed):
    with pytest.raises(params.ParamsError, match="n: expected int"):
        replays.recorded(summed, "local", recorded_run(n="seven"))


LOOKS_LIKE = {"a": "1e3", "b": "012", "c": "null", "d": "true", "e": "a: b", "f": "2026-01-01", "g": "-.5", "h": ""}


def test_what_a_run_was_given_stays_what_it_was(project, root):
    """A text that YAML would read as a number, a date or nothing is a text again, and a date a date, in the kernel."""
    declared = "".join(f"{name}: str = 'x'  # a text\n" for name in LOOKS_LIKE)
    given = "".join(f"  {name}: {value!r}\n" for name, value in LOOKS_LIKE.items())
    values = f"values = [{', '.join(LOOKS_LIKE)}, day]\nrecord(got=[[type(v).__name__, str(v)] for v in values])"
    write_stage(
        project,
        "typed",
        f"import datetime\n{values}",
        parameters=declared + "day: datetime.date = datetime.date(2026, 1, 1)  # a day\n",
        yml=f"parameters:\n{given}  day: 2026-02-03\n",
    )
    path = project / "notebooks" / "typed.ipynb"
    path.write_text(path.read_text().replace("from etl.notebook", "import datetime\\n\\nfrom etl.notebook", 1))
    run = run_once(project, "typed", root)
    got = [*(["str", value] for value in LOOKS_LIKE.values()), ["date", "2026-02-03"]]
    assert run["metrics"]["got"] == got
    stage, _, differences = replays.recorded(project, "local", run)
    assert stage.values == LOOKS_LIKE | {"day": date(2026, 2, 3)} and differences == []
    again = replay(project, run, root)
    assert again.equal and again.record.metrics["got"] == got


# --- replay ---


def test_the_same_comes_out_until_the_notebook_changes(summed, root):
    run = run_once(summed, "summed", root, ["n=5"])
    assert (run["state"], run["metrics"]["total"], run["parent"]) == ("ok", 10, None)
    found = replay(summed, run, root)
    assert found.equal, found.differences
    assert found.compared["metrics"] == 3, "took_s is not compared"
    assert (found.record.parent, found.record.scheduled_for) == (run["run_id"], run["scheduled_for"])
    assert found.record.root != root and found.record.run_id != run["run_id"]
    assert [row["run_id"] for row in index.newest(Root.at(root))] == [run["run_id"]], "nothing is written where it was"

    path = summed / "notebooks" / "summed.ipynb"
    path.write_text(path.read_text().replace("sum(range(n))", "sum(range(n)) + 1"))
    changed = replay(summed, run, root)
    assert said(changed.differences) == {("metrics", "total", 10, 11)}
    assert "notebook_sha256" in {one.name for one in changed.changed}


def test_a_failure_that_comes_again_is_equal_and_a_repaired_one_is_not(project, root):
    write_stage(project, "divided", "1 / n", parameters="n: int = 0  # by\n", yml="retries: 2\n")
    run = run_once(project, "divided", root)
    assert run["state"] == "failed"
    found = replay(project, run, root)
    assert found.equal and found.record.attempt == 1
    write_stage(project, "divided", "1 / (n or 1)", parameters="n: int = 0  # by\n")
    names = {one.name for one in replay(project, run, root).differences}
    assert names == {"state", "reason"}


def test_what_a_run_started_from_is_put_there_again(project, root):
    write_stage(
        project,
        "counter",
        "import hashlib, json, pathlib\n"
        "path = pathlib.Path(root, 'landing/count.json')\n"
        "at = json.loads(path.read_text())\n"
        "big = pathlib.Path(root, 'landing/big.txt').read_bytes()\n"
        "record(rows=at['n'] + len(big), given={'landing/count.json': at,"
        " 'landing/big.txt': hashlib.sha256(big).hexdigest()})\n"
        "path.write_text(json.dumps({'n': at['n'] + 1}))",
    )
    place = Root.at(root)
    place.write("landing/count.json", b'{"n": 3}')
    place.write("landing/big.txt", b"12345")
    run = run_once(project, "counter", root)
    found = replay(project, run, root)
    assert found.equal and found.record.metrics["rows"] == 8
    assert json.loads(place.read("landing/count.json")) == {"n": 4}
    place.write("landing/big.txt", b"123456")
    with pytest.raises(replays.NotRepeatable, match="landing/big.txt, which it read, has changed since"):
        replay(project, run, root)
    place.remove("landing/big.txt")
    with pytest.raises(replays.NotRepeatable, match="landing/big.txt, which it read, is no more"):
        replay(project, run, root)


def test_a_run_that_wrote_the_lake_cannot_be_replayed(summed, root):
    run = run_once(summed, "summed", root) | {"versions_written": {"orders": 3}}
    with pytest.raises(replays.NotRepeatable, match=r"wrote the lake \(orders\)"):
        replay(summed, run, root)


def test_query_is_replayed_on_the_versions_it_read(warm, filled, stream):
    run = run_once(PROJECT, "query", filled, ["questions=[q01, revenue_per_minute, recommended_suppliers]"])
    assert run["state"] == "ok", run["reason"]
    place = Root.at(filled)
    source.land(Root.at(filled), replace(stream, next_tick=3), source.make_ticks(stream, range(3, 4)))
    ingest_all(filled, run_id="preprocess-later")
    assert Lake(filled).snapshot().versions["orders"] > run["versions_read"]["orders"]
    found = replay(PROJECT, run, filled)
    assert found.equal, found.differences
    assert found.compared["results"] == 3 and found.record.metrics["batch"] == 1
    assert found.record.versions_read == run["versions_read"]

    # an answer that was another, and one that is gone
    file = f"results/q01/{run['run_id']}.parquet"
    answer = pl.read_parquet(io.BytesIO(place.read(file)))
    column = next(name for name, dtype in answer.schema.items() if dtype.is_float())
    buffer = io.BytesIO()
    answer.with_columns(pl.col(column) * 1.001).write_parquet(buffer)
    place.write(file, buffer.getvalue())
    place.remove(f"results/revenue_per_minute/{run['run_id']}.parquet")
    differences, _ = replays.compare(place, run, Root.at(found.record.root), vars(found.record))
    assert [one.part for one in differences] == ["results", "results"]
    assert f"q01: {column} in {answer.height} of {answer.height} rows" in differences[0].name
    assert (differences[1].before, differences[1].after) == ("no file", "a file")

    # a table that was vacuumed too early
    handle = Lake(place).table("lineitem", run["versions_read"]["lineitem"])
    place.remove(f"lake/lineitem/{handle.file_uris()[0].rsplit('/', 1)[-1]}")
    with pytest.raises(replays.NotRepeatable, match="version 1 of lineitem, .* 1 of its files were vacuumed"):
        replay(PROJECT, run, filled)
    with pytest.raises(replays.NotRepeatable, match="version 99 of lineitem, which it read, is no more"):
        replay(PROJECT, run | {"versions_read": {"lineitem": 99}}, filled)


def test_generate_and_train_are_replayed_from_what_they_started_from(warm, filled, stream):
    place = Root.at(filled)
    place.write(source.DESCRIPTION, json.dumps(vars(stream) | {"next_tick": 3}).encode())
    tick = run_once(PROJECT, "generate", filled, ["scale=0.01", "slices=40", "max_ticks=2"])
    assert (tick["state"], tick["metrics"]["last_tick"]) == ("ok", 4), tick["reason"]
    training, validation, held_out = model.split(Lake(filled).snapshot())
    champion = model.train(training, validation, max_trees=60)
    model.publish(place, champion, model.judge(champion, held_out), held_out, "train-champion")
    beaten = run_once(PROJECT, "train", filled, ["min_rows=500", "max_trees=60"])
    assert beaten["state"] == "ok" and not beaten["metrics"]["published"], beaten["reason"]
    for run in (tick, beaten):  # the training has a champion to start from
        found = replay(PROJECT, run, filled)
        assert found.equal, found.differences
    assert json.loads(place.read(source.DESCRIPTION))["next_tick"] == 5


def parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "other, expected",
    [
        ({"k": [1, 2], "x": [1.0, None]}, None),
        ({"k": [1, 2], "x": [1.0 + 1e-13, None]}, None),
        ({"k": [1, 2], "x": [1.0001, None]}, ("q: x in 1 of 2 rows, first in row 0", 1.0, 1.0001)),
        ({"k": [1, 2], "x": [1.0, 0.0]}, ("q: x in 1 of 2 rows, first in row 1", None, 0.0)),
        ({"k": [2, 1], "x": [1.0, None]}, ("q: k in 2 of 2 rows, first in row 0", 1, 2)),
        ({"k": [1], "x": [1.0]}, ("q", "2 rows", "1 rows")),
        ({"k": [1, 2]}, ("q x", "Float64", None)),
        ({"k": ["1", "2"], "x": [1.0, None]}, ("q k", "Int64", "String")),
    ],
)
def test_answers_are_compared_by_what_is_in_them(other, expected):
    one = pl.DataFrame({"k": [1, 2], "x": [1.0, None]})
    found = replays._frames_unlike("q", parquet(one), parquet(pl.DataFrame(other)))
    assert said(found) == ({("results", *expected)} if expected else set())


def test_metrics_of_how_long_and_when_are_not_compared():
    names = ["seconds", "wall_s", "rows_per_s", "published_at", "as_of", "rows", "checks", "deadline_ms", "s_total"]
    assert [n for n in names if not replays.TIME_LIKE.fullmatch(n)] == ["as_of", "rows", "checks", "s_total"]


# --- diff ---


def test_a_diff_says_what_was_not_the_same(summed, root):
    one, other = run_once(summed, "summed", root), run_once(summed, "summed", root, ["n=5"])
    assert replays.diff(one, one) == []
    other |= {"versions_read": {"orders": 4}, "provenance": one["provenance"] | {"lock_sha256": "other"}}
    one["cells"] = [{"heading": "Read", "state": "ok", "seconds": s} for s in (1.0, 2.0, 0.5)]
    other["cells"] = [
        {"heading": "Read", "state": "ok", "seconds": 5.0},
        {"heading": "Write", "state": "never_ran", "seconds": None},
    ]
    found = said(replays.diff(one, other))
    assert {
        ("parameters", "n", 10, 5),
        ("inputs", "orders", None, 4),
        ("code", "lock_sha256", one["provenance"]["lock_sha256"], "other"),
        ("metrics", "total", 45, 10),
        ("seconds", "Read", 3.5, 5.0),
        ("seconds", "Write", None, None),
    } <= found
    assert not {name for _, name, _, _ in found} & {"root", "run_id", "scheduled_for", "day"}


# --- provenance and whence ---


def test_a_commit_and_what_is_not_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git() == {"git_commit": None, "git_dirty": None}
    (tmp_path / "a.py").write_text("1")

    def git(*command):
        who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert provenance.git() == {"git_commit": head, "git_dirty": False}
    (tmp_path / "new.py").write_text("")
    assert provenance.git() == {"git_commit": head, "git_dirty": True}
    monkeypatch.setenv("PATH", "")
    assert provenance.git() == {"git_commit": None, "git_dirty": None}


def test_a_notebooks_outputs_are_not_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    (tmp_path / "etl").mkdir()
    notebook = {"cells": [{"cell_type": "code", "source": ["a\n", "b"], "outputs": []}]}
    first = provenance.of(notebook)
    assert first["lock_sha256"] is None and first["python"].count(".") == 2
    notebook["cells"][0] |= {"source": "a\nb", "outputs": [{"text": "c"}]}
    assert provenance.of(notebook) == first
    notebook["cells"][0]["source"] = "a\nc"
    (tmp_path / "requirements.lock").write_text("x==1")
    (tmp_path / "etl" / "a.py").write_text("")
    second = provenance.of(notebook)
    assert {name for name in first if first[name] != second[name]} == {"notebook_sha256", "lock_sha256"}
    (tmp_path / "etl" / "a.py").write_text("1")
    assert provenance.of(notebook)["code_sha256"] != second["code_sha256"]


def test_code_is_what_notebooks_import_wherever_it_lies_and_nothing_else(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "lib"
    files = {
        project / "notebooks/a.ipynb": json.dumps(
            {"cells": [{"cell_type": "code", "source": "import mine, polars\n"}]}
        ),
        project / "mine/__init__.py": "from far import away\nimport os, plain\n",
        project / "mine/found_by_looking.py": "",
        project / "plain.py": "",
        elsewhere / "far/away.py": "",
        project / "docs/unrelated.py": "",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(elsewhere))
    code = sources.Code(project)
    before = code.sha256()
    for path in list(files)[1:]:
        path.write_text(path.read_text() + "# changed\n")
        assert (code.sha256() != before) == ("unrelated" not in path.name), path
        assert sources.Code(project).sha256() == code.sha256()  # as one that has not looked before
        before = code.sha256()
    assert code.sha256() == before
    (project / "mine/new.py").write_text("import later\n")
    assert code.sha256() != before
    before = code.sha256()
    (project / "later.py").write_text("1")  # what was missing is there now
    assert code.sha256() != before


def test_whence_is_right_for_every_version_and_honest_about_none(root):
    from deltalake import CommitProperties, write_deltalake

    place, wrote = Root.at(root), {}
    for version in range(25):  # past a checkpoint
        wrote[version] = f"preprocess-{version}" if version % 5 else None
        who = {"run_id": wrote[version], "stage": "preprocess"} if wrote[version] else None
        write_deltalake(
            place.url_of("lake/orders"),
            pl.DataFrame({"k": [version]}),
            mode="append",
            commit_properties=CommitProperties(custom_metadata=who),
            configuration={"delta.checkpointInterval": "20"},
        )
    assert {version: provenance.whence(place, "orders", version)["run_id"] for version in wrote} == wrote
    newest = provenance.whence(place, "orders")
    assert (newest["version"], newest["run_id"], newest["stage"]) == (24, "preprocess-24", "preprocess")
    assert newest["operation"] == "WRITE" and datetime.fromisoformat(newest["at"]).year >= 2026
    Path(root, f"lake/orders/_delta_log/{7:020d}.json").unlink()  # cleaned up: what a run recorded is in the index
    run = synthetic.month(1, days=1)[0]
    for number, versions in enumerate(({"orders": 6}, {"orders": 7, "lineitem": 8}, {"lineitem": 7})):
        index.append(place, replace(run, run_id=f"preprocess-{number}", versions_written=versions))
    found = provenance.whence(place, "orders", 7)
    assert (found["run_id"], found["stage"], found["at"]) == ("preprocess-1", run.stage, run.ended_at)
    assert (found["version"], found["operation"]) == (7, None)
    for table, version, why in (
        ("lineitem", 9, "no version 9 of lineitem"),
        ("orders", 25, "no version 25 of orders"),
        ("ordres", None, "no table ordres"),
    ):
        with pytest.raises(LookupError, match=why):
            provenance.whence(place, table, version)


def test_whence_is_right_for_every_table_of_a_lake(warm):
    """Also in a compacted one; with more runs in `make faults`, and after minutes of `up`."""
    assert "11 tables, 2 runs" in replay_scenarios.whence_right(1, seed=1)


def test_of_many_replays_the_oldest_go(tmp_path):
    folder = Root.at(tmp_path / "replay")
    for number in range(replays.KEPT + 3):
        folder.write(f"query-{number:02d}/run.json", b"{}")
        os.utime(f"{folder.url}/query-{number:02d}", (number, number))
    folder.write("README.txt", b"x")
    for left in (replays.KEPT + 1, replays.KEPT, replays.KEPT):
        replays._remove_oldest(folder)
        assert len(folder.names("")) == left + 1
    assert folder.names("")[0:2] == ["README.txt", "query-03"]
