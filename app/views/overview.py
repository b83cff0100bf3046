"""The overview: is it healthy, how old is the data, what failed last and why, what happens next."""

from datetime import datetime, timedelta

import polars as pl
import streamlit as st

from app import markup, shown, stages
from app.domain import CARD, model
from app.poller import View
from etl.figures import figure, shortened, words
from etl.lake import NothingPublished, Snapshot
from etl.models import registry
from etl.serve import health
from etl.storage import Root
from pipeline import COUNTED, TITLE, Lake, queries

SAID = 300  # characters of a sentence
BATCHES = 40  # of a table's bars, the newest
NEXT = 5  # runs
TALLEST = 3  # times the usual seconds: one run that hung does not make all others flat
IN_A_ROW = {5: ("five",), 6: ("six",)}  # stages
QUARANTINE = {"quarantine": "Refused rows"}


def page() -> None:
    """All of it."""
    st.title(TITLE, anchor=False)
    root, view = shown.published_root(), shown.view()
    with shown.panel("The state of the stages", ["the index of runs"]):
        is_it_well(view)
    with shown.panel("The stages", ["the index of runs"]):
        strip(view)
    with shown.panel("The age of the data", ["the published snapshot"]):
        ages(root, view)
    with shown.panel("The figures", ["the published snapshot"]):
        figures(root, view)
    with shown.panel("What runs next"):
        following(view)


# --- is it healthy, and what failed last ---


def is_it_well(view: View) -> None:
    """One sentence, and what there is to say of each incident: since when, and what to do."""
    told = view.findings
    warned = "orange" if any(finding.level == "warning" for finding in told) else "green"
    colour = warned if health.is_healthy(told) else "red"
    markup.show(
        f'<div class="banner {colour}" role="status">{markup.text(shortened(health.summary(told), SAID))}</div>'
    )
    if told:
        markup.show("<h2>Open incidents</h2><ul>", *map(incident, told), "</ul>")
    bad = [run for run in view.seen.runs if run["state"] not in ("ok", "noop", "cancelled")]
    if bad and not any(finding.kind == "failed" for finding in told):
        last = bad[-1]
        why = markup.text(shortened(last["reason"] or "no reason is known", SAID))
        state = words(last["state"])
        named = markup.link(f"run?id={last['run_id']}", f"{last['stage']} {state}")
        markup.show(f"<p>The last that went wrong: {named} at {shown.at(last['ended_at'])}, {why}; ok again since.</p>")


def incident(finding: health.Finding) -> str:
    """One finding, as markup."""
    began = "Seen since" if finding.kind == "damaged" else "Since"
    since = f"{began} {shown.at(finding.since, both=True)}.<br>" if finding.since else ""
    remedy = f"What to do: {markup.text(finding.remedy)}." if finding.remedy else ""
    report = f" {markup.link(finding.link, 'Its report')}" if finding.link and "://" in finding.link else ""
    return (
        f'<li class="incident {markup.LEVELS[finding.level]}"><strong>{markup.text(shortened(finding.sentence, SAID))}'
        f"</strong><br><small>{since}{remedy}{report}</small></li>"
    )


# --- the stages ---


def strip(view: View) -> None:
    """The stages in pipeline order, each with its last runs."""
    lines = stages.lines(view)
    if lines:
        late = {finding.about.removeprefix("stage ") for finding in view.findings if finding.kind == "late"}
        made = (stage_card(line, line.name in late) for line in lines)
        markup.show("<h2>Stages</h2>", markup.cards(made, *(IN_A_ROW.get(len(lines), ()))))


def stage_card(line: stages.Line, is_late: bool) -> str:
    """A stage, as markup."""
    state = "late" if is_late and line.state in ("ok", "noop", "no run yet") else line.state
    colour = "gray" if state == "no run yet" else markup.STATES.get(state, "red")
    named = markup.link(f"runs?stage={line.name}", line.name)
    head = f'<div class="head"><h3>{named}</h3>{markup.badge(words(state), colour)}</div>'
    said = [f"ok {shown.ago(line.last_ok)}" if line.last_ok else "never ok yet"]
    said.append(f"next at {shown.at(line.following)}" if line.following else "no next run")
    if line.last:
        usual = f", usually {_seconds(line.usual_s)}" if line.usual_s is not None else ""
        said.append(f"took {_seconds(line.last['seconds'])}{usual}")
    for run in line.under_way:
        said.append(f"now in “{shortened(run['heading'] or 'its kernel starts', 60)}”")
    return markup.card(head, *(f"<small>{markup.text(text)}</small>" for text in said), _run_bars(line))


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _run_bars(line: stages.Line) -> str:
    """A bar for each run, as tall as its seconds: a link to it. Keys reach those that went wrong."""
    longest = max((run["seconds"] for run in line.runs), default=0) or 1
    most = min(longest, TALLEST * (line.usual_s or longest)) or 1
    made = []
    for run in line.runs:
        colour = markup.STATES.get(run["state"], "red")
        name = f"{line.name} {words(run['state'])}, {_seconds(run['seconds'])}, {shown.at(run['ended_at'])}"
        keys = ' tabindex="-1"' if colour != "red" else ""
        made.append(
            f'<a class="bar {colour}" href="run?id={run["run_id"]}" target="_self" title="{name}" aria-label="{name}"'
            f'{keys} style="height:{min(max(run["seconds"] / most, 0.07), 1):.0%}"></a>'
        )
    return f'<div class="bars" role="group" aria-label="the last {len(made)} runs of {line.name}">{"".join(made)}</div>'


