"""The home machine at Coiled: its own client; a control plane and SSH on loopback, Docker played in a folder."""

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys

import boto3
import pytest
from support import copy_project, environment, s3, s3_variables

from etl import params
from etl.serve import deployed
from etl.storage import PROJECT

BLOCK = {"vm_type": "t3.medium", "region": "us-east-2"}


def home(block, root="s3://bucket/etl"):
    project = params.load(PROJECT, "home")
    return deployed.read(
        dataclasses.replace(project, environment=dataclasses.replace(project.environment, root=root, deploy=block))
    )


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (None, "params/env/home.yml has no `deploy` block, which says on what machine"),
        ({"vm_typ": "t3.medium"}, "deploy: unknown key 'vm_typ'; did you mean 'vm_type'?"),
        ({"region": 2}, "deploy: region: expected text, got 2"),
        ({"boot": "soon"}, 'deploy: boot: expected a duration such as "15 minutes"'),
        ({"tags": ["etl"]}, "deploy: tags: expected name: value lines, such as {project: etl}"),
        ({"secrets": ["of mine"]}, "deploy: secrets: expected the names of secrets, such as [ETL_API_TOKEN]"),
        ({"disk_size": "30 GB"}, "deploy: disk_size: expected a whole number of GB, got '30 GB'"),
        ({"disk_size": 0}, "deploy: disk_size: expected a whole number of GB, got 0"),
        ({"vm_type": 3}, "deploy: vm_type: expected a name such as t3.medium, or a list of them, got 3"),
        ({"vm_type": []}, "deploy: vm_type: expected a name such as t3.medium, or a list of them, got []"),
        ({"tags": {"project": {"of": "etl"}}}, "deploy: tags: expected name: value lines, such as {project: etl}"),
        ({"subdomain": "ours"}, "deploy: subdomain: is for the API's port alone: port: 8000 is missing"),
        ({"port": 8000, "subdomain": "ours"}, "ETL_API_TOKEN among the secrets"),
        ({"port": 8501, "subdomain": "ours", "secrets": ["ETL_API_TOKEN"]}, "8000, is the only one that may be open"),
    ],
)
def test_what_was_asked_wrongly_is_said(block, why):
    with pytest.raises(ValueError) as error:
        home(block)
    assert why in str(error.value)


def test_nothing_is_asked_for_that_could_not_be_of_use(tmp_path, monkeypatch):
    assert "the root" in deployed.problems(home(BLOCK, str(tmp_path)))[0]
    monkeypatch.setattr(deployed, "unreachable", lambda _: [])
    monkeypatch.setattr(deployed.Root, "region", lambda _: "eu-central-1")
    assert "us-east-2 is not the bucket's, eu-central-1" in deployed.problems(home(BLOCK))[0]
    [missing] = deployed.problems(home({"secrets": ["NOT_SET_ANYWHERE"]}))
    assert "NOT_SET_ANYWHERE" in missing


def deploy(project, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "orchestrate.py", "deploy", *arguments],
        env=environment(project) | variables,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_bucket_a_token_and_a_service_that_are_none_are_a_sentence_each_and_nothing_is_asked_for(tmp_path):
    pytest.importorskip("coiled")
    with s3() as server:
        variables = s3_variables(server) | {"DASK_COILED__SERVER": "nonsense", "DASK_COILED__TOKEN": "secret-of-mine"}
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        boto3.client("s3", endpoint_url=server, region_name="us-east-1", **keys).create_bucket(Bucket="there")
        told = {
            "the root s3://nowhere/etl cannot be read: there is no such bucket": ("s3://nowhere/etl", {}),
            "Coiled's service at nonsense cannot be reached: ValueError: unknown url type:": ("s3://there/etl", {}),
            "Coiled's token holds a line break": ("s3://there/etl", {"DASK_COILED__TOKEN": "secret-of-mine\nagain"}),
        }
        for sentence, (root, others) in told.items():
            done = deploy(PROJECT, "--root", root, **variables | others)
            said = done.stdout + done.stderr
            assert (done.returncode, said.count("\n")) == (2, 1), said
            assert said.startswith(sentence) and "secret-of-mine" not in said


