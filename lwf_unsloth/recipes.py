"""Several ways to train for one task, side by side: what each learned and what each forgot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import DataError
from lwf_unsloth.forgetting import check_same_rows
from lwf_unsloth.intervals import Interval
from lwf_unsloth.result_table import ResultTable, Tabled, figure, span
from lwf_unsloth.scores import Measure, Scores

WHAT = "lwf_unsloth recipes"
SHOWN = ("nll", "kl", "right", "leak", "eos")
"""Measures of the table, where they were measured."""


@dataclass(frozen=True, repr=False)
class Recipes(Tabled):
    """Scores by recipe; shows itself as a table, `plot_recipes` as a figure."""

    scores: Mapping[str, Scores]
    """Recipe -> what `evaluate` gave of the model trained by it."""

    @property
    def tasks(self) -> list[str]:
        """Names of the sets of new tasks."""
        return [name for name, one in self._first.items() if one.kind == "task"]

    @property
    def general(self) -> list[str]:
        """Names of the sets to be kept."""
        return [name for name, one in self._first.items() if one.kind == "general"]

    @property
    def _first(self) -> Scores:
        return next(iter(self.scores.values()))

    def measured(self, set: str, name: str) -> bool:
        """Whether every recipe has this measure of this set."""
        return all(name in one[set].measures for one in self.scores.values())

    def change(self, set: str, name: str) -> dict[str, Interval]:
        """What each recipe changed: gained on a task, lost on a set to be kept (KL as it is).

        Args:
            set: Name of a set.
            name: "nll", "kl", "right" or "leak".

        Returns:
            Recipe -> the change; of a task's NLL how far it fell, of others how far it rose.
        """
        return {
            recipe: _change(one[set].measures[name], gain=set in self.tasks)
            for recipe, one in self.scores.items()
        }

    def table(self) -> ResultTable:
        """One row a set and measure, one column a recipe."""
        rows: list[tuple[str, ...]] = []
        for name, one in self._first.items():
            left_out = ("kl",) if one.kind == "task" else ()  # a task is there to change the model
            known = [k for k in SHOWN if self.measured(name, k) and k not in left_out]
            for place, key in enumerate(known):
                measure = one.measures[key]
                changed = self.change(name, key) if key == "nll" else {}
                cells = (
                    _cell(scores[name].measures[key], changed.get(recipe))
                    for recipe, scores in self.scores.items()
                )
                base = "" if measure.base is None else figure(measure.base.value, measure.unit)
                label = self._label(name, key, measure)
                rows.append(("" if place else name, label, base, *cells))
        heads = ("set", "measure", "base", *self.scores)
        notes = dict.fromkeys(note for one in self.scores.values() for note in one.notes)
        return ResultTable(heads, tuple(rows), self._caption, tuple(notes))

    def _label(self, name: str, key: str, measure: Measure) -> str:
        """A measure's name; of the NLL which way its change counts."""
        if key != "nll":
            return measure.name
        way = "fell by (more is better)" if name in self.tasks else "rose by (0 is nothing lost)"
        return f"NLL, nats per token: {way}"

    @property
    def _caption(self) -> str:
        model = str(next(iter(self._first.values())).score.settings.get("model") or "")
        parts = (model, "one training each", "[95 % interval over rows; another seed adds to it]")
        return " · ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        return {
            "what": WHAT,
            "scores": {name: scores.to_dict() for name, scores in self.scores.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipes":
        """The object that `to_dict` gave."""
        return cls({name: Scores.from_dict(one) for name, one in values["scores"].items()})


@checked()
def compare_recipes(scores: Mapping[str, Scores]) -> Recipes:
    """Puts several trainings from the same start side by side.

    Args:
        scores: Recipe -> what `evaluate` gave of the model trained by it, all with the same sets
            and a base to compare with.

    Returns:
        The comparison: a table, and `plot_recipes`.

    Raises:
        DataError: No scores, no base, no task set, no set to be kept, or different rows.
    """
    if not scores or not all(isinstance(one, Scores) for one in scores.values()):
        kinds = {name: type(one).__name__ for name, one in scores.items()}
        raise DataError(
            f"compare_recipes was given {kinds}, but it needs what evaluate() returned, by recipe: "
            '{"plain": scores, "ours": others}.'
        )
    check_same_rows(list(scores.values()))
    found = Recipes(dict(scores))
    if not found.tasks or not found.general:
        raise DataError(
            f"The scores hold {len(found.tasks)} task sets and {len(found.general)} sets to be "
            "kept; what a recipe gained and what it cost need one of each."
        )
    for name, one in scores.items():
        if any(part["nll"].change is None for part in one.values()):
            raise DataError(
                f"The scores of {name!r} hold no base (base=None), so there is nothing to count a "
                "gain or a loss from. Evaluate with the base."
            )
    return found


def _change(measure: Measure, gain: bool) -> Interval:
    """The change, with more as a gain or as a loss; the KL is a change by itself."""
    one = measure.change
    if one is None:
        return measure.tuned
    if gain == (measure.better == "higher"):
        return one
    return Interval(-one.value + 0.0, -one.high + 0.0, -one.low + 0.0, one.se, one.n)


def _cell(measure: Measure, changed: Interval | None) -> str:
    """The change of an NLL; else the level; each with its interval."""
    one = measure.tuned if changed is None else changed
    signed = changed is not None
    return span(one.value, one.low, one.high, measure.unit, signed=signed)