# --- how old is the data ---


def ages(root: Root, view: View) -> None:
    """How old the newest of the data is at each step of its way, against what it may be."""
    try:
        snapshot = Lake(root).snapshot()
    except NothingPublished:
        st.info(
            f"Nothing is published yet under {root.url}. `python orchestrate.py run all` makes one pass over all "
            "stages, `python orchestrate.py up` keeps them running. This page fills by itself."
        )
        return
    made = (age_card(view, *step) for step in steps(root, view, snapshot))
    markup.show("<h2>Age of the data</h2>", markup.cards(made, "five", "narrow"))


def steps(root: Root, view: View, snapshot: Snapshot) -> list[tuple[str, datetime | None, str, timedelta | None]]:
    """(what happened, when last, to what, how long ago it may be)."""
    pointer = root.read_json("lake/published.json") or {}
    published = datetime.fromisoformat(pointer["published_at"]) if pointer.get("published_at") else None
    batch = root.read_json(f"lake/batches/{snapshot.batch:08d}.json") or {}
    ingested = datetime.fromisoformat(batch["at"]) if batch.get("at") else published
    within = min(view.seen.tables.values(), default=stages.budget(view, snapshot.run_id.partition("-")[0]))
    newest = max(view.seen.answers, key=lambda answer: answer.at, default=None)
    asked = stages.budget(view, newest.stage) if newest else None
    allowed = min([limit for limit in view.seen.questions.values() if limit], default=asked)
    return [
        ("Born", snapshot.as_of, "the newest row", within),
        ("Landed", landed(root.url, view.token) or ingested, "the newest file", within),
        ("Ingested", ingested, f"batch {snapshot.batch:,}", within),
        ("Published", published, "for all readers", within),
        ("Answered", newest.at if newest else None, "the newest answer", allowed),
    ]


@st.cache_data(max_entries=8, show_spinner=False)
def landed(root_url: str, token: str) -> datetime | None:
    """When the newest file came that waits in landing; `token`: the view's, by which the cache knows it."""
    times = [entry.modified for _, entry in Root.at(root_url).tree("landing") if entry.modified]
    return max(times, default=None)


def age_card(view: View, step: str, at: datetime | None, what: str, within: timedelta | None) -> str:
    """A step of the data's way, as markup."""
    if at is None:
        return markup.card(f"<h3>{step}</h3>", '<span class="big">–</span>', markup.small("not yet"))
    age = view.at - at
    is_old = within is not None and age > within
    limit = f"should be at most {shown.how_long(within)}" if within else "no limit is declared"
    old = markup.badge("old", "orange") if is_old else ""
    return markup.card(
        f'<div class="head"><h3>{step}</h3>{old}</div>',
        f'<span class="big">{shown.how_long(age)}</span>',
        markup.small(f"{what}, {shown.at(at)}"),
        markup.small(limit),
    )


# --- figures ---


def figures(root: Root, view: View) -> None:
    """What the domain counts and asks all the time, with what changed."""
    made = []
    with shown.panel("What is counted", ["the published snapshot"]):
        made += counts(root)
    made += [*answers(root, view), *model_figure(root)]
    if made:
        markup.show("<h2>Figures</h2>", markup.cards(made, "narrow"))


def counts(root: Root) -> list[str]:
    """The rows of the domain's tables, and what came in the last batches."""
    try:
        snapshot = Lake(root).snapshot()
    except NothingPublished:
        return []
    made = []
    for table, label in (COUNTED | QUARANTINE).items():
        with shown.panel(label, [f"table {table}"]):
            rows = row_count(root.url, table, snapshot.versions[table], snapshot)
            came = arrivals(root.url, snapshot.batch, snapshot)
            column = "refused" if table == "quarantine" else "rows"
            of_table = came if table == "quarantine" else came.filter(pl.col("table") == table)
            by_batch = of_table.group_by("batch").agg(pl.col(column).sum(), pl.col("at").max()).sort("batch")
            made.append(figure_card(label, f"{rows:,}", _came(by_batch, column), _bars(by_batch, column, label)))
    return made


