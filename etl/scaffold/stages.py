"""A stage that runs at once: a notebook that reads what is published, its YAML, and its line in the README."""

import json
import re
from pathlib import Path
from typing import Any

from etl import params
from etl.params.conventions import stage_rows
from etl.params.stages import seconds
from etl.scaffold.files import Refused, create, read, replace

CELLS = (
    (
        "markdown",
        "# {title}: what is published\n\n"
        "What this stage is for, in a sentence or two: what it costs when it is late, and who reads what it says.",
    ),
    ("code", "from etl.notebook import check, record, stop\nfrom {domain} import Lake, charts"),
    (
        "parameters",
        'root: str = "outputs/dev"  # where everything is read and written: a folder of the project, or a URL\n'
        'run_id: str = "dev"  # this run\'s name; every commit carries it\n'
        "scheduled_for: str | None = None  # UTC, ISO 8601: the run's own time\n"
        "rows_shown: int = 20  # of what is published",
    ),
    ("code", 'check("rows_shown is a count", rows_shown >= 1, f"{{rows_shown}}")'),
    ("markdown", "## The snapshot\n\nOne version of every table, all of the same batch."),
    (
        "code",
        "lake = Lake(root)\n"
        "snapshot = lake.published()\n"
        "if snapshot is None:\n"
        '    stop("nothing is published yet")\n'
        "record(versions_read=snapshot.versions, batch=snapshot.batch, as_of=snapshot.as_of.isoformat())",
    ),
    ("markdown", "## Look"),
    ("code", "tables = snapshot.rows()\ncharts.table(tables, rows=rows_shown)"),
    ("markdown", "## Check, then record"),
    (
        "code",
        'empty = tables.filter(tables["files"] == 0)["table"].to_list()\n'
        'check("a table has rows", tables["rows"].sum() > 0, f"{{tables[\'rows\'].sum():,}} rows, none in {{empty}}")',
    ),
    ("code", 'record(rows=int(tables["rows"].sum()), tables=tables.height)'),
)
YAML = """\
# What is published is read and looked at.
every: {every}
overlap: skip
deadline: 5 minutes
retries: 1
parameters:
  rows_shown: 20             # of what is published
"""
NAME = re.compile(r"[a-z][a-z0-9_]*")


def add(project: Path, name: str, *, every: str = "1 hour", domain: str = "pipeline") -> list[str]:
    """Write a stage; returns the paths of what was written, below the project.

    `every`: as in the YAML. Raises Refused, before anything is written, for a name or a cadence that is none;
    params.ParamsError when the stages that there are cannot be read.
    """
    if not NAME.fullmatch(name) or name == "all":
        raise Refused(f"{name!r} is no name for a stage: lower-case letters, digits and _, and not 'all'")
    try:
        seconds(every)
    except ValueError:
        raise Refused(f'{every!r} is no cadence: a duration such as "30 seconds", "1 minute" or "6 hours"') from None
    params.load(project)
    paths = [f"notebooks/{name}.ipynb", f"params/{name}.yml"]
    for path in paths:
        if (project / path).exists():
            raise Refused(f"{path} is there already: nothing was written")
    create(project, paths[0], notebook(name, domain))
    create(project, paths[1], YAML.format(every=every))
    readme = read(project, "README.md") if (project / "README.md").is_file() else ""
    if (rows := stage_rows(readme)) is None:
        return paths
    replace(project, "README.md", _with_row(readme, rows, name, every, list(params.load(project).stages)))
    return [*paths, "README.md"]


def notebook(name: str, domain: str) -> str:
    """The notebook's JSON, as nbformat writes it and ruff formats it."""
    cells = []
    for number, (kind, source) in enumerate(CELLS):
        text = source.format(title=name.replace("_", " ").capitalize(), domain=domain)
        cell: dict[str, Any] = {
            "cell_type": "markdown" if kind == "markdown" else "code",
            "id": f"{name[:40]}-{number:02}",
            "metadata": {"tags": ["parameters"]} if kind == "parameters" else {},
            "source": text.splitlines(keepends=True),
        }
        cells.append(cell if kind == "markdown" else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _with_row(readme: str, rows: dict[str, int], name: str, every: str, ordered: list[str]) -> str:
    """The README with the stage's line where its cadence has it."""
    number, _, unit = every.partition(" ")
    cadence = f"every {unit.removesuffix('s')}" if number == "1" else f"every {every}"
    lines = readme.splitlines(keepends=True)
    earlier = [rows[stage] for stage in ordered[: ordered.index(name)] if stage in rows]
    later = [rows[stage] for stage in ordered[ordered.index(name) :] if stage in rows]
    at = max(earlier) if earlier else min(later) - 1 if later else _head(lines)
    return "".join([*lines[:at], f"| `{name}` | {cadence} | reads what is published |\n", *lines[at:]])


def _head(lines: list[str]) -> int:
    """How many lines there are up to the rule below the table's head."""
    return next(n for n, line in enumerate(lines, 1) if re.match(r"\| *stage *\|", line)) + 1
