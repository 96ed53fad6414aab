"""What a loss curve says: still falling, rising, or past its best on held-out rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 10
"""Logged losses under which a curve says nothing."""
NOTABLE = 0.05
"""Change, as a share of the loss, that is more than its noise."""
OVER = 0.03
"""Rise of the held-out loss, as a share, that is one."""


@dataclass(frozen=True)
class Trend:
    """A change of the loss, in nats per token."""

    before: float
    now: float
    epoch: float = math.nan
    """Where the loss was lowest, in epochs, of a held-out loss."""


def fifths(losses: Sequence[float]) -> list[float]:
    """Means of the five fifths of the curve."""
    ends = [round(i * len(losses) / 5) for i in range(6)]
    return [math.fsum(losses[a:b]) / (b - a) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def _noise(losses: Sequence[float]) -> float:
    """Standard error of the difference of two fifths, from the steps between neighbours."""
    steps = [(b - a) ** 2 / 2 for a, b in zip(losses, losses[1:], strict=False)]
    return math.sqrt(math.fsum(steps) / len(steps) * 2 / (len(losses) / 5))


def falling(losses: Sequence[float]) -> Trend | None:
    """Whether the last fifth is notably under the one before, beyond twice the noise."""
    if len(losses) < FEWEST or not all(map(math.isfinite, losses)):
        return None
    *_, before, now = fifths(losses)
    drop = before - now
    return Trend(before, now) if drop > max(NOTABLE * before, 2 * _noise(losses)) else None


def rising(losses: Sequence[float]) -> Trend | None:
    """Whether the curve ends notably above its lowest fifth, or is no number any more."""
    if len(losses) < FEWEST:
        return None
    if not all(map(math.isfinite, losses)):
        return Trend(next(filter(math.isfinite, losses), math.nan), math.nan)
    means = fifths(losses)
    low, now = min(means), means[-1]
    return Trend(low, now) if now - low > max(NOTABLE * low, 2 * _noise(losses)) else None


def overfitted(evals: Sequence[tuple[float, float]]) -> Trend | None:
    """Whether a later evaluation is notably above an earlier one.

    Args:
        evals: (epoch, held-out loss) of each, in order.
    """
    if len(evals) < 2:
        return None
    epoch, low = min(evals, key=lambda one: one[1])
    last_epoch, now = evals[-1]
    return Trend(low, now, epoch) if now > low * (1 + OVER) and last_epoch > epoch else None
