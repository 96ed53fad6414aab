"""The loss of a batch: teacher forward on the rows that carry KL, student forward, both terms."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.batches import Roles
from lwf_unsloth.hidden import head_matches, model_hidden, model_logits, output_head
from lwf_unsloth.losses import Head, LwfLoss, lwf_loss, lwf_loss_from_logits
from lwf_unsloth.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass
class Objective:
    """sum CE / N_ce + lambda * sum KL / N_kl of a batch, by hidden states where it can be."""

    head: Head | None
    """The student's frozen head; None takes full logits, with the same numbers."""
    teacher: Teacher | None
    """Gives the KL's targets; None where there is no KL."""
    kl: str = "forward"
    """One of "forward", "reverse", "target_masked"."""
    label_smoothing: float = 0.0
    """Of the CE, 0 <= e < 1."""

    @classmethod
    def of(
        cls, model: nn.Module, teacher: Teacher | None, probe: Tensor, **settings: Any
    ) -> "Objective":
        """The objective for a model, its head tried on a few real tokens.

        Args:
            model: The student, unwrapped.
            teacher: The teacher, or None.
            probe: (1, T) token ids on the model's device.
            **settings: `kl`, `label_smoothing`.
        """
        head = output_head(model)
        if head is not None and not head_matches(model, head, probe):
            logger.warning(
                "The model transforms its logits in a way not known here: taking full logits."
            )
            head = None
        return cls(head, teacher, **settings)

    @property
    def full_logits(self) -> bool:
        """Whether rows x vocabulary has to live."""
        return self.head is None or (self.teacher is not None and self.teacher.head is None)

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        roles: Roles,
        n_ce: Tensor,
        n_kl: Tensor,
        lwf_lambda: float,
        temperature: float,
    ) -> LwfLoss:
        """The loss of one micro-batch.

        Args:
            model: The student, wrapped or not.
            batch: `input_ids`, `attention_mask` of shape (B, T).
            roles: Which tokens carry which term.
            n_ce: CE tokens of the whole accumulated batch, 1 or more.
            n_kl: KL tokens of the whole accumulated batch, 1 or more.
            lwf_lambda: Weight of the KL.
            temperature: T > 0.

        Returns:
            The loss with `ce_rows` and `kl_rows` of the tokens `roles.kept`; KL groups 0 task, 1
            rehearsal.
        """
        full = self.full_logits
        kept = roles.kept.flatten()  # (B*(T-1),)
        teacher = self._teacher_rows(batch, roles.kl, full)
        forward = model_logits if full else model_hidden
        out = forward(model, batch["input_ids"], batch["attention_mask"])
        student = out[:, :-1].flatten(0, 1)[kept]
        labels = roles.labels.flatten()[kept]
        settings: dict[str, Any] = {
            "kl_rows": roles.kl.flatten()[kept],
            "n_ce": n_ce,
            "n_kl": n_kl,
            "lwf_lambda": lwf_lambda,
            "temperature": temperature,
            "kl": self.kl,
            "targets": roles.targets.flatten()[kept],
            "label_smoothing": self.label_smoothing,
            "groups": roles.rehearsal.flatten()[kept].long(),
            "num_groups": 2,
            "return_rows": True,
        }
        if full:
            return lwf_loss_from_logits(student, labels, teacher_logits=teacher, **settings)
        assert self.head is not None
        other = None if self.teacher is None else self.teacher.head
        return lwf_loss(student, labels, self.head, teacher=teacher, teacher_head=other, **settings)

    def _teacher_rows(self, batch: dict[str, Any], kl: Tensor, full: bool) -> Tensor | None:
        """Teacher outputs (K, H or V) of the tokens that carry KL, from a forward on their rows
        alone.
        """
        rows = kl.any(1).nonzero()[:, 0]
        if self.teacher is None or not len(rows):
            return None
        longest = int(batch["attention_mask"][rows].sum(1).max())
        ids, mask = batch["input_ids"][rows, :longest], batch["attention_mask"][rows, :longest]
        out = self.teacher.logits(ids, mask) if full else self.teacher.hidden(ids, mask)
        return out[:, :-1][kl[rows, : longest - 1]]


def probe_tokens(row: dict[str, Any], device: torch.device) -> Tensor:
    """(1, T) the first tokens of an encoded row, to try the head on."""
    return torch.tensor([row["input_ids"][:8]], device=device)
