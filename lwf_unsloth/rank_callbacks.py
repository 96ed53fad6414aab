"""What several processes that train together do at the borders of an epoch."""

from typing import Any

from torch import nn

from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.ranks import world
from lwf_unsloth.rehearsal import RehearsalSampler
from lwf_unsloth.teacher_cache import CachedTeacher

prepare()

from transformers import TrainerCallback  # noqa: E402


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch: where a run is resumed within an epoch, accelerate wraps it once
    more and does not reach it, and it would give the first epoch's order.
    """

    def __init__(self, sampler: RehearsalSampler) -> None:
        """Takes the sampler.

        Args:
            sampler: That of the training rows.
        """
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the epoch that begins, or goes on."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class SameTrained(TrainerCallback):
    """Which gradients processes share is settled before the first step: a tensor that is unfrozen
    later would go another way in each of them, without a word.
    """

    def __init__(self, model: nn.Module) -> None:
        """Notes what is trained.

        Args:
            model: The model, unwrapped.
        """
        self.parameters = list(model.named_parameters())
        self.first = [p.requires_grad for _, p in self.parameters]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares.

        Raises:
            ConfigError: A tensor was frozen or unfrozen.
        """
        pairs = zip(self.parameters, self.first, strict=True)
        changed = [name for (name, p), before in pairs if p.requires_grad != before]
        if changed:
            raise ConfigError(
                f"{len(changed)} tensors were frozen or unfrozen since the run began (such as "
                f"{changed[0]}), while {world()} processes train together: which gradients they "
                "share was settled before, so each would go its own way. Keep requires_grad as it "
                "is and set the gradient to 0 in a callback's on_pre_optimizer_step, or train on "
                "one process."
            )


class CacheSharing(TrainerCallback):
    """Rows come to another process in the next epoch: none is computed or written again."""

    def __init__(self, cached: CachedTeacher) -> None:
        """Takes the cache.

        Args:
            cached: The run's teacher.
        """
        self.cached = cached

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes, waits for the others, and looks at theirs."""
        self.cached.share()
