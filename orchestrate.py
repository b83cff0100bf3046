"""The timetable: six stages on their schedules, and what `up` keeps alive beside them.

A stage is one notebook in notebooks/, one YAML in params/ that says when it runs and with what, and one Prefect flow of
its name; whatever lies there is found. Stages meet only in the lake, so a late one reads older data and does not fail.

    generate      every 30 seconds   new files of TPC-H appear
    preprocess    every minute       files become Delta tables
    compact       every 30 minutes   small files become large ones
    query         every hour         business questions are answered
    score         every hour         what has shipped is scored, and drift is told
    train         every six hours    a model of late deliveries

up      everything: Prefect's server, the schedules, the API and the dashboard
run     one run now, of one stage or of all, again with what an earlier run had, or over many times and values
repair  what failed, and what depended on it, again
replay  a run again on the same data, in a root of its own: does the same come out?
try     the working tree's stage on a branch of what is published: what would be otherwise?
debug   a run's notebook in JupyterLab, on the data that it read
release what `up` runs from now on: the working tree, checked and compared; releases, rollback
check   parameters, notebooks, env files, tables and questions, without starting a kernel
new     a project, a table from a sample file, a question, a stage: something to begin with
plan    every stage's next run, and where each parameter's value comes from
status  whether all is well: what failed last, is late or damaged, and what to do
watch   tell whom `alerts` in the env file names, beside `up` or on its own
runs    the index of runs; the best of a stage by a metric
models  which model is published, and why: list, show, compare, promote, rollback
whence  which run wrote a version of a table
doctor  what is wrong with the data, the packages and the ports, and what to do
rebuild     the lake again, from the archive
backup      what is published, copied elsewhere while everything runs; restore  a root again from it
quarantine  what did not fit: list, show, try again
"""

# ruff: noqa: E402 -- first of all the interpreter that has the packages
from etl import interpreter

if __name__ == "__main__":
    interpreter.ensure_packages()

import sys

from etl import cli
from etl.cli.common import Timetable
from etl.serve.services import PORTS
from etl.serve.services import usual as services  # Prefect's server, the API, the dashboard

app = cli.make(Timetable("pipeline:Lake", "pipeline.model", services, ports=PORTS), help_text=__doc__)

if __name__ == "__main__":
    sys.exit(app())
