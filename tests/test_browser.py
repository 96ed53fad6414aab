"""Notebooks 01 and 03 in JupyterLab, in a real browser: run, looked at, clicked."""

import re

import nbformat
import pytest
from browser_lab import ROOT, Browser, Lab, browser, rows, with_parameters

pytestmark = pytest.mark.browser
NOTEBOOKS = ROOT / "notebooks"
STEPS = 16
HELD = 3
HOLD = f"""
from lwf_unsloth.widgets import Panel
follow = Panel._follow

def held(panel, state):
    follow(panel, state)
    if state.global_step == {HELD}:
        panel.session.stopping.wait()

Panel._follow = held
"""
"""Training waits at a step for the Stop button: a person's click takes longer than all steps."""


@pytest.fixture()
def person(lab):
    """A browser; neither its page nor the kernel asked for anything outside, no dialog opened."""
    with browser() as one:
        yield one
        assert one.outside == [] and lab.outside == [] and one.dialogs == []


def cell_of(notebook, text: str) -> int:
    """The number of the code cell that holds a text."""
    found = [n for n, c in enumerate(notebook.cells) if c.cell_type == "code" and text in c.source]
    return found[-1]


def test_notebook_01_runs_and_shows_its_table(lab: Lab, person: Browser, tiny_model_dir):
    small = {"MODEL": str(tiny_model_dir), "TASK_ROWS": 40, "STEPS": 2, "ROWS_A_STEP": 4}
    source = with_parameters(NOTEBOOKS / "01_alpaca_demo.ipynb", small | {"MAX_NEW_TOKENS": 16})
    person.open(lab, lab.put("01.ipynb", source))
    person.run_all()
    person.show_cell(0, height=1400)
    person.shot("01_top")
    person.show_cell(cell_of(source, "trainer.train()"), height=1400)
    person.shot("01_training")
    cell = person.show_cell(cell_of(source, "comparison = lwf.compare("), height=1400)
    table = cell.locator(".lwf-t")
    table.wait_for()
    assert table.locator("tbody tr").count() == 5
    assert cell.locator(".lwf-b.lwf-eos, .lwf-b.lwf-length").count() == 10
    assert "Answers without fault" in cell.inner_text()
    person.shot("01_table", table)
    person.theme("JupyterLab Dark")
    person.shot("01_table_dark")
    person.show_cell(cell_of(source, "comparison.advice"), height=1400)
    person.shot("01_advice_dark")
    assert (lab.notebooks / "runs/alpaca_demo/comparison.html").is_file()


class Panel:
    """The panel on the page, as a person meets it."""

    def __init__(self, person: Browser, cell) -> None:
        self.person, self.box = person, cell.locator(".lwf-panel")
        self.box.wait_for()

    def card(self, number: int):
        return self.box.locator(".lwf-card").nth(number - 1)

    def press(self, text: str) -> None:
        self.box.locator(f"button:text-is('{text}')").click()

    def wait_for(self, card: int, pattern: str) -> str:
        """Waits for a text in one of the cards; gives the card's text."""
        place = self.card(card)
        place.filter(has_text=re.compile(pattern)).wait_for()
        return place.inner_text()

    def wait_until_idle(self) -> None:
        """Waits until the buttons can be pressed: the text of a result comes before."""
        self.box.locator("button:text-is('Train'):not([disabled])").wait_for()
        self.box.locator(".noUi-target:not([disabled])").wait_for()

    def fill(self, label: str, value: str) -> None:
        place = self.box.locator(f".widget-inline-hbox:has(label:text-is('{label}')) input")
        place.fill(value)
        place.press("Tab")


def test_the_panel_of_notebook_03_is_clicked_through(
    lab: Lab, person: Browser, tiny_model_dir, tmp_path
):
    small = {"MODEL": str(tiny_model_dir), "STEPS": 2, "ROWS": 20, "MAX_NEW_TOKENS": 8}
    source = with_parameters(NOTEBOOKS / "03_your_data.ipynb", small)
    source.cells.insert(1, nbformat.v4.new_code_cell(HOLD))
    person.open(lab, lab.put("03.ipynb", source))
    person.run_all()
    panel = Panel(person, person.show_cell(cell_of(source, "lwf.panel("), height=2600))
    person.shot("03_panel", panel.box)

    file = tmp_path / "rows of mine.jsonl"
    file.write_text(rows(24), encoding="utf-8")
    with person.page.expect_file_chooser() as chosen:
        panel.box.locator("button:has-text('Upload')").click()
    chosen.value.set_files(file)
    panel.wait_for(1, "24 of 24 rows kept")
    panel.wait_for(2, "fits on the CPU")

    panel.fill("steps", str(STEPS))
    panel.press("Train")
    panel.wait_for(3, f"step {HELD} of {STEPS}")
    panel.press("Stop")
    told = panel.wait_for(3, "Stopped at step")
    at = int(re.search(rf"Stopped at step (\d+) of {STEPS}", told)[1])
    run = lab.notebooks / "runs/your_data/panel/run-1"
    assert HELD <= at < STEPS and (run / f"checkpoint-{at}" / "trainer_state.json").is_file()
    person.shot("03_stopped", panel.box)
    panel.press("Go on")
    panel.wait_for(3, f"{STEPS} steps trained, adapter saved")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    chart = panel.card(3).locator("img").element_handle()
    person.page.wait_for_function("image => image.naturalWidth > 300", arg=chart)

    panel.press("Ask before and after")
    panel.card(4).locator(".lwf-t").wait_for()
    panel.wait_until_idle()
    slider = panel.card(4).locator(".noUi-handle")
    at = slider.bounding_box()
    person.page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    person.page.mouse.down()
    person.page.mouse.move(at["x"] - 50, at["y"] + at["height"] / 2, steps=5)
    person.page.mouse.up()
    told = panel.wait_for(4, r"after, dial at 0\.\d+")
    scale = re.search(r"dial at (0\.\d+)", told)[1]
    assert f"scale_adapter(model, {scale})" in panel.card(5).inner_text()
    person.shot("03_dial", panel.box)

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"<b>question</b>": 1}\n', encoding="utf-8")
    source_box = panel.card(1).locator("input[type=text]")
    source_box.fill(str(bad))
    source_box.press("Tab")
    panel.press("Check")
    told = panel.wait_for(1, "question")
    assert panel.card(1).locator(".lwf-bad").count() == 1 and "Traceback" not in told
    assert "<b>question</b>" in told and panel.card(1).locator(".lwf-bad b").count() == 0
    panel.fill("lambda", "-1")
    panel.wait_for(2, "lwf_lambda is -1")
    person.theme("JupyterLab Dark")
    person.shot("03_errors_dark", panel.box)
    assert person.errors == []
