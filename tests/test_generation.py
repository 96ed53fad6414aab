"""generate(): what it answers, why an answer stopped, and that it leaves no trace."""

import copy
import json
import random
import threading

import pytest

from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.generation import (
    DEMO_PROMPTS,
    Generations,
    adapter_state,
    generate,
    read_prompts,
    terminators,
)

PROMPTS = [
    "Say what number 3 is.",
    "Sleep?",
    {"instruction": "Describe the river bank.", "input": "The quick brown fox jumps over it. " * 6},
    "Write code to calculate prime numbers.",
]


def load_base(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture()
def base(tiny_model_dir):
    return load_base(tiny_model_dir)


@pytest.fixture()
def peft_model(base):
    """The tiny model with an untrained LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"]
        )
        return get_peft_model(base, config)


def train_adapter(model, size=0.3):
    """Stands in for training: gives every lora_B a value."""
    import torch

    source = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = size * torch.randn(weight.shape, generator=source)
    return model


def texts(answers):
    return [answer.text for answer in answers]


def state_of(model, tokenizer):
    """Everything a caller could notice, as values."""
    return {
        "mode": {name: module.training for name, module in model.named_modules()},
        "checkpointing": {
            name: vars(module).get("gradient_checkpointing")
            for name, module in model.named_modules()
        },
        "off": {name: vars(m).get("_disable_adapters") for name, m in model.named_modules()},
        "grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "use_cache": model.config.use_cache,
        "generation_config": id(model.generation_config),
        "defaults": model.generation_config.to_dict(),
        "padding": (tokenizer.padding_side, tokenizer.pad_token_id),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"temperature": 0.9, "top_p": 0.9, "seed": 11},
    ],
    ids=["greedy", "greedy with penalties", "sampled"],
)
def test_answers_in_a_batch_equal_answers_one_by_one(base, tiny_tokenizer, settings):
    batched = generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=24, batch_size=4, **settings)
    alone = [
        generate(base, tiny_tokenizer, [prompt], max_new_tokens=24, **settings)[0]
        for prompt in PROMPTS
    ]
    assert list(batched) == alone
    assert len(set(texts(alone))) == len(PROMPTS), "the prompts must differ to show an order"


def test_padding_with_eos_does_not_change_a_penalised_answer(base, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with_eos_liked(base)
    settings = {"max_new_tokens": 16, "repetition_penalty": 3.0}
    batched = generate(base, tokenizer, PROMPTS, batch_size=4, **settings)
    alone = generate(base, tokenizer, PROMPTS, batch_size=1, **settings)
    assert list(batched) == list(alone)
    assert batched.eos_rate > 0, "the trial needs answers that stop"


def with_eos_liked(model):
    """Makes </s> (id 2) likely at each step, so that answers of different lengths stop."""
    import torch

    with torch.no_grad():
        model.lm_head.weight[2] *= 4
    return model


def test_an_answer_that_the_model_ends_has_stop_eos_and_one_that_is_cut_has_length(
    base, tiny_tokenizer
):
    free = generate(base, tiny_tokenizer, ["Sleep?"], max_new_tokens=12)[0]
    assert (free.stop, free.tokens) == ("length", 12)
    base.generation_config.eos_token_id = [2, third_token(base, tiny_tokenizer)]
    ended = generate(base, tiny_tokenizer, ["Sleep?"], max_new_tokens=12)[0]
    assert ended.stop == "eos", "an end-of-turn token of the generation config also ends an answer"
    assert ended.tokens < 12
    assert free.text.startswith(ended.text)


def third_token(model, tokenizer):
    """A token that the free answer to "Sleep?" has from its third place on and not before."""
    import torch

    from lwf_unsloth.records import prompt_ids

    prompt = prompt_ids(tokenizer, "Sleep?")
    out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    new = out[0, len(prompt) :].tolist()
    return next(token for at, token in enumerate(new) if at >= 2 and token not in new[:at])


class Scripted:
    """Wraps a model so that `generate` returns given answers; the rest is the model's own."""

    def __init__(self, model, answers):
        self.__dict__.update(model=model, answers=answers, seen=[])

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, input_ids, **settings):
        import torch

        self.seen.append((input_ids, settings))
        width = max(map(len, self.answers))
        pad = settings["pad_token_id"]
        rows = [row + [pad] * (width - len(row)) for row in self.answers[: len(input_ids)]]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_text_after_the_end_is_dropped_and_the_end_is_not_hidden(base, tiny_tokenizer):
    hello = tiny_tokenizer("the river", add_special_tokens=False).input_ids
    model = Scripted(base, [[*hello, 2, *hello]])
    answer = generate(model, tiny_tokenizer, "Sleep?", max_new_tokens=20)[0]
    assert (answer.text, answer.stop, answer.tokens) == ("the river", "eos", len(hello))


