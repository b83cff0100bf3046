"""The timetable: six stages on their schedules, and what `up` keeps alive beside them.

A stage is one notebook in notebooks/, one YAML in params/ that says when it runs and with what, and one Prefect flow of
its name; whatever lies there is found. Stages meet only in the lake, so a late one reads older data and does not fail.

    generate      every 30 seconds   new files of TPC-H appear
    preprocess    every minute       files become Delta tables
    compact       every 30 minutes   small files become large ones
    query         every hour         business questions are answered
    score         every hour         what has shipped is scored, and drift is told
    train         every six hours    a model of late deliveries
"""

# ruff: noqa: E402 -- first of all the interpreter that has the packages
from etl import interpreter

if __name__ == "__main__":
    interpreter.ensure_packages()

from etl import cli
from etl.cli.common import Timetable
from etl.serve.services import PORTS
from etl.serve.services import usual as services  # Prefect's server, the API, the dashboard

app = cli.make(Timetable("pipeline:Lake", "pipeline.model", services, ports=PORTS), help_text=__doc__)

if __name__ == "__main__":
    cli.main(app)
