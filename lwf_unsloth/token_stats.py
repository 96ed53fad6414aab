"""What one pass through the head tells of every scored token: NLL, KL to the base, calibration.

For reading alone, without gradients: two head products a token serve all numbers of both models,
by chunks, so rows x vocabulary never live. The arithmetic is that of the loss (`loss_kernels`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lwf_unsloth.loss_kernels import divergence, raise_to_floor, shape_logits
from lwf_unsloth.loss_pass import head_logits, rows_per_chunk
from lwf_unsloth.losses import Head

BINS = 15
"""Bins of equal width over the confidence (Guo et al. 2017, arXiv 1706.04599)."""
FULL_CHUNK = 64 * 2**20
"""Logits of a chunk where a model gives full logits."""


@dataclass(frozen=True)
class Side:
    """What one model says of N tokens; all (N,), fp32."""

    nll: Tensor
    """Negative log-likelihood of the label, nats."""
    confidence: Tensor
    """Probability of the likeliest token."""
    correct: Tensor
    """1 where the likeliest token is the label, else 0."""

    def gaps(self, owner: Tensor, rows: int) -> Tensor:
        """(rows, BINS) fp64: the sum of confidence less correct over each row's tokens of a bin.

        Args:
            owner: (N,) row of each token.
            rows: How many rows there are.
        """
        bins = (self.confidence * BINS).nan_to_num(0.0).long().clamp(0, BINS - 1)  # NaN has no bin
        total = torch.zeros(rows * BINS, dtype=torch.float64, device=owner.device)
        apart = (self.confidence.double() - self.correct.double()).to(owner.device)
        return total.index_add_(0, owner * BINS + bins.to(owner.device), apart).view(rows, BINS)


@dataclass(frozen=True)
class TokenStats:
    """What tuned and base model say of N tokens."""

    tuned: Side
    base: Side | None
    kl: Tensor | None
    """(N,) KL(base || tuned), nats; exactly 0 where both give equal logits."""


def token_stats(
    tuned: Tensor,
    labels: Tensor,
    head: Head | None,
    base: Tensor | None = None,
    base_head: Head | None = None,
    chunk_rows: int | None = None,
) -> TokenStats:
    """Reads N tokens from final hidden states, or from full logits where there is no head.

    Args:
        tuned: (N, H) hidden states of the tuned model; (N, V) its logits where `head` is None.
        labels: (N,) ids of the tokens that follow.
        head: The output head, or None.
        base: The same of the base model, or None.
        base_head: The base's head where it is another one.
        chunk_rows: Tokens at a time; None takes it from the memory.
    """
    sides = 1 if base is None else 2
    if head is None:
        most = max(1, FULL_CHUNK // tuned.shape[1])
    else:
        most = rows_per_chunk(head.weight, sides, "eager")
    most = min(chunk_rows or most, max(len(labels), 1))
    found: list[list[Tensor]] = []
    with torch.no_grad(), torch.autocast(tuned.device.type, enabled=False):
        for start in range(0, max(len(labels), 1), most):
            part = slice(start, start + most)
            log_q = _log_probs(tuned[part], head)
            values = _read(log_q, labels[part])
            if base is not None:
                log_p = _log_probs(base[part], base_head or head).to(log_q.device)
                values += [*_read(log_p, labels[part]), divergence(log_p, log_q, None)[0]]
            found.append(values)
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    other = None if base is None else Side(*columns[3:6])
    return TokenStats(Side(*columns[:3]), other, None if base is None else columns[6])


def _log_probs(states: Tensor, head: Head | None) -> Tensor:
    """(M, V) log-probabilities of a chunk in fp32 (fp64 for fp64)."""
    if head is None:
        logits = states
    else:
        shape = (len(states), head.weight.shape[0])
        buffer = torch.empty(shape, dtype=head.weight.dtype, device=states.device)
        logits = head_logits(states, head, buffer)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head is not None:
        wide = shape_logits(wide, head.scale, head.softcap)
    return torch.log_softmax(raise_to_floor(wide), -1)


def _read(log_probs: Tensor, labels: Tensor) -> list[Tensor]:
    """NLL, confidence and correctness (M,) each."""
    top, likeliest = log_probs.max(-1)
    nll = -log_probs.gather(-1, labels[:, None])[:, 0]
    return [nll, top.exp(), (likeliest == labels).to(nll.dtype)]


def calibration_error(gaps: Tensor, tokens: Tensor) -> Tensor:
    """Expected calibration error (B,), 0 to 1: mean gap of confidence and accuracy over bins.

    Args:
        gaps: (B, BINS) sums of confidence less correct.
        tokens: (B,) tokens they are over.

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3, for the next token.
    """
    return gaps.abs().sum(-1) / tokens
