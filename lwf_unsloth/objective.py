"""The loss of a batch: student forward, teacher forward on the rows that carry KL, both terms.

The student goes first: the device has its whole forward to work on while the CPU prepares the
teacher's, which with a few rehearsal rows is short. Nothing is copied that the loss can index.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwf_unsloth.batches import IGNORED, Roles
from lwf_unsloth.hidden import head_matches, model_hidden, model_logits, output_head
from lwf_unsloth.losses import Head, LwfLoss, TopK, lwf_loss, lwf_loss_from_logits
from lwf_unsloth.teacher import ModelTeacher, Teacher
from lwf_unsloth.teacher_cache import CachedTeacher, Wanted

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
        """The objective for a model; its head and a second model's, tried on a few real tokens.

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
        if (
            isinstance(teacher, ModelTeacher)
            and teacher.head is not None
            and not head_matches(teacher.model, teacher.head, probe.to(teacher.device))
        ):
            logger.warning(
                "The teacher transforms its logits in a way not known here: taking full logits."
            )
            teacher.head = None
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
            batch: `input_ids`, `attention_mask` of shape (B, T), padding on the right.
            roles: Which tokens carry which term.
            n_ce: CE tokens of the whole accumulated batch, 1 or more.
            n_kl: KL tokens of the whole accumulated batch, 1 or more.
            lwf_lambda: Weight of the KL.
            temperature: T > 0.

        Returns:
            The loss with `ce_rows` and `kl_rows` (B, T-1), 0 where a term does not act; KL groups 0
            task, 1 rehearsal.
        """
        full = self.full_logits
        ids = batch["input_ids"]
        shape = ids.shape  # (B, T)
        places = None if self.teacher is None else kl_places(batch, roles.kl)
        cached = self._cached(ids, places)
        forward = model_logits if full else model_hidden
        student = forward(model, ids, None).flatten(0, 1)  # (B*T, H or V)
        teacher: Tensor | TopK | None
        if cached is not None:
            teacher = cached[0].targets(cached[1], temperature, full)
        else:
            teacher = None if places is None else self._teacher_rows(ids, places, full)
        settings: dict[str, Any] = {
            "kl_rows": _widened(roles.kl, False),
            "n_ce": n_ce,
            "n_kl": n_kl,
            "lwf_lambda": lwf_lambda,
            "temperature": temperature,
            "kl": self.kl,
            "targets": _widened(roles.targets, IGNORED),
            "label_smoothing": self.label_smoothing,
            "groups": _widened(roles.rehearsal, False).long(),
            "num_groups": 2,
            "return_rows": True,
        }
        labels = _widened(roles.labels, IGNORED)
        if full:
            loss = lwf_loss_from_logits(student, labels, teacher_logits=teacher, **settings)
        else:
            assert self.head is not None
            other = None if self.teacher is None else self.teacher.head
            loss = lwf_loss(
                student, labels, self.head, teacher=teacher, teacher_head=other, **settings
            )
        return loss._replace(
            ce_rows=_narrowed(loss.ce_rows, shape), kl_rows=_narrowed(loss.kl_rows, shape)
        )

    def _cached(
        self, ids: Tensor, places: "KlPlaces | None"
    ) -> tuple[CachedTeacher, Wanted] | None:
        """The cache and what is asked of it; None in evaluation, which asks the live teacher."""
        teacher = self.teacher
        if places is None or not isinstance(teacher, CachedTeacher) or not torch.is_grad_enabled():
            return None
        ids = ids[places.rows, : places.length]
        return teacher, teacher.wanted(ids, places.lengths, places.tokens)

    def _teacher_rows(self, ids: Tensor, places: "KlPlaces", full: bool) -> Tensor:
        """Teacher outputs (K, H or V) of the tokens that carry KL, from a forward on their rows
        alone.
        """
        assert self.teacher is not None
        ids = ids[places.rows, : places.length]
        out = self.teacher.logits(ids, None) if full else self.teacher.hidden(ids, None)
        return out.flatten(0, 1).index_select(0, places.tokens)


@dataclass(frozen=True)
class KlPlaces:
    """Where a batch carries KL: all that the teacher's forward needs to know."""

    rows: Tensor
    """(R,) rows of the batch with KL."""
    length: int
    """Tokens of the longest of them."""
    tokens: Tensor
    """(K,) their tokens with KL, counted through (R, length)."""
    lengths: list[int]
    """Tokens of each of them; the rest is padding."""


def kl_places(batch: dict[str, Any], kl: Tensor) -> KlPlaces | None:
    """Finds them, before the forwards: reading an index back waits for all that the device was
    given.

    Args:
        batch: `attention_mask` (B, T), padding on the right.
        kl: (B, T-1) True where the KL acts.

    Returns:
        The places, None where no token carries KL.
    """
    lengths = batch["attention_mask"].sum(1)  # (B,)
    found = torch.where(kl.any(1), lengths, 0).tolist()
    length = max(found)
    if not length:
        return None
    rows = torch.tensor([row for row, own in enumerate(found) if own], device=kl.device)
    inside = functional.pad(kl, (0, 1))[rows, :length]  # (R, length)
    own_lengths = [own for own in found if own]
    return KlPlaces(rows, length, inside.flatten().nonzero()[:, 0], own_lengths)


def _widened(values: Tensor, last: int) -> Tensor:
    """(B, T-1) -> (B*T,): the last position, which predicts nothing, gets `last`."""
    return functional.pad(values, (0, 1), value=last).flatten()


def _narrowed(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(B*T,) -> (B, T-1)."""
    return None if values is None else values.view(shape)[:, :-1]


def probe_tokens(row: dict[str, Any], device: torch.device) -> Tensor:
    """(1, T) the first tokens of an encoded row, to try the head on."""
    return torch.tensor([row["input_ids"][:8]], device=device)
