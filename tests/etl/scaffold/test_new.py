"""`new table`, `new question`, `new stage`, on a copy of the project: what they write works at once."""

import csv
import gzip
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from datetime import datetime, time, timedelta
from decimal import Decimal

import duckdb
import nbformat
import polars as pl
import pyarrow as pa
import pytest
from support import orchestrate
from typer.testing import CliRunner

from etl import params
from etl.lake.inference import infer
from etl.lake.table import BOOL, DAY, FLOAT, INT, TEXT, TIME, Column, Table, decimal, list_of, struct
from etl.questions.question import load
from etl.scaffold import questions, tables
from etl.scaffold.files import Refused
from etl.storage import PROJECT
from orchestrate import app as orchestrate_app
from pipeline import Lake, charts, queries
from pipeline.tables import TABLES

AT = datetime(2026, 1, 1, 3, 4, 5)
ROWS = [
    {
        "id": n,
        "user": {"id": n % 7, "name": None if n % 5 == 0 else f"user {n % 7}"},
        "kind": ("view", "click", "buy")[n % 3],
        "ok": n % 2 == 0,
        "day": f"2026-02-{1 + n % 28:02}",
        "at": f"2026-02-01T{n % 24:02}:00:00.000+00:00",
    }
    for n in range(1, 201)
]


def json_lines():
    """Prices as they are written: 12.50, and a list and a struct in a list."""
    lines = []
    for row in ROWS:
        more = {"tags": ["a"] * (row["id"] % 3), "items": [{"sku": "x", "n": row["id"]}]}
        lines.append(json.dumps(row | more)[:-1] + f', "price": {row["id"]}.50, "share": {row["id"] / 7}}}')
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("values", "alike"),
    [
        (["12,50", "1.234,5", "-3,0"], "a decimal with a comma"),
        (["1,234.50", "1,234,567"], "a number with marks between its thousands"),
        (["€ 12", "$1,000.50"], "an amount with a currency or percent"),
        (["12,5 %", "3 EUR"], "an amount with a currency or percent"),
        (["26.11.2026", "1.2.26"], "a day that is not written as 2026-11-26"),
        (["11/26/2026", "1/2/2026"], "a day that is not written as 2026-11-26"),
        (["26.11.2026 05:00", "26.11.2026, 17:00:30"], "a time that is not written as 2026-11-26T05:00:00Z"),
        (["12,50", "none"], None),
        (["1.2.3", "4.5.6"], None),
        (["A 12", "B 13"], None),
    ],
)
def test_a_text_that_looks_like_a_number_or_a_day_is_said_to_be(values, alike):
    rows = [f'{n};"{value}"\n' for n, value in enumerate(values)]
    inferred = infer("".join(["id;it\n", *rows]).encode(), "sales")
    assert inferred.table.types["it"] == TEXT
    assert inferred.notes.get("it") == (f"looks like {alike}: declared as text" if alike else None)
    as_json = "".join(json.dumps({"id": n, "it": value}) + "\n" for n, value in enumerate(values)).encode()
    assert infer(as_json, "sales").notes == inferred.notes
    assert alike is None or f'"it": TEXT,  # looks like {alike}' in tables.declaration(inferred)


def test_a_column_without_a_name_is_kept_and_no_column():
    inferred = infer(b",id,note,\n0,7,a,\n1,8,b,\n", "sales")
    assert ([*inferred.table.columns], inferred.table.key) == (["id", "note"], ("id",))
    assert inferred.left_out == {"column 1": "has no name in the header, as pandas' index has none"}
    assert inferred.fitting == inferred.rows == 2
    named = infer(b"id,column 2\n7,a\n8,b\n", "sales")
    assert [*named.table.columns] == ["id", "column_2"] and named.fitting == 2 and not named.left_out


def flat(row):
    return {"id": row["id"], "unit price": f"{row['id']}.50", "zip": "00501", "kind": row["kind"], "at": row["at"]}


