"""Secrets: where they are read, and every way of writing one that a report must not hold."""

import base64
import html
import json
import re
import time
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import nbformat
import pytest
from faults import toy, untrusted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from etl import notebook, secrets
from etl.runs import delivery, index
from etl.runs.engine import execute
from etl.secrets import Redactor
from etl.storage import Root

BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUE = "s3cr+et/<&'\"é \\ % =value"


def asks_for(*names):
    return SimpleNamespace(secrets=list(names), variables={}, origins={}, root="nowhere")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ETL_SECRETS_DIR", str(tmp_path))
    return tmp_path


def test_a_secret_is_a_variable_or_a_file(folder, monkeypatch):
    (folder / "API_KEY").write_text("from the file\n")
    assert notebook.secret("API_KEY") == "from the file"
    monkeypatch.setenv("API_KEY", "from the variable")
    assert notebook.secret("API_KEY") == "from the variable"
    assert secrets.missing(asks_for("API_KEY")) == []


@pytest.mark.parametrize("name", ["../API_KEY", "a", "", "API KEY", "sk-live-4711", "API_KEY\n"])
def test_what_is_no_name_is_refused_and_not_repeated(folder, name):
    with pytest.raises(ValueError, match="^the name of a secret is upper-case letters, digits and _$"):
        notebook.secret(name)


