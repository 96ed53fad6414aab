"""Answers of a model to a list of prompts: batched, repeatable, each with why it stopped."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import prepare
from lwf_unsloth.bars import batch_bar
from lwf_unsloth.checks import check_count
from lwf_unsloth.codec import Codec
from lwf_unsloth.decoding import Decoding, TokenRules, row_seed, uncompiled_decoding
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.forms import shaped
from lwf_unsloth.locks import innermost, kept_state, model_lock, why_not_base
from lwf_unsloth.records import prompts_ids
from lwf_unsloth.templates import get_template, text_tokenizer
from lwf_unsloth.trained_template import check_template

DEMO_PROMPTS = (
    "Explain the importance of sleep in simple terms.",
    "What supports the U.S. economy?",
    "What were the causes of the American Depression?",
    "Write code to calculate prime numbers.",
    "Summarize the GDPs of the United States, Japan, and China with a table.",
)
"""The five prompts of the Alpaca demo."""

Prompt = str | Mapping[str, Any]


@checked()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    adapter: bool = True,
    label: str = "",
) -> Generations:
    """Answers prompts in the served template; greedy unless a temperature is given.

    The settings are these arguments alone: sampling defaults that a model brings along do not
    count. Model and tokenizer are left as they were (mode, adapter, gradients, cache, padding
    side), and no global random state is used, so sampling in the midst of training does not change
    the training.

    Args:
        model: The model, PEFT or not.
        tokenizer: Its tokenizer, which carries the prompt template.
        prompts: Instructions, or rows with `instruction` and optionally `input` (dicts, a Dataset);
            a row with `form` ("table", or a Form) asks for that form and begins its answer with it.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at a time; for speed and memory, the answers stay (up to GPU rounding).
        temperature: 0 is greedy, above 0 samples.
        top_p: Share of the probability that sampling draws from.
        repetition_penalty: Above 1 makes tokens already in prompt and answer less likely.
        no_repeat_ngram_size: No n-gram of this size twice; 0 is off.
        seed: Seed of the sampling.
        adapter: False answers with the adapter off: the base model, also after training.
        label: A name for the answers ("before").

    Returns:
        The answers in the order of the prompts, with settings and source.

    Raises:
        ConfigError: A setting out of range, or a prompt that does not fit the model's context.
        DataError: No prompts, or a row without an instruction.
        ModelError: The model is in use by another thread, or its adapter cannot be switched off.
    """
    asked = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    forms = [shaped(prompt) for prompt in asked]
    rows = read_prompts([prompt for prompt, _ in forms])
    prefixes = [prefix for _, prefix in forms]
    decoding = Decoding(
        max_new_tokens, temperature, top_p, repetition_penalty, no_repeat_ngram_size, seed
    )
    check_count("batch_size", batch_size)
    prepare()
    with model_lock(model, "generating"), kept_state(model, tokenizer), _adapter(model, adapter):
        check_template(model, tokenizer)
        answers = _answer_all(model, tokenizer, rows, prefixes, decoding, batch_size)
        state, weights = adapter_state(model)
    name = get_template(tokenizer).name
    return Generations(
        tuple(answers), decoding, label, model_name(model), weights, state, template=name
    )


def continue_ids(
    model: Any,
    tokenizer: Any,
    starts: list[list[int]],
    seeds: list[int],
    decoding: Decoding,
    *,
    adapter: bool = True,
) -> list[tuple[list[int], bool]]:
    """Continues token ids as they stand, all in one batch; the model is left as it was found.

    Args:
        model: The model, PEFT or not.
        tokenizer: Its tokenizer.
        starts: Token ids of each row, one or more; no template is put around them.
        seeds: Each row's own seed.
        decoding: The settings.
        adapter: False continues with the adapter off.

    Returns:
        For each row the new ids, without the terminator, and whether the model ended there by
        itself.

    Raises:
        ConfigError: A row does not fit the model's context.
        ModelError: The model is in use by another thread, or its adapter cannot be switched off.
    """
    prepare()
    with model_lock(model, "writing"), kept_state(model, tokenizer), _adapter(model, adapter):
        _check_context(model, starts, decoding.max_new_tokens)
        inner = text_tokenizer(tokenizer)
        ends = terminators(model, inner)
        _switch_to_inference(model)
        new = _run_batch(model, inner, starts, seeds, decoding, ends)
    found = []
    for ids in new:
        end = next((at for at, token in enumerate(ids) if token in ends), None)
        found.append((ids[:end], end is not None))
    return found


def read_prompts(prompts: Prompt | Iterable[Prompt]) -> list[tuple[str, str]]:
    """Prompts of any accepted form as (instruction, input).

    Raises:
        DataError: There are none, or one has no instruction; names its number.
    """
    if isinstance(prompts, (str, Mapping)):
        prompts = [prompts]
    rows = []
    for number, prompt in enumerate(prompts):
        row = {"instruction": prompt} if isinstance(prompt, str) else prompt
        row = row if isinstance(row, Mapping) else {}
        instruction, given = row.get("instruction"), row.get("input")
        given = "" if given is None else given
        if not (isinstance(instruction, str) and instruction.strip() and isinstance(given, str)):
            raise DataError(
                f"Prompt {number} is {prompt!r:.120}, but a prompt must be a text or a row with a "
                "non-empty text `instruction` (and optionally a text `input`): there is nothing to "
                "answer. Drop or fill it."
            )
        rows.append((instruction, given))
    if not rows:
        raise DataError("The list of prompts is empty: give at least one, e.g. DEMO_PROMPTS.")
    return rows


def _answer_all(
    model: Any,
    tokenizer: Any,
    rows: list[tuple[str, str]],
    prefixes: list[str],
    decoding: Decoding,
    batch_size: int,
) -> list[Answer]:
    """Runs all batches, longest prompts first (a batch that does not fit shows at once)."""
    starts = Codec(text_tokenizer(tokenizer)).responses(prefixes)  # as an answer in training
    asked = prompts_ids(tokenizer, rows)
    prompts = [ids + start for ids, start in zip(asked, starts, strict=True)]
    _check_context(model, prompts, decoding.max_new_tokens)
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for ids in prompts:
        seeds.append(row_seed(decoding.seed, ids, seen[tuple(ids)]))
        seen[tuple(ids)] += 1
    tokenizer = text_tokenizer(tokenizer)
    ends = terminators(model, tokenizer)
    _switch_to_inference(model)
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    answers: dict[int, Answer] = {}
    for batch in batch_bar(batches, "generate"):
        new = _run_batch(
            model, tokenizer, [prompts[i] for i in batch], [seeds[i] for i in batch], decoding, ends
        )
        for i, ids in zip(batch, new, strict=True):
            answer = _read_answer(tokenizer, rows[i], ids, ends, starts[i])
            answers[i] = replace(answer, prefix=prefixes[i])
    return [answers[i] for i in range(len(rows))]


def _run_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    seeds: list[int],
    decoding: Decoding,
    ends: list[int],
) -> list[list[int]]:
    """New token ids of each prompt; padded here, on the left, whatever the tokenizer's own side."""
    import torch

    width = max(map(len, prompts))
    paddings = [width - len(ids) for ids in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * n + row for n, row in zip(paddings, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in paddings])
    with uncompiled_decoding(model):
        out: torch.Tensor = model.generate(  # (B, width + new)
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=ends,
            logits_processor=[TokenRules(decoding, paddings, seeds)],
        )
    return out[:, width:].tolist()


