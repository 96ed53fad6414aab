"""The forgetting benchmark's section of benchmarks/README.md, from results/forgetting.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._forgetting_arms import FROZEN, KINDS, NAMES, SEEDED, key_of, plan, title_of
from benchmarks._forgetting_stats import (
    PREDICTORS,
    Group,
    Items,
    best,
    dominating,
    groups,
    leak_interval,
    models,
    predictions,
    score_interval,
    share,
)
from lwf_unsloth.intervals import Interval

HEAD = [
    "arm (rate)", "seeds", "right %", "gain kept", "SQL NLL", "NLL gain kept", "KL",
    "of plain's KL", "rise of general NLL", "of text NLL", "leak %", "EOS %",
]  # fmt: skip
SHOWN = 3
"""Most arms that a verdict names."""
PICTURES = {
    "forgetting_pareto": "Right answers against KL on general rows, one point an adapter",
    "forgetting_predicted": "Rise of NLL and leak against KL on general rows",
}
INTRO = (
    "New task: text-to-SQL (Spider and SParC), test databases unseen in training. Right: one of "
    "the query's accepted forms, case and spaces aside. What is kept is measured on {} general "
    "answers held out: KL(base || tuned) and rise of NLL, nats a token; leak: share of them "
    "answered in SQL; EOS: queries that end by themselves. Every arm has 16 task rows a step, {} "
    "steps, rank {}, the same rows and schedule. Kept and shares are against plain SFT at its best "
    "rate (**bold**: an arm's best), paired by test row, with 95 % intervals over test rows; ± is "
    "the deviation over seeds."
)


def section(result: Mapping[str, Any], items: Items, folder: Path, table: Any, source: str) -> str:
    """The section as markdown.

    Args:
        result: forgetting.json.
        items: forgetting_items.json; without it there are no intervals.
        folder: Of the pictures.
        table: `as_table` of tables.py.
        source: Card, versions and commit in a line.
    """
    rows, settings = result["rows"], result["meta"].get("settings", {})
    first: Mapping[str, str] = next(iter(items.values()), {})
    count = len(first.get("leak", "")) or "the"
    parts = ["## What a new skill costs\n"]
    parts.append(INTRO.format(count, settings.get("steps"), settings.get("rank")) + "\n")
    for model in models(result):
        found = groups(rows, model)
        parts.append(f"**{model}**, {sum(len(g.rows) for g in found)} adapters\n")
        parts.append(table(HEAD, [_line(group, found, items) for group in _ordered(found)]))
        failed = [row for row in rows if row["model"] == model and row.get("error")]
        parts += [f"{row['arm']} at {row['lr']:g}: {row['error']}\n" for row in failed]
        parts.append(verdict(found, items))
        parts.append(_left(rows, model, result["meta"].get("seed")))
        parts.append(_predicted(rows, model, table))
    for name, what in PICTURES.items():
        if (folder / f"{name}.png").is_file():
            parts.append(f"![{what}](results/{name}.png)\n")
    return "\n".join(part for part in parts if part) + source


def _left(rows: Sequence[Mapping[str, Any]], model: str, seeds: Any) -> str:
    """What was planned and not measured."""
    mine: list[Any] = [row for row in rows if row["model"] == model]
    done = {key_of(row) for row in mine}
    wanted = plan(mine, seeds if isinstance(seeds, list) else [0], NAMES)
    left = [f"{title_of(job.arm)} ({job.lr:g})" for job in wanted if job.key not in done]
    return f"Planned, and not measured: {'; '.join(dict.fromkeys(left))}.\n" if left else ""


def _ordered(found: Sequence[Group]) -> list[Group]:
    """By family, plain's turned-down adapters after it, then by rate."""
    place = {name: number for number, name in enumerate(NAMES)}
    return sorted(found, key=lambda g: (place.get(g.arm, place["plain_sft"] + 0.5), g.arm, g.lr))


def _line(group: Group, found: Sequence[Group], items: Items) -> list[str]:
    plain = best(found, "plain_sft")
    name = title_of(group.arm) + (f" ({group.lr:g})" if group.arm != FROZEN else "")
    shown = f"**{name}**" if group.arm in SEEDED and group is best(found, group.arm) else name
    kept = {} if group.arm == FROZEN else {
        key: _share(share(group, plain, items, key)) for key in ("right", "task_gain", "general_kl")
    }  # fmt: skip
    right, leak = score_interval(group, items), leak_interval(group, items)
    return [
        shown,
        str(len(group.rows)),
        _percent(group.mean("new_score"), right) + _spread(group),
        kept.get("right", ""),
        _figure(group.mean("new_nll"), ".3f"),
        kept.get("task_gain", ""),
        _figure(group.mean("kl_general"), ".4f"),
        kept.get("general_kl", ""),
        _figure(group.cost("rise of general NLL"), "+.3f"),
        _figure(group.cost("rise of text NLL"), "+.3f"),
        _percent(group.mean("leak_rate"), leak),
        _percent(group.mean("eos_rate"), None),
    ]


def verdict(found: Sequence[Group], items: Items) -> str:
    """Ours and the document's recipe against plain SFT, each at its best rate, in sentences."""
    plain = best(found, "plain_sft")
    lines = []
    for arm in ("ours", "document"):
        group = best(found, arm)
        if plain is None or group is None:
            continue
        right, nll, kl, rise = (
            _share(share(group, plain, items, name)) or "–"
            for name in ("right", "task_gain", "general_kl", "general_rise")
        )
        leak = _percent(group.mean("leak_rate"), leak_interval(group, items))
        names = [title_of(one.arm) + f" ({one.lr:g})" for one in dominating(group, found)]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        better = ", ".join([*names[:SHOWN], *more])
        lines.append(
            f"{title_of(arm)}, rate {group.lr:g}, against plain SFT at {plain.lr:g}: gain kept "
            f"{right}, NLL gain kept {nll}, at {kl} of its KL and {rise} of its rise of general "
            f"NLL; leak {leak} %. "
            + (
                f"No worse in score, KL and leak, by the points: {better}."
                if better
                else "No arm dominates it."
            )
        )
    if plain is not None and (plain.mean("new_score") or 0.0) < 0.1:
        lines.append("Plain SFT gains less than 10 points, so scores say little.")
    return "\n\n".join(lines) + "\n" if lines else ""


def _predicted(rows: Sequence[Mapping[str, Any]], model: str, table: Any) -> str:
    """R^2 of each cost on each KL, a kind of arm a column."""
    found = predictions(rows, model)  # type: ignore[arg-type]
    if not found:
        return ""
    kinds = [kind for kind in ("all", *KINDS) if any(one[2] == kind for one in found)]
    cells = {(cost, by, kind): f"{r2:.2f} ({n})" for cost, by, kind, n, r2 in found}
    lines = [
        [cost, PREDICTORS[by], *(cells.get((cost, by, kind), "") for kind in kinds)]
        for cost, by in dict.fromkeys((one[0], one[1]) for one in found)
    ]
    names = [KINDS.get(kind, "all adapters") for kind in kinds]
    return str(table(["R² (adapters)", "predicted by", *names], lines))


def _share(one: Interval | None) -> str:
    if one is None:
        return ""
    span = "" if one.low != one.low else f" [{one.low:.0%}, {one.high:.0%}]"  # too few for one
    return f"{one.value:.0%}{span}"


def _percent(value: float | None, one: Interval | None) -> str:
    if value is None:
        return ""
    shown = f"{100 * value:.1f}"
    return shown if one is None else f"{shown} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _spread(group: Group) -> str:
    found = group.spread("new_score")
    return "" if found is None else f" ± {100 * found:.1f}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
