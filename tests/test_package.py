"""What is installed: the engine alone in a wheel, and what notebooks import in an editable install."""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


ENDS = """
import sys, threading, time, types
import polars as pl
from etl import interpreter

def slow(value):
    time.sleep(0.5)
    return value

class Slow:
    def __del__(self, sleep=time.sleep):  # while the interpreter is taken down
        sleep(1)

module = sys.modules["kept"] = types.ModuleType("kept")
module.slow = Slow()
del module
threading.Thread(target=lambda: pl.Series([1]).map_elements(slow, return_dtype=pl.Int64), daemon=True).start()
threading.Thread(target=lambda: (time.sleep(0.1), print("done"))).start()
print("said")
"""


@pytest.mark.parametrize(("how", "status"), [("interpreter.leave(3)", 3), ("sys.exit(3)", -signal.SIGABRT)])
def test_what_polars_still_does_at_the_end_changes_no_exit_status(how, status):
    """The other way is what Python does by itself: where that is 3, too, `leave` is not needed any more."""
    if status < 0 and sys.version_info >= (3, 14):
        status = 3
    done = subprocess.run([sys.executable, "-c", ENDS + how], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "said\ndone\n" if status == 3 else done.stdout), done.stderr
