"""Whether a run takes a teacher cache, how large it will be, and whether the disk has room."""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.cache_parts import mark_of
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.rehearsal import rehearsal_count
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher, vocabulary
from lwf_unsloth.teacher_cache import CachedTeacher

logger = logging.getLogger(__name__)

SAMPLE = 1000
"""Rows whose length is looked at for the mean."""


@dataclass(frozen=True)
class ComingRows:
    """The rows of a run that carry KL."""

    distinct: int
    """How many different ones will come."""
    again: bool
    """Whether some come more than once, so that a cache saves forwards within the run."""

    @classmethod
    def of(
        cls, args: LwFConfig, n_task: int, n_rehearsal: int, lwf_rows: str, processes: int = 1
    ) -> "ComingRows":
        """Counts them from the settings, as the sampler draws them."""
        rehearsed = rehearsal_count(n_task, args.rehearsal_ratio) if n_rehearsal else 0
        passes = args.num_train_epochs
        if args.max_steps > 0:
            a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
            passes = args.max_steps * a_step * processes / (n_task + rehearsed)
        drawn = math.ceil(passes * rehearsed)
        task = 0 if lwf_rows == "rehearsal" else min(n_task, math.ceil(passes * n_task))
        return cls(task + min(n_rehearsal, drawn), drawn > n_rehearsal or (task > 0 and passes > 1))


def cache_bytes(rows: int, mean_tokens: float, token_bytes: int) -> int:
    """Size on disk: rows x mean tokens x bytes a token (file headers are under 0.1 % of it)."""
    return round(rows * mean_tokens * token_bytes)


def token_bytes(teacher: OwnTeacher | ModelTeacher, mode: str, k: int) -> int:
    """Bytes a token: H values in the head's dtype, or k ids and log-probs and the tail's mass."""
    if mode == "topk":
        return 8 * min(k, vocabulary(teacher.model)) + 4
    assert teacher.head is not None
    return teacher.head.weight.shape[1] * teacher.head.weight.element_size()


def with_cache(
    teacher: Teacher,
    args: LwFConfig,
    tokenizer: Any,
    dataset: Any,
    n_task: int,
    lwf_rows: str,
    *,
    from_logits: bool = False,
) -> Teacher:
    """The teacher behind a cache if the settings ask for one; says how much disk it will take.

    Args:
        teacher: The live teacher.
        args: The settings.
        tokenizer: The one that encoded the rows.
        dataset: Encoded task rows, then rehearsal rows.
        n_task: Task rows.
        lwf_rows: Where the KL acts, "auto" resolved.
        from_logits: Whether student or teacher has no head that could be used.

    Raises:
        ConfigError: "hidden" without a usable head, or more than the disk has free.
    """
    if args.lwf_cache == "off" or not isinstance(teacher, (OwnTeacher, ModelTeacher)):
        return teacher
    if args.lwf_cache == "hidden" and from_logits:
        raise ConfigError(
            'lwf_cache is "hidden", but the output head of this model is trained or of an unknown '
            "kind, so its hidden states do not give the teacher's distribution. Take "
            'lwf_cache="topk" (k probabilities a token) or "off".'
        )
    folder = Path(args.lwf_cache_dir or Path(args.output_dir) / "teacher_cache")
    cached = CachedTeacher(
        teacher,
        args.lwf_cache,
        folder,
        tokenizer,
        products="float16" if args.fp16 else "bfloat16" if args.bf16 else "as loaded",
        k=args.lwf_cache_k,
        temperature=float(args.lwf_temperature),
        rank=args.process_index,
    )
    n_rehearsal = len(dataset) - n_task
    coming = ComingRows.of(args, n_task, n_rehearsal, lwf_rows, args.world_size)
    first = n_task if lwf_rows == "rehearsal" else 0
    mean = mean_tokens(dataset, range(first, len(dataset)))
    a_token = token_bytes(teacher, args.lwf_cache, args.lwf_cache_k)
    _tell(cached, coming, mean, a_token)
    return cached


def mean_tokens(dataset: Any, among: Sequence[int]) -> float:
    """Mean length of encoded rows, of at most `SAMPLE` evenly spread ones."""
    chosen = among[:: max(1, len(among) // SAMPLE)]
    lengths = [len(ids) for ids in dataset.select(chosen)["input_ids"]]
    return sum(lengths) / max(1, len(lengths))


def _tell(cached: CachedTeacher, coming: ComingRows, mean: float, a_token: int) -> None:
    """Says the size, and refuses what does not fit.

    Raises:
        ConfigError: The disk has less free than the cache will still need.
    """
    size = cache_bytes(coming.distinct, mean, a_token)
    files = cached.folder.glob(f"part-{mark_of(cached.identity())}-*.safetensors")
    there = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(_existing(cached.folder)).free
    how = f"{coming.distinct} rows x {mean:.0f} tokens x {a_token} bytes"
    logger.info(
        "Teacher cache (%s): about %s on disk (%s), of which %s is there, in %s, where %s is free.",
        cached.mode,
        _size(size),
        how,
        _size(min(there, size)),
        cached.folder,
        _size(free),
    )
    if size - there > free:
        less = "" if cached.mode == "topk" else 'lwf_cache="topk" (less a token), '
        raise ConfigError(
            f"The teacher cache would need {_size(size - there)} more on disk ({how}), but "
            f"{cached.folder} has {_size(free)} free. Take {less}another lwf_cache_dir, fewer "
            'rehearsal rows, or lwf_cache="off".'
        )
    if not coming.again and there < size:
        logger.warning(
            "Every row with KL comes only once in this run, so the teacher cache is filled but "
            "hardly read: it pays from the second epoch on, or in the next run with the same "
            "lwf_cache_dir."
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), Path.cwd())


def _size(count: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"
