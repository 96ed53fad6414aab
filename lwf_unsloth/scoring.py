"""How well a model predicts the rows of a set, beside its base: NLL, KL and calibration.

A mean over a set is weighted by tokens: the sum over all scored tokens divided by their number,
never a mean of batch means (after nanochat's loss_eval). Tuned and base model are the same loaded
weights, the base with the adapter off, so that quantisation and dtype cannot differ between them.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import prepare
from lwf_unsloth.bars import batch_bar
from lwf_unsloth.batches import LwFCollator, token_roles
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.generation import adapter_state, model_name
from lwf_unsloth.hidden import model_hidden, model_logits
from lwf_unsloth.locks import kept_state, model_lock, why_not_base
from lwf_unsloth.objective import Objective, probe_tokens
from lwf_unsloth.records import encode_rows
from lwf_unsloth.switches import dropout_off
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher
from lwf_unsloth.templates import get_template
from lwf_unsloth.token_stats import BINS, TokenStats, calibration_error, token_stats
from lwf_unsloth.trained_template import check_template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How well a model predicts the rows of one set, beside its base; sums of each row in nats."""

    row_tokens: tuple[int, ...]
    """Scored tokens of each row, in the order of the rows."""
    row_nll: tuple[float, ...]
    """Negative log-likelihood of each row under the tuned model."""
    row_base_nll: tuple[float, ...] | None = None
    """The same under the base model; None where it was not measured."""
    row_kl: tuple[float, ...] | None = None
    """KL(base || tuned) of each row, summed over its scored tokens."""
    row_gaps: tuple[tuple[float, ...], ...] | None = None
    """Confidence less correctness of each row, summed by bin: what `ece` is made of."""
    row_base_gaps: tuple[tuple[float, ...], ...] | None = None
    """The same under the base model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the numbers: scored tokens, template, lengths, dtype, weights, data."""

    @property
    def rows(self) -> int:
        """Rows scored."""
        return len(self.row_tokens)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(self.row_tokens)

    @property
    def nll(self) -> float:
        """NLL of the tuned model, nats per token."""
        return math.fsum(self.row_nll) / self.tokens

    @property
    def base_nll(self) -> float | None:
        """NLL of the base model, nats per token."""
        return None if self.row_base_nll is None else math.fsum(self.row_base_nll) / self.tokens

    @property
    def kl(self) -> float | None:
        """KL(base || tuned), nats per token."""
        return None if self.row_kl is None else math.fsum(self.row_kl) / self.tokens

    @property
    def rise(self) -> float | None:
        """NLL of the tuned model over that of the base, nats per token; below 0 it fell."""
        return None if self.base_nll is None else self.nll - self.base_nll

    @property
    def ece(self) -> float | None:
        """Expected calibration error of the next token, 0 to 1; None where not measured."""
        return self._ece(self.row_gaps)

    @property
    def base_ece(self) -> float | None:
        """The same of the base model."""
        return self._ece(self.row_base_gaps)

    def _ece(self, gaps: tuple[tuple[float, ...], ...] | None) -> float | None:
        if gaps is None:
            return None
        return float(calibration_error(torch.tensor(gaps).sum(0), torch.tensor(self.tokens)))

    def __str__(self) -> str:
        """One line."""
        found = [f"NLL {self.nll:.4f}"]
        if self.base_nll is not None:
            found += [f"base {self.base_nll:.4f}", f"KL(base || tuned) {self.kl:.4f}"]
        return f"{', '.join(found)} nats per token ({self.rows} rows, {self.tokens} tokens)"

    def to_dict(self) -> dict[str, Any]:
        """The means and what decides them, for JSON."""
        return {
            "nll": self.nll,
            "base_nll": self.base_nll,
            "kl": self.kl,
            "ece": self.ece,
            "base_ece": self.base_ece,
            "rows": self.rows,
            "tokens": self.tokens,
            "unit": "nats per token",
            "settings": self.settings,
        }


