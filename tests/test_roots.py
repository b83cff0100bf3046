"""A root means the place it says, whatever characters are in it, or is refused before anything is written."""

import json
import os
import pwd
import shutil
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from fastapi.testclient import TestClient
from faults import synthetic
from polars.testing import assert_frame_equal
from sqlalchemy import create_engine
from support import AT, ingest_all, orchestrate

from etl.lake import Snapshot, commit
from etl.lake.table import QUARANTINE
from etl.questions import engines, results
from etl.runs import index, provenance, retention
from etl.serve import services
from etl.storage import PROJECT, BadRoot, Root, root_url
from pipeline import Lake, queries, source

WORKS = [
    *(" ", "é", "e\u0301", "日本", "👾", "\u200b", "#", "%", "%zz", "?", "[", "]", "[a]", "[!b]", "{", "}", "{a,b}"),
    *('"', "'", ";", ":", "*", "**", "|", "^", "~", "<", ">", "`", "&", "=", "+", "$", "(", "!", "@", ","),
]
ALL = "".join(dict.fromkeys("".join(WORKS)))
REFUSED = {
    "": "is empty",
    " ": "is empty",
    "$HOME/lake": r"variables such as \$HOME are not filled in",
    "data/${USER}": r"variables such as \$\{USER\} are not filled in",
    "~nobody-of-this-name/lake": "there is no such user",
    "a\\b": r"'\\\\' cannot be",
    "a%20b": "'%20' cannot be",
    "a%2Fb": "'%2F' cannot be",
    "a\nb": r"'\\n' cannot be",
    "a\x7f": r"'\\x7f' cannot be",
    "\udcff": "is UTF-8",
    "a" * 256: "255 bytes at most",
    "etl/storage.py": "etl/storage.py is no folder",
    "etl/storage.py/lake": "etl/storage.py is no folder",
    "s3:/bucket": "begins with s3://",
    "s3:bucket": "begins with s3://",
    "s3//bucket": "begins with s3://",
    "s3://": "no bucket is named",
    "s3:///prefix": "no bucket is named",
    "s3://bucket//prefix": "are called ''",
    "s3://bucket/../prefix": "are called",
    "s3://bucket/a*": r"'\*' cannot be",
    "s3://bucket/a?b=c": r"'\?' cannot be",
    "s3://bucket/a#b": "'#' cannot be",
    "s3://bucket/a%20b": "'%' cannot be",
    "s3://bucket/a::b": "'::' cannot be",
    "file://elsewhere/lake": "a file of the machine 'elsewhere'",
    "file:lake": "begins with file://",
    "file:///a?b": "%3F",
    "file:///a%20b%2541": "'%41' cannot be",
    "file:///%ff": "not UTF-8",
    "http://host/lake": "no store http",
    "C:/lake": "no store C",
    "memory://lake": "no store memory",
}
MEANT = {
    "outputs": f"{PROJECT}/outputs",
    "a/../b/": f"{PROJECT}/b",
    "a:b": f"{PROJECT}/a:b",
    "a$b": f"{PROJECT}/a$b",
    "./s3:/b": f"{PROJECT}/s3:/b",
    "./~": f"{PROJECT}/~",
    "~": os.path.expanduser("~"),
    "~/lake": os.path.expanduser("~/lake"),
    "~root/lake": f"{pwd.getpwnam('root').pw_dir}/lake",
    "file:///a%20b": "/a b",
    "file://localhost/lake": "/lake",
    "FILE:/lake": "/lake",
    "S3://bucket/prefix/": "s3://bucket/prefix",
    "s3://bucket": "s3://bucket",
    "s3://bucket/a b é": "s3://bucket/a b é",
}


@pytest.mark.parametrize(("given", "why"), REFUSED.items(), ids=map(ascii, REFUSED))
def test_what_is_no_root_is_refused_in_a_sentence(given, why):
    for refused in (root_url, Root.at):
        with pytest.raises(BadRoot, match=why) as caught:
            refused(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "url"), MEANT.items())
def test_a_root_means_what_it_says(given, url):
    assert root_url(given) == url == root_url(url)


def test_a_link_to_what_deltalake_would_not_open_is_refused(tmp_path):
    (tmp_path / "a%20b").mkdir()
    (tmp_path / "link").symlink_to("a%20b")
    with pytest.raises(BadRoot, match="'%20' cannot be"):
        root_url(str(tmp_path / "link"))


def test_check_and_run_refuse_a_root_before_anything_is_written(project):
    for command, given in (
        (("check",), "a%20b"),
        (("run", "generate"), "s3:/bucket"),
        (("runs", "list"), "$HOME/lake"),
        (("doctor",), "~nobody-of-this-name"),
    ):
        done = orchestrate(project, *command, "--root", given)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and given in done.stderr
    (project / "params/env/dev.yml").write_text("root: a%20b\nmachine: null\ndask: null\n")
    done = orchestrate(project, "check")
    assert done.returncode == 2 and "params/env/dev.yml:1: root: 'a%20b': '%20' cannot be" in done.stderr
    assert not (project / "outputs").exists() and not [*project.glob("*%*"), *project.glob("*s3*")]


