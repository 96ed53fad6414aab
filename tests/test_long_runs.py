"""Long runs: memory flat, checkpoints pruned, and what is told does not grow with the run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def test_skipped_steps_are_told_ever_more_seldom(tiny_tokenizer, caplog):
    from lwf_unsloth.guard import FiniteSteps

    guard = FiniteSteps(3, None, 0, tiny_tokenizer, "unused")
    guard._named = lambda step: "task row 7 'words'"
    state = SimpleNamespace(is_world_process_zero=True)
    for number in range(2000):
        guard._before.number, guard._before.bad = number, torch.tensor(number % 2 == 0)
        guard._settle(None, state)
    lines = [record.getMessage() for record in caplog.records]
    assert guard.skipped == 1000 and len(lines) == 8 + 6
    assert all("task row 7" in line for line in lines)
    assert "(8 so far; the next is told at 16)" in lines[7] and "512 so far" in lines[-1]


@pytest.mark.slow
def test_a_longer_run_keeps_its_memory_and_always_a_whole_checkpoint(tmp_path):
    from tests.campaigns.long import broken, long_run

    found = long_run(tmp_path, 240)
    assert broken(found) == [], found
    assert found["most_checkpoints"] == 2 and found["log_lines_of_the_trainer"] == 13


def test_what_is_wrong_with_a_long_run_is_found():
    from tests.campaigns.long import broken, figures

    count, mib = 100, 2**20
    notes = {
        "step": list(range(1, count + 1)),
        "resident": [(500 if n < 25 else 600 + n // 3) * mib for n in range(count)],
        "records": list(range(count)),
        "checkpoints": [3] * count,
        "whole": [1] * 60 + [0] * 40,
    }
    said = " ".join(broken(figures(notes, count, 2)))
    for words in ("memory grew by 3", "3 checkpoints", "no whole checkpoint", "log records"):
        assert words in said
