"""The ended trials of a sweep: what each gave, which no other beats, and why some failed."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lwf_unsloth.errors import DataError
from lwf_unsloth.result_table import ResultTable, Tabled, figure, span
from lwf_unsloth.whole_files import write_whole_text

COMPLETE, FAILED, SKIPPED = "complete", "failed", "skipped"
SETS = {"gain": "task", "forgetting": "general"}
"""The set that each objective is measured on."""
WORDS = {
    ("gain", "nll"): "NLL fallen on held-out rows of the task",
    ("gain", "right"): "right answers gained on held-out rows of the task",
    ("forgetting", "kl"): "KL(base || tuned) on general rows",
    ("forgetting", "nll"): "NLL risen on general rows",
    ("forgetting", "leak"): "general answers in the task's form gained",
}
"""Objective and what it is measured by, in words."""


class Range(NamedTuple):
    """A number with its 95 % interval, as a trial has recorded it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialRecord:
    """One ended trial, as it stands in the study and in `trials.jsonl`."""

    number: int
    state: str
    """"complete", "failed" or "skipped"."""
    params: dict[str, Any]
    gain: float | None
    """More is better: nats of NLL, or share of right answers."""
    forgetting: float | None
    """Less is better: nats of KL or NLL, or share of leaked answers."""
    details: dict[str, Any]
    """config, seed, scores, versions, adapter, seconds, worker, reason, as far as there are."""

    @property
    def settings(self) -> str:
        """What was tried, in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.params.items())

    def measured_by(self, side: str) -> str:
        """Short name of the measure of "gain" or "forgetting"; the usual one where none is said."""
        usual = {"gain": "nll", "forgetting": "kl"}
        return str(self.details.get("objectives", usual)[side])

    def interval(self, side: str) -> Range | None:
        """Gain or forgetting with its 95 % interval over the rows; None where it is not known.

        Args:
            side: "gain" or "forgetting".
        """
        measures = self.details.get("scores", {}).get(SETS[side], {})
        measure = measures.get(self.measured_by(side), {})
        part = measure.get("tuned" if self.measured_by(side) == "kl" else "change")
        value = getattr(self, side)
        if not part or value is None or part["low"] is None or part["high"] is None:
            return None
        low, high = part["low"], part["high"]
        if not math.isclose(part["value"], value, abs_tol=1e-12):  # a fall that is a gain
            low, high = -high, -low
        return Range(value, low, high)

    def train_file(self) -> str:
        """The trial's settings as a training file: YAML for `lwf-unsloth train`.

        Raises:
            DataError: The record does not hold them.
        """
        import yaml

        sections = self.details.get("file")
        if not sections:
            raise DataError(
                f"Trial {self.number} is {self.state} and holds no settings to copy. Take a "
                "complete trial of a sweep that this version ran."
            )
        kept = {name: part for name, part in sections.items() if part}
        found = f"gain {self.gain:.4g}, forgetting {self.forgetting:.4g}"
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        return f"# Trial {self.number}: {found}\n{text}"

    def to_dict(self) -> dict[str, Any]:
        """Flat, as a line of `trials.jsonl`."""
        own = {name: getattr(self, name) for name in ("number", "state", "params")}
        return {**own, "gain": self.gain, "forgetting": self.forgetting, **self.details}


@dataclass(frozen=True, repr=False)
class SweepResult(Tabled):
    """The ended trials of a sweep."""

    name: str
    trials: tuple[TrialRecord, ...]
    """In the order in which they were begun."""

    def of(self, state: str) -> list[TrialRecord]:
        """Trials that are "complete", "failed" or "skipped"."""
        return [one for one in self.trials if one.state == state]

    @property
    def front(self) -> list[TrialRecord]:
        """Complete trials that no other beats in gain and forgetting, the most gain first."""
        done = self.of(COMPLETE)
        found = [one for one in done if not any(_beats(other, one) for other in done)]
        return sorted(found, key=lambda one: (-_number(one.gain), one.number))

    def best(self, most_forgetting: float | None = None) -> TrialRecord | None:
        """The most gain of all that forget no more than a limit.

        Args:
            most_forgetting: The limit, in the sweep's unit of forgetting; None is no limit.
        """
        limit = float("inf") if most_forgetting is None else most_forgetting
        return next((one for one in self.front if _number(one.forgetting) <= limit), None)

    def best_config(self, most_forgetting: float | None = None) -> str:
        """The settings of `best`, to copy: a training file for `lwf-unsloth train`.

        Args:
            most_forgetting: As for `best`.

        Raises:
            DataError: No trial forgets so little, or none is complete.
        """
        best = self.best(most_forgetting)
        if best is not None:
            return best.train_file()
        if not self.front:
            raise DataError(f"No trial of the sweep {self.name} is complete.\n{self}")
        least = self.front[-1]
        raise DataError(
            f"No trial forgets {most_forgetting} or less. The least is {least.forgetting:.4g}, in "
            f"trial {least.number} ({least.settings}). Allow more, or try settings that forget "
            "less: more rehearsal, a larger lwf_lambda, a lower learning_rate."
        )

    def table(self) -> ResultTable:
        """Complete trials, the front first; then what failed and why."""
        names = list(dict.fromkeys(name for one in self.trials for name in one.params))
        front = self.front
        others = [one for one in self.of(COMPLETE) if one not in front]
        others.sort(key=lambda one: (-_number(one.gain), one.number))
        rows = [
            (
                f"{one.number}",
                *(str(one.params.get(name, "")) for name in names),
                *(_with_interval(one, side) for side in SETS),
                "no other beats it" if one in front else "",
            )
            for one in (*front, *others)
        ]
        counts = {state: len(self.of(state)) for state in (COMPLETE, FAILED, SKIPPED)}
        caption = f"Sweep {self.name}: {', '.join(f'{n} {state}' for state, n in counts.items())}."
        if rows:
            caption += f" {said(front[0], 'gain')}; {said(front[0], 'forgetting')}."
        lost = (*self.of(FAILED), *self.of(SKIPPED))
        notes = [f"trial {one.number} {one.state}: {_reason(one)}" for one in lost]
        heads = ("trial", *names, "gain", "forgetting", "front")
        return ResultTable(heads, tuple(rows), caption, tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "what": "sweep",
            "name": self.name,
            "front": [one.number for one in self.front],
            "trials": [one.to_dict() for one in self.trials],
        }


def said(one: TrialRecord, side: str) -> str:
    """What "gain" or "forgetting" is, and its unit."""
    measure = one.measured_by(side)
    unit = "nats per token" if measure in ("nll", "kl") else "percentage points"
    return f"{side}: {WORDS[side, measure]}, {unit}"


def _with_interval(one: TrialRecord, side: str) -> str:
    """A trial's gain or forgetting, with its interval where it is known."""
    measure, value = one.measured_by(side), getattr(one, side)
    unit, signed = ("nats" if measure in ("nll", "kl") else "share"), measure != "kl"
    found = one.interval(side)
    if found is None:
        return figure(value, unit, signed)
    return span(value, found.low, found.high, unit, signed)


def _reason(one: TrialRecord) -> str:
    """The first line of why a trial has no result."""
    return (str(one.details.get("reason", "")).splitlines() or [""])[0]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _beats(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether one is as good in both and better in one."""
    a = _number(one.gain), -_number(one.forgetting)
    b = _number(other.gain), -_number(other.forgetting)
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def write_lines(path: Path, trials: Iterable[TrialRecord]) -> None:
    """Writes a JSON line a trial, so that the file is there whole or as it was."""
    lines = (json.dumps(one.to_dict(), sort_keys=True, default=str) for one in trials)
    write_whole_text(path, "".join(f"{line}\n" for line in lines))
