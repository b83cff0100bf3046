"""What people read about a run: the executed notebook, a page made of it, and its record as JSON."""

import functools
import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from etl.notebook import CHECK_MIME, CheckFailed, checks_in
from etl.reports import head
from etl.reports.head import Before
from etl.storage import Root

if TYPE_CHECKING:
    import nh3

    from etl.runs.record import RunRecord

log = logging.getLogger(__name__)
PAGE, TEMPLATES = "report.html", Path(__file__).with_name("templates")
NOTHING = Before()
# of a page, as the template writes them
BAR = re.compile(rb'(<nav class="bar">.*?<span class="links">).*?(</span>\s*</nav>)', re.S)
CODE = re.compile(
    rb"<details(?: open)?>\s*<summary><code>.*?</details>"
    rb'|<div class="output_error[^>]*>.*?</div>|<a class="code-switch[^>]*>.*?</a>',
    re.S,
)

RULE = re.compile(r"(\x1b\[[\d;]*m)*-{20,}(\x1b\[[\d;]*m)*")  # above a traceback of IPython's

# What a notebook's outputs may contain. Everything else is dropped: scripts, forms, frames, anything fetched.
TAGS = set(
    re.findall(
        r"\w+",
        """a abbr b blockquote br caption cite code col colgroup dd del details div dl dt em figcaption figure
        h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q s samp small span strong sub summary sup
        table tbody td tfoot th thead tr tt u ul var""",
    )
)
ATTRIBUTES = set(re.findall(r"\w+", "align alt class colspan height open rowspan span start style title width"))
STYLES = set(
    re.findall(
        r"[\w-]+",
        """background-color border-bottom-color border-collapse border-color border-left-color border-right-color
        border-top-color clear color direction display float font font-family font-size font-style font-variant
        font-weight height letter-spacing line-height overflow text-align text-decoration text-indent unicode-bidi
        vertical-align white-space width""",
    )
)
ANY = re.compile("")
LINKS = {  # what the attribute's value has to begin with
    "href": re.compile(r"https?://|mailto:|#|(\.\./)+[\w/.-]+\Z"),
    "src": re.compile(r"data:image/(png|jpeg|gif|svg\+xml);base64,"),
}
# the first of these that an output has: a picture rather than the script that would draw it
SHOWN = ["image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown", "text/latex", "text/plain"]
# one exporter for all threads: its templates take longer to compile than to fill
_EXPORTING = threading.Lock()


def write(root: Root, record: "RunRecord", nb: Any, folder: str | None = None, before: Before = NOTHING) -> None:
    """Write report.ipynb, run.json and report.html into `folder`, else the record's folder, each whole."""
    save(root, record, nb, folder)
    write_page(root, record, nb, folder, before)


def save(root: Root, record: "RunRecord", nb: Any, folder: str | None = None) -> None:
    """Write what the run left: report.ipynb and, last, run.json."""
    folder = folder or record.report
    root.write(f"{folder}/report.ipynb", notebook(nb))
    text = json.dumps(asdict(record), indent=2, default=str)
    root.write(f"{folder}/run.json", (text + "\n").encode())


def write_page(root: Root, record: "RunRecord", nb: Any, folder: str | None = None, before: Before = NOTHING) -> None:
    """Write what people read, report.html. A page that cannot be made is logged and left out."""
    try:
        page = html(record, nb, before).encode(errors="replace")
    except Exception as error:
        log.error("run %s has no report.html: %s: %s", record.run_id, type(error).__name__, error)
    else:
        root.write(f"{folder or record.report}/{PAGE}", page)


def url_of(root: Root, record: dict[str, Any]) -> str:
    """Where a person finds a run's report: its page, or the notebook when there is none (any more)."""
    page = f"{record['report']}/{PAGE}"
    return root.url_of(page if root.exists(page) else f"{record['report']}/report.ipynb")


def page_of(root: Root, record: dict[str, Any], before: Callable[[], Before] = Before) -> bytes:
    """report.html of a run by its run.json; made anew where there is none (any more), after what came `before` it.
    Raises FileNotFoundError."""
    try:
        return root.read(f"{record['report']}/{PAGE}")
    except FileNotFoundError:
        import nbformat

        nb = nbformat.reads(root.read(f"{record['report']}/report.ipynb").decode(), as_version=4)
        return html(SimpleNamespace(**record), nb, before()).encode(errors="replace")


def without_code(page: bytes) -> bytes:
    """A page for readers who do not code: what the notebook says and shows, neither source nor traceback."""
    return CODE.sub(b"", page)


def served(page: bytes, links: Sequence[tuple[str, str]]) -> bytes:
    """A page whose bar has these links, (words, address) each, in place of those between files."""
    anchors = "".join(f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in links)
    return BAR.sub(lambda match: match[1] + anchors.encode() + match[2], page, count=1)


@functools.cache
def style() -> str:
    """The style sheet of all pages."""
    return (TEMPLATES / "report/style.css").read_text()


def notebook(nb: Any) -> bytes:
    """report.ipynb."""
    import nbformat

    text: str = nbformat.v4.writes(nb)
    return f"{text}\n".encode(errors="replace")


def html(record: "RunRecord | SimpleNamespace", nb: Any, before: Before = NOTHING) -> str:
    """The report as one page that needs no script, no network and no other file."""
    page = {
        "record": record,
        "ok": record.state in ("ok", "noop"),
        "state": record.state.replace("_", " "),
        "head": head.of(record, nb, before),
        "contents": head.MARK,
    }
    with _EXPORTING:
        made: str = _exporter().from_notebook_node(nb, resources={"page": page})[0]
    return head.with_contents(made)


@functools.cache
def _exporter() -> Any:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        sanitize_html=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    # nbconvert's own filter shows headings, paragraphs and table heads as escaped text
    exporter.register_filter("clean_html", clean)
    exporter.register_filter("checks", lambda data: checks_in(data.get(CHECK_MIME)))
    exporter.register_filter("traceback", _traceback)
    exporter.register_filter("readable", lambda data: next((kind for kind in SHOWN if kind in data), None))
    return exporter


def _traceback(error: Any) -> list[str]:
    """The lines of an error's output that are read: not the rule on top, nor that checks failed, which they say."""
    lines: list[str] = error.traceback
    if error.ename == CheckFailed.__name__ and len(lines) == 1:
        return []
    return [line for line in lines if not RULE.fullmatch(line)]


def clean(fragment: Any) -> str:
    """HTML without anything that could run, ask the network or leave its place."""
    return _cleaner().clean(str(fragment))


@functools.cache
def _cleaner() -> "nh3.Cleaner":
    import nh3

    return nh3.Cleaner(
        tags=TAGS,
        clean_content_tags={"script", "style"},  # their text is nothing to read, either
        attributes={"*": ATTRIBUTES, "a": {"href"}, "img": {"src"}},
        attribute_filter=lambda tag, name, value: value if LINKS.get(name, ANY).match(value) else None,
        url_schemes={"http", "https", "mailto", "data"},
        link_rel=None,
        filter_style_properties=STYLES,
    )
