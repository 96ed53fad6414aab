"""What happens to a chunk of logits: losses of its rows, and their gradient in the logits' place.

Three bodies do the same arithmetic: `eager` (torch, any device), `compiled` (the same under
`torch.compile`) and `triton` (`loss_triton.py`). All work in fp32 (fp64 for fp64 logits) and read
logits at or under `FLOOR`, -inf among them, as `FLOOR`.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lwf_unsloth.loss_terms import FLOOR, Terms, Weights

logger = logging.getLogger(__name__)

BODIES = ("auto", "eager", "compiled", "triton")
BODY_VARIABLE = "LWF_LOSS_BODY"
"""Environment variable that picks the body where the caller does not."""


def shape_logits(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """The model's logits from the head's output: times scale, then softcap * tanh(. / softcap)."""
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def raise_to_floor(logits: Tensor) -> Tensor:
    """Logits at or under FLOOR become FLOOR, without gradient; NaN stays, to be seen."""
    return torch.where(logits <= FLOOR, FLOOR, logits)


def smoothed_ce(log_q: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy (M,) of log-probabilities (M, V), smoothed as in torch; 0 without a label."""
    loss = -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * log_q.mean(-1)
    return torch.where(labels >= 0, loss, 0.0)


def kl_log_probs(logits: Tensor, temperature: Tensor | float, dropped: Tensor | None) -> Tensor:
    """Log softmax of logits / T (M, V), over the classes that `dropped` (M, V) leaves."""
    logits = logits / temperature
    return torch.log_softmax(
        logits if dropped is None else logits.masked_fill(dropped, -torch.inf), -1
    )


