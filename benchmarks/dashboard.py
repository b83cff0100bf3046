"""What the dashboard costs: its process while pages are open, and what a visitor waits for and is sent.

A real dashboard over a small root, looked at by Chromium. CPU is that of the dashboard's process, in percent of a core,
while 1 and 20 pages of the overview are open and nothing happens, and while a run ends every ten seconds; how many of
the 20 then show the last of them. A first visit has an empty cache. Seconds are those of a clock, and mean little on a
machine that has other things to do: CPU seconds of the process stand beside them.

    python benchmarks/dashboard.py [--seconds 30] [--pages 20] [--root A FOLDER THAT ALL STAGES HAVE RUN ON]
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import measure
import psutil
import typer
import websockets
from playwright.sync_api import Browser, sync_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ClientState_pb2 import ClientState
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from etl.reports import pdf
from etl.runs import index
from etl.runs.record import RunRecord
from etl.serve import services
from etl.storage import PROJECT, Root

STAGES = ("generate", "preprocess", "compact", "query", "score", "train")
RUNS = 60  # of each stage, before anybody looks
EVERY_S = 10  # a run ends, while something happens
LATE_S = 30  # after the last of them, and a page that does not show it has missed it
CHOSEN = ("q05", "q10", "top_customers", "q18", "recommended_suppliers")
WAIT_MS = 300_000
sys.path.append(str(PROJECT))  # where `app` is
DRAWN = """() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'
  && !document.querySelector('[data-testid=stSkeleton]') && document.querySelector('.st-key-footer code')"""
CHARTS = (
    DRAWN + " && [...document.querySelectorAll('[data-testid=stPlotlyChart]')].every(c => c.querySelector('.main-svg'))"
)


def main(seconds: float = 30, pages: int = 20, root: Path | None = None) -> None:
    """`seconds`: for which each state is looked at; `pages`: that are open at once."""
    began = measure.machine()
    with measure.own_state() as folder:
        url = str(root or made(folder / "root"))
        started = time.monotonic()
        with dashboard(url, folder) as (page_url, process):
            found = {"ready": {"wall_s": time.monotonic() - started, "cpu_s": measure.cpu_s(process)}}
            with sync_playwright() as playwright:  # whose loop runs in this thread while it is there
                browser = playwright.chromium.launch(executable_path=chromium())
                found["first viewer after start"] = visit(browser, page_url, process)
                found["overview, server warm"] = visit(browser, page_url, process)
                for name in ("questions", "model", "lake"):
                    visit(browser, f"{page_url}/{name}", process)
                    found[f"{name}, server warm"] = visit(browser, f"{page_url}/{name}", process)
                found["change of question"] = changed(browser, page_url, process)
                browser.close()
            time.sleep(5)
            rows = [[name, *(text(each, key, digits) for key, digits in VISITS)] for name, each in found.items()]
            idle = {}
            for count in (1, pages):
                idle |= asyncio.run(watched(page_url, process, Root.at(url), count, seconds))
    lines = [[name, *(text(each, key, digits) for key, digits in STATES)] for name, each in idle.items()]
    columns = ["", "wall s", "CPU s", "MB sent", "requests"]
    measure.publish("dashboard", "A visit with an empty cache", columns, rows, {"visits": found, "idle": idle}, began)
    columns = ["", "% of a core", "MB", "pages up to date"]
    measure.publish("dashboard", "Open pages", columns, lines, {"visits": found, "idle": idle}, began)


VISITS = (("wall_s", 2), ("cpu_s", 2), ("sent_mb", 2), ("requests", 0))
STATES = (("cpu_percent", 1), ("memory_mb", 0), ("up_to_date", 0))


def chromium() -> str | None:
    """The machine's own, as Playwright would download another."""
    return pdf.browser()


def text(values: dict[str, float], key: str, digits: int) -> str:
    return f"{values[key]:,.{digits}f}" if key in values else ""


