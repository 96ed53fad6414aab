"""The forgetting benchmark's two pictures, from its result files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._forgetting_arms import FROZEN, KINDS, kind_of, title_of
from benchmarks._forgetting_stats import Group, Items, best, groups, models, score_interval
from benchmarks._forgetting_store import NAME, read_items
from lwf_unsloth.plots import BLUE, GREEN, INK, PURPLE, VERMILION, Chart

LOOKS = {
    "plain": (VERMILION, "s"),
    "ce": (PURPLE, "D"),
    "kl_task": (GREEN, "^"),
    "kl_rehearsal": (BLUE, "o"),
}
LEAST = 1e-4
"""KL below which a point stands at the edge: the axis is logarithmic."""
NAMED = ("plain_sft", "ours", "document", "ours_self", "rehearsal_ce", "masked_all", "response_kl")


def draw(folder: Path) -> list[Path]:
    """Draws both pictures beside the result; nothing where there is no result.

    Args:
        folder: Of the result files, and of the pictures.

    Returns:
        The PNG files.
    """
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return []
    result, items = json.loads(path.read_text(encoding="utf-8")), read_items(folder)
    found = {model: groups(result["rows"], model) for model in models(result)}
    found = {model: some for model, some in found.items() if any(g.arm != FROZEN for g in some)}
    if not found:
        return []
    figures = {"pareto": _pareto(found, items), "predicted": _predicted(found)}
    paths = []
    for name, figure in figures.items():
        png, svg = Chart(figure).save(folder / f"{NAME}_{name}")
        svg.unlink()
        paths.append(png)
    return paths


def _pareto(found: dict[str, list[Group]], items: Items) -> Figure:
    """Right answers over KL, with intervals over test rows; the best stand high and left."""
    figure = Figure(figsize=(5.6 * len(found), 4.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (model, some) in zip(panels, found.items(), strict=True):
        for group in some:
            if group.arm == FROZEN:
                continue
            one, y = score_interval(group, items), group.mean("new_score") or 0.0
            ends = (y, y) if one is None else (one.low, one.high)
            reach = [[100 * max(y - ends[0], 0)], [100 * max(ends[1] - y, 0)]]
            _point(axes, group, 100 * y, reach)
        for arm in NAMED:
            if chosen := best(some, arm):
                at = (_kl(chosen), 100 * (chosen.mean("new_score") or 0.0))
                axes.annotate(
                    title_of(arm).split(":")[0], at, (5, 4), textcoords="offset points", fontsize=7
                )
        _axes(axes, model, "right answers, %")
    _legend(figure, list(panels))
    return figure


def _predicted(found: dict[str, list[Group]]) -> Figure:
    """Rise of general NLL, and leak, over KL."""
    shown = ("rise of general NLL", "leak")
    figure = Figure(figsize=(4.6 * len(found), 7.0), layout="constrained")
    grid = figure.subplots(len(shown), len(found), squeeze=False)
    for line, cost in zip(grid, shown, strict=True):
        for axes, (model, some) in zip(line, found.items(), strict=True):
            for group in some:
                value = group.cost(cost)
                if group.arm != FROZEN and value is not None:
                    _point(axes, group, 100 * value if cost == "leak" else value, None)
            _axes(axes, model, "leak, %" if cost == "leak" else f"{cost}, nats a token")
    _legend(figure, list(grid.flatten()))
    return figure


def _point(axes: Axes, group: Group, y: float, reach: Any) -> None:
    """One marker by kind of arm; filled where several seeds stand behind it."""
    colour, marker = LOOKS[kind_of(group.arm)]
    filled = colour if len(group.rows) > 1 else "white"
    label = KINDS[kind_of(group.arm)]
    axes.errorbar(
        _kl(group), y, yerr=reach, color=colour, marker=marker, markerfacecolor=filled,
        linestyle="", elinewidth=0.8, capsize=2, markersize=6, label=label,
    )  # fmt: skip


def _kl(group: Group) -> float:
    return max(group.mean("kl_general") or 0.0, LEAST)


def _axes(axes: Axes, model: str, what: str) -> None:
    axes.set_xscale("log")
    axes.set_title(model, fontsize=10, loc="left")
    axes.set_xlabel("KL(base || tuned) on general rows, nats a token", fontsize=9)
    axes.set_ylabel(what, fontsize=9)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.grid(linewidth=0.5, alpha=0.4)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One entry a kind, filled or not as it came first."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    known = [label for label in KINDS.values() if label in entries]
    figure.legend(
        [entries[label] for label in known], known, loc="outside upper center", ncols=len(known),
        frameon=False, fontsize=8,
    )  # fmt: skip
