"""The tables of self-written rehearsal and of a second task, from results/self_rehearsal.json."""

import statistics
from collections.abc import Callable
from typing import Any

POOLS = {
    "base": "before",
    "none": "no rehearsal (plain fine-tuning)",
    "general": "153 general rows that were given",
    "self": "**rows that the model wrote itself**",
}
"""First arms of self_rehearsal in the table's order."""


def section(result: dict[str, Any], as_table: Callable[[list[str], list[list[Any]]], str]) -> str:
    """The FAQ by kind of rehearsal; then code on top of it, by teacher.

    Args:
        result: What benchmarks/second_task.py wrote.
        as_table: Of tables.py.

    Returns:
        Markdown without the line that names the source.
    """
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        parts.setdefault(row["part"], {}).setdefault(row["arm"], []).append(row)
    first, second = parts.get("first", {}), parts.get("second", {})
    lines = [
        [name, *_retention(first[arm]), mean(first[arm], "seconds", ".0f", " s")]
        for arm, name in POOLS.items()
        if arm in first
    ]
    head = ["FAQ", "facts found", "NLL of the answers", "KL", "rise of NLL", "time"]
    tables = [as_table(head, lines)] if lines else []
    keys = (("facts", ".0%"), ("facts_after_second", ".0%"))
    more = (("nll_code", ".2f"), ("kl_general", ".4f"), ("nll_general_rise", "+.3f"))
    lines = [
        [arm, *(mean(rows, *key) for key in keys), _kept(rows), *(mean(rows, *k) for k in more)]
        for arm, rows in second.items()
    ]
    head = ["then code: teacher, rehearsal", "facts before", "facts after", "kept"]
    head += ["NLL of code", "KL", "rise of NLL"]
    tables += [as_table(head, lines)] if lines else []
    note = ""
    if tables:
        note = "\nKL to the base and rise of NLL: nats a token on 60 general answers held out. Mean"
        note += " over the seeds, with the standard deviation where there are several.\n"
    for rows in parts.get("evaluation", {}).values():
        for row in (row for row in rows if "seconds" in row):
            note += f"Evaluating one adapter, {row['arm']}: {row['seconds']:.0f} s.\n"
    return "\n".join(tables) + note


def _retention(rows: list[dict[str, Any]]) -> list[str]:
    keys = (
        ("facts", ".0%"), ("nll_task", ".2f"), ("kl_general", ".4f"), ("nll_general_rise", "+.3f"),
    )  # fmt: skip
    return [mean(rows, *key) for key in keys]


def mean(rows: list[dict[str, Any]], key: str, form: str, unit: str = "") -> str:
    """Mean and deviation of a figure over the seeds that have it; else the error, or nothing."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return next((row["error"].split(":")[0] for row in rows if row.get("error")), "")
    shown = f"{statistics.mean(values):{form}}"
    if len(values) > 1 and not unit:
        shown += f" ± {statistics.stdev(values):{form.replace('+', '')}}"
    return shown + unit


def _kept(rows: list[dict[str, Any]]) -> str:
    """Facts after the second task over those before it."""
    both = [(r["facts_after_second"], r["facts"]) for r in rows if "facts_after_second" in r]
    before = sum(b for _, b in both)
    return f"{sum(a for a, _ in both) / before:.0%}" if before else ""
