"""Checks of arguments that many functions take."""

from typing import Any

from lwf_unsloth.errors import ConfigError

MOST_RATIO = 0.999
"""Highest share of rehearsal rows: 999 beside each task row."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ConfigError unless the value is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number from {least}.")
