"""A run with `rank_schedule` or `freeze_schedule`: what may not move yet, does not.

All of the final rank is there from the beginning, and LoRA's scale stays alpha / r of the final
rank. A column of lora_B that is not trained yet is 0, so it adds nothing to the model, and the row
of lora_A that belongs to it gets no gradient. `requires_grad` is never changed: Unsloth's kernels,
DDP and the checkpoints see an ordinary adapter. Masked are the gradients, before they are clipped;
and what an optimizer would do without a gradient (weight decay, momentum) is taken back.

Adam counts its steps for a whole tensor, so a column that begins in the middle of the run would
move 3 to 6 times too far: its averages are young, but are taken as settled. Its step is therefore
scaled to what Adam does at its first, second, ... step (arXiv 1412.6980, equation 3).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.backend import prepare
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.rank_schedule import Phases, freeze_phases, plain, rank_phases

prepare()

from transformers import TrainerCallback  # noqa: E402

SIDE = re.compile(r"\.lora_(?:embedding_)?(A|B)(?:\.|$)")
ADAM = re.compile(r"(Paged)?AdamW?(8bit|32bit)?")
"""Optimizers that correct the averages of a tensor by its number of steps."""
ELSEWHERE = ("lomo", "layerwise", "schedule_free")
"""Optimizers that move a tensor within the backward pass, or keep a second copy of it."""


@dataclass(frozen=True)
class _Tensor:
    """A trained tensor."""

    parameter: nn.Parameter
    dim: int | None
    """Dimension of the rank; None for a tensor that is not one of LoRA's two."""
    frozen: tuple[bool, ...]
    """Whether each phase of `freeze_schedule` freezes it."""


@dataclass(frozen=True)
class _Kept:
    """Columns before a step of the optimizer, and how much of the step they take."""

    view: Tensor
    before: Tensor
    share: float
    """0 keeps them as they were."""


class Curriculum(TrainerCallback):
    """Holds what a phase does not train; without both schedules it does nothing."""

    def __init__(self, model: nn.Module, args: LwFConfig) -> None:
        """Finds the tensors.

        Args:
            model: The model with its adapter, unwrapped.
            args: The run's settings.

        Raises:
            ConfigError: Schedules that do not fit the adapter, or freeze nothing or everything.
        """
        self.ranks = rank_phases(args.rank_schedule)
        self.freezes = freeze_phases(args.freeze_schedule)
        self.tensors: list[_Tensor] = []
        self._steps: tuple[list[int], list[int]] = [], []
        self._done = 0  # steps done when the present one began
        self._kept: list[_Kept] = []
        if self.ranks is None and self.freezes is None:
            return
        if any(word in str(getattr(args.optim, "value", args.optim)) for word in ELSEWHERE):
            raise ConfigError(
                f"optim is {args.optim!r}, which moves weights while gradients are computed, or "
                "keeps a second copy of them: what a phase holds still could not be held. Take "
                "another, such as adamw_torch."
            )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if self.ranks is not None:
            _check_ranks(trained, self.ranks)
        patterns = self.freezes.values if self.freezes is not None else ()
        for name, parameter in trained.items():
            side = SIDE.search(name)
            dim = None if side is None else "AB".index(side[1])
            frozen = tuple(bool(p and re.search(p, name)) for p in patterns)
            self.tensors.append(_Tensor(parameter, dim, frozen))
        _check_frozen(self.freezes, self.tensors, trained)

    # ------------------------------------------------------------------ what holds now

    @property
    def rank(self) -> int | None:
        """The rank that is trained at this step; None without a schedule of it."""
        if self.ranks is None:
            return None
        return int(self.ranks.values[max(_place(self._steps[0], self._done), 0)])

    def _is_frozen(self, one: _Tensor, done: int) -> bool:
        """Whether a tensor is frozen at the step that follows `done` steps."""
        place = _place(self._steps[1], done)
        return place >= 0 and one.frozen[place]

    def logged(self) -> dict[str, float]:
        """The rank, and how many tensors are frozen, for the log."""
        found: dict[str, float] = {}
        if self.rank is not None:
            found["lora_rank"] = self.rank
        if self.freezes is not None:
            found["frozen_tensors"] = sum(self._is_frozen(one, self._done) for one in self.tensors)
        return found

    # ------------------------------------------------------------------ the events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the phases in steps, and looks whether the adapter is where the schedule is.

        Raises:
            ConfigError: A phase without a step, or trained columns beyond the present rank.
        """
        phases = self.ranks, self.freezes
        found = [[] if one is None else one.steps(state.max_steps) for one in phases]
        self._steps = found[0], found[1]
        self._done = state.global_step
        beyond = (view for one in self.tensors if one.dim == 1 for view in self._inactive(one))
        if any(bool(view.any()) for view in beyond):
            raise ConfigError(
                f"rank_schedule trains rank {self.rank} at step {state.global_step + 1}, but the "
                "adapter has weights beyond it already: they would act and stay as they are. Train "
                "a new adapter, resume with the schedule of the run, or leave rank_schedule out."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the phase of the step, which holds for all of its micro-batches."""
        self._done = state.global_step

    @torch.no_grad()
    def mask(self) -> None:
        """Sets the gradients of what is held still to 0; after each backward, so before they are
        clipped and their norm is logged.
        """
        views = []
        for one in self.tensors:
            grad = one.parameter.grad
            if grad is None:
                continue
            if self._is_frozen(one, self._done):
                views.append(grad)
            else:
                views.extend(self._inactive(one, grad))
        if views:
            torch._foreach_zero_(views)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Keeps what the optimizer must not move, or not so far; it passes over frozen tensors."""
        betas = _betas(getattr(optimizer, "optimizer", optimizer))
        self._kept = []
        for one in self.tensors:
            if self._is_frozen(one, self._done):
                one.parameter.grad = None
            else:
                self._kept += [
                    _Kept(view, view.clone(), share) for view, share in self._held(one, betas)
                ]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes back what the optimizer did to columns that are not trained yet, or too much."""
        for one in self._kept:
            new = one.before if not one.share else torch.lerp(one.before, one.view, one.share)
            one.view.copy_(new)
        self._kept = []

    # ------------------------------------------------------------------ the columns

    def _inactive(self, one: _Tensor, tensor: Tensor | None = None) -> Iterator[Tensor]:
        """The columns of lora_B, or rows of lora_A, that are not trained yet; of its gradient, if
        that is given.
        """
        if self.ranks is None or one.dim is None or self.rank == self.ranks.values[-1]:
            return
        whole = one.parameter.detach() if tensor is None else tensor
        rank = int(self.rank or 0)
        yield whole.narrow(one.dim, rank, whole.shape[one.dim] - rank)

    def _held(
        self, one: _Tensor, betas: tuple[float, float] | None
    ) -> Iterator[tuple[Tensor, float]]:
        """Columns that take no step, or a part of it, with that part."""
        yield from ((view, 0.0) for view in self._inactive(one))
        if self.ranks is None or one.dim is None or betas is None:
            return
        ranks, starts = self.ranks.values, self._steps[0]
        whole = one.parameter.detach()
        all_steps = self._moved(one, 0)
        for low, high, start in zip(ranks, ranks[1:], starts[1:], strict=False):
            own = self._moved(one, start)
            if start <= self._done and own < all_steps:
                share = _young(own, betas) / _young(all_steps, betas)
                yield whole.narrow(one.dim, low, high - low), share

    def _moved(self, one: _Tensor, first: int) -> int:
        """Steps from number `first` to the present one in which a tensor was not frozen."""
        borders = [0, *self._steps[1], self._done + 1]
        frozen = (False, *one.frozen)
        return sum(
            max(0, min(end, self._done + 1) - max(begin, first))
            for begin, end, still in zip(borders, borders[1:], frozen, strict=False)
            if not still
        )


