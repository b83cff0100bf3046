"""Kernels that are forked ahead of their run: the same as cold ones in all but the time, and never seen in two runs."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from faults import toy
from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from support import busy_s
from test_engine import run, saved

from etl.kernels import client as kernel_client
from etl.kernels import imports as notebook_imports
from etl.kernels import launch
from etl.runs import delivery, journal
from etl.storage import PROJECT

FORKED = "import psutil\nfrom etl.notebook import record\nforked = 'forkserver' in str(psutil.Process().cmdline())\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A fork server with two ready kernels, for the runs of this module."""
    folder = tmp_path_factory.mktemp("k")
    keeper = kernel_client.Keeper(2, folder / "log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ETL_KERNELS", str(folder / "s"))
        patch.delenv("MPLBACKEND", raising=False)  # Streamlit sets it when it is imported, as by other tests
        keeper.start()
        toy.until((folder / "s/socket").exists, 240, "the fork server answers")
        yield keeper
        keeper.signal(signal.SIGTERM)
        keeper.process.wait()


def forked_run(tmp_path, *cells, number=0, **more):
    record = run(tmp_path, "rows: int = 1", FORKED + "record(forked=forked)", *cells, number=number, **more)
    assert record.metrics["forked"], record.reason
    return record


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """A run for which there is no fork server."""

    def start(*cells, **more):
        with monkeypatch.context() as patch:
            patch.setenv("ETL_KERNELS", str(tmp_path / "none"))
            return run(tmp_path, "rows: int = 1", FORKED + "record(forked=forked)", *cells, **more)

    return start


def test_nothing_of_one_run_is_seen_in_the_next(server, tmp_path):
    look = (
        "import os, random, sys, numpy, etl.lake.snapshot, tempfile\n"
        "record(left=getattr(etl.lake.snapshot, 'LEFT', None), variable=os.environ.get('LEFT'), folder=os.getcwd(),\n"
        "       drawn=[random.random(), numpy.random.random()], files=len(os.listdir('/proc/self/fd')),\n"
        "       names=sorted(n for n in globals() if n.startswith('mine')), path=len(sys.path), pid=os.getpid())"
    )
    leave = (
        f"etl.lake.snapshot.LEFT = mine = 1\nos.environ['LEFT'] = '1'\nos.chdir({str(tmp_path)!r})\nrandom.seed(1)\n"
        "numpy.random.seed(1)\nsys.path.append('x')\nmine_too = open(tempfile.mkstemp()[1])"
    )
    first, second, third = (forked_run(tmp_path, look, leave, number=n).metrics for n in range(3))
    for found in (second, third):
        assert {n: found[n] for n in ("left", "variable", "names")} == {"left": None, "variable": None, "names": []}
        assert {n: found[n] for n in ("folder", "files", "path")} == {n: first[n] for n in ("folder", "files", "path")}
    for drawn in zip(first["drawn"], second["drawn"], third["drawn"], strict=True):
        assert len(set(drawn)) == 3
    assert len({first["pid"], second["pid"], third["pid"]}) == 3


