"""LoRA in phases: which rank is trained, and what is frozen, from which share of the run on.

    rank_schedule=[(0.0, 4), (0.5, 16)]        rank 4 in the first half, 16 in the second
    freeze_schedule=[(0.0, "mlp"), (0.3, "")]  nothing in "mlp" moves in the first 30 %

A text says the same, for a grid of a sweep: "0:4, 0.5:16". Progress is `steps done / all steps`, so
a resumed run is in the phase of an undisturbed one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.errors import ConfigError

RANKS, FREEZES = "rank_schedule", "freeze_schedule"
EXAMPLES = {
    RANKS: '[(0.0, 4), (0.5, 16)], or "0:4, 0.5:16"',
    FREEZES: '[(0.0, "mlp"), (0.3, "")], or "0:mlp, 0.3:"',
}
NEAR = 1e-9
"""How far a share may lie over that of a step and still begin with it."""


@dataclass(frozen=True)
class Phases:
    """Values that each hold from a share of the run on, until the next one's."""

    name: str
    """The setting."""
    starts: tuple[float, ...]
    """Shares of the run, 0 <= start < 1, rising."""
    values: tuple[Any, ...]

    def steps(self, total: int) -> list[int]:
        """Steps that have been done when each phase begins.

        Args:
            total: Optimizer steps of the run.

        Raises:
            ConfigError: A phase in which there is no step.
        """
        found = [math.ceil(start * total - NEAR * total) for start in self.starts]
        ends = [*found[1:], total]
        for start, value, first, end in zip(self.starts, self.values, found, ends, strict=True):
            if first >= end:
                raise ConfigError(
                    f"{self.name} has a phase of {value!r} from {start:g} on, but the run has "
                    f"{total} steps and none of them lies in it: it would never act. Move its "
                    "start, leave it out, or train longer."
                )
        return found


def plain(phases: Phases | None) -> list[list[Any]] | None:
    """Phases as YAML and JSON have them: lists of a start and a value."""
    if phases is None:
        return None
    return [list(pair) for pair in zip(phases.starts, phases.values, strict=True)]


def rank_phases(given: Any) -> Phases | None:
    """Reads `rank_schedule`; None where it is None.

    Raises:
        ConfigError: It is no list of phases, does not begin at 0, or its ranks do not rise.
    """
    if given is None:
        return None
    pairs = [(start, _rank(value, given)) for start, value in _pairs(RANKS, given)]
    starts, ranks = zip(*pairs, strict=True)
    if starts[0] != 0:
        raise _refuse(RANKS, given, f"its first phase begins at {starts[0]:g} and must begin at 0")
    for before, after in zip(ranks, ranks[1:], strict=False):
        if after <= before:
            why = (
                f"rank {after} follows on {before}: a smaller rank would throw away what the "
                "columns above it have learned, and the same one changes nothing"
            )
            raise _refuse(RANKS, given, why)
    return Phases(RANKS, starts, ranks)


def freeze_phases(given: Any) -> Phases | None:
    """Reads `freeze_schedule`; None where it is None.

    Raises:
        ConfigError: It is no list of phases, a pattern is no regular expression, or nothing would
            ever be frozen.
    """
    if given is None:
        return None
    pairs = _pairs(FREEZES, given)
    last = ""
    for _, pattern in pairs:
        if not isinstance(pattern, str):
            raise _refuse(FREEZES, given, f"{pattern!r} is no text")
        try:
            re.compile(pattern)
        except re.error as error:
            why = f"{pattern!r} is no regular expression ({error})"
            raise _refuse(FREEZES, given, why) from error
        if pattern == last:
            what = f"freezes {pattern!r} still" if pattern else "freezes nothing, as before it"
            raise _refuse(FREEZES, given, f"one of its phases {what}, so it changes nothing")
        last = pattern
    starts, patterns = zip(*pairs, strict=True)
    return Phases(FREEZES, starts, patterns)


def _pairs(name: str, given: Any) -> list[tuple[float, Any]]:
    """Start and value of each phase."""
    phases = _split(given) if isinstance(given, str) else given
    if not isinstance(phases, Sequence) or not phases:
        raise _refuse(name, given, "it names no phase")
    found: list[tuple[float, Any]] = []
    for phase in phases:
        pair = isinstance(phase, Sequence) and not isinstance(phase, str) and len(phase) == 2
        if not pair:
            raise _refuse(name, given, f"{phase!r} is no pair of a share of the run and a value")
        start = phase[0]
        number = isinstance(start, (int, float)) and not isinstance(start, bool)
        if not number or not 0 <= start < 1:
            raise _refuse(name, given, f"{start!r} is no share of the run, 0 <= share < 1")
        if found and start <= found[-1][0]:
            raise _refuse(name, given, f"{start:g} does not come after {found[-1][0]:g}")
        found.append((float(start), phase[1]))
    return found


def _split(text: str) -> list[list[Any]]:
    """The phases of a text; what is no number stays a text, and is refused as such."""
    parts = [part.split(":", 1) for part in text.split(",") if part.strip()]
    return [[_number(part[0], float), *(one.strip() for one in part[1:])] for part in parts]


def _number(text: Any, kind: type) -> Any:
    """A text's number, or the text."""
    try:
        return kind(text)
    except ValueError:
        return text


def _rank(value: Any, given: Any) -> int:
    """A phase's rank; that of a text is one too."""
    rank = _number(value, int) if isinstance(given, str) else value
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _refuse(RANKS, given, f"{value!r} is no rank, a whole number of 1 or more")
    return rank


def _refuse(name: str, given: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{name} is {given!r}, but {why}. It lists the phases, each as the share of the run where "
        f"it begins and what holds from there on: {EXAMPLES[name]}."
    )
