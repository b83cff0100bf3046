"""What is deployed names what is there."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from etl.params import stages
from etl.storage import PROJECT

DEPLOY = PROJECT / "deploy"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path):
    unit = (DEPLOY / "etl.service").read_text()
    here = unit.replace("/srv/etl/project", str(PROJECT)).replace("User=etl", f"User={os.getuid()}")
    assert here != unit
    (tmp_path / "etl.service").write_text(here)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "etl.service"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_deployed_is_the_home_environment_and_every_variable_is_given():
    dockerfile, unit = (DEPLOY / "Dockerfile").read_text(), (DEPLOY / "etl.service").read_text()
    assert '"up", "--env", "home"' in dockerfile and "up --env home" in unit
    assert stages.environment(PROJECT, "home").machine is None
    for copied in re.search(r"COPY --chown=etl (.*) \./", dockerfile)[1].split():
        assert (PROJECT / copied).exists(), copied
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    asked = {*re.findall(r"\{\$(\w+)\}", (DEPLOY / "Caddyfile").read_text())}
    assert asked == {*compose["services"]["proxy"]["environment"]}
    assert all(f"{name}=" in (PROJECT / "docs/cloud.md").read_text() for name in asked)
