"""A run: how it ended and why, its cells, its output while it runs, what it was given, what to type to run it again."""

import json
import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import streamlit as st

from app import markup, poller, shown
from etl.figures import figure, shortened, words
from etl.runs import delivery, failures, index, journal
from etl.storage import Root

RUN = "id"  # in the page's address
LINES, LETTERS = 40, 500  # of a run's output, the last, and characters of a line
VALUE = 200  # characters
TAIL = 30  # lines of a traceback
COMMANDS = {
    "To run it again, with what it had": ["run", "--from"],
    "To see whether the same comes out, in a root of its own": ["replay"],
    "To look at it in JupyterLab, up to the cell that failed": ["debug"],
}
LATER = ("checks", "metrics", "seconds")  # what a run that ended early has not come to
LIMITS = {"deadline_s": "deadline {:,g} s", "memory_mb": "at most {:,g} MB"}


def page() -> None:
    """The run that the page's address names."""
    root, view, run_id = shown.published_root(), shown.view(), st.query_params.get(RUN, "")
    markup.show(f"<p>{markup.link('runs', 'All runs')}</p>")
    with shown.panel("The run", ["the index of runs"]):
        try:
            run = delivery.get(root, run_id)
        except KeyError:  # also without an id
            st.title("No such run", anchor=False)
            st.info("There is no such run under this root. An earlier one may be in the archive of the index.")
            return
        st.title(f"{run['stage']}: {words(run['state'])}", anchor=False)
        card(run)
        if run["state"] == "running":
            output(run["run_id"])
        for what, part in PARTS.items():
            with shown.panel(what, ["the index of runs"]):
                part(root, view, run)


def card(run: Mapping[str, Any]) -> None:
    """When, for how long, on which code; what went wrong, and where."""
    began, due = (datetime.fromisoformat(run[name]) for name in ("started_at", "scheduled_for"))
    said = [f"due {shown.at(due, both=True)}", f"began {shown.at(began)}", f"took {run['seconds']:,.1f} s"]
    said += [text.format(run[name]) for name, text in LIMITS.items() if run.get(name)]
    said += [f"attempt {run['attempt']}"] if (run.get("attempt") or 1) > 1 else []
    said += [f"release {run['release']}"] if run.get("release") else ["the working tree"]
    said += [f"on {run['host']}"] if run.get("host") else []
    colour = markup.STATES.get(run["state"], "red")
    reason = markup.text(shortened(run.get("reason") or "", 1000))
    links = [markup.link(shown.report_url(run["run_id"]), "Its report")] if run.get("kept") else []
    if parent := run.get("parent"):
        links.append(f"again after {markup.link(f'run?id={parent}', parent)}")
    banner = f'<div class="banner {colour}" role="status">{reason}</div>' if reason else ""
    markup.show(
        banner,
        f"<p><code>{markup.text(run['run_id'])}</code> {markup.badge(words(run['state']), colour)}</p>",
        markup.small(markup.text("  ·  ".join(said))),
        f"<p>{'  ·  '.join(links)}</p>",
    )
    error = run.get("error") or {}
    if error:
        where = f", in cell {error['cell']}, {error['heading']}" if error.get("heading") else ""
        frame = error.get("frame") or {}
        st.markdown(f"**{shown.plain(frame.get('where', error.get('ename', 'The error')))}**{shown.plain(where)}")
        tail = (error.get("traceback_tail") or "").splitlines()[-TAIL:]
        shown_lines = [*([frame["code"], ""] if frame.get("code") else []), *tail]
        st.code("\n".join(shown_lines), language=None, wrap_lines=True)


@st.fragment(run_every=poller.LOOK_S)
def output(run_id: str) -> None:
    """The end of what a run has printed so far; when it has ended the page is drawn again."""
    if not any(run["run_id"] == run_id for run in journal.live()):
        st.rerun()
    markup.show("<h2>What it prints</h2>")
    st.code(last_lines(run_id) or "nothing printed yet", language=None)


def last_lines(run_id: str) -> str:
    """The end of what a run has printed so far; nothing when it has ended in the meantime."""
    try:
        events = list(journal.read(journal.spool() / run_id / "journal.jsonl"))
    except OSError:
        return ""
    outputs = (event["output"] for event in events if event["event"] == "output")
    text = "".join(out.get("text") or out.get("data", {}).get("text/plain", "") + "\n" for out in outputs)
    return "\n".join(shortened(line, LETTERS) for line in text.splitlines()[-LINES:])


