"""The engine by Papermill's own command, as people run notebooks that are of no stage."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support import busy_s
from test_engine import cell_states, notebook

PAPERMILL = Path(sys.executable).with_name("papermill")


def write(folder: Path, *cells: str) -> None:
    nb = notebook(*cells)
    nb.metadata["language_info"] = {"name": "python"}  # as JupyterLab does, and Papermill wants
    nbformat.write(nb, folder / "in.ipynb")


def papermill(folder: Path, *cells: str, options: tuple = ("-p", "rows", "5"), **variables: str) -> tuple:
    """(exit status, what it said, the file it wrote or None)"""
    write(folder, *cells)
    command = [PAPERMILL, "--engine", "etl", "in.ipynb", "out.ipynb", *options]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    out = folder / "out.ipynb"
    return done.returncode, done.stderr, nbformat.read(out, 4) if out.exists() else None


def test_a_run_that_goes_well_has_its_parameters_and_all_that_it_printed(tmp_path):
    cells = ("# Count", "rows: int = 1", "from pathlib import Path\nprint(Path.cwd(), rows)\nprint('x' * 600_000)")
    status, said, nb = papermill(tmp_path, *cells, "from etl.notebook import record\nrecord(rows=rows)")
    assert status == 0, said
    assert set(cell_states(nb)) == {"ok"} and nb.metadata.runner["state"] == "ok"
    assert [cell.source for cell in nb.cells if "injected-parameters" in cell.metadata.get("tags", [])] == [
        "# Parameters\nrows = 5\n"
    ]
    [shown] = nb.cells[3].outputs
    assert shown.text == f"{tmp_path} 5\n" + "x" * 600_000 + "\n"
    assert nb.metadata.papermill["parameters"] == {"rows": 5} and nb.metadata.papermill["input_path"] == "in.ipynb"
    assert not nb.metadata.papermill["exception"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ipynb", "out.ipynb"]


ENDS = {  # the last cell but one, what it ends in, what is said of it
    "killed": ("import os; os.kill(os.getpid(), 9)", "killed", "killed by SIGKILL in 'Write'"),
    "raised": ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
    "exit()": ("exit()", "failed", "called exit()"),
    "check": ("from etl.notebook import check\ncheck('some', False)", "check_failed", "1 check failed: some"),
}


@pytest.mark.parametrize("ending", ENDS)
def test_a_run_that_ends_early_is_exit_status_1_and_cells_after_it_never_ran(tmp_path, ending):
    code, state, reason = ENDS[ending]
    status, said, nb = papermill(tmp_path, "rows: int = 1", "# Write", code, "print('never')")
    assert status == 1 and reason in said
    assert nb.metadata.runner["state"] == state and reason in nb.metadata.runner["reason"]
    assert nb.metadata.papermill["exception"]
    assert cell_states(nb)[-1] == "never_ran" and set(cell_states(nb)[:-2]) == {"ok"}
    statuses = [cell.metadata.papermill["status"] for cell in nb.cells if "papermill" in cell.metadata]
    assert statuses[-2:] == ["failed", "pending"] and reason in nb.cells[0].source


def test_a_run_that_stops_by_itself_is_a_success_whose_later_cells_never_ran(tmp_path):
    code = "from etl.notebook import stop\nstop('no new files')"
    status, said, nb = papermill(tmp_path, "rows: int = 1", code, "print('never')")
    assert status == 0, said
    assert (nb.metadata.runner["state"], cell_states(nb)[-2:]) == ("noop", ["ok", "never_ran"])
    assert "Stopped: no new files" in str(nb.cells[-3].outputs)


def test_the_execution_timeout_is_the_deadline_of_the_whole_run(tmp_path):
    deadline = f"{busy_s(6):.0f}"
    wait = "import time\nfor _ in range(600):\n    time.sleep(0.1)"
    options = ("--execution-timeout", deadline)
    status, said, nb = papermill(tmp_path, "rows: int = 1", wait, "print('never')", options=options)
    assert status == 1 and f"deadline of {deadline} s passed" in said
    assert cell_states(nb)[-2:] == ["timed_out", "never_ran"]


def test_no_secret_is_in_the_file_nor_in_what_is_said(tmp_path):
    cells = (
        "rows: int = 1\nkey: Secret = 'TOY'",
        "from etl.notebook import secret\nprint(secret(key), 'tall-giraffe'[::-1])\nraise ValueError(secret(key))",
    )
    status, said, nb = papermill(tmp_path, "from etl.notebook import Secret", *cells, TOY="tall-giraffe")
    assert status == 1 and "ValueError: ‹secret TOY›" in said
    assert "giraffe" not in (tmp_path / "out.ipynb").read_text() + said.replace("'tall-giraffe'[::-1]", "")
    status, said, nb = papermill(tmp_path, *cells, options=("-p", "key", "the-value-itself"))
    assert status == 1 and "the name of a secret is upper-case" in said and "the-value-itself" not in said


def test_what_ends_papermill_ends_the_run_first(tmp_path):
    write(tmp_path, "rows: int = 1", "open('begun', 'w')\nimport time; time.sleep(600)")
    command = [PAPERMILL, "--engine", "etl", "in.ipynb", "out.ipynb"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    assert (nb.metadata.runner["state"], cell_states(nb)[-1]) == ("killed", "killed")
