"""What `up` takes of a machine at the full cadence and idle: memory and CPU of every process.

Memory is the proportional set size, each shared page divided by how many share it. Kernels come and go: their memory is
that at the moment of each look, their CPU seconds those of the runs' receipts. Idle is with every schedule paused.

    python benchmarks/footprint.py [SECONDS AT THE FULL CADENCE] [SECONDS IDLE]
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime

import measure
import psutil

from etl.runs import index
from etl.storage import PROJECT, Root

LOOK_S = 5
KERNELS = "kernels"
ROLES = {  # by a word of the command line; of a child, else its parent's
    "prefect_server": "Prefect server",
    "etl.serve.web": "API",
    "streamlit": "dashboard",
    "etl.kernels.forkserver": "fork server",
    "orchestrate.py": "worker",
}


def main(full_s: float, idle_s: float) -> None:
    began = measure.machine()
    with measure.own_state() as folder:
        root, log = folder / "root", folder / "up.log"
        ports = {name: str(measure.free_port()) for name in ("prefect", "api", "dashboard")}
        options = [part for name, port in ports.items() for part in (f"--{name}-port", port)]
        command = [sys.executable, "orchestrate.py", "up", "--root", str(root), *options]
        with log.open("wb") as out:
            up = subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=out, start_new_session=True)
        try:
            measure.wait_until(lambda: up.poll() is not None or b"stages are on" in log.read_bytes(), 600)
            if up.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(10)  # what the start has left to do
            full = measured(up.pid, full_s, Root.at(root))
            asyncio.run(_pause_all(ports["prefect"]))
            time.sleep(30)  # runs under way end
            idle = measured(up.pid, idle_s, Root.at(root))
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
    names = [*ROLES.values(), KERNELS]
    rows = [
        [name, *(f"{found[kind].get(name, 0):.{digits}f}" for found in (full, idle) for kind, digits in KINDS)]
        for name in names
    ]
    rows.append(
        ["all", *(f"{sum(found[kind].values()):.{digits}f}" for found in (full, idle) for kind, digits in KINDS)]
    )
    rows.append(["most at once", f"{full['peak_mb']:.0f}", "", f"{idle['peak_mb']:.0f}", ""])
    columns = ["process", "MB, full", "% of a core", "MB, idle", "% of a core"]
    title = f"`up` at the full cadence for {full_s:.0f} s ({full['runs']} runs), idle for {idle_s:.0f} s"
    measure.publish("footprint", title, columns, rows, {"full": full, "idle": idle}, began)


KINDS = (("memory_mb", 0), ("cpu_percent", 1))


def measured(pid: int, seconds: float, root: Root) -> dict:
    """Of every role: mean memory in MB, CPU in percent of a core."""
    since, at = datetime.now(UTC), time.monotonic()
    before, looks, all_mb = _lasting_cpu_s(pid), defaultdict(list), []
    while time.monotonic() < at + seconds:
        seen: dict[str, float] = defaultdict(float)
        for process, role in _roles(pid).items():
            try:
                seen[role] += measure.pss_mb(process)
            except psutil.Error:  # it has just ended
                continue
        for role in {*seen, *looks}:
            looks[role].append(seen.get(role, 0.0))
        all_mb.append(sum(seen.values()))
        time.sleep(LOOK_S)
    took = time.monotonic() - at
    after = _lasting_cpu_s(pid)
    cpu_s = {role: after[role] - before.get(role, 0) for role in after}
    found = [index.get(root, row["run_id"]) for row in index.newest(root, since=since, limit=10_000)]
    cpu_s[KERNELS] = sum(run["receipt"].get("cpu_s") or 0 for run in found)
    return {
        "seconds": took,
        "runs": len(found),
        "states": sorted({run["state"] for run in found}),
        "memory_mb": {role: sum(values) / len(all_mb) for role, values in looks.items()},
        "peak_mb": max(all_mb),
        "cpu_percent": {role: 100 * used / took for role, used in cpu_s.items()},
    }


def _roles(pid: int) -> dict[psutil.Process, str]:
    """Every process of `up`, and what it is."""
    found, of = {}, {}
    for process in measure.family(pid):
        try:
            line, parent = " ".join(process.cmdline()), process.ppid()
        except psutil.Error:
            continue
        role = next((role for word, role in ROLES.items() if word in line), of.get(parent, "worker"))
        if role == "fork server" and of.get(parent) in ("fork server", KERNELS):
            role = KERNELS  # forked, it looks like its server
        if "etl.kernels.in_kernel" in line or "blackbox" in line:
            role = KERNELS
        found[process], of[process.pid] = role, role
    return found


def _lasting_cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds so far of all but the kernels."""
    used: dict[str, float] = defaultdict(float)
    for process, role in _roles(pid).items():
        if role != KERNELS:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            used[role] += times.user + times.system
    return used


async def _pause_all(port: str) -> None:
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.sorting import DeploymentSort

    async with get_client() as client:
        for deployment in await client.read_deployments(limit=200, sort=DeploymentSort.NAME_ASC):
            await client.update_deployment(deployment.id, DeploymentUpdate(paused=True))


if __name__ == "__main__":
    given = [float(argument) for argument in sys.argv[1:]]
    main(*given, *(600, 120)[len(given) :])
