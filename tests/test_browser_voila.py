"""The panel as a page of its own, under voila."""

import re

import pytest
from browser_lab import Lab, browser, chromium, notebook_of

pytestmark = pytest.mark.browser
PANEL = "import lwf_unsloth as lwf\nlwf.panel(source=lwf.sample_path('faq_task.jsonl'))"
ICONS = re.compile(r"https://cdn\.jsdelivr\.net/npm/@fortawesome/")
"""Voila's own page asks for two style sheets of Font Awesome; without them an icon is missing."""


def test_the_panel_works_under_voila(tmp_path):
    """The page comes when the notebook has run: the first import takes up to a minute."""
    chromium()
    server = Lab(tmp_path / "voila")
    name = server.put("panel.ipynb", notebook_of(PANEL))
    try:
        server.start_voila(name)
        with browser() as person:
            person.page.goto(server.address, wait_until="commit")
            panel = person.page.locator(".lwf-panel")
            panel.locator(".lwf-card").nth(4).wait_for()
            panel.locator("button:text-is('Check')").click()
            panel.locator(".lwf-ok", has_text="rows kept").wait_for()
            panel.locator("button:text-is('Train')").click()
            panel.locator(".lwf-bad", has_text="no model yet").wait_for()
            person.shot("voila_panel", panel)
            assert [url for url in person.outside if not ICONS.match(url)] == []
            assert server.outside == [] and person.dialogs == []
    finally:
        server.stop()
