"""How the next token is chosen: settings, checked once, and rules that do not depend on the batch.

A row's rules see that row's own tokens, never its padding or its neighbours, and a sampled row
draws from its own generator: the answer to a prompt is the same alone and in any batch, and no
global random state is used.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.locks import innermost

if TYPE_CHECKING:
    import torch

GENERIC_GENERATE = "unsloth_base_fast_generate"
"""Name of the function by which Unsloth replaces `generate` of models without fast decoding."""
STATIC_CACHE = "_supports_static_cache"


def _check(name: str, value: Any, kind: type, low: float, high: float, needed: str) -> None:
    """Raises a ConfigError unless `value` is a number of `kind` in [low, high]."""
    accepted = (int,) if kind is int else (int, float)
    number = isinstance(value, accepted) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, but must be {needed}.")


@dataclass(frozen=True)
class Decoding:
    """The settings that decide an answer, the same on both sides of a comparison."""

    max_new_tokens: int = 256
    """Most tokens an answer may have, 1 or more; an answer that reaches it has stop "length"."""
    temperature: float = 0.0
    """0 is greedy (the likeliest token each time); above 0 samples."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability, 0 < p <= 1."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens already in prompt or answer; 1 is off, 1.05 to 1.3 is usual."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice in prompt and answer; 0 is off."""
    seed: int = 0
    """Seed of the sampling; greedy does not use it."""

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            ConfigError: A value out of range, or top_p without sampling.
        """
        _check("max_new_tokens", self.max_new_tokens, int, 1, math.inf, "a whole number from 1")
        _check("temperature", self.temperature, float, 0, math.inf, "a number from 0 (greedy)")
        _check("top_p", self.top_p, float, 1e-9, 1, "a number above 0, at most 1 (off)")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            float,
            1e-9,
            math.inf,
            "above 0 (1 is off)",
        )
        _check("no_repeat_ngram_size", self.no_repeat_ngram_size, int, 0, math.inf, "from 0 (off)")
        _check("seed", self.seed, int, -math.inf, math.inf, "a whole number")
        if self.top_p < 1 and self.greedy:
            raise ConfigError(
                f"top_p is {self.top_p} but temperature is 0: greedy decoding takes the likeliest "
                "token, so top_p would do nothing. Set a temperature above 0 to sample, or leave "
                "top_p at 1."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def __str__(self) -> str:
        """One line for a table's caption."""
        how = "greedy" if self.greedy else f"temperature {self.temperature:g}, top_p {self.top_p:g}"
        extras = [
            f"repetition_penalty {self.repetition_penalty:g}" * (self.repetition_penalty != 1),
            f"no_repeat_ngram_size {self.no_repeat_ngram_size}" * (self.no_repeat_ngram_size > 0),
        ]
        parts = [how, f"max_new_tokens {self.max_new_tokens}", *extras, f"seed {self.seed}"]
        return ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)


def row_seed(seed: int, prompt: list[int], occurrence: int) -> int:
    """Seed of one row: from its own prompt, so that order and neighbours do not matter.

    Args:
        seed: The seed of the whole call.
        prompt: Token ids of the row's prompt.
        occurrence: How often the same prompt came before: a repeated prompt is sampled anew.

    Returns:
        A number of 63 bits.
    """
    text = f"{seed}:{occurrence}:{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class TokenRules:
    """A logits processor for `generate(do_sample=False)` that applies a Decoding row by row.

    Transformers' own processors would also count the left padding: a repetition penalty on a model
    that pads with EOS keeps padded rows from stopping.
    """

    def __init__(self, decoding: Decoding, paddings: list[int], seeds: list[int]) -> None:
        """Prepares one batch.

        Args:
            decoding: The settings.
            paddings: Number of padding tokens on the left of each row, in the batch's order.
            seeds: Each row's own seed.
        """
        import torch
        from transformers import (
            NoRepeatNGramLogitsProcessor,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        self._paddings = paddings
        self._row_rules: list[Any] = []
        if decoding.repetition_penalty != 1:
            penalty = float(decoding.repetition_penalty)
            self._row_rules.append(RepetitionPenaltyLogitsProcessor(penalty))
        if decoding.no_repeat_ngram_size > 0:
            self._row_rules.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        self._warpers: list[Any] = []
        self._generators: list[torch.Generator] = []
        if not decoding.greedy:
            self._warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(decoding.top_p)))
            self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Applies the rules.

        Args:
            input_ids: (B, T) prompt and answer so far, left-padded.
            scores: (B, V) logits of the next token.

        Returns:
            (B, V) scores whose largest entry is the token to take.
        """
        import torch

        for rule in self._row_rules:
            rows = [
                rule(input_ids[i : i + 1, padding:], scores[i : i + 1])
                for i, padding in enumerate(self._paddings)
            ]
            scores = torch.cat(rows)  # (B, V)
        if not self._generators:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        return self._draw(scores)

    def _draw(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Draws one token a row by its cumulative distribution; the others become -inf."""
        import torch

        cumulative = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        draws = [
            torch.rand((), generator=one, dtype=torch.float64).item() for one in self._generators
        ]
        wanted = cumulative.new_tensor(draws).unsqueeze(1) * cumulative[:, -1:]  # (B, 1)
        token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


@contextmanager
def uncompiled_decoding(model: Any) -> Iterator[None]:
    """Decodes without torch.compile where Unsloth's generic path (Gemma 3 and later) would use it.

    That path forces a static KV cache and runs the blocks that it compiled for training, which
    torch.compile then traces anew as the sequence grows: minutes for answers of seconds (seen on
    an H100 with gemma-3-270m). Models with fast decoding of Unsloth's own are left alone.

    Args:
        model: The model, wrapped or not.
    """
    import torch

    base = innermost(model)
    generic = getattr(getattr(base, "generate", None), "__name__", "") == GENERIC_GENERATE
    if not generic:
        yield
        return
    had = vars(base).get(STATIC_CACHE)
    setattr(base, STATIC_CACHE, False)  # read by that path: a cache that grows
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if had is None:
            delattr(base, STATIC_CACHE)
        else:
            setattr(base, STATIC_CACHE, had)
