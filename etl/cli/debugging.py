"""`debug`: a run's notebook in JupyterLab, on what the run found."""

import os
import sys
import webbrowser

import typer

from etl.cli.common import Env, RootOption, RunId, Timetable, existing_root, get_run, refuse, refusing, say
from etl.storage import Damaged


def register(app: typer.Typer) -> None:
    app.command("debug")(debug)


def debug(context: typer.Context, run_id: RunId, env: Env = "local", root: RootOption = None) -> None:
    """A run's notebook in JupyterLab: its parameters, its release's code, the data that it read. Ctrl-C ends it.

    Its kernel has run what comes before the cell that failed. It is a file of its own, below outputs/debug/ for a day.
    """
    from etl.runs import debugging, replay
    from etl.serve.lab import Lab

    timetable: Timetable = context.obj
    run, asked = get_run(run_id, env, root), existing_root(env, root)
    with refusing(debugging.NotThere, replay.NotRepeatable, Damaged):
        bench = debugging.prepare(asked, run, lambda folder: timetable.lake_at(asked).branch(folder))
    lab = Lab(bench.notebook, bench.code)
    try:
        lab.start()
        say(f"{run['run_id']} {run['state']}: {bench.notebook}")
        for sentence in bench.told:
            say(sentence, style="yellow")
        say(lab.page(bench.failed))
        if has_browser():
            webbrowser.open(lab.page(bench.failed))
        if bench.failed:
            lab.run_before(bench.failed)
            say("what comes before the cell that failed has run; Ctrl-C ends JupyterLab")
        lab.wait()
    except RuntimeError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        say("JupyterLab is ended")
    finally:
        lab.stop()


def has_browser() -> bool:
    """Whether a page can be shown to somebody: not on a machine that is reached by a terminal alone."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
