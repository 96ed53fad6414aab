"""Training steps of every arm through one loop: what step_cost and fits_t4 measure.

The loop is the Trainer's in small: accelerate's mixed precision and loss scale, clipping, fused
AdamW. Ours are called as `LwFTrainer` calls them, counts and meter included.
"""

import gc
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwf_unsloth.backend import on_cuda
from lwf_unsloth.batches import token_roles
from lwf_unsloth.hidden import causal_lm, model_hidden, model_logits
from lwf_unsloth.losses import Head
from lwf_unsloth.meters import Meter
from lwf_unsloth.objective import Objective
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher, make_teacher
from lwf_unsloth.teacher_cache import CachedTeacher

LAMBDA = 2.0
"""lwf_lambda's default."""
OUT_OF_MEMORY = "out of memory"
"""Error of a row that did not fit."""


@dataclass(frozen=True)
class Size:
    """Rows and tokens of a batch, and the share of its tokens that are labelled."""

    batch: int
    length: int
    labelled: float = 1.0

    @classmethod
    def of(cls, shape: str, labelled: float = 1.0) -> "Size":
        """From "B4xT512"."""
        batch, length = shape.removeprefix("B").split("xT")
        return cls(int(batch), int(length), labelled)

    def __str__(self) -> str:
        """As `of` reads it."""
        return f"B{self.batch}xT{self.length}"


@dataclass(frozen=True)
class Kind:
    """A batch's make-up, and how often it comes in a period."""

    rehearsal: int = 0
    times: int = 1


def period(batch: int, share: Fraction) -> list[Kind]:
    """The shortest run of batches that holds exactly `share` rehearsal rows, evenly spread."""
    batches = share.denominator // math.gcd(share.denominator, batch * share.numerator)
    total = int(batches * batch * share)
    few, more = divmod(total, batches)
    kinds = [Kind(few, batches - more)] + ([Kind(few + 1, more)] if more else [])
    return kinds


Loss = Callable[["Loop", dict[str, Tensor]], Tensor]