def _read_answer(
    tokenizer: Any, row: tuple[str, str], ids: list[int], ends: list[int], start: list[int]
) -> Answer:
    """Cuts at the first terminator, by ids: the text alone cannot tell an end from a cut."""
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    kept = start + (ids if end is None else ids[:end])
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(row[0], text, "length" if end is None else "eos", len(kept), row[1])


def terminators(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: the tokenizer's EOS, then the generation config's.

    Raises:
        ModelError: There is none.
    """
    config = getattr(innermost(model), "generation_config", None)
    found = [tokenizer.eos_token_id]
    more = getattr(config, "eos_token_id", None)
    found += more if isinstance(more, (list, tuple)) else [more]
    ends = list(dict.fromkeys(int(token) for token in found if token is not None))
    if not ends:
        raise ModelError(
            "Neither the tokenizer nor the generation config names an end-of-text token, so no "
            "answer could ever stop. Set tokenizer.eos_token to the token that ends a text."
        )
    return ends


def context_limits(model: Any) -> tuple[int | None, int | None]:
    """Positions of the model, and the length it was loaded for, beyond which Unsloth's CUDA path
    cuts a prompt; None where one is not known.
    """
    config = getattr(innermost(model), "config", None)
    config = getattr(config, "text_config", config)
    positions = getattr(config, "max_position_embeddings", None)
    loaded = getattr(model, "max_seq_length", None)
    known = [limit if isinstance(limit, int) else None for limit in (positions, loaded)]
    return known[0], known[1]


def _check_context(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises a ConfigError when the longest prompt and its answer exceed the model's positions."""
    limit, loaded = context_limits(model)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    length = len(prompts[longest])
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigError(
            f"Prompt {longest} has {length} tokens and max_new_tokens is {max_new_tokens}, "
            f"together {length + max_new_tokens}, but the model has {limit} positions: beyond them "
            f"it writes noise. Set max_new_tokens to {max(limit - length, 0)} or less, or shorten "
            "the prompt."
        )
    if loaded is not None and length > loaded:
        raise ConfigError(
            f"Prompt {longest} has {length} tokens, but the model was loaded with max_seq_length "
            f"{loaded}: the end of the prompt would be cut off unseen. Load it with "
            f"max_seq_length={length} or more, or shorten the prompt."
        )


def _switch_to_inference(model: Any) -> None:
    """Decoding mode, without generation defaults of the model's own (kept_state undoes it)."""
    from transformers import GenerationConfig

    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = GenerationConfig()
    for_inference = getattr(model, "for_inference", None)  # Unsloth's fast decoding, where it is
    if callable(for_inference):
        for_inference()
    else:
        model.eval()


@contextmanager
def _adapter(model: Any, on: bool) -> Iterator[None]:
    """The adapter as it stands, or off (kept_state restores it)."""
    if on or not hasattr(model, "disable_adapter"):
        yield
        return
    if why := why_not_base(model):
        raise ModelError(
            f"adapter=False asks for the base model, but the adapter {why}, so switching it off "
            "does not give the base model back. Load the base model by itself and generate with "
            "that."
        )
    with model.disable_adapter():
        yield


def adapter_state(model: Any) -> tuple[str, str]:
    """Whether an adapter acts on `model` now, and a fingerprint of the weights that act.

    Returns:
        "none", "off", "untrained" or "on"; and "base" or a hash of the active weights and scale.
    """
    layers = [module for module in model.modules() if "_disable_adapters" in vars(module)]
    if not layers:
        return "none", "base"
    if all(vars(layer)["_disable_adapters"] for layer in layers):
        return "off", "base"
    active = {name for layer in layers for name in layer.active_adapters}
    digest, changes = hashlib.sha256(), False
    for name, weight in sorted(model.named_parameters()):
        if active.isdisjoint(name.split(".")):
            continue
        changes = changes or ("lora_A" not in name and bool(weight.detach().any()))
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    for layer in layers:
        scaling = getattr(layer, "scaling", {})
        digest.update(repr([scaling.get(name) for name in sorted(active)]).encode())
    return ("on", digest.hexdigest()[:16]) if changes else ("untrained", "base")


def model_name(model: Any) -> str:
    """Name of the model for captions: hub id or folder name, with its bits where known."""
    loaded = getattr(model, "lwf_loaded", None)
    if loaded is not None:
        return f"{loaded.base}, {loaded.bits}-bit"
    config = getattr(innermost(model), "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
