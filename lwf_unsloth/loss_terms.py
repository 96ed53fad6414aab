"""What a loss body is asked for: which terms, by which numbers, and how low a logit may be."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["forward", "reverse", "target_masked"]
FLOOR = -65504.0
"""Lowest logit, fp16's, so that all dtypes agree; lower ones are read as it, without gradient."""


@dataclass(frozen=True)
class Terms:
    """What a chunk's rows need; few values in a run, so that few compiled bodies are built."""

    ce: bool
    """Some rows of the chunk carry cross entropy."""
    kl: KlKind | None
    """Direction of the KL that all rows of the chunk carry; None for cross entropy alone."""
    gradient: bool
    """Write the gradient over the student's logits."""
    unit_temperature: bool = True
    """T is 1, so that cross entropy and KL share one softmax."""
    label_smoothing: float = 0.0
    student_shape: tuple[float, float] = (1.0, 0.0)
    """(scale, softcap) of the student's head."""
    teacher_shape: tuple[float, float] = (1.0, 0.0)
    """(scale, softcap) of the teacher's head."""


@dataclass(frozen=True)
class Weights:
    """What may change every step: factors of both gradients, and the temperature."""

    ce: float
    kl: float
    temperature: float = 1.0

    def to(self, like: Tensor) -> Tensor:
        """(3,) on the device of `like`, fp32 or fp64: a tensor, so that no new value recompiles."""
        values = torch.tensor([self.ce, self.kl, self.temperature], dtype=torch.float64)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return values.to(like.device, dtype, non_blocking=True)
