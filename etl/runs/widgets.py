"""What a widget shows without a script: a progress bar at its last value, a container with what is in it."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
REFERENCE = "IPY_MODEL_"  # before the id of another widget
MOST = 4_000_000  # characters of JSON that the state of all widgets may take in a report
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
WIDTH = 20  # characters of a progress bar
DEEP = 20  # containers in each other: one may hold itself

States = Mapping[str, Mapping[str, Any]]  # id of a widget -> the values of its traits


def metadata(states: States, buffers: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What JupyterLab shows widgets from, for a notebook's metadata; {} when there are none, or it is too much."""
    models = {
        id: {
            "model_name": state["_model_name"],
            "model_module": state.get("_model_module"),
            "model_module_version": state.get("_model_module_version"),
            "state": state,
            **({"buffers": buffers[id]} if buffers.get(id) else {}),
        }
        for id, state in states.items()
        if "_model_name" in state
    }
    if not models or len(json.dumps(models, default=str)) > MOST:
        return {}
    return {STATE: {"state": models, "version_major": 2, "version_minor": 0}}


def shown(id: str, states: States) -> dict[str, str]:
    """A widget as HTML and as plain text, by kind; {} when neither can be told. Of one that is closed: nothing."""
    if id not in states:
        return {"text/plain": ""}
    fragment = _html(id, states, DEEP)
    if not fragment and states[id].get("_model_name") == "OutputModel":  # the cell shows what it has caught
        return {"text/plain": ""}
    text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</(div|pre|p|tr|li)>", "\n", fragment))).strip("\n")
    return {"text/html": fragment, "text/plain": text.replace("\u2007", " ")} if fragment else {}


def _html(id: str, states: States, deep: int) -> str:
    state = states.get(id, {})
    kind = str(state.get("_model_name", ""))
    children = state.get("children")
    if isinstance(children, list | tuple):
        inside = [_html(str(child).removeprefix(REFERENCE), states, deep - 1) for child in children if deep]
        side_by_side = kind == "HBoxModel"
        return "".join(f"<span>{part}</span> " if side_by_side else f"<div>{part}</div>" for part in inside if part)
    if isinstance(state.get("outputs"), list | tuple):
        return "".join(map(_of_output, state["outputs"]))
    if "value" not in state or isinstance(state["value"], dict | bytes):
        return ""
    value, label = state["value"], html.escape(str(state.get("description") or ""))
    if kind in ("HTMLModel", "HTMLMathModel"):
        told = str(value)
    elif kind in ("FloatProgressModel", "IntProgressModel"):
        told = _bar(state)
    else:
        told = html.escape(value if isinstance(value, str) else json.dumps(value, default=str))
    return f"{label} {told}".strip(" ")


def _bar(state: Mapping[str, Any]) -> str:
    try:
        least, most = float(state.get("min", 0)), float(state.get("max", 100))
        share = (float(state["value"]) - least) / (most - least) if most > least else 0.0
    except (TypeError, ValueError):
        return ""
    full = round(WIDTH * min(1.0, max(0.0, share)))
    return f"<code>{'█' * full}{'░' * (WIDTH - full)}</code> {state['value']:g}/{most:g}"


def _of_output(out: Any) -> str:
    """Something that was put into an Output widget from the kernel's side."""
    if not isinstance(out, Mapping):
        return ""
    data = out.get("data") or {}
    if "image/png" in data:
        return f'<img src="data:image/png;base64,{html.escape(str(data["image/png"]))}" alt="figure">'
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    text = data.get("text/plain") or out.get("text") or "\n".join(out.get("traceback") or [])
    return f"<pre>{html.escape(COLOURS.sub('', str(text)))}</pre>" if text else ""
