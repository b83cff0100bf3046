"""A project of one's own: a folder with the stages that work for any tables, and a domain that is empty yet."""

import shutil
from pathlib import Path

from etl.scaffold.files import Refused

STAGES = ("preprocess", "compact", "query")  # that know no table
ENVIRONMENTS = ("local", "dev")
TIMETABLE = '''\
"""The timetable of {name}: notebooks/ are its stages, and params/ says when each of them runs."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ETL_PROJECT", str(Path(__file__).resolve().parent))  # before the engine is imported

import etl  # noqa: E402

sys.path.append(str(Path(etl.__file__).resolve().parents[1]))  # last of all: app/, which shows any project, is there

from etl.cli import Timetable, main, make  # noqa: E402

app = make(Timetable("pipeline:Lake"), help_text=__doc__)  # with a model: Timetable("pipeline:Lake", "pipeline.model")

if __name__ == "__main__":
    main(app)
'''
DOMAIN = '''\
"""The domain: its tables, its questions."""

from typing import ClassVar

from etl import charts, lake
from pipeline.tables import TABLES

__all__ = ["COUNTED", "TITLE", "Lake", "charts"]

TITLE = "{name}"  # of the dashboard
COUNTED = {{name: name for name in TABLES}}  # tables whose rows it counts, and what it calls them


class Lake(lake.Lake):
    """The lake of this project under a root."""

    tables: ClassVar = TABLES
'''
TABLES = '''\
"""The tables: columns, types, keys and the rules a row must keep. `etl new table` adds one."""

from etl.lake.table import Table

_ALL: list[Table] = []

TABLES = {table.name: table for table in _ALL}
'''
QUERIES = '''\
"""Business questions: one file each in this folder. A file that is added here is found by itself."""

from functools import partial

from etl.questions import Question, ask, ask_all, changes, current, discover, history, overview, save

__all__ = ["Question", "ask", "ask_all", "changes", "current", "history", "overview", "questions", "save"]

questions = partial(discover, __name__)
'''


def add(project: Path, folder: Path) -> list[str]:
    """Write a project into a folder that is not there, or empty; returns the paths of what was written, below it.

    `project`: whose notebooks and YAML are taken. Raises Refused, before anything is written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is there already, and not empty: nothing was written")
    copied = [f"notebooks/{stage}.ipynb" for stage in STAGES] + [f"params/{stage}.yml" for stage in STAGES]
    copied += [f"params/env/{name}.yml" for name in ENVIRONMENTS]
    if missing := [path for path in copied if not (project / path).is_file()]:
        raise Refused(f"{project} has no {missing[0]}, which a new project is given")
    name = folder.resolve().name
    written = {
        "orchestrate.py": TIMETABLE.format(name=name),
        "pipeline/__init__.py": DOMAIN.format(name=name.replace("\\", "").replace('"', "")),
        "pipeline/tables.py": TABLES,
        "pipeline/queries/__init__.py": QUERIES,
        ".gitignore": "outputs/\n__pycache__/\n.ipynb_checkpoints/\n",
    }
    for path in [*copied, *written]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for path in copied:
        shutil.copy(project / path, folder / path)
    for path, text in written.items():
        (folder / path).write_text(text, encoding="utf-8")
    return [*written, *copied]
