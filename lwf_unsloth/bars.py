"""The progress bar of work in batches."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def batch_bar(batches: Sequence[T], what: str) -> Iterable[T]:
    """The batches, under a progress bar if there are two or more, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[T] = tqdm(batches, desc=what, unit="batch", leave=False, disable=len(batches) < 2)
    return bar
