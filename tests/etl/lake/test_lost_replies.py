"""An object store that does what it is asked, whose answer is lost on the way: what was committed stays committed."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import duckdb
import polars as pl
import pyarrow as pa
import pytest
import s3fs
from deltalake import write_deltalake
from support import ingest_all

from etl import delta
from etl.storage import Root
from pipeline import Lake, source

ASK = {"target_mb": 64, "min_small_files": 2, "vacuum_hours": 24}


def rows(root: str, tmp_path, table: str = "orders") -> tuple:
    """Rows, keys and money of what is published, by DuckDB on the very files."""
    place, folder = Root.at(root), tmp_path / "read"
    folder.mkdir(exist_ok=True)
    for url in Lake(root).snapshot().files(table):
        name = url.rsplit("/", 1)[-1]
        (folder / name).write_bytes(place.read(f"lake/{table}/{name}"))
    sql = f"select count(*), count(distinct o_orderkey), sum(o_totalprice) from read_parquet('{folder}/*.parquet')"
    (found,) = duckdb.sql(sql).fetchall()
    for file in folder.iterdir():
        file.unlink()
    return found


def given(made: dict, ticks) -> tuple:
    frames = pl.concat([made[tick]["orders"] for tick in ticks])
    return frames.height, frames["o_orderkey"].n_unique(), frames["o_totalprice"].sum()


@pytest.fixture
def credentials_endpoint(monkeypatch) -> Iterator[list[str]]:
    """No keys in the environment, but who hands them out; what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            soon = f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
            keys = {"AccessKeyId": "handed", "SecretAccessKey": "out", "Token": "token", "Expiration": soon}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(keys).encode())

        def log_message(self, *_) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_address[1]}/keys")
    s3fs.S3FileSystem.clear_instance_cache()
    yield asked
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_credentials_that_an_endpoint_hands_out_reach_all_libraries(s3_root, credentials_endpoint, tmp_path):
    place = Root.at(s3_root)
    options = place.storage_options
    keys = {name: options.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
    assert keys == {"ACCESS_KEY_ID": "handed", "SECRET_ACCESS_KEY": "out", "SESSION_TOKEN": "token"}
    columns = {"id": pl.Int64}
    delta.create_table(place, "lake/t", columns, keys=(), properties={}, about={})  # s3fs
    write_deltalake(place.table("lake/t"), pa.table({"id": [1, 2]}), mode="append")
    assert pl.scan_delta(place.table("lake/t")).collect()["id"].to_list() == [1, 2]
    [url] = place.table("lake/t").file_uris()
    assert pl.read_parquet(url, storage_options=place.storage_options).height == 2
    assert credentials_endpoint == ["/keys"] * len(credentials_endpoint) and credentials_endpoint


@pytest.mark.parametrize("says", [True, False])
def test_a_batch_whose_commit_was_not_answered_has_its_rows(s3_root, faulty, stream, made, tmp_path, says):
    faulty.says_which_condition = says
    source.land(Root.at(s3_root), stream, {0: made[0]})
    ingest_all(s3_root)
    source.land(Root.at(s3_root), stream, {1: made[1]})
    commit = f"lake/orders/_delta_log/{2:020d}.json"
    faulty.lose_reply("PUT", commit)
    ingest_all(s3_root)
    assert (faulty.count("PUT", commit, None), faulty.count("PUT", commit, 412)) == (1, 1)
    assert rows(s3_root, tmp_path) == given(made, (0, 1))


def test_a_compaction_whose_commit_was_not_answered_has_its_rows(s3_root, faulty, stream, made, tmp_path):
    for tick in (0, 1):
        source.land(Root.at(s3_root), stream, {tick: made[tick]})
        ingest_all(s3_root)
    commit, started = f"lake/orders/_delta_log/{3:020d}.json", datetime.now(UTC)
    faulty.lose_reply("PUT", commit)
    done = Lake(s3_root).compact(**ASK, run_id="compact-1", now=started)
    assert (faulty.count("PUT", commit, None), faulty.count("PUT", commit, 412)) == (1, 1)
    assert done.filter(table="orders").select("files_before", "files_after", "failed").row(0) == (2, 1, None)
    assert len(Lake(s3_root).snapshot().files("orders")) == 1
    faulty.lose_reply("DELETE", "lake/orders/batch-00000001")
    done = Lake(s3_root).compact(**ASK, run_id="compact-2", now=started + timedelta(days=1))
    assert done.filter(table="orders").select("removed", "failed").row(0) == (2, None)
    assert Root.at(s3_root).names("lake/orders") == [
        "_delta_log",
        Lake(s3_root).snapshot().files("orders")[0].split("/")[-1],
    ]
    assert rows(s3_root, tmp_path) == given(made, (0, 1))