def test_a_run_cannot_tell_a_forked_kernel_from_a_cold_one(server, cold, tmp_path, monkeypatch):
    monkeypatch.setenv("ETL_TEST", "of this run")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    look = (
        "import os, signal, sys, threading, time, gc, matplotlib, numpy, ctypes\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "blas = ctypes.CDLL(next(part for part in maps if 'scipy_openblas64_' in part))\n"
        "kinds = {n: str(signal.getsignal(n)).split(' at ')[0] for n in (2, 10, 15, 17)}\n"
        "of_kernel = ('ETL_KERNELS', 'ETL_KERNEL_FOLDER', 'JPY_PARENT_PID')\n"
        "record(env={k: v for k, v in os.environ.items() if k not in of_kernel}, cwd=os.getcwd(), path=sys.path,\n"
        "       flags=str(sys.flags), signals=kinds, zone=time.tzname, main=sys.modules['__main__'].__name__,\n"
        "       argv=[os.path.basename(a) for a in sys.argv], backend=matplotlib.get_backend(), gc=gc.isenabled(),\n"
        "       blas=blas.scipy_openblas_get_num_threads64_(),\n"
        "       stdin=os.readlink('/proc/self/fd/0'), group=os.getpgid(0) == os.getpid() == os.getsid(0),\n"
        "       parent=os.environ['JPY_PARENT_PID'] == str(os.getppid()), blocked=str(signal.pthread_sigmask(0, [])),\n"
        "       threads=sorted(t.name for t in threading.enumerate() if 'Poller' not in type(t).__name__))"
    )
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    forked = forked_run(tmp_path, look, draw)
    mine, its = forked.metrics, cold(look, number=1).metrics
    assert [list(out["data"])[0] for out in saved(forked)[0].cells[-2].outputs] == ["image/png"]
    assert mine.pop("forked") and not its.pop("forked")
    assert mine == its and mine["env"]["ETL_TEST"] == "of this run" and mine["zone"][0] == "JST"


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed", "the kernel was killed by SIGKILL"),
        ("import os\nos._exit(3)", "killed", "the kernel exited with status 3"),
        ("import ctypes\nctypes.string_at(0)", "killed", "the kernel was killed by SIGSEGV"),
    ],
)
def test_its_death_is_told_as_it_was(server, tmp_path, code, state, reason):
    record = forked_run(tmp_path, "# Die", "import os\nos.write(2, b'its last words\\n')\n" + code)
    assert record.state == state and record.reason.startswith(reason)
    nb = saved(record)[0]
    card, shown = nb.cells[0].source, json.dumps([record.error, [cell.get("outputs") for cell in nb.cells]])
    # neither what ipykernel says at every start nor what a forked kernel runs in
    assert not re.search("ipython|--existing|Ctrl|forkserver", card + shown, re.I)
    assert ("its last words" in card) == ("string_at" not in code)


def test_deadline_memory_and_samples_hold_for_it(server, tmp_path):
    record = forked_run(
        tmp_path, "child = psutil.Popen(['sleep', '1000'])\nimport time\ntime.sleep(999)", deadline_s=busy_s(4)
    )
    nb, run_json = saved(record)
    assert record.state == "timed_out" and run_json["error"]["frame"]["code"] == "time.sleep(999)"
    assert "Its last minute" in nb.cells[-2].source
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]
    grow = "import time\nkept = []\nfor _ in range(60):\n    kept.append(bytearray(b'x' * 10**7))\n    time.sleep(0.02)"
    record = forked_run(tmp_path, grow, number=1, memory_mb=450)
    assert record.state == "killed" and "and may take 450" in record.reason
    assert record.receipt["peak_memory_mb"] >= 450  # rounded


def test_what_it_used_is_told_before_it_is_gone(server, tmp_path):
    child = "open('/dev/null', 'w').write('x' * 10**7)\nimport time\nprint(time.process_time())"
    used = (
        f"import subprocess, sys\nchild = subprocess.run([sys.executable, '-c', {child!r}], capture_output=True)\n"
        "import resource\nwhole = [*map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))]\n"
        "record(cpu_s=sum(each.ru_utime + each.ru_stime for each in whole), mb=whole[0].ru_maxrss / 1000)"
    )
    record = forked_run(tmp_path, used)
    receipt = record.receipt
    assert 0 <= receipt["cpu_s"] - record.metrics["cpu_s"] < 1 and receipt["peak_memory_mb"] > record.metrics["mb"]
    assert receipt["bytes_written"] > 10**7 and receipt["bytes_read"] > 10**5


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("0", 0),
        ("import atexit, os; atexit.register(os._exit, 3)", 3),
        ("import atexit, os; atexit.register(os.abort)", -signal.SIGABRT),
        ("import atexit, subprocess; atexit.register(subprocess.Popen, ['sleep', '1003'])", 0),
    ],
)
def test_how_it_ends_is_told_as_it_was_and_nothing_runs_on(server, tmp_path, last, status):
    async def ended() -> int | None:
        env = os.environ | kernel_client.variables(PROJECT)
        kernel = await launch.start("python3", lambda _: None, tmp_path, env)
        assert isinstance(kernel._process, kernel_client.Forked)
        await kernel.ready()
        kernel.client.execute(last)
        assert (await kernel.client.get_shell_msg(timeout=60))["content"]["status"] == "ok"
        await kernel.close(polite=True)
        return kernel.exit_status

    assert asyncio.run(ended()) == status
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1003"]]


