"""Kinds of notebooks: whatever stands in the folder, a tick of it is a run whose state and report are true.

The function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import contextlib
import dataclasses
import html
import json
import logging
import os
import random
import re
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nbformat
from faults import toy

from etl import params
from etl.kernels import client
from etl.runs import dispatch, index
from etl.storage import Root

AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
PARAMETERS = "count: int = 3  # how many"
YAML = "every: 1 minute\ndeadline: 60 seconds\n"
VIEW = "application/vnd.jupyter.widget-view+json"
OUTPUT = "import ipywidgets as w\nfrom IPython.display import display, clear_output\nout = w.Output()\ndisplay(out)\n"
NO_CLUSTER = {"coiled": {"no_such_argument": 1}}
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Kind:
    """A notebook and what a run of it has to be. `says` and `not_says` are of the page's text."""

    cells: tuple[Cell, ...] = ("print(count)",)  # text, or text and a tag; "# ..." is a heading
    raw: bytes | None = None  # of the file, in place of a notebook with these cells
    metadata: dict[str, Any] = field(default_factory=lambda: dict(PYTHON))
    minor: int = 5
    state: str = "ok"
    reason: str = ""  # in the record's
    check: str = ""  # in what `check` says; "": nothing
    says: tuple[str, ...] = ()
    not_says: tuple[str, ...] = ()
    states: tuple[str, ...] = ()  # of the cells behind the parameters, when that counts
    metrics: dict[str, Any] = field(default_factory=dict)
    widgets: bool = False  # whether their state is kept
    stage: dict[str, Any] = field(default_factory=dict)  # what else the stage has
    variables: dict[str, str] = field(default_factory=dict)
    root: str = "root"  # below the folder of the project


def unreadable(raw: bytes, why: str) -> Kind:
    return Kind(raw=raw, state="failed", reason=why, check=why, says=(why,))


def written(*cells: Cell, metadata: dict[str, Any] | None = None, minor: int = 5, major: int = 4) -> bytes:
    """A notebook with a parameters cell in front of these cells."""
    made = []
    for number, cell in enumerate([(PARAMETERS, "parameters"), *cells]):
        text, tag = cell if isinstance(cell, tuple) else (cell, "")
        is_text = text.startswith("# ")
        new: dict[str, Any] = {"cell_type": "markdown" if is_text else "code", "source": text.splitlines(keepends=True)}
        new["metadata"] = {"tags": [tag]} if tag else {}
        new |= {} if is_text else {"outputs": [], "execution_count": None}
        new |= {"id": f"cell-{number}"} if minor == 5 else {}
        made.append(new)
    nb = {"nbformat": major, "nbformat_minor": minor, "metadata": PYTHON if metadata is None else metadata}
    return json.dumps(nb | {"cells": made}).encode()


def edited(**changes: Any) -> bytes:
    return json.dumps(json.loads(written()) | changes).encode()


def with_tags(tags: Any) -> bytes:
    nb = json.loads(written("print('tags', count)"))
    nb["cells"][1]["metadata"]["tags"] = tags
    return json.dumps(nb).encode()


def kernel(name: str | None, language: str | None = None, info: str | None = None) -> dict[str, Any]:
    spec = {"display_name": "some"} | ({"name": name} if name is not None else {})
    spec |= {"language": language} if language else {}
    return {"kernelspec": spec} | ({"language_info": {"name": info}} if info else {})


