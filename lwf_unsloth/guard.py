"""Steps whose gradient is not finite: skipped, told, and the end of a run of nothing else."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from lwf_unsloth.errors import ModelError

logger = logging.getLogger(__name__)

MOST = 20
"""Such steps in a row that a run survives; a GradScaler that finds its scale needs a few."""


class FiniteSteps(TrainerCallback):
    """Keeps NaN out of the adapter: one such step would make every later one NaN, and be saved."""

    def __init__(self) -> None:
        """Starts without a skipped step."""
        self.in_a_row = self.skipped = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Drops gradients that are not finite, so that the optimizer leaves its state alone.

        Raises:
            ModelError: `MOST` steps in a row.
        """
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads or bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()):
            self.in_a_row = 0
            return
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        if self.in_a_row >= MOST:
            raise ModelError(
                f"The gradient was not finite in {MOST} steps in a row, up to step "
                f"{state.global_step + 1}: nothing more is learned. The adapter is as before them. "
                "Lower learning_rate, look at the rows of these steps, or take bf16 or float32 "
                "where this was fp16; then resume from the newest checkpoint."
            )
        if args.fp16:  # the GradScaler skips the step itself, and must see why
            return
        for parameter in model.parameters():
            parameter.grad = None
        logger.warning(
            "Step %d has a gradient that is not finite: it is skipped (%d so far).",
            state.global_step + 1,
            self.skipped,
        )