def divergence(
    log_p: Tensor, log_q: Tensor, dropped: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(p || q) (M,), with p, q and log p - log q (M, V), each 0 at a dropped class.

    Summed as p (log p - log q) - p + q: no term is negative, errors of the normalisers cancel, and
    equal inputs give exactly 0.
    """
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    if dropped is not None:
        gap = torch.where(dropped, 0.0, gap)
    return (p * gap - p + q).sum(-1), p, q, gap


def class_mask(targets: Tensor, like: Tensor) -> Tensor:
    """True (M, V) at each row's target class; a row whose target is negative has none."""
    return torch.arange(like.shape[-1], device=like.device) == targets[:, None]


def _ce_part(
    logits: Tensor, log_q: Tensor | None, labels: Tensor, weights: Tensor, terms: Terms
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy (M,) and its weighted gradient (M, V)."""
    log_q = torch.log_softmax(logits, -1) if log_q is None else log_q
    loss = smoothed_ce(log_q, labels, terms.label_smoothing)
    if not terms.gradient:
        return loss, None
    weight = torch.where(labels >= 0, weights[0], 0.0)[:, None]
    gold = 1.0 - terms.label_smoothing
    grad = log_q.exp()
    if torch.compiler.is_compiling():
        grad = grad - torch.where(class_mask(labels, grad), gold, 0.0)
    else:
        grad.scatter_add_(
            -1, labels.clamp(min=0)[:, None], grad.new_full((1, 1), -gold).expand(len(grad), 1)
        )
    if terms.label_smoothing:
        grad = grad - terms.label_smoothing / logits.shape[-1]
    return loss, grad.mul_(weight)


def _kl_part(
    log_p: Tensor, log_q: Tensor, dropped: Tensor | None, weights: Tensor, terms: Terms
) -> tuple[Tensor, Tensor | None]:
    """T^2 KL (M,) and its weighted gradient: T (q - p); in reverse T q (log q - log p - KL)."""
    temperature = weights[2]
    if terms.kl == "reverse":
        loss, q, _, gap = divergence(log_q, log_p, dropped)
        grad = q * (gap - loss[:, None]) if terms.gradient else None
    else:
        loss, p, q, _ = divergence(log_p, log_q, dropped)
        grad = q - p if terms.gradient else None
    return loss * temperature * temperature, None if grad is None else grad.mul_(
        weights[1] * temperature
    )


def _finish(
    logits: Tensor, grad: Tensor, floored: Tensor | None, out: Tensor, shape: tuple[float, float]
) -> None:
    """Takes the gradient back through floor, softcap and scale, and writes it to `out` in range."""
    scale, softcap = shape
    if softcap:
        grad = grad * (scale * (1.0 - (logits / softcap) ** 2))
    elif scale != 1.0:
        grad = grad * scale
    if floored is not None:
        grad = torch.where(floored, 0.0, grad)
    if out.dtype == torch.float16:
        grad = grad.clamp(FLOOR, -FLOOR)
    out.copy_(grad)


def eager_body(
    z: Tensor, u: Tensor | None, labels: Tensor, targets: Tensor, weights: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk's rows; if `terms.gradient`, the weighted gradient goes where z was.

    Args:
        z: raw student logits (M, V), head dtype; overwritten.
        u: raw teacher logits (M, V), or None where `terms.kl` is None.
        labels: (M,) int64, negative for a row without cross entropy.
        targets: (M,) int64, the class that "target_masked" drops, negative for none.
        weights: (3,) factor of the CE gradient, of the KL gradient, and the temperature.
        terms: what to compute.

    Returns:
        Cross entropy and T^2 KL per row (M,), in nats, unweighted.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    logits = shape_logits(z.to(dtype), *terms.student_shape)
    floored = None
    if torch.compiler.is_compiling() or bool(logits.amin() <= FLOOR):
        floored = logits <= FLOOR
        logits = torch.where(floored, FLOOR, logits)
    ce = kl = logits.new_zeros(len(z))
    log_q = kl_grad = ce_grad = None
    if terms.kl is not None and u is not None:
        teacher = raise_to_floor(shape_logits(u.to(dtype), *terms.teacher_shape))
        dropped = class_mask(targets, logits) if terms.kl == "target_masked" else None
        temperature = 1.0 if terms.unit_temperature else weights[2]
        log_q = kl_log_probs(logits, temperature, dropped)
        kl, kl_grad = _kl_part(
            kl_log_probs(teacher, temperature, dropped), log_q, dropped, weights, terms
        )
    if terms.ce:
        shared = log_q if terms.unit_temperature and terms.kl != "target_masked" else None
        ce, ce_grad = _ce_part(logits, shared, labels, weights, terms)
    grads = [grad for grad in (ce_grad, kl_grad) if grad is not None]
    if grads:
        _finish(
            logits,
            grads[0] if len(grads) == 1 else grads[0].add_(grads[1]),
            floored,
            z,
            terms.student_shape,
        )
    return ce, kl


def run_body(
    z: Tensor,
    u: Tensor | None,
    labels: Tensor,
    targets: Tensor,
    weights: Weights,
    terms: Terms,
    body: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`eager_body` by the body asked for (None: LWF_LOSS_BODY, else "auto").

    A body that fails is given up with one line in the log, and the next one takes over.
    """
    name = choose_body(body, z.device.type, z.dtype)
    if name == "eager":
        return eager_body(z, u, labels, targets, weights.to(z), terms)
    try:
        run = _triton() if name == "triton" else _compiled
        return run(z, u, labels, targets, weights, terms)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken.add(name)
        following = choose_body(body, z.device.type, z.dtype)
        logger.warning("The %s loss body failed, %s takes over: %s", name, following, error)
    return run_body(z, u, labels, targets, weights, terms, body)


def choose_body(body: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The body that will run; in fp64, after a failure and (if not named) on a CPU it is eager."""
    name = body or os.environ.get(BODY_VARIABLE) or "auto"
    if name not in BODIES:
        raise ValueError(
            f"the loss body is {name!r}; it must be one of {', '.join(BODIES)} "
            f"(argument body, or the variable {BODY_VARIABLE})."
        )
    wanted = [name]
    if name == "auto":
        wanted = ["triton"] * _has_triton() + ["compiled"] if device_type == "cuda" else []
    left = [one for one in wanted if one not in _broken]
    return left[0] if left and dtype != torch.float64 else "eager"


_broken: set[str] = set()


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _triton() -> Callable[..., tuple[Tensor, Tensor]]:
    """The Triton body, imported at its first use: a CPU installation has no Triton."""
    from lwf_unsloth.loss_triton import triton_body

    return triton_body


@lru_cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(eager_body)


def _compiled(
    z: Tensor, u: Tensor | None, labels: Tensor, targets: Tensor, weights: Weights, terms: Terms
) -> tuple[Tensor, Tensor]:
    """`eager_body`, compiled once for any number of rows."""
    for tensor in (z, u, labels, targets):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiler()(z, u, labels, targets, weights.to(z), terms)
