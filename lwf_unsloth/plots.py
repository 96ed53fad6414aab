"""Figures: what was gained and forgotten, and the dial. Readable in grey and without colour vision.

Sides are told apart by marker and line as well as by colour (Okabe & Ito's palette); whiskers are
95 % intervals. No global state of matplotlib is touched: a figure belongs to its `Chart`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import DataError
from lwf_unsloth.intervals import Interval
from lwf_unsloth.markup import shown
from lwf_unsloth.whole_files import write_whole, writing

if TYPE_CHECKING:  # a figure of a saved result needs no model library
    from lwf_unsloth.adapter_dial import DialResult
    from lwf_unsloth.forgetting import ForgettingReport, Line
    from lwf_unsloth.recipes import Recipes

BLUE, VERMILION, GREEN, PURPLE, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222"
STYLES = (
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (INK, "v", (0, (5, 1, 1, 1))),
)
"""Colour, marker and line of the first, second, ... set."""
LONGEST_NAME = 28
COSTS = {"nll": "NLL risen", "kl": "KL(base || tuned)", "leak": "leak"}
"""What a set to be kept may have lost, and how a panel calls it."""
UNITS = {"nats": "nats per token", "share": "percentage points"}
CURVES = (
    ("task loss", (("task_loss", "training rows"), ("eval_task_loss", "held-out rows"))),
    ("KL to the teacher", (("kl_rehearsal", "rehearsal rows"), ("kl_task", "task rows"))),
)
"""Panels of a training's chart: title, then each name in the log with its label."""


