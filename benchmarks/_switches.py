"""Environment switches that a benchmark sets before Unsloth is imported."""

import os


def compile_less(model: str) -> None:
    """Gemma 3 takes Unsloth's generic path, whose compilation takes minutes for runs of minutes
    (seen on an H100); the numbers are those of the same code uncompiled.

    Args:
        model: Name or folder of the model.
    """
    if "gemma-3" in model.lower():
        os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