def test_an_answer_as_long_as_the_limit_that_ends_with_eos_is_not_called_cut(base, tiny_tokenizer):
    hello = tiny_tokenizer("the river", add_special_tokens=False).input_ids
    model = Scripted(base, [[*hello, 2]])
    answer = generate(model, tiny_tokenizer, "Sleep?", max_new_tokens=len(hello) + 1)[0]
    assert answer.stop == "eos"


def test_other_special_tokens_that_the_model_writes_are_shown(base, tiny_tokenizer):
    hello = tiny_tokenizer("the river", add_special_tokens=False).input_ids
    model = Scripted(base, [[1, *hello, 0, *hello]])
    answer = generate(model, tiny_tokenizer, "Sleep?", max_new_tokens=20)[0]
    assert answer.text == "<s>the river<pad>the river"
    assert answer.stop == "length"


def test_a_prompt_that_the_model_repeats_stays_in_the_answer(base, tiny_tokenizer):
    echo = tiny_tokenizer("### Instruction:\nSleep?", add_special_tokens=False).input_ids
    answer = generate(Scripted(base, [[*echo, 2]]), tiny_tokenizer, "Sleep?", max_new_tokens=50)[0]
    assert answer.text == "### Instruction:\nSleep?"


def test_the_model_gets_the_token_ids_of_training_padded_on_the_left(base, tiny_tokenizer):
    from lwf_unsloth.records import prompt_ids

    model = Scripted(base, [[2], [2]])
    generate(model, tiny_tokenizer, PROMPTS[:2], batch_size=2)
    ((sent, settings),) = model.seen
    wanted = sorted([prompt_ids(tiny_tokenizer, prompt) for prompt in PROMPTS[:2]], key=len)
    for row, mask, ids in zip(sent, settings["attention_mask"], reversed(wanted), strict=True):
        assert row[mask.bool()].tolist() == ids
        assert row[~mask.bool()].tolist() == [0] * (len(row) - len(ids))
        assert mask.tolist() == sorted(mask.tolist())
        assert ids.count(1) == 1


def test_sampling_defaults_of_the_model_do_not_leak_into_greedy(base, tiny_tokenizer):
    plain = generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=16)
    base.generation_config.update(
        do_sample=True,
        temperature=1.7,
        top_k=3,
        repetition_penalty=1.8,
        no_repeat_ngram_size=2,
        suppress_tokens=[5, 6, 7],
        min_new_tokens=16,
        num_beams=2,
    )
    assert list(generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=16)) == list(plain)
    assert base.generation_config.temperature == 1.7


def test_an_untrained_adapter_answers_as_the_base_does_in_either_order(peft_model, tiny_tokenizer):
    settings = {"max_new_tokens": 16}
    on = generate(peft_model, tiny_tokenizer, PROMPTS, **settings)
    off = generate(peft_model, tiny_tokenizer, PROMPTS, adapter=False, **settings)
    again = generate(peft_model, tiny_tokenizer, PROMPTS, **settings)
    assert texts(on) == texts(off) == texts(again)
    assert [(g.adapter, g.weights) for g in (on, off)] == [("untrained", "base"), ("off", "base")]


