"""Where a run's work is done: here without Coiled, or with the calls that the installed Coiled really takes."""

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
import yaml
from faults import machines as machine_faults
from support import free_port

from etl import params
from etl.cli import checking
from etl.runs import dispatch, index, machines
from etl.runs.record import RunRecord
from etl.storage import PROJECT, Root
from pipeline import Lake, queries

AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def cloud() -> params.Project:
    return params.load(PROJECT, "cloud")


def test_here_never_imports_coiled():
    code = "import sys, etl.runs.dispatch, etl.runs.engine; print('coiled' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_request_is_plain_data_with_what_is_supplied(cloud):
    stage = cloud.stages["query"]
    request = dispatch.make_request(stage, cloud.environment, AT, 2, "tcp://127.0.0.1:1")
    assert request.run_id.startswith("query-20260301T120000-")
    assert request.parameters["root"] == request.root == "s3://example-bucket/etl"
    assert request.parameters["dask"] == "tcp://127.0.0.1:1"
    assert request.parameters["scheduled_for"] == "2026-03-01T12:00:00+00:00"
    assert request.origins["run_id"] == "supplied"
    assert request.attempt == 2
    yaml.safe_dump(dataclasses.asdict(request)["parameters"])


def test_the_machine_blocks_are_what_coiled_takes(cloud):
    """As far as the service is asked: there is no token here."""
    pytest.importorskip("coiled")
    for name, stage in cloud.stages.items():
        block = machines.read(name, stage.machine)
        told = machines.problems(block, Root.at("s3://bucket/etl"))
        assert told == ["Coiled's token is not set: run `coiled login`, or set DASK_COILED__TOKEN"]
        wrong = machines.read(name, stage.machine | {"vm_tipe": "m7i.large"})
        [told] = machines.problems(wrong, Root.at("s3://bucket/etl"))
        assert told == "machine: unknown key 'vm_tipe'; did you mean 'vm_type'?"


@pytest.mark.parametrize(("rows", "is_away"), [(None, False), (10, False), (11, True)])
def test_a_machine_is_asked_for_by_the_rows_of_the_last_run(cloud, tmp_path, rows, is_away):
    stage = dataclasses.replace(cloud.stages["query"], machine_above_rows=10)
    if rows is not None:
        record = RunRecord(
            "query", "query-1", str(tmp_path), AT.isoformat(), 1, {}, {}, "reports/x", "h", AT.isoformat()
        )
        record.ended_at, record.metrics = AT.isoformat(), {"rows": rows}
        index.append(Root.at(tmp_path), record)
    assert dispatch.is_large_enough(stage, str(tmp_path)) == is_away
    assert dispatch.is_large_enough(cloud.stages["query"], str(tmp_path))


def test_a_run_for_which_no_machine_is_to_be_had_fails_here_with_a_report(cloud, tmp_path):
    """Here for a root that no machine can reach; the same goes for a service that is down."""
    stage = dataclasses.replace(cloud.stages["query"], dask=None, retries=0)
    environment = dataclasses.replace(cloud.environment, root=str(tmp_path))
    record = dispatch.run_stage(stage, environment, scheduled_for=AT)
    why = f"no machine: the root {tmp_path} is on this machine, and the run on another; use an s3:// root"
    assert (record.state, record.reason) == ("failed", why)
    assert why in (tmp_path / record.report / "report.html").read_text()
    assert [row["run_id"] for row in index.newest(Root.at(tmp_path))] == [record.run_id]


def test_a_block_without_a_key_is_a_machine_to_those_who_look_before_it_begins_too(cloud, tmp_path):
    query = dataclasses.replace(cloud.stages["query"], machine={})
    why = f"the root {tmp_path} is on this machine, and the run on another; use an s3:// root"
    assert machines.stage_problems(query, str(tmp_path)) == [why]
    project = dataclasses.replace(params.load(PROJECT, "local"), stages={"query": query})
    [problem] = checking._of_machines(project, str(tmp_path))
    assert "is on this machine, and query on another" in problem.message