@checked()
def score(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    max_length: int | None = 512,
    batch_size: int = 8,
    response_only: bool = True,
    base: Teacher | str | None = "adapter_off",
) -> Score:
    """Scores rows by the tuned model and its base; memory never holds rows x vocabulary.

    Args:
        model: From `load_model`, trained or not; left as it was found.
        tokenizer: Its tokenizer, which carries the prompt template.
        rows: Alpaca or text rows (Dataset or list of dicts).
        max_length: Tokens a row, no more than the models were loaded for; longer rows lose their
            tail, counted in `settings["cut"]`.
        batch_size: Rows at a time; for speed and memory, the numbers stay.
        response_only: Score the answer (and its EOS) alone, or the prompt too. Text rows are
            scored whole.
        base: "adapter_off"; a teacher, for an adapter that was trained before; None measures the
            tuned model alone, in half the time.

    Returns:
        The score, rows in their order.

    Raises:
        ConfigError: A setting out of range.
        DataError: No row has a token to score.
        ModelError: The model is in use by another thread, or its adapter off is not its base.
    """
    check_count("batch_size", batch_size)
    if isinstance(base, str) and base != "adapter_off":
        raise ConfigError(
            f'base is {base!r}, but must be "adapter_off", a teacher (make_teacher) or None: '
            "nothing else says which model to compare with."
        )
    if base is not None and not isinstance(base, str) and not hasattr(base, "head"):
        raise ConfigError(
            f"base is a {type(base).__name__}, but must be a teacher: only that is checked to have "
            "the same vocabulary. Take base=make_teacher(model, teacher=other_model)."
        )
    prepare()
    if isinstance(base, str):
        _check_off(model)
    for one in (model, base.model if isinstance(base, ModelTeacher) else None):
        max_length = _within(one, max_length)
    dataset, report = encode_rows(
        tokenizer, rows, max_length=max_length, train_on="response" if response_only else "all"
    )
    if report.dropped:
        logger.warning("Not every row is scored. %s", report)
    encoded = list(dataset)
    check_template(model, tokenizer)
    with model_lock(model, "scoring"), kept_state(model, tokenizer), scoring_mode(model):
        teacher = OwnTeacher(model) if isinstance(base, str) else base
        sums = _row_sums(model, tokenizer, encoded, teacher, batch_size, response_only)
        settings = {
            "scored": "response" if response_only else "all",
            "base": None if teacher is None else teacher.kind,
            "max_length": max_length,
            "cut": len(report.cut),
            "dropped": len(report.dropped),
            **_provenance(model, tokenizer, encoded),
        }
    tokens, nll, base_nll, kl = (part.tolist() for part in sums[:4])
    gaps, base_gaps = (_rounded(part) for part in (sums[4 : 4 + BINS], sums[4 + BINS :]))
    alone = teacher is None
    return Score(
        row_tokens=tuple(int(n) for n in tokens),
        row_nll=tuple(nll),
        row_base_nll=None if alone else tuple(base_nll),
        row_kl=None if alone else tuple(kl),
        row_gaps=gaps,
        row_base_gaps=None if alone else base_gaps,
        settings=settings,
    )


def _check_off(model: Any) -> None:
    """Refuses an adapter that leaves another model than the base when it is off.

    Raises:
        ModelError: It trains biases, or is merged into the weights.
    """
    if why := why_not_base(model):
        raise ModelError(
            f"The adapter {why}, so with the adapter off the model is not its base, and a KL to it "
            "would miss what was learned there. Give base=make_teacher(model), made before the "
            "training, or base=None."
        )


def _within(model: Any, max_length: int | None) -> int | None:
    """`max_length`, no more than the model was loaded for: Unsloth's CUDA path looks no further."""
    limit = getattr(model, "max_seq_length", None)
    if not isinstance(limit, int) or (max_length is not None and max_length <= limit):
        return max_length
    if max_length is not None:
        logger.warning(
            "max_length is %d, but the model was loaded for %d tokens: longer rows are cut there.",
            max_length,
            limit,
        )
    return limit


def _rounded(gaps: Tensor) -> tuple[tuple[float, ...], ...]:
    """(BINS, rows) as a tuple for each row; six digits are more than a calibration error has."""
    return tuple(tuple(round(gap, 6) for gap in row) for row in gaps.T.tolist())