def test_adapter_false_gives_the_base_model_after_training(
    peft_model, tiny_model_dir, tiny_tokenizer
):
    train_adapter(peft_model)
    settings = {"max_new_tokens": 16}
    wanted = generate(load_base(tiny_model_dir), tiny_tokenizer, PROMPTS, **settings)
    off = generate(peft_model, tiny_tokenizer, PROMPTS, adapter=False, **settings)
    on = generate(peft_model, tiny_tokenizer, PROMPTS, **settings)
    assert texts(off) == texts(wanted)
    assert texts(on) != texts(wanted)
    assert (on.adapter, off.adapter, wanted.adapter) == ("on", "off", "none")


def test_the_fingerprint_names_the_weights_that_answered(peft_model):
    train_adapter(peft_model)
    first = adapter_state(peft_model)
    assert first == adapter_state(peft_model)
    with peft_model.disable_adapter():
        assert adapter_state(peft_model) == ("off", "base")
    train_adapter(peft_model, size=0.31)
    assert adapter_state(peft_model) != first


def test_an_adapter_that_cannot_be_switched_off_is_refused(peft_model, tiny_tokenizer):
    train_adapter(peft_model).merge_adapter()
    with pytest.raises(ModelError, match="merged into the weights"):
        generate(peft_model, tiny_tokenizer, "Sleep?", adapter=False)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_generation_leaves_model_and_tokenizer_as_they_were(
    peft_model, tiny_tokenizer, adapter, fails, monkeypatch
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = "right"
    peft_model.gradient_checkpointing_enable()
    peft_model.train()
    peft_model.get_base_model().model.layers[0].eval()
    peft_model.config.use_cache = False
    for name, weight in peft_model.named_parameters():
        if "layers.1" in name:
            weight.requires_grad_(False)
    before = state_of(peft_model, tokenizer)
    if fails:
        head = peft_model.get_base_model().lm_head
        monkeypatch.setattr(head, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            generate(peft_model, tokenizer, PROMPTS, adapter=adapter)
    else:
        generate(peft_model, tokenizer, PROMPTS, max_new_tokens=3, adapter=adapter)
    assert state_of(peft_model, tokenizer) == before
    assert {True, False} <= set(before["mode"].values()) & set(before["grad"].values())


def test_no_global_random_state_is_used(base, tiny_tokenizer):
    import numpy as np
    import torch

    torch.manual_seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=5, temperature=1.0, seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_a_seed_repeats_a_sample_whatever_the_order_of_the_prompts(base, tiny_tokenizer):
    settings = {"max_new_tokens": 16, "temperature": 1.2}
    first = generate(base, tiny_tokenizer, PROMPTS, seed=1, **settings)
    turned = generate(base, tiny_tokenizer, PROMPTS[::-1], seed=1, **settings)
    other = generate(base, tiny_tokenizer, PROMPTS, seed=2, **settings)
    assert texts(first) == texts(turned)[::-1]
    assert texts(first) != texts(other)


def test_a_prompt_asked_twice_is_sampled_twice(base, tiny_tokenizer):
    settings = {"max_new_tokens": 16, "temperature": 1.5}
    twice = generate(base, tiny_tokenizer, ["Sleep?", "Sleep?"], **settings)
    assert twice[0].text != twice[1].text


def steps_of_training(model, tokenizer, sample_at=()):
    """Losses of four steps, with answers sampled in between where asked."""
    import torch

    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, *range(20, 50)], [1, *range(60, 90)]])
    losses = []
    for step in range(4):
        half = model(input_ids=ids, labels=ids).loss  # dropout is on: the random state counts
        half.backward()
        if step in sample_at:
            generate(model, tokenizer, PROMPTS[:2], max_new_tokens=4, temperature=1.0)
            generate(model, tokenizer, PROMPTS[:2], max_new_tokens=4, adapter=False)
        model(input_ids=ids.flip(0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(half.item())
    return losses


def test_training_with_samples_in_between_equals_training_without(peft_model, tiny_tokenizer):
    twin = copy.deepcopy(peft_model)
    with_samples = steps_of_training(peft_model, tiny_tokenizer, sample_at=(0, 2))
    assert with_samples == steps_of_training(twin, tiny_tokenizer)
    assert len(set(with_samples)) == 4


def test_the_real_model_trains_the_same_after_generating(tiny_peft):
    model, tokenizer = tiny_peft(lora_dropout=0.2)
    side = tokenizer.padding_side
    with_samples = steps_of_training(model, tokenizer, sample_at=(0, 1))
    assert tokenizer.padding_side == side
    twin, _ = tiny_peft(lora_dropout=0.2)
    assert with_samples == steps_of_training(twin, tokenizer)


def test_the_real_model_answers_in_a_batch_as_one_by_one(tiny_peft):
    model, tokenizer = tiny_peft()
    train_adapter(model)
    batched = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    alone = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1)
    assert list(batched) == list(alone)
    off = generate(model, tokenizer, PROMPTS, max_new_tokens=12, adapter=False)
    assert texts(off) != texts(batched)
    assert off.model == "tiny-llama, 4-bit"


def test_another_thread_is_refused_while_the_model_is_in_use(peft_model, tiny_tokenizer):
    from lwf_unsloth.locks import model_lock

    caught = []

    def ask():
        try:
            generate(peft_model, tiny_tokenizer, "Sleep?", max_new_tokens=1)
        except ModelError as error:
            caught.append(str(error))

    with model_lock(peft_model.get_base_model(), "training"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        generate(peft_model, tiny_tokenizer, "Sleep?", max_new_tokens=1)  # the same thread may
    assert len(caught) == 1
    assert "training" in caught[0]
    ask()
    assert len(caught) == 1, "free again afterwards"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"batch_size": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0, "temperature": 1},
        {"top_p": 1.1, "temperature": 1},
        {"top_p": 0.9},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": -1},
        {"seed": "a"},
    ],
)
def test_a_setting_out_of_range_is_named(base, tiny_tokenizer, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        generate(base, tiny_tokenizer, "Sleep?", **settings)


def test_an_answer_that_does_not_fit_the_context_is_refused_with_the_number_that_fits(
    base, tiny_tokenizer
):
    with pytest.raises(ConfigError, match="512 positions") as error:
        generate(base, tiny_tokenizer, "Sleep?", max_new_tokens=500)
    fits = int(str(error.value).split("Set max_new_tokens to ")[1].split()[0])
    assert generate(base, tiny_tokenizer, "Sleep?", max_new_tokens=fits)[0].tokens <= fits
    with pytest.raises(ConfigError):
        generate(base, tiny_tokenizer, "Sleep?", max_new_tokens=fits + 1)


def test_a_prompt_longer_than_the_loaded_length_is_refused_instead_of_cut(
    base, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(base, "max_seq_length", 16, raising=False)
    with pytest.raises(ConfigError, match="max_seq_length 16: the end of the prompt"):
        generate(base, tiny_tokenizer, "Sleep?", max_new_tokens=4)


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [""],
        ["ok", "  "],
        [{"input": "x"}],
        [{"instruction": None}],
        [3],
        [{"instruction": "a", "input": float("nan")}],
    ],
)
def test_a_prompt_without_an_instruction_is_refused(prompts):
    with pytest.raises(DataError):
        read_prompts(prompts)


def test_one_text_is_one_prompt_and_rows_of_a_dataset_are_prompts():
    from datasets import Dataset

    assert read_prompts("Sleep?") == [("Sleep?", "")]
    rows = Dataset.from_list([{"instruction": "a", "input": None, "output": "x"}])
    assert read_prompts(rows) == [("a", "")]
    assert len(read_prompts(DEMO_PROMPTS)) == 5


def test_a_model_without_any_terminator_is_refused(base, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    base.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="eos_token"):
        terminators(base, tokenizer)


def test_generations_survive_json(base, tiny_tokenizer):
    made = generate(base, tiny_tokenizer, PROMPTS, max_new_tokens=4, label="before")
    assert Generations.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.to_dict()["answers"][2]["input"].startswith("The quick")
    assert made.mean_tokens == sum(answer.tokens for answer in made) / 4
