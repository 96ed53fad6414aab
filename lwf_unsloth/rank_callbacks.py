"""What several processes that train together do at the borders of an epoch."""

from typing import Any

from lwf_unsloth.backend import prepare
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