def as_csv():
    text = io.StringIO()
    writer = csv.DictWriter(text, [*flat(ROWS[0])], delimiter=";")
    writer.writeheader()
    writer.writerows(map(flat, ROWS))
    return text.getvalue().encode()


def as_parquet():
    file = io.BytesIO()
    frame = pl.DataFrame(ROWS).with_columns(
        pl.col("at").str.to_datetime(time_zone="UTC"), pl.col("day").str.to_date(), price=pl.lit(Decimal("1.25"))
    )
    frame.write_parquet(file)
    return file.getvalue()


SAMPLES = {
    "lines": json_lines,
    "array": lambda: json.dumps(ROWS, indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
    "zipped": lambda: gzip.compress(as_csv()),
    "pressed": lambda: pa.compress(json_lines(), "zstd", asbytes=True),
}


def new(project, monkeypatch, *arguments):
    """The command in this process, on a copy of the project: (exit status, what it says, in one line)."""
    monkeypatch.setattr("etl.cli.new.PROJECT", project)
    done = CliRunner().invoke(orchestrate_app, ["new", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join((done.stdout + done.stderr).split())


def lint(project):
    """What ruff says of the copy, by the project's own rules."""
    shutil.copy(PROJECT / "pyproject.toml", project)
    told = ""
    for command in (("check", "--output-format=concise"), ("format", "--diff")):
        paths = [str(project / name) for name in ("pipeline", "notebooks")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *paths], capture_output=True, text=True
        )
        told += (done.stdout + done.stderr) * (done.returncode != 0)
    return told


def test_a_table_of_each_format_takes_all_its_sample(project, root, tmp_path, monkeypatch):
    """Declared from six samples, ingested by one run of preprocess, counted by another engine."""
    for name, sample in SAMPLES.items():
        (tmp_path / name).write_bytes(sample())
        status, said = new(project, monkeypatch, "table", name, "--from", tmp_path / name)
        assert status == 0 and "200 of the sample's 200 lines fit" in said, said
        assert "the key is id" in said and "the time is at" in said
        folder = tmp_path / "root" / "landing" / name
        folder.mkdir(parents=True)
        shutil.move(tmp_path / name, folder / "sample")
    assert lint(project) == ""
    done = orchestrate(project, "run", "preprocess", "-p", "quiet_s=0", "--root", root, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    (record,) = json.loads(done.stdout)
    assert record["state"] == "ok"
    asked = duckdb.connect()
    for name in SAMPLES:
        files = f"read_parquet('{root}/lake/{name}/**/*.parquet')"
        counted = asked.sql(f"select count(*), count(distinct id), sum(id), count(_rescued) from {files}").fetchone()
        assert counted == (200, 200, sum(row["id"] for row in ROWS), 0), name
    assert not (tmp_path / "root" / "refused").exists()
    (total,) = asked.sql(f"select sum(price) from read_parquet('{root}/lake/lines/**/*.parquet')").fetchone()
    assert total == sum(Decimal(row["id"]) + Decimal("0.50") for row in ROWS)
    assert asked.sql(f"select typeof(price) from read_parquet('{root}/lake/lines/**/*.parquet')").fetchone() == (
        "DECIMAL(15,2)",
    )

    status, said = new(project, monkeypatch, "question", "events_by_hour", "--table", "orders")
    assert status == 0, said
    path = project / "pipeline/queries/events_by_hour.py"
    path.write_text(path.read_text().replace("orders", "csv").replace("o_order_time", "at"))
    done = orchestrate(project, "run", "query", "-p", "questions=[events_by_hour]", "--root", root, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    answer = pl.read_parquet(f"{root}/results/events_by_hour/*.parquet")
    assert (answer.height, answer["rows"].sum()) == (24, 200)


def test_the_types_of_json():
    data = json_lines() + b'\n{"id": 201}'
    inferred = infer(data, "events")
    assert inferred.table.fields == {
        "id": Column(INT),
        "user_id": Column(INT, nullable=True, path="user.id"),
        "user_name": Column(TEXT, nullable=True, path="user.name"),
        "kind": Column(TEXT, nullable=True),
        "ok": Column(BOOL, nullable=True),
        "day": Column(DAY, nullable=True),
        "at": Column(TIME, nullable=True),
        "tags": Column(list_of(TEXT), nullable=True),
        "items": Column(list_of(struct({"sku": TEXT, "n": INT})), nullable=True),
        "price": Column(decimal(15, 2), nullable=True),
        "share": Column(FLOAT, nullable=True),
    }
    assert (inferred.table.key, inferred.table.time) == (("id",), "at")
    assert (inferred.rows, inferred.fitting) == (201, 201)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ("1, -2", INT),
        ("1, null", INT),
        ("9223372036854775808", decimal(38, 0)),
        ("1.50, 2.00", decimal(15, 2)),
        ("1.5, 2.25, 3", decimal(15, 2)),  # as Python writes round(x, 2)
        ("1.5, 2.5", FLOAT),
        ("0.1250, 3.0000", decimal(15, 4)),
        ("0.12345, 3.00001", FLOAT),
        ("1e3, 2.00", FLOAT),
        ('"12.50", "3.00"', decimal(15, 2)),
        ('"1.10", "1.9"', TEXT),
        ('"0012.50"', TEXT),
        ('"00501"', TEXT),
        ('"2026-02-28", "1999-01-01"', DAY),
        ('"2026-02-30"', TEXT),
        ('"2026-02-28T10:00:00Z"', TIME),
        ('"2026-02-28T10:00:00"', TEXT),
        ("null, null", TEXT),
        ("[1, 2], []", list_of(INT)),
        ("[[1.5]], null", list_of(list_of(FLOAT))),
        ('[{"a": 1}, {"b": "x"}]', list_of(struct({"a": INT, "b": TEXT}))),
        ("1, true", None),
        ('1, "x"', None),
        ('{"a": 1}, 5', None),
        ("{}, {}", None),
        ('[1, "x"]', None),
    ],
)
def test_the_type_of_values(values, dtype):
    """None: no column, so that its values are kept, and every row fits."""
    decoded = json.JSONDecoder()
    rows, at = [], 0
    while at < len(values):
        _, end = decoded.raw_decode(values, at)
        rows.append(f'{{"id": {len(rows)}, "value": {values[at:end]}}}')
        at = end + 2
    inferred = infer("\n".join(rows).encode(), "sample", key=("id",))
    assert inferred.table.types.get("value") == dtype
    assert (inferred.rows, inferred.fitting) == (len(rows), len(rows))
    assert ("value" in inferred.left_out) == (dtype is None)


def test_names_that_no_column_has():
    rows = [{"id": 1, "a b": 1, "A_B": 2, "x.y": 3, "x": {"y": 4}, "_rescued": 5, 'say "hi"': 6, "é": 7}]
    inferred = infer(json.dumps(rows[0]).encode(), "sample")
    assert [(name, column.keys(name)) for name, column in inferred.table.fields.items()] == [
        ("id", ("id",)),
        ("a_b", ("a b",)),
        ("A_B_2", ("A_B",)),
        ("x_y", ("x.y",)),
        ("x_y_2", ("x", "y")),
        ("rescued", ("_rescued",)),
        ("say__hi", ('say "hi"',)),
        ("é", ("é",)),
    ]
    assert inferred.fitting == 1
    names = {name: getattr(tables.declared, name) for name in ("Table", "Column", "INT")}
    assert eval(tables.declaration(inferred), names) == inferred.table


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pl.Series([1, 2**64 - 1], dtype=pl.UInt64), decimal(20, 0)),
        (pl.Series([1, None], dtype=pl.Int8), INT),
        (pl.Series([time(1), time(2)]), TEXT),
        (pl.Series([AT, AT]), TEXT),
        (pl.Series([AT, AT]).dt.replace_time_zone("Europe/Paris").dt.cast_time_unit("ns"), TIME),
        (pl.Series(["a", "b"], dtype=pl.Categorical), TEXT),
        (pl.Series([1.1, 2.2], dtype=pl.Float32), FLOAT),
        (pl.Series([Decimal("1.234"), None], dtype=pl.Decimal(38, 3)), decimal(38, 3)),
        (pl.Series([None, None], dtype=pl.Null), TEXT),
        (pl.Series([[{"a": 1.5, "d": AT.date()}], []]), list_of(struct({"a": FLOAT, "d": DAY}))),
        (pl.Series([b"a", b"b"]), None),
        (pl.Series([timedelta(1), timedelta(2)]), None),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_the_types_of_parquet(values, dtype):
    """None: no column, so that its values are kept, and every row fits."""
    file = io.BytesIO()
    pl.DataFrame({"id": [1, 2], "value": values}).write_parquet(file)
    inferred = infer(file.getvalue(), "sample")
    assert inferred.table.types.get("value") == dtype
    assert (inferred.rows, inferred.fitting) == (2, 2) and ("value" in inferred.left_out) == (dtype is None)


def test_what_no_path_leads_to_is_kept_all_the_same():
    inferred = infer(rb'{"id": 1, "a\\": {"b": 1}, "c": {"": 2, "d": 3}}', "sample")
    assert [*inferred.table.fields] == ["id", "c_d"] and [*inferred.left_out] == ["a\\.b", "c."]
    assert (inferred.rows, inferred.fitting) == (1, 1)


def test_what_does_not_fit_is_told():
    inferred = infer(b'{"id": 1}\n{"id": 2}\n{"id": \n\n{"id": NaN}\n', "sample")
    assert (inferred.rows, inferred.fitting) == (4, 2)
    assert [why.split(":")[0] for why in inferred.reasons] == ["line 3", "line 5"]


def test_the_key_is_an_id_or_two_columns_together():
    def key(name, *rows):
        return infer("\n".join(map(json.dumps, rows)).encode(), name).table.key

    assert key("users", {"at": 1, "user_id": 1}, {"at": 2, "user_id": 2}) == ("user_id",)
    assert key("visits", {"user_id": 1, "id": 8}, {"user_id": 2, "id": 9}) == ("id",)
    assert key("visits", {"user_id": 1, "name": "a"}, {"user_id": 1, "name": "b"}) == ("name",)
    pairs = [{"order_id": a, "line": b, "x": 0} for a in (1, 2) for b in (1, 2)]
    assert key("lines", *pairs) == ("order_id", "line")


def test_what_is_asked_wrongly_is_refused_in_a_sentence_and_writes_nothing(project, tmp_path, monkeypatch):
    sample = tmp_path / "sample"
    sample.write_text('{"id": 1, "at": "2026-01-01T00:00:00Z", "n": null}\n{"id": 2, "n": 2}\n')
    (tmp_path / "twice").write_text('{"a": 1}\n{"a": 1}\n')
    (tmp_path / "bz").write_bytes(b"BZh91AY")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    for arguments, why in (
        (("table", "orders", "--from", sample), "has a table 'orders' already"),
        (("table", "Orders", "--from", sample), "already"),
        (("table", "files"), "'files' is no name for a table"),
        (("table", "a b"), "'a b' is no name for a table"),
        (("table", "x", "--from", tmp_path / "none"), "No such file or directory"),
        (("table", "x", "--from", tmp_path / "bz"), "the sample is compressed with bzip2"),
        (("table", "x", "--from", sample, "--key", "idd"), "there is no column 'idd'; the sample has id, at, n"),
        (("table", "x", "--from", sample, "--key", "n"), "'n' is missing or null in a row"),
        (("table", "x", "--from", sample, "--time", "id"), "'id' is no time"),
        (("table", "x", "--from", sample, "--files", "/etc/*"), "it is a glob of paths below landing/"),
        (("table", "x", "--from", tmp_path / "twice"), "name the key with --key"),
        (("question", "q01"), "pipeline/queries/q01.py is there already"),
        (("question", "Q-1"), "'Q-1' is no name for a question"),
        (("question", "class"), "'class' is no name for a question"),
        (("question", "x", "--table", "order"), "there is no table 'order'; there are region, nation"),
        (("stage", "query"), "notebooks/query.ipynb is there already"),
        (("stage", "all"), "'all' is no name for a stage"),
        (("stage", "Look"), "'Look' is no name for a stage"),
        (("stage", "x", "--every", "5 parsecs"), "'5 parsecs' is no cadence"),
    ):
        status, said = new(project, monkeypatch, *arguments)
        assert status == 2 and why in said, (arguments, said)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_what_was_written_is_told_to_programs_too(project, tmp_path, monkeypatch):
    (tmp_path / "sample.csv").write_text("id;price;x\n1;12,50;\n2;3,00;\n")
    status, said = new(project, monkeypatch, "table", "sales", "--from", tmp_path / "sample.csv", "--json")
    told = json.loads(said)
    assert (status, told["table"], told["path"], told["rows"]) == (0, "sales", "pipeline/tables.py", 2)
    assert "price: looks like a decimal with a comma: declared as text" in told["guesses"]
    assert '"price": TEXT, # looks like a decimal with a comma: declared as text' in told["text"]
    status, said = new(project, monkeypatch, "question", "asked", "--table", "orders", "--json")
    assert json.loads(said) == {"question": "asked", "path": "pipeline/queries/asked.py", "table": "orders"}
    status, said = new(project, monkeypatch, "stage", "look", "--json")
    assert json.loads(said) == {"stage": "look", "paths": ["notebooks/look.ipynb", "params/look.yml"]}


def test_a_table_without_a_sample_and_what_is_given(project, tmp_path, monkeypatch):
    status, said = new(project, monkeypatch, "table", "bare", "--key", "a", "--key", "b", "--time", "at")
    assert status == 0 and 'key=("a", "b"),' in said and "# guessed: no sample" in said and "lines fit" not in said
    (tmp_path / "sample").write_text('{"a": {"id": 1}, "t": "2026-01-01T00:00:00Z"}')
    arguments = ("--from", tmp_path / "sample", "--key", "a.id", "--time", "t", "--files", "in/*.json.gz")
    status, said = new(project, monkeypatch, "table", "given", *arguments)
    assert status == 0 and 'key=("a_id",), time="t", files="in/*.json.gz",' in said and "guessed" not in said
    assert "put files into landing/in/*.json.gz" in said
    assert lint(project) == ""


@pytest.mark.parametrize(
    "source",
    [
        'from etl.lake.table import INT, Table\n\n_ALL = [Table("a", {"x": INT}, ("x",))]\n',
        "from etl.lake.table import Table\n\n_ALL: list[Table] = []\n",
        '"""Ours."""\n\n_ALL = []\n',
        'from etl.lake.table import INT, Table\n\n_ALL = [\n    Table("a", {"x": INT}, ("x",)),\n    # é\f\n]\nT = 1\n',
        'from etl.lake.table import INT, Table\n\n_ALL = [\n    Table("a", {"é": INT}, ("é",))  # no comma, yet\n]\n',
        'from etl.lake.table import INT, Table\n\nTABLES = {t.name: t for t in [Table("a", {"x": INT}, ("x",))]}\n',
    ],
)
def test_a_declaration_goes_where_the_tables_are(tmp_path, source):
    (tmp_path / "pipeline").mkdir()
    path = tmp_path / "pipeline" / "tables.py"
    path.write_text(source)
    tables.add(tmp_path, "b", sample=b'{"id": 1, "share": 0.123456}')
    names = tables.tables_of(path.read_text())
    assert names == [*tables.tables_of(source), "b"]
    scope = {}
    exec(path.read_text(), scope)
    (listed,) = [value for name, value in scope.items() if name in ("_ALL", "TABLES")]
    declared = {table.name: table for table in (listed.values() if isinstance(listed, dict) else listed)}
    assert declared["b"] == Table("b", {"id": INT, "share": FLOAT}, ("id",))
    tables.add(tmp_path, "c", sample=b'{"id": 1, "day": "2026-01-01"}')
    assert tables.tables_of(path.read_text()) == [*names, "c"]


def test_where_there_is_no_list_of_tables_nothing_is_written(tmp_path):
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(Refused, match="cannot be read"):
        tables.add(tmp_path, "b")
    (tmp_path / "pipeline" / "tables.py").write_text("TABLES = {}\n")
    with pytest.raises(Refused, match="has no list of Table"):
        tables.add(tmp_path, "b")
    (tmp_path / "pipeline" / "tables.py").write_text("TABLES = [\n")
    with pytest.raises(Refused, match="is not Python"):
        tables.add(tmp_path, "b")


@pytest.mark.parametrize("name", TABLES)
def test_a_question_of_each_table_answers_and_is_drawn(filled, tmp_path, name):
    """With and without a time; counted by another engine."""
    path = tmp_path / "asked.py"
    path.write_text(questions.text(TABLES[name]))
    spec = importlib.util.spec_from_file_location("asked", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["asked"] = module
    try:
        question = load("asked")
    finally:
        del sys.modules["asked"]
    snapshot = Lake(filled).snapshot()
    answer = queries.ask(question, snapshot, **{next(iter(reversed(question.parameters))): 10_000_000})
    files = ", ".join(f"'{file}'" for file in snapshot.files(name))
    (expected,) = duckdb.sql(f"select count(*) from read_parquet([{files}])").fetchone()
    assert answer["rows"].sum() == expected and question.figure in answer.columns
    assert charts.show(question.chart, answer.head(20)).png


def test_a_nullable_column_is_counted_where_it_says_something():
    table = Table("t", {"id": INT, "at": Column(TIME, nullable=True)}, ("id",), "at")
    assert '    buckets = buckets.filter(~nw.col("since").is_null())\n' in questions.text(table)


def test_a_stage_runs_at_once(project, filled, tmp_path, monkeypatch):
    shutil.copy(PROJECT / "README.md", project)
    for name, every in (("look_around", "2 minutes"), ("rarely", "7 days"), ("often", "1 second")):
        status, said = new(project, monkeypatch, "stage", name, "--every", every)
        assert status == 0 and f"wrote notebooks/{name}.ipynb wrote params/{name}.yml wrote README.md" in said
    stages = list(params.load(project).stages)
    assert (stages[0], stages[3], stages[-1]) == ("often", "look_around", "rarely")
    assert params.breaches(project, stages) == []
    assert "| `look_around` | every 2 minutes |" in (project / "README.md").read_text()
    assert lint(project) == ""
    for name in ("look_around", "rarely"):
        nb = nbformat.read(project / f"notebooks/{name}.ipynb", as_version=4)
        nbformat.validate(nb)
        assert nbformat.writes(nb) + "\n" == (project / f"notebooks/{name}.ipynb").read_text()
    for root, state in ((filled, "ok"), (str(tmp_path / "empty"), "noop")):
        done = orchestrate(project, "run", "look_around", "--root", root, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)[0]["state"] == state, done.stdout + done.stderr


def test_the_engine_of_another_project_may_have_no_readme(project, monkeypatch):
    status, said = new(project, monkeypatch, "stage", "greet")
    assert status == 0 and "README" not in said
    (project / "params/greet.yml").write_text("every: never\n")
    status, said = new(project, monkeypatch, "stage", "wave")
    assert status == 2 and "params/greet.yml" in said and not (project / "notebooks/wave.ipynb").exists()
