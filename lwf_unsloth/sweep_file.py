"""A sweep as a YAML file: a training file with a grid, or a budget of trials over a space."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.secret_texts import SECRET_KEYS
from lwf_unsloth.train_file import SECTIONS, checked_sections, read_yaml, refuse_unknown

OWN = ("name", "grid", "space", "trials", "seed", "evaluate")
GAINS = ("nll", "right")
FORGETTINGS = ("kl", "nll", "leak")
EVALUATE = ("general", "general_text", "limit", "answers_limit", "gain", "forgetting")
RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class SweepPlan:
    """What is tried, on which training file, and how it is judged."""

    path: Path
    """The file, for what is said about it."""
    name: str
    """The study's name; several machines that share a storage share the study by it."""
    base: dict[str, dict[str, Any]]
    """Sections `model`, `training`, `data` that every trial starts from."""
    space: dict[str, Any]
    """Setting -> list of values, or {low, high[, log][, step]}."""
    trials: int | None
    """Trials that TPE may choose; None: the space is a grid, every point of it is run."""
    seed: int
    """Of TPE's choices."""
    evaluate: dict[str, Any]
    """`general` or `general_text` (source), `limit`, `gain`, `forgetting`."""

    def slots(self) -> dict[str, dict[str, Any]]:
        """The settings of each trial by its place: a point of the grid is known by its settings,
        not by where it stands in it; where TPE chooses, a trial by its number, without settings.
        """
        if self.trials is not None:
            return {str(number): {} for number in range(self.trials)}
        values = itertools.product(*self.space.values())
        points = [dict(zip(self.space, point, strict=True)) for point in values]
        return {json.dumps(point, sort_keys=True): point for point in points}

    def corners(self) -> Iterator[dict[str, Any]]:
        """Points in which every listed value and every end of a range comes up once."""
        ends = {
            name: [given["low"], given["high"]] if isinstance(given, dict) else given
            for name, given in self.space.items()
        }
        for number in range(max(map(len, ends.values()))):
            yield {name: values[number % len(values)] for name, values in ends.items()}

    @property
    def digest(self) -> str:
        """A hash of all that decides a trial's result; a larger budget of trials keeps it, and so
        does a grid with other numbers.
        """
        grid = self.trials is None
        space = {
            name: None if grid and is_number_list(given) else given
            for name, given in self.space.items()
        }
        parts = (self.base, space, grid, self.evaluate, None if grid else self.seed)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@checked()
def read_sweep_file(path: str | Path) -> SweepPlan:
    """Reads a sweep file; no model library is loaded for it.

    Args:
        path: A YAML file: `model`, `training` and `data` as in a training file, `grid` (or `space`
            and `trials`), `evaluate`.

    Raises:
        ConfigError: Not readable, keys that are not known, nothing to try, or nothing that
            forgetting could be measured on.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}; a sweep needs the sections of a training file, "
            "`grid` and `evaluate`. `lwf-unsloth sweep --help` shows an example."
        )
    refuse_unknown(path, "sections", values, (*SECTIONS, *OWN))
    base = {name: values[name] for name in SECTIONS if values.get(name) is not None}
    checked_sections(path, base)
    space, trials = _space(path, values)
    _refuse_secrets(path, base, space)
    seed, name = values.get("seed", 0), values.get("name", path.stem)
    if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: seed must be a whole number and name a text.")
    return SweepPlan(path, name, base, space, trials, seed, _evaluate(path, values))


def _refuse_secrets(
    path: Path, base: Mapping[str, Mapping[str, Any]], space: Mapping[str, Any]
) -> None:
    """Refuses tokens in a sweep's file: each trial's settings are kept, in the study and beside it.

    Raises:
        ConfigError: A token, or settings of one.
    """
    given = [f"{section}.{key}" for section, part in base.items() for key in part if part[key]]
    found = [name for name in [*given, *space] if name.rpartition(".")[2] in SECRET_KEYS]
    if found:
        raise ConfigError(
            f"{path} sets {', '.join(found)}, and the settings of every trial are kept in the "
            "study and in trials.jsonl, where others may read them. Leave it out and set HF_TOKEN "
            "in the environment: trials have the same."
        )


def _space(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """What is tried, and the budget of trials, if any."""
    grid, space, trials = (values.get(name) for name in ("grid", "space", "trials"))
    if (grid is None) == (space is None) or (grid is None) == (trials is None):
        raise ConfigError(
            f"{path} must have either `grid` (every combination is run) or `space` and `trials` "
            "(so many trials, chosen by what the earlier ones gave): otherwise it does not say "
            "what to try."
        )
    if trials is not None:
        check_count(f"{path}: trials", trials)
    given = grid if space is None else space
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"{path}: grid or space names settings, each with a list of values: lwf_lambda: [1, 2]."
        )
    for name, values_of in given.items():
        _check_values(path, str(name), values_of, ranges=space is not None)
    return {str(name): values_of for name, values_of in given.items()}, trials


def _check_values(path: Path, name: str, given: Any, ranges: bool) -> None:
    """Raises a ConfigError unless these are values that a trial can take."""
    if isinstance(given, dict) and ranges:
        refuse_unknown(path, name, given, RANGE)
        low, high = given.get("low"), given.get("high")
        if not (_is_number(low) and _is_number(high)) or not float(low or 0) < float(high or 0):
            raise ConfigError(f"{path}: {name} needs low and high, numbers with low < high.")
        if given.get("log") and float(low or 0) <= 0:
            raise ConfigError(f"{path}: {name} has log: true, so low must be above 0.")
        return
    plain = (str, int, float, bool, type(None))
    if not isinstance(given, list) or not given or not all(isinstance(v, plain) for v in given):
        also = ", or {low: 1e-4, high: 1e-2, log: true}" if ranges else ""
        raise ConfigError(
            f"{path}: {name} is {given!r}, but must be a list of texts or numbers{also}."
        )
    if len({repr(one) for one in given}) < len(given):
        raise ConfigError(f"{path}: {name} lists a value twice: it would be run twice.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_number_list(given: Any) -> bool:
    """Whether the values of a setting are numbers alone."""
    return isinstance(given, list) and all(map(_is_number, given))


def _evaluate(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a trial is judged, with the defaults."""
    given = values.get("evaluate")
    found = dict(given) if isinstance(given, dict) else {}
    refuse_unknown(path, "evaluate", found, EVALUATE)
    if bool(found.get("general")) == bool(found.get("general_text")):
        raise ConfigError(
            f"{path} needs evaluate.general (Alpaca rows that are not trained on) or "
            "evaluate.general_text (passages), one of them: forgetting is measured on it."
        )
    found = {"limit": 200, "gain": "nll", "forgetting": "kl", **found}
    for name, known in {"gain": GAINS, "forgetting": FORGETTINGS}.items():
        if found[name] not in known:
            raise ConfigError(
                f"{path}: evaluate.{name} is {found[name]!r}, but must be one of {known}."
            )
    for name in ("limit", "answers_limit"):
        value = found.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{path}: evaluate.{name} is {value!r}; it is a whole number from 1.")
    return found
