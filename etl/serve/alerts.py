"""Alerts: one message when something is not as it should be any more, and one when it is again.

Whoever looks (`watch`, beside `up` or without it) holds the lease `services/alerts.lease` meanwhile, so that several
tell it once. What is open, and what is still to be told, is in `services/alerts.json`: a message is written there
before it is sent, and leaves when it was. So none is lost; one is sent twice only when its sender is killed in between,
under the same id.

An incident is a finding of `health`. Of the runs none is overlooked: what they say is asked for the moment in which
each of them ended. An incident that comes again soon after its end is flapping: its next end counts when it has held
for a few turns of what it is about.
"""

import json
import logging
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from etl import secrets
from etl.kernels.children import Deaths
from etl.params.alerts import Alerts
from etl.reports import page
from etl.runs import index
from etl.serve import health
from etl.serve.health import Finding, Seen
from etl.storage import Root

log = logging.getLogger(__name__)
STATE, LEASE = "services/alerts.json", "services/alerts.lease"
LOOK_S = 5  # between two looks
LATE_ROWS = timedelta(minutes=10)  # a row may come to the index so long after its run ended
AGAIN = 5  # turns after its end in which an incident that comes is the same one, flapping
HELD = 2  # turns that the end of such a one has to hold
AGAIN_S, HELD_S = 6 * 3600, 3600  # at most
COMMAND_S = 30  # that a command may take
KEPT = 100  # messages that nobody takes
COMMAND = "the command"
RUN_ID = re.compile(r"[A-Za-z][\w-]*-\d{8}T\d{6}-[0-9a-f]{6}", re.A)
Send = Callable[["Message", str], None]  # to one of `receivers`


@dataclass(frozen=True)
class Message:
    """What is sent. `what`: opened or ended."""

    id: str
    what: str
    title: str
    body: str
    finding: dict[str, Any]
    left: list[str]  # receivers that do not have it yet


@dataclass
class Incident:
    """One that is open, or ended a short time ago. Times are ISO, UTC."""

    key: str
    kind: str
    about: str
    sentence: str
    opened_at: str
    cadence_s: float
    times: int = 1  # that it came, within AGAIN turns of its end
    gone_since: str | None = None  # while it is open: since when nothing says it
    ended_at: str | None = None


@dataclass
class State:
    """What is known from look to look."""

    incidents: dict[str, Incident] = field(default_factory=dict)
    outbox: list[Message] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)  # the newest runs that were looked at: run_id -> ended_at
    began_at: str = ""  # what ended before is history
    told: int = 0  # messages, ever
    looked_by: str = ""

    @classmethod
    def read(cls, root: Root) -> "State":
        """Raises Damaged."""
        document = root.read_json(STATE) or {}
        incidents = {key: Incident(**of) for key, of in document.pop("incidents", {}).items()}
        outbox = [Message(**of) for of in document.pop("outbox", [])]
        return cls(incidents, outbox, **document)

    def write(self, root: Root) -> None:
        root.write(STATE, json.dumps(asdict(self)).encode())


def look(root: Root, alerts: Alerts, read: Callable[[bool], Seen], now: datetime, send: Send, who: str = "") -> int:
    """Tell what is new in what is read; how many messages were sent. Raises LeaseHeld while another one looks.

    `read` is called with whether nothing may be left from earlier looks of `who`, as another one has looked since: what
    it saw is told, and to see less than that would be an end that is none.

    What cannot be sent is a warning, and tried again by the next look. Raises what a root that is down does.
    """
    with root.lease(LEASE, f"process {os.getpid()} on {socket.gethostname()}", wait_s=0):
        state = State.read(root)
        before = asdict(state)
        seen = read(state.looked_by != who)
        state.looked_by = who
        step(state, alerts, seen, now)
        if asdict(state) != before:
            state.write(root)
        return _deliver(root, state, receivers(alerts), send)