@contextmanager
def scoring_mode(model: Any) -> Iterator[None]:
    """The kernels of training, which the teacher uses too, without dropout and without gradients.

    Eval mode takes other attention paths on CUDA; used inside `kept_state`, which puts all back.
    """
    for_training = getattr(model, "for_training", None)  # Unsloth's way out of its decoding mode
    if callable(for_training):
        for_training(use_gradient_checkpointing=False)
    else:
        model.train()
    dtype = getattr(model, "dtype", torch.float32)
    half = dtype in (torch.float16, torch.bfloat16)
    device = _device(model).type
    precision = torch.autocast(device, dtype=dtype) if half else nullcontext()
    with torch.no_grad(), dropout_off(model), precision:
        yield


def _device(model: Any) -> torch.device:
    return torch.device(model.get_input_embeddings().weight.device)


def _row_sums(
    model: nn.Module,
    tokenizer: Any,
    encoded: list[dict[str, Any]],
    teacher: Teacher | None,
    batch_size: int,
    response_only: bool,
) -> Tensor:
    """(4 + 2 BINS, rows) fp64 on the CPU: tokens, NLL, base NLL, KL and both models' calibration
    gaps of each row; longest rows first.
    """
    device = _device(model)
    collate = LwFCollator(tokenizer.pad_token_id)
    objective = Objective.of(model, teacher, probe_tokens(encoded[0], device))
    lengths = [len(row["input_ids"]) for row in encoded]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sums = torch.zeros(4 + 2 * BINS, len(lengths), dtype=torch.float64)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    for places in batch_bar(batches, "score"):
        batch = {name: t.to(device) for name, t in collate([encoded[i] for i in places]).items()}
        roles = token_roles(
            batch, "response" if response_only else "all", rehearsal_ce=True, with_kl=True
        )
        scored = roles.labels >= 0
        owner = torch.arange(len(places), device=device)[:, None].expand(scored.shape)[scored]
        stats = _token_stats(objective, model, batch, scored, roles.labels[scored])
        sums[:, places] = _summed(stats, owner, len(places)).cpu()
    return sums


def _token_stats(
    objective: Objective, model: nn.Module, batch: dict[str, Tensor], scored: Tensor, labels: Tensor
) -> TokenStats:
    """Reads the N scored tokens of a batch: one forward of each model."""
    ids, mask, teacher = batch["input_ids"], batch["attention_mask"], objective.teacher
    full = objective.full_logits
    ours = (model_logits if full else model_hidden)(model, ids, mask)[:, :-1][scored]  # (N, H or V)
    if teacher is None:
        return token_stats(ours, labels, None if full else objective.head)
    theirs = (teacher.logits if full else teacher.hidden)(ids, mask)[:, :-1][scored]
    if full:
        return token_stats(ours, labels, None, theirs)
    return token_stats(ours, labels, objective.head, theirs, teacher.head)


def _summed(stats: TokenStats, owner: Tensor, rows: int) -> Tensor:
    """(4 + 2 BINS, rows) sums over each row's tokens; zeros where there is no base."""
    nothing = torch.zeros_like(stats.tuned.nll)
    base_nll = nothing if stats.base is None else stats.base.nll
    kl = nothing if stats.kl is None else stats.kl
    values = torch.stack([torch.ones_like(nothing), stats.tuned.nll, base_nll, kl]).double()
    sums = values.new_zeros(4, rows).index_add_(1, owner, values)
    sides = [stats.tuned.gaps(owner, rows)]
    sides.append(torch.zeros_like(sides[0]) if stats.base is None else stats.base.gaps(owner, rows))
    return torch.cat([sums, *(side.T for side in sides)])


def _provenance(model: Any, tokenizer: Any, encoded: list[dict[str, Any]]) -> dict[str, Any]:
    """Which weights and which data gave the numbers."""
    state, weights = adapter_state(model)
    loaded = getattr(model, "lwf_loaded", None)
    ids = json.dumps([[row["input_ids"], row["labels"]] for row in encoded])
    return {
        "template": get_template(tokenizer).name,
        "bos": tokenizer.bos_token
        if encoded[0]["input_ids"][0] == tokenizer.bos_token_id
        else None,
        "model": model_name(model),
        "bits": getattr(loaded, "bits", None),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "adapter": state,
        "weights": weights,
        "data_sha256": hashlib.sha256(ids.encode()).hexdigest(),
    }