def test_a_machine_does_not_come_to_workers_of_this_one(cloud, tmp_path):
    machine = {"ssh": "etl@big.example.com", "project": "/srv/etl"}
    query = dataclasses.replace(cloud.stages["query"], machine=machine)
    generate = dataclasses.replace(cloud.stages["generate"], machine=machine, dask={"n_workers": 2})  # asks no cluster
    why = "dask: n_workers are processes of this machine, and the run is on another; use an address, or null"
    here = dataclasses.replace(query, dask={"n_workers": 2})
    assert machines.stage_problems(here, str(tmp_path)) == [why]
    project = dataclasses.replace(params.load(PROJECT, "local"), stages={"query": here, "generate": generate})
    assert list(map(str, checking._of_machines(project, str(tmp_path)))) == [f"params/env/local.yml: query: {why}"]
    for dask in (None, {"address": "tcp://10.0.0.1:8786"}):
        assert machines.stage_problems(dataclasses.replace(query, dask=dask), str(tmp_path)) == []


def test_a_machine_is_asked_for_again_when_another_run_closed_the_clients_connections(tmp_path, monkeypatch):
    coiled, asked = pytest.importorskip("coiled"), []
    ClientConnectionError = type("ClientConnectionError", (Exception,), {})

    class Function:
        client, submit = mock.Mock(), mock.Mock()
        submit.return_value.result.return_value = 0

        @property
        def cluster(self):
            if len(asked) == 1:
                raise ClientConnectionError("Connector is closed.")

    monkeypatch.setattr(coiled, "function", lambda **arguments: asked.append(arguments) or (lambda _: Function()))
    block = machines.read("query", {"vm_type": "m7i.large", "extra_kwargs": {"unset_single_threading_variables": True}})
    machine = machines.Coiled(block, mock.Mock(root=str(tmp_path), run_id="query-1"), {})
    machine.begin()
    first, second = asked
    assert first == second and first["name"] == machine.name and first["extra_kwargs"]["send_dask_config"] is False


def test_no_block_is_no_cluster_and_an_address_is_passed_on():
    with dispatch.cluster(None) as found:
        assert found == (None, {})
    with dispatch.cluster({"address": "tcp://10.0.0.1:8786"}) as found:
        assert found == ("tcp://10.0.0.1:8786", {})


