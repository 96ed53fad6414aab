"""Rehearsal rows mixed into the task: an exact share, spread evenly, the same for the same seed.

Let r be the share of rehearsal rows in the mixed set. Beside N task rows stand round(r / (1 - r) *
N) rehearsal rows. Every task row comes exactly once an epoch; rehearsal rows are drawn without
replacement until the last one was used, then again in a new order, and the draw goes on from epoch
to epoch.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from lwf_unsloth.arguments import checked
from lwf_unsloth.checks import check_ratio
from lwf_unsloth.errors import DataError
from lwf_unsloth.rank_shares import dealt
from lwf_unsloth.rows import as_rows, row_key

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_COLUMNS = ("instruction", "input", "output", "text")


def rehearsal_count(n_task: int, ratio: float) -> int:
    """How many rehearsal rows stand beside n_task task rows: round(ratio / (1 - ratio) *
    n_task).
    """
    share = check_ratio(ratio)
    return round(share / (1 - share) * n_task)


def rehearsal_order(
    n_task: int, n_rehearsal: int, ratio: float, *, seed: int, epoch: int = 0
) -> list[int]:
    """The order of one epoch, as places in task rows followed by rehearsal rows.

    Any window of n rows holds n * ratio rehearsal rows, give or take less than one.

    Args:
        n_task: task rows; their places are 0 .. n_task - 1.
        n_rehearsal: rehearsal rows; their places follow.
        ratio: share of rehearsal rows in the mixed set. At 0 the order is that of the task alone.
        seed: of both orders; Python's global random state is not touched.
        epoch: counted from 0; the draw of rehearsal rows goes on where the epoch before stopped.

    Raises:
        ConfigError: ratio out of range.
        DataError: no task rows; or a ratio above 0 and no rehearsal rows.
    """
    count = rehearsal_count(n_task, ratio)
    if n_task < 1:
        raise DataError(
            f"There are {n_task} task rows; at least one is needed. Look at the task's source."
        )
    if ratio > 0 and n_rehearsal < 1:
        raise DataError(
            f"The rehearsal ratio is {ratio} and there are no rehearsal rows, so nothing would "
            "be kept "
            "from forgetting. Give rehearsal rows or set the ratio to 0."
        )
    task = list(range(n_task))
    random.Random(f"{seed} task {epoch}").shuffle(task)
    if not count:
        return task
    drawn = _draw(n_rehearsal, epoch * count, count, seed)
    return _interleave(task, [n_task + place for place in drawn], ratio)


def _draw(size: int, start: int, count: int, seed: int) -> list[int]:
    """`count` places from an endless draw of `size` rows, of which `start` are used already."""
    drawn: list[int] = []
    for turn in range(start // size, (start + count - 1) // size + 1):
        order = list(range(size))
        random.Random(f"{seed} rehearsal {turn}").shuffle(order)
        drawn += order
    begin = start % size
    return drawn[begin : begin + count]


def _interleave(task: list[int], rehearsal: list[int], ratio: float) -> list[int]:
    """A rehearsal row wherever floor(i * ratio + 1/2) grows: whole numbers only, so no drift."""
    share = Fraction(str(float(ratio)))
    top, bottom = 2 * share.numerator, 2 * share.denominator
    mixed: list[int] = []
    tasks, others = iter(task), iter(rehearsal)
    total = len(task) + len(rehearsal)
    level = share.denominator
    for _ in range(total):
        after = level + top
        source = others if after // bottom > level // bottom else tasks
        level = after
        mixed.append(next(source))
    return mixed


@checked("ratio")
def mix_rehearsal(
    task: Dataset | Iterable[Mapping[str, Any]],
    rehearsal: Dataset | Iterable[Mapping[str, Any]] | None,
    ratio: float,
    *,
    seed: int = 42,
    epoch: int = 0,
) -> Dataset:
    """Task and rehearsal rows in the order of `rehearsal_order`, with a column is_rehearsal.

    Both may hold Alpaca rows or plain passages; a column that a row has not is None, and other
    columns than instruction, input, output, text and whole are left out. At ratio 0 rehearsal may
    be None. What was given is not changed. It is logged how often rehearsal rows repeat.

    Raises:
        ConfigError: ratio out of range.
        DataError: no task rows, or a ratio above 0 and no rehearsal rows.
    """
    share = check_ratio(ratio)
    first = [dict(row) for row in as_rows(task, "task rows")]
    second = [dict(row) for row in as_rows(rehearsal, "rehearsal rows")] if share else []
    order = rehearsal_order(len(first), len(second), share, seed=seed, epoch=epoch)
    tell_repeats(len(first), len(second), share)
    rows = first + second
    return _as_dataset([rows[place] for place in order], [place >= len(first) for place in order])


def tell_repeats(n_task: int, n_rehearsal: int, ratio: float) -> str:
    """Logs and returns one sentence where rehearsal rows repeat within an epoch ("" where not)."""
    count = rehearsal_count(n_task, ratio)
    if count <= n_rehearsal or not n_rehearsal:
        return ""
    text = (
        f"{count} rehearsal rows are needed beside {n_task} task rows (ratio {ratio}) and there "
        "are "
        f"{n_rehearsal}: each comes {math.floor(count / n_rehearsal)} to "
        f"{math.ceil(count / n_rehearsal)} times an epoch."
    )
    logger.warning("%s", text)
    return text


def drop_overlap(
    rows: Dataset | Iterable[Mapping[str, Any]], held_out: Dataset | Iterable[Mapping[str, Any]]
) -> tuple[Dataset, list[int]]:
    """The rows whose text (case and spaces aside) is not held out, and the numbers (from 1) of the
    others.

    Use it on rehearsal rows before they are trained on, with the evaluation rows as `held_out`.
    """
    keys = {row_key(row) for row in as_rows(held_out, "held-out rows")}
    kept, dropped = [], []
    for number, row in enumerate(as_rows(rows, "rows"), start=1):
        if row_key(row) in keys:
            dropped.append(number)
        else:
            kept.append(dict(row))
    return _as_dataset(kept, None), dropped


def _as_dataset(rows: list[dict[str, Any]], roles: list[bool] | None) -> Dataset:
    """Rows with the columns that any of them has."""
    from datasets import Dataset, Features, Value

    present = {name for row in rows for name in row}
    columns: dict[str, list[Any]] = {
        name: [row.get(name) for row in rows] for name in _COLUMNS if name in present
    }
    types = {name: Value("string") for name in columns}
    if "whole" in present:
        columns["whole"] = [row.get("whole") for row in rows]
        types["whole"] = Value("bool")
    if roles is not None:
        columns["is_rehearsal"], types["is_rehearsal"] = roles, Value("bool")
    return Dataset.from_dict(columns, features=Features(types))


class RehearsalSampler(Sampler[int]):
    """`rehearsal_order` as a sampler over task rows followed by rehearsal rows.

    The order depends on seed and epoch alone, so a resumed run sees the rows that it would have
    seen.
    """

    def __init__(
        self,
        n_task: int,
        n_rehearsal: int,
        ratio: float,
        *,
        seed: int = 42,
        ranks: int = 1,
        batch: int = 1,
        steps: int = 1,
    ) -> None:
        """Makes the first epoch's order.

        Args:
            n_task: Task rows.
            n_rehearsal: Rehearsal rows in the pool.
            ratio: Share of rehearsal rows.
            seed: Of every epoch's order.
            ranks: Processes that train together, each of which gets its share; see `dealt`.
            batch: Rows of a process's forward.
            steps: Forwards of an optimizer step.
        """
        self.n_task, self.n_rehearsal = n_task, n_rehearsal
        self.ratio, self.seed, self.epoch = check_ratio(ratio), seed, 0
        self._deal = {"ranks": ranks, "batch": batch, "steps": steps}
        self._order: tuple[int, list[int]] = (0, self._epoch_order(0))

    def _epoch_order(self, epoch: int) -> list[int]:
        order = rehearsal_order(
            self.n_task, self.n_rehearsal, self.ratio, seed=self.seed, epoch=epoch
        )
        return dealt(order, self.n_task, self.ratio, **self._deal)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, counted from 0."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.n_task + rehearsal_count(self.n_task, self.ratio)

    def __iter__(self) -> Iterator[int]:
        if self._order[0] != self.epoch:
            self._order = (self.epoch, self._epoch_order(self.epoch))
        return iter(self._order[1])
