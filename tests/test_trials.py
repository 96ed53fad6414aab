"""The table of trials in tests/README.md names tests that exist, once for each trial."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import lwf_unsloth
from lwf_unsloth.errors import LwfError

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+\.\d+ \|", line)
]


def test_every_test_that_the_table_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    sources = {name: (TESTS / name).read_text(encoding="utf-8") for name, _ in named}
    lost = [(name, test) for name, test in named if f"def {test}(" not in sources[name]]
    assert named and not lost


def test_every_trial_stands_once_with_a_test_or_a_reason():
    numbers = [row[0] for row in ROWS]
    assert len(numbers) == len(set(numbers)) and all(len(row) == 5 for row in ROWS)
    for number, _, _, now, tests in ROWS:
        words = re.sub(r"`[^`]*`|<br>|; ", "", tests)
        assert ("::" in tests) != (now == "not tested"), number
        assert bool(words.strip()) == (now in ("tested in part", "not tested")), number


def test_the_totals_are_those_of_the_table():
    (totals,) = re.findall(r"Totals: (.*?)\.\n\n", PAGE, re.DOTALL)
    said = {
        name.strip(): int(number)
        for name, number in re.findall(r"(?:^|[,;:])\s*([a-zA-Z ]+?) (\d+)", totals)
    }
    before, now = Counter(row[2] for row in ROWS), Counter(row[3] for row in ROWS)
    assert totals.startswith(f"{len(ROWS)} trials;")
    assert said == {**before, **now}


def test_without_ipywidgets_the_panel_says_what_to_install_and_the_rest_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for name in ("lwf_unsloth.widgets", "lwf_unsloth.panel_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(vars(lwf_unsloth), "panel", raising=False)
    with pytest.raises(LwfError, match="pip install ipywidgets") as caught:
        lwf_unsloth.panel  # noqa: B018
    assert isinstance(caught.value, ImportError)
    rows = [{"instruction": "q", "output": "a"}]
    assert lwf_unsloth.load_alpaca(rows, test_size=0).report.kept == 1
