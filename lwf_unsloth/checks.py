"""Checks of arguments that many functions take."""

import numbers
from typing import Any

from lwf_unsloth.errors import ConfigError

MOST_RATIO = 0.999
"""Highest share of rehearsal rows: 999 beside each task row."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ConfigError unless the value is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number from {least}.")


def check_ratio(ratio: object, name: str = "The rehearsal ratio") -> float:
    """The share of rehearsal rows as a float, 0 <= ratio < 1, and at most `MOST_RATIO`.

    Args:
        ratio: What was given.
        name: What it is called where it was given.

    Raises:
        ConfigError: anything else (text, None, NaN, 1.0, a truth value).
    """
    is_number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not is_number or not 0 <= float(ratio) < 1:  # type: ignore[arg-type]
        raise ConfigError(
            f"{name} is {ratio!r}; it must be a number of at least 0 and below 1. It is the share "
            "of rehearsal rows in the mixed set: 0.1 makes one row in ten a rehearsal row, and at "
            "1 no task row would be left."
        )
    if float(ratio) > MOST_RATIO:  # type: ignore[arg-type]
        raise ConfigError(
            f"{name} is {ratio!r}: under one row in a thousand would be a task row, and an epoch "
            f"would hardly end. It may be {MOST_RATIO} at most."
        )
    return float(ratio)  # type: ignore[arg-type]
