"""What a notebook may say to its runner: record a figure, check a claim, stop early; and ask it: a secret.

All work the same under "Run all" in JupyterLab and in a job. What is recorded or checked travels as an
output of the cell, so the executed notebook holds it too.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from decimal import Decimal
from html import escape
from typing import Any, NewType

from etl import secrets
from etl.figures import figure, words

# Annotates a parameter that is the name of a secret: in YAML, in the injected cell and in the report stands the name
Secret = NewType("Secret", str)
RECORD_MIME = "application/vnd.etl-notebooks.record+json"
CHECK_MIME = "application/vnd.etl-notebooks.check+json"


class Stop(Exception):
    """Nothing (more) to do: the run ends as a noop and later cells never run."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this line instead of a traceback
        return [f"Stopped: {self}"]


class CheckFailed(Exception):
    """What the notebook promises about its data does not hold."""

    def _render_traceback_(self) -> list[str]:
        return [f"CheckFailed: {self}"]


def stop(reason: str) -> None:
    """End the run here, in state noop. Raises Stop."""
    raise Stop(reason)


def secret(name: str) -> str:
    """The value of the secret `name`: the environment variable, or the file of that name in the folder ETL_SECRETS_DIR.

    Raises LookupError when there is neither. Whatever shows the value shows "‹secret NAME›" in a job's report.
    """
    return secrets.read(name)


def record(
    versions_read: Mapping[str, int] | None = None,
    versions_written: Mapping[str, int] | None = None,
    given: Mapping[str, Any] | None = None,
    **metrics: Any,
) -> None:
    """Show figures as a small table and keep them with the run; the last value of a name counts.

    `versions_read` and `versions_written` map table names to Delta versions. `given` is what else the run starts from
    and a replay has to give it again: place under the root -> its JSON, or the sha256 of a file that stays as it is.
    Values become JSON: dates ISO strings, decimals floats, not-a-number null.
    """
    rows: list[tuple[str, ...]] = [(words(name), figure(value, name)) for name, value in _plain(metrics).items()]
    if given:
        rows.append(("given", ", ".join(given)))
        metrics["given"] = given
    document = {
        "metrics": _plain(metrics),
        "versions_read": _plain(versions_read or {}),
        "versions_written": _plain(versions_written or {}),
    }
    for name in ("versions_read", "versions_written"):
        if document[name]:
            rows.append((words(name), ", ".join(f"{t}@{v}" for t, v in document[name].items())))
    _show(RECORD_MIME, document, rows, "record")


_checked: list[dict[str, Any]] = []  # by the cell that is running now


def check(name: str, ok: Any, detail: str = "") -> None:
    """Claim that `ok` holds; `detail` says it in numbers.

    The checks of a cell are collected, so one failing does not hide the next. At the end of the cell they are
    shown in one table, and if any failed the cell fails with CheckFailed. Outside IPython it raises at once.
    """
    checked = {"name": str(name), "ok": bool(ok), "detail": str(detail)}
    shell = _shell()
    if shell is None:
        if not checked["ok"]:
            raise CheckFailed(f"{name}: {detail}" if detail else name)
        return
    if not _checked:
        shell.events.register("post_run_cell", _settle)
    _checked.append(checked)


def checks_in(shown: Any) -> list[dict[str, Any]]:
    """The checks in what an output of kind CHECK_MIME holds. Anybody can show such: others than ours do not count."""
    checks = shown.get("checks") if isinstance(shown, dict) else None
    complete = {"name", "ok", "detail"}
    return (
        [check for check in checks if isinstance(check, dict) and complete <= check.keys()]
        if isinstance(checks, list)
        else []
    )


def _settle(result: Any) -> None:
    """Show the checks of the cell that has just ended, and fail it if one failed."""
    shell = _shell()
    shell.events.unregister("post_run_cell", _settle)
    checks, _checked[:] = list(_checked), []
    rows: list[tuple[str, ...]] = [("passed" if c["ok"] else "FAILED", c["name"], c["detail"]) for c in checks]
    _show(CHECK_MIME, {"checks": checks}, rows, "check")
    failed = [f"{c['name']} ({c['detail']})" if c["detail"] else c["name"] for c in checks if not c["ok"]]
    if failed and result.success:
        # IPython swallows what a callback raises, and ipykernel looks at the result after the callbacks
        error = CheckFailed(f"{len(failed)} check{'s' * (len(failed) > 1)} failed: {'; '.join(failed)}")
        result.error_in_exec = error
        shell.showtraceback((CheckFailed, error, None))


def _shell() -> Any:
    """The IPython shell this code runs in, or None."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _show(mime: str, data: dict[str, Any], rows: list[tuple[str, ...]], kind: str) -> None:
    text = "\n".join("  ".join(row) for row in rows)
    if _shell() is None:
        print(text)
        return
    from IPython.display import display

    table = "".join(
        f'<tr class="{escape(row[0]) if kind == "check" else ""}">'
        + "".join(f'<td style="text-align:left">{escape(field)}</td>' for field in row)
        + "</tr>"
        for row in rows
    )
    display({mime: data, "text/html": f'<table class="{kind}">{table}</table>', "text/plain": text}, raw=True)


def _plain(value: Any) -> Any:
    """`value` as JSON types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):  # a NumPy scalar or array, a pandas column
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)
