"""The page people read: complete, small, and nothing in it can run."""

import base64
import json
import logging
import random
from html.parser import HTMLParser

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from etl.reports import cards
from etl.reports import page as report_page
from etl.runs.engine import RunRecord
from etl.storage import Root

PIXELS = base64.b64encode(random.Random(7).randbytes(30_000)).decode()  # as incompressible as a chart


def record(**changes):
    base = {
        "stage": "toy",
        "run_id": "toy-20261103T100000-abcdef",
        "root": "/outputs",
        "scheduled_for": "2026-11-03T10:00:00+00:00",
        "attempt": 1,
        "parameters": {"rows": 3, "segments": ["BUILDING"]},
        "origins": {"rows": "params/toy.yml:4", "segments": "notebook default"},
        "report": "reports/toy/2026-11-03/toy-20261103T100000-abcdef",
        "host": "here",
        "started_at": "2026-11-03T10:00:01+00:00",
        "ended_at": "2026-11-03T10:00:03+00:00",
        "seconds": 2.0,
    }
    return RunRecord(**base | changes)


def executed(*cells, state="ok"):
    for cell in cells:
        cell.metadata = {"tags": [], **cell.metadata, "runner": {"state": state, "seconds": 0.2}}
    return new_notebook(cells=list(cells))


def shows(**data):
    """A code cell with one rich output; html='...' is text/html."""
    types = {"html": "text/html", "png": "image/png", "svg": "image/svg+xml", "js": "application/javascript"}
    types |= {"markdown": "text/markdown", "plain": "text/plain", "latex": "text/latex"}
    metadata = data.pop("metadata", {})
    bundle = {types[kind]: value for kind, value in data.items()}
    return new_code_cell("x", outputs=[new_output("display_data", data=bundle, metadata=metadata)])