FORMAT_3 = json.dumps({"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": []}]}).encode()
SKIPPED = Kind(
    ("print('ran', count)", ("print('not this')\n1/0", "skip-execution"), "print('after')"),
    says=("ran 3", "after", "skipped"),
    states=("ok", "skipped", "ok"),
)
CAUGHT = Kind(
    (
        OUTPUT + "print('before')\nwith out:\n    print('inside')\nprint('behind')",
        "from etl.notebook import record\nwith out:\n    clear_output()\n    print('second')\n    record(rows=count)",
    ),
    says=("before", "inside", "behind", "second"),
    metrics={"rows": 3},
    widgets=True,
)
TQDM = Kind(
    ("from tqdm.auto import tqdm\nfor _ in tqdm(range(7), desc='Load'): pass",),
    says=("Load: 100%", "7/7"),
    not_says=("0%|",),
    widgets=True,
)
RICH = Kind(
    ("from rich.progress import track\nfor _ in track(range(5), description='Riches'): pass\nprint('end')",),
    says=("Riches", "100%", "end"),
    widgets=True,
)
SECRETS = {"POSTGRES_PASSWORD": "postgres", "ODD_TOKEN": "IPY_MODEL_and_stdout"}
REDACTED = Kind(
    (
        OUTPUT + "print('says postgres')\nwith out:\n    print('post', end='', flush=True)\n    print('gres')",
        "display(w.HTML('by postgres'), w.VBox([w.Label('postgres')]))",
    ),
    says=("‹secret POSTGRES_PASSWORD›", "by ‹secret POSTGRES_PASSWORD›"),
    widgets=True,
    stage={"secrets": ("POSTGRES_PASSWORD",)},
    variables=SECRETS,
    root="home/postgres/root",
)

