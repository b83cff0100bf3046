"""The dashboard in a real browser, over a real server: what only a person before the page would notice."""

import itertools
import re
from datetime import UTC, datetime

import httpx
import incidents
from browser import Dashboard, Tab
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import expect
from published import DAY

from etl.reports import page as reports
from etl.storage import Root
from pipeline import queries

ASKED = {question.name: question for question in queries.questions()}
LIVE = [question for question in ASKED.values() if question.live]
SLOWLY_MS = 60_000  # until what is looked at less often has been looked at
INKS = {"light": "rgb(51, 51, 51)", "dark": "rgb(215, 217, 221)"}  # of a chart's texts
RULES = {"light": (), "dark": ("color-contrast",)}  # of axe, for which a theme makes a difference; none named: all
WORD_JOINER = "\u2060"  # is not seen
EDGES = "all => all.map(each => each.getBoundingClientRect().right)"


def expect_answer(dashboard: Dashboard, name: str) -> None:
    """The field, the text and the address are this question's."""
    expect(dashboard.selected).to_have_value(f"{ASKED[name].title}  ·  {name}")
    expect(dashboard.tab.get_by_test_id("stCaptionContainer").first).to_contain_text(ASKED[name].text)
    dashboard.settle()
    assert dashboard.address == ("questions", {"question": name})


