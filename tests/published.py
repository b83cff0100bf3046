"""Roots for the API and the dashboard to read, made by the pipeline itself on small slices of TPC-H."""

import shutil

import nbformat
from support import made_once

from etl.lake import ingest
from etl.reports import page
from etl.runs import index
from etl.runs.record import RunRecord
from etl.storage import Root
from pipeline import Lake, model, queries, source

AT = "2026-11-22T12:00:00+00:00"
DAY = AT[:10]
QUERY_RUN = "query-20261122T120000-abc123"
TRAIN_RUN = "train-20261122T120000-0123ab"


def fill(url: str) -> None:
    """Three ticks of scale 0.01 in the lake, every question answered, a small model published."""
    made = made_once("published", lambda folder: _fill(str(folder / "root")))
    shutil.copytree(made / "root", url, dirs_exist_ok=True)


def _fill(url: str) -> None:
    stream, due = source.due_ticks(Root.at(url), scale=0.01, slices=24, history=2, max_ticks=8, scheduled_for=AT)
    source.land(Root.at(url), stream, source.make_ticks(stream, due))
    batch = Lake(url).next_batch(max_files=500, scheduled_for=AT)
    ingest.commit(ingest.read(batch), run_id="preprocess-20261122T120000-aaaaaa")
    snapshot = Lake(url).snapshot()
    for question in queries.questions():
        queries.save(Root.at(url), queries.ask(question, snapshot), question, snapshot, QUERY_RUN)
    publish_model(url, max_trees=20)


def publish_model(url: str, max_trees: int) -> str:
    """Train on what is in the lake and publish; returns the model_id."""
    training, validation, held_out = model.split(Lake(url).snapshot())
    booster = model.train(training, validation, max_trees=max_trees)
    return model.publish(Root.at(url), booster, model.judge(booster, held_out), held_out, TRAIN_RUN)


def add_run(
    url: str, run_id: str, state: str = "ok", reason: str = "", minute: int = 0, metrics: dict | None = None
) -> None:
    """A run's report and its row in the index, as the engine leaves them."""
    stage = run_id.split("-")[0]
    record = RunRecord(
        stage=stage,
        run_id=run_id,
        root=url,
        scheduled_for=AT,
        attempt=1,
        parameters={"root": url},
        origins={"root": "supplied"},
        report=f"reports/{stage}/{DAY}/{run_id}",
        host="here",
        started_at=f"{DAY}T12:{minute:02}:00+00:00",
        ended_at=f"{DAY}T12:{minute:02}:02+00:00",
        seconds=2.0,
        state=state,
        reason=reason,
        metrics=metrics or {},
    )
    cells = [nbformat.v4.new_markdown_cell(f"# What {stage} did"), nbformat.v4.new_code_cell("1 + 1")]
    for cell in cells:
        cell.metadata["runner"] = {"state": "ok", "seconds": 0.1}
    page.write(Root.at(url), record, nbformat.v4.new_notebook(cells=cells))
    index.append(Root.at(url), record)