def again(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """What to type."""
    if run["state"] == "running":
        return
    beat = view.seen.beat or {}
    env = beat.get("env", "local")
    options = ["--env", env] if env != "local" else []
    options += ["--root", root.url] if root.url != Root.at("outputs").url else []
    markup.show("<h2>What to type</h2>")
    for column, (said, command) in zip(st.columns(len(COMMANDS)), COMMANDS.items(), strict=True):
        column.caption(said)
        typed = shlex.join(["python", "orchestrate.py", *command, run["run_id"], *options])
        column.code(typed, language=None, wrap_lines=True)


def often(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """How often the stage ended like this."""
    if run["state"] in failures.BAD:
        for group in failures.of_root(root, run["stage"]):
            alike = failures.fingerprint(group.reason) == failures.fingerprint(run.get("reason"))
            if alike and group.state == run["state"] and group.count > 1:
                said = f"The {failures.ordinal(group.count)} time that it ended like this; first"
                markup.show(f"<p>{said} at {shown.at(group.first_at)}, last at {shown.at(group.last_at)}.</p>")


def cells(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """The cells one after the other, each as long as it took."""
    ran = run.get("cells") or []
    total = sum(cell["seconds"] or 0 for cell in ran)
    if not ran:
        return
    rows, passed = [], 0.0
    for cell in ran:
        seconds = cell["seconds"] or 0
        left, wide = (100 * passed / total, 100 * seconds / total) if total else (0, 0)
        colour = {"ok": "green", "never_ran": "gray", "skipped": "gray"}.get(cell["state"], "red")
        bar = f'<span class="{colour}" style="margin-left:{left:.2f}%;width:{max(wide, 0.5):.2f}%"></span>'
        state = "" if cell["state"] == "ok" else markup.badge(words(cell["state"]), colour)
        took = f"{seconds:,.2f}" if cell["seconds"] is not None else "–"
        rows.append((markup.text(shortened(cell["heading"] or "", 60)), f'<div class="span">{bar}</div>', took, state))
        passed += seconds
    markup.show("<h2>Cells</h2>", markup.table(["Cell", "When", "Seconds", ""], rows, right=[2]))


def parameters(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """What it was given, where each value was written, and what it means."""
    given, origins = run.get("parameters") or {}, run.get("origins") or {}
    stage = view.seen.stages.get(run["stage"])
    meaning = stage.help if stage else {}
    own = [name for name in given if origins.get(name) != "supplied"]
    rows = [
        (
            f"<code>{markup.text(name)}</code>",
            f"<code>{markup.text(shortened(json.dumps(given[name], default=str), VALUE))}</code>",
            markup.text(origins.get(name, "")),
            markup.text(meaning.get(name, "")),
        )
        for name in own
    ]
    if rows:
        markup.show("<h2>Parameters</h2>", markup.table(["Name", "Value", "Written in", "Meaning"], rows))


def differences(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """What differs from the last run of the stage before it that was ok."""
    if run["state"] == "running":
        return
    last = last_ok(root.url, run["stage"], run["started_at"])
    if last is None:
        return
    from etl.runs import replay

    named = markup.link(f"run?id={last['run_id']}", last["run_id"])
    supplied = {name for name, origin in (run.get("origins") or {}).items() if origin == "supplied"}
    parts = [each for each in replay.diff(last, dict(run)) if each.part != "parameters" or each.name not in supplied]
    ended_well = run["state"] in ("ok", "noop")
    came_to = [part for part in parts if ended_well or part.after is not None or part.part not in LATER]
    rows = [
        (
            markup.text(f"{words(part.part)}: {words(part.name)}" if part.part != part.name else part.part),
            _value(part.before, part.name, part.part),
            _value(part.after, part.name, part.part),
        )
        for part in came_to
    ]
    table = markup.table(["", "Then", "Now"], rows, even=True) if rows else "<p>Nothing.</p>"
    left = len(parts) - len(came_to)
    more = markup.small(f"and {left:,} more that it did not come to: checks, figures, cells") if left else ""
    markup.show("<h2>What differs from the last that was ok</h2>", f"<p>{named}</p>", table, more)


@st.cache_data(max_entries=64, show_spinner=False)
def last_ok(root_url: str, stage: str, before: str) -> dict[str, Any] | None:
    """The record of a stage's last run that was ok and started before a time."""
    root = Root.at(root_url)
    last = index.find_last(root, stage, before=before)
    return last and index.get(root, last["run_id"])


def _value(value: Any, name: str, part: str = "") -> str:
    if part == "seconds" and value is not None:
        return f"{value:,.2f}"
    is_of_files = name == "given" and isinstance(value, Mapping)  # what they say is too long
    said = ", ".join(value) if is_of_files else figure(value, name)
    return markup.text(said[:12] if name.endswith(("sha256", "git_commit")) else shortened(said, VALUE))


def tables(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """The versions that it wrote and read."""
    written, read = run.get("versions_written") or {}, run.get("versions_read") or {}
    if written or read:
        names = dict.fromkeys([*written, *read])
        rows = [
            (markup.text(name), *(f"{of[name]:,}" if name in of else "" for of in (written, read))) for name in names
        ]
        markup.show("<h2>Tables</h2>", markup.table(["Table", "Version written", "Version read"], rows, right=[1, 2]))


def checks(root: Root, view: poller.View, run: Mapping[str, Any]) -> None:
    """What it checked, what it told, and what it cost."""
    if run.get("checks"):
        rows = [
            (
                markup.badge("ok" if check["ok"] else "not ok", "green" if check["ok"] else "red"),
                markup.text(words(check["name"])),
                markup.text(shortened(str(check.get("detail") or ""), VALUE)),
            )
            for check in run["checks"]
        ]
        markup.show("<h2>Checks</h2>", markup.table(["", "Check", "What it saw"], rows))
    told = (run.get("metrics") or {}) | (run.get("receipt") or {})
    rows = [(markup.text(words(name)), _value(value, name)) for name, value in told.items() if value is not None]
    if rows:
        markup.show("<h2>Figures</h2>", markup.table(["", ""], rows))


PARTS = {  # what a panel is called when it cannot be shown -> the panel
    "The failures like it": often,
    "The cells": cells,
    "The comparison": differences,
    "The commands": again,
    "The parameters": parameters,
    "The tables": tables,
    "The checks": checks,
}
