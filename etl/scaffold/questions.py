"""A question that runs at once: how many rows a table has, by time where it has one, or by what a column says."""

import keyword
import re
from pathlib import Path

from etl.lake.table import INT, INT32, TEXT, Table
from etl.scaffold.files import Refused, create

QUESTION_NAME = re.compile(r"[a-z][a-z0-9_]*")

BY_TIME = '''\
"""Rows of {words} over time

How many rows of {words} are there in each hour, by `{column}`?
"""

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {{
    "{table}": ["{column}"],
}}
FIGURE = "rows"


def answer({table}, *, bucket: str = "1h", newest: int = 48):
    """At most `newest` rows: since, rows; the newest bucket first. One in which nothing came is left out."""
    buckets = {table}.select(since=nw.col("{column}").dt.truncate(bucket))
{known}    counted = buckets.group_by("since").agg(nw.len().alias("rows"))
    return (
        gathered(counted)
        .select("since", rows=nw.col("rows").cast(nw.Int64))
        .sort("since", descending=True)
        .head(newest)
    )


def chart(result):
    from etl.charts import in_units, plot

    frame, unit = in_units(result, "rows")
    title = "Rows of {words}"
    return plot(frame).line(x="since", y="rows", title=title, xlabel="UTC", ylabel=unit, ylim=(0, None))
'''

BY_VALUE = '''\
"""Rows of {words} by {column_words}

How many rows of {words} have which `{column}`?
"""

import narwhals as nw

from etl.questions.exact import gathered

TABLES = {{
    "{table}": ["{column}"],
}}
FIGURE = "rows"


def answer({table}, *, top: int = 20):
    """At most `top` rows: value, rows; the most frequent value first."""
    values = {table}.select(value=nw.col("{column}"))
{known}    counted = values.group_by("value").agg(nw.len().alias("rows"))
    return (
        gathered(counted)
        .select("value", rows=nw.col("rows").cast(nw.Int64))
        .sort("rows", "value", descending=[True, False])
        .head(top)
    )


def chart(result):
    from etl.charts import in_units, plot

    named = result.with_columns(result["value"].cast(str).str.slice(0, 24))
    frame, unit = in_units(named.reverse(), "rows")  # bars go upwards
    title = "Rows of {words} by {column_words}"
    return plot(frame).barh(x="value", y="rows", title=title, xlabel="", ylabel=unit)
'''


def add(project: Path, name: str, table: Table, *, folder: str = "pipeline/queries") -> str:
    """Write a question of a table; returns its path below the project. Raises Refused, before anything is written."""
    if not QUESTION_NAME.fullmatch(name) or keyword.iskeyword(name):
        raise Refused(f"{name!r} is no name for a question: lower-case letters, digits and _, from a letter on")
    if not table.name.isidentifier() or keyword.iskeyword(table.name):
        raise Refused(f"{table.name!r} cannot be asked: a question takes its tables by names of Python")
    if not (project / folder / "__init__.py").is_file():
        raise Refused(f"{folder}/ is no package: there is no {folder}/__init__.py")
    path = f"{folder}/{name}.py"
    create(project, path, text(table))
    return path


def text(table: Table) -> str:
    """The question's module."""
    column = table.time or _telling(table)
    form = BY_TIME if table.time else BY_VALUE
    known, (frame, alias) = "", ("buckets", "since") if table.time else ("values", "value")
    if table.fields[column].nullable:
        known = f'    {frame} = {frame}.filter(~nw.col("{alias}").is_null())\n'
    words = {"words": table.name.replace("_", " "), "column_words": column.replace("_", " ")}
    return form.format(table=table.name, column=column, known=known, **words)


def _telling(table: Table) -> str:
    """The column whose values rows are counted by: one with few values, as far as the declaration says."""
    plain = [name for name, column in table.fields.items() if column.type in (TEXT, INT, INT32)]
    if not plain:
        raise Refused(f"{table.name!r} has no column of texts or whole numbers, and no time, to count its rows by")

    def rank(name: str) -> tuple[bool, bool, bool]:
        column = table.fields[name]
        return not column.choices, name in table.key, column.type != TEXT

    return min(plain, key=rank)