def step(state: State, alerts: Alerts, seen: Seen, now: datetime) -> None:
    """Have `state` be as of `now`; what is to be told is in its outbox then. A function of its arguments."""
    state.began_at = state.began_at or now.isoformat()
    new = _new_runs(state, seen, now)
    for run in new:
        if run["state"] in ("ok", "noop") and _is_overtaken(run, state, seen):
            continue  # what was told since is newer
        _turn(state, alerts, seen, run["ended_at"], [*health.of_runs(run["ended_at"], seen)], {"failed", "slow"})
    told = health.findings(now, seen)
    _turn(state, alerts, seen, now, told, None)
    state.seen |= {run["run_id"]: run["ended_at"].isoformat() for run in new}
    since = max(state.seen.values(), default="")
    if since:
        oldest = (datetime.fromisoformat(since) - LATE_ROWS).isoformat()
        state.seen = {run_id: at for run_id, at in state.seen.items() if at >= oldest}


def _new_runs(state: State, seen: Seen, now: datetime) -> list[Any]:
    """The runs that ended since the last look, in that order, and those whose rows came late."""
    newest = max(state.seen.values(), default=state.began_at)
    since = max(datetime.fromisoformat(newest) - LATE_ROWS, datetime.fromisoformat(state.began_at))
    return [run for run in seen.runs if since <= run["ended_at"] <= now and run["run_id"] not in state.seen]


def _is_overtaken(run: Any, state: State, seen: Seen) -> bool:
    """Whether a later run of its stage was looked at already."""
    looked_at = (other for other in seen.runs if other["stage"] == run["stage"] and other["run_id"] in state.seen)
    return any(other["ended_at"] > run["ended_at"] for other in looked_at)


def _turn(state: State, alerts: Alerts, seen: Seen, at: datetime, told: Sequence[Finding], of: set[str] | None) -> None:
    """What is new, and what is over, by the findings of a moment. `of`: the kinds that were asked for; None: all."""
    asked = {finding.key: finding for finding in told if finding.level != "note" and _is_asked(finding, alerts)}
    for key, finding in asked.items():
        incident = state.incidents.get(key)
        if incident is None or incident.ended_at:
            times = incident.times + 1 if incident and _is_again(incident, at) else 1
            state.incidents[key] = Incident(
                *(key, finding.kind, finding.about, finding.sentence, at.isoformat(), finding.cadence_s, times)
            )
            again = f"\nIt comes and goes: this is its {times}th time." if times > 1 else ""
            _tell(state, alerts, seen, "opened", finding, again)
        else:
            incident.gone_since = None
    for key, incident in list(state.incidents.items()):
        if key in asked or (of is not None and incident.kind not in of):
            continue
        if incident.ended_at:
            if not _is_again(incident, at):
                del state.incidents[key]
            continue
        incident.gone_since = incident.gone_since or at.isoformat()
        held_s = (at - datetime.fromisoformat(incident.gone_since)).total_seconds()
        if incident.times == 1 or held_s >= min(HELD * incident.cadence_s, HELD_S):
            incident.ended_at = at.isoformat()
            if "recovered" in alerts.on:
                finding = Finding(incident.kind, "note", incident.about, incident.sentence)
                _tell(state, alerts, seen, "ended", replace(finding, since=datetime.fromisoformat(incident.opened_at)))


def _is_asked(finding: Finding, alerts: Alerts) -> bool:
    return finding.kind == "figure" or finding.kind in alerts.on


def _is_again(incident: Incident, at: datetime) -> bool:
    """Whether it is the same one that ended a short time ago."""
    ended = datetime.fromisoformat(incident.ended_at or at.isoformat())
    return (at - ended).total_seconds() < min(AGAIN * incident.cadence_s, AGAIN_S)


def _tell(state: State, alerts: Alerts, seen: Seen, what: str, finding: Finding, more: str = "") -> None:
    state.told += 1
    plain = asdict(finding) | {"since": finding.since and finding.since.isoformat(), "root": seen.root_url}
    if what == "opened":
        title = f"{finding.kind}: {finding.about}"
        lines = [finding.sentence, finding.link, finding.remedy and f"What to do: {finding.remedy}."]
    else:
        title = f"recovered: {finding.about}"
        lines = [f"It was: {finding.sentence}"]
    body = "\n".join([line for line in [*lines, f"Root: {seen.root_url}"] if line]) + more
    state.outbox.append(Message(f"{state.began_at}/{state.told}", what, title, body, plain, receivers(alerts)))
    if len(state.outbox) > KEPT:
        log.warning("nobody takes messages: the oldest is given up: %s", state.outbox.pop(0).title)


# --- how it is told ---


def receivers(alerts: Alerts) -> list[str]:
    """All that are told, by the names that the env file has."""
    return [*alerts.to, *([COMMAND] if alerts.command else [])]