def test_where_no_scheduler_listens_the_run_fails_at_once_and_says_so(cloud, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = dataclasses.replace(params.load(PROJECT, "local").environment, root=str(tmp_path))
    query = dataclasses.replace(cloud.stages["query"], machine=None, dask={"address": address}, retries=0)
    record = dispatch.run_stage(query, environment, scheduled_for=AT)
    assert record.state == "failed" and record.reason.startswith("no Dask cluster: OSError: nobody answers at tcp://")


def _what_a_worker_tells() -> list[str]:
    """On a worker."""
    logger, told = logging.getLogger("distributed.worker"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    for said in ("Failed to communicate with scheduler during heartbeat.", "Compute Failed"):
        logger.error(said)
    logger.removeHandler(handler)
    return told


def test_a_local_cluster_listens_on_loopback_and_goes():
    from distributed import Client

    with dispatch.cluster({"n_workers": 1}) as (address, _):
        assert address.startswith("tcp://127.0.0.1:")
        with Client(address) as client:
            assert client.submit(sum, [1, 2]).result(timeout=60) == 3
            [blocked] = client.run(signal.pthread_sigmask, signal.SIG_BLOCK, ()).values()
            assert signal.SIGINT in blocked  # the terminal's, which this process alone answers
            [told] = client.run(_what_a_worker_tells).values()
            assert told == ["Compute Failed"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(OSError), Client(address, timeout=1):
        pass


def test_a_coiled_cluster_takes_the_blocks_arguments():
    coiled = pytest.importorskip("coiled")
    with mock.patch.object(coiled, "Cluster", autospec=True) as cluster:
        cluster.return_value.__enter__.return_value.scheduler_address = "tls://1.2.3.4:8786"
        with dispatch.cluster({"coiled": {"n_workers": 4, "region": "us-east-2"}}) as (address, _):
            assert address == "tls://1.2.3.4:8786"
        cluster.assert_called_once_with(n_workers=4, region="us-east-2")
        names = []
        for most in (8, 8, 16):  # adaptive, and found again while it is the same
            with dispatch.cluster({"coiled": {"n_workers": [0, most], "idle_timeout": "10 minutes"}}):
                asked = cluster.call_args.kwargs
            assert (asked["n_workers"], asked["shutdown_on_close"]) == ([0, most], False)
            names.append(asked["name"])
        assert names[0] == names[1] != names[2]


def test_the_questions_are_answered_on_a_cluster_of_coileds(filled):
    """By its own client; the cluster's key gets to the kernel, and nowhere else."""
    pytest.importorskip("coiled")
    script = PROJECT / "tests" / "coiled_machines.py"
    done = subprocess.run([sys.executable, script, "questions", filled], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["state"] == "ok", told["reason"]
    assert told["wanted"]["name"] == "questions", told["wanted"]
    assert told["deleted"]
    assert told["parameters"]["dask"].startswith("tls://127.0.0.1:")
    for question in queries.questions():
        if question.name in told["parameters"]["questions"]:
            pointer, answer = queries.current(Root.at(filled), question.name)
            assert pointer["run_id"] == told["run_id"]
            assert answer.equals(queries.ask(question, Lake(filled).snapshot()))
    a_line = told["key"].splitlines()[5].encode()
    written = [path for path in Path(filled).rglob("*") if path.is_file()]
    assert Path(filled, told["report"], "report.html") in written
    assert not [path for path in written if a_line in path.read_bytes()]


def test_machines_of_coileds_are_lost_and_refused_with_a_true_record():
    """A lost worker's run, which Dask would run again, has one kernel; the campaign has the other faults."""
    pytest.importorskip("coiled")
    assert machine_faults.machines(1, 1, "worker,refused")


def test_a_run_whose_cluster_cannot_be_had_fails_and_says_so(tmp_path):
    """Here for a misspelt argument; the same goes for a service that is down."""
    pytest.importorskip("coiled")
    local = params.load(PROJECT, "local")
    stage = dataclasses.replace(local.stages["query"], dask={"coiled": {"n_wrokers": 2}}, retries=0)
    record = dispatch.run_stage(stage, dataclasses.replace(local.environment, root=str(tmp_path)), scheduled_for=AT)
    assert (record.state, record.reason[:27]) == ("failed", "no Dask cluster: TypeError:")
    assert "n_wrokers" in record.reason
    page = (tmp_path / record.report / "report.html").read_text()
    assert "no Dask cluster" in page and "n_wrokers" in page


def test_a_cancelled_run_is_not_repeated(cloud, tmp_path):
    stage = dataclasses.replace(params.load(PROJECT, "local").stages["query"], retries=3)
    environment = dataclasses.replace(cloud.environment, root=str(tmp_path))
    cancel = threading.Event()
    cancel.set()
    record = dispatch.run_stage(stage, environment, scheduled_for=AT, cancel=cancel)
    assert (record.state, record.attempt) == ("cancelled", 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        ("<<<<<<< HEAD\n{}\n=======\n", "line 1 is a marker of git: a merge is to be finished"),
        ("\ufeff{}", "begins with a byte order mark; save it as UTF-8 without one"),
        ('{"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code"}]}', "not a notebook: cell 1 is none"),
    ],
)
def test_a_notebook_that_breaks_while_up_is_at_work_is_a_failed_run_with_a_report(tmp_path, content, why):
    local = params.load(PROJECT, "local")
    notebook = tmp_path / "query.ipynb"
    if content is not None:
        notebook.write_text(content)
    stage = dataclasses.replace(local.stages["query"], notebook_path=notebook, retries=0)
    record = dispatch.run_stage(stage, dataclasses.replace(local.environment, root=str(tmp_path)), scheduled_for=AT)
    assert (record.state, record.reason) == ("failed", f"notebooks/query.ipynb: {why}")
    assert why in (tmp_path / record.report / "report.html").read_text()
    assert [row["run_id"] for row in index.newest(Root.at(tmp_path), state="failed")] == [record.run_id]
