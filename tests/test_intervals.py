"""Intervals hold the truth as often as they say, and pairing makes them narrow."""

import math

import pytest
import torch

from lwf_unsloth.errors import DataError
from lwf_unsloth.intervals import (
    DETECTABLE,
    Interval,
    mean_interval,
    rate_change,
    rate_interval,
    share_change,
    share_interval,
    statistic_interval,
)

TRIALS = 400
WITHIN = 3 * math.sqrt(0.95 * 0.05 / TRIALS)
"""Three standard errors of a rate of .95 in 400 trials: .033."""


def lengths(n, generator):
    return torch.exp(torch.randn(n, generator=generator) * 0.7 + 3).round().clamp(min=1)


@pytest.mark.parametrize("n", [2, 3, 8, 30, 120])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_mean_over_tokens_lies_in_its_interval_as_often_as_stated(n, skewed):
    generator, held = torch.Generator().manual_seed(n), 0
    for trial in range(TRIALS):
        tokens = lengths(n, generator)
        draws = torch.rand(2, n, generator=generator)
        # A row's mean NLL: gamma of shape 2 (skew 1.4) with mean 2, or a small normal rise.
        means = -draws.log().sum(0) if skewed else torch.randn(n, generator=generator) * 0.3 + 0.05
        found = mean_interval(means * tokens, tokens, seed=trial, resamples=600)
        held += found.low <= (2.0 if skewed else 0.05) <= found.high
    # Of 3 rows the interval is somewhat too wide, as it should be if anything.
    assert 0.95 - WITHIN <= held / TRIALS <= 0.95 + WITHIN + 0.01 * (n < 8)


@pytest.mark.parametrize(("n", "least"), [(6, 0.85), (16, 0.85), (64, 0.90)])
def test_a_change_of_few_rows_is_not_taken_for_a_sure_one(n, least):
    """Most rows are the same under both models; samples without any change say nothing here."""
    generator, held, asked = torch.Generator().manual_seed(n), 0, 0
    for trial in range(TRIALS):
        tokens = lengths(n, generator)
        changed = torch.rand(n, generator=generator) < 0.1
        rises = changed * (1 + torch.randn(n, generator=generator))  # truth: 0.1
        if changed.any():
            found = mean_interval(rises * tokens, tokens, seed=trial, resamples=600)
            held, asked = held + (found.low <= 0.1 <= found.high), asked + 1
    assert held / asked >= least


@pytest.mark.parametrize("tokens", [[1] * 6, [98, 129, 3, 1, 101, 1], [1, 9000, 1, 1, 1, 1]])
def test_one_changed_row_of_six_is_neither_sure_nor_absurd(tokens):
    found = mean_interval([0.0, -5.0, 0.0, 0.0, 0.0, 0.0], tokens)
    assert found.low < found.value < found.high
    assert not found.clear
    assert max(found.value - found.low, found.high - found.value) <= 13 * found.se


def test_two_rows_have_a_wide_interval():
    found = mean_interval([1.0, 2.0])
    assert found.low == pytest.approx(1.5 - 12.706 * found.se)
    assert not found.clear


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_a_rate_lies_in_its_interval_as_often_as_stated(rate):
    generator, held, n = torch.Generator().manual_seed(7), 0, 64
    for _ in range(TRIALS):
        found = rate_interval((torch.rand(n, generator=generator) < rate).float())
        held += found.low <= rate <= found.high
    # Rates are counts: no interval for them holds exactly 95 %.
    assert 0.95 - WITHIN <= held / TRIALS <= 0.99


def test_a_change_of_a_rate_lies_in_its_interval_as_often_as_stated():
    generator, held, n = torch.Generator().manual_seed(8), 0, 64
    for _ in range(TRIALS):
        draw = torch.rand(n, generator=generator)
        base, tuned = draw < 0.3, (draw < 0.25) | (draw > 0.85)  # truth: +.10, correlated
        found = rate_change(base.float(), tuned.float())
        held += found.low <= 0.10 <= found.high
    assert 0.95 - WITHIN <= held / TRIALS <= 0.99


def test_a_plain_percentile_interval_would_be_too_short():
    """Shows that the simulation can tell: the simplest bootstrap fails where ours holds."""
    generator, held, n = torch.Generator().manual_seed(8), 0, 8
    for _ in range(TRIALS):
        tokens = lengths(n, generator)
        means = -torch.rand(2, n, generator=generator).log().sum(0)
        picked = torch.randint(n, (600, n), generator=generator)
        drawn = (means * tokens)[picked].sum(1) / tokens[picked].sum(1)
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975])).tolist()
        held += low <= 2.0 <= high
    assert held / TRIALS < 0.95 - WITHIN