def _deliver(root: Root, state: State, known: Sequence[str], send: Send) -> int:
    """Send what is in the outbox, in its order; a receiver that does not take one gets the others later, too."""
    count, down = 0, {*()}
    for message in list(state.outbox):
        for name in [name for name in message.left if name not in down]:
            try:
                if name in known:  # it may not be told any more
                    send(message, name)
                    count += 1
            except Exception:  # said where it is raised
                down.add(name)
                continue
            message.left.remove(name)
            state.outbox = [kept for kept in state.outbox if kept.left]
            state.write(root)
    return count


class Sender:
    """Sends messages. Raises ValueError when a receiver is nothing that could be sent to."""

    def __init__(self, alerts: Alerts, clock: Callable[[], float] = time.monotonic):
        self._command, self._urls = alerts.command, {name: _url(name) for name in alerts.to}
        self._clock = clock
        self._deaths = {name: Deaths(clock) for name in receivers(alerts)}
        logging.getLogger("apprise").setLevel(logging.CRITICAL)  # what failed is said here, without what is in a URL

    def __call__(self, message: Message, name: str) -> None:
        """Raises RuntimeError when it is not taken, or not tried since it was not a short time ago."""
        deaths = self._deaths[name]
        if deaths.wait_s:
            raise RuntimeError(f"{name} takes nothing; it is asked again in {deaths.wait_s:.0f} s")
        try:
            if name == COMMAND:
                _call(self._command, message)
            else:
                _notify(self._urls[name], name, message)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            count = deaths.add()
            told = logging.WARNING if count == 1 else logging.INFO  # a series is one warning
            log.log(told, "%r could not be told, and is tried again: %s", message.title, error)
            raise
        self._deaths[name] = Deaths(self._clock)


def _notify(url: str, name: str, message: Message) -> None:
    import apprise

    kind = apprise.NotifyType.WARNING if message.what == "opened" else apprise.NotifyType.SUCCESS
    receiver = apprise.Apprise()
    receiver.add(url)
    with tempfile.TemporaryDirectory(prefix="alert-") as folder:
        attached = _report_in(Path(folder), message) if receiver[0].attachment_support else None
        if not receiver.notify(body=message.body, title=message.title, notify_type=kind, attach=attached):
            raise RuntimeError(f"{name} did not take it")


def _report_in(folder: Path, message: Message) -> str | None:
    """The report that a message leads to, without code, as a file: who gets mail may not reach the service. None when
    there is none, or it cannot be read now."""
    run_id = RUN_ID.search(message.finding.get("link") or "")
    if not run_id or message.what != "opened":
        return None
    try:
        root = Root.at(message.finding["root"])
        record = index.get(root, run_id[0])
        content = page.without_code(page.served(page.page_of(root, record), []))
    except Exception as error:  # a message without it is still a message
        log.info("the report of %s is not attached: %s", run_id[0], error)
        return None
    (folder / f"{run_id[0]}.html").write_bytes(content)
    return str(folder / f"{run_id[0]}.html")


def _call(command: Sequence[str], message: Message) -> None:
    told = {"ALERT_ID": message.id, "ALERT_WHAT": message.what, "ALERT_TITLE": message.title}
    told["ALERT_JSON"] = json.dumps(message.finding, default=str)
    done = subprocess.run(
        command, input=message.body.encode(), env=os.environ | told, timeout=COMMAND_S, capture_output=True
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {last:.200}")


def problems(alerts: Alerts) -> list[str]:
    """What of `to` is no URL that Apprise knows, a sentence each; a secret may have its value elsewhere."""
    wrong = []
    for name in alerts.to:
        try:
            _url(name)
        except _NoValue:
            continue
        except ValueError as error:
            wrong.append(str(error))
    return wrong


class _NoValue(ValueError):
    """A secret without a value."""


def _url(name: str) -> str:
    """The Apprise URL that a line of `to` means. Raises ValueError, whose message holds no secret."""
    import apprise

    try:
        url = secrets.read(name) if secrets.NAME.fullmatch(name) else name
    except LookupError as error:
        raise _NoValue(str(error)) from None
    if apprise.Apprise.instantiate(url, suppress_exceptions=True) is None:
        raise ValueError(f"{name} is no URL that Apprise knows")
    return url
