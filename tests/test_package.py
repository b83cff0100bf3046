"""What is installed: the engine alone in a wheel, and what notebooks import in an editable install."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import orchestrate
from etl.storage import PROJECT

BESIDE = ["app", "benchmarks", "orchestrate", "tests", "runner", "storage"]


def elsewhere(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run Python in another folder, without what this process or the project adds to its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_a_wheel_holds_the_engine_alone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    assert {name.split("/")[0] for name in names} == {"etl", info}
    assert f"{info}/licenses/LICENSE" in names
    sources = {str(path.relative_to(PROJECT)) for path in (PROJECT / "etl").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_an_editable_install_exposes_what_notebooks_import_and_nothing_beside_it(tmp_path):
    code = "import importlib.util as util, etl.notebook, pipeline\n"
    code += f"print([name for name in {BESIDE} if util.find_spec(name)])"
    done = elsewhere(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_api_and_dashboard_find_the_app_wherever_up_was_started(tmp_path):
    for service in orchestrate.services("r", orchestrate.PORTS, tmp_path)[1:]:
        done = elsewhere("import app; print(app.__file__)", tmp_path, **service.variables)
        assert done.stdout.strip() == str(PROJECT / "app/__init__.py"), done.stderr
