"""Text that must not get through: a secret into what is written, a mistake into a run, a parameter into code.

Each function takes how many and a seed, says in figures what held, and raises AssertionError otherwise.
"""

import base64
import contextlib
import html
import json
import os
import random
import re
import string
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import unquote_plus

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from params_cases import BAD_VALUES, CELL, GOOD_VALUES, LOCAL, STAGE
from params_cases import notebook as parameters_notebook

from etl import params
from etl.runs.engine import execute
from etl.runs.record import RunRequest

AT = "2026-03-01T12:00:10+00:00"


# --- a canary ---

# what a cell may do with the secret, which it knows as `value`; the last of them ends the run
SHOWN = {
    "printed": "print('printed', value)",
    "on stderr": "import sys; print(value, file=sys.stderr)",
    "in two prints": "print(value[:7], end=''); print(value[7:])",
    "in two flushed prints": "import time; print(value[:9], end='', flush=True); time.sleep(0.3); print(value[9:])",
    "a result": "value",
    "a result in bytes": "value.encode()",
    "in a repr": "class Client:\n    def __repr__(self): return f'Client(token={value})'\nClient()",
    "in HTML": "class Page:\n    def _repr_html_(self): return f'<a title=\"x\">{value}</a>'\nPage()",
    "in escaped HTML": "import html\nfrom IPython.display import HTML\nHTML(html.escape(value))",
    "in JSON": "import json\nfrom IPython.display import JSON, display\ndisplay(JSON({value: [{'deep': value}]}))\n"
    "print(json.dumps({'k': value}), json.dumps(json.dumps([value]), ensure_ascii=False))",
    "base64": "import base64\nfor extra in ('', 'u:', 'x', 'ab:'):\n"
    "    print(base64.b64encode((extra + value + extra).encode()).decode())\n"
    "    print(base64.urlsafe_b64encode((extra + value).encode()))",
    "in a URL": "from urllib.parse import quote, quote_plus, urlencode\n"
    "print('https://user:' + quote(value, safe='') + '@host', quote_plus(value), urlencode({'k': value}))",
    "hexadecimal": "print(value.encode().hex(), value.encode().hex().upper())",
    "recorded": "record(token=value, **{'t' + value: [value]})",
    "checked": "check('has ' + value, True, value)",
    "logged": "import logging; logging.getLogger('x').error('with %s', value)",
    "by a child": "import subprocess; subprocess.run(['sh', '-c', 'env; printf %s \"$1\" >&2', 'x', value])",
    "on the display": "from IPython.display import display\nh = display('first', display_id=True); h.update(value)",
    "in a frame": "import pandas as pd\npd.set_option('display.max_colwidth', 200)\npd.DataFrame({'token': [value]})",
    "a traceback": "def call(token):\n    raise ValueError(f'refused: {token}')\ncall(value)",
}
ENDINGS = {
    "ok": "record(rows=1)",
    "failed": SHOWN.pop("a traceback"),
    "check_failed": "check('token', False, value)",
    "noop": "stop(value)",
    "killed": "import os, sys\nos.write(2, value.encode() + b'\\n')\nos._exit(3)",
}


def canary(n: int, seed: int) -> str:
    """A secret shown in every way, in `n` runs that end in different ways: nothing written holds it."""
    rng, places, endings = random.Random(seed), 0, list(ENDINGS)
    for number in range(n):
        halves = ["".join(rng.choices(string.ascii_letters + string.digits, k=11)) for _ in range(2)]
        # the second has what every encoding writes differently
        values = {"CANARY_PLAIN": "".join(halves), "CANARY_ODD": f"{halves[1]}+/&<'\"?é %\\{halves[0]}"}
        ending = endings[number % len(endings)]
        with tempfile.TemporaryDirectory() as folder, _secrets(values, Path(folder), in_file=number % 2 == 1):
            texts = _run_that_shows(values, ending, Path(folder), f"toy-20260301T120010-{rng.getrandbits(24):06x}")
            found = [(place, half) for place, text in texts.items() for half in halves if holds(text, half)]
            assert not found, f"{ending}: {[(place, _around(texts[place], half)) for place, half in found[:5]]}"
            places += len(texts)
    return f"{len(SHOWN) + 1} ways x {n} runs, {places} files and texts: no hit, plain, base64, URL or hex"


