"""The ended trials of a sweep: what each gave, which no other beats, and why some failed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.whole_files import write_whole_text

COMPLETE, FAILED, SKIPPED = "complete", "failed", "skipped"


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

    def to_dict(self) -> dict[str, Any]:
        """Flat, as a line of `trials.jsonl`."""
        own = {name: getattr(self, name) for name in ("number", "state", "params")}
        return {**own, "gain": self.gain, "forgetting": self.forgetting, **self.details}


@dataclass(frozen=True)
class SweepResult:
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

    def __str__(self) -> str:
        """The front as a table, then what failed and why."""
        counts = {state: len(self.of(state)) for state in (COMPLETE, FAILED, SKIPPED)}
        lines = [
            f"Sweep {self.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items()) + "."
        ]
        if self.front:
            lines.append("No other trial has more gain with less forgetting than these:")
        for one in self.front:
            settings = ", ".join(f"{name} {value}" for name, value in one.params.items())
            lines.append(
                f"  trial {one.number}: gain {one.gain:.4g}, forgetting {one.forgetting:.4g}: "
                f"{settings}"
            )
        for one in (*self.of(FAILED), *self.of(SKIPPED)):
            reason = str(one.details.get("reason", "")).splitlines()
            lines.append(f"  trial {one.number} {one.state}: {reason[0] if reason else ''}")
        return "\n".join(lines)


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
