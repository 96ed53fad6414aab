"""The teacher cache of several processes: after an epoch each has the rows of all."""

from typing import Any

from lwf_unsloth.backend import prepare
from lwf_unsloth.teacher_cache import CachedTeacher

prepare()

from transformers import TrainerCallback  # noqa: E402


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