@pytest.mark.parametrize("characters", WORKS, ids=ascii)
def test_any_character_may_be_in_the_path_of_a_root(tmp_path, characters):
    root = tmp_path / f"x{characters}y"
    lake = Lake(root)
    place = lake.root
    line = {"batch": 1, "table": "orders", "file": "f", "line": 7, "reason": "r", "raw": "{}"}
    rows = commit.encode(lake, "quarantine", pl.DataFrame([line], schema=QUARANTINE))
    commit.create_tables(lake, "r", known={*lake.tables})
    version = commit.append(lake, "quarantine", rows, batch=1, run_id="r", after=0)
    for record in synthetic.month(1, days=1)[:2]:
        index.append(place, record)
    for sibling in ("xay", "xby", "xy"):  # what a pattern would find as well
        shutil.copytree(root, tmp_path / sibling)

    snapshot = Snapshot(lake, 1, datetime.now(UTC), {"quarantine": version}, "r")
    assert snapshot.frame("quarantine", ["line"]).filter(pl.col("line") > 6).collect().rows() == [(7,)]
    (piece,) = engines.pieces(snapshot, "quarantine")
    assert snapshot.files("quarantine") == [piece.url] and Path(piece.url).is_relative_to(root)
    assert len(engines._read(*piece, columns=["line"], since=None)) == 1
    assert len(index.newest(place)) == 2


def test_one_pass_on_a_root_with_every_character(tmp_path, stream, made, monkeypatch):
    """What comes out is what comes out elsewhere, read by every reader."""
    plain, root = str(tmp_path / "plain"), str(tmp_path / ALL)
    answers = {}
    for url in (plain, root):
        source.land(Root.at(url), stream, made)
        Root.at(url).write("landing/orders/orders-00000009.json", b"{}\n")
        ingest_all(url)
        if url == root:
            done = orchestrate(PROJECT, "run", "compact", "--root", root, "--at", AT)
            assert done.returncode == 0 and f"{ALL}/reports/compact/" in done.stdout, done.stdout + done.stderr
        snapshot = Lake(url).snapshot()
        answers[url] = queries.ask_all(queries.questions(), snapshot)
        for answer in answers[url]:
            queries.save(Root.at(url), answer.frame, answer.question, snapshot, "query-1")
    assert len(answers[root]) == 27 and not [answer.problem for answer in answers[root] if answer.problem]
    for here, there in zip(answers[root], answers[plain], strict=True):
        assert_frame_equal(here.frame, there.frame)

    place = Root.at(root)
    (record,) = index.newest(place)
    assert record["state"] == "ok" and record["kept"] and index.get(place, record["run_id"])["root"] == root
    assert retention.sweep(place)["kept"] == 1
    assert provenance.whence(place, "orders")["operation"] == "WRITE"
    assert {row["file"] for row in Lake(root).refused()} == {"orders/orders-00000009.json"}
    examined = [*Lake(root).examine(), *index.examine(place), *results.examine(place)]
    assert [finding for finding in examined if finding.problem] == []
    assert Lake(root).rebuild(run_id="rebuild-1")["equal"].all()

    monkeypatch.setenv("ETL_ROOT", root)
    from app.api import app, settings

    settings.cache_clear()  # read once in the life of a service
    client = TestClient(app)
    assert client.get("/ready").json()["batch"] == 1
    assert len(client.get("/results/late_deliveries").json()["rows"]) == answers[root][0].frame.height
    assert client.get(f"/reports/{record['run_id']}").status_code == 200
    monkeypatch.setenv("ETL_ROOT", "s3:/bucket")
    settings.cache_clear()
    assert client.get("/ready").json() == {"detail": "ETL_ROOT is no root: 's3:/bucket': a URL begins with s3://"}
    settings.cache_clear()
    listed = orchestrate(PROJECT, "runs", "list", "--root", root)
    assert record["run_id"] in listed.stdout and listed.returncode == 0, listed.stderr
    shown = orchestrate(PROJECT, "runs", "show", record["run_id"], "--root", root, "--json")
    assert json.loads(shown.stdout)["root"] == root
    url = services.database_url(Path(root)).replace("+aiosqlite", "")
    engine = create_engine(url)
    with engine.connect():
        assert Path(root, "prefect.db").exists() and len(os.listdir(tmp_path)) == 2
    engine.dispose()


def test_a_root_in_an_object_store_may_have_spaces_and_letters_of_any_language(s3_root, stream, made):
    root = f"{s3_root}/a b é 日本"
    source.land(Root.at(root), stream, made)
    ingest_all(root)
    snapshot = Lake(root).snapshot()
    assert snapshot.frame("orders").collect().height == sum(frames["orders"].height for frames in made.values())
    q01 = next(question for question in queries.questions() if question.name == "q01")
    assert queries.ask(q01, snapshot).height > 0
    assert sum(len(engines._read(*piece, ["o_orderkey"], None)) for piece in engines.pieces(snapshot, "orders")) > 0
    place = Root.at(root)
    assert place.is_there() and not Root.at(f"{s3_root}/nothing").is_there()
