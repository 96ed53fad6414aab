"""Rehearsal: the exact share, evenly spread, no task row lost, the same for the same seed."""

import os
import random
import subprocess
import sys

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.rehearsal import (
    RehearsalSampler,
    drop_overlap,
    mix_rehearsal,
    rehearsal_count,
    rehearsal_order,
)

RATIOS = st.floats(0, 0.95, allow_nan=False) | st.sampled_from([0.1, 0.2, 0.25, 0.5, 1 / 3])


def alpaca(n, tag):
    return [{"instruction": f"{tag} {i}", "input": "", "output": f"{i}"} for i in range(n)]


def test_the_count_is_the_share_of_the_mixed_set():
    assert rehearsal_count(60, 0.3) == 26
    assert rehearsal_count(1000, 0.2) == 250 and rehearsal_count(3, 0.5) == 3
    assert rehearsal_count(1000, 0) == 0 and rehearsal_count(0, 0.5) == 0


@pytest.mark.parametrize(
    "ratio", [1, 1.0, -0.1, 1.5, float("nan"), float("inf"), "0.3", None, True]
)
def test_a_ratio_out_of_range_is_refused_everywhere(ratio):
    task, general = alpaca(3, "task"), alpaca(3, "general")
    for call in (
        lambda: rehearsal_count(3, ratio),
        lambda: rehearsal_order(3, 3, ratio, seed=0),
        lambda: mix_rehearsal(task, general, ratio),
        lambda: RehearsalSampler(3, 3, ratio),
    ):
        with pytest.raises(ConfigError, match="rehearsal ratio"):
            call()


@pytest.mark.timeout(60)  # it takes a tenth of a second
def test_a_ratio_near_one_ends():
    assert len(rehearsal_order(100, 7, 0.999, seed=0)) == 100_000


def test_ratio_zero_is_the_order_of_the_task_alone():
    plain = rehearsal_order(50, 0, 0, seed=3)
    assert plain == rehearsal_order(50, 9, 0.0, seed=3)
    mixed = rehearsal_order(50, 9, 0.3, seed=3)
    assert plain == [place for place in mixed if place < 50], "rehearsal does not move task rows"
    assert plain != sorted(plain)


@pytest.mark.parametrize(("n", "m", "ratio"), [(1000, 50, 0.2), (50, 1000, 0.2), (3, 1, 0.5)])
def test_every_task_row_comes_once_and_no_rehearsal_row_twice_before_all_came(n, m, ratio):
    order = rehearsal_order(n, m, ratio, seed=0)
    drawn = [place - n for place in order if place >= n]
    assert sorted(place for place in order if place < n) == list(range(n))
    assert len(drawn) == rehearsal_count(n, ratio)
    uses = [drawn.count(row) for row in range(m)]
    assert max(uses) - min(uses) <= 1


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 120), m=st.integers(1, 40), ratio=RATIOS, data=st.data())
def test_any_window_holds_its_share_give_or_take_one(n, m, ratio, data):
    order = rehearsal_order(n, m, ratio, seed=0)
    roles = [place >= n for place in order]
    assert sum(roles) == rehearsal_count(n, ratio) and len(order) == n + sum(roles)
    start = data.draw(st.integers(0, len(order) - 1))
    size = data.draw(st.integers(1, len(order) - start))
    assert abs(sum(roles[start : start + size]) - size * ratio) <= 1 + 1e-9


def test_the_draw_goes_on_over_epochs_until_every_row_was_used():
    n, m, ratio = 20, 10, 0.25  # 7 rehearsal rows an epoch
    stream = [
        place - n
        for epoch in range(10)
        for place in rehearsal_order(n, m, ratio, seed=5, epoch=epoch)
        if place >= n
    ]
    turns = [stream[i : i + m] for i in range(0, len(stream), m)]
    assert len(turns) == 7 and all(sorted(turn) == list(range(m)) for turn in turns)
    assert turns[0] != turns[1]
    assert len({tuple(rehearsal_order(n, m, ratio, seed=5, epoch=e)) for e in range(5)}) == 5