def made(root: Path) -> Path:
    """A root on which every stage has run once, with as many rows of runs as a day leaves."""
    for stages in (["all"], ["score"]):
        subprocess.run(
            [sys.executable, "orchestrate.py", "run", *stages, "--env", "fast", "--root", str(root)],
            cwd=PROJECT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    now = datetime.now(UTC)
    for back in range(RUNS, 0, -1):
        for stage in STAGES:
            ended(Root.at(root), stage, now - timedelta(minutes=back))
    return root


def ended(root: Root, stage: str, at: datetime, seconds: float = 2, state: str = "ok", reason: str = "") -> str:
    """A run ended: its row, which is all that the overview reads of it. Returns its id."""
    run_id = f"{stage}-{at:%Y%m%dT%H%M%S}-{at.microsecond:06x}"
    record = RunRecord(
        stage=stage,
        run_id=run_id,
        root=root.url,
        scheduled_for=at.isoformat(),
        attempt=1,
        parameters={},
        origins={},
        report=f"reports/{stage}/{at:%Y-%m-%d}/{run_id}",
        host="here",
        started_at=(at - timedelta(seconds=seconds)).isoformat(),
        ended_at=at.isoformat(),
        seconds=seconds,
        state=state,
        reason=reason,
    )
    index.append(root, record)
    return run_id


@contextmanager
def dashboard(root_url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """As `up` serves it: its address and its process."""
    ports = {"api": measure.free_port(), "dashboard": measure.free_port()}
    service = services.dashboard("app.web", root_url, ports, folder)
    service.start()
    try:
        service.wait_ready()
        yield service.page, psutil.Process(service.process.pid)
    finally:
        services.stop([service])


def visit(browser: Browser, url: str, process: psutil.Process) -> dict[str, float]:
    """What a visitor with an empty cache waits for and is sent, until all is drawn."""
    window = browser.new_context(viewport={"width": 1440, "height": 900})
    try:
        page = window.new_page()
        sent = {"bytes": 0, "requests": 0}
        client = window.new_cdp_session(page)
        client.send("Network.enable")
        client.on("Network.loadingFinished", lambda said: sent.update(bytes=sent["bytes"] + said["encodedDataLength"]))
        client.on("Network.responseReceived", lambda said: sent.update(requests=sent["requests"] + 1))
        client.on(
            "Network.webSocketFrameReceived",
            lambda said: sent.update(bytes=sent["bytes"] + len(said["response"]["payloadData"]) * 3 // 4),  # of base64
        )
        began, before = time.monotonic(), measure.cpu_s(process)
        page.goto(url)
        page.wait_for_function(CHARTS, timeout=WAIT_MS)
        took = {"wall_s": time.monotonic() - began, "cpu_s": measure.cpu_s(process) - before}
        return took | {"sent_mb": sent["bytes"] / 1e6, "requests": sent["requests"]}
    finally:
        window.close()


def changed(browser: Browser, url: str, process: psutil.Process) -> dict[str, float]:
    """From a choice among the questions until its answer is drawn: the median of those chosen."""
    window = browser.new_context(viewport={"width": 1440, "height": 900})
    page = window.new_page()
    took, used = [], []
    try:
        page.goto(f"{url}/questions?question=q01")
        page.wait_for_function(CHARTS, timeout=WAIT_MS)
        for name in CHOSEN:
            field = page.get_by_role("combobox", name="Question")
            field.fill(name)
            began, before = time.monotonic(), measure.cpu_s(process)
            page.get_by_role("option").first.click()
            page.wait_for_function(f"() => location.search.endsWith('={name}') && ({CHARTS})()", timeout=WAIT_MS)
            took.append(time.monotonic() - began)
            used.append(measure.cpu_s(process) - before)
    finally:
        window.close()
    return {"wall_s": measure.median(took), "cpu_s": measure.median(used)}


async def watched(url: str, process: psutil.Process, root: Root, count: int, seconds: float) -> dict[str, Any]:
    """What the process takes while so many overviews are open: nothing happens; then a run ends now and then.

    The pages are open in viewers that speak as Streamlit's page does: twenty in a browser would take all the machine.
    """
    viewers = [Viewer(url) for _ in range(count)]
    looking = [asyncio.create_task(viewer.look()) for viewer in viewers]
    try:
        for viewer, task in zip(viewers, looking, strict=True):
            drawn = asyncio.create_task(viewer.drawn.wait())
            await asyncio.wait([drawn, task], timeout=WAIT_MS / 1000, return_when=asyncio.FIRST_COMPLETED)
            if not viewer.drawn.is_set():
                raise RuntimeError("a page was not drawn") from task.exception() if task.done() else None
        await asyncio.sleep(5)
        with used(process) as idle:
            await asyncio.sleep(seconds)
        with used(process) as busy:
            for _ in range(round(seconds / EVERY_S)):
                run_id = ended(root, "generate", datetime.now(UTC))
                for viewer in viewers:
                    viewer.awaited = f"run?id={run_id}".encode()
                await asyncio.sleep(EVERY_S)
        for _ in range(LATE_S):
            if all(viewer.saw == viewer.awaited for viewer in viewers):
                break
            await asyncio.sleep(1)
        busy["up_to_date"] = sum(viewer.saw == viewer.awaited for viewer in viewers)
    finally:
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)
    return {f"{count} open, idle": idle, f"{count} open, a run every {EVERY_S} s": busy}


class Viewer:
    """A page that is open: it draws nothing, and asks again as often as it is told to."""

    def __init__(self, url: str):
        self.url, self.drawn = f"ws{url.removeprefix('http')}/_stcore/stream", asyncio.Event()
        self.awaited = self.saw = b""  # what is to appear on the page, and did

    async def look(self) -> None:
        """Until it is cancelled."""
        timers: dict[str, asyncio.Task] = {}
        async with websockets.connect(
            self.url, subprotocols=["streamlit"], max_size=None, ping_interval=None
        ) as socket:
            await socket.send(BackMsg(rerun_script=ClientState()).SerializeToString())
            async for data in socket:
                if self.awaited and self.awaited in data:
                    self.saw = self.awaited
                said = ForwardMsg.FromString(data)
                kind = said.WhichOneof("type")
                if kind == "script_finished":
                    self.drawn.set()
                elif kind == "auto_rerun" and said.auto_rerun.fragment_id not in timers:
                    fragment = said.auto_rerun.fragment_id
                    timers[fragment] = asyncio.create_task(self._again(socket, fragment, said.auto_rerun.interval))
                elif kind == "new_session" and not said.metadata.run.fragment_ids:
                    for timer in timers.values():
                        timer.cancel()
                    timers.clear()

    async def _again(self, socket: Any, fragment: str, every_s: float) -> None:
        state = ClientState(fragment_id=fragment, is_auto_rerun=True)
        while True:
            await asyncio.sleep(every_s)
            with suppress(websockets.ConnectionClosed):
                await socket.send(BackMsg(rerun_script=state).SerializeToString())


@contextmanager
def used(process: psutil.Process) -> Iterator[dict[str, float]]:
    """What a process takes meanwhile."""
    took: dict[str, float] = {}
    began, before = time.monotonic(), measure.cpu_s(process)
    yield took
    took["cpu_percent"] = 100 * (measure.cpu_s(process) - before) / (time.monotonic() - began)
    took["memory_mb"] = process.memory_info().rss / 1e6


if __name__ == "__main__":
    typer.run(main)