def test_when_the_runner_is_killed_nothing_is_left_of_it(server, tmp_path, spool):
    """Not the kernel, nor a child that it forked, nor one in a session of its own."""
    forks = "import os, subprocess, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
    forks += "child = subprocess.Popen(['sleep', '1001'], start_new_session=True)\n"
    asked = toy.request(
        tmp_path, FORKED + "assert forked", forks + f"open({str(tmp_path / 'there')!r}, 'w')\ntime.sleep(1000)"
    )
    before = set(psutil.pids())
    runner = toy.start(asked, spool)
    toy.until((tmp_path / "there").exists, 30, "the cell")
    [kernel] = [e for e in journal.read(spool / asked.run_id / "journal.jsonl") if e["event"] == "kernel"]
    folder = kernel["folder"]
    runner.kill()
    runner.wait()
    mine = [psutil.Process(p) for p in set(psutil.pids()) - before if psutil.pid_exists(p)]
    toy.until(lambda: not Path(folder, "pid").exists(), 10, "the end of the black box")
    assert not [p for p in toy.alive(mine) if p.is_running() and belongs(p, folder)]
    assert delivery.reconcile() == [asked.run_id] and not Path(folder).exists()


def belongs(process: psutil.Process, folder: str) -> bool:
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        return f" {folder}/" in maps or process.environ().get("ETL_KERNEL_FOLDER") == folder
    except (OSError, psutil.Error):
        return False


def test_what_a_killed_black_box_leaves_is_found_again(server, tmp_path):
    """Forked without exec, a process still shows the fork server's environment, not its own."""
    forked = kernel_client.take(os.environ | {"PYTHONPATH": kernel_client.python_path()})
    assert asyncio.run(forked.begin(dict(os.environ), str(tmp_path), None, None))
    kernel = psutil.Process(forked.pid)
    kernel.suspend()
    assert belongs(kernel, str(forked.folder)) and "ETL_KERNEL_FOLDER" not in kernel.environ()
    launch.end_all_of(forked.folder)
    status = forked.wait(10)
    forked.close()
    assert status == -signal.SIGKILL
    toy.until(lambda: not toy.alive([kernel]), 5, "the kernel's end")


def test_other_variables_at_the_start_mean_a_cold_kernel(server, monkeypatch, tmp_path):
    monkeypatch.setenv("POLARS_MAX_THREADS", "1")
    record = run(tmp_path, "rows: int = 1", FORKED + "record(forked=forked)")
    assert (record.state, record.metrics) == ("ok", {"forked": False})


