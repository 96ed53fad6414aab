"""The table of schedules, KL budget and growing rank, from results/schedules.json."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.second_task_table import mean

TITLES = {
    "constant": "**lambda 2, constant** (the default)",
    "linear": "lambda 4 to 0, linear",
    "cosine": "lambda 4 to .5, cosine",
    "warmup": "lambda rises over the first tenth",
    "budget": "KL budget .02",
    "budget too low": "KL budget .0002, lambda at most 8",
    "rank": "rank 2, from .3 on 8",
    "freeze": "MLP frozen until .3",
    "smoothing": "label smoothing .1",
    "temperature": "temperature 4 to 1, linear",
}
"""Arms in the table's order."""
FACTS = 65
"""Held-out questions: a fact more or less is 1.5 points."""


def section(result: dict[str, Any], as_table: Callable[[list[str], list[list[Any]]], str]) -> str:
    """A table for each card and number of steps: what was learned and what was lost, by arm.

    Args:
        result: What benchmarks/schedules.py wrote.
        as_table: Of tables.py.

    Returns:
        Markdown without the line that names the source.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        card = row.get("card", result["meta"]["card"])
        groups.setdefault((card, row["steps"]), []).append(row)
    return "\n".join(_of(card, steps, rows, as_table) for (card, steps), rows in groups.items())


def _of(card: str, steps: int, rows: list[dict[str, Any]], as_table: Any) -> str:
    """One table; ratios are taken seed by seed."""
    head = ["arm", "facts found", "NLL of the answers", "KL", "KL to the default's"]
    head += ["rise of NLL", "lambda: first, middle, last"]
    lines = []
    for arm, title in TITLES.items():
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        shown = (("facts", ".0%"), ("nll_task", ".2f"), ("kl_general", ".4f"))
        figures = [mean(own, *key) for key in shown] + [_ratio(own, rows)]
        figures.append(mean(own, "nll_general_rise", "+.3f"))
        lines.append([title, *figures, _path(own)])
    seeds = sorted({row["seed"] for row in rows})
    many = "seed" if len(seeds) == 1 else "seeds"
    note = (
        f"\n{card}, {steps} steps, {many} {', '.join(map(str, seeds))}; {FACTS} questions, so one "
        f"fact is {1 / FACTS:.1%}.\n"
    )
    return as_table(head, lines) + note


def _ratio(own: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """KL over that of the constant lambda at the same seed: the mean, and the least and most."""
    plain = {r["seed"]: r.get("kl_general") for r in rows if r["arm"] == "constant"}
    pairs = [(r.get("kl_general"), plain.get(r["seed"])) for r in own]
    found = [a / b for a, b in pairs if a is not None and b]
    if not found:
        return ""
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread}"


def _path(own: list[dict[str, Any]]) -> str:
    """Where lambda went in the first seed that moved it."""
    path = next((row["lambda_path"] for row in own if "lambda_path" in row), None)
    return "" if path is None else ", ".join(f"{value:.3g}" for value in path)