def _came(by_batch: pl.DataFrame, column: str) -> str:
    return f"{by_batch[column][-1] or 0:+,} in the last batch that has any" if by_batch.height else "none came lately"


def _bars(by_batch: pl.DataFrame, column: str, label: str) -> str:
    values = by_batch[column].fill_null(0).to_list()
    named = [f"{value:,} in batch {batch:,}" for value, batch in zip(values, by_batch["batch"], strict=True)]
    return markup.bars(values, named, f"{label} in each of the last {len(values)} batches") if len(values) > 1 else ""


@st.cache_data(max_entries=32, show_spinner=False)
def row_count(root_url: str, table: str, version: int, _snapshot: Snapshot) -> int:
    """A table's rows, from its log; its root and version are the snapshot's, by which the cache knows it.

    Raises storage.Damaged when the log is not what was written.
    """
    return _snapshot.row_count(table)


@st.cache_data(max_entries=4, show_spinner=False)
def arrivals(root_url: str, batch: int, _snapshot: Snapshot) -> pl.DataFrame:
    """Of the last batches the rows that came and were refused: batch, table, rows, refused, at."""
    columns = ["batch", "table", "rows", "refused", "at"]
    return _snapshot.frame("files", columns).filter(pl.col("batch") > batch - BATCHES).collect()


def answers(root: Root, view: View) -> list[str]:
    """The figure of each live question."""
    made = []
    for question in queries.questions():
        if question.live and question.figure:
            with shown.panel(question.title, ["the answers"], f"results/{question.name}/history.json"):
                past = history(root.url, question.name, view.token)
                if past.height:
                    made.append(answer_card(question, past))
    return made


@st.cache_data(max_entries=64, show_spinner=False)
def history(root_url: str, question: str, token: str) -> pl.DataFrame:
    """A question's figure, answer by answer, of those asked as the last one; `token`: the view's."""
    past = queries.history(Root.at(root_url), question)
    return (
        past.filter(pl.col("parameters") == past["parameters"][-1], pl.col("figure").is_not_null()).tail(BATCHES)
        if past.height
        else past
    )


def answer_card(question: queries.Question, past: pl.DataFrame) -> str:
    """A question's figure, as markup."""
    name, values = question.figure or "", past["figure"].to_list()
    change = "the first answer"
    if len(values) > 1 and values[-2]:
        grown = f"{values[-1] / values[-2] - 1:+.1%}"
        change = f"{grown} since the answer before" if grown[1:] != "0.0%" else "as in the answer before"
    named = [f"{figure(v, name)}, {shown.at(at)}" for v, at in zip(values, past["as_of"], strict=True)]
    drawn = markup.bars(values, named, f"{words(name)} of the last {len(values)} answers") if len(values) > 1 else ""
    title = markup.link(f"questions?question={question.name}", question.title)
    return figure_card(title, shown.short(values[-1], name), f"{words(name)}, {change}", drawn, is_markup=True)


def figure_card(label: str, value: str, note: str, drawn: str = "", is_markup: bool = False) -> str:
    """A figure with what is to be said of it, as markup."""
    label = label if is_markup else markup.text(label)
    return markup.card(
        f"<h3>{label}</h3>", f'<span class="big">{markup.text(value)}</span>', markup.small(markup.text(note)), drawn
    )


def model_figure(root: Root) -> list[str]:
    """The model's loss beside the one that it is to be compared with."""
    if not model:
        return []
    with shown.panel("The model", ["the model"]):
        if not registry.mark(root):
            return [figure_card(CARD.title, "–", f"no model yet: it takes enough {CARD.rows}")]
        metrics = registry.current(root)["metrics"]
        beside, loss = next(iter(CARD.losses(metrics).items()))
        title = markup.link("model", CARD.title)
        note = f"the model's log loss; {beside} {loss:.4f}"
        return [figure_card(title, f"{metrics['log_loss']:.4f}", note, is_markup=True)]
    return []


# --- what happens next ---


def following(view: View) -> None:
    """What is at work, and the next runs."""
    at_work = [
        (
            markup.badge("running", "blue"),
            markup.link(f"run?id={run['run_id']}", run["stage"]),
            f"since {shown.at(datetime.fromisoformat(run['started_at']))}",
        )
        for run in view.under_way
    ]
    due = [
        (markup.badge("due", "gray"), markup.link(f"runs?stage={name}", name), f"at {shown.at(at, both=True)}")
        for name, at in stages.next_runs(view)[:NEXT]
    ]
    said = [] if due else ["<p>Nothing runs on a schedule: no <code>up</code> is at work on this root.</p>"]
    rows = markup.table(["", "Stage", "When"], [*at_work, *due]) if at_work or due else ""
    markup.show("<h2>What happens next</h2>", *said, rows)
