"""What a loss call is given, checked: the head, the settings, and which rows carry which term."""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lwf_unsloth.loss_terms import KlKind
from lwf_unsloth.loss_topk import TopK

IGNORED = -100
"""Label of a row without cross entropy."""


class Head(NamedTuple):
    """A frozen output head: logits = cap(scale * (h @ weight.T + bias)).

    cap(x) = softcap * tanh(x / softcap), or x where softcap is 0.
    """

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float = 0.0
    """Gemma-2's final_logit_softcapping; 0 is off."""
    scale: float = 1.0
    """Cohere's logit_scale, or 1 / logits_scaling of Granite."""


@dataclass(frozen=True)
class Settings:
    """Numbers of one call; out of range is a ValueError."""

    n_ce: float
    n_kl: float
    lwf_lambda: float
    temperature: float
    kl: KlKind
    label_smoothing: float

    def __post_init__(self) -> None:
        """Refuses what has no meaning as a loss."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature is {self.temperature}; softmax(logits / T) needs a finite T above 0."
            )
        if self.kl not in get_args(KlKind):
            raise ValueError(f"kl is {self.kl!r}; it must be one of {', '.join(get_args(KlKind))}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; as a share of probability it must be "
                "in [0, 1)."
            )
        if not (math.isfinite(self.lwf_lambda) and self.lwf_lambda >= 0):
            raise ValueError(
                f"lwf_lambda is {self.lwf_lambda}; it must be 0 or more: a negative weight pushes "
                "the student away from the teacher."
            )

    @property
    def kl_ratio(self) -> float:
        """Weight of the KL's gradient beside the cross entropy's, 1 / n_ce left out of both."""
        return self.lwf_lambda * self.n_ce / self.n_kl


@dataclass(frozen=True)
class Rows:
    """Which rows carry what, KL rows first.

    Student and teacher logits of a KL row then come from products of one shape: equal hidden states
    give equal bits, and a KL of exactly 0.
    """

    kl: Tensor
    """(K,) indices of rows with KL, ascending, as the teacher's rows."""
    ce_only: Tensor
    """(C,) indices of rows with cross entropy alone."""
    labels: Tensor
    """(K + C,) label of each kept row, negative for none."""
    targets: Tensor
    """(K + C,) class that "target_masked" drops, negative for none."""
    index: Tensor
    """(K + C,) where the kept rows come from."""
    kl_rows_have_ce: bool
    """Some row with KL has a label too."""


def divisor(given: float | Tensor | None, counted: float | Tensor) -> float:
    """The count to divide a sum by: the one given, else the one counted here; at least 1."""
    return max(float(counted if given is None else given), 1.0)


def sort_rows(
    n: int,
    labels: Tensor,
    teacher: Tensor | TopK | None,
    kl_rows: Tensor | None,
    targets: Tensor | None,
    vocab: int,
) -> Rows:
    """Indices of the rows that carry a term, from what `lwf_loss` was given for n rows."""
    targets = labels if targets is None else targets.to(labels.device)
    for name, given in (("labels", labels), ("targets", targets), ("kl_rows", kl_rows)):
        if given is not None and given.shape != (n,):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, needed ({n},): one for each student row."
            )
    _check_ids(labels, targets, vocab)
    if kl_rows is None:
        kl_rows = torch.full_like(labels, teacher is not None, dtype=torch.bool)
    kl_rows = kl_rows.to(labels.device, torch.bool)
    kl_index = kl_rows.nonzero()[:, 0]
    teacher_rows = 0 if teacher is None else len(teacher)
    if teacher_rows != len(kl_index):
        raise ValueError(
            f"the teacher has {teacher_rows} rows, kl_rows marks {len(kl_index)}: KL compares row "
            "with row, so give the teacher's rows at kl_rows, in their order, and no others."
        )
    ce_only = ((labels >= 0) & ~kl_rows).nonzero()[:, 0]
    index = torch.cat([kl_index, ce_only])
    both = bool((labels[kl_index] >= 0).any())
    return Rows(kl_index, ce_only, labels[index], targets[index], index, both)


def _check_ids(labels: Tensor, targets: Tensor, vocab: int) -> None:
    """Refuses ids that no class of the head stands for; a kernel would skip them without a word."""
    if not labels.numel():
        return
    lowest = torch.where(labels == IGNORED, 0, labels).amin()
    low, high, target = torch.stack([lowest, labels.amax(), targets.amax()]).tolist()
    if low < 0 or max(high, target) >= vocab:
        raise ValueError(
            f"labels or targets hold the id {low if low < 0 else max(high, target)}, the head has "
            f"{vocab} classes: ids are 0 to {vocab - 1}, {IGNORED} marks a row without cross "
            "entropy. Do tokenizer and model belong together?"
        )


def check_vocabularies(student: int, teacher: int) -> None:
    """Refuses a teacher of another vocabulary."""
    if student != teacher:
        raise ValueError(
            f"the student has {student} classes, the teacher {teacher}: KL compares class with "
            "class, so both need one vocabulary. Take a teacher with the student's tokenizer and "
            "vocabulary size."
        )


def check_heads(
    student: Tensor, teacher: Tensor | TopK | None, head: Head, teacher_head: Head
) -> None:
    """Refuses heads that are trained, or that fit neither each other nor the hidden states."""
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        raise ValueError(
            "the output head requires a gradient, which the one pass does not take: "
            "use lwf_loss_from_logits, or freeze the head."
        )
    if teacher is not None:
        check_vocabularies(head.weight.shape[0], teacher_head.weight.shape[0])
    states = None if isinstance(teacher, TopK) else teacher
    for name, hidden, of in (("student", student, head), ("teacher", states, teacher_head)):
        width = of.weight.shape[1]
        if hidden is not None and (hidden.ndim != 2 or hidden.shape[1] != width):
            raise ValueError(
                f"the {name}'s hidden states have shape {tuple(hidden.shape)}, its head needs "
                f"(rows, {width}): take the final hidden states, after the last norm."
            )
