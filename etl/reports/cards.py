"""What a report says of the run itself: the card on top of a bad one, where it was, its last minute, the receipt."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.reports import head
from etl.storage import PROJECT

if TYPE_CHECKING:
    from etl.runs.record import RunRecord

LAST_S = 60  # of the table at the end of a run that was ended
ROWS = 10  # of that table
LIBRARIES = re.compile(r"/(site|dist)-packages/|/\.venv/|/lib/python3")
ENDED = ("killed", "timed_out")
# what a kernel runs in is not the user's
KERNEL = ("etl/kernels/in_kernel.py", "etl/kernels/forkserver.py", "etl/kernels/watcher.py")
ENGINE = "etl/"  # under a project: what it calls, and not what it does wrong
STACKS = "Where every thread was"
FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')  # as faulthandler writes it
SHOWN = re.compile(r"^(?:Cell In\[(\d+)\], line (\d+)|File (.+?):(\d+)(?:, in .*)?$)", re.M)  # as IPython writes it


def card(record: "RunRecord", last_ok: dict[str, Any] | None = None) -> Any:
    """The first cell of a bad report, at most 12 lines: what went wrong, where, and what is new since it went well.

    `last_ok` is the record of the stage's last run that was ok.
    """
    message = [record.reason]
    error = record.error or {}
    if frame := error.get("frame"):
        message += [frame["where"], f"    {frame['code']}"]
    elif error and record.state not in ("failed", "check_failed"):  # whose reason says it all
        message += [line for line in error["traceback_tail"].splitlines() if line.strip()][-3:]
    message = [line[:300] for line in "\n".join(message).splitlines()][:5]
    fence = _fence("\n".join(message), shortest=3)
    where = (
        f", in **{error['heading']}**, [cell {error['cell']}](#cell-{error['cell']})" if error.get("heading") else ""
    )
    lines = [f"#### {record.stage}: {record.state.replace('_', ' ')}{where}", "", f"{fence}text", *message, fence]
    if last_ok:
        path = "/".join(last_ok["report"].split("/")[2:])
        link = f"[{last_ok['run_id']}](../../{path}/report.html)"
        took = f" in {last_ok['seconds']:,.1f} s" if record.state == "timed_out" and "seconds" in last_ok else ""
        changes = ", ".join(_changes(record, last_ok)) or "nothing has changed"
        lines += ["", f"Last ok: {link}{took}; since then {changes}."]
    return _cell("\n".join(lines), record, "card")


def _changes(record: "RunRecord", last_ok: dict[str, Any]) -> list[str]:
    """What differs from the last run that was ok: the limit this one ran into, parameters, code, packages.

    A lower limit that the last ok run would not have kept by far explains the end alone.
    """
    changes = []
    for name, what, unit, used in _limits_met(record, last_ok):
        old, new = last_ok.get(name), getattr(record, name)
        if name in last_ok and old != new:
            changes.append(f"{what} {_limit(old, unit)} → {_limit(new, unit)}")
            if (old is None or new < old) and used > new / 2:
                return changes
    given = {name: value for name, value in record.parameters.items() if record.origins.get(name) != "supplied"}
    before = last_ok.get("parameters") or {}
    for name in dict.fromkeys([*given, *before]):
        old, new = (json.dumps(values.get(name), default=str) for values in (before, given))
        if (name in given or record.origins.get(name) != "supplied") and name in record.parameters and old != new:
            changes.append(f"`{name}` {_short(old)} → {_short(new)}")
    if "release" in last_ok and last_ok["release"] != record.release:
        old, new = (release or "working tree" for release in (last_ok["release"], record.release))
        changes.append(f"release {old} → {new}")
    then, now = last_ok.get("provenance") or {}, record.provenance
    for name, what in (("code_sha256", "code"), ("notebook_sha256", "notebook"), ("lock_sha256", "packages")):
        old, new = then.get(name), now.get(name)
        if old and new and old != new:
            if name == "code_sha256" and then.get("git_commit") != now.get("git_commit"):
                old, new = (str(code.get("git_commit"))[:8] for code in (then, now))
            changes.append(f"{what} {old[:8]} → {new[:8]}")
    return changes[:6]


def _limits_met(record: "RunRecord", last_ok: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """Of the limit it ended at: (its name in the record, what it is called, its unit, what the last ok run took)."""
    if record.state == "timed_out":
        return [("deadline_s", "deadline", "s", last_ok.get("seconds") or 0)]
    if record.state == "killed" and record.memory_mb and (record.receipt.get("peak_memory_mb") or 0) > record.memory_mb:
        peak_mb = (last_ok.get("receipt") or {}).get("peak_memory_mb") or 0
        return [("memory_mb", "memory limit", "MB", peak_mb)]
    return []


def _limit(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:,g} {unit}"


def _short(text: str) -> str:
    """A value among words of Markdown: plain where it is a number or a word, else as code."""
    text = text if len(text) <= 40 else text[:39] + "…"
    if re.fullmatch(r'"?[\w .:+-]*"?', text):
        return text
    fence = _fence(text)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _fence(text: str, shortest: int = 1) -> str:
    """A fence for a block of code, longer than any in `text`."""
    return "`" * max(shortest, max(map(len, re.findall("`+", text)), default=0) + 1)


def last_minute(record: "RunRecord", samples: list[dict[str, Any]]) -> Any:
    """The end of a report whose run was ended from outside: what it took in its last minute."""
    end = datetime.fromisoformat(samples[-1]["t"])
    rows, before = [], None
    for sample in samples:
        left_s = (end - (now := datetime.fromisoformat(sample["t"]))).total_seconds()
        if before and left_s <= LAST_S:
            passed_s = (now - datetime.fromisoformat(before["t"])).total_seconds() or 1
            busy = (sample["cpu_s"] - before["cpu_s"]) / passed_s
            cell = sample["cell"] + 1 if sample["cell"] is not None else ""
            when = f"−{left_s:.{0 if left_s >= 1 else 1}f} s" if left_s else "0 s"
            rows.append(f"| {when} | {sample['rss_mb']:,} MB | {max(busy, 0):.0%} | {cell} |")
        before = sample
    step = max(1, -(-len(rows) // ROWS))
    rows = rows[::-1][::step][::-1]  # the last one is always there
    memory = f"Memory at the end: {of(samples[-1]['rss_mb'], samples[-1]['limit_mb'])}."
    table = ["| before its end | memory | CPU | cell |", "|---:|---:|---:|---:|", *rows]
    lines = ["#### Its last minute", "", memory, *(["", *table] if rows else [])]
    return _cell("\n".join(lines), record, "last-minute")


def receipt(record: "RunRecord") -> Any:
    """The last cell: what the run cost."""
    wall_s = record.receipt.get("wall_s")
    parts = [f"{wall_s:,.1f} s"] if wall_s is not None else []
    parts += head.costs(record.receipt)
    return _cell(f"*{' · '.join(parts)}*", record, "receipt")


def of(taken_mb: float, limit_mb: float) -> str:
    """As in `7.7 of 8.0 GB`."""
    if limit_mb < 1000:
        return f"{taken_mb:,.0f} of {limit_mb:,.0f} MB"
    return f"{taken_mb / 1000:.1f} of {limit_mb / 1000:.1f} GB"


def _cell(text: str, record: "RunRecord", what: str) -> Any:
    import nbformat

    ran = {"state": record.state, "seconds": None, "report": what}
    return nbformat.v4.new_markdown_cell(text, metadata={"tags": [f"report-{what}"], "runner": ran})


def stacks(text: str, cells: list[Any], project: Path = PROJECT) -> tuple[str, dict[str, Any] | None]:
    """(what faulthandler wrote, cut down to the user's own lines; the main thread's innermost own frame)

    A frame is the user's own when it is in one of `cells` or in code under `project`. Threads without one are left out.
    """
    names, lines, main = _cell_files(cells), [], None
    for thread in re.split(r"\n(?=(?:Current thread|Thread) 0x)", text):
        frames = [(file, int(line), name) for file, line, name in FRAME.findall(thread)]  # innermost first
        own = [(frame, name) for file, line, name in frames if (frame := _place(file, line, names, cells, project))]
        if not own:
            continue
        is_main = any(file.endswith((KERNEL[0], "ipykernel_launcher.py")) for file, _, _ in frames)
        if is_main or main is None:
            main = own[0][0] if is_main else main
        lines.append("main thread" if is_main else "another thread")
        for frame, name in reversed(own):
            lines += [f"  {frame['where']}, in {name}", f"    {frame['code']}"]
        file, line, name = frames[0]
        if not _place(file, line, names, cells, project):
            lines.append(f"  … in {name}, {Path(file).name} line {line}")
    if not lines:
        return "", None
    return "\n".join([f"{STACKS}:", *lines, ""]), main


def own_frame(
    traceback: str, cells: list[Any], project: Path = PROJECT, restored: Callable[[str], str] = str
) -> dict[str, Any] | None:
    """The innermost frame of the user's own in an IPython traceback in plain text: {where, code}; one of the engine
    only where no other is.

    `restored` gives a path as it was before secrets were replaced in it.
    """
    frame = None
    for number, line, file, at in SHOWN.findall(traceback):
        if number:
            index = next((i for i, c in enumerate(cells) if c.get("execution_count") == int(number)), None)
            frame = _in_cell(index, int(line), cells) if index is not None else frame
        else:
            own = _place(str(Path(restored(file)).expanduser()), int(at), {}, cells, project)
            frame = own if own and not (frame and own["where"].startswith(ENGINE)) else frame
    return frame


def _place(file: str, line: int, names: dict[str, int], cells: list[Any], project: Path) -> dict[str, Any] | None:
    if (index := names.get(Path(file).name)) is not None and "ipykernel_" in file:
        return _in_cell(index, line, cells)
    if not file.startswith(f"{project}/") or LIBRARIES.search(file) or file.removeprefix(f"{project}/") in KERNEL:
        return None
    try:
        code = Path(file).read_text(errors="replace").splitlines()[line - 1].strip()
    except (OSError, IndexError):
        code = ""
    return {"where": f"{Path(file).relative_to(project)}:{line}", "code": code}


def _in_cell(index: int, line: int, cells: list[Any]) -> dict[str, Any]:
    source = cells[index].source.splitlines()
    code = source[line - 1].strip() if 0 < line <= len(source) else ""
    return {"where": f"cell {index + 1}, line {line}", "code": code}


def _cell_files(cells: list[Any]) -> dict[str, int]:
    """The file names under which ipykernel compiles cells: name -> index."""
    from ipykernel.compiler import get_tmp_hash_seed, murmur2_x86

    code = ((i, cell.source) for i, cell in enumerate(cells) if cell.cell_type == "code")
    return {f"{murmur2_x86(source, get_tmp_hash_seed())}.py": index for index, source in code}
