"""Scores of several sets: base and tuned, what changed, how sure that is; as table and as file."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from lwf_unsloth.answer_scores import AnswerValues
from lwf_unsloth.answers import Generations
from lwf_unsloth.intervals import (
    Interval,
    mean_interval,
    share_change,
    share_interval,
    statistic_interval,
)
from lwf_unsloth.result_table import ResultTable, Tabled, figure, load_json, span
from lwf_unsloth.scoring import Score
from lwf_unsloth.token_stats import BINS, calibration_error

WHAT = "lwf_unsloth scores"
HEADS = ("set", "measure", "base", "tuned", "change [95 %]", "n", "can detect")
NAMES = {
    "nll": "NLL, nats per token",
    "kl": "KL(base || tuned), nats per token",
    "ece": "calibration error",
    "eos": "answers ended by EOS",
    "distinct": "distinct-2 within an answer",
    "leak": "leak: answers in the task's form",
}
"""Measure -> how a table calls it; "right" has the name of its metric."""


@dataclass(frozen=True)
class Measure:
    """One number of a set, for base and tuned model."""

    name: str
    unit: str
    """"nats" or "share"."""
    better: str
    """"lower" or "higher"."""
    tuned: Interval
    base: Interval | None = None
    change: Interval | None = None
    """Tuned less base, paired by row."""

    @property
    def gain(self) -> float | None:
        """The change, so signed that more is better; None without a base."""
        if self.change is None:
            return None
        return -self.change.value if self.better == "lower" else self.change.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {side: getattr(self, side) for side in ("base", "tuned", "change")}
        numbers = {side: None if part is None else part.to_dict() for side, part in parts.items()}
        return {"name": self.name, "unit": self.unit, "better": self.better, **numbers}


@dataclass(frozen=True)
class SetScores:
    """What was measured on one set; values of every row, so that later runs can be paired."""

    name: str
    kind: str
    """"task" or "general"."""
    score: Score
    right_by: str = ""
    """Name of the metric of right answers; empty where there is none."""
    answers: Mapping[str, Generations] = field(default_factory=dict)
    """"base" and "tuned": the answers themselves, where they were asked for."""
    values: Mapping[str, AnswerValues] = field(default_factory=dict)
    """"base" and "tuned": one value an answer."""
    leak: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """"base" and "tuned": 1 for each answer in the task's form."""
    seed: int = 0
    """Of the resampling."""

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """All that was measured, by short name: nll, kl, right, eos, distinct, leak, ece."""
        found = {"nll": self._nll()}
        if self.score.row_kl is not None:
            kl = mean_interval(self.score.row_kl, self.score.row_tokens, seed=self.seed)
            kl = Interval(kl.value, max(kl.low, 0.0), kl.high, kl.se, kl.n)
            found["kl"] = Measure(NAMES["kl"], "nats", "lower", kl)
        if self.values and self.values["tuned"].right:
            right = {side: one.right for side, one in self.values.items()}
            found["right"] = self._shares(self.right_by, right)
        for name, part in (("eos", "ended"), ("distinct", "distinct")):
            if self.values:
                values = {side: getattr(one, part) for side, one in self.values.items()}
                found[name] = self._shares(NAMES[name], values)
        if self.leak:
            found["leak"] = self._shares(NAMES["leak"], self.leak, better="lower")
        if self.score.row_gaps is not None:
            found["ece"] = self._ece()
        return found

    def __getitem__(self, name: str) -> Measure:
        """A measure by its short name."""
        return self.measures[name]

    def _nll(self) -> Measure:
        score, seed = self.score, self.seed
        tuned = mean_interval(score.row_nll, score.row_tokens, seed=seed)
        base = change = None
        if score.row_base_nll is not None:
            base = mean_interval(score.row_base_nll, score.row_tokens, seed=seed)
            rises = [a - b for a, b in zip(score.row_nll, score.row_base_nll, strict=True)]
            change = mean_interval(rises, score.row_tokens, seed=seed)
        return Measure(NAMES["nll"], "nats", "lower", tuned, base, change)

    def _shares(
        self, name: str, values: Mapping[str, tuple[float, ...]], better: str = "higher"
    ) -> Measure:
        tuned = share_interval(values["tuned"], seed=self.seed)
        base = change = None
        if "base" in values:
            base = share_interval(values["base"], seed=self.seed)
            change = share_change(values["base"], values["tuned"], seed=self.seed)
        return Measure(name, "share", better, tuned, base, change)

    def _ece(self) -> Measure:
        tokens = torch.tensor(self.score.row_tokens, dtype=torch.float64)[:, None]
        sides = [self.score.row_gaps, self.score.row_base_gaps]
        gaps = [torch.tensor(side, dtype=torch.float64) for side in sides if side is not None]
        parts = torch.cat([tokens, *gaps], 1)  # (rows, 1 + BINS or 1 + 2 BINS)

        def tuned(sums: torch.Tensor) -> torch.Tensor:
            return calibration_error(sums[:, 1 : 1 + BINS], sums[:, 0])

        def base(sums: torch.Tensor) -> torch.Tensor:
            return calibration_error(sums[:, 1 + BINS :], sums[:, 0])

        found = [statistic_interval(parts, tuned, floor=0.0, seed=self.seed)]
        if len(gaps) == 2:
            found.append(statistic_interval(parts, base, floor=0.0, seed=self.seed))
            found.append(statistic_interval(parts, lambda s: tuned(s) - base(s), seed=self.seed))
        return Measure(NAMES["ece"], "share", "lower", *found)

    def to_dict(self) -> dict[str, Any]:
        """Values of every row and the summary."""
        return {
            "kind": self.kind,
            "right_by": self.right_by,
            "seed": self.seed,
            "summary": {name: one.to_dict() for name, one in self.measures.items()},
            "score": {name: _plain(value) for name, value in vars(self.score).items()},
            "answers": {side: one.to_dict() for side, one in self.answers.items()},
            "values": {side: asdict(one) for side, one in self.values.items()},
            "leak": {side: list(flags) for side, flags in self.leak.items()},
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> "SetScores":
        """The object that `to_dict` gave."""
        score = {key: _tuples(value) for key, value in values["score"].items()}
        return cls(
            name,
            values["kind"],
            Score(**score),
            values["right_by"],
            {side: Generations.from_dict(one) for side, one in values["answers"].items()},
            {
                side: AnswerValues(**{key: tuple(part) for key, part in one.items()})
                for side, one in values["values"].items()
            },
            {side: tuple(flags) for side, flags in values["leak"].items()},
            values["seed"],
        )


@dataclass(frozen=True, repr=False)
class Scores(Tabled, Mapping[str, SetScores]):
    """What `evaluate` found; shows itself as a table in a notebook."""

    sets: Mapping[str, SetScores]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides the numbers beside each set's own settings."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the numbers right."""
    label: str = ""

    def __getitem__(self, name: str) -> SetScores:
        """A set's scores by its name."""
        return self.sets[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the sets, in order."""
        return iter(self.sets)

    def __len__(self) -> int:
        """Number of sets."""
        return len(self.sets)

    def table(self) -> ResultTable:
        """One row a measure; a set's name stands in its first row."""
        rows: list[tuple[str, ...]] = []
        for name, one in self.sets.items():
            for place, measure in enumerate(one.measures.values()):
                rows.append((name if not place else "", *_cells(measure)))
        return ResultTable(HEADS, tuple(rows), self.caption, self.notes)

    @property
    def caption(self) -> str:
        """What was compared with what, in a line."""
        first = next(iter(self.sets.values())).score.settings
        base = {"adapter_off": "the base with the adapter off", "snapshot": "the model as it stood"}
        compared = first.get("base")
        against = base.get(str(compared), "another model") if compared else "no base"
        parts = (self.label, str(first.get("model") or ""), f"tuned against {against}")
        return " · ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the rows' own included; `from_dict` reads it back."""
        return {
            "what": WHAT,
            "label": self.label,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "sets": {name: one.to_dict() for name, one in self.sets.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """The object that `to_dict` gave."""
        sets = {name: SetScores.from_dict(name, one) for name, one in values["sets"].items()}
        return cls(sets, values["settings"], tuple(values["notes"]), values["label"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote.

        Raises:
            DataError: The file cannot be read or holds something else.
        """
        return cls.from_dict(load_json(path, WHAT))


def _cells(measure: Measure) -> tuple[str, ...]:
    """The cells of a measure, from its name on."""
    unit, change = measure.unit, measure.change
    certain = measure.tuned if change is None else change
    changed = "–"
    tuned = figure(measure.tuned.value, unit)
    if change is None:
        one = measure.tuned
        tuned = span(one.value, one.low, one.high, unit, signed=False)
    else:
        changed = span(change.value, change.low, change.high, unit)
    return (
        measure.name,
        "–" if measure.base is None else figure(measure.base.value, unit),
        tuned,
        changed,
        str(certain.n),
        _detectable(certain, unit),
    )


def _detectable(certain: Interval, unit: str) -> str:
    """The smallest difference the sample can show; nothing where no row differs at all."""
    if not certain.se > 0:
        return "–"
    return figure(certain.detectable, unit, signed=True).removeprefix("+")


def _plain(value: Any) -> Any:
    """Tuples as lists, for JSON."""
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    """Lists as tuples, back from JSON."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