def test_every_choice_of_a_question_is_kept_and_the_address_follows(dashboard):
    dashboard.open("runs")
    dashboard.menu("Questions")
    expect(dashboard.selected).to_have_value(f"{LIVE[0].title}  ·  {LIVE[0].name}")
    chosen = ["q02", "q15", "q02", "q07", "q20"]
    for name in chosen:
        dashboard.select(name)
        expect_answer(dashboard, name)
    for name in chosen[-2::-1]:
        dashboard.tab.go_back()
        expect_answer(dashboard, name)
    dashboard.tab.reload()
    expect_answer(dashboard, "q02")
    for _ in range(2):  # to no question yet, and to the page before
        dashboard.tab.go_back()
    expect(dashboard.tab.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    assert dashboard.address == ("runs", {})


def test_a_chart_shows_the_names_of_the_answer(dashboard, filled):
    """Streamlit's page takes # and six digits for a colour of its theme: Customer#000001462 was Customer#636efa462."""
    dashboard.open("questions", question="top_customers")
    customers = queries.current(Root.at(filled), "top_customers")[1]["customer"].to_list()
    chart = dashboard.charts().first
    labels = [label.replace(WORD_JOINER, "") for label in chart.locator(".ytick text").all_text_contents()]
    assert len(labels) > 5 and labels[::-1] == customers[: len(labels)]
    coloured = [at for at, label in enumerate(labels) if re.search("#0000(0[1-9]|1[0-9]|20)", label)]
    assert coloured, "there is no name that could be taken for a colour"
    chart.locator(".bars .point path").nth(coloured[0]).hover(force=True)  # Plotly listens on a layer above
    expect(chart.locator(".hoverlayer")).to_contain_text(labels[coloured[0]].replace("#", f"#{WORD_JOINER}"))


def test_what_pages_are_made_of_is_sent_compressed_and_no_other_address_is_kept(dashboard_url):
    """A first visit was sent 9.7 MB."""
    script = re.findall(r"static/js/index\.[^\"]+\.js", httpx.get(dashboard_url).text)[0]
    whole = httpx.get(f"{dashboard_url}/{script}", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in whole.headers
    for _ in range(2):  # compressed, and kept
        packed = httpx.get(f"{dashboard_url}/{script}")
        assert packed.content == whole.content and packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < len(whole.content) / 3
        assert packed.headers["cache-control"] == whole.headers["cache-control"]
    part = httpx.get(f"{dashboard_url}/{script}", headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, whole.content[:10])
    assert "content-encoding" not in httpx.get(f"{dashboard_url}/static/js/none.js").headers


def test_a_report_can_be_read_on_a_phone_and_by_those_who_hear_it(browser_window):
    """The parameters' meanings and what a check saw lay beyond the right edge."""
    given = "rows: int = 3  # of each answer, which has as many as there are customers with orders in the last hours"
    cells = [new_markdown_cell("# Toy"), new_code_cell(given, metadata={"tags": ["parameters"]})]
    for cell in cells:
        cell.metadata["runner"] = {"state": "ok", "seconds": 0.2}
    checks = [{"name": "there are rows", "ok": False, "detail": "none came, though at least 1 was expected"}]
    ran = incidents.record(
        "", "toy-20261122T120000-aaaaaa", datetime.now(UTC), 2.0, state="check_failed", checks=checks
    )
    ran.parameters, ran.origins = {"rows": 3}, {"rows": "params/toy.yml:4"}
    with Tab.opened(browser_window, "") as tab:
        tab.tab.set_content(reports.html(ran, new_notebook(cells=cells)))
        for details in tab.tab.locator("details").all():
            details.evaluate("each => each.open = true")
        for scheme in ("dark", "light"):
            tab.tab.emulate_media(color_scheme=scheme)
            assert tab.serious() == {}, scheme
            assert tab.faint() == {}, scheme
        tab.tab.set_viewport_size({"width": 390, "height": 900})
        assert max(tab.tab.locator("td, dd, p").evaluate_all(EDGES)) <= 390


def test_the_overview_says_what_is_wrong_as_it_happens(browser_window, served, root):
    """Six incidents, one after the other, on a page that nobody loads again."""
    incidents.beat(root)
    incidents.dead_generate(root)
    for stage in incidents.STAGES[1:]:
        incidents.ended(root, stage)
    with served(root) as url, Dashboard.opened(browser_window, url) as dashboard:
        banner, told = dashboard.tab.locator(".banner"), dashboard.tab.locator(".incident")
        dashboard.open()
        expect(banner).to_have_text(re.compile(r"Not healthy: generate is 5\d min late: an ok run was due at "))
        assert re.search(r"none since .* UTC$", banner.inner_text())
        expect(told).to_contain_text("Since ")
        expect(told).to_contain_text("What to do: see whether up is at work, and its last runs")
        late = dashboard.tab.locator(".badge.red")
        expect(late).to_have_text("late")  # its last run was ok
        incidents.ended(root, "generate")
        expect(banner).to_have_text("Healthy: nothing failed last, and nothing is late")

        incidents.failed_train(root)
        expect(banner).to_have_text("Not healthy: train: failed: ValueError: no such column: l_shipdate")
        expect(told).to_contain_text("runs it again")
        incidents.ended(root, "train", ago_s=0)
        expect(banner).to_contain_text("Healthy: nothing failed")

        incidents.stale_answers(root)
        expect(banner).to_have_text(
            re.compile(r"Healthy, but \d+ answers are stale: \w+ is of .*, 1 batch ago"), timeout=SLOWLY_MS
        )
        incidents.growing_quarantine(root)
        expect(banner).to_contain_text("quarantine grows: a run of the last hour refused lines; it has 0 rows")
        incidents.damaged_table(root, "orders")
        expect(banner).to_contain_text(
            re.compile("Not healthy: table orders: lake/orders/.* its rows are lost"), timeout=SLOWLY_MS
        )
        expect(told.first).to_contain_text("Seen since")
        expect(told.first).to_contain_text("What to do: see what python orchestrate.py doctor says")
        incidents.dead_up(root)
        expect(banner).to_contain_text(re.compile(r"Not healthy: up is dead: it was last seen at .* UTC"))
        expect(told.first).to_contain_text("start it: python orchestrate.py up")
        expect(dashboard.tab.locator(".st-key-footer")).to_contain_text("up was last seen at")

        run = dashboard.tab.locator("a.bar.red").first
        assert run.get_attribute("aria-label").startswith("train failed, 2.0 s")
        for scheme in ("dark", "light"):
            dashboard.tab.emulate_media(color_scheme=scheme)
            for width in (1440, 768, 390):
                dashboard.tab.set_viewport_size({"width": width, "height": 900})
                dashboard.settle()
                assert dashboard.too_wide_px() <= 0, (scheme, width)
            assert dashboard.faint() == {}, scheme
            assert dashboard.serious(*RULES[scheme]) == {}, scheme
        levels = dashboard.headings()
        assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
        dashboard.tab.set_viewport_size({"width": 1440, "height": 900})
        run.focus()
        dashboard.tab.keyboard.press("Enter")
        expect(dashboard.tab.get_by_role("heading", level=1)).to_have_text("train: failed")
        assert dashboard.faint() == {} and dashboard.serious() == {}
        dashboard.menu("Runs")
        expect(dashboard.tab.get_by_role("heading", name="Failures, by what they say")).to_be_visible()
        assert dashboard.serious() == {}
        assert dashboard.address == ("runs", {})
        dashboard.tab.set_viewport_size({"width": 390, "height": 900})
        dashboard.settle()
        assert max(dashboard.tab.locator(".etl td").evaluate_all(EDGES)) <= 390, "nothing is out of sight"


def test_a_map_is_drawn_without_a_network(dashboard, filled):
    """A request that leaves this machine fails the test."""
    dashboard.open("questions", question="recommended_suppliers")
    chart = dashboard.charts().first
    nations = queries.current(Root.at(filled), "recommended_suppliers")[1]["nation"].n_unique()
    expect(chart.locator(".scatterlayer .trace .fills path, .fills path.js-fill")).to_have_count(nations + 1)


def test_the_pages_can_be_read_in_light_and_dark_and_on_a_phone(dashboard):
    for page, parameters in {"questions": {"question": "q01"}, "lake": {}, "model": {}, "digest": {"day": DAY}}.items():
        dashboard.open(page, **parameters)
        levels = dashboard.headings()
        assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels)), page
        for scheme in ("dark", "light"):
            dashboard.tab.emulate_media(color_scheme=scheme)
            dashboard.settle()
            assert dashboard.faint() == {}, (page, scheme)
            assert dashboard.serious(*RULES[scheme]) == {}, (page, scheme)
            texts = dashboard.charts().locator(":is(.xtick, .ytick, .g-gtitle) text")
            inks = texts.evaluate_all("all => all.map(text => getComputedStyle(text).fill).filter(Boolean)")
            assert set(inks) <= {INKS[scheme]}, (page, scheme)
        for width in (390, 768, 1440):
            dashboard.tab.set_viewport_size({"width": width, "height": 900})
            dashboard.settle()
            assert dashboard.too_wide_px() <= 0, (page, width)
    expect(dashboard.tab.get_by_role("heading", name="3 runs of 2 stages")).to_be_visible()
    dashboard.open("questions", question="q01")
    dashboard.tab.get_by_role("radio", name="Of the moment").click()
    expect_answer(dashboard, "q01")