def test_to_look_and_to_give_back_are_not_asked_at_once():
    done = deploy(PROJECT, "--status", "--stop")
    assert (done.returncode, done.stderr) == (2, "--status or --stop: only one of them\n")


def test_a_machine_is_given_back_whatever_became_of_its_root(monkeypatch):
    there, asked = [7], []

    class Cloud:
        def delete_cluster(self, cluster, **_):
            asked.append(there.remove(cluster) or cluster)

    def gone(*_):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(deployed, "_coiled", lambda home: contextlib.nullcontext(Cloud()))
    monkeypatch.setattr(deployed, "_cluster", lambda home: next(iter(there), None))
    monkeypatch.setattr(deployed.heartbeat, "read", gone)
    monkeypatch.setattr(deployed.Root, "read_json", gone)
    monkeypatch.setattr(deployed.machines, "coiled_problems", list)
    monkeypatch.setattr(deployed.machines, "root_problems", lambda root: ["there is no such bucket"])
    asks = home(BLOCK)
    assert deployed.unreachable(asks) and not deployed.unreachable(asks, needs_root=False)
    assert deployed.stop(asks) and asked == [7] and not deployed.stop(asks)


def test_coileds_command_takes_what_a_block_may_have():
    run = pytest.importorskip("coiled.cli.run")
    assert {*deployed.OF_RUN, "name", "env", "tag", "open_extra_ports"} <= {
        *inspect.signature(run.start_run).parameters
    }


def test_what_is_there_and_well_is_left_alone():
    told = {"cluster": 7, "digest": "now"}
    cases = {
        "": (7, told, True),
        "there is no such machine": (None, told, False),
        "it is not the one that was deployed last": (8, told, True),
        "the code or the arguments have changed": (7, told | {"digest": "before"}, True),
        "`up` does not beat there": (7, told, False),
    }
    assert cases.keys() == {
        deployed.State(cluster, last, None, is_beating).why_again("now") for cluster, last, is_beating in cases.values()
    }


def test_home_is_deployed_left_alone_deployed_again_and_given_back(tmp_path):
    pytest.importorskip("coiled")
    project = copy_project(tmp_path / "project")
    shutil.copy(PROJECT / "requirements.lock", project)
    with s3() as server:
        variables = s3_variables(server)
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        boto3.client("s3", endpoint_url=server, region_name="us-east-1", **keys).create_bucket(Bucket="machines")
        path = os.pathsep.join([str(project), str(PROJECT / "tests")])
        done = subprocess.run(
            [sys.executable, PROJECT / "tests" / "coiled_home.py", tmp_path / "hosts"],
            env=environment(project) | variables | {"PYTHONPATH": path},
            cwd=project,
            capture_output=True,
            text=True,
            timeout=900,  # on busy cores
        )
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout.splitlines()[-1])
    at_work = "`up` is at work on etl-home, on s3://machines/home"
    assert {name: (status, said, is_open) for name, (status, said, is_open) in played["told"].items()} == {
        "no secret": (2, played["told"]["no secret"][1], []),  # nothing was asked for
        "status of none": (1, "to be deployed: there is no such machine", []),
        "deployed": (0, at_work, [1]),
        "again": (0, "etl-home is at work as it is to be: nothing was done", [1]),
        "status of saved": (0, "all is as it is to be", [1]),
        "status of changed": (1, "to be deployed: the code or the arguments have changed", [1]),
        "changed": (0, at_work, [2]),
        "stopped": (0, "etl-home is given back", []),
        "status of stopped": (1, "to be deployed: there is no such machine", []),
    }, done.stderr
    wanted, beat = played["wanted"], played["beat"]
    assert (wanted["scheduler_instance_types"], wanted["tags"]["bill"]) == (["t3.medium"], "etl")
    ports = {port for rule in wanted["options"]["firewall_spec"]["ingress"] for port in rule["ports"]}
    assert 8000 in ports and not {8501, 4200} & ports
    assert beat["token"] == played["token"]  # as it is, though words of a shell carry it
    assert beat["listens"] == "0.0.0.0" and played["token"] not in json.dumps(wanted)