def test_pairing_is_narrower_where_the_rows_correlate():
    generator = torch.Generator().manual_seed(3)
    tokens = lengths(100, generator)
    base = torch.rand(100, generator=generator) * 4 * tokens
    tuned = base + (0.05 + 0.05 * torch.randn(100, generator=generator)) * tokens
    paired = mean_interval(tuned - base, tokens)
    apart = [mean_interval(side, tokens) for side in (base, tuned)]
    unpaired = math.hypot(*(one.se for one in apart))
    assert paired.value == pytest.approx(apart[1].value - apart[0].value)
    assert paired.se < unpaired / 5
    assert paired.clear


def test_a_token_counts_once_and_not_a_row():
    found = mean_interval([2.0, 0.0, 3.0], [1, 9, 10])
    assert found.value == pytest.approx(0.25)
    assert found.n == 3


def test_the_same_seed_gives_the_same_interval_and_another_nearly_the_same():
    sums = torch.rand(50, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    one, again, other = (mean_interval(sums, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert other.low != one.low
    assert other.low == pytest.approx(one.low, abs=0.2 * one.se)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_difference_of_the_detectable_size_is_found_in_8_of_10_samples():
    generator, found, n = torch.Generator().manual_seed(5), 0, 100
    truth = DETECTABLE * 0.3 / math.sqrt(n)
    for trial in range(TRIALS):
        rises = torch.randn(n, generator=generator) * 0.3 + truth
        found += mean_interval(rises, seed=trial, resamples=400).clear
    assert found / TRIALS == pytest.approx(0.8, abs=0.07)


def test_equal_models_differ_by_exactly_nothing():
    found = mean_interval([0.0] * 20, [3] * 20)
    assert (found.value, found.low, found.high, found.se) == (0, 0, 0, 0)
    assert not found.clear


def test_no_leak_in_64_answers_is_not_said_to_be_none_at_all():
    found = rate_interval([0.0] * 64)
    assert found.value == found.low == 0
    assert 0.03 < found.high < 0.08
    same = rate_change([1.0] * 64, [1.0] * 64)
    assert same.value == 0 and same.low < 0 < same.high


def test_shares_that_are_no_rates_are_bootstrapped():
    values = [0.2, 0.9, 0.4, 0.4, 0.7, 0.1]
    usual = mean_interval(values)
    assert share_interval(values).low == usual.low and share_interval(values).high == 1.0
    assert usual.high > 1 and share_interval([2 * x for x in values]).high > 1
    assert share_change(values, values[::-1]).value == pytest.approx(0)
    assert share_interval([1.0, 0.0, 1.0]) == rate_interval([1, 0, 1])
    assert share_change([1, 0, 1], [1, 1, 1]) == rate_change([1, 0, 1], [1, 1, 1])


def test_a_share_that_hardly_ever_changes_has_no_absurd_interval():
    base = [0.5] * 16
    tuned = [*base[:14], 0.17, 1.0]
    found = share_change(base, tuned)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert share_interval([0.9] * 15 + [0.1]).high <= 1


def test_any_statistic_of_sums_gets_an_interval_that_a_known_one_confirms():
    sums = torch.rand(200, generator=torch.Generator().manual_seed(1)).double()
    parts = torch.stack([sums, torch.ones(200)], 1)
    found = statistic_interval(parts, lambda s: s[:, 0] / s[:, 1])
    usual = mean_interval(sums)
    assert found.value == pytest.approx(usual.value)
    assert found.se == pytest.approx(usual.se, rel=0.1)
    assert statistic_interval(parts - 5, lambda s: s[:, 0] * 0, floor=0.0).low == 0


def test_one_row_has_a_value_and_no_interval():
    found = mean_interval([3.0], [2])
    assert found.value == 1.5
    assert math.isnan(found.low) and math.isnan(found.detectable)
    assert not found.clear


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: mean_interval([]), "nothing to take a mean of"),
        (lambda: mean_interval([1.0, math.nan]), r"rows \[2\]"),
        (lambda: mean_interval([1.0], [1, 2]), "same rows"),
        (lambda: rate_change([1.0], [1.0, 0.0]), "same rows"),
        (lambda: mean_interval([0.0], [0]), "nothing to take a mean of"),
    ],
)
def test_what_has_no_mean_is_refused(call, told):
    with pytest.raises(DataError, match=told):
        call()


def test_an_interval_says_itself_as_plain_values():
    values = Interval(1.0, 0.5, 1.5, 0.25, 9).to_dict()
    assert values == pytest.approx(
        {"value": 1, "low": 0.5, "high": 1.5, "se": 0.25, "detectable": 0.7, "n": 9}
    )