def test_missing_secrets_are_all_named(folder, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("PIN", "123")
    assert secrets.missing(asks_for("EMPTY", "NONE", "PIN")) == [
        "no secret EMPTY: set the variable EMPTY, or put the file EMPTY into ETL_SECRETS_DIR",
        "no secret NONE: set the variable NONE, or put the file NONE into ETL_SECRETS_DIR",
        "secret PIN has fewer than 4 characters, too few to be kept out of a report",
    ]
    with pytest.raises(LookupError, match="no secret NONE"):
        notebook.secret("NONE")


def test_variables_whose_names_tell_are_secrets_too(folder, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "of-the-service")
    monkeypatch.setenv("SHORT_TOKEN", "false")
    monkeypatch.setenv("TOKENS", "not-a-secret")
    (folder / "OTHER").write_text("of-the-other")
    redactor = secrets.for_request(asks_for("OTHER", "NONE"))
    text = "of-the-service of-the-other false not-a-secret"
    assert redactor.text(text) == "‹secret SERVICE_TOKEN› ‹secret OTHER› false not-a-secret"


WRITTEN = {
    "as it is": VALUE,
    "JSON": json.dumps([VALUE]),
    "JSON with its letters": json.dumps([VALUE], ensure_ascii=False),
    "repr": repr(VALUE),
    "repr of bytes": repr(VALUE.encode()),
    "JSON in base64": base64.b64encode(json.dumps({"k": VALUE}).encode()).decode(),
    "a picture's latin-1 in base64": base64.b64encode(b"Title\0" + VALUE.encode("latin-1")).decode(),
    "repr beside both quotes": repr([VALUE, "'" + VALUE + '"']),
    "HTML": html.escape(VALUE) + html.escape(VALUE, quote=False) + html.escape(VALUE).replace("&#x27;", "&#39;"),
    "XML": html.escape(VALUE).replace("&#x27;", "'") + html.escape(VALUE).replace("&#x27;", "&apos;"),
    "URL": f"https://user:{quote(VALUE, safe='')}@host/{quote(VALUE)}?{quote_plus(VALUE)}",
    "URL in lower case": quote(VALUE, safe="").replace("%3C", "%3c").replace("%2B", "%2b").lower(),
    "hexadecimal": VALUE.encode().hex() + " " + VALUE.encode().hex().upper(),
    "base64": base64.b64encode(VALUE.encode()).decode() + base64.urlsafe_b64encode(VALUE.encode()).decode(),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_every_way_of_writing_it_is_found(way):
    redacted = Redactor({"API_KEY": VALUE}).text(f"before {WRITTEN[way]} after")
    assert "‹secret API_KEY›" in redacted
    assert redacted.startswith("before ") and redacted.endswith(" after")
    assert not untrusted.holds(redacted, "value") and not untrusted.holds(redacted, "s3cr")


@BUSY_MACHINE
@given(st.binary(max_size=20), st.text(st.characters(codec="utf-8"), min_size=7, max_size=40), st.binary(max_size=20))
def test_inside_longer_base64_it_is_found_wherever_it_begins(before, value, after):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(before + value.encode() + after).decode()
        redacted = Redactor({"A": value}).text(text)
        assert "‹secret A›" in redacted
        # at most a character at each end is left, which also carries bits of a neighbour, and padding
        assert len(redacted) - len("‹secret A›") <= len(text) - len(value.encode()) * 8 // 6 + 2


def in_pieces(redactor, pieces):
    held = ""
    for piece in pieces:
        ready, held = redactor.split(held + piece)
        yield ready
    yield redactor.text(held)


@BUSY_MACHINE
@given(st.text(st.characters(codec="utf-8"), min_size=4), st.lists(st.text(st.characters(codec="utf-8"))), st.data())
def test_in_pieces_as_in_one(value, others, data):
    redactor = Redactor({"A": value})
    whole = value.join(others)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert "".join(in_pieces(redactor, pieces)) == redactor.text(whole)


def test_of_two_the_longer_counts_also_in_pieces():
    redactor = Redactor({"A": "abcd", "B": "abcdefgh", "C": "defg1234"})
    assert list(in_pieces(redactor, ["xabc", "d", "efgh abc", "d", "-"])) == [
        *("x", "", "‹secret B› ", "", "‹secret A›-", ""),
    ]
    assert "".join(in_pieces(redactor, ["abcd", "efg"])) == "‹secret A›efg"


def test_a_tree_keeps_its_shape():
    cell = new_code_cell(f"x = {VALUE!r}", outputs=[new_output("stream", text=f"1 {VALUE}\n")])
    nb = Redactor({"A": VALUE, "N": "4711471147"}).tree(new_notebook(cells=[cell], metadata={VALUE: {"n": [1, VALUE]}}))
    nbformat.validate(nb)
    assert nb.cells[0].outputs[0].text == "1 ‹secret A›\n"
    assert nb.metadata == {"‹secret A›": {"n": [1, "‹secret A›"]}}
    tree = Redactor({"A": VALUE, "N": "4711471147"}).tree(
        [b"\xff" + VALUE.encode(), (VALUE,), 4711471147, 1.5, None, True]
    )
    assert tree == [b"\xff" + "‹secret A›".encode(), ("‹secret A›",), "‹secret N›", 1.5, None, True]


WORDS = {  # secrets whose values are words that stand in every report
    "POSTGRES_PASSWORD": "postgres",
    "PROTOCOL": "idle",
    "MIME": "text/plain",
    "YEAR": "2026",
    **{
        f"SECRET_{word.upper()}": word
        for word in ("query", "code", "stream", "stdout", "state", "metrics", "cells", "outputs", "runner", "failed")
    },
    **{
        f"SECRET_{word.upper()}": word
        for word in ("name", "orders", "python3", "metadata", "checks", "papermill", "reports", "supplied", "killed")
    },
    "SECRET_TRUE": "True",
}
SAYS = f"""
from etl.notebook import check, record
from IPython.display import HTML, display
for word in {list(WORDS.values())!r}: print(word, end=' ')
display(HTML('<b>postgres</b>'), metadata={{'postgres': 'idle'}})
record(rows=1, said='by postgres', versions_read={{'orders': 2026, 'postgres': 1}}, postgres=2)
check('postgres', True, 'idle')
"""


def says(root, tmp_path, *cells, **more):
    """A run whose secrets are words of its own root, stage and report."""
    (root / "lake/orders/_delta_log").mkdir(parents=True)
    parameters = {"root": str(root), "user": "postgres"}
    origins = {"root": "supplied", "user": "params/query.yml:4"}
    run_id = "query-20260301T120010-00c0de"
    given = {"stage": "query", "run_id": run_id, "parameters": parameters, "origins": origins, "secrets": list(WORDS)}
    return toy.request(root, "# Ask", SAYS, *cells, **given, **more)


@pytest.fixture
def words(monkeypatch):
    for name, value in WORDS.items():
        monkeypatch.setenv(name, value)


def test_what_the_code_said_is_redacted_and_nothing_that_the_runner_says(words, tmp_path):
    root = tmp_path / "home" / "postgres" / "root"
    asked = says(root, tmp_path, "raise ValueError('no user postgres')")
    record = execute(asked)
    nb, run_json = toy.report(root, record)
    nbformat.validate(nb)
    for found in (vars(record), run_json, index.get(Root.at(root), asked.run_id)):
        kept = ["stage", "run_id", "root", "scheduled_for", "origins", "provenance", "deadline_s"]
        kept += ["state", "versions_read"]
        expected = {name: getattr(asked, name) for name in kept if hasattr(asked, name)}
        expected |= {"state": "failed", "versions_read": {"orders": 2026, "‹secret POSTGRES_PASSWORD›": 1}}
        assert {name: found[name] for name in kept} == expected
        assert found["report"] == f"reports/query/2026-03-01/{asked.run_id}"
        assert found["parameters"] == {"root": str(root), "user": "‹secret POSTGRES_PASSWORD›"}
        assert [cell["state"] for cell in found["cells"]] == ["ok", "ok", "failed"]
    assert record.reason == "ValueError: no user ‹secret POSTGRES_PASSWORD›"
    assert record.metrics["rows"] == 1 and record.checks[0]["ok"] is True
    said = json.dumps([record.metrics, record.checks, record.error, [cell.get("outputs") for cell in nb.cells]])
    assert "postgres" not in said and "idle" not in said
    assert nb.cells[1].source == f"root = {str(root)!r}\nuser = '‹secret POSTGRES_PASSWORD›'\n"
    assert nb.metadata.runner.state == "failed" and nb.metadata.kernelspec.name == "python3"


def test_the_report_of_a_killed_runner_is_where_the_run_was(words, tmp_path, spool):
    """Its journal is all that is left of it."""
    root = tmp_path / "home" / "postgres" / "root"
    asked = says(root, tmp_path, "import time\ntime.sleep(1000)")
    runner = toy.start(asked, spool)
    path = spool / asked.run_id / "journal.jsonl"
    toy.until(lambda: path.exists() and b'"index": 3' in path.read_bytes(), 120, "the last cell")
    runner.kill()
    runner.wait()
    assert delivery.reconcile() == [asked.run_id]
    [row] = index.newest(Root.at(root))
    assert (row["run_id"], row["state"], row["reason"]) == (asked.run_id, "killed", "the runner was killed in 'Ask'")
    assert "postgres" not in json.dumps([cell.get("outputs") for cell in toy.report(root, row)[0].cells])


def test_no_word_of_the_format_can_be_redacted():
    outputs = [
        new_output("stream", text="a"),
        new_output("display_data", data={"text/plain": "b", "application/json": {"c": [1]}}, metadata={"d": 1}),
        new_output("execute_result", data={"image/png": "YWFhYQ=="}, execution_count=4711),
        new_output("error", ename="E", evalue="e", traceback=["f"]),
    ]
    nb = new_notebook(cells=[new_code_cell("g", outputs=outputs, metadata={"tags": ["h"]}), new_markdown_cell("i")])
    nb.metadata["runner"] = {"state": "failed"}
    words = set(re.findall(r'"([^"]{4,})"', json.dumps(nb))) | {"4711", "text", "image", "plain"}
    for word in words - {"YWFhYQ=="}:
        redacted = Redactor({"A": word}).notebook(nb)
        nbformat.validate(redacted)
        assert redacted == nb, word


def test_the_state_of_a_widget_is_redacted_and_stays_one():
    state = {"_model_name": "HTMLModel", "_view_module": "@jupyter-widgets/controls", "value": "by HTML and IPY_MODEL_"}
    state |= {"children": ["IPY_MODEL_" + "0a" * 16], "description": "HTMLModel", "a key": {"HTML": 1}}
    redactor = Redactor({"A": "HTML", "B": "IPY_MODEL_", "C": "children", "D": "update", "E": "a key", "F": "0a0a"})
    redacted = redactor.message("comm_msg", {"comm_id": "0a" * 16, "data": {"method": "update", "state": state}})
    assert redacted["data"]["method"] == "update"
    assert redacted["data"]["state"] == {
        **{name: state[name] for name in ("_model_name", "_view_module", "children")},
        **{"value": "by ‹secret A› and ‹secret B›", "description": "‹secret A›Model"},
        "‹secret E›": {"‹secret A›": 1},
    }


def test_what_is_replaced_is_not_replaced_again():
    redactor = Redactor({"SECRET_A": "secret", "B": "SECRET_A"})
    once = redactor.text("a secret and SECRET_A")
    assert once == redactor.text(once) == "a ‹secret SECRET_A› and ‹secret B›"


def test_lines_of_a_key_are_found_one_by_one():
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END KEY-----"
    redacted = Redactor({"K": key}).text(f"<td>{key.splitlines()[1]}</td> -----BEGIN KEY-----")
    assert redacted == "<td>‹secret K›</td> -----BEGIN KEY-----"


def test_long_base64_is_found_in_lines_as_the_command_writes_it():
    token = "".join(f"part{n:03d}" for n in range(30))
    shown = Redactor({"TOKEN": token}).text(base64.encodebytes(token.encode() + b"\n").decode())
    assert [line for line in shown.splitlines() if "secret TOKEN" not in line] == []
    assert len(shown) < 150, shown


def test_nothing_to_replace_costs_nothing():
    redactor, tree = Redactor({}), {"a": ["b"]}
    assert not redactor and redactor.tree(tree) is tree and redactor.text("x") == "x"
    assert not Redactor({"A": "abc"})


def test_ten_megabytes_take_well_under_a_second():
    redactor = Redactor({f"K{i}": f"{i}-a-token-of-usual-length" for i in range(10)})
    text = "a line of output, as usual\n" * 400_000 + "9-a-token-of-usual-length"
    began = time.perf_counter()
    assert redactor.text(text).endswith("‹secret K9›")
    assert time.perf_counter() - began < 5  # 0.1 s on an idle machine


def test_a_shown_secret_is_in_nothing_written():
    assert untrusted.canary(2, seed=1)