CHANGE = """
import json, os, pathlib, sys
sys.path.insert(0, "tests")
from faults import toy
from etl.kernels import client
from etl.runs import provenance

own = json.loads(sys.argv[1])  # module -> file
keeper = client.Keeper(1, pathlib.Path("log"))
keeper.start()
toy.until((client.server_folder() / "socket").exists, 240, "the fork server")
cell = "".join(f"import {name}\\n" for name in own) + "import psutil, etl.notebook\\n"
cell += f"etl.notebook.record(v=[{', '.join(f'{name}.VERSION' for name in own)}], "
cell += "forked='forkserver' in str(psutil.Process().cmdline()))"

def told():
    keeper.ensure()
    found = toy.run(pathlib.Path("root"), cell).metrics
    return found["v"], found["forked"], provenance.of({"cells": []})["code_sha256"]

toy.until(lambda: told()[1], 240, "a forked kernel")
seen = {told()[2]}
for index, path in enumerate(own.values()):
    pathlib.Path(path).write_text(f"VERSION = {index + 2}\\n")
    v, _, sha256 = told()
    print(v[index] == index + 2, sha256 not in seen)
    seen.add(sha256)
    toy.until(lambda: told()[1], 240, "a forked kernel with the new code")
    v, _, sha256 = told()
    print(v[index] == index + 2, sha256 in seen)
keeper.signal(15)
keeper.process.wait()
print(sorted(os.listdir(client.server_folder())))
"""


def test_code_that_has_changed_is_never_seen_old(tmp_path, project):
    """In pipeline/, in a package beside it, and in one that lies elsewhere, as an editable install does."""
    own = {name: str(project / f"{name.replace('.', '/')}.py") for name in ("pipeline.source", "mine.figures")}
    own["elsewhere.figures"] = str(tmp_path / "lib/elsewhere/figures.py")
    for path in map(Path, own.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("VERSION = 1\n")
    for name in ("preprocess", "compact", "query", "train"):
        (project / f"notebooks/{name}.ipynb").unlink()
    imports = "".join(f"import {name}\n" for name in own)
    nb = {"cells": [{"cell_type": "code", "source": [imports]}]}
    (project / "notebooks/generate.ipynb").write_text(json.dumps(nb))
    shutil.copytree(PROJECT / "tests/faults", project / "tests/faults")
    path = os.pathsep.join([str(project), str(tmp_path / "lib")])
    env = {**os.environ, "PYTHONPATH": path, "ETL_KERNELS": str(tmp_path / "s")}
    command = [sys.executable, "-c", CHANGE, json.dumps(own)]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=900)
    expected = ["True True"] * 6 + ["['imported', 'lock', 'threads']"]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr


def test_a_folder_that_others_may_enter_is_not_trusted(monkeypatch, tmp_path, caplog):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("ETL_KERNELS", str(folder))
    kernel_client._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernel_client.take({}) is None and kernel_client.take({}) is None
    assert [r.message for r in caplog.records] == [f"kernels start cold: {folder} is not a folder of this user alone"]


def test_a_server_that_does_not_answer_is_started_again(monkeypatch, tmp_path):
    folder = tmp_path / "k"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("ETL_KERNELS", str(folder))
    monkeypatch.setattr(kernel_client, "ANSWER_S", 0.05)
    keeper = kernel_client.Keeper(1, tmp_path / "log")
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as hung, socket.socket(socket.AF_UNIX) as silent:
        keeper.process = hung
        silent.bind(str(folder / "socket"))
        silent.listen()
        monkeypatch.setattr(keeper, "start", lambda: None)
        for turn in range(kernel_client.HUNG):
            keeper.ensure()
            assert hung.poll() is None, turn
            assert kernel_client.take({}) is None
        keeper.ensure()
        assert hung.poll() == -signal.SIGKILL
    assert not kernel_client._silent