class Page(HTMLParser):
    """Elements as (tag, attributes), and the text outside <style>."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._in_style = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        self.text += "" if self._in_style else data


XSS = "<script>alert(1)</script>"
IMG = "<img src=x onerror=alert(1)>"
PAYLOADS = {
    "script": shows(html=XSS),
    "event": shows(html=IMG),
    "svg": shows(html="<svg onload=alert(1)><script>alert(1)</script></svg>"),
    "svg output": shows(svg="<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
    "link": shows(html="<a href='javascript:alert(1)'>a</a><a href='java\tscript:alert(1)'>b</a>"),
    "data link": shows(html="<a href='data:text/html,<script>alert(1)</script>'>a</a>"),
    "frame": shows(html="<iframe srcdoc='<script>alert(1)</script>'></iframe>"),
    "isolated": shows(html=XSS, metadata={"text/html": {"isolated": True}}),
    "object": shows(html="<object data='javascript:alert(1)'></object><embed src='javascript:alert(1)'>"),
    "form": shows(
        html="<form action='javascript:alert(1)'><button formaction='javascript:alert(1)'>go</button></form>"
    ),
    "style": shows(html="<div style='background:url(http://evil/x)'>a</div><style>@import 'http://evil/x'</style>"),
    "style that fetches": shows(html="<td style='cursor:url(http://evil/x)'>a</td><p style='cursor:url(//evil)'>b</p>"),
    "parsed twice": shows(html="<noscript><p title='</noscript><img src=x onerror=alert(1)>'>"),
    "other namespaces": shows(html="<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>"),
    "base": shows(html="<base href='http://evil/'><meta http-equiv=refresh content='0;url=http://evil/'>"),
    "picture elsewhere": shows(html="<img src='http://evil/x.png'><img srcset='http://evil/x.png'>"),
    "broken tag": shows(html='<<script>script>alert(1)</script><img src="x" "onerror=alert(1)">'),
    "javascript": shows(js="alert(1)"),
    "markdown output": shows(markdown=f"# hi\n{XSS}\n[a](javascript:alert(1))"),
    "latex": shows(latex=XSS),
    "plain": shows(plain=XSS + IMG),
    "png text": shows(png='AAAA" onerror="alert(1)" x="'),
    "png width": shows(png="AAAA", metadata={"image/png": {"width": "1 onload=alert(1)", "alt": XSS}}),
    "stream": new_code_cell("x", outputs=[new_output("stream", text=XSS + "\x1b[31m" + IMG)]),
    "error": new_code_cell("x", outputs=[new_output("error", ename="E", evalue=XSS, traceback=[XSS + IMG])]),
    "code": new_code_cell(f"x = '''{XSS}'''\n{IMG}"),
    "first line": new_code_cell(XSS),
    "markdown": new_markdown_cell(f"{XSS}\n\n{IMG}\n\n[a](javascript:alert(1)) <a href=javascript:alert(1)>b</a>"),
    "tag": new_code_cell("x", metadata={"tags": ['"><script>alert(1)</script>']}),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_a_report_can_run_or_ask_the_network(payload):
    elements = Page(report_page.html(record(), executed(PAYLOADS[payload]))).elements
    assert_harmless(elements)


def test_nothing_in_the_head_of_a_report_can_run():
    evil = record(
        stage=XSS,
        parameters={XSS: XSS, "b": [IMG]},
        origins={XSS: IMG},
        metrics={XSS: XSS},
        state="noop",
        reason=XSS,
        host=XSS,
        versions_read={XSS: XSS},
    )
    assert_harmless(Page(report_page.html(evil, executed(new_code_cell("x")))).elements)


def assert_harmless(elements):
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [a for tag, a in elements if tag == "meta" and "http-equiv" in a] == [policy]
    assert [tag for tag, _ in elements].count("style") == 1  # our own
    forbidden = {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "button",
        "input",
        "link",
        "base",
        "svg",
        "math",
    }
    assert not forbidden & {tag for tag, _ in elements}
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "srcset")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "https://").startswith(("https://", "http://", "#", "mailto:"))
        assert "url(" not in attributes.get("style", "")


def test_a_report_shows_what_the_run_was_and_what_it_gave():
    frame = "<table class='dataframe'><thead><tr><th>day</th></tr></thead><tr><td>7</td></tr></table>"
    nb = executed(
        new_markdown_cell("# Revenue\n\nBy *day*, see [this](https://example.org)."),
        shows(html=f"<style>td {{ color: red }}</style><svg><path d='M0'/></svg>{frame}", plain="a table"),
        shows(png=PIXELS, plain="<Figure>", html="<script>an interactive twin</script>"),
        new_code_cell("1 / 0", outputs=[new_output("error", ename="E", evalue="e", traceback=["\x1b[31mE\x1b[0m: e"])]),
    )
    nb.cells.append(executed(new_code_cell("after"), state="never_ran").cells[0])
    metrics = {"rows_written": 1234567, "as_of": "2026-11-03T10:00:00.5+01:00", "given": {"landing/x.json": {"k": "v"}}}
    html = report_page.html(record(metrics=metrics, versions_written={"orders": 12}), nb)
    page = Page(html)
    assert len(html.encode()) < 100_000
    tags = [tag for tag, _ in page.elements]
    assert {"h1", "em", "a", "thead", "th", "td", "details", "summary"} <= set(tags)
    for text in (
        "Revenue",
        "toy",
        "ok",
        "params/toy.yml:4",
        '["BUILDING"]',
        "1,234,567",
        "2026-11-03 09:00:00 UTC",
        "landing/x.json",
        "orders@12",
        "never ran",
    ):
        assert text in page.text
    for text in ("color: red", "path", "a table", "interactive", "'k'"):  # neither run nor shown as text
        assert text not in page.text
    assert [a["src"][22:] for tag, a in page.elements if tag == "img"] == [PIXELS]
    assert "\x1b" not in html and ("span", {"class": "ansi-red-fg"}) in page.elements
    assert "code never_ran" in [a.get("class") for _, a in page.elements]


def test_a_bad_run_shows_its_card_first():
    error = {
        "ename": "DeadKernel",
        "evalue": "",
        "cell": 1,
        "heading": "Read",
        "traceback_tail": "a\n```\nlast line",
    }
    bad = record(state="killed", reason="the kernel was killed by SIGKILL in 'Read'", error=error)
    first = cards.card(bad)
    assert (
        first.source.startswith("#### toy: killed, in **Read**, [cell 1](#cell-1)\n")
        and len(first.source.splitlines()) <= 12
    )
    page = Page(report_page.html(bad, new_notebook(cells=[first, *executed(new_code_cell("x")).cells])))
    assert page.text.index("last line") < page.text.index("\nx")
    assert ("section", {"class": "text killed card"}) in page.elements
    assert [a["class"] for _, a in page.elements if a.get("id") == "cell-1"] == ["code ok"]  # where the card points
    assert ("details", {"class": "parameters"}) in page.elements  # closed: nothing long above the card


def test_a_page_that_cannot_be_made_loses_neither_notebook_nor_record(tmp_path, caplog):
    root, nb = Root.at(tmp_path), new_notebook(cells=[new_code_cell("no metadata of ours")])
    with caplog.at_level(logging.ERROR):
        report_page.write(root, record(), nb)
    assert root.list(record().report) == ["report.ipynb", "run.json"]
    assert json.loads(root.read(f"{record().report}/run.json"))["parameters"]["rows"] == 3
    assert "has no report.html" in caplog.text


def test_text_that_is_no_unicode_is_no_reason_to_lose_a_report(tmp_path):
    root = Root.at(tmp_path)
    report_page.write(root, record(), executed(new_code_cell("x", outputs=[new_output("stream", text="\ud800 torn")])))
    assert root.list(record().report) == ["report.html", "report.ipynb", "run.json"]
