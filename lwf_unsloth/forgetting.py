"""What was gained and what was forgotten, over one task or a sequence of them.

R[i][j] is what the model is worth on set j after stage i; stage 0 is the model before the first
task. With k stages after it (of shares R grows, of NLL it falls as the model gets better):

    gain of a task's set           R[k][j] - R[0][j]
    forgetting of a set            max over l < k of R[l][j] - R[k][j]   (Chaudhry et al. 2018, 3)
    backward transfer of a task    R[k][j] - R[i][j], i its own stage  (Lopez-Paz & Ranzato 2017, 3)

The papers average them over the sets; here each set has its own, with an interval paired by row,
and the averages beside them. arXiv 1801.10112 and 1706.08840.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.intervals import Interval, mean_interval, share_change
from lwf_unsloth.result_table import ResultTable, Tabled, figure, span
from lwf_unsloth.scores import NAMES, Scores, SetScores

WHAT = "lwf_unsloth forgetting report"
UNITS = {"nll": "nats", "right": "share", "leak": "share"}
Values = tuple[tuple[float, ...], tuple[float, ...]]
"""Sums and counts of each row."""


@dataclass(frozen=True)
class Line:
    """One measure of one set through the stages."""

    set: str
    measure: str
    """"nll", "right" (by the set's metric) or "leak"."""
    name: str
    """The measure in words."""
    learned_at: int | None
    """The stage that taught it, from 1; None for what was there before and is to be kept."""
    levels: tuple[float, ...]
    """The set's column of R: nats a token, or shares."""
    gain: Interval | None
    """Of a task: now against before the first stage; above 0 is better."""
    forgetting: Interval | None
    """Best earlier stage against now; above 0 is forgotten. None for the newest task."""
    transfer: Interval | None
    """Backward transfer of an earlier task; below 0 is forgotten."""

    @property
    def unit(self) -> str:
        """Unit of the levels, "nats" or "share"."""
        return UNITS[self.measure]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {name: getattr(self, name) for name in ("gain", "forgetting", "transfer")}
        plain = {key: value for key, value in vars(self).items() if key not in parts}
        numbers = {name: None if part is None else part.to_dict() for name, part in parts.items()}
        return {**plain, "levels": list(self.levels), **numbers}


@dataclass(frozen=True, repr=False)
class ForgettingReport(Tabled):
    """Gain, forgetting and backward transfer of every set; shows itself as a table."""

    stages: tuple[str, ...]
    """Name of each stage, the first before any task."""
    lines: tuple[Line, ...]
    kl: Mapping[str, float]
    """KL(base || now) of each set, nats a token, where it was measured."""
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str | tuple[str, str]) -> Line:
        """The line of a set ("faq": its NLL) or of a set's measure (("faq", "right"))."""
        wanted = (key, "nll") if isinstance(key, str) else key
        for line in self.lines:
            if (line.set, line.measure) == wanted:
                return line
        raise KeyError(key)

    @property
    def matrix(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """R as measure -> set -> value at each stage."""
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for line in self.lines:
            found.setdefault(line.measure, {})[line.set] = line.levels
        return found

    def averages(self) -> dict[str, dict[str, float | None]]:
        """Means over sets, by measure: gain, forgetting (F), backward transfer (BWT)."""
        found = {}
        for measure in dict.fromkeys(line.measure for line in self.lines):
            lines = [line for line in self.lines if line.measure == measure]
            found[measure] = {
                name: _mean([getattr(line, name) for line in lines])
                for name in ("gain", "forgetting", "transfer")
            }
        return found

    def table(self) -> ResultTable:
        """One row a set and measure."""
        heads: tuple[str, ...] = ("set", "measure", *self.stages)
        heads += ("gain", "forgetting", "backward transfer")
        rows, last = [], ""
        for line in self.lines:
            name = "" if line.set == last else line.set
            last = line.set
            levels = (figure(level, line.unit) for level in line.levels)
            parts = (line.gain, line.forgetting, line.transfer)
            rows.append((name, line.name, *levels, *(_span(part, line.unit) for part in parts)))
        return ResultTable(
            (*heads, "KL now"), tuple(self._with_kl(rows)), self._caption, self.notes
        )

    def _with_kl(self, rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        kl = [
            figure(self.kl.get(line.set), "nats") if line.measure == "nll" else ""
            for line in self.lines
        ]
        return [(*row, one) for row, one in zip(rows, kl, strict=True)]

    @property
    def _caption(self) -> str:
        return (
            "gain: more is better · forgetting: best earlier stage less now, 0 is nothing lost · "
            "[95 % interval, paired by row]"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "what": WHAT,
            "stages": list(self.stages),
            "lines": [line.to_dict() for line in self.lines],
            "averages": self.averages(),
            "kl": dict(self.kl),
            "notes": list(self.notes),
        }

    def card(self) -> dict[str, dict[str, str]]:
        """For a model card: `save_adapter(..., card={"evaluation": report.card()})`."""
        table = self.table()
        found = {}
        for line, row in zip(self.lines, table.rows, strict=True):
            cells = dict(zip(table.heads[2:], row[2:], strict=True))
            found[f"{line.set}: {line.name}"] = cells
        return found


@checked()
def forgetting_report(
    *scores: Scores, tasks: str | Sequence[str | Sequence[str]] | None = None, seed: int = 0
) -> ForgettingReport:
    """What one training, or several one after another, gained and cost.

    Args:
        *scores: What `evaluate` gave after each task, on the same sets, in order. One is enough: it
            holds the base too. Scores of an untrained adapter may come first.
        tasks: The set (or sets) that each training taught, in order; None: the task sets of the
            scores, for one training.
        seed: Of the intervals' resampling.

    Returns:
        The report. Where the best earlier stage is chosen among several, chance alone makes its
        forgetting a little larger.

    Raises:
        ConfigError: `tasks` does not fit the scores.
        DataError: No scores, or they were measured on other rows.
    """
    if not scores or not all(isinstance(one, Scores) for one in scores):
        raise DataError(
            f"forgetting_report was given {[type(one).__name__ for one in scores]}, but it needs "
            "what evaluate() returned, once for each training."
        )
    check_same_rows(scores)
    start, trained = _stages(scores)
    names = _task_names(scores[-1], tasks, len(trained))
    taught = {name: stage for stage, group in enumerate(names, 1) for name in group}
    labels = [start, *(one.label or f"after {'+'.join(names[i])}" for i, one in enumerate(trained))]
    lines, notes = [], list(dict.fromkeys(note for one in scores for note in one.notes))
    for name in scores[0]:
        for measure in UNITS:
            line = _line(name, measure, scores, len(trained), taught.get(name), seed)
            if line is not None:
                lines.append(line)
    last = scores[-1]
    kl = {name: one.score.kl for name, one in last.items() if one.score.kl is not None}
    notes += _unsure(lines)
    return ForgettingReport(tuple(labels), tuple(lines), kl, tuple(notes))


def _stages(scores: Sequence[Scores]) -> tuple[str, list[Scores]]:
    """Name of stage 0, and the scores of the later stages."""
    first = next(iter(scores[0].values())).score
    untrained = first.settings.get("adapter") in ("none", "off", "untrained")
    if first.row_base_nll is not None and not (untrained and len(scores) > 1):
        return ("before" if first.settings.get("base") != "adapter_off" else "base"), list(scores)
    if len(scores) == 1:
        raise DataError(
            "The scores hold no base (base=None), so nothing can be compared. Evaluate with "
            "the base, or give the scores of the model before the training first."
        )
    return scores[0].label or "before", list(scores[1:])


def _task_names(
    last: Scores, tasks: str | Sequence[str | Sequence[str]] | None, stages: int
) -> list[list[str]]:
    """Names of the sets that each stage taught."""
    if tasks is None and stages == 1:
        return [[name for name, one in last.items() if one.kind == "task"]]
    given = [tasks] if isinstance(tasks, str) else list(tasks or ())
    names = [[one] if isinstance(one, str) else list(one) for one in given]
    unknown = [name for group in names for name in group if name not in last]
    if len(names) != stages or unknown:
        raise ConfigError(
            f"tasks is {tasks!r}, but there are {stages} trainings and the sets are {list(last)}: "
            'name the set that each training taught, in order, e.g. tasks=["faq", "code"].'
        )
    return names


def check_same_rows(scores: Sequence[Scores]) -> None:
    """Raises a DataError unless all were measured on the same rows of the same sets."""
    first = scores[0]
    for number, other in enumerate(scores[1:], 2):
        if list(other) != list(first):
            raise DataError(
                f"Scores {number} have the sets {list(other)}, the first {list(first)}: evaluate "
                "every stage on the same sets."
            )
        for name in first:
            one, two = first[name].score.settings, other[name].score.settings
            wrong = [
                key
                for key in ("data_sha256", "template", "scored", "bits", "model")
                if one.get(key) != two.get(key)
            ]
            if wrong:
                raise DataError(
                    f"Set {name!r} differs in {', '.join(wrong)} between scores 1 and {number}, so "
                    "a difference need not come from the training. Evaluate every stage on the "
                    "same rows, with the same template, on the same base in the same precision."
                )


def _line(
    name: str,
    measure: str,
    scores: Sequence[Scores],
    trained: int,
    learned_at: int | None,
    seed: int,
) -> Line | None:
    """The line of a set's measure; None where it was not measured at every stage."""
    ones = [one[name] for one in scores]
    found = [_values(one, measure, "tuned") for one in ones]
    if len(found) == trained:
        found.insert(0, _values(ones[0], measure, "base"))
    columns = [values for values in found if values is not None]
    if len(columns) < len(found) or len({columns_of[1] for columns_of in columns}) > 1:
        return None
    if measure != "nll" and len({_asked(one) for one in ones}) > 1:
        return None
    if measure == "right" and len({one.right_by for one in ones}) > 1:
        return None
    if measure == "leak" and len({_leak_rule(one, name) for one in scores}) > 1:
        return None
    sign = 1.0 if measure == "right" else -1.0  # so that more is better
    levels = tuple(sum(sums) / sum(counts) for sums, counts in columns)
    now, last = columns[-1], len(columns) - 1

    def risen(since: int) -> Interval:
        return _change(columns[since], now, sign, measure, seed)

    best = max(range(last), key=lambda stage: sign * levels[stage])
    newest = learned_at == last
    return Line(
        name,
        measure,
        ones[-1].right_by if measure == "right" else NAMES[measure],
        learned_at,
        levels,
        gain=risen(0) if learned_at is not None else None,
        forgetting=None if newest else _negated(risen(best)),
        transfer=risen(learned_at) if learned_at is not None and not newest else None,
    )


def _asked(one: SetScores) -> tuple[tuple[str, str], ...]:
    """The prompts answered."""
    return tuple((answer.prompt, answer.input) for answer in one.answers.get("tuned", ()))


def _leak_rule(scores: Scores, name: str) -> tuple[Any, ...]:
    """What decides which answers count as leaks: the form, and the base's own answers."""
    base = scores[name].answers.get("base", ())
    return (scores.settings.get("leak"), *(answer.text for answer in base))


def _values(one: SetScores, measure: str, side: str) -> Values | None:
    """Sums and counts of a set's rows; None where they were not measured."""
    if measure == "nll":
        sums = one.score.row_nll if side == "tuned" else one.score.row_base_nll
        counts: tuple[float, ...] = one.score.row_tokens
    elif measure == "right":
        sums = one.values[side].right if side in one.values else None
        counts = (1.0,) * len(sums or ())
    else:
        sums = one.leak.get(side)
        counts = (1.0,) * len(sums or ())
    return (sums, counts) if sums else None


def _change(before: Values, now: Values, sign: float, measure: str, seed: int) -> Interval:
    """Now less before, so signed that more is better."""
    if measure == "nll":
        rises = [sign * (b - a) for a, b in zip(before[0], now[0], strict=True)]
        return mean_interval(rises, now[1], seed=seed)
    found = share_change(before[0], now[0], seed=seed)
    return found if sign > 0 else _negated(found)


def _negated(one: Interval) -> Interval:
    return Interval(-one.value + 0.0, -one.high + 0.0, -one.low + 0.0, one.se, one.n)


def _mean(parts: list[Interval | None]) -> float | None:
    values = [part.value for part in parts if part is not None]
    return sum(values) / len(values) if values else None


def _span(part: Interval | None, unit: str) -> str:
    """A change with its interval."""
    return "" if part is None else span(part.value, part.low, part.high, unit)


def _unsure(lines: list[Line]) -> list[str]:
    """What the samples were too small to show."""
    parts = [
        f"{line.set} {figure(line.forgetting.detectable, line.unit)}"
        for line in lines
        if line.measure == "nll" and line.forgetting is not None and not line.forgetting.clear
        if line.forgetting.se > 0
    ]
    if not parts:
        return []
    return [
        "No forgetting is shown where the interval holds 0; a true rise of the NLL of this size "
        f"would be seen in 8 of 10 such samples: {', '.join(parts)} nats per token."
    ]
