"""The pictures in docs/images: the dashboard and a report, over a small root that this fills first.

The lake, the answers and the last run of each stage are real, by the pipeline and its notebooks. Of the runs before
there are rows only, at the times of their schedules: nobody wants to wait two days for a picture.

    python tools/images.py [ROOT]      of a root that is there, when it is named
"""

import functools
import io
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PROJECT = Path(__file__).parent.parent
sys.path += [str(PROJECT), str(PROJECT / "benchmarks")]

import dashboard as watched  # noqa: E402  # the benchmark
import measure  # noqa: E402

from etl import params  # noqa: E402
from etl.lake import ingest  # noqa: E402
from etl.runs import index, releases  # noqa: E402
from etl.serve.heartbeat import Heart  # noqa: E402
from etl.storage import Root  # noqa: E402
from pipeline import Lake, model, queries, source  # noqa: E402

IMAGES = PROJECT / "docs/images"
LIMIT = 300_000  # bytes of a picture
WIDTH, DENSITY = 1280, 1.5
REASON = "the model is no better than guessing: log loss 0.6801, the base rate's 0.6583"
RUNS = 48  # of each stage, before the last pass
DICE = random.Random(7)
MINUTES = 12  # of batches before the last pass
TREES = (25, 60, 140)  # of the models before the last
PICTURES = {  # name -> page, height
    "overview": ("", 1080),
    "question": ("questions?question=recommended_suppliers", 980),
    "runs": ("runs", 900),
    "model": ("model", 1000),
}


def main(url: str | None = None) -> None:
    IMAGES.mkdir(exist_ok=True)
    with measure.own_state() as folder:
        root = Root.at(url or str(folder / "root"))
        if not url:
            fill(root)
        come(root, datetime.now(UTC), answered=True)
        for stage in ("generate", "preprocess"):
            ended(root, stage, datetime.now(UTC) - timedelta(seconds=usual_s(root, stage)))
        api = f"http://127.0.0.1:{measure.free_port()}"
        with beating(root, api), watched.dashboard(root.url, folder) as (page_url, _), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=watched.chromium())
            window = browser.new_context(viewport={"width": WIDTH, "height": 900}, device_scale_factor=DENSITY)
            page = window.new_page()
            page.set_default_timeout(watched.WAIT_MS)
            for name, (path, height) in PICTURES.items():
                page.set_viewport_size({"width": WIDTH, "height": height})
                page.goto(f"{page_url}/{path}")
                page.wait_for_function(watched.CHARTS)
                page.wait_for_timeout(3000)  # a chart's letters come last
                taken(page, name)
            last = index.find_last(root, "train")
            page.set_viewport_size({"width": WIDTH, "height": 1080})
            page.goto((Path(root.url) / last["report"] / "report.html").as_uri())
            taken(page, "report")
            browser.close()


def taken(page: Page, name: str) -> None:
    """What the window shows, in docs/images."""
    image = Image.open(io.BytesIO(page.screenshot()))
    path = IMAGES / f"{name}.png"
    image.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(PROJECT)}  {size:,} bytes", flush=True)
    if size > LIMIT:
        sys.exit(f"that is more than {LIMIT:,}")


def fill(root: Root) -> None:
    """Batches, answers and models of the last minutes; a pass of all stages; rows of earlier runs."""
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=MINUTES)
    for minute in range(MINUTES):
        come(root, start + timedelta(minutes=minute), answered=minute % 2 == 1)
    for back, trees in enumerate(TREES):
        at = start - timedelta(hours=6 * (len(TREES) - back))
        training, validation, held_out = model.split(Lake(root).snapshot())
        booster = model.train(training, validation, max_trees=trees)
        run_id = f"train-{at:%Y%m%dT%H%M%S}-{trees:06x}"
        model.publish(root, booster, model.judge(booster, held_out), held_out, run_id)
    for stages in (["all"], ["score"]):
        run = [sys.executable, "orchestrate.py", "run", *stages, "--root", root.url]
        subprocess.run(run, cwd=PROJECT, check=True)
    rows(root, start)


def come(root: Root, at: datetime, answered: bool) -> None:
    """What is due has landed and is published, and the questions of the moment are answered if they should be."""
    given = {name: params.load(PROJECT).stages["generate"].values[name] for name in ("scale", "slices", "history")}
    stream, due = source.due_ticks(root, **given, max_ticks=40, scheduled_for=at.isoformat())
    source.land(root, stream, source.make_ticks(stream, due))
    batch = Lake(root).next_batch(max_files=500, scheduled_for=at.isoformat())
    ingest.commit(ingest.read(batch), run_id=f"preprocess-{at:%Y%m%dT%H%M%S}-{at.minute:06x}")
    snapshot = Lake(root).snapshot()
    for question in queries.questions() if answered else []:
        if question.live:
            run_id = f"query-{at:%Y%m%dT%H%M%S}-{at.minute:06x}"
            queries.save(root, queries.ask(question, snapshot), question, snapshot, run_id)


def rows(root: Root, start: datetime) -> None:
    """Of the runs of each stage before `start`: one of `train` went wrong, a few had nothing to do."""
    for name, stage in params.load(PROJECT).stages.items():
        times: list[datetime] = []
        following = stage.next_run(start - timedelta(days=13))
        while following and following < start:
            times.append(following)
            following = stage.next_run(following)
        for number, at in enumerate(times[-RUNS:]):
            state, reason = "ok", ""
            if name == "train" and number == RUNS - 9:
                state, reason = "check_failed", REASON
            elif name == "compact" and number % 9 == 4:
                state, reason = "noop", "nothing to compact"
            ended(root, name, at, state, reason)


@functools.cache
def usual_s(root: Root, stage: str) -> float:
    """What the run of the pass took."""
    return index.newest(root, stage=stage, limit=1)[0]["seconds"]


def ended(root: Root, stage: str, at: datetime, state: str = "ok", reason: str = "") -> str:
    """A run that began at a time, and took about as long as the last that really ran. Returns its id."""
    seconds = usual_s(root, stage) * DICE.lognormvariate(0, 0.15) / (6 if state == "noop" else 1)
    return watched.ended(root, stage, at + timedelta(seconds=seconds), seconds, state, reason)


@contextmanager
def beating(root: Root, api: str) -> Iterator[None]:
    """An `up` seems to be at work."""
    heart, over = Heart(root, {"API": f"{api}/docs", "Prefect": "http://127.0.0.1:4200"}, api), threading.Event()
    heart.tree = releases.Tree(PROJECT, params.load(PROJECT))

    def beat() -> None:
        while not over.wait(1):
            heart.ensure()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
