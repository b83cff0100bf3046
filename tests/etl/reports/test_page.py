"""The page people read: complete, small, and nothing in it can run."""

import base64
import html
import json
import logging
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from etl.notebook import CHECK_MIME
from etl.reports import cards, head
from etl.reports import page as report_page
from etl.reports.head import Before
from etl.runs.record import RunRecord
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
        assert attributes.get("href", "https://").startswith(("https://", "http://", "#", "mailto:", "report.ipynb"))
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


def with_head(before=report_page.NOTHING, cells=(), **changes):
    """The page of a run of a stage whose parameters say what they mean."""
    source = "root: str = 'x'  # where all is\nrows: int = 1  # at most\nsegments: list[str] = []  # of the market\n"
    declared = new_code_cell(f"{source}key: Secret = 'A'  # of the service", metadata={"tags": ["parameters"]})
    given = {"root": "/outputs", "segments": ["BUILDING"], "rows": 3, "key": "TOKEN"}
    changes = {"parameters": given, "deadline_s": 300.0, "seconds": 37.2} | changes
    return report_page.html(record(**changes), executed(declared, *cells), before)


def test_the_head_says_what_came_of_it_and_what_is_new():
    last_ok = {
        "run_id": "toy-0",
        "report": "reports/toy/2026-11-02/toy-0",
        "parameters": {"segments": ["BUILDING"], "rows": 2, "key": "hunter2"},
        "metrics": {"rows": 1000},
    }
    previous = {"run_id": "toy-1", "report": "reports/toy/2026-11-03/toy-1"}
    checks = [{"name": "a", "ok": True, "detail": "1"}, {"name": "b", "ok": False, "detail": "2 of <3>"}]
    shown = new_code_cell("check(...)", outputs=[new_output("display_data", data={CHECK_MIME: {"checks": checks}})])
    made = with_head(
        Before(last_ok, previous, usual_s=8.04),
        cells=[shown],
        state="check_failed",
        reason="1 check failed: b (2 of <3>)",
        checks=checks,
        metrics={"rows": 1234},
        scheduled_for="2026-11-03T09:59:50+00:00",
        versions_read={"orders": 12},
        receipt={"wall_s": 37.2, "cpu_s": 3.5},
    )
    page, head = Page(made), Page(made.partition("</header>")[0])
    links = [(a["href"]) for tag, a in head.elements if tag == "a" and "class" not in a]
    assert links == ["../../2026-11-03/toy-1/report.html", "../../2026-11-02/toy-0/report.html", "report.ipynb"]
    assert "\n1 check failed: b (2 of <3>) (37 s, usually 8.0 s)." in head.text
    for text in ("Waited11 s", "Ran37 s, usually 8.0 s", "Deadline5 min", "Readorders@12", "Cost3.5 s of CPU"):
        assert text in head.text.replace("\n", "")
    assert "1,234was 1,000, +23.4 %" in head.text
    names = re.findall(r"<tr[^>]*><td>(rows|segments|key)</td>", made)
    assert names == ["rows", "key", "segments"]  # what has changed comes first
    assert "was 2" in head.text and "at most" in head.text and "hunter2" not in made
    assert head.text.index("Run, root and host") < head.text.index("/outputs")
    assert [tag for tag, a in page.elements if a.get("class") == "check"] == ["table"]  # one for all cells
    assert head.text.index("FAILED") < head.text.index("passed")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metrics": {"rows": 1234}, "versions_written": {"orders": 1}}, "Done: 1,234 rows, 1 table written (2.0 s)."),
        ({"metrics": {"rows": 1}}, "Done: 1 row (2.0 s)."),
        ({"metrics": {"rows": "many"}}, "Done (2.0 s)."),
        ({"state": "failed", "reason": "no room " * 200}, f"It failed: {'no room ' * 37}no… (2.0 s)."),
    ],
)
def test_what_came_of_it_says_how_many_rows(changes, said):
    assert head.of(record(**changes), new_notebook(), report_page.NOTHING).outcome == said


def test_a_figure_that_is_not_known_is_told_only_where_it_was_known():
    before = Before({"run_id": "toy-0", "report": "reports/toy/2026-11-02/toy-0", "metrics": {"gap": 0.5}})
    figures = head.of(record(metrics={"gap": None, "error": None, "rows": 1}), new_notebook(), before).figures
    assert [name for name, *_ in figures] == ["gap", "rows"]


