"""The timetable: five stages on their schedules, and what `up` keeps alive beside them.

A stage is one notebook in notebooks/, one YAML in params/ that says when it runs and with what, and one Prefect flow of
its name; whatever lies there is found. Stages meet only in the lake, so a late one reads older data and does not fail.

    generate      every 30 seconds   new files of TPC-H appear
    preprocess    every minute       files become Delta tables
    compact       every 30 minutes   small files become large ones
    query         every hour         business questions are answered
    train         every six hours    a model of late deliveries

up      everything: Prefect's server, the schedules, the API and the dashboard
run     one run now, of one stage or of all, or again with what an earlier run had
replay  a run again on the same data, in a root of its own: does the same come out?
check   parameters, notebooks and env files, without starting a kernel
new     a table from a sample file, a question, a stage: something to begin with
plan    every stage's next run, and where each parameter's value comes from
runs    the index of runs
whence  which run wrote a version of a table
doctor  what is wrong with the data, the packages and the ports, and what to do
rebuild     the lake again, from the archive
quarantine  what did not fit: list, show, try again
"""

# ruff: noqa: E402 -- first of all the interpreter that has the packages
from etl import interpreter

if __name__ == "__main__":
    interpreter.ensure_packages()

import sys
from collections.abc import Mapping
from pathlib import Path

from etl import cli
from etl.cli.common import Timetable
from etl.serve.prefect_server import HOST
from etl.serve.services import Service, prefect_server
from etl.storage import PROJECT

PORTS = {"prefect": 4200, "api": 8000, "dashboard": 8501}  # all on 127.0.0.1; `up --api-port 8001` takes another


def services(root_url: str, ports: Mapping[str, int], logs: Path) -> list[Service]:
    """What `up` starts besides the schedules. `logs`: the folder of the services' logs."""
    return [
        prefect_server(ports["prefect"], logs / "prefect", logs),
        Service(
            "API",
            [
                *(sys.executable, "-m", "uvicorn", "app.api:app"),
                *("--host", HOST, "--port", str(ports["api"]), "--no-access-log"),
            ],
            ports["api"],
            health_url=f"{api_url(ports)}/health",
            page=f"{api_url(ports)}/docs",
            environment={"ETL_ROOT": root_url},
            log_path=logs / "api.log",
        ),
        Service(
            "dashboard",
            [
                *(sys.executable, "-m", "streamlit", "run", str(PROJECT / "app" / "dashboard.py")),
                *("--server.address", HOST, "--server.port", str(ports["dashboard"]), "--server.headless", "true"),
                *("--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none"),
                *("--server.enableCORS", "true", "--server.enableXsrfProtection", "true"),  # whatever ~/.streamlit says
            ],
            ports["dashboard"],
            health_url=f"http://{HOST}:{ports['dashboard']}/_stcore/health",
            page=f"http://{HOST}:{ports['dashboard']}",
            environment={"ETL_ROOT": root_url, "ETL_API_URL": api_url(ports)},
            log_path=logs / "dashboard.log",
        ),
    ]


def api_url(ports: Mapping[str, int]) -> str:
    """Where the API answers; reports are served under it."""
    return f"http://{HOST}:{ports['api']}"


app = cli.make(Timetable(services, api_url, PORTS, lake="pipeline:Lake", model="pipeline.model"), help_text=__doc__)

if __name__ == "__main__":
    sys.exit(app())
