"""The LwF loss: cross entropy and teacher KL in one pass over the vocabulary.

Rows are tokens, already shifted. With student logits z, teacher logits u, label y, temperature T:

    CE_i  = smoothed cross entropy of z_i against y_i
    KL_i  = T^2 KL(softmax(u_i/T) || softmax(z_i/T))     "forward": KL(teacher || student)
          | T^2 KL(softmax(z_i/T) || softmax(u_i/T))     "reverse": KL(student || teacher)
          | forward, y_i taken out of both sides         "target_masked" (arXiv 2605.29498)
    total = sum CE_i / n_ce + lwf_lambda * sum KL_i / n_kl

The output head is frozen, so nothing of size rows x vocabulary has to live: per chunk of rows
`lwf_loss` makes the logits, the losses and dz, and keeps dh = dz @ W alone. That is three head
products per row with KL and two per row with cross entropy alone; a row without a term never
reaches the head. torch is all that is imported (Triton, where it is there, inside loss_kernels).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lwf_unsloth.loss_kernels import (
    class_mask,
    divergence,
    kl_log_probs,
    raise_to_floor,
    smoothed_ce,
)
from lwf_unsloth.loss_pass import Job, one_pass
from lwf_unsloth.loss_rows import (
    Head,
    Rows,
    Settings,
    check_heads,
    check_vocabularies,
    divisor,
    sort_rows,
)
from lwf_unsloth.loss_terms import KlKind
from lwf_unsloth.loss_topk import TopK, check_top_k, top_k, top_k_kl

__all__ = ["Head", "KlKind", "LwfLoss", "TopK", "lwf_loss", "lwf_loss_from_logits", "top_k"]


class LwfLoss(NamedTuple):
    """The loss and its parts. Only `total` carries a gradient.

    Sums are in nats, fp32 (fp64 for fp64 input), over the rows of this call.
    """

    total: Tensor
    """ce_sum / n_ce + lwf_lambda * kl_sum / n_kl, with the divisors that were given."""
    ce_sum: Tensor
    kl_sum: Tensor
    """T^2 included."""
    kl_group_sums: Tensor
    """(num_groups,) kl_sum split by `groups`."""
    n_ce: Tensor
    """Rows of this call with cross entropy."""
    n_kl: Tensor
    """Rows of this call with KL."""
    kl_group_counts: Tensor
    """(num_groups,) n_kl split by `groups`."""
    ce_rows: Tensor | None = None
    """(N,) with return_rows: cross entropy of each row, 0 where it has none."""
    kl_rows: Tensor | None = None
    """(N,) with return_rows: T^2 KL of each row, 0 where it has none."""


def lwf_loss(
    student: Tensor,
    labels: Tensor,
    head: Head,
    *,
    teacher: Tensor | TopK | None = None,
    kl_rows: Tensor | None = None,
    n_ce: float | Tensor | None = None,
    n_kl: float | Tensor | None = None,
    lwf_lambda: float = 1.0,
    temperature: float = 1.0,
    kl: KlKind = "forward",
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    teacher_head: Head | None = None,
    groups: Tensor | None = None,
    num_groups: int = 1,
    chunk_rows: int | None = None,
    return_rows: bool = False,
    body: str | None = None,
) -> LwfLoss:
    """Cross entropy and teacher KL of hidden states; backward only scales the gradient taken here.

    Args:
        student: (N, H) final hidden states in any float dtype, cast to the head's.
        labels: (N,) int64 ids of the next tokens, -100 for a row without cross entropy.
        head: the student's output head, frozen.
        teacher: (K, H') the teacher's final hidden states at `kl_rows`, in their order, on any
            device, or their `TopK` (forward KL at its temperature); None for no KL.
        kl_rows: (N,) bool, K of them True; None means every row when there is a teacher.
        n_ce: rows with cross entropy in the whole accumulated batch on all ranks, read as at least
            1; None counts this call's.
        n_kl: the same for KL.
        lwf_lambda: weight of the KL, 0 or more.
        temperature: T, above 0.
        kl: "forward" KL(teacher || student), "reverse" KL(student || teacher) or "target_masked".
        targets: (N,) int64 ids that "target_masked" drops, negative where there is none; default
            `labels`.
        label_smoothing: in [0, 1), as in torch's cross_entropy.
        teacher_head: the teacher's head, if another one; it must have as many classes.
        groups: (N,) int64 in [0, num_groups) that split the KL's sum.
        num_groups: how many groups there are.
        chunk_rows: rows per chunk; None takes it from the free memory.
        return_rows: give both losses of each row too.
        body: "auto", "eager", "compiled" or "triton"; None reads LWF_LOSS_BODY, else "auto".

    Returns:
        LwfLoss. Where no row has a term, `total` is 0 and its gradient too.

    Raises:
        ValueError: shapes, sizes or settings that do not fit, or a head that is being trained.
    """
    teacher_head = head if teacher_head is None else teacher_head
    check_heads(student, teacher, head, teacher_head)
    if isinstance(teacher, TopK):
        check_top_k(teacher, kl, temperature)
        teacher = teacher.to(student.device)
    labels = labels.to(student.device)
    rows = sort_rows(len(student), labels, teacher, kl_rows, targets, head.weight.shape[0])
    settings = Settings(
        divisor(n_ce, (rows.labels >= 0).sum()),
        divisor(n_kl, len(rows.kl)),
        lwf_lambda,
        temperature,
        kl,
        label_smoothing,
    )
    gradient = torch.is_grad_enabled() and student.requires_grad
    job = Job(head, teacher, teacher_head, rows, settings, chunk_rows, body, gradient)
    total, ce, kl_values = one_pass(student, job)
    return _assemble(total, ce, kl_values, rows, len(student), groups, num_groups, return_rows)


def lwf_loss_from_logits(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | TopK | None = None,
    kl_rows: Tensor | None = None,
    n_ce: float | Tensor | None = None,
    n_kl: float | Tensor | None = None,
    lwf_lambda: float = 1.0,
    temperature: float = 1.0,
    kl: KlKind = "forward",
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    groups: Tensor | None = None,
    num_groups: int = 1,
    return_rows: bool = False,
) -> LwfLoss:
    """The same numbers from logits by plain autograd, for a head that is trained or unknown.

    Logits are the model's own, softcap and scale applied: `student_logits` (N, V), `teacher_logits`
    (K, V) or `TopK`. The other arguments, the result and the errors are those of `lwf_loss`.
    """
    vocab = student_logits.shape[-1]
    if isinstance(teacher_logits, TopK):
        check_top_k(teacher_logits, kl, temperature)
        teacher_logits = teacher_logits.to(student_logits.device)
    elif teacher_logits is not None:
        check_vocabularies(vocab, teacher_logits.shape[-1])
    labels = labels.to(student_logits.device)
    rows = sort_rows(len(student_logits), labels, teacher_logits, kl_rows, targets, vocab)
    settings = Settings(
        divisor(n_ce, (rows.labels >= 0).sum()),
        divisor(n_kl, len(rows.kl)),
        lwf_lambda,
        temperature,
        kl,
        label_smoothing,
    )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    with torch.autocast(student_logits.device.type, enabled=False):
        z = raise_to_floor(student_logits[rows.index].to(dtype))
        ce = smoothed_ce(torch.log_softmax(z, -1), rows.labels, label_smoothing)
        kl_values = z.new_zeros(0)
        if isinstance(teacher_logits, TopK):
            kl_values = top_k_kl(z[: len(rows.kl)], teacher_logits)
        elif teacher_logits is not None and len(rows.kl):
            u = raise_to_floor(teacher_logits.detach().to(z.device, dtype))
            kl_values = _kl_from_logits(z[: len(u)], u, rows.targets[: len(u)], settings)
        total = ce.sum() / settings.n_ce + settings.lwf_lambda * kl_values.sum() / settings.n_kl
    parts = (ce.detach(), kl_values.detach())
    return _assemble(total, *parts, rows, len(student_logits), groups, num_groups, return_rows)


def _kl_from_logits(z: Tensor, u: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """T^2 KL (K,) of logits (K, V), differentiable in z."""
    dropped = class_mask(targets, z) if settings.kl == "target_masked" else None
    log_q = kl_log_probs(z, settings.temperature, dropped)
    log_p = kl_log_probs(u, settings.temperature, dropped)
    first, second = (log_q, log_p) if settings.kl == "reverse" else (log_p, log_q)
    return divergence(first, second, dropped)[0] * settings.temperature**2


def _assemble(
    total: Tensor,
    ce: Tensor,
    kl_values: Tensor,
    rows: Rows,
    n: int,
    groups: Tensor | None,
    num_groups: int,
    return_rows: bool,
) -> LwfLoss:
    """Sums by group and, if asked, values put back to their rows; all without gradient."""
    group = torch.zeros_like(rows.kl) if groups is None else groups.to(rows.kl.device)[rows.kl]
    sums = kl_values.new_zeros(num_groups).index_add_(0, group, kl_values)
    counts = torch.zeros_like(sums).index_add_(0, group, torch.ones_like(kl_values))
    n_ce = (rows.labels >= 0).sum().to(ce.dtype)
    ce_rows = kl_rows = None
    if return_rows:
        ce_rows = ce.new_zeros(n).index_copy_(0, rows.index, ce)
        kl_rows = kl_values.new_zeros(n).index_copy_(0, rows.kl, kl_values)
    return LwfLoss(
        total, ce.sum(), kl_values.sum(), sums, n_ce, counts.sum(), counts, ce_rows, kl_rows
    )
