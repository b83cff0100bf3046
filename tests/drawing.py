"""The dashboard's pages, drawn as Streamlit draws them but without a browser."""

import html
import re

from streamlit.testing.v1 import AppTest

from etl.storage import PROJECT


def opened(page: str, **address: str) -> AppTest:
    """A page by the name of its module, drawn once; `address`: what its address says behind the question mark."""
    shown = AppTest.from_string(f"from app.views import {page}\n{page}.page()", default_timeout=120)
    for name, value in address.items():
        shown.query_params[name] = value
    return drawn(shown)


def whole() -> AppTest:
    """The dashboard as it opens, with what is around its pages."""
    return drawn(AppTest.from_file(PROJECT / "app" / "dashboard.py", default_timeout=120))


def drawn(shown: AppTest) -> AppTest:
    """Drawn once more; an exception in it fails the test."""
    shown.run()
    assert not shown.exception, shown.exception
    return shown


def texts(elements) -> list[str]:
    return [element.value for element in elements]


def markup(shown: AppTest) -> str:
    """The HTML on a page."""
    return " ".join(element.proto.body for element in shown.get("html"))


def said(shown: AppTest) -> str:
    """What the HTML on a page says."""
    return " ".join(html.unescape(re.sub("<style>.*?</style>|<[^>]+>", " ", markup(shown), flags=re.S)).split())


def broken(shown: AppTest) -> list[str]:
    """The panels that cannot be shown."""
    return [warning.value.split("**")[1].removesuffix(" cannot be shown.") for warning in shown.warning]
