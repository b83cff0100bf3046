"""The dashboard in a real browser, over a real server: what only a person before the page would notice."""

import re

from browser import Dashboard
from playwright.sync_api import expect

from etl.storage import Root
from pipeline import queries

ASKED = {question.name: question for question in queries.questions()}
LIVE = [question for question in ASKED.values() if question.live]
WORD_JOINER = "\u2060"  # is not seen


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


def test_the_live_page_has_every_chart(dashboard):
    dashboard.open()
    for title in [question.title for question in LIVE]:
        expect(dashboard.tab.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(dashboard.charts()).to_have_count(len(LIVE) + 1)


def test_a_map_is_drawn_without_a_network(dashboard, filled):
    """A request that leaves this machine fails the test."""
    dashboard.open("questions", question="recommended_suppliers")
    chart = dashboard.charts().first
    nations = queries.current(Root.at(filled), "recommended_suppliers")[1]["nation"].n_unique()
    expect(chart.locator(".scatterlayer .trace .fills path, .fills path.js-fill")).to_have_count(nations + 1)


def test_the_first_change_of_the_day_and_of_the_group_are_kept(dashboard):
    dashboard.open("digest", day="2026-11-22")
    expect(dashboard.tab.get_by_role("heading", name="3 runs of 2 stages")).to_be_visible()
    dashboard.open("questions", question="q01")
    dashboard.tab.get_by_role("button", name="Of the moment").click()
    expect_answer(dashboard, "q01")
