"""Pages in a browser: a tab that keeps what the browser complains of, and page objects that choose, read and look."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode, urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Request, expect

WIDTH_PX, HEIGHT_PX = 1440, 900
PATIENCE_MS, FIRST_MS = 20_000, 120_000  # the first chart of a server imports for seconds, on busy cores for many
expect.set_options(timeout=PATIENCE_MS)
# What a browser may complain of, by a pattern of "<kind> <text> <address>", and why that is no fault of ours.
KNOWN = {
    r"^console Failed to load resource.* 404 .*/\w+/_stcore/(health|host-config)$": (
        "Streamlit's page looks for its server below its own address first, then one level up"
    ),
    r"^failed net::ERR_ABORTED ": "a page that is left, or loaded again, stops what it was loading",
}


# The texts that are too faint to read: their contrast with what is behind them, below 4.5.
FAINT = """() => {
  const parsed = said => { const [r, g, b, a = 1] = said.match(/[\\d.]+/g).map(Number); return [r, g, b, a] };
  const over = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const light = colour => [.2126, .7152, .0722].reduce((sum, share, i) => {
    const part = colour[i] / 255;
    return sum + share * (part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
  }, 0);
  const faint = {}, texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), inside = texts.currentNode.parentElement;
    if (!text || inside.closest("style,script,noscript,svg,canvas")) continue;
    if (!inside.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const around = [];
    for (let part = inside; part; part = part.parentElement) around.unshift(getComputedStyle(part));
    const behind = around.reduce((colour, style) => over(parsed(style.backgroundColor), colour), [255, 255, 255, 1]);
    const ink = parsed(getComputedStyle(inside).color);
    ink[3] *= around.reduce((share, style) => share * style.opacity, 1);
    const [dark, bright] = [light(over(ink, behind)), light(behind)].sort((a, b) => a - b);
    const contrast = (bright + .05) / (dark + .05);
    if (contrast < 4.5) faint[text.slice(0, 60)] = contrast.toFixed(2);
  }
  return faint;
}"""


class Tab:
    """A tab of the browser. `problems`: errors and warnings of its console, requests that failed or left this machine,
    but for those that are KNOWN."""

    def __init__(self, window: BrowserContext, url: str):
        self.tab, self.url, self.problems = window.new_page(), url, []
        self.tab.set_default_timeout(PATIENCE_MS)
        self.tab.on("console", self._on_console)
        self.tab.on("pageerror", lambda error: self._complain("script", str(error)))
        self.tab.on("request", self._on_request)
        self.tab.on("requestfailed", lambda request: self._complain("failed", f"{request.failure}", request.url))

    @classmethod
    @contextmanager
    def opened(cls, window: BrowserContext, url: str) -> Iterator["Tab"]:
        """A new tab, closed in the end; a problem fails the test."""
        tab = cls(window, url)
        try:
            yield tab
        finally:
            tab.tab.close()
        assert tab.problems == []

    def charts(self) -> Locator:
        """All that Plotly has drawn, from top to bottom."""
        return self.tab.locator(".js-plotly-plot:has(.main-svg)")

    def faint(self) -> dict[str, str]:
        """The texts that are too faint to read, each with its contrast."""
        return self.tab.evaluate(FAINT)

    def serious(self, *rules: str) -> dict[str, list[str]]:
        """What keeps people who hear the page, or go by keys, from using it: axe's rule -> the elements; of all rules,
        or of these."""
        options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
        wrong = Axe().run(self.tab, options=options).response["violations"]
        return {
            f"{each['id']}: {each['help']}": [f"{node['target']} {node['html']:.200}" for node in each["nodes"]]
            for each in wrong
            if each["impact"] in ("serious", "critical")
        }

    def headings(self) -> list[int]:
        """The levels of the headings, from top to bottom."""
        return [
            int(tag[1]) for tag in self.tab.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => h.tagName)")
        ]

    def too_wide_px(self) -> int:
        """How far the page reaches beyond the window's right side, once tables have followed a change of its size."""
        script = "() => document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth"
        for _ in range(30):
            if (px := self.tab.evaluate(script)) <= 0:
                break
            self.tab.wait_for_timeout(100)
        return px

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._complain("console", message.text, message.location["url"])

    def _on_request(self, request: Request) -> None:
        if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", request.url):
            self._complain("outside", request.url)

    def _complain(self, *words: str) -> None:
        complaint = " ".join(words)
        if not any(re.search(pattern, complaint, re.S) for pattern in KNOWN):
            self.problems.append(complaint)


class Dashboard(Tab):
    """The dashboard's pages."""

    def open(self, page: str = "", **parameters: str) -> None:
        """Go to a page, "" for the first, and wait until it is drawn."""
        query = f"?{urlencode(parameters)}" if parameters else ""
        self.tab.goto(f"{self.url}/{page}{query}")
        self.settle()

    def settle(self) -> None:
        """Wait until the server has drawn everything."""
        expect(self.tab.get_by_test_id("stApp")).to_have_attribute(
            "data-test-script-state", "notRunning", timeout=FIRST_MS
        )
        expect(self.tab.get_by_test_id("stSkeleton")).to_have_count(0, timeout=FIRST_MS)
        expect(self.tab.get_by_test_id("stException")).to_have_count(0)

    @property
    def address(self) -> tuple[str, dict[str, str]]:
        """What the address bar says: the page, and its parameters."""
        parts = urlsplit(self.tab.url)
        return parts.path.strip("/"), {name: values[-1] for name, values in parse_qs(parts.query).items()}

    def menu(self, page: str) -> None:
        """Go to a page by the menu at the top."""
        self.tab.get_by_test_id("stTopNavLink").filter(has_text=page).click()
        self.settle()

    @property
    def selected(self) -> Locator:
        """The field that shows what is selected."""
        return self.tab.get_by_role("combobox", name="Question")

    def select(self, text: str) -> None:
        """Type into the field, and take the first that fits."""
        self.selected.fill(text)
        self.tab.get_by_role("option").first.click()