@dataclass(frozen=True)
class Chart:
    """A figure that shows itself in a notebook and saves itself as PNG and SVG."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        """The picture for a notebook."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Writes PATH.png and PATH.svg.

        Args:
            path: Where to, with or without an ending; the folder is made.

        Returns:
            Both paths.

        Raises:
            DiskError: The disk is full, or the folder may not be written.
        """
        path = Path(path)
        stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
        png, svg = (stem.with_name(stem.name + ending) for ending in (".png", ".svg"))
        drawn = [io.BytesIO(), io.BytesIO()]  # matplotlib itself passes over a full disk
        self.figure.savefig(drawn[0], format="png", dpi=160)
        self.figure.savefig(drawn[1], format="svg", metadata={"Date": None})
        with writing(stem.parent):
            for target, picture in zip((png, svg), drawn, strict=True):
                write_whole(target, picture.getvalue())
        return png, svg


@checked()
def plot_forgetting(report: ForgettingReport) -> Chart:
    """Gain of each task beside forgetting of what was to be kept; over several tasks also R.

    Args:
        report: What `forgetting_report` gave.

    Returns:
        The chart: a row of panels for NLL, one for shares (right answers, leak) where there are
        any, and, over several trainings, a panel of the levels at each stage.
    """
    units = [unit for unit in UNITS if any(line.unit == unit for line in report.lines)]
    several = len(report.stages) > 2
    counts = [sum(line.unit == unit for line in report.lines) for unit in units]
    heights = [0.9 + 0.42 * max(count, 2) for count in counts]
    figure = Figure(figsize=(13.5 if several else 9.5, sum(heights) + 0.5), layout="constrained")
    columns = 3 if several else 2
    grid = figure.subplots(
        len(units), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for unit, axes in zip(units, grid, strict=True):
        lines = [line for line in report.lines if line.unit == unit]
        _whiskers(axes[0], lines, lambda line: line.gain, unit)
        _whiskers(axes[1], lines, lambda line: line.forgetting, unit)
        axes[0].set_title("gained on the task  (more is better)", fontsize=10, loc="left")
        axes[1].set_title("forgotten  (0 is nothing lost)", fontsize=10, loc="left")
        if several:
            _levels(axes[2], lines, report.stages, unit)
    return Chart(figure)


@checked()
def plot_dial(result: DialResult) -> Chart:
    """Gain and cost at each scale of the adapter.

    Args:
        result: What `dial` gave.

    Returns:
        The chart: NLL gained on task sets; NLL risen on general sets and KL there; right answers
        and leak where they were asked for.
    """
    one = next(iter(result.scores.values()))
    tasks = [name for name, part in one.items() if part.kind == "task"]
    general = [name for name, part in one.items() if part.kind == "general"]
    panels: list[tuple[str, str, list[str]]] = [
        ("NLL gained on the task\nnats per token, more is better", "gain", tasks),
        ("NLL risen elsewhere\nnats per token, 0 is nothing lost", "rise", general),
        ("KL(base || tuned) elsewhere\nnats per token", "kl", general),
        ("right answers, %", "right", tasks),
        ("leak, % of general answers", "leak", general),
    ]
    panels = [panel for panel in panels if _measured(result, panel[1], panel[2])]
    if not panels:
        raise DataError("The dial's scores hold nothing to show: no set was measured with a base.")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in grid[len(panels) :]:
        unused.remove()
    for axes, (title, key, names) in zip(grid, panels, strict=False):
        _scale_lines(axes, result, key, _measured(result, key, names))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("scale of the adapter")
        plain_axes(axes)
    return Chart(figure)


@checked()
def plot_training(history: Sequence[Mapping[str, Any]], steps: int | None = None) -> Chart:
    """The course of a training: task loss beside the KL on rehearsal and on task rows.

    Args:
        history: A trainer's `state.log_history`; entries of other kinds are passed over.
        steps: Steps of the whole run, the width of the chart; None ends at the last entry.

    Returns:
        The chart, nats per token over optimizer steps. It may be drawn while the run goes on.
    """
    figure = Figure(figsize=(8.6, 2.7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), CURVES, strict=True):
        for place, (name, label) in enumerate(names):
            found = [(one["step"], one[name]) for one in history if name in one and "step" in one]
            if not found:
                continue
            colour, marker, line = STYLES[place]
            places, values = zip(*found, strict=True)
            few = marker if len(found) < 10 else ""
            axes.plot(
                places, values, color=colour, marker=few, linestyle=line, markersize=4, label=label
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_xlim(0, steps)
        axes.margins(y=0.1)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", alpha=0.6)
        plain_axes(axes)
    figure.axes[0].set_ylabel(UNITS["nats"], fontsize=9)
    return Chart(figure)


@checked()
def plot_recipes(recipes: Recipes, task: str | None = None) -> Chart:
    """Gain against forgetting: one point a recipe, the best ones high and to the left.

    Args:
        recipes: What `compare_recipes` gave.
        task: The set whose gain is shown; None: the first task set.

    Returns:
        The chart: a panel for each thing that a set to be kept may have lost (rise of the NLL, KL,
        leak), all over the gain: points of right answers where they were asked for, else NLL.
    """
    task = task or recipes.tasks[0]
    gain = "right" if recipes.measured(task, "right") else "nll"
    panels = [
        (name, cost, label)
        for name in recipes.general
        for cost, label in COSTS.items()
        if recipes.measured(name, cost)
    ]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for unused in grid[len(panels) :]:
        unused.remove()
    for axes, (name, cost, label) in zip(grid, panels, strict=False):
        _recipe_points(axes, recipes.change(task, gain), recipes.change(name, cost), gain, cost)
        axes.set_title(f"{_short(name)}: {label}", fontsize=10, loc="left")
        axes.set_xlabel(UNITS["share" if cost == "leak" else "nats"], fontsize=9)
        plain_axes(axes, "both")
    unit = "right answers, points" if gain == "right" else "NLL, nats per token"
    for axes in grid[: len(panels) : columns]:
        axes.set_ylabel(f"gained on {_short(task)}\n{unit}", fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9
    )
    return Chart(figure)


def _recipe_points(
    axes: Axes, gains: dict[str, Interval], costs: dict[str, Interval], gain: str, cost: str
) -> None:
    """One marker a recipe with both intervals."""
    axes.axvline(0, color=INK, linewidth=0.9, alpha=0.6)
    for place, name in enumerate(gains):
        colour, marker, _ = STYLES[place % len(STYLES)]
        x, across = _bars([costs[name]], 100 if cost == "leak" else 1)
        y, up = _bars([gains[name]], 100 if gain == "right" else 1)
        axes.errorbar(
            x,
            y,
            xerr=across,
            yerr=up,
            color=colour,
            marker=marker,
            linestyle="",
            capsize=3,
            markersize=8,
            label=_short(name),
        )
    axes.margins(0.12)


def _measured(result: DialResult, key: str, names: Sequence[str]) -> list[str]:
    """The sets among `names` that have what a panel shows."""
    one = next(iter(result.scores.values()))
    wanted = "nll" if key in ("gain", "rise") else key
    return [
        name
        for name in names
        if wanted in one[name].measures
        and (key not in ("gain", "rise") or one[name]["nll"].change is not None)
    ]


def _scale_lines(axes: Axes, result: DialResult, key: str, names: Sequence[str]) -> None:
    """One line a set over the scales, with whiskers."""
    for place, name in enumerate(names):
        colour, marker, line = STYLES[place % len(STYLES)]
        found = [_point(result, scale, name, key) for scale in result.scales]
        factor = 100 if key in ("right", "leak") else 1
        values, errors = _bars(found, factor)
        axes.errorbar(
            result.scales,
            values,
            yerr=errors,
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=3,
            markersize=5,
            label=_short(name),
        )
    axes.axhline(0, color=INK, linewidth=0.7, alpha=0.5)
    axes.legend(fontsize=8, frameon=False)


def _point(result: DialResult, scale: float, name: str, key: str) -> Interval:
    """What a panel shows at one scale."""
    part = result.scores[scale][name]
    if key not in ("gain", "rise"):
        return part[key].tuned
    change = part["nll"].change
    assert change is not None
    if key == "rise":
        return change
    return Interval(-change.value, -change.high, -change.low, change.se, change.n)


def _whiskers(
    axes: Axes, lines: Sequence[Line], part: Callable[[Line], Interval | None], unit: str
) -> None:
    """One row a set and measure: a marker with its interval and its value in figures."""
    kept = [(line, one) for line in lines if (one := part(line)) is not None]
    factor = 100 if unit == "share" else 1
    axes.axvline(0, color=INK, linewidth=0.9, alpha=0.6)
    for row, (line, one) in enumerate(kept):
        colour, marker = (BLUE, "o") if line.learned_at is not None else (VERMILION, "s")
        value, errors = _bars([one], factor)
        axes.errorbar(
            value, [row], xerr=errors, color=colour, marker=marker, capsize=4, markersize=7
        )
        text = f"{value[0]:+.1f}" if unit == "share" else f"{value[0]:+.3f}"
        axes.annotate(
            text,
            (value[0], row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(kept)), [_row_name(line) for line, _ in kept], fontsize=9)
    axes.set_ylim(len(kept) - 0.4, -0.75)
    axes.set_xlabel(UNITS[unit], fontsize=9)
    axes.margins(x=0.15)
    if not kept:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", alpha=0.6)
    plain_axes(axes, "x")


def _levels(axes: Axes, lines: Sequence[Line], stages: Sequence[str], unit: str) -> None:
    """Each set's level after every stage; a ring where its own training was."""
    factor = 100 if unit == "share" else 1
    for place, line in enumerate(lines):
        colour, marker, style = STYLES[place % len(STYLES)]
        values = [factor * level for level in line.levels]
        axes.plot(
            range(len(stages)),
            values,
            color=colour,
            marker=marker,
            linestyle=style,
            label=_row_name(line).replace("\n", ", "),
        )
        if line.learned_at is not None:
            at = line.learned_at
            axes.plot(
                at, values[at], marker="o", markersize=13, fillstyle="none", color=INK, alpha=0.7
            )
    axes.set_xticks(range(len(stages)), [_short(stage) for stage in stages], fontsize=8)
    axes.set_ylabel("%" if unit == "share" else "NLL, nats per token", fontsize=9)
    axes.set_title("after each training (ring: its own)", fontsize=10, loc="left")
    axes.margins(x=0.12, y=0.15)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes)


def _bars(found: Sequence[Interval], factor: float) -> tuple[list[float], Any]:
    """Values, and how far their intervals reach down and up; no whisker where there is none."""
    values = [factor * one.value for one in found]
    down = [max(factor * (one.value - one.low), 0) if one.low == one.low else 0 for one in found]
    up = [max(factor * (one.high - one.value), 0) if one.high == one.high else 0 for one in found]
    return values, [down, up]


def _row_name(line: Line) -> str:
    """A set's name, and the measure's where it is a share."""
    if line.measure == "nll":
        return _short(line.set)
    return f"{_short(line.set)}\n{'leak' if line.measure == 'leak' else _short(line.name)}"


def _short(name: str) -> str:
    """A name that fits; `$` is a sign here and no mathematics."""
    name = shown(name).replace("\n", " ")
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return name.replace("$", r"\$")


def plain_axes(axes: Axes, grid: Any = "y") -> None:
    """Only the lines that carry something."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, linewidth=0.5, alpha=0.4)
    axes.tick_params(labelsize=8)
