"""What a scheduled run costs besides its notebook: Prefect's `serve()` beside this project's worker.

Two interval schedules, every 5 and every 10 seconds, on one Prefect server, by each in turn. With `serve()` a flow run
is a process and its flow only writes the time; with the worker it is a whole notebook run with its report, of which the
kernel's CPU seconds do not count. Late is from the scheduled time to the flow's first line, or the notebook's first.

    python benchmarks/scheduled_run.py [PAIRS] [SECONDS OF EACH]
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import measure
import nbformat

EVERY_S = (5, 10)
SYSTEMS = ("serve", "worker")
PARAMETERS = 'root: str = "outputs/dev"  # root\nrun_id: str = "dev"  # run'


def main(pairs: int, seconds: int) -> None:
    began = measure.machine()
    found: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    with measure.own_state() as folder, measure.prefect_server(folder) as server:
        for pair in range(pairs):
            for system in SYSTEMS:
                path = folder / f"{system}-{pair}"
                path.mkdir()
                before = sum(map(measure.cpu_s, measure.family(server.pid)))
                command = [sys.executable, __file__, "--phase", system, str(seconds), str(path)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                result = json.loads(done.stdout.splitlines()[-1])
                used_s = sum(map(measure.cpu_s, measure.family(server.pid))) - before
                found[system].append(result | {"server_cpu_s": used_s})
                asyncio.run(_forget_deployments())
    summary = {system: _summary(results) for system, results in found.items()}
    columns = ["system", "runs", "CPU s a run", "of the server", "late, median s", "p95"]
    names = {"serve": "Prefect serve(), a process a run", "worker": "this worker, notebook run included"}
    rows = [
        [names[system], str(s["runs"]), *(f"{s[k]:.3f}" for k in ("cpu_s", "server_cpu_s", "late_s", "late_p95_s"))]
        for system, s in summary.items()
    ]
    times = summary["serve"]["cpu_s"] / summary["worker"]["cpu_s"]
    rows.append(["times less CPU", "", f"{times:.1f}", "", "", ""])
    title = f"A scheduled run besides its notebook, {pairs} pairs of {seconds} s"
    result = {"pairs": found, "summary": summary, "times_less": times}
    measure.publish("scheduled_run", title, columns, rows, result, began)


def _summary(results: list[dict]) -> dict:
    late = [late_s for result in results for late_s in result["late_s"]]
    return {
        "runs": len(late),
        "cpu_s": measure.median([r["cpu_s"] / len(r["late_s"]) for r in results]),
        "server_cpu_s": measure.median([r["server_cpu_s"] / len(r["late_s"]) for r in results]),
        "late_s": measure.median(late),
        "late_p95_s": measure.quantile(late, 0.95),
    }


async def _forget_deployments() -> None:
    from prefect import get_client
    from prefect.client.schemas.sorting import DeploymentSort

    async with get_client() as client:
        for deployment in await client.read_deployments(limit=200, sort=DeploymentSort.NAME_ASC):
            await client.delete_deployment(deployment.id)


def serve(seconds: float, folder: Path) -> None:
    """As in Prefect's documentation, polling as often as the worker does."""
    os.environ["PREFECT_RUNNER_POLL_FREQUENCY"] = "1"
    sys.path.insert(0, str(Path(__file__).with_name("flows")))
    import tick
    from prefect import serve as prefect_serve

    asked = {"parameters": {"folder": str(folder)}}
    deployments = [tick.tick.to_deployment(f"tick-{s}", interval=timedelta(seconds=s), **asked) for s in EVERY_S]
    file, used = folder / "ticks.jsonl", []

    def end() -> None:
        measure.wait_until(file.exists)  # it is under way
        used.append((_all_cpu_s(), len(file.read_text().splitlines())))
        time.sleep(seconds)
        late = [json.loads(line) for line in file.read_text().splitlines()][used[0][1] :]
        print(json.dumps({"cpu_s": _all_cpu_s() - used[0][0], "late_s": late}), flush=True)
        for process in measure.family(os.getpid())[1:]:
            process.kill()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    prefect_serve(*deployments, print_starting_message=False)


def worker(seconds: float, folder: Path) -> None:
    """As `up` does it, fork server included."""
    from etl import params
    from etl.kernels import client as kernel_client
    from etl.serve import flows

    _write_project(folder)
    project = params.load(folder, "local")
    keeper = kernel_client.Keeper(2, folder / "kernels.log")
    keeper.start()
    on, late, ran, loop = asyncio.Event(), [], [], []

    def on_record(record) -> None:
        assert record.ok, record.reason
        if on.is_set():
            late.append(record.metrics["began"] - datetime.fromisoformat(record.scheduled_for).timestamp())
        ran.append(record.stage)
        if min(map(ran.count, project.stages)) >= 2:  # it is under way: Prefect knows all stages
            loop[0].call_soon_threadsafe(on.set)

    async def for_a_while() -> float:
        loop.append(asyncio.get_running_loop())
        serving = asyncio.create_task(flows.serve(project, None, [keeper], on_record, lambda _: None))
        waiting = asyncio.create_task(on.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        before = _own_cpu_s()
        await asyncio.wait({serving}, timeout=seconds)
        used = _own_cpu_s() - before
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return used

    used = asyncio.run(for_a_while())
    keeper.signal(15)
    keeper.process.wait()
    print(json.dumps({"cpu_s": used, "late_s": late}), flush=True)
    os._exit(0)


def _write_project(folder: Path) -> None:
    (folder / "notebooks").mkdir()
    (folder / "params/env").mkdir(parents=True)
    (folder / "params/env/local.yml").write_text(f"root: {folder}/root\n")
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        nbformat.v4.new_code_cell("import time\nbegan = time.time()\nfrom etl.notebook import check, record, stop"),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("record(began=began)"),
    ]
    for every_s in EVERY_S:
        nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
        nbformat.write(nb, folder / f"notebooks/every_{every_s}.ipynb")
        (folder / f"params/every_{every_s}.yml").write_text(f"every: {every_s} seconds\ndeadline: 1 minute\n")


def _own_cpu_s() -> float:
    """Of this process alone: what a kernel uses is its notebook's."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _all_cpu_s() -> float:
    """Of this process, of the children it has waited for and of those that run."""
    return sum(map(measure.cpu_s, measure.family(os.getpid())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--phase"]:
        {"serve": serve, "worker": worker}[sys.argv[2]](float(sys.argv[3]), Path(sys.argv[4]))
    else:
        given = [int(argument) for argument in sys.argv[1:]]
        main(*given, *(5, 40)[len(given) :])
