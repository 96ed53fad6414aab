"""The figure of a sweep: what each trial gained against what it forgot, and the front of the best.

The front is told from the rest by filled markers, a line and numbers, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import DataError
from lwf_unsloth.markup import shown
from lwf_unsloth.plots import BLUE, INK, VERMILION, Chart, plain_axes
from lwf_unsloth.sweep_result import COMPLETE, SweepResult, TrialRecord, said

LISTED = 12
"""Trials of the front whose settings are written out."""
LONGEST = 60
"""Characters of a trial's settings that are written out."""
WIDE = 30
"""Ratio of the largest to the smallest forgetting from which on the axis is logarithmic."""


@checked()
def plot_sweep(result: SweepResult, most_forgetting: float | None = None) -> Chart:
    """Gain against forgetting of every complete trial; whiskers are 95 % intervals over the rows.

    Args:
        result: What `run_sweep` gave.
        most_forgetting: A limit to draw, in the sweep's unit of forgetting; the trial that
            `result.best` takes under it gets a ring.

    Returns:
        The chart. Filled markers are the front: no other trial has more gain with less forgetting.
        Beside it stand their numbers and settings.

    Raises:
        DataError: No trial is complete.
    """
    front = result.front
    if not front:
        raise DataError(f"No trial of the sweep {result.name} is complete.\n{result}")
    others = [one for one in result.of(COMPLETE) if one not in front]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 1)
    _points(axes, others, mfc="none", color=INK, marker="o", alpha=0.55, label="others")
    _points(axes, front, color=BLUE, marker="D", label="front: no other beats it")
    ends = [(_factor(one, "forgetting") * (one.forgetting or 0), one) for one in front]
    axes.step(
        [x for x, _ in reversed(ends)],
        [_factor(one, "gain") * (one.gain or 0) for _, one in reversed(ends)],
        where="post",
        color=BLUE,
        linewidth=1.2,
        alpha=0.7,
    )
    _mark(axes, result, most_forgetting)
    for one in front:
        _number(axes, one)
    _settle(axes, front[0], [float(one.forgetting or 0) for one in (*front, *others)])
    axes.legend(fontsize=8, frameon=False, loc="best", markerscale=0.7)
    figure.legend(
        handles=[Line2D([], [], linestyle="") for _ in front[:LISTED]],
        labels=[_line(one) for one in front[:LISTED]],
        loc="outside right upper",
        handlelength=0,
        handletextpad=0,
        frameon=False,
        fontsize=8,
        title="trials of the front",
        title_fontsize=9,
        alignment="left",
    )
    return Chart(figure)


def _factor(one: TrialRecord, side: str) -> float:
    """Shares are drawn in points."""
    return 1.0 if one.measured_by(side) in ("nll", "kl") else 100.0


def _points(axes: Axes, trials: Sequence[TrialRecord], **style: Any) -> None:
    """One marker a trial, with the intervals that are known."""
    label = style.pop("label")
    for one in trials:
        value, errors = {}, {}
        for side in ("forgetting", "gain"):
            factor, known = _factor(one, side), one.interval(side)
            value[side] = factor * float(getattr(one, side))
            if known is not None:
                down, up = known.value - known.low, known.high - known.value
                errors[side] = [[factor * max(down, 0.0)], [factor * max(up, 0.0)]]
        axes.errorbar(
            value["forgetting"],
            value["gain"],
            xerr=errors.get("forgetting"),
            yerr=errors.get("gain"),
            linestyle="",
            capsize=2,
            elinewidth=0.8,
            markersize=7,
            label=label,
            **style,
        )
        label = "_more"  # matplotlib leaves names with _ out of the legend


def _mark(axes: Axes, result: SweepResult, limit: float | None) -> None:
    """The limit as a line, and the best trial under it in a ring."""
    best = result.best(limit)
    if limit is None or not result.front:
        return
    factor = _factor(result.front[0], "forgetting")
    axes.axvline(
        factor * limit, color=VERMILION, linestyle="--", linewidth=1, label=f"limit {limit:g}"
    )
    if best is not None:
        axes.plot(
            factor * float(best.forgetting or 0),
            _factor(best, "gain") * float(best.gain or 0),
            marker="o",
            markersize=17,
            fillstyle="none",
            color=VERMILION,
            linestyle="",
            label="best under the limit",
        )


def _number(axes: Axes, one: TrialRecord) -> None:
    """The trial's number beside its marker."""
    place = (
        _factor(one, "forgetting") * float(one.forgetting or 0),
        _factor(one, "gain") * float(one.gain or 0),
    )
    axes.annotate(str(one.number), place, xytext=(6, 5), textcoords="offset points", fontsize=9)


def _settle(axes: Axes, one: TrialRecord, places: Sequence[float]) -> None:
    """What the axes say, and their scale."""
    wide = min(places) > 0 and max(places) / min(places) > WIDE
    if wide:
        axes.set_xscale("log")
    axes.set_xlabel(said(one, "forgetting") + (" (log scale)" if wide else ""), fontsize=9)
    axes.set_ylabel(said(one, "gain").replace(", ", "\n"), fontsize=9)
    axes.set_title("up is learned, left is kept", fontsize=10, loc="left")
    axes.margins(0.1)
    plain_axes(axes, "both")


def _line(one: TrialRecord) -> str:
    """A trial's number and settings; `$` is a sign here and no mathematics."""
    text = shown(one.settings).replace("\n", " ")
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return f"{one.number}: {text}".replace("$", r"\$")