def test_a_cost_of_nothing_is_not_told():
    receipt = {"cpu_s": 0.6, "bytes_read": 4e5, "bytes_written": 4e4, "rows_per_s": 0.0, "dollars": None}
    assert [*head.costs(receipt)] == ["0.6 s of CPU", "0.4 MB read"]


def test_a_failed_check_is_told_beside_its_cell_once_and_a_traceback_has_no_rule_on_top():
    checks = [{"name": "few", "ok": False, "detail": "3"}]
    told = new_output("display_data", data={CHECK_MIME: {"checks": checks}})
    again = new_output("error", ename="CheckFailed", evalue="", traceback=["CheckFailed: 1 check failed: few (3)"])
    own = new_output("error", ename="CheckFailed", evalue="", traceback=["\x1b[31m" + "-" * 75 + "\x1b[39m", "mine: 1"])
    page = Page(report_page.html(record(), executed(new_code_cell("x", outputs=[told, again, own])))).text
    assert "FAILED: few" in page and "checks failed" not in page and "mine: 1" in page and "-----" not in page


def test_a_page_without_code_has_what_is_said_and_shown():
    traceback = new_output("error", ename="E", evalue="e", traceback=["Traceback: secret_module.py"])
    cells = [
        shows(plain="the answer"),
        new_code_cell("y = secret_code()", outputs=[traceback]),
        new_markdown_cell("# Why"),
    ]
    whole = with_head(cells=cells).encode()
    page = Page(report_page.without_code(whole).decode())
    assert "secret_code" in whole.decode() and "secret_module" in whole.decode()
    for text in ("the answer", "Why", "Parameters", "at most"):
        assert text in page.text
    for text in ("secret_code", "secret_module", "with code", "rows: int"):
        assert text not in page.text
    opened = [tag for tag, _ in page.elements]
    assert opened.count("details") == 2  # of the head


def test_many_headings_are_listed_and_few_are_not():
    many = [new_markdown_cell(f"## Part *{n}* <b title='<img src=x onerror=alert(1)>'>& more</b>") for n in range(6)]
    page = Page(with_head(cells=many))
    assert [a["href"] for _, a in page.elements if a.get("href", "").startswith("#part-")] == [
        f"#part-{n}" for n in range(1, 7)
    ]
    assert [a["id"] for tag, a in page.elements if tag == "h2" and "id" in a] == [f"part-{n}" for n in range(1, 7)]
    assert "Part 5 & more" in page.text
    assert_harmless(page.elements)
    assert "Contents" not in Page(with_head(cells=many[:5])).text


def tokens(style, dark):
    """The colours of the style sheet, by name."""
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)[: 2 if dark else 1]
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{3,6});", " ".join(blocks)))


def luminance(colour):
    """Of WCAG 2: 0 to 1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read_on_every_ground(dark):
    style = (Path(report_page.__file__).parent / "templates/report/style.css").read_text()
    of, grounds = tokens(style, dark), ("--page", "--paper", "--soft", "--alarm")
    texts = of.keys() - {*grounds, "--line", "--on-badge"}
    pairs = [(text, ground) for text in texts for ground in grounds]
    pairs += [("--on-badge", badge) for badge in ("--good", "--idle", "--warn", "--bad")]
    weak = {pair: round(contrast(of[pair[0]], of[pair[1]]), 2) for pair in pairs}
    assert {pair: ratio for pair, ratio in weak.items() if ratio < 4.5} == {}
    used = re.findall(r"[ ;{](?:color|background): ([^;}]+)", style)
    assert {colour for colour in used if not re.fullmatch(r"var\(--[\w-]+\)|none|#5b6673", colour)} == set()
    assert "opacity" not in style


@pytest.mark.parametrize("said", ["use `x`", "a ``b`` c", "```\n````", "`"])
def test_backticks_in_a_message_do_not_end_its_block(said):
    source = cards.card(record(state="failed", reason=said)).source
    page = Page(report_page.html(record(state="failed"), executed(new_markdown_cell(source))))
    [block] = re.findall(r"(?s)<pre[^>]*>(.*?)</pre>", report_page.html(record(), executed(new_markdown_cell(source))))
    assert said in html.unescape(re.sub("<[^>]*>", "", block)) and "text\n" not in page.text


def limited(before: dict, after: dict, **last):
    """The card of a run with `after`, when the stage's last ok run had `before`."""
    last_ok = {"run_id": "toy-0", "report": "reports/toy/2026-11-03/toy-0", "seconds": 7.6, **before, **last}
    return cards.card(record(**{"parameters": {}} | after), last_ok).source


