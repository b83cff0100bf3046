"""All notebooks, in real kernels, against what DuckDB says of tpchgen's own Parquet."""

import html
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support import AT, SMALL, ingest_all, orchestrate
from tpch_sql import QUESTIONS, connect, unlike

from etl.questions import results
from etl.runs import index, retention
from etl.storage import PROJECT, Root
from pipeline import Lake, model, queries, source
from pipeline.tables import TABLES

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def full(tmp_path_factory, fork_server) -> tuple[str, list[dict]]:
    """`run all --env full`: the root, and the records that it printed."""
    root = str(tmp_path_factory.mktemp("full") / "root")
    asked = ("run", "all", "--env", "full", "--root", root, "--at", AT, "--json")
    done = orchestrate(PROJECT, *asked, env={"ETL_KERNELS": fork_server})
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
    assert [r["stage"] for r in records] == ["generate", "preprocess", "compact", "query", "score", "train"]
    assert (records[4]["state"], records[4]["reason"]) == ("noop", "no model is published yet: train comes first")
    for record in (*records[:4], records[5]):
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
    half_bad = source.to_json_lines(made[1]["orders"].head(1)) + b"{oops\n{oops\n"
    Root.at(root).write("landing/orders/orders-00000000.json", half_bad)
    asked = ("run", "preprocess", "--root", root, "--at", AT, "--json")
    done = orchestrate(PROJECT, *asked)
    (record,) = json.loads(done.stdout)
    assert (done.returncode, record["state"], record["attempt"]) == (1, "check_failed", 1)
    ((name, why),) = [(check["name"], check["detail"]) for check in record["checks"] if not check["ok"]]
    assert name == "few lines of each file do not fit"
    assert why.startswith(
        "1 file, orders/orders-00000000.json: 2 of 3 lines do not fit: not JSON: Expecting property name"
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
    """Of two questions that draw nothing: to import what draws takes longer than to answer."""
    (project / "params" / "env" / "dask.yml").write_text(f"root: {full[0]}\nmachine: null\ndask: {{n_workers: 1}}\n")
    before = {name: queries.current(Root.at(full[0]), name)[1] for name in ("q06", "q11")}
    done = orchestrate(project, "run", "query", "--env", "dask", "-p", "questions=[q06, q11]", "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["parameters"]["dask"].startswith("tcp://127.0.0.1:")
    for name, answer in before.items():
        pointer, by_dask = queries.current(Root.at(full[0]), name)
        assert pointer["run_id"] == record["run_id"]
        assert_frame_equal(by_dask, answer)


def test_every_folder_that_is_written_is_in_the_table_of_what_goes(full):
    root = Path(full[0])
    text = (PROJECT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `([^`]*)/` \| \S|^\| `([^`]*/\.\.\.)` \| \S", text, re.M)
    patterns = [re.escape(row or deep.removesuffix("/...")) for row, deep in rows]
    patterns = [re.sub(r"<\w+>", "[^/]+", pattern) for pattern in patterns]
    named = re.compile("|".join(f"{p}(?:/.*)?" if deep else p for p, (_, deep) in zip(patterns, rows, strict=True)))
    written = {str(path.parent.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert {"lake/orders", "models", "runs/_delta_log"} <= written
    assert [folder for folder in sorted(written) if not named.fullmatch(folder)] == []


def test_names_that_are_nobodys_break_nothing(full, tmp_path):
    """In every folder: a file system's own folder, a file manager's, a note, a file and a folder called like data."""
    place = Root.at(shutil.copytree(full[0], tmp_path / "root"))
    lake, folders = Lake(place), [path for path in Path(place.url).rglob("*") if path.is_dir()]
    for folder in [Path(place.url), *folders]:
        (folder / "lost+found").mkdir()
        (folder / "README.txt").write_text("read me")
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "2020-01-01.parquet").mkdir()
        (folder / "2020").write_text("a file where a folder may be")
    for folder in ("archive", "refused", "results", "models", "reports", "reports/query"):
        (Path(place.url) / folder).mkdir(exist_ok=True)
        (Path(place.url) / folder / "2020-01-01").write_text("a file in the place of a day")
    (Path(place.url) / "refused/2020-01-02").mkdir()
    (Path(place.url) / "refused/2020-01-02/a.json").write_text("{}")
    (Path(place.url) / "refused/2020-01-02/a.json.why.json").write_text("[1]")
    before, now = lake.snapshot().rows(), datetime.now(UTC)
    for days in range(3):
        done = lake.compact(
            target_mb=64, min_small_files=2, vacuum_hours=24, run_id="c", now=now + timedelta(days=days)
        )
        assert done["failed"].drop_nulls().to_list() == []
        assert not {"archive/2020-01-01", "refused/2020-01-01"} & {*lake.prune(now=now + timedelta(days=days))}
    retention.sweep(place)
    found = [*lake.examine(), *index.examine(place), *results.examine(place), *model.examine(place)]
    assert [finding for finding in found if finding.problem and finding.what != "landing"] == []
    assert lake.refused() == [] and lake.refused_lines().height == 0
    assert {run["stage"] for run in index.newest(place)} == {
        "generate",
        "preprocess",
        "compact",
        "query",
        "score",
        "train",
    }
    assert all(queries.current(place, name)[1].width for name in QUESTIONS)
    lake.backup(Root.at(tmp_path / "backup"))
    assert lake.rebuild()["equal"].all()
    rows = dict(before.select("table", "rows").iter_rows())
    assert dict(lake.snapshot().rows().select("table", "rows").iter_rows()) == rows
    Lake(tmp_path / "other").restore(Root.at(tmp_path / "backup"))
    assert dict(Lake(tmp_path / "other").snapshot().rows().select("table", "rows").iter_rows()) == rows
