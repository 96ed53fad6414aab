"""Model text in a real browser: it shows as text, whatever it holds."""

import browser_text
import pytest
from browser_lab import Browser, Lab, browser, notebook_of
from browser_text import EVIL, NASTY

from lwf_unsloth.markup import shown

pytestmark = pytest.mark.browser
CELLS = (
    "import browser_text as text\ntext.comparison()",
    "text.forgetting()",
    "text.advice()",
    "print(text.comparison(), text.forgetting(), text.advice(), text.comparison().before)",
    "from IPython.display import Markdown\nMarkdown(text.comparison().to_markdown())",
    "Markdown(text.forgetting().to_markdown())",
    "text.panel('panel')",
)
OURS = set("div style table caption colgroup col thead tbody tr th td pre span i p ul li".split())
FOREIGN = "script, img:not(.widget-image), svg, h1, iframe, mjx-container"
FIRST_TO_LAST = """(element, part) => {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const at = node.data.indexOf(part);
    if (at < 0) continue;
    const place = offset => {
      const range = document.createRange();
      range.setStart(node, offset); range.setEnd(node, offset + 1);
      return range.getBoundingClientRect().left;
    };
    return place(at + part.length - 1) - place(at);
  }
}"""
"""Pixels from a text's first character to its last; below 0 it runs from right to left."""


@pytest.fixture(scope="module")
def person(lab):
    with browser() as one:
        one.open(lab, lab.put("text.ipynb", notebook_of(*CELLS)))
        one.run_all()
        yield one


@pytest.fixture(autouse=True)
def nothing_ran(person: Browser, lab: Lab):
    """After each test: no script ran, no dialog, no request to the outside."""
    yield
    assert person.page.evaluate("window.evil") is None
    assert person.dialogs == [] and person.outside == [] and lab.outside == []
    assert person.errors == []


def tags(place) -> set[str]:
    return set(
        place.evaluate("e => [...e.querySelectorAll('*')].map(one => one.tagName.toLowerCase())")
    )


def boxes(place) -> list[str]:
    return place.evaluate("e => [...e.querySelectorAll('pre.lwf-x')].map(one => one.textContent)")


def expected() -> list[str]:
    rows = zip(NASTY, NASTY, NASTY[::-1], strict=True)
    return [shown(t) for p, a, b in rows for t in (p[:900], p[:300], a, b)]


def check_table(place) -> None:
    """The comparison on a page: our elements, exactly the text, no box too high or too wide."""
    assert tags(place) <= OURS
    assert boxes(place) == expected()
    sizes = place.evaluate(
        "e => [...e.querySelectorAll('pre.lwf-x')].map(one => [one.offsetHeight, one.scrollWidth"
        " - one.clientWidth])"
    )
    assert max(height for height, _ in sizes) < 420
    assert max(wider for _, wider in sizes) <= 0
    assert place.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_a_comparison_shows_exactly_the_text_and_isolates_its_direction(person: Browser):
    cell = person.show_cell(0, height=1600)
    table = cell.locator(".lwf")
    check_table(table)
    assert cell.locator(".jp-OutputArea-output").locator(FOREIGN).count() == 0
    hebrew = table.locator("pre.lwf-x", has_text="\u05e9\u05dc\u05d5\u05dd").first
    style = "e => [getComputedStyle(e).unicodeBidi, getComputedStyle(e).direction]"
    assert hebrew.evaluate(style) == ["isolate", "rtl"]
    override = table.locator("tbody tr").nth(7)
    for part in ("gnihtyreve", "7 tokens"):
        assert override.evaluate(FIRST_TO_LAST, part) > 0
    person.shot("text_table", table)


@pytest.mark.parametrize(("number", "kind"), [(1, ".lwf-n"), (2, "ul")])
def test_tables_of_figures_and_advice_hold_no_element_of_the_text(person, number, kind):
    cell = person.show_cell(number, height=1600)
    place = cell.locator(f".jp-OutputArea-output {kind}").first
    assert tags(place) <= OURS
    assert cell.locator(".jp-OutputArea-output").locator(FOREIGN).count() == 0
    text = place.evaluate("e => e.textContent")
    for nasty in NASTY[:11]:
        assert shown(nasty) in text
    wider = "e => e.closest('.jp-OutputArea-output').scrollWidth - e.clientWidth"
    assert place.evaluate(wider) <= 40
    person.shot(f"text_{number}", place)


def test_printed_objects_carry_no_ansi_codes(person: Browser):
    cell = person.show_cell(3)
    assert cell.locator("[class*=ansi-]").count() == 0
    assert "[ESC]" in cell.inner_text()


@pytest.mark.parametrize("number", [4, 5])
def test_the_markdown_renders_as_text_too(person: Browser, number):
    cell = person.show_cell(number, height=1600)
    place = cell.locator(".jp-RenderedMarkdown").last
    place.locator("table").first.wait_for()
    person.page.wait_for_timeout(1500)  # MathJax comes after the page
    assert place.locator(FOREIGN.replace("h1, ", "")).count() == 0
    assert place.locator("td a, td strong, td em, td code, td del, blockquote a").count() == 0
    text = place.evaluate("e => e.textContent").replace("\u00a0", " ")
    for nasty in NASTY[:3] + NASTY[5:10]:
        assert shown(nasty).split("\n")[0] in text
    person.shot(f"text_markdown_{number}")


def test_the_panels_outputs_hold_no_element_of_the_text(person: Browser):
    cell = person.show_cell(6, height=3000)
    panel = cell.locator(".lwf-panel")
    panel.wait_for()
    check_table(panel.locator(".lwf"))
    assert panel.locator(FOREIGN).count() == 0
    said = panel.locator(".lwf-say")
    said.nth(5).wait_for()  # the parts of a widget come one by one
    assert said.count() == 6
    allowed = OURS | {"details", "summary"}
    for number in range(6):
        assert tags(said.nth(number)) <= allowed
        assert shown(EVIL) in said.nth(number).evaluate("e => e.textContent")
    sizes = "e => [e.offsetHeight, e.scrollWidth - e.clientWidth]"
    for number in range(6):
        height, wider = said.nth(number).evaluate(sizes)
        assert height < 420 and wider <= 0
    assert panel.locator("textarea").first.input_value() == EVIL
    for card in panel.locator(".lwf-card").all():
        assert card.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    person.shot("text_panel", panel)


def test_the_saved_page_is_the_same_text_light_dark_and_narrow(person: Browser, tmp_path):
    """Last: it leaves the notebook."""
    folder = browser_text.comparison().save(tmp_path)
    person.page = person.page.context.new_page()
    person.watch()
    person.page.goto((folder / "comparison.html").as_uri())
    for scheme in ("light", "dark"):
        person.page.emulate_media(color_scheme=scheme)
        person.page.set_viewport_size({"width": 1280, "height": 1200})
        check_table(person.page.locator(".lwf"))
        person.shot(f"text_page_{scheme}")
    person.page.set_viewport_size({"width": 420, "height": 1200})
    assert person.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    person.shot("text_page_narrow_dark")