def _place(starts: list[int], done: int) -> int:
    """Number of the phase after so many steps; -1 before the first."""
    return sum(first <= done for first in starts) - 1


def _young(steps: int, betas: tuple[float, float]) -> float:
    """What Adam multiplies the ratio of its two averages by after so many steps."""
    return math.sqrt(1 - betas[1] ** steps) / (1 - betas[0] ** steps)


def _betas(optimizer: Any) -> tuple[float, float] | None:
    """Decay of the averages of an Adam; None for other optimizers."""
    if optimizer is None or not ADAM.fullmatch(type(optimizer).__name__):
        return None
    first, second = optimizer.param_groups[0]["betas"]
    return float(first), float(second)


def _check_ranks(trained: dict[str, nn.Parameter], ranks: Phases) -> None:
    """Raises a ConfigError unless LoRA's rank is that of the last phase, in every module."""
    found = {
        name: p.shape["AB".index(side[1])]
        for name, p in trained.items()
        if (side := SIDE.search(name)) is not None
    }
    last = ranks.values[-1]
    if not found:
        raise ConfigError(
            f"rank_schedule ends at {last}, but no LoRA is trained, so there is no rank. Load the "
            "model with load_model, or leave rank_schedule out."
        )
    other = {name: rank for name, rank in found.items() if rank != last}
    if other:
        name, rank = next(iter(other.items()))
        raise ConfigError(
            f"rank_schedule ends at rank {last}, but the adapter has rank {rank} (in {name}): all "
            f"of the final rank is made when the model is loaded. Take ModelConfig(r={last}), or "
            f"let the schedule end at {rank}."
        )


def _check_frozen(
    freezes: Phases | None, tensors: list[_Tensor], trained: dict[str, nn.Parameter]
) -> None:
    """Raises a ConfigError where a pattern freezes nothing, or everything that is trained."""
    if freezes is None:
        return
    for number, (start, pattern) in enumerate(plain(freezes) or []):
        count = sum(one.frozen[number] for one in tensors)
        names = [name.removeprefix("base_model.model.") for name in trained]
        if pattern and not count:
            raise ConfigError(
                f"freeze_schedule freezes {pattern!r} from {start:g} on, but no trained tensor has "
                f"that in its name, so it would have no effect. Their names are such as "
                f"{', '.join(names[:2])}."
            )
        if count == len(tensors):
            raise ConfigError(
                f"freeze_schedule freezes {pattern!r} from {start:g} on, which is all that is "
                f"trained ({count} tensors): these steps would teach nothing. Leave a part of it "
                'out of the pattern; "" freezes nothing.'
            )
