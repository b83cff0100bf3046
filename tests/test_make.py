"""What make does before anything is installed."""

import json
import shutil
import subprocess
import sys

import pytest

from etl.storage import PROJECT

OLD = "exit 1"  # as one whose version is not among those that are wanted
STAND_IN = "echo 'pyenv: not found' >&2; exit 127"
WORKS = "exit 0"


@pytest.fixture
def make(tmp_path):
    """Run make with a PATH that has the named Pythons alone; what each does is given as a line of shell."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "echo"):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(*arguments: str, **pythons: str) -> subprocess.CompletedProcess:
        for name, does in pythons.items():
            path = tools / name.replace("_", ".")
            path.write_text(f"#!{tools}/sh\n{does}\n")
            path.chmod(0o755)
        command = ["make", "-s", "-f", PROJECT / "Makefile", *arguments]
        return subprocess.run(command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": WORKS, "python3_11": WORKS, "python3_13": WORKS}, "python3.13"),
        ({"python3_14": STAND_IN, "python3_13": OLD, "python3_12": WORKS, "python3_11": WORKS}, "python3.12"),
        ({"python3_10": WORKS, "python3": WORKS}, "python3"),
    ],
)
def test_make_takes_the_newest_python_that_works(make, pythons, taken):
    assert make("--eval=which:; @echo '$(PYTHON)'", "which", **pythons).stdout == f"{taken}\n"


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3",)])
def test_without_a_python_that_works_make_says_what_is_needed(make, tmp_path, arguments):
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "pyproject.toml").touch()
    done = make("setup", *arguments, python3=OLD, python3_14=STAND_IN)
    assert done.returncode == 2 and done.stdout.startswith("Python 3.11 to 3.14 with its venv is needed")
    assert "setting up" not in done.stdout and "pyenv" not in done.stderr


def test_format_leaves_a_notebook_that_was_saved_in_jupyterlab_as_it_was(make, tmp_path):
    original, path = (PROJECT / "notebooks/train.ipynb").read_text(), tmp_path / "train.ipynb"
    nb = json.loads(original)
    about = {"codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py", "version": "3.11.7"}
    about |= {"mimetype": "text/x-python", "nbconvert_exporter": "python", "pygments_lexer": "ipython3"}
    nb["metadata"]["language_info"] |= about
    for cell in nb["cells"]:
        cell["metadata"] |= {"editable": True, "slideshow": {"slide_type": ""}, "trusted": True}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}]}
            cell["metadata"]["execution"] = {"iopub.status.busy": "2026-03-01T12:00:00Z"}
    path.write_text(json.dumps(nb, indent=1))
    left = make('--eval=which:; @echo "$(LEFT)"', "which").stdout.strip()
    subprocess.run([sys.executable, "-m", "nbstripout", "--keep-id", "--extra-keys", left, path], check=True)
    assert path.read_text() == original


def test_this_python_is_one_that_works(make):
    condition = make('--eval=which:; @echo "$(WORKS)"', "which").stdout
    assert subprocess.run([sys.executable, "-c", condition]).returncode == 0
