"""An adapter begun anew on a base that stays loaded."""

import math
from typing import Any

import torch


def fresh(model: Any, seed: int) -> None:
    """Fills the adapter as PEFT begins one: A uniform within 1 / sqrt(inputs), B zero.

    Args:
        model: A LoRA model; its tensors keep their place and dtype.
        seed: Of A's values, which are drawn on the CPU, so that they are the same on any device.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if "lora_B" in name:
                tensor.zero_()
            elif "lora_A" in name:
                bound = 1 / math.sqrt(tensor.shape[1])  # kaiming_uniform_ at a = sqrt(5)
                values = torch.empty(tensor.shape).uniform_(-bound, bound, generator=draw)
                tensor.copy_(values)
