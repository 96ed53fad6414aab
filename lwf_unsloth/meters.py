"""Running sums of both terms, so that every logged number is nats per token over the whole
window.
"""

from typing import Any

import torch
from torch import Tensor

from lwf_unsloth.batches import Roles
from lwf_unsloth.losses import LwfLoss

NAMES = ("task", "rehearsal")


class Meter:
    """Sums of CE and KL in nats and their token counts, by role (task, rehearsal)."""

    def __init__(self) -> None:
        """Starts empty."""
        self.sums: Tensor | None = None

    def add(self, loss: LwfLoss, roles: Roles) -> None:
        """Adds a micro-batch; nothing is moved off the device.

        Args:
            loss: Result with `ce_rows` (B, T-1), 0 where there is no cross entropy.
            roles: The batch's roles.
        """
        assert loss.ce_rows is not None
        sides = (~roles.rehearsal, roles.rehearsal)  # as NAMES
        ce = torch.stack([torch.where(side, loss.ce_rows, 0).sum() for side in sides])
        values = torch.cat([ce, loss.kl_group_sums, roles.counts.to(ce.device)]).detach().double()
        self.sums = values if self.sums is None else self.sums + values

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """The means since the last call, and starts anew.

        Args:
            accelerator: Sums over all ranks where there are several.

        Returns:
            `task_loss`, `kl`, `kl_task`, `kl_rehearsal`, `rehearsal_loss` in nats per token; those
            without tokens are left out.
        """
        sums, self.sums = self.sums, None
        if accelerator is not None and accelerator.num_processes > 1:
            if sums is None:  # the others may have some, and wait for this process's
                sums = torch.zeros(8, dtype=torch.float64, device=accelerator.device)
            sums = accelerator.gather(sums[None]).sum(0)
        if sums is None:
            return {}
        ce, kl, n_ce, n_kl = (part.tolist() for part in sums.reshape(4, 2))
        found = {"kl": _mean(sum(kl), sum(n_kl))}
        for i, name in enumerate(NAMES):
            found[f"{name}_loss"] = _mean(ce[i], n_ce[i])
            found[f"kl_{name}"] = _mean(kl[i], n_kl[i])
        return {name: value for name, value in found.items() if value is not None}


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
