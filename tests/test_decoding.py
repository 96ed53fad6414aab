"""The choice of the next token: settings and rules, without a model."""

import math

import pytest
import torch

from lwf_unsloth.backend import prepare
from lwf_unsloth.decoding import Decoding, TokenRules, row_seed, uncompiled_decoding


@pytest.fixture(autouse=True)
def prepared():
    prepare()


def rules(settings, paddings=(0,), seeds=(7,)):
    return TokenRules(Decoding(**settings), list(paddings), list(seeds))


def test_greedy_without_penalties_leaves_the_scores_alone():
    import torch

    scores = torch.tensor([[0.1, 2.0, -1.0]])
    assert rules({})(torch.tensor([[1]]), scores) is scores


def test_sampling_draws_each_token_as_often_as_its_probability_says():
    import torch

    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    temperature = 2.0
    rule = rules({"temperature": temperature})
    scores = (wanted.log() * temperature).unsqueeze(0)
    draws = 4000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts += rule(torch.tensor([[0]]), scores)[0].isfinite().float()
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((counts / draws - wanted).abs() < 4 * error).all()


def test_top_p_never_draws_from_the_tail():
    import torch

    scores = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log()
    rule = rules({"temperature": 1.0, "top_p": 0.85})
    drawn = {rule(torch.tensor([[0]]), scores).argmax().item() for _ in range(300)}
    assert drawn == {0, 1}


def test_a_token_without_probability_is_never_drawn():
    import torch

    scores = torch.tensor([[-math.inf, 0.0, -math.inf]])
    rule = rules({"temperature": 1.0})
    assert {rule(torch.tensor([[0]]), scores).argmax().item() for _ in range(100)} == {1}


def test_the_repetition_penalty_sees_a_rows_own_tokens_and_not_its_padding():
    import torch

    scores = torch.tensor([[2.0, 2.0, 2.0, -2.0], [2.0, 2.0, 2.0, -2.0]])
    ids = torch.tensor(
        [[0, 0, 1, 3], [0, 1, 3, 2]]
    )  # 0 pads the first row, is a token of the second
    out = rules({"repetition_penalty": 2.0}, paddings=(2, 0), seeds=(1, 2))(ids, scores)
    assert out.tolist() == [[2.0, 1.0, 2.0, -4.0], [1.0, 1.0, 1.0, -4.0]]


def test_no_ngram_comes_twice():
    import torch

    out = rules({"no_repeat_ngram_size": 2}, paddings=(1,))(
        torch.tensor([[0, 1, 2, 3, 1]]), torch.zeros(1, 4)
    )
    assert out[0].tolist() == [0.0, 0.0, -math.inf, 0.0]


def test_a_rows_seed_comes_from_its_prompt_and_the_calls_seed():
    seeds = {row_seed(0, [1, 2], 0), row_seed(0, [1, 2], 1), row_seed(1, [1, 2], 0)}
    assert len(seeds | {row_seed(0, [12], 0)}) == 4
    assert row_seed(0, [1, 2], 0) == row_seed(0, [1, 2], 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_caption_names_what_is_on():
    assert str(Decoding(max_new_tokens=96)) == "greedy, max_new_tokens 96, seed 0"
    line = str(
        Decoding(temperature=0.7, top_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=3, seed=4)
    )
    for part in ("temperature 0.7", "top_p 0.9", "penalty 1.1", "ngram_size 3", "seed 4"):
        assert part in line


def test_the_generic_path_of_unsloth_decodes_uncompiled_and_its_model_is_left_as_it_was():
    compiled = torch.compile(lambda x: torch.compiler.is_compiling())
    seen = []

    class Generic(torch.nn.Module):
        _supports_static_cache = True

        def unsloth_base_fast_generate(self):
            seen.append((self._supports_static_cache, compiled(torch.ones(1))))

    model = Generic()
    model.generate = model.unsloth_base_fast_generate
    with uncompiled_decoding(model):
        model.generate()
    assert seen == [(False, False)] and model._supports_static_cache
    assert "_supports_static_cache" not in vars(model)

    other = Generic()
    other.generate = lambda: seen.append(other._supports_static_cache)
    with uncompiled_decoding(other):
        other.generate()
    assert seen[-1] is True, "fast decoding of a model's own is not touched"
