"""One metric of one benchmark task, item by item under both models, and how sure the change is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lwf_unsloth.intervals import Interval, Z, mean_interval, share_change, share_interval


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task (or group of tasks), on the same items for both models."""

    task: str
    metric: str
    ids: tuple[str, ...]
    """Name of each item: its task and its place there ("mmlu_anatomy/3")."""
    base: tuple[float, ...] | None
    """The base's value of each item; None where the base was not asked."""
    tuned: tuple[float, ...] | None
    """The tuned model's."""
    counts: tuple[float, ...] | None = None
    """What each value is a sum over (constraints of a prompt, words of a text); None: one each."""
    higher_is_better: bool = True
    fewshot: int = 0
    """Examples in the prompt."""

    @property
    def items(self) -> int:
        """Items asked."""
        return len(self.ids)

    @cached_property
    def base_score(self) -> Interval | None:
        """The base's mean over items."""
        return self._mean(self.base)

    @cached_property
    def tuned_score(self) -> Interval | None:
        """The tuned model's mean over items."""
        return self._mean(self.tuned)

    @cached_property
    def change(self) -> Interval | None:
        """Tuned less base, paired by item; `detectable` says what such a sample can show."""
        if self.base is None or self.tuned is None:
            return None
        if self.counts is None:
            return share_change(self.base, self.tuned)
        apart = [ours - theirs for ours, theirs in zip(self.tuned, self.base, strict=True)]
        if _whole(apart):
            return _parts_interval(apart, self.counts, added=(1, -1))
        return mean_interval(apart, self.counts)

    @property
    def lost(self) -> int:
        """Items that the base did better."""
        return sum(change < 0 for change in self._gains())

    @property
    def won(self) -> int:
        """Items that the tuned model did better."""
        return sum(change > 0 for change in self._gains())

    @property
    def p_value(self) -> float | None:
        """McNemar's exact test: chance of so uneven a split of changed items if both were equal.

        Source: McNemar 1947, in the binomial form; two-sided.
        """
        if self.change is None:
            return None
        n, fewer = self.lost + self.won, min(self.lost, self.won)
        tail = sum(math.comb(n, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**n)

    @property
    def verdict(self) -> str:
        """What the change says, and what it could have said."""
        change = self.change
        if change is None or math.isnan(change.low):
            return "nothing can be said of a difference"
        could = f"a sample like this shows differences from {change.detectable:.3f} on"
        if not change.clear:
            return f"no difference beyond chance; {could}"
        better = (change.value > 0) == self.higher_is_better
        return f"{'better' if better else 'worse'} beyond chance; {could}"

    def _mean(self, values: tuple[float, ...] | None) -> Interval | None:
        if values is None:
            return None
        if self.counts is None:
            return share_interval(values)
        if _whole(values):
            return _parts_interval(values, self.counts, added=(1, 1, 0, 0))
        return mean_interval(values, self.counts)

    def _gains(self) -> Iterator[float]:
        sign = 1 if self.higher_is_better else -1
        for ours, theirs in zip(self.tuned or (), self.base or (), strict=False):
            yield sign * (ours - theirs)

    def __str__(self) -> str:
        """One line."""
        text = f"{self.task} {self.metric} ({self.items} items, {self.fewshot}-shot):"
        if self.change is None:
            alone, side = self.tuned_score or self.base_score, "tuned" if self.tuned else "base"
            assert alone is not None
            return f"{text} {side} {alone.value:.3f} [{alone.low:.3f}, {alone.high:.3f}]"
        assert self.base_score is not None and self.tuned_score is not None
        change = self.change
        return (
            f"{text} base {self.base_score.value:.3f}, tuned {self.tuned_score.value:.3f}, change "
            f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}], {self.lost} items lost "
            f"and {self.won} won (p {self.p_value:.2g}); {self.verdict}"
        )

    def to_dict(self, items: bool = True) -> dict[str, Any]:
        """Plain values, for JSON.

        Args:
            items: With each item's name and its value under both models.
        """
        sides = {"base": self.base_score, "tuned": self.tuned_score, "change": self.change}
        found: dict[str, Any] = {
            "task": self.task,
            "metric": self.metric,
            "items": self.items,
            "fewshot": self.fewshot,
            "higher_is_better": self.higher_is_better,
            **{name: None if one is None else one.to_dict() for name, one in sides.items()},
            "lost": self.lost,
            "won": self.won,
            "p_value": self.p_value,
        }
        if items:
            nothing = [None] * self.items
            columns = (self.ids, self.base or nothing, self.tuned or nothing)
            pairs = zip(*columns, self.counts or [1] * self.items, strict=True)
            found["pairs"] = [
                {"id": name, "base": theirs, "tuned": ours, "count": count}
                for name, theirs, ours, count in pairs
            ]
        return found


def _whole(values: Sequence[float]) -> bool:
    """Whether every value counts something: constraints kept, not nats."""
    return all(value == int(value) for value in values)


def _parts_interval(
    sums: Sequence[float], counts: Sequence[float], added: Sequence[int]
) -> Interval:
    """Share of parts (constraints of prompts) with an interval over the items that hold them.

    A few made-up items are added for the interval alone, as Bonett & Price (2012) do for paired
    rates and Agresti & Coull (1998) for single ones: items that all agree would else have none.

    Args:
        sums: (n,) parts kept of each item; of a change, more parts kept.
        counts: (n,) parts of each item.
        added: What each added item, of mean size, keeps of its parts: all (1), none (0), or all
            more (1) and all fewer (-1) of one part.
    """
    n, value = len(sums), sum(sums) / sum(counts)
    size = sum(counts) / n
    change = -1 in added
    more = [share * (1.0 if change else size) for share in added]
    y, t = [*sums, *more], [*counts, *[size] * len(added)]
    middle = sum(y) / sum(t)
    squares = sum((one - middle * count) ** 2 for one, count in zip(y, t, strict=True))
    se = math.sqrt(squares * len(y) / (len(y) - 1)) / sum(t)
    low, high = max(middle - Z * se, -1.0 if change else 0.0), min(middle + Z * se, 1.0)
    return Interval(value, min(low, value), max(high, value), se, n)