@contextlib.contextmanager
def _secrets(values: dict[str, str], folder: Path, in_file: bool):
    """The values as environment variables, or as files; the spool in `folder`."""
    changed = {"ETL_SPOOL": str(folder / "spool"), "ETL_SECRETS_DIR": str(folder / "secrets")}
    (folder / "secrets").mkdir()
    if in_file:
        for name, value in values.items():
            (folder / "secrets" / name).write_text(value + "\n", encoding="utf-8")
    else:
        changed |= values
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _run_that_shows(values: dict[str, str], ending: str, folder: Path, run_id: str) -> dict[str, str]:
    """Everything the run wrote, at its end and while it ran: place -> text."""
    cells = [
        new_markdown_cell("# Show"),
        new_code_cell("from etl.notebook import Secret, check, record, secret, stop"),
        new_code_cell('token: Secret = "CANARY_PLAIN"  # of the source', metadata={"tags": ["parameters"]}),
        *(
            new_code_cell(f"value = secret({name})\n{code}")
            for name in ("token", "'CANARY_ODD'")
            for code in SHOWN.values()
        ),
        new_code_cell(f"value = secret(token)\n{ENDINGS[ending]}"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    request = RunRequest(
        stage="toy",
        run_id=run_id,
        root=str(folder / "root"),
        notebook=new_notebook(cells=cells, metadata=kernel),
        parameters={"token": "CANARY_PLAIN"},
        origins={"token": "params/toy.yml:4"},
        scheduled_for=AT,
        deadline_s=120,
        secrets=list(values),
    )
    texts: dict[str, str] = {}
    with _everything_logged() as lines, _watching([folder / "root", folder / "spool"], texts):
        record = execute(request)
    assert record.state == ending, (record.state, record.reason)
    texts |= _texts_of([folder / "root", folder / "spool"])
    texts["the log"] = "\n".join(lines)
    texts["the record"] = repr(record)  # what Prefect's states and the terminal are made of
    return texts | {f"row {i}": json.dumps(row, default=str) for i, row in enumerate(_rows(folder / "root"))}


@contextlib.contextmanager
def _everything_logged():
    import logging

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    lines: list[str] = []
    keep, root = Keep(), logging.getLogger()
    level, _ = root.level, root.setLevel(logging.DEBUG)
    root.addHandler(keep)
    try:
        yield lines
    finally:
        root.removeHandler(keep)
        root.setLevel(level)


@contextlib.contextmanager
def _watching(folders: list[Path], texts: dict[str, str]):
    """Keep what files hold that are gone later."""
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            for place, text in _texts_of(folders).items():
                if len(text) >= len(texts.get(f"{place}, before", "")):
                    texts[f"{place}, before"] = text

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _texts_of(folders: list[Path]) -> dict[str, str]:
    texts = {}
    walked = (Path(above) / name for folder in folders for above, _, names in os.walk(folder) for name in names)
    for path in walked:  # os.walk passes over a folder that is gone, where rglob raises
        with contextlib.suppress(OSError):
            if path.is_file():
                texts[str(path)] = path.read_bytes().decode("latin-1")
    return texts


def _rows(root: Path) -> list[dict]:
    """Of all Delta tables there: Parquet is compressed, so no grep sees into it."""
    import polars as pl

    return [row for log in root.rglob("_delta_log") for row in pl.read_delta(str(log.parent)).to_dicts()]


def holds(text: str, needle: str) -> bool:
    """Whether `text` holds it as it is, or in an encoding. Works by decoding, unlike what is tested."""
    raw = needle.encode()
    if needle in text or needle in unquote_plus(text) or needle in html.unescape(text):
        return True
    if raw.hex() in text.lower():
        return True
    for word in re.findall(r"[A-Za-z0-9+/_-]{8,}", text.replace("\\n", "")):
        word = word.replace("-", "+").replace("_", "/")
        for start in range(4):
            part = word[start:]
            if raw[1:-1] in base64.b64decode(part[: len(part) // 4 * 4]):
                return True
    return False


def _around(text: str, needle: str) -> str:
    """What stands around a hit; the whole, when it is encoded."""
    at = text.find(needle)
    return text[max(0, at - 80) : at + 80] if at >= 0 else "encoded"


# --- YAML that is wrong ---


def yamls(n: int, seed: int) -> str:
    """`n` wrong values are refused with their file and line, `n` right ones are taken, each in under 2 s."""
    rng, slowest = random.Random(seed), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for text in rng.sample(sorted(BAD_VALUES), n):
            began = time.monotonic()
            try:
                params.load(_project(Path(folder), CELL, f"{STAGE}  {text}\n"))
            except params.ParamsError as error:
                assert any(BAD_VALUES[text] in str(problem) for problem in error.problems), (text, str(error))
                assert all(p.path == "params/preprocess.yml" and p.line >= 4 for p in error.problems), str(error)
            else:
                raise AssertionError(f"accepted: {text}")
            slowest = max(slowest, time.monotonic() - began)
        for text, values in rng.sample(GOOD_VALUES, n):
            began = time.monotonic()
            stage = params.load(_project(Path(folder), CELL, f"{STAGE}  {text}\n")).stages["preprocess"]
            assert {name: stage.values[name] for name in values} == values, text
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 2, f"{slowest:.2f} s"
    return f"{n} of {n} wrong refused, {n} of {n} right taken, the slowest in {slowest * 1000:.0f} ms"


def _project(folder: Path, cell: str, stage: str) -> Path:
    for path, text in {
        "notebooks/preprocess.ipynb": parameters_notebook(cell),
        "params/preprocess.yml": stage,
        "params/env/local.yml": LOCAL,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


# --- parameters that would be code ---

# Python that leaves MARK when it runs
CODE = [
    "__import__('pathlib').Path('MARK').touch()",
    "open('MARK', 'w').close()",
    "__import__('os').system('touch MARK')",
    "exec(\"open('MARK', 'w')\")",
]
AROUND_VALUES = [  # how a value could leave the literal that it stands in
    "{}", "'\n{}\n'", '"\n{}\n"', "'; {}; '", '"; {}; "', "' + str({}) + '", '" + str({}) + "', "'''\n{}\n'''",
    '"""\n{}\n"""', "\\'; {}; \\'", "\\\\'; {} #", "\\", "\r{}\r", "\x0b{}\x0c", "\u2028{}\u2029", "\x85{}\n",
    "\x00{}", "\\N{{BULLET}}' + {}", "{{{{{}}}}}", "${{{}}}", "`{}`", "!{}", "%%python\n{}", "%run {}", "!touch MARK",
    "$(touch MARK)", "#\n{}", "\U0001f422'; {}; '", "f'{{{}}}'", "</script><script>{}</script>", "{{% raw %}}{}",
    "!!python/object/apply:{}",
]  # fmt: skip
AROUND_NAMES = [
    "x = {}", "x={};y", "{}", "x\n{}\ny", "x: int = {}\ny", "x, y = {}, 1", "(x := {})", "x[{}]", "x if {} else y",
    "x #\n{}", "*[{}]", "lambda: {}", "x\\\n{}", "del x;{}", "import os;{}", "!touch MARK", "%%bash\ntouch MARK",
    "x\r{}", "x\u2028{}", "x\x0c{}", "__builtins__", "__class__", "print", "os.environ", "None", "class", "ｔｅｘｔ",
    "", " ", "text ", "x;", "x=1",
]  # fmt: skip


def hostile(n: int, seed: int) -> str:
    """`n` names and values that would be code, half of each: names are refused, values arrive as they are."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "MARK"

        def attacks(around: list[str], count: int) -> list[str]:
            made = [text.replace("{}", code).replace("{{", "{").replace("}}", "}") for code in CODE for text in around]
            distinct = sorted({text.replace("MARK", str(mark)) for text in made})
            return rng.sample(distinct, count)

        names, values = attacks(AROUND_NAMES, n - n // 2), attacks(AROUND_VALUES, n // 2)
        _refuse(Path(folder), names)
        _pass_through(Path(folder), values)
        assert not mark.exists(), "executed"
    return f"{len(names)} names refused, {len(values)} values arrived as text; none executed"


def _refuse(folder: Path, names: list[str]) -> None:
    """By the YAML, by the command line, and by the last gate, where the cell is made."""
    for name in names:
        text = yaml.safe_dump(
            {"every": "1 minute", "deadline": "1 minute", "parameters": {name: 1}}, allow_unicode=False
        )
        project = _project(folder, 'text: str = ""  # any\n', text)
        for overrides in ((), (f"{name}=1",)):
            try:
                params.load(project, overrides=overrides)
            except params.ParamsError:
                continue
            raise AssertionError(f"taken from YAML: {name!r}")
        for declared in ({"text"}, {"text", name}):
            try:
                source = params.injected_cell_source({name: 1}, declared)
            except ValueError:
                continue
            assert name.isidentifier() and source == f"{name} = 1\n", f"injected: {name!r}"


def _pass_through(folder: Path, values: list[str]) -> None:
    """Through YAML, the injected cell and a kernel: as one parameter each, in a list, and as keys of a dict."""
    given = {f"p{i}": value for i, value in enumerate(values)}
    given |= {"many": values, "keyed": dict.fromkeys(values, values[0])}
    cell = "".join(f'p{i}: str = ""  # text\n' for i in range(len(values)))
    cell += "many: list[str] = []  # texts\nkeyed: dict[str, str] = {}  # texts by text\n"
    text = yaml.safe_dump({"every": "1 minute", "deadline": "1 minute", "parameters": given})
    project = _project(folder, cell, text)
    loaded = params.load(project)
    assert loaded.stages["preprocess"].values == given
    echo = ", ".join(f"{name}={name}" for name in given)
    code = f"from etl.notebook import record\nrecord({echo})"
    nb = nbformat.read(project / "notebooks/preprocess.ipynb", as_version=4)
    nb.cells.append(new_code_cell(code))
    request = RunRequest(
        stage="preprocess",
        run_id="preprocess-20260301T120010-000001",
        root=str(folder / "root"),
        notebook=nb,
        parameters=loaded.stages["preprocess"].values,
        origins={},
        scheduled_for=AT,
        deadline_s=120,
    )
    record = execute(request)
    assert record.state == "ok", record.reason
    assert record.metrics == given, "a value arrived changed"
