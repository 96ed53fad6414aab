"""An epoch's order dealt out to several processes, so that each has its share of rehearsal rows.

An optimizer batch holds the same rows on any number of processes. Within it every process gets as
many rehearsal rows as its share of the ratio says, rounded up or down, and over the epoch the
roundings even out.
"""

from collections.abc import Sequence
from fractions import Fraction


def dealt(
    order: list[int], first: int, ratio: float, *, ranks: int, batch: int, steps: int
) -> list[int]:
    """The order whose forwards, handed to the processes in turn, give each its share.

    Args:
        order: Places of an epoch, evenly interleaved (any window within one row of the ratio).
        first: The first place that is a rehearsal row.
        ratio: Share of rehearsal rows.
        ranks: Processes; with one the order stays as it is.
        batch: Rows of a process's forward.
        steps: Forwards of an optimizer step.

    Returns:
        As many places; rows `batch * (k * ranks + r)` and on are process r's k-th forward.
    """
    if ranks == 1:
        return order
    share, window = Fraction(str(float(ratio))), ranks * batch * steps
    found: list[int] = []
    owed = [Fraction(0)] * ranks
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        slots = [(place // batch) % ranks for place in range(len(rows))]
        counts = _counts(sum(row >= first for row in rows), slots, share, owed)
        found += _placed(rows, first, slots, counts)
    return found


def _counts(total: int, slots: list[int], share: Fraction, owed: list[Fraction]) -> list[int]:
    """Rehearsal rows of each process in one optimizer batch; keeps in `owed` what it is short of.

    Args:
        total: Rehearsal rows of the batch.
        slots: Whose each of its places is.
        share: The ratio.
        owed: Rows, or parts of one, by process; changed.
    """
    due = [share * slots.count(rank) for rank in range(len(owed))]
    counts = [int(one) for one in due]
    owed[:] = [before + one for before, one in zip(owed, due, strict=True)]
    short = [rank for rank, one in enumerate(due) if one.denominator > 1]
    short.sort(key=lambda rank: counts[rank] - owed[rank])
    spare = [rank for rank in range(len(owed)) if rank not in short]
    for rank in (short + spare)[: total - sum(counts)]:
        counts[rank] += 1
    owed[:] = [one - count for one, count in zip(owed, counts, strict=True)]
    return counts


def _placed(rows: list[int], first: int, slots: list[int], counts: Sequence[int]) -> list[int]:
    """The rows of one optimizer batch, each process's rehearsal rows evenly among its places."""
    chosen: set[int] = set()
    for rank, count in enumerate(counts):
        own = [place for place, owner in enumerate(slots) if owner == rank]
        chosen |= {own[(2 * i + 1) * len(own) // (2 * count)] for i in range(count)}
    rehearsal = iter([row for row in rows if row >= first])
    task = iter([row for row in rows if row < first])
    return [next(rehearsal if place in chosen else task) for place in range(len(rows))]
