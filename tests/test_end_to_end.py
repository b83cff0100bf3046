"""All five notebooks, in real kernels, against what DuckDB says of tpchgen's own Parquet."""

import html
import json
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support import AT, SMALL, ingest_all, orchestrate
from tpch_sql import QUESTIONS, connect, unlike

from etl.storage import PROJECT, Root
from pipeline import Lake, queries, source
from pipeline.tables import TABLES


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[str, list[dict]]:
    """`run all --env full`: the root, and the records that it printed."""
    root = str(tmp_path_factory.mktemp("full") / "root")
    done = orchestrate(PROJECT, "run", "all", "--env", "full", "--root", root, "--at", AT, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, json.loads(done.stdout)


@pytest.fixture(scope="module")
def canonical(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sys.executable).with_name("tpchgen-cli")
    subprocess.run([generator, "parquet", "--scale-factor=0.01", f"--output-dir={folder}"], check=True)
    return folder


def test_every_stage_is_ok_and_says_what_it_did(full):
    root, records = full
    assert [r["stage"] for r in records] == ["generate", "preprocess", "compact", "query", "train"]
    for record in records:
        assert record["state"] == "ok"
        assert record["metrics"]["rows"] > 0
        assert record["checks"] and all(check["ok"] for check in record["checks"])
        report = Root.at(root).read(f"{record['report']}/report.html")
        assert b"<script" not in report and b"data:image/png" in report
        most = 400_000 if record["stage"] == "query" else 100_000
        assert len(report) < most, f"{record['stage']}: {len(report)} bytes"
    written = records[1]["versions_written"]
    assert set(written) == set(TABLES)
    last = Lake(Root.at(root)).table("orders", written["orders"]).history(1)[0]
    assert (last["run_id"], last["stage"]) == (records[1]["run_id"], "preprocess")
    assert records[3]["versions_read"]["lineitem"] >= written["lineitem"]


def test_the_lakes_eight_tables_are_tpch_row_by_row(full, canonical):
    snapshot = Lake(full[0]).snapshot()
    for name, table in TABLES.items():
        expected = pl.read_parquet(canonical / f"{name}.parquet")
        got = snapshot.frame(name, expected.columns).collect()
        assert_frame_equal(got.sort(table.key), expected.sort(table.key))


def test_the_questions_have_the_answers_of_another_engine(full, canonical):
    snapshot = Lake(full[0]).snapshot()
    origin = datetime.fromisoformat(json.loads(Root.at(full[0]).read("landing/stream.json"))["origin"])
    connection = connect(canonical, placed=origin - timedelta(seconds=30))
    for name, expected in QUESTIONS.items():
        pointer, answer = queries.current(Root.at(full[0]), name)
        assert not (found := unlike(answer, expected(connection, snapshot.as_of))), f"{name}: {found}"
        assert pointer["batch"] == snapshot.batch


def test_the_report_reads_as_the_business_asks(full):
    root, records = full
    page = Root.at(root).read(f"{records[3]['report']}/report.html").decode()
    for question in queries.questions():
        assert html.escape(question.title, quote=False) in page
        assert html.escape(question.text, quote=False) in page
    assert page.count("This is the first answer.") == len(QUESTIONS)
    assert page.count("data:image/png") == sum(question.chart is not None for question in queries.questions())


def test_questions_that_fail_are_told_and_keep_no_other_from_its_answer(full, tmp_path):
    """A table's file is gone: who reads that table has no answer, everybody else has."""
    root = str(tmp_path / "root")
    shutil.copytree(f"{full[0]}/lake", f"{root}/lake")
    for url in Lake(root).snapshot().files("partsupp"):
        Path(url).unlink()
    asked = ("-p", "questions=[q01, q11, q22, recommended_suppliers]")
    done = orchestrate(PROJECT, "run", "query", "--root", root, "--at", AT, *asked, "--json")
    (record,) = json.loads(done.stdout)
    assert (done.returncode, record["state"], record["attempt"]) == (1, "check_failed", 1)
    failed = {check["name"]: check["detail"] for check in record["checks"] if not check["ok"]}
    assert set(failed) == {"q11 has an answer", "recommended_suppliers has an answer"}
    assert all("No such file" in why for why in failed.values())
    assert Root.at(root).names("results") == ["q01", "q22"]
    assert queries.current(Root.at(root), "q01")[1].height == 4
    assert record["metrics"]["questions"] == 2


def test_generate_again_gives_the_same_bytes_and_preprocess_again_changes_nothing(landed):
    files = [f"landing/{t}/{n}" for t in TABLES for n in Root.at(landed).names(f"landing/{t}")]
    before = {name: Root.at(landed).read(name) for name in files}
    make = ("run", "generate", "--root", landed, "--at", AT, *SMALL[:6], "-p", "tick=1", "--json")
    (again,) = json.loads(orchestrate(PROJECT, *make).stdout)
    assert (again["state"], again["metrics"]["ticks"]) == ("ok", 1)
    assert files and {name: Root.at(landed).read(name) for name in files} == before

    ingest_all(landed)
    versions = {t: Lake(Root.at(landed)).table(t).version() for t in Lake(landed).columns}
    (second,) = json.loads(orchestrate(PROJECT, "run", "preprocess", "--root", landed, "--at", AT, "--json").stdout)
    assert second["state"] == "noop"
    assert {t: Lake(Root.at(landed)).table(t).version() for t in Lake(landed).columns} == versions


def test_a_bad_file_is_refused_and_told_and_the_others_are_in(root, stream, made):
    source.land(Root.at(root), stream, {1: made[1]})
    half_bad = source.to_json_lines(made[1]["orders"].head(1)) + b"{oops\n"
    Root.at(root).write("landing/orders/orders-00000000.json", half_bad)
    asked = ("run", "preprocess", "--root", root, "--at", AT, "--json")
    done = orchestrate(PROJECT, *asked)
    (record,) = json.loads(done.stdout)
    assert (done.returncode, record["state"], record["attempt"]) == (1, "check_failed", 1)
    ((name, why),) = [(check["name"], check["detail"]) for check in record["checks"] if not check["ok"]]
    assert name == "few lines of each file do not fit"
    assert why.startswith(
        "1 file, orders/orders-00000000.json: 1 of 2 lines do not fit: not JSON: Expecting property name"
    )
    assert (record["metrics"]["files"], record["metrics"]["files_refused"]) == (2, 1)
    assert set(record["versions_written"]) == {"orders", "lineitem"}
    assert Lake(root).snapshot().frame("orders").collect().height == made[1]["orders"].height
    assert Root.at(root).names("landing/orders") == []
    assert [row["file"] for row in Lake(root).refused_files()] == ["orders/orders-00000000.json"]


def test_a_run_that_could_take_no_file_says_so_and_stands_in_the_way_of_none(root, stream, made):
    Root.at(root).write("landing/orders/orders-00000009.json", b"{oops\n")
    asked = ("run", "preprocess", "--root", root, "--at", AT, "--json")
    done = orchestrate(PROJECT, *asked)
    (record,) = json.loads(done.stdout)
    failed = [(check["name"], check["detail"]) for check in record["checks"] if not check["ok"]]
    assert (done.returncode, record["state"]) == (1, "check_failed")
    ((name, why),) = failed
    assert name == "not every file was refused"
    assert why.startswith(
        "0 taken, 1 refused; too few lines fit: 1 file, orders/orders-00000009.json: 1 of 1 lines do not"
    )
    assert [row["file"] for row in Lake(root).refused_files()] == ["orders/orders-00000009.json"]
    source.land(Root.at(root), stream, {1: made[1]})
    (record,) = json.loads(orchestrate(PROJECT, *asked).stdout)
    assert record["state"] == "ok" and Lake(root).snapshot().batch == 1


def test_compact_deletes_nothing_by_the_time_it_is_given_and_tells_of_a_table_that_fails(scattered):
    """One table's file is not what it was: all others are compacted and published, and the archive is whole."""
    place, before = Root.at(scattered), Lake(scattered).snapshot()
    archived = place.files("archive")
    Path(before.files("lineitem")[0]).write_bytes(b"x")
    asked = ("run", "compact", "--root", scattered, "--at", "2100-01-01T00:00:00", "-p", "min_small_files=2", "--json")
    done = orchestrate(PROJECT, *asked)
    (record,) = json.loads(done.stdout)
    assert (done.returncode, record["state"]) == (1, "check_failed")
    failed = {check["name"]: check["detail"] for check in record["checks"] if not check["ok"]}
    assert list(failed) == ["every table could be compacted"]
    assert failed["every table could be compacted"].startswith("lineitem: ArrowInvalid: ")
    after = Lake(scattered).snapshot()
    assert (len(after.files("orders")), after.versions["lineitem"]) == (1, before.versions["lineitem"])
    assert record["versions_written"] == {table: after.versions[table] for table in ("orders", "files")}
    assert archived and place.files("archive") == archived


def test_the_same_answers_on_a_dask_cluster(full, project):
    (project / "params" / "env" / "dask.yml").write_text(f"root: {full[0]}\nmachine: null\ndask: {{n_workers: 1}}\n")
    before = {name: queries.current(Root.at(full[0]), name)[1] for name in ("q01", "q05")}
    done = orchestrate(project, "run", "query", "--env", "dask", "-p", "questions=[q01, q05]", "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["parameters"]["dask"].startswith("tcp://127.0.0.1:")
    for name, answer in before.items():
        pointer, by_dask = queries.current(Root.at(full[0]), name)
        assert pointer["run_id"] == record["run_id"]
        assert_frame_equal(by_dask, answer)
