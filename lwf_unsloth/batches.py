"""From encoded rows to a batch, and from a batch to the tokens that carry each term of the loss."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass
class LwFCollator:
    """Right-pads rows; keeps what decides the loss (`is_rehearsal`, `prompt_length`)."""

    pad_id: int
    """Token id put on padding; labels there are -100 by position, so pad == eos is safe."""
    multiple: int | None = None
    """Pads to a multiple of this many tokens."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates encoded rows.

        Args:
            rows: Dicts with `input_ids` and `labels` (lists of equal length) and, where known,
                `is_rehearsal`
                and `prompt_length`.

        Returns:
            `input_ids`, `attention_mask`, `labels` of shape (B, T); `is_rehearsal`,
            `prompt_length` of shape (B,).
        """
        longest = max(len(row["input_ids"]) for row in rows)
        if self.multiple:
            longest = -(-longest // self.multiple) * self.multiple
        batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            short = longest - len(row["input_ids"])
            batch["input_ids"].append(list(row["input_ids"]) + [self.pad_id] * short)
            batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * short)
            batch["labels"].append(list(row["labels"]) + [IGNORED] * short)
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        tensors["is_rehearsal"] = torch.tensor(
            [bool(row.get("is_rehearsal", False)) for row in rows]
        )
        tensors["prompt_length"] = torch.tensor([prompt_length(row) for row in rows])
        return tensors


def prompt_length(row: dict[str, Any]) -> int:
    """Tokens before the answer; without a record of it, those before the first label."""
    if row.get("prompt_length") is not None:
        return int(row["prompt_length"])
    return next(
        (i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"])
    )


def without_repeats(batch: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """A batch whose rows from `rows` on carry no term; the batch itself where there are none.

    Among several processes the last forward of an epoch, or of an evaluation, is filled up with
    rows that came before.

    Args:
        batch: What `LwFCollator` gives.
        rows: Its own rows: the first ones.
    """
    if rows >= len(batch["labels"]):
        return batch
    rows = max(rows, 0)
    labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
    labels[rows:], mask[rows:] = IGNORED, 0
    return {**batch, "labels": labels, "attention_mask": mask}


@dataclass(frozen=True)
class Roles:
    """Which target tokens carry which term; all of shape (B, T-1), position t predicts token
    t+1.
    """

    labels: Tensor
    """Labels of the CE, -100 elsewhere."""
    kl: Tensor
    """True where the KL acts."""
    targets: Tensor
    """Token ids that follow."""
    rehearsal: Tensor
    """True on rehearsal rows."""

    @property
    def kept(self) -> Tensor:
        """True where any term acts."""
        return (self.labels != IGNORED) | self.kl

    @cached_property
    def counts(self) -> Tensor:
        """(4,) tokens: CE on task rows, CE on rehearsal rows, KL on task rows, KL on rehearsal
        rows.
        """
        ce = self.labels != IGNORED
        parts = (
            ce & ~self.rehearsal,
            ce & self.rehearsal,
            self.kl & ~self.rehearsal,
            self.kl & self.rehearsal,
        )
        return torch.stack([part.sum() for part in parts])


def token_roles(batch: dict[str, Tensor], rows: str, rehearsal_ce: bool, with_kl: bool) -> Roles:
    """Sorts the target tokens of a batch into the terms of the loss.

    Args:
        batch: What `LwFCollator` gives.
        rows: "rehearsal", "all", "response" or "prompt" (of task rows; rehearsal rows stay whole).
        rehearsal_ce: Whether rehearsal answers are labels too.
        with_kl: False where lambda is 0: then no token carries KL.

    Returns:
        The roles of the T-1 shifted positions.
    """
    labels = batch["labels"][:, 1:]
    targets = batch["input_ids"][:, 1:]
    real = batch["attention_mask"][:, 1:].bool()
    rehearsal = batch["is_rehearsal"].bool()[:, None].expand_as(labels)
    if not rehearsal_ce:
        labels = labels.masked_fill(rehearsal, IGNORED)
    position = torch.arange(1, targets.shape[1] + 1, device=targets.device)[None, :]
    answer = position >= batch["prompt_length"][:, None]
    chosen = {
        "rehearsal": rehearsal,
        "all": torch.ones_like(real),
        "response": rehearsal | answer,
        "prompt": rehearsal | ~answer,
    }[rows]
    kl = chosen & real if with_kl else torch.zeros_like(real)
    return Roles(labels, kl, targets, rehearsal)
