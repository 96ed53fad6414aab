"""Which rows are taken and which are held out: shares, limit, and a split without overlap."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.load_report import LoadReport
from lwf_unsloth.rows import Row, prompt_key, row_key

NOT_CHOSEN = "beyond the limit or share"
"""The reason of rows that nothing speaks against."""


def is_count(value: object) -> bool:
    """Whether it is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Plan:
    """How many rows to take and hold out, checked."""

    def __init__(
        self,
        shares: Sequence[float] | None,
        limit: int | None,
        test_size: float | int | None,
        seed: int,
        max_chars: int | None = None,
    ) -> None:
        if limit is not None and not is_count(limit):
            raise ConfigError(
                f"limit is {limit!r}; it must be a whole number of 1 or more, or None."
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"seed is {seed!r}; it must be a whole number.")
        size = 0 if test_size is None else test_size
        whole_number = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not whole_number and not (isinstance(size, float) and 0 <= size < 1):
            raise ConfigError(
                f"test_size is {test_size!r}; it must be a share of at least 0 and below 1, a "
                "number of "
                "rows, or None."
            )
        self.shares = None if shares is None else _checked_shares(shares)
        self.limit, self.test_size, self.seed, self.max_chars = limit, size, seed, max_chars

    def test_count(self, rows: int) -> int:
        """How many of the rows are held out."""
        if isinstance(self.test_size, float):
            return round(self.test_size * rows)
        if 0 < rows <= self.test_size:
            raise ConfigError(
                f"test_size is {self.test_size} and there are {rows} rows: none would be left to "
                "train "
                "on. Give a smaller number or a share such as 0.1."
            )
        return self.test_size

    def random(self, purpose: str) -> random.Random:
        """A stream of its own for each purpose; the global one is not touched."""
        return random.Random(f"{self.seed} {purpose}")


def _checked_shares(shares: Sequence[float]) -> list[float]:
    values = [] if isinstance(shares, (str, Mapping)) else list(shares)
    numbers = all(
        isinstance(s, (int, float)) and not isinstance(s, bool) and 0 < s <= 1 for s in values
    )
    if not values or not numbers or abs(sum(values) - 1) > 1e-6:
        raise ConfigError(
            f"shares is {shares!r}; it must hold one number above 0 for each source, summing to "
            "1, e.g. "
            "[0.8, 0.2]."
        )
    return [float(share) for share in values]


def choose_rows(groups: list[list[Row]], plan: Plan, report: LoadReport) -> list[Row]:
    """The rows that shares and limit leave, in the order of the sources; the others are counted."""
    total = sum(map(len, groups))
    if plan.shares is not None:
        total = int(min(len(g) / s for g, s in zip(groups, plan.shares, strict=True)) + 1e-9)
    goal = total if plan.limit is None else min(total, plan.limit)
    if plan.shares is None:
        pools, counts = [[row for group in groups for row in group]], [goal]
    else:
        pools, counts = groups, [round(share * goal) for share in plan.shares]
        if not all(counts):
            raise ConfigError(
                f"With shares {plan.shares} only {goal} rows can be taken, and a source would "
                "have none. "
                "Give it more rows or a larger share."
            )
    chosen: list[Row] = []
    for place, (pool, count) in enumerate(zip(pools, counts, strict=True)):
        order = list(range(len(pool)))
        taken = set(plan.random(f"choice {place}").sample(order, min(count, len(pool))))
        for index, row in enumerate(pool):
            if index in taken:
                chosen.append(row)
            else:
                report.sources[row.origin].drop(NOT_CHOSEN, row.number)
    return chosen


def split_rows(rows: list[Row], plan: Plan, report: LoadReport) -> tuple[list[Row], list[Row]]:
    """Train and test, held out per source; rows with the same prompt stay on one side."""
    wanted = Counter(row.origin for row in rows)
    remaining = Counter(_per_source(plan.test_count(len(rows)), wanted))
    goal = sum(remaining.values())
    groups = grouped(rows, prompt_key)
    if len(groups) == 1:  # every row asks the same: hold out by the whole text
        groups = grouped(rows, row_key)
    plan.random("split").shuffle(groups)
    held: set[int] = set()
    for group in groups:
        counts = Counter(rows[place].origin for place in group)
        fits = all(count <= remaining[origin] for origin, count in counts.items())
        if fits and len(held) + len(group) < len(rows):
            held.update(group)
            remaining.subtract(counts)
    if len(held) < goal:
        report.notes.append(f"{goal} test rows were asked for, repeats allow {len(held)}")
    train = [row for place, row in enumerate(rows) if place not in held]
    return train, [row for place, row in enumerate(rows) if place in held]


def _per_source(count: int, sizes: Counter[int]) -> dict[int, int]:
    """`count` test rows dealt out to the sources by their sizes (largest remainders)."""
    total = sum(sizes.values())
    exact = {origin: count * size / total for origin, size in sizes.items()}
    dealt = {origin: int(value) for origin, value in exact.items()}
    rest = sorted(exact, key=lambda origin: (dealt[origin] - exact[origin], origin))
    for origin in rest[: count - sum(dealt.values())]:
        dealt[origin] += 1
    return dealt


def grouped(
    rows: list[Row], key: Callable[[Mapping[str, Any]], tuple[str, ...]]
) -> list[list[int]]:
    """Places of the rows that share a key, group by group."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(key(row.fields), []).append(place)
    return list(groups.values())
