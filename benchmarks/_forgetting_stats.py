"""What the forgetting benchmark's rows say: shares of plain SFT's gain and drift, who dominates
whom, and how well the KL predicts the rest.

Intervals are paired by test row and do not hold the spread of seeds, which stands beside the score;
the values of a row are means over seeds.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._forgetting_arms import FROZEN, Job, Row, key_of, kind_of, seeded
from benchmarks._forgetting_store import unpacked
from lwf_unsloth.intervals import Interval, share_interval, statistic_interval

Items = Mapping[str, Mapping[str, str]]
COSTS: dict[str, Callable[[Row], float | None]] = {
    "rise of general NLL": lambda row: _less(row, "nll_general_tuned", "nll_general_base"),
    "rise of text NLL": lambda row: _less(row, "nll_web_tuned", "nll_web_base"),
    "leak": lambda row: row.get("leak_rate"),
    "accuracy": lambda row: _accuracy(row),
}
PREDICTORS = {"kl_general": "KL on general rows", "kl_task": "KL on task rows"}
RESAMPLES = 600
"""Of a share; its standard error is then sure to 3 %, and a page of them takes two seconds."""
FEWEST = 4
"""Adapters below which no R^2 is told."""


@dataclass(frozen=True)
class Group:
    """Adapters of one arm at one rate, by seed."""

    model: str
    arm: str
    lr: float
    rows: tuple[Row, ...]

    def mean(self, name: str) -> float | None:
        """A figure's mean over the seeds that have it."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return statistics.mean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Its standard deviation over seeds; None of one."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    def cost(self, name: str) -> float | None:
        """A key of `COSTS`, mean over seeds."""
        values = [value for row in self.rows if (value := COSTS[name](row)) is not None]
        return statistics.mean(values) if values else None

    def items(self, items: Items, name: str) -> torch.Tensor | None:
        """(n,) a measure's values by test row, means over seeds; None where a seed has none."""
        found = [items.get(f"{self.model} {key_of(row)}", {}).get(name) for row in self.rows]
        if any(one is None for one in found):
            return None
        flags = name in ("right", "leak")
        lists = [list(map(float, one)) if flags else unpacked(one) for one in found if one]
        if not lists or len({len(one) for one in lists}) > 1:
            return None
        return torch.tensor(lists, dtype=torch.float64).mean(0)


def groups(rows: Sequence[Row], model: str) -> list[Group]:
    """A model's groups."""
    found = seeded([row for row in rows if row["model"] == model])
    return [Group(model, arm, lr, tuple(some)) for (arm, lr), some in found.items()]


def best(found: Sequence[Group], arm: str) -> Group | None:
    """An arm's group with the highest score; one of several seeds before others of one."""
    some = [group for group in found if group.arm == arm]
    most = max((len(group.rows) for group in some), default=0)
    some = [group for group in some if len(group.rows) == most]
    return max(some, key=lambda group: group.mean("new_score") or 0.0, default=None)


def score_interval(group: Group, items: Items) -> Interval | None:
    """Exact match with the interval over test rows."""
    right = group.items(items, "right")
    return None if right is None else share_interval(right)


def leak_interval(group: Group, items: Items) -> Interval | None:
    """Leak with the interval over prompts."""
    leak = group.items(items, "leak")
    return None if leak is None else share_interval(leak)


def share(group: Group, plain: Group | None, items: Items, name: str) -> Interval | None:
    """A sum over test rows against plain SFT's, paired: of "right", the gain over the frozen model.

    Args:
        group: The arm.
        plain: Plain SFT at its best rate.
        items: Of all adapters.
        name: "right", "task_gain", "general_kl" or "general_rise".
    """
    if plain is None:
        return None
    ours, theirs = (one.items(items, name) for one in (group, plain))
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    if name == "right":
        base = _frozen(group.model, items)
        if base is None or len(base) != len(ours):
            return None
        ours, theirs = ours - base, theirs - base
    if float(theirs.sum()) <= 0:
        return None
    parts = torch.stack([ours, theirs], 1)
    return statistic_interval(parts, lambda s: s[:, 0] / s[:, 1], resamples=RESAMPLES)


def _frozen(model: str, items: Items) -> torch.Tensor | None:
    """Right answers of the frozen model."""
    prefix = f"{model} {FROZEN} "
    found = next((one for key, one in items.items() if key.startswith(prefix)), None)
    if found is None:
        return None
    return torch.tensor(list(map(float, found["right"])), dtype=torch.float64)


def dominating(group: Group, found: Sequence[Group]) -> list[Group]:
    """Groups with no lower score, KL and leak no higher, and one of them better."""

    def of(one: Group) -> tuple[float, ...]:
        return (
            one.mean("new_score") or 0.0, -(one.mean("kl_general") or 0.0),
            -(one.mean("leak_rate") or 0.0),
        )  # fmt: skip

    mine = of(group)
    better = [one for one in found if one is not group and one.arm != FROZEN]
    pairs = [(one, list(zip(of(one), mine, strict=True))) for one in better]
    return [
        one
        for one, values in pairs
        if all(a >= b for a, b in values) and any(a > b for a, b in values)
    ]


def predictions(rows: Sequence[Row], model: str) -> list[tuple[str, str, str, int, float]]:
    """How well a KL predicts a cost over adapters, as R^2 of the straight line.

    Returns:
        (cost, predictor, kind of arm or "all", adapters, R^2).
    """
    some = [r for r in rows if r["model"] == model and not r.get("error") and r["arm"] != FROZEN]
    kinds = dict.fromkeys(kind_of(row["arm"]) for row in some)
    found = []
    for cost, value in COSTS.items():
        for predictor in PREDICTORS:
            for kind in ("all", *kinds):
                pairs = [
                    (row[predictor], value(row))
                    for row in some
                    if kind in ("all", kind_of(row["arm"])) and row.get(predictor) is not None
                ]
                told = [(x, y) for x, y in pairs if y is not None]
                r2 = r_squared(told)
                if r2 is not None:
                    found.append((cost, predictor, kind, len(told), r2))
    return found


def r_squared(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Squared correlation; None of too few pairs, or where one side never moves."""
    if len(pairs) < FEWEST:
        return None
    x, y = zip(*pairs, strict=True)
    try:
        return statistics.correlation(x, y) ** 2
    except statistics.StatisticsError:
        return None


def models(result: Mapping[str, Any]) -> list[str]:
    """The models of a result, in order."""
    return list(dict.fromkeys(row["model"] for row in result["rows"]))


def _less(row: Row, one: str, other: str) -> float | None:
    first, second = row.get(one), row.get(other)
    return None if first is None or second is None else float(first - second)


def _accuracy(row: Row) -> float | None:
    """Mean accuracy over tasks."""
    values = row.get("accuracy")
    return statistics.mean(values.values()) if values else None


def label(group: Group) -> str:
    """A group's job, as in the result file, without its seed."""
    return Job(group.arm, group.lr).key.rsplit(" ", 1)[0]