def test_a_preload_that_fails_is_one_warning_and_started_again_later(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("ETL_KERNELS", str(tmp_path / "file" / "below"))
    keeper = kernel_client.Keeper(1, tmp_path / "log")
    keeper.start()
    with caplog.at_level(logging.WARNING):
        assert keeper.process.wait(240) != 0
        first = keeper.process
        keeper.ensure()
        second = keeper.process
        assert second is not first and second.wait(240) != 0
        keeper.ensure()
    assert len(caplog.records) == 1 and str(tmp_path / "log") in caplog.text
    assert keeper.process is second, "the third start waits"


def test_papermill_uses_it_unmodified(server, tmp_path):
    nbformat.write(toy.request(tmp_path, FORKED + "forked").notebook, tmp_path / "a.ipynb")
    env = os.environ | {"JUPYTER_DEFAULT_PROVISIONER_NAME": "forked-kernel"}
    command = [Path(sys.executable).with_name("papermill"), "a.ipynb", "b.ipynb", "--no-progress-bar"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    nb = nbformat.read(tmp_path / "b.ipynb", as_version=4)
    assert nb.cells[0].outputs[0].data["text/plain"] == "True"


def test_jupyter_uses_it_unmodified_and_can_restart_it(server, monkeypatch, tmp_path):
    monkeypatch.setattr(KernelProvisionerFactory.instance(), "default_provisioner_name", "forked-kernel")

    async def use() -> list[str]:
        manager, seen = AsyncKernelManager(kernel_name="python3"), []
        await manager.start_kernel(cwd=str(tmp_path))
        client = manager.client()
        client.start_channels()
        try:
            for _ in range(2):  # a restarted kernel is a new one, at the place where its clients look for it
                await client.wait_for_ready(timeout=30)
                look = "import os; print(os.getpid(), os.getcwd())"
                shown = await client.execute_interactive(look, output_hook=seen.append, timeout=30)
                assert shown["content"]["status"] == "ok"
                await manager.restart_kernel(now=False)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)
            await manager.cleanup_resources()
        return [message["content"]["text"] for message in seen if message["msg_type"] == "stream"]

    pids, folders = zip(*map(str.split, asyncio.run(use())), strict=True)
    assert len(set(pids)) == 2 and set(folders) == {str(tmp_path)}


def test_a_server_killed_again_and_again_fails_no_run(server, tmp_path, caplog):
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.3):
            server.process.kill()
            server.process.wait()
            server.ensure()

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            records = list(pool.map(lambda n: run(tmp_path, "rows: int = 1", "rows + 1", number=n), range(6)))
    finally:
        stop.set()
        killing.join()
    assert [record.state for record in records] == ["ok"] * 6
    assert len([r for r in caplog.records if "fork server ended" in r.message]) == 1, "a series is one warning"


def test_what_notebooks_import_is_found_without_running_them(tmp_path):

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pkg").mkdir()
    code = "%matplotlib inline\nfrom pkg import mod\nimport numpy as np"
    (tmp_path / "notebooks/a.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "source": [code]}]}))
    (tmp_path / "pkg/__init__.py").touch()
    lines = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dask\ndef f():\n    from a.b import c\n"
    (tmp_path / "pkg/mod.py").write_text(lines + "    import pkg.other")
    (tmp_path / "pkg/other.py").write_text("def broken(")
    (tmp_path / "notebooks/b.ipynb").write_text("<<<<<<< HEAD")  # nothing can be preloaded for it
    (tmp_path / "notebooks/c.ipynb").write_bytes(b"\xff")
    own, others = notebook_imports.modules_of(tmp_path)
    assert own == ["pkg", "pkg.mod", "pkg.other"] and others == ["numpy", "typing", "a.b"]


def test_a_killed_process_loses_no_page(tmp_path, spool):
    """Killed after the run was saved and before its page was made: the next start makes it."""
    code = (
        "import json, os, signal, sys\nfrom etl.runs import delivery\nfrom etl.runs.engine import RunRequest, execute\n"
        "delivery._in_background = lambda work: None\n"
        "record = execute(RunRequest(**json.load(sys.stdin)), page_later=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    asked = toy.request(tmp_path, "1 + 1")
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(vars(asked)), text=True, env=env)
    place = tmp_path / f"reports/toy/2026-03-01/{asked.run_id}"
    assert done.returncode == -signal.SIGKILL
    assert json.loads((place / "run.json").read_text())["state"] == "ok" and not (place / "report.html").exists()
    assert delivery.reconcile() == [] and (place / "report.html").exists() and list(spool.iterdir()) == []