class Loop:
    """A model in training: loss, backward, clipping, optimizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, rate: float = 1e-5) -> None:
        from accelerate import Accelerator

        self.model, self.tokenizer = model, tokenizer
        self.scratch = tempfile.TemporaryDirectory()
        self.base = causal_lm(model)
        self.device = model.get_input_embeddings().weight.device
        self.vocab = int(self.base.config.vocab_size)
        teacher = make_teacher(model)
        assert isinstance(teacher, OwnTeacher)
        self.teacher = teacher
        self.second: Teacher | None = None
        start: Any = getattr(model, "for_training", model.train)
        start()
        probe = torch.arange(8, device=self.device)[None]
        self.objective = Objective.of(model, self.teacher, probe)
        self.meter = Meter()
        self.accelerator = Accelerator(mixed_precision="fp16" if on_cuda() else "no")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=rate, fused=on_cuda())
        _, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._attach_scaler()

    def _attach_scaler(self) -> None:
        """Where Unsloth's trainer puts it for its fused cross entropy to find."""
        for module in (self.model, self.base, getattr(self.base, "model", self.base)):
            module.accelerator_scaler = self.accelerator.scaler

    @property
    def head(self) -> Head:
        """The output head."""
        assert self.objective.head is not None
        return self.objective.head

    def use_second(self, model: nn.Module) -> None:
        """Takes a second model as teacher of the arms that want one."""
        self.second = ModelTeacher(model, self.model)

    def batch(self, size: Size, rehearsal: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """Random rows without padding, the first `rehearsal` of them rehearsal rows."""
        draw = torch.Generator().manual_seed(seed)
        shape = (size.batch, size.length)
        ids = torch.randint(8, self.vocab, shape, generator=draw).to(self.device)
        prompt = size.length - round(size.length * size.labelled)
        labels = ids.clone()
        labels[:, :prompt] = -100
        rows = torch.arange(size.batch, device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "is_rehearsal": rows < rehearsal,
            "prompt_length": torch.full_like(rows, prompt),
        }

    def step(self, loss: Loss, batch: dict[str, Tensor]) -> Tensor:
        """One optimizer step; the loss, on the device."""
        value = loss(self, batch)
        self.accelerator.backward(value)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.detach()

    def clean(self) -> None:
        """Leaves nothing of a step behind, also of one that broke off."""
        self.optimizer.zero_grad()
        gc.collect()
        if on_cuda():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def plain_unsloth(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """What Unsloth's SFTTrainer does: labels to the model, its fused cross entropy."""
    count = (batch["labels"][:, 1:] != -100).sum()
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return loop.model(**given, num_items_in_batch=count).loss


def through(loop: Loop, objective: Objective, batch: dict[str, Tensor], rows: str) -> Tensor:
    """The loss of an objective, as `LwFTrainer` takes it."""
    counts = token_roles(batch, rows, False, True).counts  # get_batch_samples
    roles = token_roles(batch, rows, False, True)  # compute_loss
    n_ce, n_kl = counts[:2].sum().clamp(min=1), counts[2:].sum().clamp(min=1)
    result = objective(loop.model, batch, roles, n_ce, n_kl, LAMBDA, 1.0)
    loop.meter.add(result, roles)
    return result.total


def ours_all(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """KL on every token."""
    return through(loop, loop.objective, batch, "all")


def ours_rehearsal(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """The default recipe: KL on rehearsal rows only."""
    return through(loop, loop.objective, batch, "rehearsal")


def ours_all_cached(loop: Loop, batch: dict[str, Tensor]) -> Loss:
    """KL on every token with a warm cache of the teacher's hidden states, filled here with the
    batch, closed, and opened anew: it is read from its files.
    """
    products = str(loop.head.weight.dtype).removeprefix("torch.")
    folder = Path(loop.scratch.name) / f"cache-{len(os.listdir(loop.scratch.name))}"
    teacher = CachedTeacher(loop.teacher, "hidden", folder, loop.tokenizer, products=products)
    objective = Objective(loop.head, teacher)

    def loss(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
        return through(loop, objective, batch, "all")

    loop.step(loss, batch)
    teacher.close()
    return loss


def full_logits(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """Textbook: the logits of both whole, as the Trainer's wrapper gives them in fp32."""
    ids, labels = batch["input_ids"], batch["labels"]
    student = model_logits(loop.model, ids, None)  # (B, T, V)
    teacher = loop.teacher.logits(ids, None)
    following = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    ce = functional.cross_entropy(student.flatten(0, 1), following, reduction="sum")
    log_q, log_p = (logits[:, :-1].log_softmax(-1) for logits in (student, teacher))
    del teacher
    kl = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return ce / (following >= 0).sum() + LAMBDA * kl / ids[:, 1:].numel()


def two_calls(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """Unsloth's fused cross entropy, then its fused JSD at beta 0, on the hidden states of both."""
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_jsd

    ids, weight, scaler = batch["input_ids"], loop.head.weight, loop.accelerator.scaler
    hidden = model_hidden(loop.model, ids, None)
    n_ce = (batch["labels"][:, 1:] != -100).sum()
    n_kl = torch.tensor(ids[:, 1:].numel(), device=ids.device)
    ce = unsloth_fused_ce_loss(
        None, hidden, weight, None, batch["labels"], n_items=n_ce, scaling=scaler
    )
    with torch.no_grad():
        teacher = loop.teacher.hidden(ids, None)
    kl = fused_linear_jsd(
        hidden[:, :-1].flatten(0, 1), weight, teacher[:, :-1].flatten(0, 1), weight,
        beta=0.0, num_items_in_batch=n_kl, scaling=None if scaler is None else scaler.get_scale(),
    )  # fmt: skip
    return ce + LAMBDA * kl


def two_models(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """Ours with a second 4-bit model as teacher."""
    return through(loop, Objective(loop.head, loop.second), batch, "all")


def trl_gkd(loop: Loop, batch: dict[str, Tensor]) -> Tensor:
    """TRL's GKD loss at beta 0 with a second model: no cross entropy, both logits whole."""
    from trl.experimental.gkd import GKDTrainer

    assert loop.second is not None
    ids, mask = batch["input_ids"], batch["attention_mask"]
    student = model_logits(loop.model, ids, mask)
    teacher = loop.second.logits(ids, mask).float()  # as accelerate's wrapper gives it
    labels = batch["labels"][:, 1:]
    return GKDTrainer.generalized_jsd_loss(
        student_logits=student[:, :-1],
        teacher_logits=teacher[:, :-1],
        labels=labels,
        beta=0.0,
        num_items_in_batch=(labels != -100).sum(),
    )


def failure(error: BaseException) -> str:
    """One line of what went wrong, for a row's "error"."""
    signs = ("out of memory", "alloc_failed", "negligible gpu memory")  # torch, cuBLAS, Unsloth
    if isinstance(error, torch.OutOfMemoryError) or any(s in str(error).lower() for s in signs):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def tried(loop: Loop, action: Callable[[], Any]) -> SimpleNamespace:
    """`value` of an action, or its `error` in a line; nothing of a failed one stays in memory."""
    try:
        return SimpleNamespace(value=action(), error=None)
    except Exception as error:
        problem = failure(error)
        error.__traceback__ = error.__context__ = None  # whose frames hold tensors
    loop.clean()
    return SimpleNamespace(value=None, error=problem)