KINDS: dict[str, Kind] = {
    # the first are run by `make test`
    "git's marks": unreadable(b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> main\n", "is a marker of git"),
    "byte order mark": unreadable(b"\xef\xbb\xbf" + written(), "begins with a byte order mark"),
    "Git LFS": unreadable(b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "is a Git LFS pointer"),
    "empty": unreadable(b"", "it is empty"),
    "not JSON": unreadable(b'{"cells": [', "is not JSON"),
    "format 3": unreadable(FORMAT_3, "its format is 3, not 4"),
    "R": Kind(metadata=kernel("ir", "R"), state="failed", reason="it is in 'R'", check="it is in 'R'"),
    "no secret": Kind(stage={"secrets": ("NO_SUCH_SECRET",)}, state="failed", reason="no secret NO_SUCH_SECRET"),
    "no machine": Kind(stage={"machine": {"n": 1}}, state="failed", reason="no machine: the root"),
    "no cluster": Kind(
        stage={"dask": NO_CLUSTER, "supplied": {"dask"}}, state="failed", reason="no Dask cluster: TypeError"
    ),
    "kernel .venv": Kind(metadata=kernel(".venv", "python", "python"), says=("3",)),
    "skipped": SKIPPED,
    "Output": CAUGHT,
    "tqdm": TQDM,
    "redacted": REDACTED,
    # files
    "another Git LFS": unreadable(b"version https://git-lfs.github.com/spec/v1\r\n", "is a Git LFS pointer"),
    "UTF-16": unreadable("{}".encode("utf-16"), "byte order mark"),
    "Latin-1": unreadable(b'{"a": "\xe9"}', "it is not UTF-8"),
    "blanks": unreadable(b" \n\n", "it is empty"),
    "cut off": unreadable(written()[:-40], "is not JSON"),
    "zeros": unreadable(b"\0" * 512, "is not JSON"),
    "HTML": unreadable(b"<!doctype html><title>502</title>", "is not JSON"),
    "a list": unreadable(b"[]", "it has no cells"),
    "no cells": unreadable(b'{"nbformat": 4, "metadata": {}}', "it has no cells"),
    "nested": unreadable(b"[" * 100_000, "it is nested too deeply"),
    "format 5": unreadable(edited(nbformat=5), "its format is 5, not 4"),
    "no format": unreadable(edited(nbformat=None), "its format is None, not 4"),
    "cells of text": unreadable(edited(cells=["print(1)"]), "cell 1 is none"),
    "a cell of a kind": unreadable(
        edited(cells=[{"cell_type": "heading", "metadata": {}, "source": ""}]), "cell 1 is none"
    ),
    # formats
    **{f"format 4.{minor}": Kind(minor=minor, says=("3",)) for minor in range(6)},
    "format 4.9": Kind(raw=edited(nbformat_minor=9)),
    "no metadata in it": Kind(metadata={}, says=("3",)),
    "kernelspec null": Kind(metadata={"kernelspec": None}, says=("3",)),
    "kernelspec empty": Kind(metadata={"kernelspec": {}}, says=("3",)),
    "kernelspec without a name": Kind(metadata=kernel(None, "python"), says=("3",)),
    "a name of no text": Kind(metadata=kernel(""), says=("3",)),
    "conda-env-x": Kind(metadata=kernel("conda-env-x-py"), says=("3",)),
    "a kernel nobody has": Kind(metadata=kernel("no-such-kernel", None, "python"), says=("3",)),
    "Julia": Kind(metadata=kernel("julia-1.9", None, "julia"), state="failed", reason="'julia'", check="'julia'"),
    "tags null": Kind(raw=with_tags(None), says=("tags 3",)),
    "two ids": Kind(raw=written("print(count)").replace(b"cell-1", b"cell-0"), says=("3",)),
    "raw cells": Kind(raw=json.dumps(json.loads(written("print('raw', count)"))).encode(), says=("raw 3",)),
    # cells
    "all skipped": Kind((("1/0", "skip-execution"),), says=("skipped",), states=("skipped",)),
    "skipped, then failed": Kind(
        (("1/0", "skip-execution"), "raise ValueError('this')", "print()"),
        state="failed",
        reason="ValueError: this",
        states=("skipped", "failed", "never_ran"),
    ),
    "blank cells": Kind(("", "  \n", "print(count)"), says=("3",)),
    "may raise": Kind((("1/0", "raises-exception"), "print('on')"), says=("ZeroDivisionError", "on")),
    "exit": Kind(("exit()",), state="failed", reason="a cell called exit()"),
    "sys.exit": Kind(("import sys; sys.exit(0)",), state="failed", reason="SystemExit"),
    "os._exit": Kind(("import os; os._exit(0)",), state="killed", reason="exited with status 0"),
    "input": Kind(("input('?')",), state="failed", reason="StdinNotImplementedError"),
    "not Python": Kind(("this is no Python",), state="failed", reason="SyntaxError"),
    # magics, processes
    "%time": Kind(("%time print('timed', count)",), says=("timed 3", "Wall time")),
    "%%bash": Kind(("%%bash\necho from bash",), says=("from bash",)),
    "%%bash fails": Kind(("%%bash\nexit 3",), state="failed", reason="CalledProcessError"),
    "%%capture": Kind(("%%capture caught\nprint('hidden')", "print(caught.stdout.upper())"), says=("HIDDEN",)),
    "!": Kind(("!echo from a shell",), says=("from a shell",)),
    "%run fails": Kind(
        ("open('/tmp/fails.py', 'w').write('1/0')", "%run /tmp/fails.py"), state="failed", reason="ZeroDivisionError"
    ),
    "a subprocess": Kind(("import subprocess\nsubprocess.run(['echo', 'from a child'])",), says=("from a child",)),
    "a process that stays": Kind(
        ("import subprocess\nsubprocess.Popen(['sleep', '1000'])\nprint('left')",), says=("left",)
    ),
    "threads": Kind(
        ("import threading\nt = threading.Thread(target=print, args=('from a thread',))\nt.start(); t.join()",),
        says=("from a thread",),
    ),
    "async": Kind(("import asyncio\nawait asyncio.sleep(0.01)\nprint('awaited')",), says=("awaited",)),
    "multiprocessing": Kind(
        ("import os\nfrom multiprocessing import get_context\nwith get_context('fork').Pool(2) as pool:\n"
         "    print(sum(pool.map(abs, [-1, -2])))",),
        says=("3",),
    ),
    # progress
    "tqdm on a terminal": Kind(
        ("from tqdm import tqdm\nfor _ in tqdm(range(7), desc='Plain'): pass",), says=("Plain: 100%", "7/7")
    ),
    "tqdm fails": Kind(
        ("from tqdm.auto import tqdm\nfor n in tqdm(range(4), desc='Half'):\n    if n == 2: raise ValueError('half')",),
        state="failed",
        reason="ValueError: half",
        says=("Half: 50%", "2/4"),
        widgets=True,
    ),
    "tqdm leaves nothing": Kind(
        ("from tqdm.auto import tqdm\nfor _ in tqdm(range(7), desc='Gone', leave=False): pass\nprint('end')",),
        says=("end",),
        not_says=("0/7", "7/7"),
    ),
    "two of tqdm": Kind(
        ("from tqdm.auto import tqdm, trange\nfor _ in trange(2, desc='Outer'):\n"
         "    for _ in trange(3, desc='Inner', leave=False): pass",),
        says=("Outer: 100%", "2/2"),
        not_says=("3/3",),
    ),
    "rich": RICH,
    "rich leaves nothing": Kind(
        ("from rich.progress import Progress\nwith Progress(transient=True) as p:\n"
         "    task = p.add_task('Transient', total=2)\n    p.advance(task, 2)\nprint('end')",),
        says=("end",),
        not_says=("100%",),
    ),
    "rich table": Kind(("from rich import print\nprint('[bold]rich[/] text')",), says=("rich text",)),
    "bar of widgets": Kind(
        ("import ipywidgets as w\nbar = w.IntProgress(max=8, description='Bar')\ndisplay(bar)\nbar.value = 6",),
        says=("Bar", "6/8"),
        widgets=True,
    ),
    "carriage returns": Kind(
        ("for n in range(3): print(f'\\rstep {n}', end='')",), says=("step 2",), not_says=("step 1",)
    ),
    # widgets
    "other widgets": Kind(
        ("import ipywidgets as w\nslider = w.IntSlider(4, description='size')\n"
         "display(w.VBox([slider, w.Label('a < b'), w.HTML('<b>bold</b>')]))",),
        says=("size 4", "a < b", "bold"),
        widgets=True,
    ),
    "Output cleared": Kind(
        (OUTPUT + "print('kept')\nfor n in range(9):\n"
         "    with out:\n        clear_output(wait=True)\n        print('step', n)",),
        says=("kept", "step 8"),
        not_says=("step 7",),
    ),
    "Output draws": Kind(
        (OUTPUT + "import matplotlib.pyplot as plt\nwith out:\n    plt.plot([1, 2])\n    plt.show()",), says=("figure",)
    ),
    "Output catches an error": Kind(
        (OUTPUT + "with out: 1/0", "print('later')"), state="failed", reason="ZeroDivisionError: division by zero"
    ),
    "Output catches a check": Kind(
        (OUTPUT + "from etl.notebook import check\nwith out: check('enough', False, '0 rows')",),
        state="check_failed",
        reason="enough",
    ),
    "Output decorates": Kind(
        (OUTPUT + "@out.capture()\ndef work(): print('decorated')\nwork()",), says=("decorated",)
    ),
    "Output appended": Kind((OUTPUT + "out.append_stdout('appended')\nprint('end')",), says=("appended", "end")),
    "Outputs in each other": Kind(
        (OUTPUT + "inner = w.Output()\nwith out:\n    print('outer')\n    with inner: print('inner')\n"
         "    print('again')\nprint('end')",),
        says=("outer", "inner", "again", "end"),
    ),
    "Output prints much": Kind(
        (OUTPUT + "with out:\n    for n in range(40_000): print('line', n)\nprint('end')",), says=("line 39999", "end")
    ),
    "interact": Kind(
        ("import ipywidgets as w\nw.interact(lambda n: print('chose', n), n=4);",), says=("chose 4",), widgets=True
    ),
    "display ids": Kind(
        (OUTPUT + "with out: handle = display('first', display_id=True)\nhandle.update('second')",),
        says=("second",),
        not_says=("'first'",),
    ),
    "a closed widget": Kind(
        ("import ipywidgets as w\nbar = w.IntProgress(3)\ndisplay(bar)\nbar.close()\nprint('end')",),
        says=("end",),
        not_says=("3/100",),
    ),
}  # fmt: skip


def kinds(n: int, seed: int) -> str:
    """The first `n` kinds of notebooks: `check`, state, reason in a line, report, index and terminal are right."""
    chosen = dict(list(KINDS.items())[:n])
    states: dict[str, int] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, toy.spool(folder), _kernels(Path(folder), n > 20), _logged() as lines:
        project = _project(Path(folder))
        for number, (name, kind) in enumerate(random.Random(seed).sample(list(chosen.items()), len(chosen))):
            try:
                state = _run(kind, project, AT + timedelta(minutes=number))
            except Exception as error:
                wrong.append(f"{name}: {str(error) or type(error).__name__}"[:500])
                continue
            states[state] = states.get(state, 0) + 1
        assert not wrong, "\n".join(wrong)
        loud = [line for line in lines if "Traceback" in line or "\n" in line]
        assert not loud, f"on the terminal: {loud[0]}"
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{len(chosen)} kinds of notebooks as they should be: {told}"


def _project(folder: Path) -> Path:
    for path in ("params/env", "notebooks"):
        (folder / path).mkdir(parents=True)
    (folder / "params/env/local.yml").write_text("root: outputs\n")
    (folder / "params/kind.yml").write_text(YAML)
    return folder


def _run(kind: Kind, project: Path, at: datetime) -> str:
    """Run one as a tick of `up` does; its state."""
    raw = kind.raw if kind.raw is not None else written(*kind.cells, metadata=kind.metadata, minor=kind.minor)
    (project / "notebooks/kind.ipynb").write_bytes(raw)
    try:
        params.load(project)
        said = ""
    except params.ParamsError as error:
        said = str(error)
    assert (kind.check in said) if kind.check else not said, f"check says {said!r}"
    loaded = params.load(project, may_be_unreadable=True)
    root = Root.at(str(project / kind.root))
    environment = dataclasses.replace(loaded.environment, root=root.url)
    stage = dataclasses.replace(loaded.stages["kind"], **kind.stage)
    with _variables(kind.variables):
        record = dispatch.run_stage(stage, environment, scheduled_for=at)
    assert record.state == kind.state, f"{record.state}: {record.reason}"
    assert kind.reason in record.reason and "\n" not in record.reason, f"reason {record.reason!r}"
    nb, run_json = toy.report(root.url, record)
    nbformat.validate(nb)
    assert run_json["state"] == nb.metadata.runner["state"] == kind.state, f"{run_json['state']} in the report"
    assert index.get(root, record.run_id)["state"] == kind.state, "another state in the index"
    assert kind.metrics.items() <= record.metrics.items(), f"metrics {record.metrics}"
    cells = [cell["state"] for cell in record.cells]
    assert not kind.states or tuple(cells[2:]) == kind.states, f"cells {cells}"
    page = root.read(f"{record.report}/report.html").decode()
    _look_at(page, kind)
    assert not kind.widgets or nb.metadata.widgets, "no state of widgets"
    for value in kind.variables.values():
        told = json.dumps([cell.get("outputs") for cell in nb.cells]) + json.dumps(nb.metadata.get("widgets", {}))
        assert value not in told, f"{value} is in the report"
    return record.state


def _look_at(page: str, kind: Kind) -> None:
    """What people read: the texts of the outputs, without the source of the cells."""
    shown = re.sub(r"<details.*?</details>", lambda match: _summary(match[0]), page.split("<main>")[1], flags=re.S)
    text = html.unescape(re.sub(r"<[^>]+>", "", shown.replace("<img", "figure <img")))
    text = " ".join(text.split())
    for part in kind.says:
        assert part in text, f"{part!r} is not in the page: {text}"
    for part in kind.not_says:
        assert part not in text, f"{part!r} is in the page"


def _summary(details: str) -> str:
    """Of a cell's source what is said beside it: how long it took, or that it did not run."""
    return "".join(re.findall(r'<span class="took">(.*?)</span>', details, re.S))


@contextlib.contextmanager
def _kernels(folder: Path, are_kept: bool):
    """A fork server, where there is enough to do for it."""
    if not are_kept:
        yield
        return
    before = os.environ.get("ETL_KERNELS")
    os.environ["ETL_KERNELS"] = tempfile.mkdtemp(prefix="kinds-")
    keeper = client.Keeper(2, folder / "kernels.log")
    keeper.start()
    try:
        toy.until((client.server_folder() / "socket").exists, 240, "the fork server answers")
        yield
    finally:
        keeper.end()
        os.environ.pop("ETL_KERNELS") if before is None else os.environ.update(ETL_KERNELS=before)


@contextlib.contextmanager
def _variables(values: dict[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _logged():
    """What the runs log, as the terminal shows it."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.setFormatter(logging.Formatter())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)