def test_the_seed_decides_and_the_global_random_state_does_not_move():
    random.seed(1)
    state = random.getstate()
    one, same, other = (rehearsal_order(40, 9, 0.3, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert [p for p in one if p >= 40] != [p for p in other if p >= 40]
    assert random.getstate() == state


def test_another_process_gives_the_same_order():
    code = "from lwf_unsloth.rehearsal import rehearsal_order as order; "
    code += "print(order(40, 9, 0.3, seed=1, epoch=2))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == str(rehearsal_order(40, 9, 0.3, seed=1, epoch=2)), out.stderr


def test_no_rehearsal_rows_or_no_task_rows_is_an_error_and_never_a_repeated_task_row():
    with pytest.raises(DataError, match="no rehearsal rows"):
        mix_rehearsal(alpaca(3, "task"), [], 0.3)
    with pytest.raises(DataError, match="0 task rows"):
        mix_rehearsal([], alpaca(3, "general"), 0.3)
    with pytest.raises(DataError, match="no rehearsal rows"):
        RehearsalSampler(3, 0, 0.3)
    assert len(mix_rehearsal(alpaca(3, "task"), None, 0)) == 3


def test_alpaca_rows_and_passages_mix_with_their_roles():
    task = Dataset.from_list(alpaca(8, "task"))
    for general in (alpaca(4, "general"), [{"text": f"passage {i}"} for i in range(4)]):
        before = [dict(row) for row in general]
        mixed = mix_rehearsal(task, Dataset.from_list(general), 0.2)
        assert len(mixed) == 10 and mixed["is_rehearsal"][:].count(True) == 2
        for row in mixed:
            is_task = (row["instruction"] or "").startswith("task")
            assert is_task is not row["is_rehearsal"]
        assert general == before
    assert mixed.column_names == ["instruction", "input", "output", "text", "is_rehearsal"]
    assert {row["text"] for row in mixed if row["is_rehearsal"]} <= {g["text"] for g in general}


def test_mixed_rows_can_be_encoded(tiny_tokenizer):
    from lwf_unsloth.records import encode_rows

    mixed = mix_rehearsal(alpaca(8, "task"), [{"text": "a", "whole": False}, {"text": "b"}], 0.2)
    encoded, report = encode_rows(tiny_tokenizer, mixed, max_length=256)
    assert report.kept == 10 and len(report.cut) == 1
    assert encoded["prompt_length"][:].count(1) == 2


def test_it_is_said_when_rehearsal_rows_repeat(caplog):
    mix_rehearsal(alpaca(8, "task"), alpaca(5, "general"), 0.2)
    assert not caplog.text
    mix_rehearsal(alpaca(100, "task"), alpaca(10, "general"), 0.2)
    assert "25 rehearsal rows are needed" in caplog.text and "2 to 3 times" in caplog.text


def test_both_halves_of_a_load_at_once_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"rehearsal rows.*\['train'\]"):
        mix_rehearsal(alpaca(3, "task"), {"train": alpaca(3, "general")}, 0.2)
    with pytest.raises(DataError, match="Row 1 of the task rows is text"):
        mix_rehearsal(["a"], alpaca(3, "general"), 0.2)


def test_held_out_rows_are_taken_out_of_the_rehearsal_rows_whatever_their_case_and_spaces():
    held = alpaca(5, "shared")
    rehearsal = alpaca(10, "general") + [
        {**row, "instruction": f" {row['instruction'].upper()}\n"} for row in held
    ]
    kept, dropped = drop_overlap(rehearsal, held)
    assert dropped == [11, 12, 13, 14, 15] and len(kept) == 10
    assert drop_overlap([{"text": "A  b"}, {"text": "c"}], [{"text": "a b"}])[1] == [1]


def test_the_sampler_gives_the_order_of_each_epoch():
    sampler = RehearsalSampler(40, 9, 0.25, seed=4)
    assert len(sampler) == len(list(sampler)) == 53
    assert list(sampler) == rehearsal_order(40, 9, 0.25, seed=4, epoch=0)
    sampler.set_epoch(3)
    assert list(sampler) == rehearsal_order(40, 9, 0.25, seed=4, epoch=3)
    sampler.set_epoch(0)
    assert list(sampler) == rehearsal_order(40, 9, 0.25, seed=4, epoch=0)


def test_two_ranks_share_the_sampler_without_a_row_on_both():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    sampler = RehearsalSampler(48, 30, 0.25, seed=0)
    ranks = [
        [row for batch in BatchSamplerShard(BatchSampler(sampler, 4, False), 2, r) for row in batch]
        for r in range(2)
    ]
    assert not set(ranks[0]) & set(ranks[1]) and sorted(ranks[0] + ranks[1]) == sorted(sampler)
    assert [sum(row >= 48 for row in rank) for rank in ranks] == [8, 8]


@pytest.mark.parametrize("ratio", [0.9991, 0.9999999999, 1 - 2**-53])
def test_a_ratio_that_would_make_an_epoch_endless_is_refused_at_once(ratio):
    with pytest.raises(ConfigError, match="0.999 at most"):
        mix_rehearsal([{"text": "a"}] * 60, [{"text": "b"}], ratio)
    with pytest.raises(ConfigError, match="0.999 at most"):
        rehearsal_count(60, ratio)
