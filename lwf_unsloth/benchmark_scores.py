"""What benchmarks said of base and tuned model: read from the harness' samples, shown, saved."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import ModelError
from lwf_unsloth.intervals import Interval
from lwf_unsloth.result_table import save_json
from lwf_unsloth.task_score import TaskScore

PER_UNIT = {"word_perplexity": "nats per word", "byte_perplexity": "nats per byte"}
"""Metrics whose items are (log-likelihood, words or bytes): given as their logarithm, which is a
mean over items and so has an interval."""


@dataclass(frozen=True)
class BenchmarkScores:
    """Base and tuned model on benchmarks, paired item by item."""

    scores: tuple[TaskScore, ...]
    """One for each metric of each task or group asked for, in that order."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the numbers: model, weights, template, versions, limits, seed."""

    def __iter__(self) -> Iterator[TaskScore]:
        """The scores in their order."""
        return iter(self.scores)

    def __getitem__(self, task: str) -> TaskScore:
        """The first metric of a task."""
        for one in self.scores:
            if one.task == task:
                return one
        raise KeyError(f"{task!r} is not among {sorted({one.task for one in self.scores})}.")

    def __str__(self) -> str:
        """A line for each metric."""
        return "\n".join(map(str, self.scores))

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """A table, with what decides the numbers below it."""
        head = (
            "| task | metric | items | base | tuned | change (95 %) | lost : won | p | shows from |"
        )
        lines = [head, "|---|---|---|---|---|---|---|---|---|"]
        for one in self.scores:
            base, tuned, change = one.base_score, one.tuned_score, one.change
            cells = [one.task, one.metric, f"{one.items}", _cell(base), _cell(tuned)]
            if change is None:
                cells += ["", "", "", ""]
            else:
                cells.append(f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")
                cells += [f"{one.lost} : {one.won}", f"{one.p_value:.2g}"]
                cells.append(f"{change.detectable:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"{self._caption()}"])

    def _caption(self) -> str:
        """What decides the numbers, and how to read the table."""
        told = self.settings
        limit = told.get("limit")
        return (
            f"{told.get('model') or 'model'}, {told.get('batch_size')} at a time, "
            f"{'all items' if limit is None else f'at most {limit} items a task'}, lm_eval "
            f"{told.get('lm_eval')}. lost : won are the items that only the base and only the "
            "tuned model got right, p is McNemar's exact test, and 8 of 10 samples of this size "
            "would show a difference as large as the last column."
        )

    def to_dict(self, items: bool = True) -> dict[str, Any]:
        """Plain values, for JSON; `items` adds every item's pair."""
        return {
            "scores": [one.to_dict(items) for one in self.scores],
            "settings": self.settings,
        }

    def save(self, path: str | Path) -> Path:
        """Writes `to_dict` with all pairs as a JSON file, whole or not at all."""
        return save_json(path, self.to_dict())


def _cell(score: Interval | None) -> str:
    return "" if score is None else f"{score.value:.3f}"


def read_scores(asked: dict[str, list[str]], found: dict[str, Any]) -> Iterator[TaskScore]:
    """A score for each metric of each name asked for; a group's over the items of all its tasks.

    Args:
        asked: Each name with the tasks that it stands for.
        found: "base", "tuned" or both -> what the harness' `evaluate` returned.

    Raises:
        ModelError: The models were not asked the same items.
    """
    one = next(iter(found.values()))
    for name, members in asked.items():
        items = {side: _items(result["samples"], members) for side, result in found.items()}
        prompts = [_prompts(result["samples"], members) for result in found.values()]
        if prompts[0] != prompts[-1]:
            raise ModelError(
                f"Base and tuned model were given different prompts in {name}, so nothing can be "
                "paired: this task draws its items or examples anew each time."
            )
        for metric in next(iter(items.values())):
            sides = {side: given.get(metric, {}) for side, given in items.items()}
            ids = list(next(iter(sides.values())))
            if any(list(values) != ids for values in sides.values()):
                raise ModelError(
                    f"Some items of {name} have a finite {metric} under one model alone, so the "
                    "models cannot be paired. Look whether the training diverged."
                )
            counts = [count for _, count in next(iter(sides.values())).values()]
            values = {side: tuple(v for v, _ in given.values()) for side, given in sides.items()}
            better = [one["higher_is_better"].get(task, {}).get(metric) for task in members]
            yield TaskScore(
                name,
                PER_UNIT.get(metric, metric),
                tuple(ids),
                values.get("base"),
                values.get("tuned"),
                None if all(count == 1 for count in counts) else tuple(counts),
                higher_is_better=metric not in PER_UNIT and False not in better,
                fewshot=max(one["n-shot"].get(task, 0) for task in members),
            )


def _prompts(samples: dict[str, Any], members: list[str]) -> list[tuple[str, int, str]]:
    """Task, place and hash of each item's prompt, examples included."""
    return [(task, one["doc_id"], one["prompt_hash"]) for task in members for one in samples[task]]


def _items(
    samples: dict[str, Any], members: list[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Metric -> item -> (sum, count), for metrics that are means over items."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task in members:
        for sample in samples[task]:
            filtered = "" if sample["filter"] == "none" else f" ({sample['filter']})"
            for metric in sample["metrics"]:
                value = _value(metric, sample[metric])
                if value is not None:
                    key = f"{task}/{sample['doc_id']}"
                    found.setdefault(metric + filtered, {})[key] = value
    return found


def _value(metric: str, value: Any) -> tuple[float, float] | None:
    """An item's (sum, count), or None for a metric that is no mean over items (F1, BLEU)."""
    if metric in PER_UNIT:
        nats, units = value
        return -float(nats), float(units)
    if isinstance(value, (list, tuple)):
        whole = len(value) > 0 and all(isinstance(one, bool) for one in value)
        return (float(sum(value)), float(len(value))) if whole else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return (number, 1.0) if math.isfinite(number) else None
