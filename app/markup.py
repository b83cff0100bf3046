"""HTML that Streamlit has no element for: links on bars, cards that stand in a row where there is room, figures.

Colours are those of .streamlit/config.toml, by `light-dark`, which goes by the page's own theme. Everything that is not
markup is escaped here.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

import streamlit as st

COLOURS = {  # name -> of a bar and a border, of a text, behind it; each in light and in dark
    "green": (("#2f8f57", "#4fae78"), ("#1c6b3c", "#7fd3a0"), ("#e4f3ea", "#173324")),
    "red": (("#c8372d", "#f0665c"), ("#a9261d", "#ff9b93"), ("#fbe7e5", "#421d1b")),
    "orange": (("#b3640f", "#e09a44"), ("#8a4a06", "#f2b872"), ("#fcefdc", "#3a2a14")),
    "gray": (("#8a929e", "#7b8592"), ("#555d68", "#adb5c0"), ("#eceef1", "#272d36")),
    "blue": (("#2f6db5", "#5c99de"), ("#1d5fa8", "#82b6f2"), ("#e5eef9", "#1a2c42")),
}
STATES = {"ok": "green", "noop": "gray", "cancelled": "orange", "running": "blue"}  # of a run; the others are red
LEVELS = {"bad": "red", "warning": "orange", "note": "gray"}  # of a finding


def _rules() -> Iterable[str]:
    for name, (bar, text, behind) in COLOURS.items():
        yield f".{name} {{ --bar: light-dark({', '.join(bar)}); --text: light-dark({', '.join(text)});"
        yield f"--behind: light-dark({', '.join(behind)}); }}"


STYLE = f"""<style>
{"".join(_rules())}
.etl {{ --line: light-dark(#d5d9e0, #39414d); --faint: light-dark(#555d68, #adb5c0); line-height: 1.45; }}
.etl a {{ color: light-dark(#1d5fa8, #82b6f2); }}
.etl h2 {{ font-size: 1.3rem; font-weight: 600; margin: 0 0 .75rem; padding: 0; }}
.etl h3 {{ font-size: 1rem; font-weight: 600; margin: 0; padding: 0; }}
.etl p, .etl ul, .etl ol {{ margin: 0; padding: 0; font-size: 1rem; }}
.etl p + p, .etl small + p, .etl p + .wide {{ margin-top: .4rem; }}
.etl small, .etl .faint {{ color: var(--faint); font-size: .875rem; }}
.etl code {{ font-size: .85em; overflow-wrap: anywhere; white-space: pre-wrap; }}
.etl .cards {{ display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }}
@media (min-width: 48rem) {{ .etl .six {{ grid-template-columns: repeat(3, 1fr); }} }}
@media (min-width: 75rem) {{ .etl .five {{ grid-template-columns: repeat(5, 1fr); }} }}
@media (min-width: 85rem) {{ .etl .six {{ grid-template-columns: repeat(6, 1fr); }} }}
.etl .card {{ border: 1px solid var(--line); border-radius: 6px; padding: .75rem .9rem; min-width: 0;
    display: flex; flex-direction: column; gap: .3rem; }}
.etl .head {{ display: flex; justify-content: space-between; align-items: center; gap: .5rem; }}
.etl .big {{ font-size: 1.5rem; font-weight: 500; line-height: 1.25; overflow-wrap: anywhere; }}
.etl .badge {{ background: var(--behind); color: var(--text); border-radius: 4px; padding: .1rem .45rem;
    font-size: .8rem; font-weight: 600; white-space: nowrap; }}
.etl .bars {{ display: flex; align-items: flex-end; gap: 1px; height: 44px; margin-top: auto; padding-top: .4rem; }}
.etl .bars > * {{ flex: 1 1 0; max-width: 10px; min-height: 3px; background: var(--bar); border-radius: 1px 1px 0 0; }}
.etl a.bar:hover, .etl a.bar:focus-visible {{ outline: 2px solid currentColor; outline-offset: 1px; }}
@media (max-width: 30rem) {{ .etl .narrow {{ grid-template-columns: 1fr 1fr; }} }}
.etl .banner {{ background: var(--behind); color: var(--text); border-left: 4px solid var(--bar); border-radius: 4px;
    padding: .9rem 1.1rem; font-size: 1.15rem; font-weight: 550; overflow-wrap: anywhere; }}
.etl .incident {{ border-left: 4px solid var(--bar); padding: .15rem 0 .15rem .9rem; margin: 0 0 .9rem;
    list-style: none; overflow-wrap: anywhere; }}
.etl table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
.etl th, .etl td {{ text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
    vertical-align: top; overflow-wrap: break-word; }}
.etl th {{ font-weight: 600; color: var(--faint); }}
.etl .right {{ text-align: right; padding-right: 1.5rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
@media (min-width: 40rem) {{ .etl td > a {{ white-space: nowrap; }} }}
.etl .even {{ table-layout: fixed; }}
.etl .even td {{ overflow-wrap: anywhere; }}
/* on a phone, what is long stands below the rest of its row, and no column is a word wide */
@media (max-width: 40rem) {{
    .etl .folds thead {{ display: none; }}
    .etl .folds tr {{ display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .35rem 0;
        border-bottom: 1px solid var(--line); }}
    .etl .folds td {{ border: 0; padding: .1rem 0; }}
    .etl .folds .below {{ order: 1; flex-basis: 100%; }}
    .etl .folds td:empty {{ display: none; }}
}}
.etl .span {{ min-width: 8rem; }}
.etl .span > span {{ display: block; height: 12px; background: var(--bar); border-radius: 2px; }}
.etl .typed {{ background: light-dark(#eceef1, #272d36); border-radius: 6px; padding: .75rem .9rem; margin: 0;
    font-size: .875rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }}
.etl .wide {{ overflow-x: auto; }}
</style>"""


def show(*parts: str) -> None:
    """Put markup on the page."""
    st.html(f'<div class="etl">{"".join(parts)}</div>')


def text(said: str) -> str:
    """Any text; what stands between `` is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(said))


def link(address: str, said: str) -> str:
    """A link in the same tab. Anything but a page of the web or of the dashboard is no link."""
    if not re.match(r"https?://|[\w-]+(\?|$)", address):
        return escape(said)
    return f'<a href="{escape(address)}" target="_self">{escape(said)}</a>'


def badge(said: str, colour: str) -> str:
    """A word in a colour."""
    return f'<span class="badge {colour}">{escape(said)}</span>'


def typed(command: str) -> str:
    """What to type: a click selects all of it. Streamlit's own block of code brings 1.6 MB of script to the page."""
    return f'<pre class="typed">{escape(command)}</pre>'


def small(*said: str) -> str:
    """A line of markup that says less."""
    return f"<small>{''.join(said)}</small>"


def card(*parts: str) -> str:
    """A box of a row of them."""
    return f'<div class="card">{"".join(parts)}</div>'


def cards(made: Iterable[str], *kinds: str) -> str:
    """Boxes in rows, as many in each as there is room for; `kinds`: "five" or "six" in a row of a wide
    page, "narrow" ones."""
    return f'<div class="{" ".join(["cards", *kinds])}">{"".join(made)}</div>'


def bars(values: Sequence[float], named: Sequence[str], about: str, colour: str = "blue") -> str:
    """A small chart; `named`: what each bar is, `about`: all of it."""
    most = max(values, default=0) or 1
    made = (
        f'<span class="{colour}" style="height:{max(value, 0) / most:.0%}" title="{escape(name)}"></span>'
        for value, name in zip(values, named, strict=True)
    )
    return f'<div class="bars" role="img" aria-label="{escape(about)}">{"".join(made)}</div>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[int] = (),
    even: bool = False,
    below: int | None = None,
) -> str:
    """Markup in rows; `right`: the columns that hold numbers; `even`: all columns are as wide; `below`: the column of
    long texts, which on a phone stands below the others."""

    def cells(kind: str, row: Sequence[str]) -> str:
        kinds = ("right" if at in right else "below" if at == below else "" for at in range(len(row)))
        sides = (f' class="{name}"' if name else "" for name in kinds)
        return "".join(f"<{kind}{side}>{cell}</{kind}>" for side, cell in zip(sides, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', [*map(escape, head)])}</tr></thead>"
    kind = ' class="even"' if even else ' class="folds"' if below is not None else ""
    return f'<div class="wide"><table{kind}>{top}<tbody>{body}</tbody></table></div>'