def test_a_shorter_deadline_is_named_and_no_parameter_is_blamed_for_it():
    origins = {"max_trees": "params/toy.yml:4"}
    before = {"deadline_s": 600.0, "parameters": {"max_trees": 50}}
    after = {"state": "timed_out", "deadline_s": 5.0, "parameters": {"max_trees": 500}, "origins": origins}
    source = limited(before, after)
    assert source.endswith("report.html) in 7.6 s; since then deadline 600 s → 5 s.") and "max_trees" not in source
    # the last run took nothing near the new one: both may be why
    assert limited(before, after, seconds=0.1).endswith("deadline 600 s → 5 s, `max_trees` 50 → 500.")
    assert limited(before, after | {"deadline_s": 600.0}).endswith("since then `max_trees` 50 → 500.")
    assert limited(before, after | {"state": "failed"}).endswith("since then `max_trees` 50 → 500.")
    assert limited({"parameters": {"max_trees": 500}}, after).endswith("since then nothing has changed.")  # of before


def test_a_lower_memory_limit_is_named_where_it_was_met():
    before = {"memory_mb": None, "receipt": {"peak_memory_mb": 700}}
    after = {"state": "killed", "memory_mb": 500, "receipt": {"peak_memory_mb": 510}}
    assert limited(before, after).endswith("since then memory limit none → 500 MB.")
    assert limited(before, after | {"receipt": {"peak_memory_mb": 90}}).endswith("since then nothing has changed.")


def test_another_release_is_named():
    before = {"release": "3f2a91c0d4e5", "provenance": {"code_sha256": "1" * 64}}
    assert limited(before, {"state": "failed", "release": "3f2a91c0d4e5"}).endswith("nothing has changed.")
    assert limited(before, {"state": "failed", "release": "81bc"}).endswith("release 3f2a91c0d4e5 → 81bc.")
    assert limited(before, {"state": "failed"}).endswith("release 3f2a91c0d4e5 → working tree.")


def test_code_that_no_commit_holds_is_a_change_and_a_commit_without_any_is_none():
    before = {"provenance": {"git_commit": "a" * 40, "code_sha256": "1" * 64}}
    dirty = {"git_commit": "a" * 40, "code_sha256": "2" * 64}
    assert limited(before, {"state": "failed", "provenance": dirty}).endswith("code 11111111 → 22222222.")
    docs = {"git_commit": "b" * 40, "code_sha256": "1" * 64}
    assert limited(before, {"state": "failed", "provenance": docs}).endswith("nothing has changed.")
    assert limited(before, {"state": "failed", "provenance": docs | dirty}).endswith("code 11111111 → 22222222.")
    both = {"git_commit": "b" * 40, "code_sha256": "2" * 64}
    assert limited(before, {"state": "failed", "provenance": both}).endswith("code aaaaaaaa → bbbbbbbb.")


def test_a_page_that_cannot_be_made_loses_neither_notebook_nor_record(tmp_path, caplog):
    root, nb = Root.at(tmp_path), new_notebook(cells=[new_code_cell("no metadata of ours")])
    with caplog.at_level(logging.ERROR):
        report_page.write(root, record(), nb)
    assert root.names(record().report) == ["report.ipynb", "run.json"]
    assert json.loads(root.read(f"{record().report}/run.json"))["parameters"]["rows"] == 3
    assert "has no report.html" in caplog.text


def test_text_that_is_no_unicode_is_no_reason_to_lose_a_report(tmp_path):
    root = Root.at(tmp_path)
    report_page.write(root, record(), executed(new_code_cell("x", outputs=[new_output("stream", text="\ud800 torn")])))
    assert root.names(record().report) == ["report.html", "report.ipynb", "run.json"]
